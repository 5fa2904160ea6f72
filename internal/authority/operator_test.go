package authority

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/control"
)

// remote serves s at a control socket until the test ends.
func remote(t *testing.T, s *Server) Remote {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	ln, err := control.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- control.Serve(ctx, ln, func(ctx context.Context, method string, params json.RawMessage) (any, error) {
			result, ok, err := s.Control(ctx, method, params)
			if !ok {
				return nil, errors.New("no such method")
			}
			return result, err
		})
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return Remote(path)
}

func TestAnOperatorInAnotherProcessSeesWhatTheServerSees(t *testing.T) {
	counted(t)
	clock := newClock()
	s := newServer(t, clock.now)
	r := remote(t, s)
	ctx := t.Context()
	attrs := identity.Attributes{"role": "db", "level": int64(1<<62 + 1), "on": false, "teams": []string{"a", "b"}, "none": []string{}}
	relayed := []identity.Way{{ID: newSelf(t).ID(), Addr: "relay.example.com:4000"}, {Addr: "[::1]:4100"}}
	ticket, err := r.CreateTicket(ctx, Grant{Name: "db1", Attributes: attrs, Serve: []string{"orders/*"}, Relay: true, TTL: time.Hour, Uses: 3, Ways: relayed})
	if err != nil {
		t.Fatal(err)
	}
	if ticket.Authority != s.Self.ID() || !reflect.DeepEqual(ticket.Ways, relayed) || !ticket.Expires.Equal(clock.now().Add(time.Hour)) {
		t.Errorf("ticket %v by %v", ticket, ticket.Ways)
	}
	c := newClient(t, &network{server: s}, nil)
	if e := enroll(t, c, ticket); !reflect.DeepEqual(e.Credential.Attributes["level"], attrs["level"]) {
		t.Errorf("the member has %v", e.Credential.Attributes)
	}

	here, err := s.Tickets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if there, err := r.Tickets(ctx); err != nil || !reflect.DeepEqual(there, here) || len(there) != 1 {
		t.Errorf("tickets %+v, %v, want %+v", there, err, here)
	}
	members, err := s.Members(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if there, err := r.Members(ctx); err != nil || !reflect.DeepEqual(there, members) || len(there) != 1 {
		t.Errorf("members %+v, %v, want %+v", there, err, members)
	}

	if err := r.RevokeTicket(ctx, Ref(ticket.Hash())); err != nil {
		t.Error(err)
	}
	if list, _ := s.Tickets(ctx); list[0].State != "revoked" {
		t.Errorf("the ticket is %s", list[0].State)
	}
	if err := r.RemoveMember(ctx, c.Self.ID()); err != nil {
		t.Error(err)
	}
	if ids(t, s)[c.Self.ID()] {
		t.Error("the member is there")
	}
}

func TestAnOperatorInAnotherProcessGetsTheServersErrors(t *testing.T) {
	s := newServer(t, newClock().now)
	r := remote(t, s)
	ctx := t.Context()
	for _, g := range []Grant{
		{Ways: aWay, Attributes: identity.Attributes{"serve": "x"}},
		{Ways: aWay, Attributes: identity.Attributes{"role": "\x00: \n"}, TTL: 100 * time.Hour},
		{},
	} {
		_, here := s.CreateTicket(ctx, g)
		_, there := r.CreateTicket(ctx, g)
		var grant *GrantError
		if !errors.As(there, &grant) || there.Error() != here.Error() {
			t.Errorf("%v, want %v", there, here)
		}
	}
	if _, err := r.CreateTicket(ctx, Grant{Ways: aWay, Attributes: identity.Attributes{"half": 0.5}}); err == nil || !strings.Contains(err.Error(), "integer") {
		t.Errorf("half a number: %v", err)
	}
	if err := r.RevokeTicket(ctx, "abcdefghij"); !errors.Is(err, ErrNoSuchTicket) || err.Error() != s.RevokeTicket(ctx, "abcdefghij").Error() {
		t.Errorf("%v", err)
	}
	if err := r.RemoveMember(ctx, newSelf(t).ID()); !errors.Is(err, ErrNoSuchMember) {
		t.Errorf("%v", err)
	}
	if _, err := Remote(filepath.Join(t.TempDir(), "none")).Members(ctx); !errors.Is(err, control.ErrNobody) {
		t.Errorf("%v", err)
	}
	if _, ok, err := s.Control(ctx, "status", nil); ok || err != nil {
		t.Errorf("another's method: %t, %v", ok, err)
	}
	for method, params := range map[string]string{
		methodCreateTicket: `{"ways":["127.0.0.1:1"],"admin":true}`,
		methodTickets:      `[]`,
		methodRemoveMember: `{"id":"x"}`,
	} {
		if _, _, err := s.Control(ctx, method, json.RawMessage(params)); err == nil {
			t.Errorf("%s %s is accepted", method, params)
		}
	}
}

func TestAListingLongerThanAMessageComesInPages(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	r := remote(t, s)
	long := strings.Repeat("\x01", 2900) // six times as long in JSON
	for i := range 70 {
		clock.advance(time.Second)
		newTicket(t, s, Grant{Name: fmt.Sprintf("n%d", i), Attributes: identity.Attributes{"note": long}})
	}
	here, err := s.Tickets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if there, err := r.Tickets(t.Context()); err != nil || !reflect.DeepEqual(there, here) {
		t.Errorf("%d tickets, %v, want %d", len(there), err, len(here))
	}
}
