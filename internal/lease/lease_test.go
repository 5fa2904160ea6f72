package lease

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
)

// world is an authority and the two ends, each with a credential of one hour.
type world struct {
	t         testing.TB
	authority *identity.Self
	self      *identity.Self // the outlet
	agent     *identity.Self
	peer      *identity.Peer // the agent, as the outlet sees it
}

var agentRole = identity.Attributes{"role": "agent", "name": "bot"}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t}
	for _, s := range []**identity.Self{&w.authority, &w.self, &w.agent} {
		var err error
		if *s, err = identity.NewSelf(); err != nil {
			t.Fatal(err)
		}
	}
	w.peer = w.show(w.agent)
	w.renewSelf(time.Hour)
	w.renewPeer(time.Hour, agentRole)
	return w
}

func (w *world) show(s *identity.Self) *identity.Peer {
	w.t.Helper()
	key, attestation, err := s.Static(time.Now())
	if err != nil {
		w.t.Fatal(err)
	}
	p, err := identity.VerifyProof(s.History(), attestation, key.PublicKey().Bytes(), time.Now())
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

func (w *world) issue(s *identity.Self, life time.Duration, attrs identity.Attributes) *identity.Credential {
	w.t.Helper()
	c, err := w.authority.Issue(s.ID(), s.Latest(), attrs, time.Now(), time.Now().Add(life))
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

func (w *world) renewSelf(life time.Duration) {
	w.t.Helper()
	if err := w.self.Renew(w.issue(w.self, life, identity.Attributes{"serve": []string{"orders-db"}}), w.authority.History()); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) renewPeer(life time.Duration, attrs identity.Attributes) {
	w.t.Helper()
	if err := w.peer.Accept(w.issue(w.agent, life, attrs)); err != nil {
		w.t.Fatal(err)
	}
}

func policy(t testing.TB, expr string) *abac.Policy {
	t.Helper()
	p, err := abac.Short("open", "orders-db", expr)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func agents(t testing.TB) func() *abac.Policy {
	p := policy(t, `principal.role == "agent"`)
	return func() *abac.Policy { return p }
}

var open = abac.Request{Action: "open", ResourceID: "orders-db"}

// held is an admitted lease and what became of it.
type held struct {
	*Lease
	mu  sync.Mutex
	n   int
	err error
	at  time.Time
}

func (h *held) ended(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.n, h.err, h.at = h.n+1, err, time.Now()
}

func (h *held) ends() int       { h.mu.Lock(); defer h.mu.Unlock(); return h.n }
func (h *held) why() error      { h.mu.Lock(); defer h.mu.Unlock(); return h.err }
func (h *held) when() time.Time { h.mu.Lock(); defer h.mu.Unlock(); return h.at }

func (w *world) admit(b *Book, r abac.Request) *held {
	w.t.Helper()
	h := new(held)
	var err error
	h.Lease, _, err = b.Admit(w.self, w.peer, r, h.ended)
	if err != nil {
		w.t.Fatal(err)
	}
	return h
}

// bubble runs f with a running book in virtual time.
func bubble(t *testing.T, b *Book, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- b.Run(ctx) }()
		f(t)
		stop()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	})
}

// listeners counts the subscriptions to a Self or Peer.
func listeners(t testing.TB, live any) int {
	t.Helper()
	all := reflect.ValueOf(live).Elem().FieldByName("changed").FieldByName("all")
	if !all.IsValid() {
		t.Fatalf("%T no longer keeps its listeners in changed.all", live)
	}
	return all.Len()
}

func empty(t testing.TB, b *Book, w *world) {
	t.Helper()
	if n := b.Len(); n != 0 || len(b.ties) != 0 {
		t.Errorf("%d leases, %d ties are left", n, len(b.ties))
	}
	if n := listeners(t, w.self) + listeners(t, w.peer); n != 0 {
		t.Errorf("%d subscriptions are left", n)
	}
}

