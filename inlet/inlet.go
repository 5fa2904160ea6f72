// Package inlet is a listening socket whose connections come out elsewhere: at
// the outlet that serves a name.
package inlet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/lease"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/routing"
)

// Path is one way to the outlet; State is what a person is told.
type (
	Path      = link.Path
	State     = link.State
	StateKind = link.StateKind
)

// Kind says how a refusal can be told to a local client. Bytes that are
// forwarded are the same for every kind.
type Kind int

// The kinds. Raw clients get a reset.
const (
	Raw Kind = iota
	PG
	HTTP
)

// ParseKind reads "raw", "pg" or "http".
func ParseKind(s string) (Kind, error) {
	for i, name := range [...]string{"raw", "pg", "http"} {
		if s == name {
			return Kind(i), nil
		}
	}
	return 0, fmt.Errorf("there is no kind %q: it is raw, pg or http", s)
}

const (
	// defaultHold is how long a connection waits for an outlet before it is reset.
	defaultHold = 5 * time.Second
	// DefaultStreams bounds the connections of one inlet. Each costs one descriptor
	// here and one at the outlet; idle, some 8 KiB.
	DefaultStreams = 10000
	// answerTime is how long a client whose refusal can be told waits for the
	// outlet's answer: its dial has 10 s.
	answerTime = 15 * time.Second
)

// Server is one inlet. Its fields must not change once Run is called.
type Server struct {
	Node  *routing.Node
	Name  string // the outlet's
	Paths []Path
	Self  *identity.Self
	Trust *identity.Trust
	// Fresh renews the credential when that is due, before each dial; nil does
	// nothing.
	Fresh func(context.Context) error
	// Pin is the only identity taken as the outlet, besides its credential's
	// serve; zero takes any that may serve the name.
	Pin identity.ID
	// Require narrows who may serve the name; nil leaves it at the credential.
	// See SetRequire.
	Require *abac.Policy

	Kind       Kind
	Hosts      []string       // of HTTP: names in requests, besides those of this host
	Hold       time.Duration  // for connections that come too early; default 5 s
	MaxStreams int            // at once; default 10,000
	Budget     *stream.Budget // for what local clients do not read; nil: one of its own
	Now        func() time.Time
	Logger     *slog.Logger // nil: discard
	OnState    func(State)  // each change, one at a time; must not wait

	once    sync.Once
	log     *slog.Logger
	keeper  link.Keeper
	book    demand
	require atomic.Pointer[abac.Policy]
	slots   chan struct{}
	taking  context.Context // until Drain
	drained context.CancelFunc

	mu        sync.Mutex
	over      sync.Cond // L is mu: accepting and streams became 0
	draining  bool
	accepting int // listeners; each may have one connection in hand that is not counted yet
	streams   int // local connections
	waiting   int // of them without a stream yet
	serving   map[*listening]struct{}
}

// listening is one call of Serve.
type listening struct {
	ln     net.Listener
	cancel context.CancelFunc // resets its connections
}

func (s *Server) init() {
	s.once.Do(func() {
		s.log = s.Logger
		if s.log == nil {
			s.log = slog.New(slog.DiscardHandler)
		}
		if s.Hold <= 0 {
			s.Hold = defaultHold
		}
		if s.MaxStreams <= 0 {
			s.MaxStreams = DefaultStreams
		}
		if s.Budget == nil {
			s.Budget = new(stream.Budget)
		}
		s.slots = make(chan struct{}, s.MaxStreams)
		s.serving = make(map[*listening]struct{})
		s.over.L = &s.mu
		s.taking, s.drained = context.WithCancel(context.Background())
		s.book.server = s
		s.require.Store(s.Require)
		s.keeper = link.Keeper{
			Paths: s.Paths,
			Config: channel.Config{
				Node: s.Node, Self: s.Self, Trust: s.Trust, Kind: channel.Service,
				Pin: s.Pin, Judge: s.judge, Now: s.Now, Logger: s.log,
			},
			Limits:  stream.Limits{Budget: s.Budget},
			Fresh:   s.Fresh,
			Check:   s.check,
			OnState: s.OnState,
			Logger:  s.log,
		}
	})
}

// Run keeps the channel to the outlet until ctx ends, then closes it, which
// resets the streams that are left, and returns when all is gone.
func (s *Server) Run(ctx context.Context) error {
	s.init()
	defer s.book.all.Wait()
	return s.keeper.Run(ctx)
}

// State is what the inlet is doing.
func (s *Server) State() State {
	s.init()
	return s.keeper.State()
}

// SetRequire replaces Require. The outlet of every open channel is judged again
// at once, and one that was refused is asked again.
func (s *Server) SetRequire(p *abac.Policy) {
	s.init()
	s.require.Store(p)
	s.book.again()
	s.keeper.Kick()
}

