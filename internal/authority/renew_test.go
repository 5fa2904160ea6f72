package authority

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/store"
)

func TestTheIdentityKeyAloneRenewsAnExpiredCredential(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	c := newClient(t, &network{server: s}, nil)
	enroll(t, c, newTicket(t, s, Grant{Name: "db1", Attributes: identity.Attributes{"role": "db"}}))
	clock.advance(30 * 24 * time.Hour)
	if err := c.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := c.Self.Credential()
	if !got.Expires.Equal(clock.now().Add(DefaultTTL)) || got.Name() != "db1" || got.Attributes["role"] != "db" {
		t.Errorf("renewed to %v until %s", got.Attributes, got.Expires)
	}
}

func TestWhoNeverJoinedCannotRenew(t *testing.T) {
	s := newServer(t, newClock().now)
	n := &network{server: s}
	c := newClient(t, n, newHome(t, homeDir(t)))
	if err := c.Renew(t.Context()); !errors.Is(err, identity.ErrNotMember) || n.count(nameRenew) != 0 {
		t.Errorf("a home that joined nothing: %v", err)
	}
	c.Authority, c.Ways = s.Self.ID(), aWay
	c.Trust.Pin(c.Authority)
	var refused *RefusedError
	if err := c.Renew(t.Context()); !errors.As(err, &refused) || !errors.Is(err, ErrNotMember) {
		t.Errorf("an identity that the authority does not know: %v", err)
	}
	if c.Self.Credential() != nil {
		t.Error("it has a credential")
	}
}

func TestARemovedMemberRenewsOnlyAfterATicketMadeLater(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	c := newClient(t, &network{server: s}, newHome(t, homeDir(t)))
	first, kept := newTicket(t, s, Grant{}), newTicket(t, s, Grant{Uses: 10, TTL: time.Hour})
	enroll(t, c, first)
	clock.advance(time.Second)
	if err := s.RemoveMember(t.Context(), c.Self.ID()); err != nil {
		t.Fatal(err)
	}
	at := clock.now()
	clock.advance(time.Second)
	if err := s.RemoveMember(t.Context(), c.Self.ID()); err != nil {
		t.Errorf("removing it again: %v", err)
	}
	if err := s.RemoveMember(t.Context(), newSelf(t).ID()); !errors.Is(err, ErrNoSuchMember) {
		t.Errorf("removing nobody: %v", err)
	}

	before := c.Self.Credential()
	var refused *RefusedError
	if err := c.Renew(t.Context()); !errors.As(err, &refused) || !errors.Is(err, ErrRemoved) || !refused.When.Equal(at) {
		t.Errorf("renewing: %v", err)
	}
	if _, err := s.Issue(t.Context(), c.Self); !errors.Is(err, ErrRemoved) {
		t.Errorf("issuing: %v", err)
	}
	if _, err := c.Enroll(t.Context(), kept); !errors.Is(err, ErrRemoved) {
		t.Errorf("with a ticket kept back: %v", err)
	}
	if _, _, err := s.redeem(c.Self, first.Hash(), clock.now()); !errors.Is(err, ErrRemoved) {
		t.Errorf("with the ticket it used: %v", err)
	}
	if c.Self.Credential() != before {
		t.Error("it has another credential")
	}
	if list, _ := s.Tickets(t.Context()); list[0].Left+list[1].Left != 10 {
		t.Error("a refusal cost a use")
	}

	clock.advance(time.Second)
	enroll(t, c, newTicket(t, s, Grant{}))
	if err := c.Renew(t.Context()); err != nil {
		t.Errorf("after a fresh ticket: %v", err)
	}
}

