package link

import (
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"
)

// A sieve has the kernel drop what comes from sources that begin handshakes without
// end, before there is a connection: to accept one and to close it costs the core of
// those who work, to drop its first packet hardly anything. Where the kernel cannot, the server closes
// what it accepts, as it does for sources that are not barred.
//
// The zero value is ready. Its timer is the only thing that outlives a call, and ends
// with the last of the listeners.
type sieve struct {
	mu      sync.Mutex
	doors   map[net.Listener]*door
	barred  map[netip.Prefix]time.Time // until when
	four    int                        // of barred, those of IPv4
	next    *time.Timer                // for sift; nil while nobody is barred
	due     time.Time                  // of next
	barring bool                       // since a line in the log said so
	log     *slog.Logger
}

// A door is a listener that packets can be dropped before.
type door struct {
	dig   func(net.Listener) (pit, error)
	pit   pit       // nil while it is open to all
	again time.Time // when a pit may be dug after one that could not
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
	// digAgain is for a kernel that has no descriptor or memory for a pit. One that does
	// not know how is asked in vain as often, which costs it nothing.
	digAgain = 30 * time.Second
	// The kernel looks through the barred one after the other, and compiles no more than
	// 20 KB of a program where net.core.optmem_max is what it was before Linux 6.8.
	maxBarred4, maxBarred6 = 512, 64
)

// open adds ln. With no dig there is nothing to be done about it.
func (s *sieve) open(ln net.Listener, dig func(net.Listener) (pit, error), log *slog.Logger) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.doors[ln] != nil || dig == nil {
		return
	}
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
	if d := s.doors[ln]; d != nil {
		d.fill()
	}
	if delete(s.doors, ln); len(s.doors) == 0 {
		if s.next != nil {
			s.next.Stop()
			s.next = nil
		}
		clear(s.barred)
		s.four, s.barring = 0, false
	}
}

// barrable reads a source as the kernel can tell it: an IPv4 address, or an IPv6 /64.
func barrable(from string) (p netip.Prefix, ok bool) {
	if p, err := netip.ParsePrefix(from); err == nil {
		return p, p.Addr().Is6() && p.Bits() == 64
	}
	a, err := netip.ParseAddr(from)
	a = a.Unmap()
	if err != nil || !a.Is4() {
		return p, false
	}
	return netip.PrefixFrom(a, 32), true
}

// bar bars a source for barTime. Of too many those that come last are not barred.
func (s *sieve) bar(from string) {
	p, ok := barrable(from)
	if !ok {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.doors) == 0 {
		return
	}
	now := time.Now()
	if _, there := s.barred[p]; there { // one of the few that are let through
		s.barred[p] = now.Add(barTime)
		return
	}
	if p.Addr().Is4() {
		if s.four == maxBarred4 {
			return
		}
		s.four++
	} else if len(s.barred)-s.four == maxBarred6 {
		return
	}
	s.barred[p] = now.Add(barTime)
	s.soon(now.Add(siftEvery))
}

// pardon lets a source in that has proved itself: it may be an office of many.
func (s *sieve) pardon(from string) {
	p, ok := barrable(from)
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, there := s.barred[p]; ok && there {
		s.forget(p)
		s.soon(time.Now().Add(siftEvery))
	}
}

func (s *sieve) forget(p netip.Prefix) {
	delete(s.barred, p)
	if p.Addr().Is4() {
		s.four--
	}
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
	if s.next != nil { // not this one, if another was set while it fired
		s.next.Stop()
		s.next = nil
	}
	now := time.Now()
	var all []netip.Prefix
	var first time.Time
	for p, until := range s.barred {
		if !until.After(now) {
			s.forget(p)
			continue
		}
		all = append(all, p)
		if first.IsZero() || until.Before(first) {
			first = until
		}
	}
	works := false
	for ln, d := range s.doors {
		if s.change(ln, d, all, now) {
			works = true
		}
	}
	switch {
	case works && !s.barring:
		s.log.Warn("sources that begin handshakes without end are kept out", "first", all[0], "sources", len(all), "for", barTime)
	case !works && s.barring:
		s.log.Info("no source is kept out any more")
	}
	s.log.Debug("the kernel keeps out", "sources", all)
	s.barring = works
	if len(all) > 0 && len(s.doors) > 0 {
		if soonest := now.Add(siftEvery); first.Before(soonest) {
			first = soonest
		}
		s.soon(first)
	}
}

// change has all, and nobody else, fall before ln; false: nobody does.
func (s *sieve) change(ln net.Listener, d *door, all []netip.Prefix, now time.Time) bool {
	if len(all) == 0 {
		d.fill()
		return false
	}
	if d.pit == nil {
		if now.Before(d.again) {
			return false
		}
		p, err := d.dig(ln)
		if err != nil { // the server goes on as if there were nothing like it
			s.log.Debug("the kernel keeps nobody out", "listener", ln.Addr(), "err", err)
			d.again = now.Add(digAgain)
			return false
		}
		d.pit = p
	}
	if err := d.pit.steer(all); err != nil {
		s.log.Debug("the kernel keeps nobody out", "listener", ln.Addr(), "err", err)
		d.fill()
		d.again = now.Add(digAgain)
		return false
	}
	return true
}

func (d *door) fill() {
	if d.pit != nil {
		d.pit.close()
		d.pit = nil
	}
}
