package relay

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/lease"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/routing"
)

// Client is a node's end of its relay: one control channel, kept for as long as Run
// runs. Its fields must not change once it is used.
type Client struct {
	ID   identity.ID // the relay's; zero: it must show a credential with `relay`
	Addr string      // where it is dialled; no more than a hint
	// Dial reaches it: nil is TCP, Hop of the relay before it another way. Lanes are
	// dialled as the control channel is.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Watch is OnReady of the relay before it; nil: there is none.
	Watch func(f func()) (stop func())

	Node  *routing.Node
	Self  *identity.Self // an authority may have no credential, and register as itself
	Trust *identity.Trust
	Fresh func(context.Context) error // renews the credential before a dial; nil does nothing

	Carrier Carrier          // of the names that Listen registers
	OnState func(link.State) // of the control channel; must not wait
	Now     func() time.Time // nil: time.Now
	Logger  *slog.Logger     // nil: discard

	once     sync.Once
	log      *slog.Logger
	keeper   link.Keeper
	book     lease.Book // of relays that a credential makes one
	instance [16]byte

	mu        sync.Mutex
	ctx       context.Context // of Run; nil before
	stands    *link.Live      // for which the book has a lease
	listeners map[*Listener]struct{}
	waiting   map[*func()]struct{} // told when there is a control channel
	all       sync.WaitGroup       // what Run waits for
}

func (c *Client) init() {
	c.once.Do(func() {
		c.log = c.Logger
		if c.log == nil {
			c.log = slog.New(slog.DiscardHandler)
		}
		if c.Dial == nil {
			c.Dial = new(net.Dialer).DialContext
		}
		rand.Read(c.instance[:])
		c.listeners, c.waiting = make(map[*Listener]struct{}), make(map[*func()]struct{})
		c.keeper = link.Keeper{
			Paths: []link.Path{{Name: c.Addr, Dial: func(ctx context.Context) (net.Conn, error) {
				return c.Dial(ctx, "tcp", c.Addr)
			}, Watch: c.Watch}},
			Config: channel.Config{
				Node: c.Node, Self: c.Self, Trust: c.Trust, Kind: channel.Relay,
				Pin: c.ID, Judge: c.judge, Proofless: true, Now: c.Now, Logger: c.log,
			},
			Limits:  stream.Limits{Budget: new(stream.Budget)},
			Fresh:   c.Fresh,
			OnState: c.tell,
			Logger:  c.log,
		}
		everybody := everybody("connect")
		c.book = lease.Book{
			Policy: func() *abac.Policy { return everybody },
			Rule:   func(p *identity.Peer, _ *abac.Request) error { return c.judge(p) },
			Now:    c.Now, Logger: c.log,
		}
	})
}

// tell passes on the control channel's states; names are not there without it.
func (c *Client) tell(s link.State) {
	if c.OnState != nil {
		c.OnState(s)
	}
	if s.Kind == link.Ready {
		c.stand(c.keeper.Live())
		c.mu.Lock()
		waiting := slices.Collect(maps.Keys(c.waiting))
		c.mu.Unlock()
		for _, f := range waiting {
			(*f)()
		}
	}
	if s.Kind != link.Waiting && s.Kind != link.Refused {
		return
	}
	c.mu.Lock()
	listeners := slices.Collect(maps.Keys(c.listeners))
	c.mu.Unlock()
	for _, l := range listeners {
		l.tell(s)
	}
}

// stand ends a control channel with a relay that is no longer one by its credential: a
// later one does not say so, or none came in time.
func (c *Client) stand(l *link.Live) {
	c.mu.Lock()
	known := l == nil || c.stands == l
	if !known {
		c.stands = l
	}
	c.mu.Unlock()
	if known || !c.ID.IsZero() {
		return
	}
	over := make(chan error, 1)
	held, _, err := c.book.Admit(nil, l.Peer(), request("connect", ""), func(err error) { over <- err })
	if err != nil {
		over <- err
	}
	c.all.Go(func() {
		defer held.Release()
		select {
		case err := <-over:
			l.Close(&channel.Refused{Err: fmt.Errorf("it may be a relay no longer: %w", err)})
		case <-l.Done():
		}
	})
}

// OnReady has f told, until stop is called, whenever there is a control channel
// again: what needed lanes may try at once. f must not wait.
func (c *Client) OnReady(f func()) (stop func()) {
	c.init()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting[&f] = struct{}{}
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.waiting, &f)
	}
}

var errNoRelay = errors.New("it shows no credential of a relay, and its identifier was not demanded: ID@ADDRESS demands it, and a ticket made with --as-relay gives the credential")

// judge is asked before our own credential is shown: an address alone makes nobody
// a relay.
func (c *Client) judge(p *identity.Peer) error {
	if !c.ID.IsZero() { // the channel has compared it
		return nil
	}
	if cred := p.Credential(); cred == nil || !cred.Relay() {
		return errNoRelay
	}
	return nil
}