func TestACredentialIsBoundToTheLatestChange(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	home := newHome(t, homeDir(t))
	c := newClient(t, &network{server: s}, home)
	enroll(t, c, newTicket(t, s, Grant{}))
	first := c.Self.Credential()
	if first.Change != c.Self.Latest() {
		t.Fatal("the first credential is of another change")
	}
	if err := c.Self.Rotate(); err != nil {
		t.Fatal(err)
	}
	trust := identity.NewTrust(s.Self.ID())
	if _, err := trust.Verify(first.Raw(), c.Self.Issuer(), c.Self.ID(), c.Self.Latest(), clock.now()); !errors.Is(err, identity.ErrSubject) {
		t.Errorf("the one before the rotation verifies: %v", err)
	}
	if err := c.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := c.Self.Credential()
	if got.Change != c.Self.Latest() || got.Subject != first.Subject {
		t.Errorf("the renewed one is of change %x, want %x", got.Change, c.Self.Latest())
	}
	if _, err := trust.Verify(got.Raw(), c.Self.Issuer(), c.Self.ID(), c.Self.Latest(), clock.now()); err != nil {
		t.Error(err)
	}
	if next, err := newHome(t, home.Dir()).Self(); err != nil || next.Credential() == nil || next.Credential().Serial != got.Serial {
		t.Errorf("the home has %v, %v", next.Credential(), err)
	}
}

// stolen returns a client with the keys of home as they are now, in a home of its own.
func stolen(t *testing.T, n *network, home *identity.Home) *Client {
	t.Helper()
	dir := homeDir(t)
	if err := os.CopyFS(dir, os.DirFS(home.Dir())); err != nil {
		t.Fatal(err)
	}
	for path, mode := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, "identity.key"): 0o600, filepath.Join(dir, "membership"): 0o600} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	c := newClient(t, n, newHome(t, dir))
	c.Trust.Pin(n.server.Self.ID())
	return c
}

func TestAKeyThatWasRotatedAwayRenewsNoMore(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	n := &network{server: s}
	home := newHome(t, homeDir(t))
	c := newClient(t, n, home)
	first := newTicket(t, s, Grant{Name: "db1"})
	enroll(t, c, first)
	thief := stolen(t, n, home)
	if err := c.Self.Rotate(); err != nil {
		t.Fatal(err)
	}
	clock.advance(time.Minute)
	if err := thief.Renew(t.Context()); err != nil {
		t.Fatalf("before the authority has seen the rotation: %v", err)
	}
	if err := c.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	forked := stolen(t, n, thief.Home)
	if err := forked.Self.Rotate(); err != nil {
		t.Fatal(err)
	}

	clock.advance(48 * time.Hour)
	n.server = &Server{Self: s.Self, Store: s.Store, Now: s.Now} // it is not only remembered in memory
	fresh := newTicket(t, s, Grant{})
	for who, thief := range map[string]*Client{"the key of before": thief, "one that was rotated elsewhere": forked} {
		before := thief.Self.Credential()
		var refused *RefusedError
		if err := thief.Renew(t.Context()); !errors.As(err, &refused) || !errors.Is(err, ErrRotatedAway) {
			t.Errorf("%s, renewing: %v", who, err)
		}
		if _, err := s.Issue(t.Context(), thief.Self); !errors.Is(err, ErrRotatedAway) {
			t.Errorf("%s, issuing: %v", who, err)
		}
		if _, _, err := s.redeem(thief.Self, first.Hash(), clock.now()); !errors.Is(err, ErrRotatedAway) {
			t.Errorf("%s, with the ticket it used: %v", who, err)
		}
		if _, err := thief.Enroll(t.Context(), fresh); !errors.Is(err, ErrRotatedAway) {
			t.Errorf("%s, with a fresh ticket: %v", who, err)
		}
		if thief.Self.Credential() != before {
			t.Errorf("%s has another credential", who)
		}
	}
	for range 3 { // the history goes on, and each change counts from the first time it is shown
		if err := c.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := c.Self.Rotate(); err != nil {
			t.Fatal(err)
		}
		clock.advance(time.Minute)
	}
	enroll(t, c, fresh) // no use of it was taken
}

