package identity

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestRenewTakesOnlyALaterCredentialOfTheSameKind(t *testing.T) {
	authority, stranger, s, other := newSelf(t), newSelf(t), newSelf(t), newSelf(t)
	if s.Credential() != nil || s.Issuer() != nil {
		t.Fatal("a new identity has a credential")
	}
	var changes int
	s.OnChange(func() { changes++ })
	first := issueTo(t, authority, s, nil, noon, noon.Add(time.Hour))
	if err := s.Renew(first, authority.History()); err != nil {
		t.Fatal(err)
	}
	if err := s.Renew(first, authority.History()); err != nil {
		t.Errorf("the same again: %v", err)
	}
	for name, tt := range map[string]struct {
		by, to *Self
		end    time.Duration
		want   error
	}{
		"for another":       {authority, other, 2 * time.Hour, ErrSubject},
		"of another":        {stranger, s, 2 * time.Hour, ErrIssuer},
		"ending as before":  {authority, s, time.Hour, ErrOlder},
		"ending before":     {authority, s, time.Minute, ErrOlder},
		"ending 1 ms later": {authority, s, time.Hour + time.Millisecond, nil},
	} {
		c := issueTo(t, tt.by, tt.to, nil, noon, noon.Add(tt.end))
		if err := s.Renew(c, tt.by.History()); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.Renew(nil, authority.History()); !errors.Is(err, ErrMalformed) {
		t.Errorf("nil: %v", err)
	}
	later := issueTo(t, authority, s, nil, noon, noon.Add(3*time.Hour))
	if err := s.Renew(later, stranger.History()); !errors.Is(err, ErrSignature) {
		t.Errorf("with a stranger's history: %v", err)
	}
	if changes != 2 {
		t.Errorf("%d changes were told, want 2", changes)
	}
	if c, issuer := s.Show(); c.Expires != noon.Add(time.Hour+time.Millisecond) || string(issuer) != string(authority.History()) {
		t.Errorf("shows %v", c)
	}
}

func TestRotatedIdentityNeedsANewCredential(t *testing.T) {
	authority, s := newSelf(t), newSelf(t)
	old := issueTo(t, authority, s, nil, noon, noon.Add(time.Hour))
	if err := s.Renew(old, authority.History()); err != nil {
		t.Fatal(err)
	}
	rotate(t, s)
	if err := peerOf(t, s, noon).Accept(old); !errors.Is(err, ErrSubject) {
		t.Errorf("the old credential: %v", err)
	}
	fresh := issueTo(t, authority, s, nil, noon, noon.Add(time.Minute)) // ends earlier, and counts all the same
	if err := s.Renew(fresh, authority.History()); err != nil {
		t.Error(err)
	}
}

func TestPeerIsWhatItLastShowed(t *testing.T) {
	authority, stranger, s, other := newSelf(t), newSelf(t), newSelf(t), newSelf(t)
	p := peerOf(t, s, noon)
	if p.ID() != s.ID() || p.Latest() != s.Latest() || p.Credential() != nil || !p.Until().IsZero() || p.Attributes() == nil || len(p.Attributes()) != 0 {
		t.Error("a peer that showed nothing")
	}
	var changes int
	stop := p.OnChange(func() { changes++ })
	first := issueTo(t, authority, s, Attributes{"role": "agent"}, noon, noon.Add(time.Hour))
	for range 2 {
		if err := p.Accept(first); err != nil {
			t.Fatal(err)
		}
	}
	if changes != 1 {
		t.Errorf("a credential and its repeat were told %d times", changes)
	}
	for name, tt := range map[string]struct {
		by, to *Self
		end    time.Duration
		want   error
	}{
		"about another":    {authority, other, 2 * time.Hour, ErrSubject},
		"of another":       {stranger, s, 2 * time.Hour, ErrIssuer},
		"ending as before": {authority, s, time.Hour, ErrOlder},
		"ending before":    {authority, s, time.Minute, ErrOlder},
	} {
		if err := p.Accept(issueTo(t, tt.by, tt.to, Attributes{"role": "admin"}, noon, noon.Add(tt.end))); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, c := range map[string]*Credential{"nil": nil, "made by hand": {Subject: s.ID(), Change: s.Latest(), Expires: noon.Add(9 * time.Hour)}} {
		if err := p.Accept(c); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if p.Credential() != first || p.Attributes()["role"] != "agent" || !p.Until().Equal(noon.Add(time.Hour)) || changes != 1 {
		t.Error("what was refused left a trace")
	}
	stop()
	stop()
	if err := p.Accept(issueTo(t, authority, s, nil, noon, noon.Add(2*time.Hour))); err != nil {
		t.Fatal(err)
	}
	if changes != 1 {
		t.Error("told after stop")
	}
}

type channelEnd struct{ peer *Peer }

func (e channelEnd) Peer() *Peer { return e.peer }

func TestPeerOfReadsAnOrigin(t *testing.T) {
	p := peerOf(t, newSelf(t), noon)
	for _, origin := range []any{p, channelEnd{p}, &channelEnd{p}} {
		if got, ok := PeerOf(origin); got != p || !ok {
			t.Errorf("PeerOf(%T) = %v, %v", origin, got, ok)
		}
	}
	for _, origin := range []any{nil, (*Peer)(nil), channelEnd{}, "peer", *new(struct{})} {
		if got, ok := PeerOf(origin); ok || got != nil {
			t.Errorf("PeerOf(%T) = %v, %v", origin, got, ok)
		}
	}
}

func TestCallbackMayReadAddAndRemove(t *testing.T) {
	authority, s := newSelf(t), newSelf(t)
	p := peerOf(t, s, noon)
	var log []string
	var stopB func()
	p.OnChange(func() {
		log = append(log, "a:"+p.Until().Format("15"))
		stopB()
		p.OnChange(func() { log = append(log, "c") })
	})
	stopB = p.OnChange(func() { log = append(log, "b") })
	for h := range 2 {
		if err := p.Accept(issueTo(t, authority, s, nil, noon, noon.Add(time.Duration(h+1)*time.Hour))); err != nil {
			t.Fatal(err)
		}
	}
	if got := fmt.Sprint(log); got != "[a:13 a:14 c]" && got != "[a:13 c a:14]" {
		t.Errorf("%v", got)
	}
}

// TestEachChangeIsSeenByWhoRegisteredFirst renews while listeners come and go:
// who registers and then reads sees the last credential.
func TestEachChangeIsSeenByWhoRegisteredFirst(t *testing.T) {
	authority, s := newSelf(t), newSelf(t)
	const renewals, listeners = 50, 8
	credentials := make([]*Credential, renewals)
	for i := range credentials {
		credentials[i] = issueTo(t, authority, s, nil, noon, noon.Add(time.Duration(i+1)*time.Minute))
	}
	last := credentials[renewals-1].Expires
	p := peerOf(t, s, noon)
	var wg sync.WaitGroup
	seen := make([]atomic.Int64, listeners)
	for i := range listeners {
		wg.Go(func() {
			read := func() {
				until := p.Until().UnixMilli()
				for {
					old := seen[i].Load()
					if until <= old || seen[i].CompareAndSwap(old, until) {
						return
					}
				}
			}
			for range 100 {
				p.OnChange(func() {})()
			}
			p.OnChange(read)
			read()
		})
	}
	wg.Go(func() {
		for _, c := range credentials {
			if err := p.Accept(c); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	for i := range seen {
		if got := seen[i].Load(); got != last.UnixMilli() {
			t.Errorf("listener %d last saw %v", i, time.UnixMilli(got).UTC())
		}
	}
}

func TestTenThousandListenersStayCheap(t *testing.T) {
	const n = 10_000
	var l listeners
	stops := make([]func(), n)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var calls int
	f := func() { calls++ }
	for i := range stops {
		stops[i] = l.add(f)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if per := int64(after.HeapAlloc-before.HeapAlloc) / n; per > 100 {
		t.Errorf("a listener takes %d bytes", per)
	}
	l.call()
	if calls != n {
		t.Errorf("%d of %d were called", calls, n)
	}
	for i := range stops {
		stops[(i*7919)%n]() // 7919 and n have no common divisor
	}
	if l.call(); calls != n || l.all != nil {
		t.Errorf("%d calls, %d listeners after all were stopped", calls, len(l.all))
	}
}

func TestConcurrentUseOfOneIdentity(t *testing.T) {
	authority, s := newSelf(t), newSelf(t)
	trust := NewTrust(authority.ID())
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range 3 {
				switch i {
				case 0:
					if err := s.Rotate(); err != nil {
						t.Error(err)
					}
				case 1:
					if _, _, err := s.Static(noon); err != nil {
						t.Error(err)
					}
				case 2:
					c, err := authority.Issue(s.ID(), s.Latest(), nil, noon, noon.Add(time.Duration(j+1)*time.Hour))
					if err != nil {
						t.Error(err)
					} else if err := s.Renew(c, authority.History()); err != nil && !errors.Is(err, ErrSubject) {
						t.Error(err)
					}
				case 3:
					if c, issuer := s.Show(); c != nil {
						if _, err := trust.Verify(c.Raw(), issuer, c.Subject, c.Change, noon); err != nil {
							t.Error(err)
						}
					}
					s.Sign("test", s.History())
				}
			}
		})
	}
	wg.Wait()
}