func TestZeroBookDenies(t *testing.T) {
	w := newWorld(t)
	for _, b := range []*Book{{}, {Policy: func() *abac.Policy { return nil }}} {
		l, d, err := b.Admit(w.self, w.peer, open, func(error) { t.Error("ended") })
		var denied *Denied
		if l != nil || d.Allow || !errors.As(err, &denied) {
			t.Errorf("%v, %+v, %v", l, d, err)
		}
		empty(t, b, w)
	}
}

func TestPrincipalIsWhatThePeerProved(t *testing.T) {
	w := newWorld(t)
	w.renewPeer(2*time.Hour, identity.Attributes{"role": "agent", "level": int64(3), "name": "bot", "serve": []string{"a", "b/*"}})
	forged := open
	forged.Principal, forged.PrincipalID = map[string]any{"role": "dba", "id": "PFORGED"}, "PFORGED"
	id := w.agent.ID().String()
	for expr, want := range map[string]bool{
		`principal.role == "agent" && principal.level == 3`:          true,
		`principal.role == "dba"`:                                    false,
		`principal.id == "` + id + `"`:                               true,
		`principal == Node::"` + id + `"`:                            true,
		`principal.name == "bot"`:                                    true,
		`principal.authority == "` + w.authority.ID().String() + `"`: true,
		`principal.serve.contains("b/*")`:                            true,
	} {
		p := policy(t, expr)
		b := &Book{Policy: func() *abac.Policy { return p }}
		l, d, err := b.Admit(w.self, w.peer, forged, nil)
		if d.Allow != want || (err == nil) != want {
			t.Errorf("%s: %+v, %v", expr, d, err)
		}
		l.Release()
		empty(t, b, w)
	}

	// Without a credential there is an id and nothing else.
	stranger := w.show(w.agent)
	if got := Principal(stranger); !reflect.DeepEqual(got, map[string]any{"id": id}) {
		t.Errorf("%v", got)
	}
	for expr, want := range map[string]bool{`principal.id == "` + id + `"`: true, `principal has authority || principal has name`: false} {
		p := policy(t, expr)
		b := &Book{Policy: func() *abac.Policy { return p }}
		l, d, _ := b.Admit(nil, stranger, open, nil)
		if d.Allow != want {
			t.Errorf("%s: %+v", expr, d)
		}
		if l != nil && !l.Until().IsZero() {
			t.Errorf("it expires at %v", l.Until())
		}
		l.Release()
	}
}

func TestLeaseEndsWithTheCredentialOfEitherSide(t *testing.T) {
	for _, c := range []struct {
		who        string
		peer, self time.Duration
	}{
		{Peer, 10 * time.Second, time.Hour},
		{Self, time.Hour, 2500 * time.Millisecond},
		{Peer, 10 * time.Second, 10 * time.Second},
	} {
		b := &Book{Policy: agents(t)}
		bubble(t, b, func(t *testing.T) {
			w := &world{t: t}
			w.authority, _ = identity.NewSelf()
			w.self, _ = identity.NewSelf()
			w.agent, _ = identity.NewSelf()
			w.peer = w.show(w.agent)
			w.renewSelf(c.self)
			w.renewPeer(c.peer, agentRole)
			h := w.admit(b, open)
			end := time.Now().Add(min(c.peer, c.self))
			if !h.Until().Equal(end) {
				t.Errorf("until %v, want %v", h.Until(), end)
			}
			time.Sleep(time.Until(end) - time.Millisecond)
			synctest.Wait()
			if h.ends() != 0 {
				t.Fatalf("ended early: %v", h.why())
			}
			time.Sleep(2 * time.Second)
			synctest.Wait()
			var expired *Expired
			if h.ends() != 1 || !errors.As(h.why(), &expired) || expired.Who != c.who || !expired.At.Equal(end) {
				t.Fatalf("%d ends: %v", h.ends(), h.why())
			}
			if late := h.when().Sub(end); late < 0 || late > 2*time.Second {
				t.Errorf("%v after the expiry", late)
			}
			if _, _, err := b.Admit(w.self, w.peer, open, nil); !errors.As(err, &expired) || expired.Who != c.who {
				t.Errorf("admitted again: %v", err)
			}
			h.Release()
			empty(t, b, w)
		})
	}
}

