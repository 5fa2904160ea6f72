// Package outlet admits streams by policy and connects each to a private
// target that its own configuration names.
package outlet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"strconv"
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
	StreamsEach int           // of them, of one identity, however many channels it has; default all
	Dials       int           // of them being dialled, others wait; default 32
	DialTimeout time.Duration // default 10 s
	Link        link.Limits
}

// The defaults of Limits.
const (
	DefaultStreams     = 90
	DefaultDials       = 32
	defaultDialTimeout = 10 * time.Second
)

// Server serves one name, once: when the last Serve has returned it is over. Its
// fields must not change once Serve is called.
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
	open   func() error // spawns the actor and starts the book, once
	log    *slog.Logger
	actor  *routing.Actor // decides, one stream at a time
	server link.Server
	book   *lease.Book
	allow  atomic.Pointer[abac.Policy]
	dials  chan struct{}

	mu      sync.Mutex
	asked   []*admitted // to be decided
	gone    bool        // nobody decides any more
	over    sync.Cond   // L is mu: streams became 0
	streams int
	each    map[identity.ID]int // streams by whose they are
	all     sync.WaitGroup
	stop    context.Context // resets every stream: the last Serve returns, or Drain gave up
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
			s.Limits.Streams = DefaultStreams
		}
		if s.Limits.StreamsEach <= 0 {
			s.Limits.StreamsEach = s.Limits.Streams
		}
		if s.Limits.Dials <= 0 {
			s.Limits.Dials = DefaultDials
		}
		if s.Limits.DialTimeout <= 0 {
			s.Limits.DialTimeout = defaultDialTimeout
		}
		if s.Limits.Link.Stream.Budget == nil {
			s.Limits.Link.Stream.Budget = new(stream.Budget)
		}
		s.dials = make(chan struct{}, s.Limits.Dials)
		s.over.L = &s.mu
		s.each = make(map[identity.ID]int)
		s.allow.Store(s.Allow)
		s.book = &lease.Book{Policy: s.allow.Load, Now: s.Now, Logger: s.log}
		s.stop, s.cancel = context.WithCancel(context.Background())
		s.open = sync.OnceValue(func() (err error) {
			if s.actor, err = s.Node.Spawn("", desk{s}, &routing.Options{Restart: new(routing.Restart)}); err == nil {
				s.all.Go(func() { s.book.Run(s.stop) })
			}
			return err
		})
		s.server = link.Server{
			Services: map[channel.Kind]link.Service{channel.Service: {
				Config: channel.Config{
					Node: s.Node, Self: s.Self, Trust: s.Trust, Now: s.Now, Logger: s.log,
					// Whoever shows a credential of a trusted authority may ask; each
					// stream is decided by itself.
					Judge: func(*identity.Peer) error { return nil },
				},
				Accept: s.admit,
				Resets: true,
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
	if err := s.open(); err != nil {
		lanes.Close()
		return fmt.Errorf("serving %s: %w", s.Name, err)
	}
	s.serving.Add(1)
	err := s.server.Serve(ctx, lanes)
	if s.serving.Add(-1) == 0 {
		s.cancel()
		if l := s.accept.Load(); l != nil {
			l.Close()
		}
		s.actor.Stop(nil)
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
func (s *Server) Streams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.streams
}

// enter takes a place for a stream of an identity; full says why there is none.
func (s *Server) enter(id identity.ID) (full string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.each[id] >= s.Limits.StreamsEach && s.Limits.StreamsEach < s.Limits.Streams:
		return fmt.Sprintf("this identity has its %d connections of the outlet", s.Limits.StreamsEach)
	case s.streams >= s.Limits.Streams:
		return fmt.Sprintf("the outlet has its %d connections", s.Limits.Streams)
	}
	s.streams++
	s.each[id]++
	return ""
}

func (s *Server) leave(id identity.ID) {
	s.mu.Lock()
	if s.each[id]--; s.each[id] == 0 {
		delete(s.each, id)
	}
	if s.streams--; s.streams == 0 {
		s.over.Broadcast()
	}
	s.mu.Unlock()
}

// Drain takes nothing new, waits for the streams until ctx ends, and resets
// those that are left; it returns their number.
func (s *Server) Drain(ctx context.Context) (left int) {
	s.init()
	s.server.Drain()
	idle := make(chan struct{})
	go func() {
		s.mu.Lock()
		for s.streams > 0 {
			s.over.Wait()
		}
		s.mu.Unlock()
		close(idle)
	}()
	select {
	case <-idle:
	case <-ctx.Done():
		left = s.Streams()
		s.cancel()
		<-idle
	}
	return left
}

// admit gives a stream to the outlet's actor, which decides on it before this
// returns unless it is at another one. The lane reader never waits.
func (s *Server) admit(l *link.Live, in *stream.Incoming) {
	s.mu.Lock()
	gone := s.gone
	if !gone {
		s.asked = append(s.asked, &admitted{server: s, live: l, in: in})
	}
	s.mu.Unlock()
	if gone {
		in.Refuse(stream.CodeAway, "the outlet is shutting down")
		return
	}
	s.actor.Run()
}

// desk is the outlet as an actor: it decides on streams, one at a time, in the
// order in which they were opened. One on which it fails is refused, and it goes
// on with the next.
type desk struct{ *Server }

func (desk) Receive(*routing.Actor, *routing.Message) error { return nil }

func (d desk) Drained(*routing.Actor) error {
	for {
		a := d.next()
		if a == nil {
			return nil
		}
		d.decide(a)
	}
}

func (d desk) next() *admitted {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.asked) == 0 {
		d.asked = nil
		return nil
	}
	a := d.asked[0]
	d.asked[0] = nil
	d.asked = d.asked[1:]
	return a
}

// Stopped refuses what was not decided: nobody is left to do it.
func (d desk) Stopped(error) {
	d.mu.Lock()
	d.gone = true
	d.mu.Unlock()
	for a := d.next(); a != nil; a = d.next() {
		a.in.Refuse(stream.CodeAway, "the outlet is shutting down")
	}
}

// decide sees that a stream is answered, also when what decides on it panics.
func (d desk) decide(a *admitted) {
	decided := false
	defer func() {
		if !decided {
			a.in.Refuse(stream.CodeInternal, "")
		}
	}()
	d.judge(a)
	decided = true
}

// judge evaluates the policy and never waits. Nothing is dialled before it.
func (d desk) judge(a *admitted) {
	s, l, in := d.Server, a.live, a.in
	switch in.Header.Kind {
	case stream.Bytes, stream.Probe, stream.PingTarget:
	default:
		in.Refuse(stream.CodeRefused, "an outlet does not serve this")
		return
	}
	if len(in.Header.Body) != 0 {
		in.Refuse(stream.CodeRefused, "an outlet knows no header with a body")
		return
	}
	// Whatever the name, the policy for ours is asked: to whoever may not open
	// that, every name has the same answer.
	held, decision, err := s.book.Admit(s.Self, l.Peer(), s.request(), a.end)
	if known := in.Header.Name == s.Name; err != nil || !known {
		held.Release()
		code, reason := refusal(decision, err)
		s.log.Warn("a stream is refused", "name", printable(in.Header.Name), "known", known, "stream", in.Stream(), "peer", l.Peer(), "reason", reason)
		in.Refuse(code, reason)
		return
	}
	a.lease = held
	if in.Header.Kind == stream.Probe {
		in.Answer()
		held.Release()
		return
	}
	if full := s.enter(l.Peer().ID()); full != "" {
		held.Release()
		in.Decline(stream.CodeBusy, full)
		return
	}
	s.log.Info("a stream is admitted", "stream", in.Stream(), "peer", l.Peer(), "decision", decision.Reason())
	s.all.Go(a.run)
}

// printable is a name that the peer chose, for the log: not every one is a name.
func printable(name string) string {
	if identity.ValidName(name) != nil {
		return strconv.QuoteToASCII(name)
	}
	return name
}

// request is what the policy is asked; the book adds the principal.
func (s *Server) request() abac.Request {
	resource := make(map[string]any, len(s.Labels)+1)
	maps.Copy(resource, s.Labels)
	resource["name"] = s.Name
	return abac.Request{Action: "open", Resource: resource, ResourceID: s.Name}
}

// refusal is what the opener is told. A member learns which policies decided
// and which attributes it lacks, never a value; err is nil when it may open our
// name and asked for another.
func refusal(d abac.Decision, err error) (stream.Code, string) {
	var expired *lease.Expired
	switch {
	case errors.As(err, &expired):
		return stream.CodeExpired, expired.Error()
	case err == nil:
		return stream.CodeRefused, abac.Decision{}.Reason()
	}
	return stream.CodeRefused, d.Reason()
}

// admitted is one stream from its admission to its end.
type admitted struct {
	server *Server
	live   *link.Live
	in     *stream.Incoming
	lease  *lease.Lease

	mu     sync.Mutex
	conn   *stream.Conn       // once it is accepted
	cancel context.CancelFunc // ends the dial
	ended  error              // why the stream may not go on

	unstop func() bool // it is not told any more that the outlet stops
}

// end is told that the stream may not go on: by the lease, or because the
// outlet stops. The first reason counts.
func (a *admitted) end(err error) {
	a.mu.Lock()
	if a.ended != nil {
		a.mu.Unlock()
		return
	}
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

var errAway = errors.New("the outlet is shutting down")

func endCode(err error) stream.Code {
	var expired *lease.Expired
	switch {
	case errors.As(err, &expired):
		return stream.CodeExpired
	case errors.Is(err, errAway):
		return stream.CodeAway
	}
	return stream.CodeRevoked
}

// run dials the target, and hands the stream on to a reader: a dial makes this
// goroutine's stack twice as large as a reader needs, who is there for as long as the
// stream.
func (a *admitted) run() {
	a.unstop = context.AfterFunc(a.server.stop, func() { a.end(errAway) })
	if a.server.Target == nil {
		a.offer()
	} else if target := a.reach(); target != nil {
		a.server.all.Go(func() {
			a.serve(target)
			a.leave()
		})
		return
	}
	a.leave()
}

// leave gives everything back.
func (a *admitted) leave() {
	a.unstop()
	a.lease.Release()
	a.server.leave(a.live.Peer().ID())
}

// reach gives the target of a stream that wants it, and answers every other.
func (a *admitted) reach() net.Conn {
	s := a.server
	target, err := a.dial()
	a.mu.Lock()
	a.cancel = nil // and what it holds
	ended := a.ended
	a.mu.Unlock()
	if ended != nil {
		if target != nil {
			stream.Abort(target)
		}
		a.in.Refuse(endCode(ended), ended.Error())
		return nil
	}
	switch {
	case err != nil && a.in.Gone():
		s.log.Info("the opener gave up before its target answered", "stream", a.in.Stream(), "peer", a.live.Peer())
		return nil
	case err != nil:
		code, reason := targetCode(err)
		s.log.Warn("the target cannot be reached", "stream", a.in.Stream(), "err", err)
		a.in.Decline(code, reason)
		return nil
	}
	if a.in.Header.Kind == stream.PingTarget {
		a.in.Answer()
		target.Close()
		return nil
	}
	stream.Arm(target)
	return target
}

// serve joins the stream and its target.
func (a *admitted) serve(target net.Conn) {
	if err := a.accept().Join(target); err != nil {
		a.server.log.Info("a stream was reset", "stream", a.in.Stream(), "peer", a.live.Peer(), "reason", err)
	}
}

// accept answers yes; what ended the stream meanwhile resets it.
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
	case l.conns <- &Conn{Conn: c, Request: a.asked()}:
		<-c.Done()
	case <-l.closed:
		c.Reset(stream.CodeTargetRefused, "")
	case <-c.Done():
	case <-t.C:
		c.Reset(stream.CodeTargetTimeout, "")
	}
}

