package link

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// trace is a pit that keeps what it was told, or fails.
type trace struct {
	told   [][]netip.Prefix
	closed bool
	fail   error
}

func (p *trace) steer(all []netip.Prefix) error {
	p.told = append(p.told, slices.SortedFunc(slices.Values(all), netip.Prefix.Compare))
	return p.fail
}

func (p *trace) close() { p.closed = true }

type nowhere struct{ net.Listener }

func (nowhere) Addr() net.Addr { return &net.TCPAddr{} }

// sieved runs f in a bubble with a sieve before a listener, whose pits are in all.
func sieved(t *testing.T, f func(s *sieve, ln net.Listener, all *[]*trace, log *bytes.Buffer)) {
	synctest.Test(t, func(*testing.T) {
		var log bytes.Buffer
		var all []*trace
		s, ln := new(sieve), &nowhere{}
		s.open(ln, func(net.Listener) (pit, error) {
			all = append(all, new(trace))
			return all[len(all)-1], nil
		}, slog.New(slog.NewTextHandler(&log, nil)))
		f(s, ln, &all, &log)
		s.shut(ln)
		if s.next != nil {
			t.Error("a timer is left")
		}
	})
}

// later lets d go by, and what is due then be over. What the test has looked at is
// before what the timer does next, and that before what the test looks at behind it.
func (s *sieve) later(d time.Duration) {
	held := func() int { s.mu.Lock(); defer s.mu.Unlock(); return len(s.doors) }
	held()
	<-time.After(d)
	synctest.Wait()
	held()
}

func TestBarredSourcesFallForThirtySeconds(t *testing.T) {
	sieved(t, func(s *sieve, _ net.Listener, all *[]*trace, log *bytes.Buffer) {
		s.bar("10.0.0.1")
		s.later(siftEvery)
		s.bar("10.0.0.2")
		s.bar("2001:db8:0:1::/64")
		s.bar("what a listener in memory calls its peers")
		s.later(siftEvery)
		if len(*all) != 1 || fmt.Sprint((*all)[0].told) != "[[10.0.0.1/32] [10.0.0.1/32 10.0.0.2/32 2001:db8:0:1::/64]]" {
			t.Fatalf("the kernel was told %v", *all)
		}
		s.later(barTime - siftEvery - siftEvery/2)
		if p := (*all)[0]; fmt.Sprint(p.told[2:]) != "[[10.0.0.2/32 2001:db8:0:1::/64]]" || p.closed {
			t.Errorf("when the first was over it was told %v", p.told[2:])
		}
		s.later(siftEvery)
		if !(*all)[0].closed || len(s.barred) != 0 || s.next != nil {
			t.Error("there is a pit for nobody")
		}
		s.bar("10.0.0.3")
		s.later(siftEvery)
		if len(*all) != 2 || (*all)[1].closed {
			t.Error("there is none for who is barred next")
		}
		if n := strings.Count(log.String(), "handshakes without end"); n != 2 || strings.Count(log.String(), "any more") != 1 {
			t.Errorf("of two times the log has %d:\n%s", n, log)
		}
	})
}

func TestWhoIsBarredAgainStaysSo(t *testing.T) {
	sieved(t, func(s *sieve, _ net.Listener, all *[]*trace, _ *bytes.Buffer) {
		s.bar("10.0.0.1")
		s.later(barTime - time.Second)
		s.bar("10.0.0.1")
		s.later(barTime - time.Second)
		if (*all)[0].closed {
			t.Error("the bar was not prolonged")
		}
		s.later(time.Second)
		if !(*all)[0].closed {
			t.Error("the bar has no end")
		}
	})
}

func TestTheKernelIsToldTenTimesASecondAtMost(t *testing.T) {
	sieved(t, func(s *sieve, _ net.Listener, all *[]*trace, _ *bytes.Buffer) {
		for i := range 100 {
			s.bar(fmt.Sprintf("10.0.0.%d", i))
			s.later(10 * time.Millisecond)
		}
		if n := len((*all)[0].told); n < 9 || n > 11 {
			t.Errorf("it was told %d times in a second", n)
		}
	})
}

func TestOfTooManySourcesTheLastAreNotBarred(t *testing.T) {
	sieved(t, func(s *sieve, _ net.Listener, all *[]*trace, _ *bytes.Buffer) {
		for i := range 1000 {
			s.bar(fmt.Sprintf("10.0.%d.%d", i/250, i%250))
			s.bar(fmt.Sprintf("2001:db8:0:%x::/64", i))
		}
		s.later(siftEvery)
		if n := len((*all)[0].told[0]); n != maxBarred4+maxBarred6 {
			t.Errorf("%d are barred", n)
		}
	})
}

