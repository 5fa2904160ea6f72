package relay_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/relay"
)

// registerAs asks for a name with an instance.
func (p *puppet) registerAs(name string, instance byte) (*stream.Conn, error) {
	p.w.Helper()
	body := make([]byte, 17)
	body[0] = instance
	return p.ask(stream.Header{Kind: stream.Register, Name: name, Body: body})
}

func TestAWildcardServesWhatIsBelowIt(t *testing.T) {
	in(t, func(w *town) {
		s, _ := w.relay(nil)
		for _, c := range []struct {
			serve string
			may   []string
			not   []string
		}{
			{"team/*", []string{"team/x", "team/x/y", "team/authority"}, []string{"team", "teamx/y", "team-x", "tea", "x/team/y", "team/", "team/*", "TEAM/x", "team//x", "team/../x"}},
			{"team", []string{"team"}, []string{"team/x", "teamx", "tea", "*", "authority"}},
			{"a/b/*", []string{"a/b/c"}, []string{"a/b", "a/x", "a/bc", "a"}},
		} {
			p := w.puppet(w.member(serves(c.serve)))
			for _, name := range c.may {
				if _, err := p.registerAs(name, 0); err != nil {
					t.Errorf("%s for %s: %v", c.serve, name, err)
				}
				synctest.Wait() // the answer goes out before the name is in its pool
				if n := s.Registrations(name); n != 1 {
					t.Errorf("%d serve %s", n, name)
				}
			}
			for _, name := range c.not {
				if _, err := p.registerAs(name, 0); code(err) != stream.CodeRefused {
					t.Errorf("%s for %s: %v", c.serve, name, err)
				}
				if n := s.Registrations(name); n != 0 {
					t.Errorf("%d serve %s", n, name)
				}
			}
			p.Close(nil)
			synctest.Wait()
		}
		// Others are no credential's.
		self := w.stranger()
		for _, serve := range []string{"*", "team*", "te*m", "*/team", "team/*/x", "/*", "authority", "", "Team"} {
			now := time.Now()
			if _, err := w.authority.Issue(self.ID(), self.Latest(), serves(serve), now, now.Add(time.Hour)); err == nil {
				t.Errorf("a credential lets its subject serve %q", serve)
			}
		}
	})
}

// An instance replaces itself, and nobody else: who knows another's takes nothing from
// it.
func TestAnInstanceReplacesOnlyItsOwnIdentitys(t *testing.T) {
	in(t, func(w *town) {
		s, _ := w.relay(nil)
		alice, bob := w.member(serves("db")), w.member(serves("db"))
		first, err := w.puppet(alice).registerAs("db", 1)
		if err != nil {
			t.Fatal(err)
		}
		for i, c := range []struct {
			self     *identity.Self
			instance byte
			are      int
			replaced bool
		}{
			{bob, 1, 2, false},
			{alice, 2, 3, false},
			{alice, 1, 3, true},
		} {
			if _, err := w.puppet(c.self).registerAs("db", c.instance); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if n := s.Registrations("db"); n != c.are {
				t.Errorf("step %d: %d serve it, want %d", i, n, c.are)
			}
			gone := false
			select {
			case <-first.Done():
				gone = true
			default:
			}
			if gone != c.replaced {
				t.Errorf("step %d: the first is gone: %t", i, gone)
			}
		}
	})
}

// Members of two authorities serve and ask for one name at one relay.
func TestANameIsEachAuthoritysOwn(t *testing.T) {
	in(t, func(w *town) {
		other := w.stranger()
		w.relay(func(s *relay.Server) { s.Trust = identity.NewTrust(w.authority.ID(), other.ID()) })
		issued := func(by *identity.Self, attrs identity.Attributes) *identity.Self {
			self := w.stranger()
			now := time.Now()
			c, err := by.Issue(self.ID(), self.Latest(), attrs, now, now.Add(time.Hour))
			if err == nil {
				err = self.Renew(c, by.History())
			}
			if err != nil {
				t.Fatal(err)
			}
			return self
		}
		authorities := []*identity.Self{w.authority, other}
		var callers []*relay.Client
		ends := make([]chan net.Conn, 2)
		for i, by := range authorities {
			out := &relay.Client{Addr: relayAddr, Dial: w.net.Dial, Node: w.node(), Self: issued(by, serves("db")), Trust: w.trust()}
			ln := out.Listen("db", nil)
			w.run(out.Run)
			ends[i] = make(chan net.Conn, 1)
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					ends[i] <- c
				}
			}()
			w.stops = append(w.stops, func() { ln.Close() })
			callers = append(callers, w.client(issued(by, agent), nil))
		}
		w.sleep(time.Second)
		for range 10 {
			for i, c := range callers {
				near, err := c.Lane(context.Background(), "db", identity.ID{})
				if err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				select {
				case far := <-ends[i]:
					stream.Abort(far)
				default:
					t.Errorf("a lane of authority %d did not come to its own", i)
				}
				if len(ends[1-i]) != 0 {
					t.Fatalf("a lane of authority %d came to the other's", i)
				}
				stream.Abort(near)
			}
		}
	})
}

// While the outlet of a name comes and goes, another that may not serve it asks for it,
// before, during and after.
func TestNoRaceGivesANameAway(t *testing.T) {
	const tries = 1000
	in(t, func(w *town) {
		s, _ := w.relay(nil)
		db := w.member(serves("db"))
		thief := w.puppet(w.member(serves("dba")))
		var ours *puppet
		for i := range tries {
			if i%10 == 0 {
				if ours != nil {
					go ours.Close(nil)
				}
				ours = w.puppet(db)
				go func(p *puppet) { // may be gone before it is answered
					p.Mux.Open(stream.Header{Kind: stream.Register, Name: "db", Body: append([]byte{1}, make([]byte, 16)...)})
				}(ours)
			}
			if _, err := thief.registerAs("db", byte(rand.IntN(2))); code(err) != stream.CodeRefused {
				t.Fatalf("try %d: %v", i, err)
			}
			if n := s.Registrations("db"); n > 2 {
				t.Errorf("%d serve it", n)
			}
			if i%20 == 19 {
				w.sleep(time.Second) // opens that come to nothing are counted
			}
		}
		w.sleep(time.Second)
		if n := s.Registrations("db"); n != 1 {
			t.Errorf("%d serve it in the end", n)
		}
		t.Logf("F-25: %d tries at a name that another serves: none had it", tries)
	})
}

// What was permitted ends with a renewed credential that no longer says so.
func TestANameIsLostWithTheCredentialThatServesIt(t *testing.T) {
	in(t, func(w *town) {
		s, _ := w.relay(nil)
		db := w.member(serves("db", "other"))
		_, ends := lanePair(w, w.member(agent), db, relay.DialBack)
		for _, serve := range []string{"other", "db/*"} {
			w.sleep(2 * time.Second) // so that it lasts longer than the one before
			w.issue(db, serves(serve), time.Hour)
			w.sleep(time.Second)
			if n := s.Registrations("db"); n != 0 {
				t.Errorf("%d serve it with a credential for %s", n, serve)
			}
		}
		if s.Lanes() != 0 {
			t.Errorf("%d lanes", s.Lanes())
		}
		for i, c := range ends {
			if _, err := c.Read(make([]byte, 1)); err == nil || fmt.Sprint(err) == "EOF" {
				t.Errorf("end %d reads %v", i, err)
			}
			stream.Abort(c)
		}
	})
}