// judge is the inlet's demand on its outlet, asked before our own credential
// is shown: it may serve the name, and meets Require.
func (s *Server) judge(p *identity.Peer) error {
	c := p.Credential()
	if c == nil {
		return errors.New("it shows no credential")
	}
	if !c.MayServe(s.Name) {
		return fmt.Errorf("its credential does not let it serve %s", s.Name)
	}
	require := s.require.Load()
	if require == nil {
		return nil
	}
	d := require.Decide(abac.Request{
		Principal: lease.Principal(p), PrincipalID: p.ID().String(), Action: "serve",
		Resource: map[string]any{"name": s.Name}, ResourceID: s.Name,
	})
	if !d.Allow {
		return fmt.Errorf("it does not meet --require: %s", d.Reason())
	}
	return nil
}

// check asks the outlet whether it would admit us; nothing is dialled.
func (s *Server) check(ctx context.Context, l *link.Live) error {
	s.book.hold(l)
	return ask(ctx, l, stream.Probe, s.Name)
}

func ask(ctx context.Context, l *link.Live, kind stream.HeaderKind, name string) error {
	c, err := l.Mux.Open(stream.Header{Kind: kind, Name: name})
	if err != nil {
		return err
	}
	if err := c.Wait(ctx); err != nil {
		c.Reset(stream.CodeLocal, "")
		return err
	}
	return c.Close()
}

// Probe is what a ping found.
type Probe struct {
	Path      string
	Peer      *identity.Peer
	Handshake time.Duration // of the channel, on its lane
	RTT       time.Duration // of the channel
	Answer    time.Duration // of the outlet's decision
	Target    time.Duration // of its dial; 0 when it was not asked for
}

// Probe asks the outlet for its decision, and to dial its target too.
func (s *Server) Probe(ctx context.Context, target bool) (Probe, error) {
	s.init()
	l, err := s.keeper.Get(ctx)
	if err != nil {
		return Probe{}, err
	}
	p := Probe{Path: l.Path, Peer: l.Peer(), Handshake: l.Took}
	if p.RTT, err = l.End.Measure(ctx); err != nil {
		return p, err
	}
	begin := time.Now()
	if err := ask(ctx, l, stream.Probe, s.Name); err != nil {
		return p, err
	}
	p.Answer = time.Since(begin)
	if target {
		begin := time.Now()
		if err := ask(ctx, l, stream.PingTarget, s.Name); err != nil {
			return p, err
		}
		p.Target = time.Since(begin)
	}
	return p, nil
}

// Dial opens a stream for a Go program. The connection has CloseWrite, and its
// Read gives io.EOF only after the outlet's authenticated end.
func (s *Server) Dial(ctx context.Context) (net.Conn, error) {
	c, err := s.Open(ctx)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Conn is a stream from here to the outlet.
type Conn struct {
	*stream.Conn
	live *link.Live
	name string
}

// Arrived returns nil once the outlet has everything that was written, and the end:
// for whoever wants to know it and gets no answer to it from the target. Both
// directions must have ended.
func (c *Conn) Arrived(ctx context.Context) error {
	// What the lane brings is in order: whoever answers a question behind it has it, or has
	// said before that it gave the stream up.
	err := ask(ctx, c.live, stream.Probe, c.name)
	var told *stream.RefusedError
	switch {
	case err == nil:
		return c.Dropped()
	case errors.As(err, &told) && !told.Local && (told.Code == stream.CodeAway || told.Code == stream.CodeBusy):
		return c.Dropped()
	case told != nil: // a decision that has ended reset the stream too, perhaps before that
		return err
	}
	// A channel that is going away takes no question, and ends with its streams. The
	// outlet's close is behind the resets of what it had not read.
	select {
	case <-c.live.Done():
	case <-ctx.Done():
		return ctx.Err()
	}
	if c.live.End.Agreed() {
		return c.Dropped()
	}
	return c.live.Err()
}

// Open is Dial for whoever needs more than a net.Conn.
func (s *Server) Open(ctx context.Context) (*Conn, error) {
	s.init()
	s.mu.Lock()
	draining := s.draining
	s.mu.Unlock()
	if draining {
		return nil, fmt.Errorf("dialling %s: the inlet is shutting down", s.Name)
	}
	c, l, err := s.open(ctx)
	if err != nil {
		return nil, fmt.Errorf("dialling %s: %w", s.Name, err)
	}
	if err := c.Wait(ctx); err != nil {
		c.Reset(stream.CodeLocal, "")
		return nil, fmt.Errorf("dialling %s: %w", s.Name, err)
	}
	return &Conn{c, l, s.Name}, nil
}

// open opens a stream on the live channel; one that is going away is asked
// only once.
func (s *Server) open(ctx context.Context) (*stream.Conn, *link.Live, error) {
	for {
		l, err := s.keeper.Get(ctx)
		if err != nil {
			return nil, nil, err
		}
		c, err := l.Mux.Open(stream.Header{Kind: stream.Bytes, Name: s.Name})
		if err == nil {
			return c, l, nil
		}
		// A closed one was given up by this end; see demand.
		if !errors.Is(err, stream.ErrAway) && !errors.Is(err, net.ErrClosed) && !isReset(err) && l.Err() == nil && s.keeper.Live() == l {
			return nil, nil, err
		}
		// It is on its way out, and the Keeper knows or is about to.
		if err := s.keeper.Wait(ctx, l); err != nil {
			if why := s.keeper.State().Err; why != nil {
				err = fmt.Errorf("no channel in time: %w", why)
			}
			return nil, nil, err
		}
	}
}

func isReset(err error) bool {
	var r *stream.ResetError
	return errors.As(err, &r)
}

// Serve accepts connections from ln until Drain is called, and returns when they
// are over, or until ctx ends, which resets them. It owns ln. Several listeners
// may be served at once, and Run must be running.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	s.init()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	me := &listening{ln, cancel}
	s.mu.Lock()
	draining := s.draining
	s.serving[me] = struct{}{}
	s.accepting++
	s.mu.Unlock()
	if draining {
		ln.Close()
	}
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	var all sync.WaitGroup
	failed := link.Accept(ctx, ln, s.log, func(c net.Conn) {
		stream.Arm(c)
		// One connection waits here for its place, which any listener may free;
		// those behind it wait in the kernel's backlog, where they cost nothing.
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			stream.Abort(c)
			return
		}
		s.count(1, 1)
		all.Go(func() {
			s.serve(ctx, c)
			s.count(-1, 0)
			<-s.slots
		})
	})
	ln.Close()
	s.mu.Lock()
	s.accepting--
	s.over.Broadcast()
	s.mu.Unlock()
	all.Wait()
	s.mu.Lock()
	delete(s.serving, me)
	s.mu.Unlock()
	return failed
}

