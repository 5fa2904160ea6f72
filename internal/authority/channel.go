package authority

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
)

// anyone is who may ask an authority: what an identity may have is in the store, or in its ticket.
func anyone(*identity.Peer) error { return nil }

// idleTime is how long somebody may stay who asks nothing: a client opens a channel for one question.
const idleTime = 30 * time.Second

// Service is what a link.Server serves on channels of kind authority.
func (s *Server) Service() link.Service {
	return link.Service{
		Config: channel.Config{
			Node: s.Node, Self: s.Self, Trust: identity.NewTrust(s.Self.ID()),
			Kind: channel.Authority, Judge: anyone, Proofless: true,
			Now: s.Now, Logger: s.Logger,
		},
		Accept: s.accept,
		Idle:   idleTime,
	}
}

// accept takes one question, on a goroutine that Close waits for.
func (s *Server) accept(l *link.Live, in *stream.Incoming) {
	h, who := in.Header, l.Peer()
	if h.Kind != stream.Request || len(h.Body) != 0 || h.Name != nameEnroll && h.Name != nameRenew {
		in.Refuse(stream.CodeRefused, "an authority does not answer that")
		return
	}
	a := &asked{by: s.asker(h.Name, who)}
	var conn *stream.Conn
	if !s.questions.enter(a, func() { conn = in.Accept(); a.conn = conn }) {
		in.Refuse(stream.CodeBusy, "the authority has too many questions of this identity to answer; ask again")
		return
	}
	go func() {
		defer s.questions.leave(a)
		late := time.AfterFunc(questionTime, func() { conn.Reset(stream.CodeProtocol, "the question or its answer took too long") })
		defer late.Stop()
		err := serve(conn, func(question []byte) (*answer, error) {
			if err := s.questions.begin(a, conn.Done()); err != nil {
				return nil, err
			}
			defer s.questions.end(a) // before the answer is written, which waits for the asker
			return s.answer(h.Name, question, who, l.End.Binding()), nil
		})
		if err != nil {
			s.logger().Debug("a question came to nothing", "member", who.ID(), "question", h.Name, "error", err)
			conn.Reset(stream.CodeProtocol, "the question did not come through")
			return
		}
		conn.Close()
	}()
}

// overChannel opens a channel to the authority by w, for one question.
func (c *Client) overChannel(ctx context.Context, w identity.Way, authority identity.ID, name string, ask func(halfCloser, [32]byte) error) error {
	lane, err := c.dial(ctx, w)
	if err != nil {
		return err
	}
	// Whatever waits for the other end waits no longer than ctx.
	defer context.AfterFunc(ctx, func() { lane.Close() })()
	live, err := link.Dial(ctx, lane, &channel.Config{
		Node: c.Node, Self: c.Self, Trust: c.Trust,
		Kind: channel.Authority, Pin: authority, Judge: anyone, Proofless: true,
		Now: c.Now, Logger: c.Logger,
	}, nil)
	if err != nil {
		return err
	}
	defer live.Close(nil)
	conn, err := live.Mux.Open(stream.Header{Kind: stream.Request, Name: name})
	if err == nil {
		err = ask(conn, live.End.Binding())
		conn.Close()
	}
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%w (%w)", ctx.Err(), err)
	}
	return err
}

func (c *Client) dial(ctx context.Context, w identity.Way) (net.Conn, error) {
	switch {
	case c.Dial != nil:
		return c.Dial(ctx, w)
	case !w.ID.IsZero():
		return nil, errors.New("this way leads through a relay")
	}
	return new(net.Dialer).DialContext(ctx, "tcp", w.Addr)
}