func TestARecordOfBeforeLearnsTheLatestChange(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	n := &network{server: s}
	home := newHome(t, homeDir(t))
	c := newClient(t, n, home)
	enroll(t, c, newTicket(t, s, Grant{}))
	thief := stolen(t, n, home)
	id := c.Self.ID()
	err := s.Store.Update(func(tx *store.Tx) error {
		m, err := getMember(tx, id)
		if err != nil {
			return err
		}
		m.Change = nil
		return put(tx, bucketMembers, id[:], m)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Self.Rotate(); err != nil {
		t.Fatal(err)
	}
	if err := c.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := thief.Renew(t.Context()); !errors.Is(err, ErrRotatedAway) {
		t.Errorf("the key of before: %v", err)
	}
	b, err := s.Store.Get(bucketMembers, id[:])
	if err != nil {
		t.Fatal(err)
	}
	m, err := decodeMemberRecord(b)
	if err != nil {
		t.Fatal(err)
	}
	m.Change = m.Change[1:]
	if _, err := decodeMemberRecord(mustEncode(t, m)); err == nil {
		t.Error("a hash of 31 bytes was read")
	}
}

func TestAShorterTTLAndAClockSetBackLeaveMembersRenewing(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	c := newClient(t, &network{server: s}, nil)
	enroll(t, c, newTicket(t, s, Grant{}))
	s.TTL = time.Minute
	until := c.Self.Credential().Expires
	clock.advance(time.Second)
	if err := c.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := c.Self.Credential().Expires; !got.After(until) || got.After(until.Add(time.Second)) {
		t.Errorf("until %s; the one before was until %s", got, until)
	}
	clock.advance(-30 * time.Minute)
	if err := c.Renew(t.Context()); err != nil {
		t.Errorf("with the clock set back: %v", err)
	}
	clock.advance(2 * time.Hour)
	if err := c.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := c.Self.Credential().Expires; !got.Equal(clock.now().Add(time.Minute)) {
		t.Errorf("until %s once the long ones are over", got)
	}
}

func TestAMembersRecordDoesNotGrowWithItsRenewals(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	c := newClient(t, &network{server: s}, nil)
	enroll(t, c, newTicket(t, s, Grant{}))
	for range 50 {
		clock.advance(time.Second)
		if err := c.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	err := s.Store.Scan(bucketMembers, func(_, value []byte) error {
		m, err := decodeMemberRecord(value)
		if err != nil {
			return err
		}
		last := m.Issued[len(m.Issued)-1]
		if serial := c.Self.Credential().Serial; len(m.Issued) != keptSerials || !slices.Equal(last.Serial, serial[:]) {
			t.Errorf("%d serials are kept, the last %x", len(m.Issued), last.Serial)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestACredentialThatCannotBeStoredIsInForce(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	home := newHome(t, homeDir(t))
	c := newClient(t, &network{server: s}, home)
	var log logBuffer
	c.Logger = newLogger(&log)
	enroll(t, c, newTicket(t, s, Grant{}))
	before := c.Self.Credential()
	block := filepath.Join(home.Dir(), "membership.new")
	if err := os.MkdirAll(filepath.Join(block, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	clock.advance(time.Minute)
	if err := c.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !c.Self.Credential().Expires.After(before.Expires) || !strings.Contains(log.String(), "level=WARN") {
		t.Errorf("until %s; log: %s", c.Self.Credential().Expires, log.String())
	}
	next, err := newHome(t, home.Dir()).Self()
	if err != nil || next.Credential().Serial != before.Serial {
		t.Errorf("the home has %v, %v", next.Credential(), err)
	}
}

func TestFreshAsksOnlyPastHalfLifeAndForTwoSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, time.Now)
		n := &network{server: s}
		c := newClient(t, n, nil)
		enroll(t, c, newTicket(t, s, Grant{}))
		first := c.Self.Credential()

		time.Sleep(DefaultTTL/2 - time.Second)
		if err := c.Fresh(t.Context()); err != nil || n.count(nameRenew) != 0 {
			t.Errorf("before half-life: %v, asked %d times", err, n.count(nameRenew))
		}
		time.Sleep(time.Second)
		if err := c.Fresh(t.Context()); err != nil || c.Self.Credential() == first {
			t.Errorf("at half-life: %v", err)
		}

		n.latency = time.Hour // nobody answers, nobody refuses
		time.Sleep(DefaultTTL - time.Minute)
		start := time.Now()
		if err := c.Fresh(t.Context()); err != nil || time.Since(start) > freshTime {
			t.Errorf("while it is valid: %v after %s", err, time.Since(start))
		}
		time.Sleep(time.Minute)
		start = time.Now()
		var unreachable *UnreachableError
		if err := c.Fresh(t.Context()); !errors.As(err, &unreachable) || time.Since(start) > freshTime {
			t.Errorf("when it is over: %v after %s", err, time.Since(start))
		}
	})
}

func TestFreshTakesOverWhatAnotherProcessStored(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	n := &network{server: s}
	dir := homeDir(t)
	a := newClient(t, n, newHome(t, dir))
	enroll(t, a, newTicket(t, s, Grant{}))
	b := newClient(t, n, newHome(t, dir))
	b.Trust.Pin(s.Self.ID())
	clock.advance(time.Minute)
	if err := a.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.Fresh(t.Context()); err != nil || b.Self.Credential().Serial != a.Self.Credential().Serial {
		t.Errorf("%v; it shows %v", err, b.Self.Credential())
	}
	if n.count(nameRenew) != 1 {
		t.Errorf("asked %d times", n.count(nameRenew))
	}
}

// rotated returns a server whose authority rotates, with what its old key still does.
func rotated(t *testing.T, now func() time.Time) (s, old *Server) {
	t.Helper()
	s = newServer(t, now)
	dir := filepath.Join(t.TempDir(), "authority")
	home := newHome(t, dir)
	var err error
	if s.Self, err = home.Self(); err != nil {
		t.Fatal(err)
	}
	old = &Server{Store: s.Store, Now: now}
	if old.Self, err = newHome(t, dir).Self(); err != nil {
		t.Fatal(err)
	}
	return s, old
}

// A process verifies by the authority's longest history, whichever process of its home was shown it, and when.
func TestAnOldKeyOfTheAuthorityIsWorthNothingToAHomeThatSawItRotated(t *testing.T) {
	for name, take := range map[string]func(t *testing.T, c *Client){
		"by a dial": func(t *testing.T, c *Client) {
			if err := c.Fresh(t.Context()); err != nil {
				t.Fatal(err)
			}
		},
		"in the background": func(t *testing.T, c *Client) {
			stop := running(t, c)
			if err := c.Home.Reload(c.Self); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			stop()
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, old := rotated(t, time.Now)
				n := &network{server: s}
				dir := homeDir(t)
				a := newClient(t, n, newHome(t, dir))
				enroll(t, a, newTicket(t, s, Grant{}))
				b := newClient(t, n, newHome(t, dir))
				b.Trust.Pin(s.Self.ID())
				if err := s.Self.Rotate(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Minute)
				if err := a.Renew(t.Context()); err != nil {
					t.Fatal(err)
				}
				take(t, b)

				before, other := b.Self.Credential(), newSelf(t)
				forged, err := old.Self.Issue(other.ID(), other.Latest(), nil, time.Now(), time.Now().Add(time.Hour))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := b.Trust.Verify(forged.Raw(), old.Self.History(), other.ID(), other.Latest(), time.Now()); !errors.Is(err, identity.ErrSignature) {
					t.Errorf("a peer's by the old key: %v", err)
				}
				time.Sleep(time.Minute)
				n.server = old
				if err := b.Renew(t.Context()); !errors.Is(err, identity.ErrSignature) {
					t.Errorf("renewing by the old key: %v", err)
				}
				for _, home := range []*identity.Home{b.Home, nil} {
					b.Home = home
					if _, err := b.Enroll(t.Context(), newTicket(t, old, Grant{})); !errors.Is(err, identity.ErrSignature) {
						t.Errorf("enrolling by the old key: %v", err)
					}
				}
				if b.Self.Credential() != before {
					t.Error("it shows another credential")
				}
				if _, err := b.Trust.Verify(before.Raw(), old.Self.History(), b.Self.ID(), b.Self.Latest(), time.Now()); err != nil {
					t.Errorf("the one by the latest key, shown with less: %v", err)
				}
			})
		})
	}
}

// running runs c until the returned function is called, which waits for it.
func running(t *testing.T, c *Client) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	}
}

