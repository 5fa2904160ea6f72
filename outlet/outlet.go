// Package outlet admits streams by policy and connects each to a private
// target that its own configuration names.
package outlet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/lease"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/routing"
)

// Limits of an outlet. The zero value has the defaults.
type Limits struct {
	Streams     int           // connections to the target at once; default 90, below PostgreSQL's 100
	Dials       int           // of them being dialled; default 32
	DialTimeout time.Duration // default 10 s
	Link        link.Limits
}

const (
	defaultStreams     = 90
	defaultDials       = 32
	defaultDialTimeout = 10 * time.Second
)

// Server serves one name. Its fields must not change once Serve is called.
type Server struct {
	Node   *routing.Node
	Name   string
	Labels map[string]any // the resource's labels, for policies
	Target Target         // nil: Listen takes the streams
	Self   *identity.Self
	Trust  *identity.Trust
	Allow  *abac.Policy // who may open; nil refuses everybody; see SetAllow
	Limits Limits
	Now    func() time.Time // nil: time.Now
	Logger *slog.Logger     // nil: discard

	once   sync.Once
	log    *slog.Logger
	server link.Server
	book   *lease.Book
	allow  atomic.Pointer[abac.Policy]
	dials  chan struct{}

	streams atomic.Int64
	all     sync.WaitGroup
	stop    context.Context // ends when the last Serve returns
	cancel  context.CancelFunc
	serving atomic.Int32
	accept  atomic.Pointer[Listener]
}

func (s *Server) init() {
	s.once.Do(func() {
		s.log = s.Logger
		if s.log == nil {
			s.log = slog.New(slog.DiscardHandler)
		}
		if s.Limits.Streams <= 0 {
			s.Limits.Streams = defaultStreams
		}
		if s.Limits.Dials <= 0 {
			s.Limits.Dials = defaultDials
		}
		if s.Limits.DialTimeout <= 0 {
			s.Limits.DialTimeout = defaultDialTimeout
		}
		if s.Limits.Link.Stream.Budget == nil {
			s.Limits.Link.Stream.Budget = new(stream.Budget)
		}
		s.dials = make(chan struct{}, s.Limits.Dials)
		s.allow.Store(s.Allow)
		s.book = &lease.Book{Policy: s.allow.Load, Now: s.Now, Logger: s.log}
		s.stop, s.cancel = context.WithCancel(context.Background())
		s.server = link.Server{
			Services: map[channel.Kind]link.Service{channel.Service: {
				Config: channel.Config{
					Node: s.Node, Self: s.Self, Trust: s.Trust, Now: s.Now, Logger: s.log,
					// Whoever shows a credential of a trusted authority may ask; each
					// stream is decided by itself.
					Judge: func(*identity.Peer) error { return nil },
				},
				Accept: s.admit,
			}},
			Limits: s.Limits.Link,
			Logger: s.log,
		}
	})
}

// Serve takes lanes from ln until ctx ends, then resets what is left, and
// returns when every stream and channel is gone. It owns ln. Several listeners
// may be served at once; the last one to return ends the targets being dialled.
func (s *Server) Serve(ctx context.Context, lanes net.Listener) error {
	s.init()
	if s.serving.Add(1) == 1 {
		s.all.Go(func() { s.book.Run(s.stop) })
	}
	err := s.server.Serve(ctx, lanes)
	if s.serving.Add(-1) == 0 {
		s.cancel()
		if l := s.accept.Load(); l != nil {
			l.Close()
		}
		s.all.Wait()
	}
	return err
}

// SetAllow replaces the policy. Every open stream is decided again at once.
func (s *Server) SetAllow(p *abac.Policy) {
	s.init()
	s.allow.Store(p)
	s.book.Again("the policy was replaced")
}

// Streams is the number of streams that have a target or are getting one.
func (s *Server) Streams() int { return int(s.streams.Load()) }

