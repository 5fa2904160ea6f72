package authority

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/store"
)

func TestOfManyRedeemersAtOnceExactlyAsManyWinAsThereAreUses(t *testing.T) {
	for _, uses := range []int{1, 7, 150} {
		t.Run(fmt.Sprint(uses), func(t *testing.T) {
			s := newServer(t, newClock().now)
			n := &network{server: s}
			ticket := newTicket(t, s, Grant{Uses: uses})
			clients := make([]*Client, 200)
			for i := range clients {
				clients[i] = newClient(t, n, nil)
			}
			errs := make([]error, len(clients))
			var all sync.WaitGroup
			start := make(chan struct{})
			for i, c := range clients {
				all.Go(func() {
					<-start
					_, errs[i] = c.Enroll(t.Context(), ticket)
				})
			}
			close(start)
			all.Wait()

			members := ids(t, s)
			won := 0
			for i, err := range errs {
				switch {
				case err == nil:
					won++
				case !errors.Is(err, ErrTicketUsed):
					t.Errorf("a loser: %v", err)
				}
				if members[clients[i].Self.ID()] != (err == nil) || (clients[i].Self.Credential() != nil) != (err == nil) {
					t.Errorf("told %v, a member: %t, with a credential: %t", err, members[clients[i].Self.ID()], clients[i].Self.Credential() != nil)
				}
			}
			if won != uses || len(members) != uses {
				t.Errorf("%d won and there are %d members, want %d", won, len(members), uses)
			}

			// All of them again: the winners for free, the losers in vain, and after a restart too.
			var again sync.WaitGroup
			for i, c := range clients {
				again.Go(func() {
					_, repeat, err := s.redeem(c.Self, ticket.Hash(), s.now())
					if (err == nil) != (errs[i] == nil) || err == nil && !repeat {
						t.Errorf("first %v, then %v (repeat %t)", errs[i], err, repeat)
					}
				})
			}
			again.Wait()
			if got := len(ids(t, s)); got != uses {
				t.Errorf("%d members after all repeats, want %d", got, uses)
			}
		})
	}
}

func TestATicketIsSpentAcrossARestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	self, clock := newSelf(t), newClock()
	var ticket *identity.Ticket
	for round := range 2 {
		st, err := store.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		s := &Server{Self: self, Store: st, Now: clock.now}
		client := newClient(t, &network{server: s}, nil)
		if round == 0 {
			ticket = newTicket(t, s, Grant{})
			enroll(t, client, ticket)
		} else if _, err := client.Enroll(t.Context(), ticket); !errors.Is(err, ErrTicketUsed) {
			t.Errorf("after the restart: %v", err)
		}
		if err := st.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestALostAnswerIsAskedForAgainForFree(t *testing.T) {
	s := newServer(t, newClock().now)
	n := &network{server: s, loseReply: true}
	ticket := newTicket(t, s, Grant{Name: "db1"})
	home := newHome(t, homeDir(t))
	c := newClient(t, n, home)
	var unreachable *UnreachableError
	if _, err := c.Enroll(t.Context(), ticket); !errors.As(err, &unreachable) {
		t.Fatalf("without an answer: %v", err)
	}
	if m, err := home.Membership(); m != nil || err != nil || c.Self.Credential() != nil || len(c.Trust.Authorities()) != 0 {
		t.Errorf("without an answer something is applied: %v, %v", m, err)
	}
	if e := enroll(t, c, ticket); e.Membership.Name != "db1" || e.Already {
		t.Errorf("again: %+v", e)
	}
	if list, _ := s.Tickets(t.Context()); list[0].State != "used" || len(ids(t, s)) != 1 {
		t.Errorf("%d members by a ticket that is %s", len(ids(t, s)), list[0].State)
	}
}

func TestARefusedTicketSaysWhyAndSinceWhen(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	n := &network{server: s}
	fresh := func(g Grant) func() (*identity.Ticket, time.Time) {
		return func() (*identity.Ticket, time.Time) { return newTicket(t, s, g), time.Time{} }
	}
	for _, c := range []struct {
		what   string
		make   func() (*identity.Ticket, time.Time)
		reason error
	}{
		{"expired", func() (*identity.Ticket, time.Time) {
			ticket, _ := fresh(Grant{TTL: time.Minute})()
			clock.advance(time.Hour)
			return ticket, ticket.Expires
		}, ErrTicketExpired},
		{"expired this very moment", func() (*identity.Ticket, time.Time) {
			ticket, _ := fresh(Grant{TTL: time.Minute})()
			clock.advance(time.Minute)
			return ticket, ticket.Expires
		}, ErrTicketExpired},
		{"used", func() (*identity.Ticket, time.Time) {
			ticket, _ := fresh(Grant{})()
			enroll(t, newClient(t, n, nil), ticket)
			at := clock.now()
			clock.advance(time.Minute)
			return ticket, at
		}, ErrTicketUsed},
		{"revoked", func() (*identity.Ticket, time.Time) {
			ticket, _ := fresh(Grant{Uses: 3})()
			enroll(t, newClient(t, n, nil), ticket)
			if err := s.RevokeTicket(t.Context(), Ref(ticket.Hash())); err != nil {
				t.Fatal(err)
			}
			at := clock.now()
			clock.advance(time.Minute)
			return ticket, at
		}, ErrTicketRevoked},
		{"made up", func() (*identity.Ticket, time.Time) {
			return &identity.Ticket{Authority: s.Self.ID(), Ways: aWay, Secret: identity.NewSecret(), Expires: clock.now().Add(time.Hour)}, time.Time{}
		}, ErrTicketUnknown},
		{"another authority's secret", func() (*identity.Ticket, time.Time) {
			ticket := *newTicket(t, newServer(t, clock.now), Grant{})
			ticket.Authority = s.Self.ID()
			return &ticket, time.Time{}
		}, ErrTicketUnknown},
	} {
		t.Run(c.what, func(t *testing.T) {
			ticket, when := c.make()
			client := newClient(t, n, newHome(t, homeDir(t)))
			_, err := client.Enroll(t.Context(), ticket)
			var refused *TicketError
			if !errors.As(err, &refused) || refused.Reason != c.reason || !refused.When.Equal(when) || refused.Ref != Ref(ticket.Hash()) {
				t.Fatalf("%v, want %v at %s", err, c.reason, when)
			}
			if !when.IsZero() && !strings.Contains(err.Error(), stamp(when)) {
				t.Errorf("%q does not say when", err)
			}
			if m, err := client.Home.Membership(); m != nil || err != nil || client.Self.Credential() != nil || len(client.Trust.Authorities()) != 0 {
				t.Errorf("something is applied: %v, %v", m, err)
			}
		})
	}
}

func TestATicketOfAnotherAuthorityIsNotShownToAnyone(t *testing.T) {
	clock := newClock()
	s, other := newServer(t, clock.now), newServer(t, clock.now)
	n, m := &network{server: s}, &network{server: other}
	c := newClient(t, n, newHome(t, homeDir(t)))
	enroll(t, c, newTicket(t, s, Grant{}))
	_, err := m.join(c).Enroll(t.Context(), newTicket(t, other, Grant{}))
	var wrong *OtherAuthorityError
	if !errors.As(err, &wrong) || wrong.Have != s.Self.ID() || wrong.Want != other.Self.ID() {
		t.Errorf("%v", err)
	}
	if m.count(nameEnroll) != 0 {
		t.Error("the other authority was asked")
	}
	if list, _ := other.Tickets(t.Context()); list[0].Left != 1 {
		t.Error("the other authority's ticket is spent")
	}
}

func TestAnExpiredTicketIsSaidToBeSoAlsoWhenNobodyAnswers(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	n := &network{server: s, down: true}
	ticket := newTicket(t, s, Grant{})
	c := newClient(t, n, nil)
	if _, err := c.Enroll(t.Context(), ticket); errors.Is(err, ErrTicketExpired) || !errors.Is(err, errDown) {
		t.Errorf("before: %v", err)
	}
	clock.advance(time.Hour)
	_, err := c.Enroll(t.Context(), ticket)
	var expired *TicketError
	var unreachable *UnreachableError
	if !errors.As(err, &expired) || !expired.When.Equal(ticket.Expires) || !errors.As(err, &unreachable) {
		t.Errorf("after: %v", err)
	}
}

func TestAProofIsWorthNothingInAnotherChannel(t *testing.T) {
	s := newServer(t, newClock().now)
	ticket := newTicket(t, s, Grant{})
	self, stranger := newSelf(t), newSelf(t)
	peer := func(s *identity.Self) *identity.Peer {
		p, err := peerOf(s, newClock().now())
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	here, there := [32]byte{1}, [32]byte{2}
	hash := ticket.Hash()
	sign := func(hash, binding [32]byte, authority identity.ID) []byte {
		sig, err := self.Sign(proofLabel, proofParts(hash, binding, authority)...)
		if err != nil {
			t.Fatal(err)
		}
		return mustEncode(t, &question{Now: millis(s.now()), Secret: ticket.Secret[:], Proof: sig})
	}
	for what, a := range map[string]*answer{
		"another channel's":   s.answer(nameEnroll, sign(hash, there, s.Self.ID()), peer(self), here),
		"another ticket's":    s.answer(nameEnroll, sign([32]byte{}, here, s.Self.ID()), peer(self), here),
		"another authority's": s.answer(nameEnroll, sign(hash, here, stranger.ID()), peer(self), here),
		"another identity's":  s.answer(nameEnroll, sign(hash, here, s.Self.ID()), peer(stranger), here),
	} {
		if a.Code != codeProof {
			t.Errorf("%s: code %d, want %d", what, a.Code, codeProof)
		}
	}
	if len(ids(t, s)) != 0 {
		t.Error("there is a member")
	}
	if a := s.answer(nameEnroll, sign(hash, here, s.Self.ID()), peer(self), here); a.Code != codeGranted {
		t.Errorf("its own: code %d", a.Code)
	}
	if a := s.answer("destroy", sign(hash, here, s.Self.ID()), peer(self), here); a.Code != codeMalformed {
		t.Errorf("a question that there is none: code %d", a.Code)
	}
}

func TestACredentialSaysWhatTheTicketSays(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	s.TTL = 2 * time.Hour
	g := Grant{Name: "team/db1", Attributes: identity.Attributes{"role": "db", "level": int64(3), "on": true, "teams": []string{"a", "b"}}, Serve: []string{"orders-db", "pay/*"}, Relay: true}
	home := newHome(t, homeDir(t))
	c := newClient(t, &network{server: s}, home)
	e := enroll(t, c, newTicket(t, s, g))
	want := identity.Attributes{"name": "team/db1", "role": "db", "level": int64(3), "on": true, "teams": []string{"a", "b"}, "serve": []string{"orders-db", "pay/*"}, "relay": true}
	if !reflect.DeepEqual(e.Credential.Attributes, want) {
		t.Errorf("attributes %v, want %v", e.Credential.Attributes, want)
	}
	if !e.Credential.NotBefore.Equal(clock.now()) || !e.Credential.Expires.Equal(clock.now().Add(2*time.Hour)) {
		t.Errorf("valid from %s to %s", e.Credential.NotBefore, e.Credential.Expires)
	}
	if e.Credential.Subject != c.Self.ID() || e.Credential.Change != c.Self.Latest() || e.Credential.Issuer != s.Self.ID() {
		t.Errorf("about %s, by %s", e.Credential.Subject, e.Credential.Issuer)
	}

	// The same is in the home, for the next process.
	m, err := home.Membership()
	if err != nil || m.Authority != s.Self.ID() || m.Name != "team/db1" || !reflect.DeepEqual(m.Ways, aWay) {
		t.Errorf("membership %+v, %v", m, err)
	}
	next, err := newHome(t, home.Dir()).Self()
	if err != nil || next.Credential() == nil || next.Credential().Serial != e.Credential.Serial {
		t.Errorf("the next process has %v, %v", next.Credential(), err)
	}
	if got := c.Trust.Authorities(); len(got) != 1 || got[0] != s.Self.ID() {
		t.Errorf("trusted: %v", got)
	}
}

func TestWaysGivenReplaceTheTicketsAndAreRemembered(t *testing.T) {
	s := newServer(t, newClock().now)
	home := newHome(t, homeDir(t))
	c := newClient(t, &network{server: s}, home)
	c.Ways = []identity.Way{{Addr: "10.0.0.1:4100"}}
	enroll(t, c, newTicket(t, s, Grant{}))
	if m, err := home.Membership(); err != nil || !reflect.DeepEqual(m.Ways, c.Ways) {
		t.Errorf("membership %+v, %v", m, err)
	}
}

func TestAFreshTicketReplacesTheAttributesAndTellsTheDifference(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	n := &network{server: s}
	c := newClient(t, n, newHome(t, homeDir(t)))
	first := newTicket(t, s, Grant{Name: "db1", Attributes: identity.Attributes{"role": "db", "team": "a", "same": true}, Serve: []string{"orders"}})
	second := newTicket(t, s, Grant{Name: "db1", Attributes: identity.Attributes{"role": "agent", "same": true, "level": int64(2)}})
	enroll(t, c, first)
	e := enroll(t, c, second) // in the same millisecond
	want := []Change{
		{"level", nil, int64(2)},
		{"role", "db", "agent"},
		{"serve", []string{"orders"}, nil},
		{"team", "a", nil},
	}
	if got := e.Changes(); e.Already || !reflect.DeepEqual(got, want) {
		t.Errorf("already %t, changes %v, want %v", e.Already, got, want)
	}
	if got := c.Self.Credential().Attributes["role"]; got != "agent" {
		t.Errorf("role %v is shown", got)
	}

	asked := n.count(nameEnroll)
	again := enroll(t, c, second)
	if !again.Already || len(again.Changes()) != 0 || n.count(nameEnroll) != asked {
		t.Errorf("the same again: already %t, %v", again.Already, again.Changes())
	}
	older := enroll(t, c, first)
	if !older.Already || len(older.Changes()) != 0 {
		t.Errorf("the first again: already %t, %v: what a later ticket gave stays", older.Already, older.Changes())
	}
	if list, err := s.Members(t.Context()); err != nil || len(list) != 1 || list[0].Ticket != Ref(second.Hash()) || list[0].Attributes["role"] != "agent" {
		t.Errorf("members %+v, %v", list, err)
	}
}

func TestASkewedClockIsToldBothClocksAndTheTicketIsUnspent(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	for _, c := range []struct {
		off time.Duration
		ok  bool
	}{{5 * time.Minute, false}, {-5 * time.Minute, false}, {61 * time.Second, false}, {-61 * time.Second, false}, {59 * time.Second, true}, {-59 * time.Second, true}} {
		t.Run(c.off.String(), func(t *testing.T) {
			ticket := newTicket(t, s, Grant{})
			client := newClient(t, &network{server: s}, newHome(t, homeDir(t)))
			client.Now = func() time.Time { return clock.now().Add(c.off) }
			_, err := client.Enroll(t.Context(), ticket)
			if c.ok {
				if err != nil {
					t.Errorf("refused: %v", err)
				}
				return
			}
			var skew *SkewError
			if !errors.As(err, &skew) || !skew.Ours.Equal(clock.now().Add(c.off)) || !skew.Theirs.Equal(clock.now()) {
				t.Fatalf("%v", err)
			}
			if !strings.Contains(err.Error(), stamp(skew.Ours)) || !strings.Contains(err.Error(), stamp(skew.Theirs)) {
				t.Errorf("%q does not say both clocks", err)
			}
			client.Now = clock.now
			enroll(t, client, ticket) // with the clock set right
		})
	}
}

func TestAStoreThatFailsSpendsNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	st, err := store.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	clock := newClock()
	var log logBuffer
	s := &Server{Self: newSelf(t), Store: st, Now: clock.now, Logger: newLogger(&log)}
	ticket := newTicket(t, s, Grant{})
	c := newClient(t, &network{server: s}, newHome(t, homeDir(t)))
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Enroll(t.Context(), ticket); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("with a store that fails: %v", err)
	}
	if !strings.Contains(log.String(), "level=ERROR") {
		t.Error("the authority's log does not say so")
	}
	if m, err := c.Home.Membership(); m != nil || err != nil || c.Self.Credential() != nil {
		t.Errorf("something is applied: %v, %v", m, err)
	}
	if s.Store, err = store.Open(path); err != nil {
		t.Fatal(err)
	}
	defer s.Store.Close()
	if e := enroll(t, c, ticket); e.Already {
		t.Error("the ticket was spent")
	}
}

func TestAHomeThatCannotBeWrittenIsLeftAsItWas(t *testing.T) {
	s := newServer(t, newClock().now)
	dir := homeDir(t)
	c := newClient(t, &network{server: s}, newHome(t, dir))
	first := newTicket(t, s, Grant{Attributes: identity.Attributes{"role": "db"}})
	second := newTicket(t, s, Grant{Attributes: identity.Attributes{"role": "agent"}})
	enroll(t, c, first)
	before := c.Self.Credential()

	// A directory where the new file would be fails for root too.
	block := filepath.Join(dir, "membership.new")
	if err := os.MkdirAll(filepath.Join(block, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Enroll(t.Context(), second); err == nil {
		t.Fatal("enrolled without a home to keep it")
	}
	if c.Self.Credential() != before {
		t.Error("Self shows what the home does not have")
	}
	if m, err := c.Home.Membership(); err != nil || m.TicketHash != first.Hash() {
		t.Errorf("the home has %+v, %v", m, err)
	}
	if err := os.RemoveAll(block); err != nil {
		t.Fatal(err)
	}
	e := enroll(t, c, second)
	if got := e.Changes(); len(got) != 1 || got[0].After != "agent" {
		t.Errorf("the free repeat changes %v", got)
	}
}