func TestRunRenewsAtHalfLife(t *testing.T) {
	counted(t)
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, time.Now)
		n := &network{server: s}
		c := newClient(t, n, nil)
		enroll(t, c, newTicket(t, s, Grant{}))
		n.forget()
		begun := time.Now()
		stop := running(t, c)
		defer stop()
		time.Sleep(24 * time.Hour)
		synctest.Wait()

		n.mu.Lock()
		defer n.mu.Unlock()
		if len(n.at) < 24*60/33 || len(n.at) > 24*60/27+1 {
			t.Errorf("%d renewals in a day", len(n.at))
		}
		last, spread := begun, map[time.Duration]bool{}
		for _, at := range n.at {
			if d := at.Sub(last); d < 27*time.Minute || d > 33*time.Minute+time.Second {
				t.Errorf("a renewal after %s, want 30 min ± 10 %%", d)
			} else {
				spread[d.Round(time.Minute)] = true
			}
			last = at
		}
		if len(spread) < 3 {
			t.Errorf("all renewals come after %v: nothing is jittered", spread)
		}
	})
}

func TestMembersThatJoinedTogetherDoNotRenewTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const members = 200
		s := newServer(t, time.Now)
		n := &network{server: s}
		ticket := newTicket(t, s, Grant{Uses: members})
		begun := time.Now()
		for range members {
			c := newClient(t, n, nil)
			enroll(t, c, ticket)
			defer running(t, c)()
		}
		n.forget()
		time.Sleep(40 * time.Minute)
		synctest.Wait()
		n.mu.Lock()
		perMinute := map[int]int{}
		for _, at := range n.at {
			perMinute[int(at.Sub(begun)/time.Minute)]++
		}
		n.mu.Unlock()
		if len(perMinute) == 0 {
			t.Error("nobody renewed")
		}
		for minute, asked := range perMinute {
			if asked > members/2 {
				t.Errorf("%d of %d ask in minute %d", asked, members, minute)
			}
		}
		n.forget()

		// An outage longer than a credential's life, and nobody had one that is valid: they come back spread too.
		n.setDown(true)
		time.Sleep(2 * time.Hour)
		n.setDown(false)
		begun = time.Now()
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		n.mu.Lock()
		perSecond, all := map[int]int{}, len(n.at)
		for _, at := range n.at {
			perSecond[int(at.Sub(begun)/time.Second)]++
		}
		n.mu.Unlock()
		if all != members {
			t.Errorf("%d of %d have renewed two minutes after the outage", all, members)
		}
		for second, asked := range perSecond {
			if asked > members/8 {
				t.Errorf("%d of %d ask in second %d", asked, members, second)
			}
		}
	})
}

func TestRunTriesAgainWithGrowingPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, time.Now)
		n := &network{server: s}
		c := newClient(t, n, nil)
		var log logBuffer
		c.Logger = newLogger(&log)
		enroll(t, c, newTicket(t, s, Grant{}))
		first := c.Self.Credential()
		n.setDown(true)
		stop := running(t, c)
		defer stop()
		time.Sleep(time.Hour)
		synctest.Wait()
		tries := strings.Count(log.String(), "was not renewed")
		// From minute 27 or 33 to 60, after 1, 2, 4 … 32 s and then every 60 s, each ± 50 %.
		if tries < 20 || tries > 80 {
			t.Errorf("%d tries in half an hour", tries)
		}
		if c.Self.Credential() != first {
			t.Fatal("it was renewed by nobody")
		}
		n.setDown(false)
		time.Sleep(90 * time.Second)
		synctest.Wait()
		if got := c.Self.Credential(); got == first || !time.Now().Before(got.Expires) {
			t.Error("not renewed after the outage, although it had expired meanwhile")
		}
	})
}

func TestRunKeepsAskingSlowlyWhenRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, time.Now)
		n := &network{server: s}
		c := newClient(t, n, nil)
		enroll(t, c, newTicket(t, s, Grant{}))
		if err := s.RemoveMember(t.Context(), c.Self.ID()); err != nil {
			t.Fatal(err)
		}
		stop := running(t, c)
		defer stop()
		time.Sleep(time.Hour)
		synctest.Wait()
		if asked := n.count(nameRenew); asked < 27*60/45 || asked > 33*60/15+1 {
			t.Errorf("asked %d times in half an hour, want one each 30 s ± 50 %%", asked)
		}
		enroll(t, c, newTicket(t, s, Grant{})) // which the loop sees by itself
		asked := n.count(nameRenew)
		time.Sleep(26 * time.Minute)
		synctest.Wait()
		if n.count(nameRenew) != asked {
			t.Error("it goes on asking with a new credential")
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n.count(nameRenew) != asked+1 {
			t.Errorf("asked %d times at half-life", n.count(nameRenew)-asked)
		}
	})
}

