// Package relay is the meeting place of nodes that can only dial out: outlets
// register names at it, inlets ask for a lane to a name, and it copies sealed
// bytes from one connection to another without a key to any of them.
//
// The way of a lane: Client.Lane asks on its control channel (client.go) →
// Server.connect decides and answers with an id (connect.go) → the caller shows
// the id on a fresh connection (expect.go) → the outlet is told of another id on
// its own control channel (register.go), and shows that (listener.go), over a
// connection of its own or as a stream of its carrier (carrier.go) → the two are
// joined (join.go). What a relay keeps of a stream is nothing: it does not see
// that there are streams.
package relay

import (
	"context"
	"errors"
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

// Limits of a relay. The zero value has the defaults.
type Limits struct {
	// Lanes joined or about to be; default 8,192: two descriptors each and those of
	// MaxPipes. Whoever has fewer than some 25,000 descriptors sets it lower.
	Lanes int
	// LanesEach is how many of them one identity may have asked for, and how many
	// may lead to one; default 2,048.
	LanesEach int
	// Carried is how many of them may lead into carriers, half of those to one identity:
	// yamux keeps what the caller's side does not take, up to a window in a buffer that doubles.
	// Default 1,024.
	Carried int
	// CarriedWindow is that window, in bytes; default DefaultCarriedWindow, at least
	// LeastCarriedWindow.
	CarriedWindow int
	// Outstanding is how many lanes an identity may have asked for that have not
	// been joined; default 16. Each holds an id, a goroutine and at most one
	// connection, for at most some 20 s.
	Outstanding int
	// Registrations of one identity at once; default 256.
	Registrations int
	Link          link.Limits
}

// foreignShare is the part of all lanes that those may have who show no credential:
// anybody can make identities, and all that they may ask for is an authority, which
// answers in a moment.
const foreignShare = 8

// The defaults of Limits.Lanes, Limits.Carried and Limits.CarriedWindow, and the least that yamux takes
// for the last.
const (
	DefaultLanes         = 8192
	DefaultCarried       = 1024
	DefaultCarriedWindow = 1 << 20
	LeastCarriedWindow   = 256 << 10
)

// MaxPipes is how many pipes a process has at most, of two descriptors each: one for a direction
// of a lane while much goes by, or for as long as its reader stops; without one bytes are copied.
// Together they hold 60 MiB: from 64 on Linux gives one user small ones only (pipe-user-pages-soft).
const MaxPipes = 240

const (
	defaultLanesEach     = 2048
	defaultOutstanding   = 16
	defaultRegistrations = 256
)

// Hop is another relay that this one joins callers to.
type Hop struct {
	Addr string // host:port
	// ID is told to the caller, which then takes no other identity there, besides
	// judging it by its own pin or by its credential; zero: nothing is told.
	ID identity.ID
}

// Server is a relay. Its fields must not change once Serve is called.
type Server struct {
	Node  *routing.Node
	Self  *identity.Self
	Trust *identity.Trust // the authorities whose members meet here

	// AllowServe and AllowConnect narrow who may register a name (built in: whose
	// credential says so) and who may ask for one (built in: every member). Nil
	// leaves it at that.
	AllowServe, AllowConnect *abac.Policy
	Next                     map[string]Hop // by the name that callers use
	AllowNext                *abac.Policy   // who may go on to them; nil refuses everybody

	// Local are authorities of this process: they are reached by connect as others
	// are, and take the lane. They own it, and it is cut after a minute or when ctx ends.
	Local map[identity.ID]func(ctx context.Context, lane net.Conn)

	// Many reports whether an address is another relay's, from which many come.
	Many   func(net.Addr) bool
	Dial   func(ctx context.Context, network, addr string) (net.Conn, error) // to the next hop; nil: net.Dialer
	Limits Limits
	Now    func() time.Time // nil: time.Now
	Logger *slog.Logger     // nil: discard

	once    sync.Once
	log     *slog.Logger
	links   link.Server
	book    lease.Book
	policy  atomic.Pointer[abac.Policy]
	stop    context.Context // the last Serve returns, or Drain gave up
	cancel  context.CancelFunc
	serving atomic.Int32
	all     sync.WaitGroup

	mu       sync.Mutex
	draining bool
	expected map[laneID]*expected
	pools    map[poolKey]*pool
	members  map[memberKey]*member
	controls map[*link.Live]*control
	lanes    int           // asked for and not over
	foreign  int           // of them, those of whoever has shown no credential
	carried  int           // offers and streams of all carriers that may still hold something
	idle     chan struct{} // closed when lanes became 0; nil: nobody waits
}

func (s *Server) init() {
	s.once.Do(func() {
		s.log = s.Logger
		if s.log == nil {
			s.log = slog.New(slog.DiscardHandler)
		}
		for _, l := range []struct {
			n    *int
			more int
		}{
			{&s.Limits.Lanes, DefaultLanes}, {&s.Limits.LanesEach, defaultLanesEach}, {&s.Limits.Carried, DefaultCarried},
			{&s.Limits.CarriedWindow, DefaultCarriedWindow},
			{&s.Limits.Outstanding, defaultOutstanding}, {&s.Limits.Registrations, defaultRegistrations},
		} {
			if *l.n <= 0 {
				*l.n = l.more
			}
		}
		s.Limits.CarriedWindow = min(max(s.Limits.CarriedWindow, LeastCarriedWindow), 1<<30) // what yamux can count
		if s.Limits.Link.Stream.Budget == nil {
			s.Limits.Link.Stream.Budget = new(stream.Budget)
		}
		if s.Dial == nil {
			s.Dial = new(net.Dialer).DialContext
		}
		s.expected = make(map[laneID]*expected)
		s.pools = make(map[poolKey]*pool)
		s.members = make(map[memberKey]*member)
		s.controls = make(map[*link.Live]*control)
		s.setPolicies(s.AllowServe, s.AllowConnect, s.AllowNext)
		s.book = lease.Book{Policy: s.policy.Load, Rule: s.rule, Now: s.Now, Logger: s.log}
		s.stop, s.cancel = context.WithCancel(context.Background())
		s.links = link.Server{
			Services: map[channel.Kind]link.Service{channel.Relay: {
				Config: channel.Config{
					Node: s.Node, Self: s.Self, Trust: s.Trust, Now: s.Now, Logger: s.log,
					// Whoever has no credential may still ask for an authority, to get one.
					Proofless: true,
					Judge:     func(*identity.Peer) error { return nil },
				},
				Accept: s.asked,
				Opened: s.opened,
				Closed: s.closed,
			}},
			Lane:   s.show,
			Limits: s.Limits.Link,
			Many:   s.Many,
			Logger: s.log,
		}
	})
}

// Serve takes connections from ln until ctx ends, then ends what is left, and
// returns when all is gone. It owns ln. Several listeners may be served at once.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	s.init()
	if s.serving.Add(1) == 1 {
		s.all.Go(func() { s.book.Run(s.stop) })
	}
	err := s.links.Serve(ctx, ln)
	if s.serving.Add(-1) == 0 {
		s.cancel()
		s.all.Wait()
		s.forgetAll()
	}
	return err
}

