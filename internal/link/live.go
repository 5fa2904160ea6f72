// Package link keeps channels alive and takes them in.
//
// A Live is one confirmed channel with its streams, and the goroutine that
// reads its lane. A Keeper has one Live at a time, dialled and replaced by the
// only loop that dials. A Server accepts lanes, lets them prove themselves
// within limits, and hands their streams to the service they ask for.
package link

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/stream"
)

// Live is a confirmed channel and its streams.
type Live struct {
	End  *channel.End
	Mux  *stream.Mux
	Path string // how it was reached, or from where it came
	// Took is how long the handshake lasted, on a lane that was there: with what the
	// other end had to do before it could answer, such as coming for the lane.
	Took time.Duration
	// Hops is how many relays have passed the lane on to this one.
	Hops int

	away    chan struct{}   // closed when the other end is going away
	leaving <-chan struct{} // closed when the lane's carrier is; nil: never
	left    chan struct{}   // closed when either is
	leave   func()          // closes left, once
	done    chan struct{}
	err     error
}

// start makes a Live of an end, shows it to first, if not nil, and then reads its
// lane until the channel ends.
func start(e *channel.End, c *channel.Config, initiator bool, path string, limits stream.Limits, accept func(*Live, *stream.Incoming), first func(*Live)) *Live {
	l := &Live{End: e, Path: path, away: make(chan struct{}), left: make(chan struct{}), done: make(chan struct{})}
	l.leave = sync.OnceFunc(func() { close(l.left) })
	var incoming func(*stream.Incoming)
	if accept != nil {
		incoming = func(in *stream.Incoming) { accept(l, in) }
	}
	l.Mux = stream.NewMux(c.Node, e, initiator, limits, incoming)
	l.Mux.OnAway(sync.OnceFunc(func() { close(l.away); l.leave() }))
	if first != nil {
		first(l)
	}
	go func() {
		l.err = e.Run(l.Mux)
		l.Mux.Fail(l.err)
		close(l.done)
	}()
	return l
}

// Dial opens one channel on a lane, without a Keeper: for an errand.
func Dial(ctx context.Context, lane net.Conn, c *channel.Config, accept func(*Live, *stream.Incoming)) (*Live, error) {
	e, err := channel.Initiate(ctx, lane, c)
	if err != nil {
		return nil, err
	}
	return start(e, c, true, "", stream.Limits{}, accept, nil), nil
}

// Peer is who is at the other end, live.
func (l *Live) Peer() *identity.Peer { return l.End.Peer() }

// Away is closed when the other end says that it is going away.
func (l *Live) Away() <-chan struct{} { return l.away }

// Leaving is closed when the other end, or whoever carries the lane to it, says that
// it is going away: what comes by this channel should come by another soon.
func (l *Live) Leaving() <-chan struct{} { return l.left }

// Done is closed when the channel has ended and all its streams are reset.
func (l *Live) Done() <-chan struct{} { return l.done }

// Err is why the channel ended; nil before.
func (l *Live) Err() error {
	select {
	case <-l.done:
		return l.err
	default:
		return nil
	}
}

// Close ends the channel: in good order when reason is nil, else at once and
// with the reason told to the other end. It returns when the lane reader is done.
func (l *Live) Close(reason error) {
	if reason == nil {
		l.End.Close()
	} else {
		code := channel.CloseInternal
		if r := (*channel.Refused)(nil); errors.As(reason, &r) {
			code = channel.CloseRefused
		}
		l.End.Abort(code, reason)
	}
	<-l.done
}