func TestRunKeepsTheShortestCredentialValid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, time.Now)
		s.TTL = time.Millisecond // raised to MinTTL
		n := &network{server: s, latency: 50 * time.Millisecond}
		c := newClient(t, n, nil)
		enroll(t, c, newTicket(t, s, Grant{}))
		stop := running(t, c)
		defer stop()
		for range 200 {
			time.Sleep(100 * time.Millisecond)
			if !time.Now().Before(c.Self.Credential().Expires) {
				t.Fatalf("expired at %s", c.Self.Credential().Expires)
			}
		}
		if asked := n.count(nameRenew); asked < 15 || asked > 23 {
			t.Errorf("asked %d times in 20 s", asked)
		}
	})
}

func TestRunNoticesAWallClockThatJumped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var jump time.Duration
		now := func() time.Time {
			mu.Lock()
			defer mu.Unlock()
			return time.Now().Add(jump).Round(0)
		}
		s := newServer(t, now)
		n := &network{server: s}
		c := newClient(t, n, nil)
		enroll(t, c, newTicket(t, s, Grant{}))
		stop := running(t, c)
		defer stop()
		time.Sleep(time.Minute)
		mu.Lock()
		jump = time.Hour // the machine slept
		mu.Unlock()
		time.Sleep(longestWait + time.Second)
		synctest.Wait()
		if n.count(nameRenew) != 1 {
			t.Errorf("asked %d times half a minute after the machine slept", n.count(nameRenew))
		}
	})
}

func TestOfTheProcessesOfAHomeOneRenewsAndTheOthersRead(t *testing.T) {
	counted(t)
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, time.Now)
		n := &network{server: s, latency: 100 * time.Millisecond}
		dir := homeDir(t)
		first := newClient(t, n, newHome(t, dir))
		enroll(t, first, newTicket(t, s, Grant{}))
		clients := []*Client{first}
		for range 7 { // each with a Home and a Self of its own, as processes have
			c := newClient(t, n, newHome(t, dir))
			c.Trust.Pin(s.Self.ID())
			clients = append(clients, c)
		}
		for _, c := range clients {
			defer running(t, c)()
		}
		const hours = 10
		for range hours * 60 {
			time.Sleep(time.Minute)
			for i, c := range clients {
				if !time.Now().Before(c.Self.Credential().Expires) {
					t.Fatalf("process %d shows a credential that expired at %s", i, c.Self.Credential().Expires)
				}
			}
		}
		synctest.Wait()
		if asked := n.count(nameRenew); asked < hours || asked > hours*60/27+1 {
			t.Errorf("asked %d times in %d hours by %d processes, want as many as one process asks", asked, hours, len(clients))
		}

		// All at once, too.
		time.Sleep(DefaultTTL * 45 / 100)
		before := n.count(nameRenew)
		var all sync.WaitGroup
		seen := first.Self.Credential()
		for _, c := range clients {
			if err := c.Home.Reload(c.Self); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range clients {
			all.Go(func() {
				if err := c.Renew(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if asked := n.count(nameRenew) - before; asked > 2 {
			t.Errorf("asked %d times at once (after %s)", asked, seen.Expires)
		}
	})
}

func TestACrowdOfOneProcessAsksOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, time.Now)
		n := &network{server: s, latency: time.Second}
		c := newClient(t, n, nil)
		enroll(t, c, newTicket(t, s, Grant{}))
		time.Sleep(DefaultTTL * 3 / 4)
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() {
				if err := c.Fresh(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if n.count(nameRenew) != 1 {
			t.Errorf("asked %d times", n.count(nameRenew))
		}
	})
}