// Drain takes nothing new, waits for the streams until ctx ends, and resets
// those that are left; it returns their number.
func (s *Server) Drain(ctx context.Context) (left int) {
	s.init()
	s.server.Drain()
	idle := make(chan struct{})
	go func() {
		for _, l := range s.server.Lives() {
			l.Mux.WaitIdle()
		}
		close(idle)
	}()
	select {
	case <-idle:
	case <-ctx.Done():
		left = s.Streams()
		for _, l := range s.server.Lives() {
			l.Mux.ResetAll(stream.CodeAway, "the outlet is shutting down")
		}
		<-idle
	}
	return left
}

// admit decides on a stream, on the lane reader's goroutine: it evaluates the
// policy and never waits. Nothing is dialled before the decision.
func (s *Server) admit(l *link.Live, in *stream.Incoming) {
	switch in.Header.Kind {
	case stream.Bytes, stream.Probe, stream.PingTarget:
	default:
		in.Refuse(stream.CodeRefused, "an outlet does not serve this")
		return
	}
	a := &admitted{server: s, live: l, in: in}
	held, decision, err := s.book.Admit(s.Self, l.Peer(), s.request(in.Header.Name), a.end)
	if err != nil || in.Header.Name != s.Name {
		if err == nil {
			held.Release()
		}
		code, reason := refusal(in.Header.Name == s.Name, decision, err)
		s.log.Warn("a stream is refused", "name", in.Header.Name, "stream", in.Stream(), "peer", l.Peer(), "reason", why(decision, err))
		in.Refuse(code, reason)
		return
	}
	a.lease = held
	if in.Header.Kind == stream.Probe {
		c := in.Accept()
		c.Close()
		held.Release()
		return
	}
	if n := s.streams.Add(1); n > int64(s.Limits.Streams) {
		s.streams.Add(-1)
		held.Release()
		in.Refuse(stream.CodeBusy, fmt.Sprintf("the outlet has its %d connections", s.Limits.Streams))
		return
	}
	s.log.Info("a stream is admitted", "stream", in.Stream(), "peer", l.Peer(), "decision", decision.Reason())
	s.all.Go(a.run)
}

// request is what the policy is asked; the book adds the principal.
func (s *Server) request(name string) abac.Request {
	resource := map[string]any{"name": name}
	for k, v := range s.Labels {
		resource[k] = v
	}
	resource["name"] = name
	return abac.Request{Action: "open", Resource: resource, ResourceID: name}
}

// refusal is what the opener is told. That there is no such name and that the
// policy refuses is one answer; a member also learns which policies decided
// and which attributes it lacks, never a value.
func refusal(known bool, d abac.Decision, err error) (stream.Code, string) {
	var expired *lease.Expired
	if errors.As(err, &expired) {
		return stream.CodeExpired, expired.Error()
	}
	if !known || err == nil {
		return stream.CodeRefused, abac.Decision{}.Reason()
	}
	return stream.CodeRefused, d.Reason()
}

func why(d abac.Decision, err error) string {
	if err != nil {
		return err.Error()
	}
	return "there is no such name; " + d.Reason()
}

// admitted is one stream from its admission to its end.
type admitted struct {
	server *Server
	live   *link.Live
	in     *stream.Incoming
	lease  *lease.Lease

	mu     sync.Mutex
	conn   *stream.Conn // once it is accepted
	cancel context.CancelFunc
	ended  error // why the lease ended
}

// end is told by the lease that the stream may not go on.
func (a *admitted) end(err error) {
	a.mu.Lock()
	a.ended = err
	c, cancel := a.conn, a.cancel
	a.mu.Unlock()
	if cancel != nil {
		cancel()
	}
	if c != nil {
		c.Reset(endCode(err), err.Error())
	}
}

func endCode(err error) stream.Code {
	var expired *lease.Expired
	if errors.As(err, &expired) {
		return stream.CodeExpired
	}
	return stream.CodeRevoked
}