func TestRenewedCredentialsExtend(t *testing.T) {
	b := &Book{Policy: agents(t)}
	bubble(t, b, func(t *testing.T) {
		w := newWorld(t)
		h := w.admit(b, open)
		for range 20 {
			time.Sleep(40 * time.Minute)
			w.renewPeer(time.Hour, agentRole)
			w.renewSelf(time.Hour)
		}
		synctest.Wait()
		if h.ends() != 0 {
			t.Fatalf("ended: %v", h.why())
		}
		if left := time.Until(h.Until()); left != time.Hour {
			t.Errorf("%v left", left)
		}
		time.Sleep(time.Hour + 2*time.Second)
		synctest.Wait()
		if h.ends() != 1 {
			t.Error("it did not end with the last credential")
		}
		h.Release()
		empty(t, b, w)
	})
}

func TestRenewalThatLosesTheAttributeEndsAtOnce(t *testing.T) {
	p := abac.Join(policy(t, `principal.role == "agent"`), policy(t, `context.readonly`))
	w := newWorld(t)
	b := &Book{Policy: func() *abac.Policy { return p }}
	readonly := open
	readonly.Context = map[string]any{"readonly": true}
	writes, reads := w.admit(b, open), w.admit(b, readonly)
	w.renewPeer(2*time.Hour, identity.Attributes{"role": "guest"})
	// At once: before the renewal returns, and without Run.
	var denied *Denied
	if writes.ends() != 1 || !errors.As(writes.why(), &denied) || denied.Decision.Allow {
		t.Errorf("%d ends: %v", writes.ends(), writes.why())
	}
	if reads.ends() != 0 || b.Len() != 1 {
		t.Errorf("%d ends: %v", reads.ends(), reads.why())
	}
	if _, _, err := b.Admit(w.self, w.peer, open, nil); !errors.As(err, &denied) {
		t.Errorf("admitted: %v", err)
	}
	writes.Release()
	reads.Release()
	empty(t, b, w)
}

func TestARuleNarrowsWhatThePolicyPermits(t *testing.T) {
	w := newWorld(t)
	unnamed := errors.New("it has another name")
	b := &Book{Policy: agents(t), Rule: func(p *identity.Peer, r *abac.Request) error {
		if p.Credential().Name() != "bot" || r.Action != "open" {
			return unnamed
		}
		return nil
	}}
	h := w.admit(b, open)
	w.renewPeer(2*time.Hour, agentRole)
	if h.ends() != 0 {
		t.Errorf("ended with %v though nothing changed", h.why())
	}
	w.renewPeer(3*time.Hour, identity.Attributes{"role": "agent", "name": "cat"})
	var denied *Denied
	if !errors.As(h.why(), &denied) || denied.Rule != unnamed || h.ends() != 1 {
		t.Errorf("ended %d times, with %v; want the rule's reason", h.ends(), h.why())
	}
	h.Release()
	if _, _, err := b.Admit(w.self, w.peer, open, nil); !errors.As(err, &denied) || err.Error() != unnamed.Error() {
		t.Errorf("admitted anew: %v", err)
	}
	empty(t, b, w)
}