func TestAKernelThatRefusesIsAskedAgainLater(t *testing.T) {
	refusal := errors.New("not now")
	for name, p := range map[string]*trace{"to dig": nil, "to steer": {fail: refusal}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				s, ln, asked := new(sieve), &nowhere{}, 0
				refuses := true
				s.open(ln, func(net.Listener) (pit, error) {
					asked++
					if p == nil && refuses {
						return nil, refusal
					}
					if p == nil {
						p = new(trace)
					}
					return p, nil
				}, slog.New(slog.NewTextHandler(&log, nil)))
				for i := range int(digAgain / time.Second) {
					s.bar(fmt.Sprintf("10.0.0.%d", i))
					s.later(time.Second)
				}
				if asked != 1 || p != nil && (!p.closed || len(p.told) != 1) || log.Len() > 0 {
					t.Errorf("it was asked %d times, %+v; the log: %s", asked, p, &log)
				}
				refuses = false
				if p != nil {
					p.fail, p.closed = nil, false
				}
				s.bar("10.0.0.1")
				s.later(time.Second)
				if asked != 2 || p == nil || p.closed {
					t.Errorf("then it was asked %d times, %+v", asked, p)
				}
				s.shut(ln)
			})
		})
	}
}

func TestWhoHasProvedItselfIsLetIn(t *testing.T) {
	sieved(t, func(s *sieve, _ net.Listener, all *[]*trace, _ *bytes.Buffer) {
		s.bar("10.0.0.1")
		s.bar("10.0.0.2")
		s.later(siftEvery)
		s.pardon("10.0.0.1")
		s.pardon("10.0.0.3")
		s.later(siftEvery)
		if told := (*all)[0].told; len(told) != 2 || fmt.Sprint(told[1]) != "[10.0.0.2/32]" {
			t.Errorf("the kernel was told %v", told)
		}
		s.pardon("10.0.0.2")
		s.later(siftEvery)
		if !(*all)[0].closed {
			t.Error("there is a pit for nobody")
		}
	})
}

// The kernel compares as much of an address as a source has.
func TestOnlyWhatTheKernelCanTellApartIsBarred(t *testing.T) {
	for from, want := range map[string]string{
		"10.0.0.1": "10.0.0.1/32", "::ffff:10.0.0.1": "10.0.0.1/32", "2001:db8:0:1::/64": "2001:db8:0:1::/64",
		"": "", "memory": "", "fe80::1": "", "fe80::1%eth0": "", "2001:db8::/32": "", "10.0.0.0/8": "",
	} {
		p, ok := barrable(from)
		if ok != (want != "") || ok && p.String() != want {
			t.Errorf("%q: %v, %v", from, p, ok)
		}
	}
}

func TestAStrangerIsBarredBeyondEightBeyondItsShareInACrowdOnly(t *testing.T) {
	for _, c := range []struct {
		name               string
		crowd, known, many bool
		first              int // the try that bars it; 0: none
	}{
		{"in a crowd", true, false, false, triesAtOnce + triesBarred},
		{"in no crowd", false, false, false, 0},
		{"known", true, true, false, 0},
		{"where many come from", true, false, true, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var h strangers
				h.begin(200)
				if c.crowd {
					for i := range 100 {
						h.enter(&stranger{from: fmt.Sprint(i), many: true}, false)
					}
				}
				first := 0
				for i := range triesKnownAtOnce + 50 {
					// One in 128 is let in beyond, and would evict another.
					who := &stranger{from: "10.0.0.1", many: c.many}
					_, bar := h.enter(who, c.known)
					h.leave(who)
					if bar && first == 0 {
						first = i + 1
					}
				}
				if first != c.first {
					t.Errorf("it is barred by try %d, not %d", first, c.first)
				}
			})
		})
	}
}

func TestAListenerThatComesLaterKeepsOutWhoIsBarred(t *testing.T) {
	sieved(t, func(s *sieve, _ net.Listener, _ *[]*trace, _ *bytes.Buffer) {
		s.bar("10.0.0.1")
		s.later(time.Second)
		second, p := &nowhere{new(net.TCPListener)}, new(trace)
		s.open(second, func(net.Listener) (pit, error) { return p, nil }, s.log)
		synctest.Wait()
		if len(p.told) != 1 {
			t.Errorf("it was told %v", p.told)
		}
		s.shut(second)
		if !p.closed {
			t.Error("its pit is left")
		}
	})
}
