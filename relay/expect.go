package relay

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/stream"
)

// showTime is how long an id is good for: its owner has it already and only has to
// dial.
const showTime = 10 * time.Second

// expected is a connection that somebody was told to make. One id, one use.
type expected struct {
	server *Server
	kind   channel.Kind
	known  bool // by a member, or by an authority that has registered
	id     laneID
	conn   chan net.Conn // takes one
	hops   int           // relays that have passed that one on; set before
}

func (s *Server) expect(kind channel.Kind, known bool) *expected {
	e := &expected{server: s, kind: kind, known: known, id: newID(), conn: make(chan net.Conn, 1)}
	s.mu.Lock()
	s.expected[e.id] = e
	s.mu.Unlock()
	return e
}

var (
	errNotShown = errors.New("nobody came with the lane's id in time")
	errAsker    = errors.New("the control channel that asked for the lane is gone")
)

// wait returns the connection that shows the id, and gives up after d, when ctx
// ends or when void is closed. The id is worth nothing afterwards.
func (e *expected) wait(ctx context.Context, d time.Duration, void <-chan struct{}) (net.Conn, error) {
	t := time.NewTimer(d)
	defer t.Stop()
	err := errNotShown
	select {
	case c := <-e.conn:
		return c, nil
	case <-t.C:
	case <-void:
		err = errAsker
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	e.forget()
	return nil, err
}

// forget makes the id worthless; whoever showed it just now is cut off.
func (e *expected) forget() {
	e.server.mu.Lock()
	_, there := e.server.expected[e.id]
	delete(e.server.expected, e.id)
	e.server.mu.Unlock()
	if !there {
		select {
		case c := <-e.conn:
			stream.Abort(c)
		default:
		}
	}
}

// show takes a connection that begins with an id, and says whether somebody known was to make
// it. One that nobody expects is cut off without a word: an id cannot be guessed, and need not
// be explained.
func (s *Server) show(_ context.Context, p channel.Preface, hops int, c net.Conn) (known bool) {
	stream.Arm(c)
	s.mu.Lock()
	e := s.expected[p.ID]
	wanted := e != nil && e.kind == p.Kind
	if wanted {
		known = e.known
		delete(s.expected, p.ID)
		e.hops = hops
		e.conn <- c // has room for the one
	}
	s.mu.Unlock()
	if !wanted {
		stream.Abort(c)
		s.log.Debug("a connection showed an id that is not expected", "from", c.RemoteAddr())
	}
	return known
}
