package inlet

import (
	"fmt"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
)

// look is how often a channel's credentials are compared with the wall clock.
// An end is noticed within it; two seconds are promised.
const look = time.Second

// demand ends a channel whose outlet may no longer serve the name: its
// credential changed or ended, or our own did. All streams of the channel stand
// on the same two credentials, so the channel ends, which resets them.
type demand struct {
	server *Server

	mu   sync.Mutex
	live *link.Live
	all  sync.WaitGroup // one goroutine for each channel
}

// hold watches l until it ends. Asking again for the same one changes nothing.
func (d *demand) hold(l *link.Live) {
	d.mu.Lock()
	same := d.live == l
	d.live = l
	d.mu.Unlock()
	if same {
		return
	}
	changed := make(chan struct{}, 1)
	changed <- struct{}{} // between the first judgement and now
	stop := l.Peer().OnChange(func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	d.all.Go(func() {
		defer stop()
		t := time.NewTicker(look)
		defer t.Stop()
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
			if err := d.server.expired(l); err != nil {
				d.end(l, stream.CodeExpired, err)
				return
			}
		}
	})
}

func (d *demand) end(l *link.Live, code stream.Code, err error) {
	d.server.log.Warn("the channel may not go on", "peer", l.Peer(), "reason", err)
	l.Mux.ResetAll(code, err.Error())
	l.Close(&channel.Refused{Err: err})
}

// expired says which of the two credentials has ended, by the wall clock.
func (s *Server) expired(l *link.Live) error {
	now := time.Now()
	if s.Now != nil {
		now = s.Now()
	}
	now = now.Round(0) // without the monotonic reading, which stands still in sleep
	if until := l.Peer().Until(); !now.Before(until) {
		return fmt.Errorf("the outlet's credential expired at %s", until.UTC().Format(time.RFC3339))
	}
	if c := s.Self.Credential(); c != nil && !now.Before(c.Expires) {
		return fmt.Errorf("our credential expired at %s", c.Expires.UTC().Format(time.RFC3339))
	}
	return nil
}