// Drain tells everybody that this relay is going away, takes nothing new, waits
// until no lane is left or ctx ends, and cuts those that are left; it returns
// their number.
func (s *Server) Drain(ctx context.Context) (left int) {
	s.init()
	s.mu.Lock()
	s.draining = true
	idle := s.idle // of another Drain that waits
	if idle == nil {
		idle = make(chan struct{})
		if s.lanes == 0 {
			close(idle)
		} else {
			s.idle = idle
		}
	}
	s.mu.Unlock()
	s.links.Drain()
	select {
	case <-idle:
	case <-ctx.Done():
		left = s.Lanes()
		s.cancel()
		<-idle
	}
	return left
}

// Lanes is the number of lanes that are joined or about to be.
func (s *Server) Lanes() int {
	s.init()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lanes
}

// SetPolicies replaces the policies. Every registration and every lane is decided
// again at once.
func (s *Server) SetPolicies(serve, connect, next *abac.Policy) {
	s.init()
	s.setPolicies(serve, connect, next)
	s.book.Again("the policies were replaced")
}

func (s *Server) setPolicies(serve, connect, next *abac.Policy) {
	if serve == nil {
		serve = everybody("serve")
	}
	if connect == nil {
		connect = everybody("connect")
	}
	s.policy.Store(abac.Join(serve, connect, next))
}

// everybody leaves an action to the rule.
func everybody(action string) *abac.Policy {
	p, err := abac.ShortAny(action, "true")
	if err != nil {
		panic(err)
	}
	return p
}

var errServe = errors.New("its credential does not let it serve this name")

// rule is what no policy can widen.
func (s *Server) rule(p *identity.Peer, r *abac.Request) error {
	c := p.Credential()
	switch {
	case c == nil:
		return errors.New("it shows no credential")
	case r.Action == "serve" && !c.MayServe(r.ResourceID):
		return errServe
	}
	return nil
}

// request asks the policies about a name.
func request(action, name string) abac.Request {
	return abac.Request{Action: action, Resource: map[string]any{"name": name}, ResourceID: name}
}

// asked takes each stream that a member opens on its control channel. It never
// waits: what takes time has a goroutine of its own.
func (s *Server) asked(l *link.Live, in *stream.Incoming) {
	ofNames := in.Header.Kind == stream.Names && in.Header.Name == "" && len(in.Header.Body) == 0
	if identity.ValidName(in.Header.Name) != nil && !ofNames {
		in.Refuse(stream.CodeRefused, "that is no name")
		return
	}
	switch kind := in.Header.Kind; {
	case kind == stream.Register:
		s.register(l, in)
	case kind == stream.Connect:
		s.connect(l, in)
	case kind == stream.Next:
		s.next(l, in)
	case ofNames:
		s.names(l, in)
	default:
		in.Refuse(stream.CodeRefused, "a relay does not serve this")
	}
}

// refusal is what a member is told, as an outlet tells it.
func refusal(err error) (stream.Code, string) {
	var expired *lease.Expired
	if errors.As(err, &expired) {
		return stream.CodeExpired, expired.Error()
	}
	return stream.CodeRefused, err.Error()
}

// endCode is why something that was permitted ended.
func endCode(err error) (stream.Code, string) {
	var expired *lease.Expired
	var denied *lease.Denied
	switch {
	case errors.As(err, &expired):
		return stream.CodeExpired, err.Error()
	case errors.As(err, &denied):
		return stream.CodeRevoked, err.Error()
	}
	return stream.CodeAway, "the relay is shutting down"
}