func (a *admitted) asked() *Request {
	return &Request{Name: a.server.Name, Peer: a.live.Peer(), Stream: a.in.Stream()}
}

// errCrowd is a dial whose turn did not come.
type errCrowd int

func (n errCrowd) Error() string {
	return fmt.Sprintf("%d connections to the target are being made", int(n))
}

// dial reaches the target within the limit, and no longer than anybody wants it. When
// as many are being made as may be at once, it waits its turn: those who wait have a
// place already, of which there are few.
func (a *admitted) dial() (net.Conn, error) {
	s := a.server
	ctx, cancel := context.WithTimeout(context.Background(), s.Limits.DialTimeout)
	defer cancel()
	a.mu.Lock()
	a.cancel = cancel
	ended := a.ended
	a.mu.Unlock()
	if ended != nil {
		return nil, ended
	}
	var watch sync.WaitGroup
	defer watch.Wait() // behind cancel: deferred calls run backwards
	defer cancel()
	watch.Go(func() {
		select {
		case <-a.in.Done(): // the opener gave up
			cancel()
		case <-ctx.Done():
		}
	})
	select {
	case s.dials <- struct{}{}:
	case <-ctx.Done():
		return nil, errCrowd(s.Limits.Dials)
	}
	defer func() { <-s.dials }()
	return s.Target(ctx, a.asked())
}

func targetCode(err error) (stream.Code, string) {
	var timeout interface{ Timeout() bool }
	var crowd errCrowd
	switch {
	case errors.As(err, &crowd):
		return stream.CodeBusy, crowd.Error()
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