func TestWhicheverClockIsFirstRenews(t *testing.T) {
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	for what, c := range map[string]struct {
		s    schedule
		want time.Duration
	}{
		"the wall clock, after a sleep":             {schedule{wall: now.Add(time.Second), at: now.Add(time.Minute)}, time.Second},
		"the time since, with the clock set back":   {schedule{wall: now.Add(time.Hour), at: now.Add(time.Minute)}, time.Minute},
		"the time since, when that alone is waited": {schedule{at: now.Add(time.Minute)}, time.Minute},
	} {
		if got := c.s.wait(now); got != c.want {
			t.Errorf("%s: %s, want %s", what, got, c.want)
		}
	}

	// A clock that is far behind the authority's does not put the renewal off beyond half a life.
	s := newServer(t, func() time.Time { return now })
	self := newSelf(t)
	credential, err := s.Self.Issue(self.ID(), self.Latest(), nil, now, now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	behind := &Client{Now: func() time.Time { return now.Add(-10 * time.Hour) }}
	if got := behind.schedule(credential).wait(behind.now()); got > 33*time.Minute {
		t.Errorf("with a clock 10 h behind the renewal is due in %s", got)
	}
	expired := &Client{Now: func() time.Time { return now.Add(10 * time.Hour) }}
	if got := expired.schedule(credential).wait(expired.now()); got > 0 {
		t.Errorf("of an expired credential the renewal is due in %s", got)
	}
}

// Its credentials are past half-life when they come, all of them.
func TestAClockThatIsAheadRenewsNoOftenerThanItMust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, time.Now)
		s.TTL = time.Minute
		n := &network{server: s, latency: 50 * time.Millisecond}
		c := newClient(t, n, nil)
		c.Now = func() time.Time { return time.Now().Add(40 * time.Second) }
		enroll(t, c, newTicket(t, s, Grant{}))
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		c.Run(ctx)
		if !c.now().Before(c.Self.Credential().Expires) {
			t.Errorf("its credential expired at %s", c.Self.Credential().Expires)
		}
		// Of a minute 20 s are left.
		if asked := n.count(nameRenew); asked < 30 || asked > 70 {
			t.Errorf("asked %d times in ten minutes", asked)
		}
	})
}

func TestPausesGrowWithinBoundsAndAreJittered(t *testing.T) {
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	self := newSelf(t)
	lasting := func(life time.Duration) *identity.Credential {
		c, err := self.Issue(self.ID(), self.Latest(), nil, now, now.Add(life))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	for _, c := range []struct {
		what     string
		seen     *identity.Credential
		failures int
		err      error
		middle   time.Duration
	}{
		{"an hour, first", lasting(time.Hour), 1, errDown, time.Second},
		{"an hour, fourth", lasting(time.Hour), 4, errDown, 8 * time.Second},
		{"an hour, thousandth", lasting(time.Hour), 1000, errDown, time.Minute},
		{"two seconds, first", lasting(2 * time.Second), 1, errDown, 50 * time.Millisecond},
		{"two seconds, tenth", lasting(2 * time.Second), 10, errDown, 250 * time.Millisecond},
		{"none", nil, 1, errDown, time.Second},
		{"busy", lasting(time.Hour), 2, ErrUnavailable, 2 * time.Second},
		{"removed", lasting(time.Hour), 1, &RefusedError{Reason: ErrRemoved}, 30 * time.Second},
		{"in no authority", nil, 9, identity.ErrNotMember, 30 * time.Second},
	} {
		least, most := c.middle*10, time.Duration(0)
		for range 300 {
			p := retryPause(c.seen, c.failures, c.err)
			least, most = min(least, p), max(most, p)
		}
		// Of 300 uniform draws one at least falls into each outer fifth (all miss one of them once in 10²⁸ runs).
		if least < c.middle/2 || least > c.middle*7/10 || most > c.middle*3/2 || most < c.middle*13/10 {
			t.Errorf("%s: from %s to %s, want %s ± 50 %%", c.what, least, most, c.middle)
		}
	}
}
