package link

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"github.com/portal-tunnel/portal/internal/stream"
)

// A stranger is a lane that has not proved itself.
type stranger struct {
	net.Conn
	from   string // whom it is counted for
	many   bool   // many may come from its address: its turns and tries are its own
	cancel context.CancelFunc
}

// giveUp ends the lane, whatever it is at: by a reset, which waits for nothing.
func (s *stranger) giveUp() {
	s.cancel()
	stream.Abort(s.Conn)
}

// strangers are the lanes of a server that are half open, on their way to a confirmed
// channel. Their owner locks.
type strangers struct {
	limit int
	all   map[*stranger]struct{}
	from  map[string]map[*stranger]struct{} // the same by source
	tried map[string]*tries
}

// tries are the lanes that a source has had lately: they are forgotten at a rate, and
// those that have proved themselves at once.
type tries struct {
	had    float64
	beyond float64   // what a crowd had no room for
	at     time.Time // of both
}

const (
	// In a crowd, when half of the places are taken, a source has 8 lanes at once and
	// one more in four seconds, one that has proved itself before 256 and 32 a second. Of
	// those beyond one in 128 is let in all the same: somebody honest may share the address.
	triesAtOnce, triesEach           = 8, 0.25 // a second
	triesKnownAtOnce, triesKnownEach = 256, 32
	triesBeyond                      = 128
	// A source that is not known has its packets dropped after so many beyond.
	triesBarred = 8
	// triedSources bounds what is remembered: 4,096 addresses are some 500 KB.
	triedSources = 4096
)

func (h *strangers) begin(limit int) {
	if h.limit = limit; limit <= 0 {
		h.limit = DefaultHalfOpen
	}
	h.all, h.from = make(map[*stranger]struct{}), make(map[string]map[*stranger]struct{})
	h.tried = make(map[string]*tries)
}

// enter counts a newcomer, of a source that has proved itself before or has not; not in:
// it has to go, and bar: what comes from its source is best not accepted at all. At the
// cap one lane of the source that has most of them goes, chosen by chance; never the
// newcomer, who may be honest.
func (h *strangers) enter(newcomer *stranger, known bool) (in, bar bool) {
	if !newcomer.many {
		if in, bar = h.try(newcomer.from, known); !in {
			return in, bar
		}
	}
	if len(h.all) >= h.limit {
		var most map[*stranger]struct{}
		for _, of := range h.from {
			if len(of) > len(most) {
				most = of
			}
		}
		for old := range most { // a map is walked from a place chosen by chance
			h.leave(old)
			old.giveUp()
			break
		}
	}
	h.all[newcomer] = struct{}{}
	of := h.from[newcomer.from]
	if of == nil {
		of = make(map[*stranger]struct{}, 1)
		h.from[newcomer.from] = of
	}
	of[newcomer] = struct{}{}
	return true, bar
}

// try counts one more lane of a source; not in: it is crowded, and the source has had its
// share, and bar: many times over.
func (h *strangers) try(from string, known bool) (in, bar bool) {
	most, each := float64(triesAtOnce), float64(triesEach)
	if known {
		most, each = triesKnownAtOnce, triesKnownEach
	}
	now := time.Now()
	t := h.tried[from]
	if t == nil {
		if len(h.tried) >= triedSources {
			for old := range h.tried {
				delete(h.tried, old)
				break
			}
		}
		t = &tries{at: now}
		h.tried[from] = t
	}
	forgotten := each * max(now.Sub(t.at).Seconds(), 0)
	t.had, t.beyond, t.at = max(t.had-forgotten, 0), max(t.beyond-forgotten, 0), now
	if t.had+1 <= most {
		t.had++
		return true, false
	}
	if len(h.all) < h.limit/2 {
		return true, false
	}
	t.beyond++
	return rand.IntN(triesBeyond) == 0, !known && t.beyond >= triesBarred
}

// leave takes a lane off, once.
func (h *strangers) leave(old *stranger) {
	if _, there := h.all[old]; !there {
		return
	}
	delete(h.all, old)
	of := h.from[old.from]
	if delete(of, old); len(of) == 0 {
		delete(h.from, old.from)
	}
}

// proved takes off a lane that is a confirmed channel now, or one that was wanted.
func (h *strangers) proved(who *stranger) {
	h.leave(who)
	if t := h.tried[who.from]; t != nil && !who.many {
		t.had--
	}
}

// source is whom a lane is counted for: an address, of IPv6 its /64, which one
// host may have the whole of; but of all neighbours on a link each has an address.
func source(a net.Addr) string {
	if a == nil {
		return ""
	}
	host, _, err := net.SplitHostPort(a.String())
	if err != nil {
		return a.String()
	}
	if ip, err := netip.ParseAddr(host); err == nil && ip.Is6() && !ip.Is4In6() && !ip.IsLinkLocalUnicast() {
		prefix, _ := ip.WithZone("").Prefix(64)
		return prefix.String()
	}
	return host
}
