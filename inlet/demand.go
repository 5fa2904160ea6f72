package inlet

import (
	"fmt"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
)

// look is how often a channel's credentials are compared with the clocks.
// An end is noticed within it; two seconds are promised.
const look = time.Second

// demand ends a channel whose outlet may no longer serve the name: its
// credential changed or ended, or our own did. All streams of the channel stand
// on the same two credentials, so the channel ends, which resets them.
type demand struct {
	server *Server

	mu    sync.Mutex
	live  *link.Live
	asked map[chan struct{}]struct{} // one for each channel: judge its outlet again
	all   sync.WaitGroup             // one goroutine for each channel
}

// hold watches l until it ends. Asking again for the same one changes nothing.
func (d *demand) hold(l *link.Live) {
	changed := make(chan struct{}, 1)
	changed <- struct{}{} // between the first judgement and now
	d.mu.Lock()
	same := d.live == l
	if !same {
		d.live = l
		if d.asked == nil {
			d.asked = make(map[chan struct{}]struct{})
		}
		d.asked[changed] = struct{}{}
	}
	d.mu.Unlock()
	if same {
		return
	}
	stop := l.Peer().OnChange(func() { poke(changed) })
	d.all.Go(func() {
		defer func() {
			stop()
			d.mu.Lock()
			delete(d.asked, changed)
			d.mu.Unlock()
		}()
		t := time.NewTicker(look)
		defer t.Stop()
		var theirs, ours term
		for {
			select {
			case <-l.Done():
				return
			case <-changed:
				if err := d.server.judge(l.Peer()); err != nil {
					d.end(l, stream.CodeRevoked, err)
					return
				}
			case <-t.C:
			}
			now := d.server.now()
			err := theirs.over("the outlet's credential", l.Peer().Until(), now)
			if c := d.server.Self.Credential(); err == nil && c != nil {
				err = ours.over("our credential", c.Expires, now)
			}
			if err != nil {
				d.end(l, stream.CodeExpired, err)
				return
			}
		}
	})
}

// again has every channel judged again, also one whose streams only finish.
func (d *demand) again() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for changed := range d.asked {
		poke(changed)
	}
}

// poke sends to a channel with one slot, unless it is full.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (d *demand) end(l *link.Live, code stream.Code, err error) {
	d.server.log.Warn("the channel may not go on", "peer", l.Peer(), "reason", err)
	l.Mux.ResetAll(code, err.Error())
	l.Close(&channel.Refused{Err: err})
}

// term is the end of a credential by both clocks, noted when it is first seen:
// a wall clock set back does not extend it, and one set ahead, or a machine that
// slept, ends it. internal/lease keeps its leases so too.
type term struct {
	until time.Time // wall
	end   time.Time // monotonic
}

// over returns an error when the credential that ends at until is over.
func (t *term) over(whose string, until, now time.Time) error {
	if !t.until.Equal(until) {
		t.until, t.end = until, time.Now().Add(until.Sub(now))
	}
	if now.Before(until) && time.Now().Before(t.end) {
		return nil
	}
	return fmt.Errorf("%s expired at %s", whose, until.UTC().Format(time.RFC3339))
}

// now is the wall clock, without the monotonic reading.
func (s *Server) now() time.Time {
	if s.Now != nil {
		return s.Now().Round(0)
	}
	return time.Now().Round(0)
}