// count keeps the numbers of local connections and of those without a stream.
func (s *Server) count(streams, waiting int) {
	s.mu.Lock()
	s.streams += streams
	s.waiting += waiting
	if s.streams == 0 {
		s.over.Broadcast()
	}
	s.mu.Unlock()
}

// serve takes one local connection to its end, or resets it when ctx ends.
func (s *Server) serve(ctx context.Context, c net.Conn) {
	var g *guard
	var first []byte // what an HTTP client has sent, with a whole head
	if s.Kind == HTTP {
		var err error
		g = newGuard(s.Hosts)
		if first, err = s.greet(ctx, c, g); err != nil {
			s.count(0, -1)
			s.turnAway(ctx, c, err)
			return
		}
	}
	held, cancel := context.WithTimeout(ctx, s.Hold)
	st, _, err := s.open(held)
	cancel()
	s.count(0, -1)
	if err != nil {
		s.log.Warn("a connection is refused", "name", s.Name, "reason", err)
		s.refuse(ctx, c, err)
		return
	}
	stop := context.AfterFunc(ctx, func() { st.Reset(stream.CodeAway, "the inlet is shutting down") })
	defer stop()
	if s.Kind != Raw {
		// Whoever can be told is told before the first byte of an answer.
		limited, cancel := context.WithTimeout(ctx, answerTime)
		err := st.Wait(limited)
		cancel()
		if err != nil {
			st.Reset(stream.CodeLocal, "")
			s.log.Warn("a connection is refused", "name", s.Name, "stream", st.ID(), "reason", err)
			s.refuse(ctx, c, err)
			return
		}
	}
	if len(first) > 0 {
		st.Write(first) // Join knows why it failed
	}
	var check func([]byte) error
	if g != nil {
		check = g.check
	}
	if err := st.JoinChecked(c, check); err != nil {
		s.log.Info("a connection was reset", "name", s.Name, "stream", st.ID(), "reason", err)
	}
}

// Streams is the number of local connections.
func (s *Server) Streams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.streams
}

// Drain closes the listeners, waits for the streams until ctx ends, and resets
// those that are left; it returns their number, connections that still wait for
// the outlet included. The end of Run's context does the rest.
func (s *Server) Drain(ctx context.Context) (left int) {
	s.init()
	s.drained()
	s.mu.Lock()
	s.draining = true
	for l := range s.serving {
		l.ln.Close()
	}
	s.mu.Unlock()
	idle := make(chan struct{})
	go func() {
		s.mu.Lock()
		for s.accepting+s.streams > 0 {
			s.over.Wait()
		}
		s.mu.Unlock()
		for _, l := range s.keeper.All() { // what Dial opened
			l.Mux.WaitIdle()
		}
		close(idle)
	}()
	select {
	case <-idle:
	case <-ctx.Done():
		for _, l := range s.keeper.All() {
			left += l.Mux.Streams()
		}
		s.mu.Lock()
		left += s.waiting
		for l := range s.serving {
			l.cancel()
		}
		s.mu.Unlock()
		for _, l := range s.keeper.All() {
			l.Mux.ResetAll(stream.CodeAway, "the inlet is shutting down")
		}
		<-idle
	}
	return left
}
