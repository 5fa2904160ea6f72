package authority

import (
	"bytes"
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/store"
)

func TestTheSecretIsNeitherStoredNorLogged(t *testing.T) {
	c := newClock()
	path := filepath.Join(t.TempDir(), "store")
	st, err := store.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	var log logBuffer
	s := &Server{Self: newSelf(t), Store: st, Now: c.now, Logger: newLogger(&log)}
	n := &network{server: s}
	ticket := newTicket(t, s, Grant{Name: "db1", Uses: 2})
	for range 3 { // the third is refused
		client := newClient(t, n, nil)
		client.Logger = newLogger(&log)
		if e, err := client.Enroll(t.Context(), ticket); err == nil {
			fmt.Fprintf(&log, "%v %+v %#v", e, e, e)
		} else {
			fmt.Fprintf(&log, "%v %+v %#v", err, err, err)
		}
		q := &question{Secret: ticket.Secret[:]}
		fmt.Fprintf(&log, "%v %+v %#v %s", q, q, q, q)
		newLogger(&log).Info("question", "q", q)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	stored, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	hash := ticket.Hash()
	if !bytes.Contains(stored, hash[:]) {
		t.Fatal("the store does not have the ticket's hash: this test looks in the wrong place")
	}
	if !strings.Contains(log.String(), Ref(hash)) {
		t.Fatal("the log does not have the ticket's reference: this test looks in the wrong place")
	}
	secret := ticket.Secret[:]
	for form, b := range map[string][]byte{
		"raw":     secret,
		"hex":     []byte(hex.EncodeToString(secret)),
		"base32":  []byte(base32.StdEncoding.EncodeToString(secret)[:48]),
		"base64":  []byte(base64.StdEncoding.EncodeToString(secret)[:40]),
		"numbers": []byte(strings.Trim(fmt.Sprint(secret), "[]")),
		"bytes":   []byte(fmt.Sprintf("%#v", secret)[7:60]),
	} {
		if bytes.Contains(stored, b) {
			t.Errorf("the store has the secret (%s)", form)
		}
		if strings.Contains(log.String(), string(b)) {
			t.Errorf("the log has the secret (%s)", form)
		}
	}
}

func TestWhatCannotBeGrantedIsRefusedBeforeThereIsATicket(t *testing.T) {
	s := newServer(t, newClock().now)
	tooMany := identity.Attributes{}
	for i := range 65 {
		tooMany[fmt.Sprintf("a%d", i)] = true
	}
	for what, c := range map[string]struct {
		g     Grant
		field string
	}{
		"attribute id":           {Grant{Attributes: identity.Attributes{"id": "x"}}, "attribute id"},
		"attribute name":         {Grant{Attributes: identity.Attributes{"name": "x"}}, "attribute name"},
		"attribute authority":    {Grant{Attributes: identity.Attributes{"authority": "x"}}, "attribute authority"},
		"attribute serve":        {Grant{Attributes: identity.Attributes{"serve": []string{"x"}}}, "attribute serve"},
		"attribute relay":        {Grant{Attributes: identity.Attributes{"relay": true}}, "attribute relay"},
		"attribute node":         {Grant{Attributes: identity.Attributes{"node": "x"}}, "attribute node"},
		"a blank attribute name": {Grant{Attributes: identity.Attributes{" role": "x"}}, "attribute  role"},
		"a value of no type":     {Grant{Attributes: identity.Attributes{"role": 1.5}}, "attributes"},
		"a value that is no text": {
			Grant{Attributes: identity.Attributes{"role": "\xff"}}, "attributes"},
		"a large attribute":       {Grant{Attributes: identity.Attributes{"role": strings.Repeat("x", 4000)}}, "attributes"},
		"a list nobody can read":  {Grant{Attributes: identity.Attributes{"role": make([]string, 1500)}}, "attributes"},
		"65 attributes":           {Grant{Attributes: tooMany}, "attributes"},
		"a name with a blank":     {Grant{Name: "db 1"}, "name"},
		"serving authority":       {Grant{Serve: []string{"authority"}}, "serve authority"},
		"a wildcard in the midst": {Grant{Serve: []string{"a/*/b"}}, "serve a/*/b"},
		"two days":                {Grant{TTL: 48 * time.Hour}, "ttl"},
		"no time":                 {Grant{TTL: time.Millisecond}, "ttl"},
		"time that ran out":       {Grant{TTL: -time.Hour}, "ttl"},
		"1,001 uses":              {Grant{Uses: 1001}, "uses"},
		"no uses":                 {Grant{Uses: -1}, "uses"},
		"no way":                  {Grant{Ways: []identity.Way{}}, "ways"},
		"a way that is none":      {Grant{Ways: []identity.Way{{Addr: "here"}}}, "ways"},
	} {
		if c.g.Ways == nil {
			c.g.Ways = aWay
		}
		_, err := s.CreateTicket(t.Context(), c.g)
		var refused *GrantError
		if !errors.As(err, &refused) || refused.Field != c.field {
			t.Errorf("%s: %v, want a refusal of %q", what, err, c.field)
		}
	}
	if list, err := s.Tickets(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("%d tickets are there, %v", len(list), err)
	}
}

func TestTicketsAreListedWithWhatBecameOfThem(t *testing.T) {
	c := newClock()
	s := newServer(t, c.now)
	n := &network{server: s}
	used := newTicket(t, s, Grant{Name: "used", Attributes: identity.Attributes{"role": "db"}})
	c.advance(time.Second)
	revoked := newTicket(t, s, Grant{Name: "revoked", Uses: 3})
	c.advance(time.Second)
	newTicket(t, s, Grant{Name: "expired", TTL: time.Minute})
	c.advance(time.Second)
	newTicket(t, s, Grant{Name: "outstanding", TTL: time.Hour, Uses: 5, Serve: []string{"orders"}, Relay: true})

	enroll(t, newClient(t, n, nil), used)
	if err := s.RevokeTicket(t.Context(), Ref(revoked.Hash())); err != nil {
		t.Fatal(err)
	}
	if err := s.RevokeTicket(t.Context(), Ref(revoked.Hash())); err != nil {
		t.Errorf("revoking it again: %v", err)
	}
	if err := s.RevokeTicket(t.Context(), "nosuchone2"); !errors.Is(err, ErrNoSuchTicket) {
		t.Errorf("revoking none: %v", err)
	}
	c.advance(2 * time.Minute)

	list, err := s.Tickets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, i := range list {
		if i.Name != i.State {
			t.Errorf("ticket %q is listed as %s", i.Name, i.State)
		}
		if (i.State == "outstanding") != i.Ended.IsZero() {
			t.Errorf("ticket %q ended at %s", i.Name, i.Ended)
		}
		got = append(got, i.Name)
	}
	if want := "outstanding expired revoked used"; strings.Join(got, " ") != want {
		t.Errorf("listed %v, want %s", got, want)
	}
}

func TestAnEndedTicketIsForgottenAfterAWeekWithItsUses(t *testing.T) {
	c := newClock()
	s := newServer(t, c.now)
	n := &network{server: s}
	old := newTicket(t, s, Grant{Uses: 2})
	client := newClient(t, n, nil)
	enroll(t, client, old)
	keys := func(bucket string) (k int) {
		if err := s.Store.Scan(bucket, func(_, _ []byte) error { k++; return nil }); err != nil {
			t.Fatal(err)
		}
		return k
	}
	c.advance(endedKept)
	newTicket(t, s, Grant{})
	if got := keys(bucketTickets); got != 2 {
		t.Errorf("%d tickets a week after it was made, want 2", got)
	}
	c.advance(time.Hour)
	newTicket(t, s, Grant{})
	if got := keys(bucketTickets); got != 2 {
		t.Errorf("%d tickets an hour later, want 2: the old one is forgotten", got)
	}
	if got := keys(bucketUses); got != 0 {
		t.Errorf("%d uses of a forgotten ticket are kept", got)
	}
	if got := keys(bucketMembers); got != 1 {
		t.Errorf("%d members, want 1: a member outlives its ticket", got)
	}
}

// crowd makes the bucket look as full as n keys make it.
func crowd(t *testing.T, s *Server, bucket string, n int) {
	t.Helper()
	if err := s.Store.Update(func(tx *store.Tx) error { return putCount(tx, bucket, n) }); err != nil {
		t.Fatal(err)
	}
}

func TestTicketsAreLimited(t *testing.T) {
	c := newClock()
	s := newServer(t, c.now)
	newTicket(t, s, Grant{TTL: time.Minute})
	crowd(t, s, bucketTickets, maxTickets)
	_, err := s.CreateTicket(t.Context(), Grant{Ways: aWay})
	var full *LimitError
	if !errors.As(err, &full) || full.Limit != maxTickets || full.Remedy == "" {
		t.Fatalf("at the limit: %v", err)
	}
	c.advance(time.Minute + endedKeptFull)
	newTicket(t, s, Grant{}) // in the place of the one that expired
	if _, err := s.CreateTicket(t.Context(), Grant{Ways: aWay}); !errors.As(err, &full) {
		t.Errorf("at the limit again: %v", err)
	}
}

func TestMembersAreLimited(t *testing.T) {
	c := newClock()
	s := newServer(t, c.now)
	n := &network{server: s}
	ticket := newTicket(t, s, Grant{Uses: 10, TTL: MaxTicketTTL})
	first := newClient(t, n, nil)
	enroll(t, first, ticket)
	crowd(t, s, bucketMembers, maxMembers)

	second := newClient(t, n, nil)
	var refused *RefusedError
	if _, err := second.Enroll(t.Context(), ticket); !errors.As(err, &refused) || !errors.Is(err, ErrFull) {
		t.Fatalf("at the limit: %v", err)
	}
	if list, _ := s.Tickets(t.Context()); list[0].Left != 9 {
		t.Errorf("%d uses are left, want 9: a refusal costs none", list[0].Left)
	}
	if err := first.Renew(t.Context()); err != nil {
		t.Errorf("a member at the limit: %v", err)
	}
	enroll(t, first, newTicket(t, s, Grant{})) // who is in needs no room

	if err := s.RemoveMember(t.Context(), first.Self.ID()); err != nil {
		t.Fatal(err)
	}
	c.advance(MaxTicketTTL)
	enroll(t, second, newTicket(t, s, Grant{})) // in the place of the removed one
	if got := ids(t, s); !maps.Equal(got, map[identity.ID]bool{second.Self.ID(): true}) {
		t.Errorf("members: %v", got)
	}
}

func ids(t *testing.T, s *Server) map[identity.ID]bool {
	t.Helper()
	list, err := s.Members(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := map[identity.ID]bool{}
	for _, m := range list {
		got[m.ID] = m.Removed.IsZero()
	}
	return got
}

func TestListingsSurviveJSON(t *testing.T) {
	s := newServer(t, newClock().now)
	attrs := identity.Attributes{"role": "db", "level": int64(1<<62 + 1), "on": false, "teams": []string{"a", "b"}, "none": []string{}}
	ticket := newTicket(t, s, Grant{Name: "db1", Attributes: attrs, Serve: []string{"orders/*"}, Relay: true, Uses: 3})
	enroll(t, newClient(t, &network{server: s}, nil), ticket)
	tickets, err := s.Tickets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	members, err := s.Members(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(tickets)
	if err != nil {
		t.Fatal(err)
	}
	var tickets2 []TicketInfo
	if err := json.Unmarshal(b, &tickets2); err != nil || len(tickets2) != 1 || !reflect.DeepEqual(tickets2, tickets) {
		t.Errorf("%v: %+v became %+v", err, tickets, tickets2)
	}
	if b, err = json.Marshal(members); err != nil {
		t.Fatal(err)
	}
	var members2 []MemberInfo
	if err := json.Unmarshal(b, &members2); err != nil || len(members2) != 1 || !reflect.DeepEqual(members2, members) {
		t.Errorf("%v: %+v became %+v", err, members, members2)
	}
	if !reflect.DeepEqual(members2[0].Attributes, attrs) {
		t.Errorf("attributes %#v", members2[0].Attributes)
	}
	for _, bad := range []string{`{"attributes":{"half":0.5}}`, `{"attributes":{"list":[1]}}`, `{"attributes":{"big":9223372036854775808}}`} {
		if err := json.Unmarshal([]byte(bad), new(MemberInfo)); err == nil {
			t.Errorf("%s is accepted", bad)
		}
	}
}