// Run keeps the control channel and the registrations until ctx ends, and returns
// when all is gone. Lanes that were handed out live on.
func (c *Client) Run(ctx context.Context) error {
	c.init()
	c.mu.Lock()
	c.ctx = ctx
	for l := range c.listeners {
		c.all.Go(func() { l.run(ctx) })
	}
	c.mu.Unlock()
	if c.ID.IsZero() {
		c.all.Go(func() { c.book.Run(ctx) })
	}
	err := c.keeper.Run(ctx)
	c.all.Wait()
	return err
}

// State is what the control channel is doing.
func (c *Client) State() link.State {
	c.init()
	return c.keeper.State()
}

func (c *Client) failed(what, name string, err error) error {
	return fmt.Errorf("%s %s by relay %s: %w", what, name, c.Addr, err)
}

// Lane asks for a lane to whoever serves the name, or to the one identity that is
// wanted, and opens this end of it. The connection is a *channel.Lane: the channel
// over it begins with the caller.
//
// Errors wrap *stream.RefusedError, with CodeAbsent while nobody serves the name,
// *channel.Refused when the relay is not the one that was asked for, or the error of
// a dial.
func (c *Client) Lane(ctx context.Context, name string, want identity.ID) (net.Conn, error) {
	l, err := c.lane(ctx, stream.Header{Kind: stream.Connect, Name: name, Body: connectBody(want)})
	if err != nil {
		return nil, c.failed("reaching", name, err)
	}
	return l, nil
}

// Hop gives the Dial of a client whose relay is the next one of this name behind
// this client's.
func (c *Client) Hop(next string) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		l, err := c.lane(ctx, stream.Header{Kind: stream.Next, Name: next})
		if err != nil {
			return nil, c.failed("going on to", next, err)
		}
		l.Key, l.Peer = [32]byte{}, l.Key // a lane between relays has no key
		return l, nil
	}
}

func (c *Client) lane(ctx context.Context, h stream.Header) (*channel.Lane, error) {
	c.init()
	l, err := c.keeper.Try(ctx)
	if err != nil {
		return nil, err
	}
	st, err := l.Mux.Open(h)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { st.Reset(stream.CodeLocal, "") })
	defer stop()
	err = st.Wait(ctx)
	var o offer
	if err == nil {
		o, err = readOffer(st)
	}
	if err == nil && o.kind != offerLane {
		err = errOffer
	}
	if err != nil {
		st.Reset(stream.CodeLocal, "")
		return nil, err
	}
	st.Close()
	return c.show(ctx, l, o)
}

// show opens a connection to the relay and shows on it what was offered.
func (c *Client) show(ctx context.Context, l *link.Live, o offer) (*channel.Lane, error) {
	conn, err := c.Dial(ctx, "tcp", c.Addr)
	if err != nil {
		return nil, err
	}
	return begin(ctx, conn, l, o)
}

// begin shows an offer's id on a connection, which is the lane from then on.
func begin(ctx context.Context, conn net.Conn, l *link.Live, o offer) (*channel.Lane, error) {
	if hop, ok := conn.(*channel.Lane); ok {
		conn = hop.Conn // a hop's lane has no key of its own
	}
	stream.Arm(conn)
	if d, ok := ctx.Deadline(); ok {
		conn.SetWriteDeadline(d)
	}
	if _, err := conn.Write(o.preface()); err != nil {
		stream.Abort(conn)
		return nil, err
	}
	conn.SetWriteDeadline(time.Time{})
	return &channel.Lane{Conn: conn, Key: o.key, Leaving: l.Leaving()}, nil
}

// Probe is what is known of the way to a relay.
type Probe struct {
	Peer      *identity.Peer
	Handshake time.Duration // of the control channel
	RTT       time.Duration // of the control channel
}

// Probe measures the control channel.
func (c *Client) Probe(ctx context.Context) (p Probe, err error) {
	c.init()
	l, err := c.keeper.Get(ctx)
	if err == nil {
		p.Peer, p.Handshake = l.Peer(), l.Took
		p.RTT, err = l.End.Measure(ctx)
	}
	if err != nil {
		return p, fmt.Errorf("asking relay %s for a sign of life: %w", c.Addr, err)
	}
	return p, nil
}

// Names asks which names there are that this node may ask for.
func (c *Client) Names(ctx context.Context) ([]string, error) {
	c.init()
	l, err := c.keeper.Get(ctx)
	if err != nil {
		return nil, fmt.Errorf("asking relay %s for names: %w", c.Addr, err)
	}
	st, err := l.Mux.Open(stream.Header{Kind: stream.Names})
	if err == nil {
		stop := context.AfterFunc(ctx, func() { st.Reset(stream.CodeLocal, "") })
		defer stop()
		defer st.Close()
		if err = st.Wait(ctx); err == nil {
			var names []string
			if names, err = readNames(st); err == nil {
				return names, nil
			}
		}
	}
	return nil, fmt.Errorf("asking relay %s for names: %w", c.Addr, err)
}