// run dials the target and becomes its reader.
func (a *admitted) run() {
	s := a.server
	defer s.streams.Add(-1)
	defer a.lease.Release()
	select {
	case s.dials <- struct{}{}:
	default:
		a.in.Refuse(stream.CodeBusy, fmt.Sprintf("%d connections to the target are being made", s.Limits.Dials))
		return
	}
	if s.Target == nil {
		<-s.dials
		a.offer()
		return
	}
	target, err := a.dial()
	<-s.dials
	if err != nil {
		code, reason := targetCode(err)
		s.log.Warn("the target cannot be reached", "stream", a.in.Stream(), "err", err)
		a.in.Refuse(code, reason)
		return
	}
	stream.Arm(target)
	if a.in.Header.Kind == stream.PingTarget {
		a.in.Accept().Close()
		target.Close()
		return
	}
	if err := a.accept().Join(target); err != nil {
		s.log.Info("a stream was reset", "stream", a.in.Stream(), "peer", a.live.Peer(), "reason", err)
	}
}

// accept answers yes; a lease that ended meanwhile ends the stream.
func (a *admitted) accept() *stream.Conn {
	c := a.in.Accept()
	a.mu.Lock()
	a.conn = c
	ended := a.ended
	a.mu.Unlock()
	if ended != nil {
		c.Reset(endCode(ended), ended.Error())
	}
	return c
}

// offer hands the stream itself to the Go program that listens.
func (a *admitted) offer() {
	s := a.server
	c := a.accept()
	t := time.NewTimer(s.Limits.DialTimeout)
	defer t.Stop()
	l := s.listener()
	select {
	case l.conns <- &Conn{Conn: c, Request: a.request()}:
		<-c.Done()
	case <-l.closed:
		c.Reset(stream.CodeTargetRefused, "")
	case <-c.Done():
	case <-t.C:
		c.Reset(stream.CodeTargetTimeout, "")
	}
}

func (a *admitted) request() *Request {
	return &Request{Name: a.server.Name, Peer: a.live.Peer(), Stream: a.in.Stream()}
}

// dial reaches the target within the limit, and no longer than anybody wants it.
func (a *admitted) dial() (net.Conn, error) {
	s := a.server
	ctx, cancel := context.WithTimeout(s.stop, s.Limits.DialTimeout)
	defer cancel()
	a.mu.Lock()
	a.cancel = cancel
	ended := a.ended
	a.mu.Unlock()
	if ended != nil {
		return nil, ended
	}
	return s.Target(ctx, a.request())
}

func targetCode(err error) (stream.Code, string) {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return stream.CodeTargetRefused, ""
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return stream.CodeTargetTimeout, ""
	}
	return stream.CodeTarget, ""
}

// CheckTarget dials the target once and closes it again.
func (s *Server) CheckTarget(ctx context.Context) error {
	s.init()
	if s.Target == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.Limits.DialTimeout)
	defer cancel()
	c, err := s.Target(ctx, &Request{Name: s.Name})
	if err != nil {
		return err
	}
	return c.Close()
}

// Conn is an admitted stream in a Go program. Its Read gives io.EOF only after
// the peer's authenticated end.
type Conn struct {
	*stream.Conn
	Request *Request
}

// Listener gives admitted streams to a Go program; see Server.Listen.
type Listener struct {
	name    string
	conns   chan net.Conn
	closed  chan struct{}
	closing sync.Once
}

// Listen returns the listener whose connections are the streams that the
// policy admits; Target must be nil. Every call returns the same one.
func (s *Server) Listen() net.Listener {
	s.init()
	return s.listener()
}

func (s *Server) listener() *Listener {
	if l := s.accept.Load(); l != nil {
		return l
	}
	s.accept.CompareAndSwap(nil, &Listener{name: s.Name, conns: make(chan net.Conn), closed: make(chan struct{})})
	return s.accept.Load()
}

// Accept waits for the next admitted stream, a *Conn.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close ends Accept. Streams that were accepted live on.
func (l *Listener) Close() error {
	l.closing.Do(func() { close(l.closed) })
	return nil
}

// Addr is the outlet's name.
func (l *Listener) Addr() net.Addr { return nameAddr(l.name) }

type nameAddr string

func (nameAddr) Network() string  { return "portal" }
func (a nameAddr) String() string { return string(a) }
