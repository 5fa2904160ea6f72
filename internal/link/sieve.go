package link

import (
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"
)

// A sieve has the kernel drop what comes from sources that begin handshakes without
// end, before there is a connection: to accept one and to close it costs thirty times
// what it costs to look at its first packet. Where the kernel cannot, the server closes
// what it accepts, as it does for sources that are not barred.
//
// The zero value is ready. Its timer is the only thing that outlives a call, and ends
// with the last of the listeners.
type sieve struct {
	mu      sync.Mutex
	doors   map[net.Listener]*door
	barred  map[netip.Prefix]time.Time // until when
	next    *time.Timer                // for sift; nil while nobody is barred
	due     time.Time                  // of next
	barring bool                       // since a line in the log said so
	log     *slog.Logger
}

// A door is a listener that packets can be dropped before.
type door struct {
	dig func(net.Listener) (pit, error)
	pit pit // nil while it is open to all
}

// A pit is where the kernel has the packets of barred sources fall, but one in
// triesBeyond, which the listener gets.
type pit interface {
	// steer replaces who falls.
	steer([]netip.Prefix) error
	close()
}

const (
	// barTime is how long a source is barred. It has eight lanes more when it is over.
	barTime = 30 * time.Second
	// siftEvery is how often the kernel is told at most: it compiles what it is told.
	siftEvery = 100 * time.Millisecond
	// The kernel looks through the barred one after the other, which takes a third of a
	// microsecond for 512, and compiles no more than 20 KB.
	maxBarred4, maxBarred6 = 512, 64
)

// open adds ln, if it is one that dig can do something about.
func (s *sieve) open(ln net.Listener, dig func(net.Listener) (pit, error), log *slog.Logger) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.doors == nil {
		s.doors, s.barred = make(map[net.Listener]*door), make(map[netip.Prefix]time.Time)
	}
	s.doors[ln], s.log = &door{dig: dig}, log
	if len(s.barred) > 0 {
		s.soon(time.Now())
	}
}

// shut takes ln off, which its owner closes next.
func (s *sieve) shut(ln net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.doors[ln]; d != nil && d.pit != nil {
		d.pit.close()
	}
	if delete(s.doors, ln); len(s.doors) == 0 {
		if s.next != nil {
			s.next.Stop()
			s.next = nil
		}
		clear(s.barred)
		s.barring = false
	}
}

// bar bars a source for barTime. Of too many those that come last are not barred.
func (s *sieve) bar(from string) {
	p, err := netip.ParsePrefix(from)
	if err != nil {
		a, err := netip.ParseAddr(from)
		if err != nil {
			return
		}
		a = a.Unmap().WithZone("")
		p = netip.PrefixFrom(a, a.BitLen())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.doors) == 0 {
		return
	}
	if _, there := s.barred[p]; !there {
		n, most := 0, maxBarred6
		if p.Addr().Is4() {
			most = maxBarred4
		}
		for q := range s.barred {
			if q.Addr().Is4() == p.Addr().Is4() {
				n++
			}
		}
		if n >= most {
			return
		}
	}
	now := time.Now()
	s.barred[p] = now.Add(barTime)
	s.soon(now.Add(siftEvery))
}

// soon sifts at a time, or before.
func (s *sieve) soon(at time.Time) {
	if s.next != nil {
		if !at.Before(s.due) {
			return
		}
		s.next.Stop()
	}
	s.due = at
	s.next = time.AfterFunc(time.Until(at), s.sift)
}

// sift tells the kernel who is barred now, and comes back when the first of them is not
// any more.
func (s *sieve) sift() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next = nil
	now := time.Now()
	var all []netip.Prefix
	var first time.Time
	for p, until := range s.barred {
		if !until.After(now) {
			delete(s.barred, p)
			continue
		}
		all = append(all, p)
		if first.IsZero() || until.Before(first) {
			first = until
		}
	}
	works := false
	for ln, d := range s.doors {
		if s.change(ln, d, all) {
			works = true
		}
	}
	if works && !s.barring {
		s.log.Warn("sources that begin handshakes without end are kept out", "sources", len(all), "for", barTime)
	}
	s.barring = works
	if len(all) > 0 && len(s.doors) > 0 {
		if soonest := now.Add(siftEvery); first.Before(soonest) {
			first = soonest
		}
		s.soon(first)
	}
}

// change has all, and nobody else, fall before ln; false: nobody does.
func (s *sieve) change(ln net.Listener, d *door, all []netip.Prefix) bool {
	if len(all) == 0 {
		if d.pit != nil {
			d.pit.close()
			d.pit = nil
		}
		return false
	}
	var err error
	if d.pit == nil && d.dig != nil {
		d.pit, err = d.dig(ln)
	}
	if err == nil && d.pit != nil {
		err = d.pit.steer(all)
	}
	if err != nil { // the server goes on as if there were none
		s.log.Debug("the kernel keeps nobody out", "listener", ln.Addr().String(), "err", err)
		if d.pit != nil {
			d.pit.close()
			d.pit = nil
		}
		d.dig = nil
	}
	return d.pit != nil
}