func TestPolicyChangeDecidesAllThenActs(t *testing.T) {
	w := newWorld(t)
	var current atomic.Pointer[abac.Policy]
	current.Store(agents(t)())
	b := &Book{Policy: current.Load}
	const each = 5
	left := 0
	var keep, lose []*Lease
	for i := range 2 * each {
		r := open
		r.Context = map[string]any{"n": int64(i), "old": i%2 == 0}
		l, _, err := b.Admit(w.self, w.peer, r, func(err error) {
			if left++; b.Len() != each { // all that ends has left before the first is told
				t.Errorf("at end %d the book holds %d", left, b.Len())
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			lose = append(lose, l)
		} else {
			keep = append(keep, l)
		}
	}
	b.Again("nothing changed")
	if left != 0 {
		t.Fatalf("%d ended", left)
	}
	current.Store(policy(t, `principal.role == "agent" && !context.old`))
	b.Again("new policy")
	if left != each {
		t.Errorf("%d ended", left)
	}
	for _, l := range append(keep, lose...) {
		l.Release()
	}
	empty(t, b, w)
}

func TestMaxSessionCountsFromAdmission(t *testing.T) {
	p, err := abac.Parse("p", []byte(`
		@max_session("30m") permit(principal, action, resource) when { principal.role == "agent" && context.limited };
		permit(principal, action, resource) when { principal.role == "agent" && !context.limited };`))
	if err != nil {
		t.Fatal(err)
	}
	b := &Book{Policy: func() *abac.Policy { return p }}
	bubble(t, b, func(t *testing.T) {
		w := newWorld(t)
		ask := func(limited bool) *held {
			r := open
			r.Context = map[string]any{"limited": limited}
			return w.admit(b, r)
		}
		first, free := ask(true), ask(false)
		time.Sleep(10 * time.Minute)
		second := ask(true)
		w.renewPeer(10*time.Hour, agentRole) // extends the credential, not the session
		w.renewSelf(10 * time.Hour)
		b.Again("so does this")
		time.Sleep(20*time.Minute - time.Millisecond)
		synctest.Wait()
		if first.ends()+second.ends()+free.ends() != 0 {
			t.Fatal("ended early")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		var expired *Expired
		if first.ends() != 1 || !errors.As(first.why(), &expired) || expired.Who != Session || second.ends() != 0 {
			t.Errorf("%v, %v", first.why(), second.why())
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if second.ends() != 1 || free.ends() != 0 {
			t.Errorf("%v, %v", second.why(), free.why())
		}
		for _, h := range []*held{first, second, free} {
			h.Release()
		}
		empty(t, b, w)
	})
}

func TestPolicyChangeShortensSessions(t *testing.T) {
	var current atomic.Pointer[abac.Policy]
	current.Store(agents(t)())
	b := &Book{Policy: current.Load}
	bubble(t, b, func(t *testing.T) {
		w := newWorld(t)
		h := w.admit(b, open)
		p, err := abac.Parse("p", []byte(`@max_session("10m") permit(principal, action, resource);`))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		current.Store(p)
		b.Again("new policy")
		if left := time.Until(h.Until()); h.ends() != 0 || left != 5*time.Minute {
			t.Fatalf("%v left: %v", left, h.why())
		}
		time.Sleep(5*time.Minute + 2*time.Second)
		synctest.Wait()
		if h.ends() != 1 {
			t.Error("it goes on")
		}
		h.Release()
	})
}

func TestWallClockJumpsNeverExtendALease(t *testing.T) {
	p, err := abac.Parse("p", []byte(`@max_session("1h1s") permit(principal, action, resource) when { principal.role == "agent" };`))
	if err != nil {
		t.Fatal(err)
	}
	const day = 24 * time.Hour
	to := func(wall time.Time) func(time.Time) time.Duration {
		return func(now time.Time) time.Duration { return wall.Sub(now) }
	}
	by := func(d time.Duration) func(time.Time) time.Duration {
		return func(time.Time) time.Duration { return d }
	}
	for name, c := range map[string]struct {
		jump   func(now time.Time) time.Duration
		atOnce bool // what remains of the hour is skipped
	}{
		"none":      {by(0), false},
		"+1h":       {by(time.Hour), true},
		"-1h":       {by(-time.Hour), false},
		"+1 day":    {by(day), true},
		"-1 day":    {by(-day), false},
		"1970":      {to(time.Unix(0, 0)), false},
		"year 1":    {to(time.Time{}), false},
		"year 2262": {to(time.Date(2262, 1, 1, 0, 0, 0, 0, time.UTC)), true},
		"+50s":      {by(50 * time.Second), false},
	} {
		for who, life := range map[string][2]time.Duration{ // of the peer's credential and of our own
			Peer:    {time.Hour, 10 * time.Hour},
			Self:    {10 * time.Hour, time.Hour},
			Session: {10 * time.Hour, 10 * time.Hour},
		} {
			t.Run(name+"/"+who, func(t *testing.T) {
				var offset atomic.Int64
				b := &Book{
					Policy: func() *abac.Policy { return p },
					Now:    func() time.Time { return time.Now().Add(time.Duration(offset.Load())) },
				}
				bubble(t, b, func(t *testing.T) {
					w := newWorld(t)
					w.renewPeer(life[0]+time.Second, agentRole)
					w.renewSelf(life[1] + time.Second)
					h := w.admit(b, open)
					end := time.Now().Add(time.Hour + time.Second)
					time.Sleep(10 * time.Minute)
					offset.Store(int64(c.jump(time.Now())))
					time.Sleep(2 * time.Second)
					synctest.Wait()
					if c.atOnce != (h.ends() == 1) {
						t.Fatalf("%d ends: %v", h.ends(), h.why())
					}
					if !c.atOnce {
						// Neither a decision made again nor a second lease moves the end.
						b.Again("policy")
						second := w.admit(b, open)
						time.Sleep(time.Until(end) + 2*time.Second)
						synctest.Wait()
						if h.ends() != 1 || second.ends() != 1 && who != Session { // which began later
							t.Errorf("%v after its end: %v, %v", 2*time.Second, h.why(), second.why())
						}
						second.Release()
					}
					h.Release()
					empty(t, b, w)
				})
			})
		}
	}
}

func TestAdmissionUnderAWildClockNeitherPanicsNorOverflows(t *testing.T) {
	for _, wall := range []time.Time{{}, time.Unix(0, 0), time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)} {
		w := newWorld(t)
		now := wall
		b := &Book{Policy: agents(t), Now: func() time.Time { return now }}
		var ended error
		l, _, err := b.Admit(w.self, w.peer, open, func(err error) { ended = err })
		var expired *Expired
		if wall.Year() == 9999 {
			if !errors.As(err, &expired) {
				t.Errorf("%v: %v", wall, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if b.sweep(); ended != nil {
			t.Errorf("%v: %v", wall, ended)
		}
		now = time.Now().Add(2 * time.Hour)
		if b.sweep(); !errors.As(ended, &expired) {
			t.Errorf("%v: %v", wall, ended)
		}
		l.Release()
		empty(t, b, w)
	}
}

func TestMachineThatSleptEndsWhatExpired(t *testing.T) {
	// Asleep the monotonic clock stands still; awake, the wall clock is ahead.
	var asleep atomic.Int64
	b := &Book{Policy: agents(t), Now: func() time.Time { return time.Now().Add(time.Duration(asleep.Load())) }}
	bubble(t, b, func(t *testing.T) {
		w := newWorld(t)
		h := w.admit(b, open)
		asleep.Store(int64(50 * time.Minute))
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if h.ends() != 0 {
			t.Fatalf("%v", h.why())
		}
		asleep.Store(int64(61 * time.Minute))
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if h.ends() != 1 {
			t.Error("it goes on")
		}
		h.Release()
	})
}

func TestJumpedClockDecidesAgain(t *testing.T) {
	var offset atomic.Int64
	var current atomic.Pointer[abac.Policy]
	current.Store(agents(t)())
	b := &Book{Policy: current.Load, Now: func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }}
	bubble(t, b, func(t *testing.T) {
		w := newWorld(t)
		h := w.admit(b, open)
		current.Store(nil) // nobody says so
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if h.ends() != 0 {
			t.Fatalf("%v", h.why())
		}
		offset.Store(int64(-61 * time.Second))
		time.Sleep(2 * time.Second)
		synctest.Wait()
		var denied *Denied
		if !errors.As(h.why(), &denied) {
			t.Errorf("%v", h.why())
		}
		h.Release()
	})
}

func TestReleasedLeasesAreNeverEnded(t *testing.T) {
	w := newWorld(t)
	b := &Book{Policy: agents(t)}
	h, other := w.admit(b, open), w.admit(b, open)
	for range 3 {
		h.Release()
	}
	if b.Len() != 1 || h.Until() != (time.Time{}) {
		t.Errorf("%d leases, until %v", b.Len(), h.Until())
	}
	w.renewPeer(2*time.Hour, identity.Attributes{})
	if h.ends() != 0 || other.ends() != 1 {
		t.Errorf("%d, %d ends", h.ends(), other.ends())
	}
	other.Release()
	(*Lease)(nil).Release()
	empty(t, b, w)
}

func TestEndMayReleaseAndAdmit(t *testing.T) {
	w := newWorld(t)
	b := &Book{Policy: agents(t)}
	var a, c *Lease
	var again error
	ends := 0
	end := func(error) {
		ends++ // once: the first releases the second, whose end was decided too
		a.Release()
		c.Release()
		_, _, again = b.Admit(w.self, w.peer, open, nil)
	}
	a, _, _ = b.Admit(w.self, w.peer, open, end)
	c, _, _ = b.Admit(w.self, w.peer, open, end)
	w.renewPeer(2*time.Hour, identity.Attributes{})
	var denied *Denied
	if !errors.As(again, &denied) || ends != 1 {
		t.Errorf("%v, %d ends", again, ends)
	}
	empty(t, b, w)
}

// Each lease is released while several others end it: end is called at most once.
func TestReleaseRacesWithEnd(t *testing.T) {
	w := newWorld(t)
	var deny atomic.Bool
	yes := agents(t)()
	b := &Book{Policy: func() *abac.Policy {
		if deny.Load() {
			return nil
		}
		return yes
	}}
	for round := range 50 {
		deny.Store(false)
		ends := make([]atomic.Int32, 20)
		leases := make([]*Lease, len(ends))
		for i := range leases {
			var err error
			leases[i], _, err = b.Admit(w.self, w.peer, open, func(error) {
				if ends[i].Add(1) > 1 {
					t.Error("ended twice")
				}
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		deny.Store(true)
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() { b.Again("race") })
		}
		wg.Go(func() { w.renewPeer(time.Duration(round+2)*time.Hour, agentRole) })
		wg.Go(func() {
			for _, l := range leases {
				l.Release()
				runtime.Gosched()
			}
		})
		wg.Wait()
		empty(t, b, w)
	}
}

// Whatever is admitted while a policy changes is decided by the new one, too.
func TestNothingAdmittedByAnOldPolicySurvivesAgain(t *testing.T) {
	w := newWorld(t)
	for range 20 {
		var deny atomic.Bool
		yes := agents(t)()
		b := &Book{Policy: func() *abac.Policy {
			if deny.Load() {
				return nil
			}
			return yes
		}}
		var wg sync.WaitGroup
		var admitted, ended atomic.Int64
		var mu sync.Mutex
		var leases []*Lease
		started := make(chan struct{}, 4)
		for range 4 {
			wg.Go(func() {
				for {
					l, _, err := b.Admit(w.self, w.peer, open, func(error) { ended.Add(1) })
					if err != nil {
						return
					}
					admitted.Add(1)
					mu.Lock()
					leases = append(leases, l)
					mu.Unlock()
					select {
					case started <- struct{}{}:
					default:
					}
				}
			})
		}
		<-started
		deny.Store(true)
		b.Again("closed")
		if n := b.Len(); n != 0 {
			t.Errorf("%d leases live on", n)
		}
		wg.Wait()
		if admitted.Load() != ended.Load() {
			t.Errorf("%d admitted, %d ended", admitted.Load(), ended.Load())
		}
		for _, l := range leases {
			l.Release()
		}
		empty(t, b, w)
	}
}

func TestLeasesOfOnePeerShareOneDecisionAndOneSubscription(t *testing.T) {
	w := newWorld(t)
	b := &Book{Policy: agents(t)}
	before := runtime.NumGoroutine()
	const n, kinds = 10_000, 3
	var ends int
	leases := make([]*Lease, n)
	for i := range leases {
		r := open
		r.Resource = map[string]any{"team": "payments", "tags": []string{"a", "b"}}
		r.Context = map[string]any{"kind": int64(i % kinds), "claimed": map[string]any{"x": true}}
		var err error
		if leases[i], _, err = b.Admit(w.self, w.peer, r, func(error) { ends++ }); err != nil {
			t.Fatal(err)
		}
	}
	if now := runtime.NumGoroutine(); now > before {
		t.Errorf("%d goroutines more", now-before)
	}
	if a, c := listeners(t, w.peer), listeners(t, w.self); a != 1 || c != 1 {
		t.Errorf("%d and %d subscriptions", a, c)
	}
	questions := 0
	for _, tie := range b.ties {
		questions += len(tie.questions)
	}
	if len(b.ties) != 1 || questions != kinds {
		t.Errorf("%d ties, %d questions", len(b.ties), questions)
	}
	for _, l := range leases[:n/2] {
		l.Release()
	}
	w.renewPeer(2*time.Hour, identity.Attributes{})
	if ends != n/2 {
		t.Errorf("%d ended", ends)
	}
	for _, l := range leases {
		l.Release()
	}
	empty(t, b, w)
}

func TestRequestsWithDifferentValuesAreDifferentQuestions(t *testing.T) {
	seen := map[string]string{}
	for _, v := range []any{"1", int64(1), true, "true", []string{"1"}, []string{"1", "1"}, []string{`1""1`}, map[string]any{}, map[string]any{"1": "1"}, map[string]any{"1": map[string]any{"1": "1"}}, ""} {
		for _, r := range []abac.Request{
			{Action: "open", Context: map[string]any{"x": v}},
			{Action: "open", Resource: map[string]any{"x": v}},
			{Action: "open", ResourceID: `x`, Resource: map[string]any{"x": v}},
		} {
			what := fmt.Sprintf("%#v", r)
			if other, ok := seen[keyOf(&r)]; ok {
				t.Errorf("%s and %s are one", what, other)
			}
			seen[keyOf(&r)] = what
		}
	}
}

func TestErrorsSayWhoAndWhen(t *testing.T) {
	at := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	for err, want := range map[error]string{
		&Expired{Peer, at}:    "the peer's credential expired at 2026-11-24T12:00:00Z",
		&Expired{Self, at}:    "this node's credential expired at 2026-11-24T12:00:00Z",
		&Expired{Session, at}: "the longest session that the policy permits ended at 2026-11-24T12:00:00Z",
		&Denied{}:             "no policy permits it",
	} {
		if err.Error() != want {
			t.Errorf("%q", err)
		}
	}
}

func BenchmarkAdmit(b *testing.B) {
	w := newWorld(b)
	book := &Book{Policy: agents(b)}
	b.ReportAllocs()
	for b.Loop() {
		l, _, err := book.Admit(w.self, w.peer, open, nil)
		if err != nil {
			b.Fatal(err)
		}
		l.Release()
	}
}

func BenchmarkSweep10000(b *testing.B) {
	w := newWorld(b)
	book := &Book{Policy: agents(b)}
	for range 10_000 {
		if _, _, err := book.Admit(w.self, w.peer, open, nil); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		book.sweep()
	}
}
