package relay

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
)

const (
	// A registration that ended is made again after this, doubled to the longest,
	// ± 50 %; a refusal seldom, or on a new credential.
	registerWait        = 50 * time.Millisecond
	longestRegisterWait = 5 * time.Second
	refusedWait         = 30 * time.Second
	steadyFor           = 5 * time.Second // a hold that was shorter is as good as none
	// dialBacks bounds the lanes that are being opened at once.
	dialBacks = 64
)

// Listener is a name at a relay. Its connections are lanes, each a *channel.Lane
// whose other end begins a channel. It registers again by itself for as long as the
// client's Run runs.
type Listener struct {
	// OnState is told each change: Ready when the relay holds the name, Waiting or
	// Refused with why it does not. It must not wait. Set it before Run.
	OnState func(link.State)

	client  *Client
	name    string
	lanes   chan net.Conn
	closed  chan struct{}
	close   sync.Once
	telling sync.Mutex
	slots   chan struct{}
}

// Listen registers a name. An authority registers "authority".
func (c *Client) Listen(name string, onState func(link.State)) *Listener {
	c.init()
	l := &Listener{
		OnState: onState, client: c, name: name,
		lanes: make(chan net.Conn), closed: make(chan struct{}), slots: make(chan struct{}, dialBacks),
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.listeners[l] = struct{}{}
	if c.ctx != nil {
		ctx := c.ctx
		c.all.Go(func() { l.run(ctx) })
	}
	return l
}

// Accept returns the next lane.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.lanes:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close gives the name back. Lanes live on.
func (l *Listener) Close() error {
	l.close.Do(func() { close(l.closed) })
	l.client.mu.Lock()
	delete(l.client.listeners, l)
	l.client.mu.Unlock()
	return nil
}

// Addr is the name at the relay.
func (l *Listener) Addr() net.Addr { return laneAddr(l.name + " at " + l.client.Addr) }

type laneAddr string

func (laneAddr) Network() string  { return "portal" }
func (a laneAddr) String() string { return string(a) }

// tell tells one state at a time: the control channel's come from another goroutine.
func (l *Listener) tell(s link.State) {
	l.telling.Lock()
	defer l.telling.Unlock()
	if l.OnState != nil {
		l.OnState(s)
	}
}

// run registers, and registers again, until ctx ends or the listener is closed.
func (l *Listener) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var lanes sync.WaitGroup
	defer lanes.Wait()
	go func() { // ends with ctx, which ends with this function
		select {
		case <-l.closed:
			cancel()
		case <-ctx.Done():
		}
	}()
	renewed := make(chan struct{}, 1)
	stop := l.client.Self.OnChange(func() {
		select {
		case renewed <- struct{}{}:
		default:
		}
	})
	defer stop()
	wait := registerWait
	for ctx.Err() == nil {
		live, err := l.client.keeper.Get(ctx)
		if err == nil && isLeaving(live) {
			// It stays until there is another or its streams are over. A name that is
			// registered there would be given back at once, and keep it from that.
			l.client.keeper.Wait(ctx, live)
			continue
		}
		held, begin := false, time.Now()
		if err == nil {
			held, err = l.register(ctx, live, &lanes)
		}
		if ctx.Err() != nil {
			return
		}
		if live != nil && (errors.Is(err, channel.ErrCut) || errors.Is(err, channel.ErrDead)) {
			// The registration went with its channel. The Keeper has said so, and paces
			// what is dialled in its place: a pause here would only come on top.
			l.client.keeper.Wait(ctx, live)
			continue
		}
		if held && time.Since(begin) >= steadyFor {
			wait = registerWait
		}
		state := link.State{Kind: link.Waiting, Reason: err.Error(), Err: err, Next: wait/2 + rand.N(wait)}
		var refused *stream.RefusedError
		var here *channel.Refused
		if errors.As(err, &refused) && refused.Code == stream.CodeRefused || errors.As(err, &here) {
			state.Kind, state.Next = link.Refused, refusedWait/2+rand.N(refusedWait)
		}
		l.tell(state)
		t := time.NewTimer(state.Next)
		select {
		case <-t.C:
		case <-renewed:
		case <-ctx.Done():
		}
		t.Stop()
		wait = min(2*wait, longestRegisterWait)
	}
}

// register holds the name over one control channel and opens the lanes that are
// offered. It returns whether the relay held the name, and why no more.
func (l *Listener) register(ctx context.Context, live *link.Live, lanes *sync.WaitGroup) (held bool, err error) {
	c := l.client
	st, err := live.Mux.Open(stream.Header{
		Kind: stream.Register, Name: l.name, Body: registerBody{c.instance, c.Carrier}.bytes(),
	})
	if err != nil {
		return false, c.failed("registering", l.name, err)
	}
	defer st.Close()
	limited, cancel := context.WithTimeout(ctx, showTime)
	err = st.Wait(limited)
	cancel()
	if err != nil {
		st.Reset(stream.CodeLocal, "")
		return false, c.failed("registering", l.name, l.why(ctx, live, err))
	}
	// The name goes on at the next control channel as soon as this relay leaves.
	over := make(chan struct{})
	defer close(over)
	go func() {
		select {
		case <-over:
		case <-ctx.Done():
			st.Close()
		case <-live.Leaving():
			st.Close()
		}
	}()
	open := func(ctx context.Context, o offer) (net.Conn, error) { return c.show(ctx, live, o) }
	if c.Carrier == Yamux {
		session, err := l.carry(ctx, live, st)
		if err != nil {
			return false, c.failed("carrying", l.name, err)
		}
		open = func(ctx context.Context, o offer) (net.Conn, error) { return carriedLane(ctx, session, live, o) }
		// Lanes outlive the registration and the listener: the relay ends the carrier
		// behind the last, we do when it does not, the end of Run at the latest. A stream
		// that the relay opens itself is nobody's, and would hold a window: with that it
		// ends, too.
		c.all.Go(func() {
			session.AcceptStreamWithContext(c.ctx)
			session.Close()
		})
		defer func() { c.all.Go(func() { outlive(session) }) }()
	}
	l.tell(link.State{Kind: link.Ready, Path: c.Addr, Peer: live.Peer()})
	for {
		o, err := readOffer(st)
		if err == nil && o.kind != offerLane {
			err = errOffer
		}
		if err != nil {
			if why := l.why(ctx, live, err); why != err {
				err = why
			} else if isLeaving(live) {
				err = errLeaving
			}
			return true, c.failed("serving", l.name, err)
		}
		select {
		case l.slots <- struct{}{}:
		case <-ctx.Done():
			return true, ctx.Err()
		}
		lanes.Go(func() {
			defer func() { <-l.slots }()
			l.take(ctx, o, open)
		})
	}
}

// carrierIdle is how long a carrier without a registration has to have been without a lane,
// twice, until it is not left to the relay any more. What its last lane wrote has arrived by then.
var carrierIdle = lingerTime

// outlive ends a carrier whose registration is over once it has no lanes.
func outlive(session *yamux.Session) {
	t := time.NewTicker(carrierIdle)
	defer t.Stop()
	for idle := 0; idle < 2; {
		select {
		case <-session.CloseChan():
			return
		case <-t.C:
		}
		if idle++; session.NumStreams() > 0 {
			idle = 0
		}
	}
	session.Close()
}

var errLeaving = errors.New("it, or the way to it, is going away")

func isLeaving(l *link.Live) bool {
	select {
	case <-l.Leaving():
		return true
	default:
		return false
	}
}

// why is why the channel ended, when that is why its stream did.
func (l *Listener) why(ctx context.Context, live *link.Live, err error) error {
	var reset *stream.ResetError
	if !errors.As(err, &reset) || reset.Code != stream.CodeChannel {
		return err
	}
	select { // streams are reset a moment before
	case <-live.Done():
		return live.Err()
	case <-ctx.Done():
		return err
	}
}

// take opens one lane and hands it to whoever accepts.
func (l *Listener) take(ctx context.Context, o offer, open func(context.Context, offer) (net.Conn, error)) {
	limited, cancel := context.WithTimeout(ctx, showTime)
	defer cancel()
	lane, err := open(limited, o)
	if err != nil {
		l.client.log.Warn("a lane could not be opened", "name", l.name, "relay", l.client.Addr, "err", err)
		return
	}
	select {
	case l.lanes <- lane:
	case <-limited.Done():
		stream.Abort(lane)
	}
}

// carry opens the carrier that the relay invites.
func (l *Listener) carry(ctx context.Context, live *link.Live, st *stream.Conn) (*yamux.Session, error) {
	st.SetReadDeadline(time.Now().Add(showTime))
	o, err := readOffer(st)
	st.SetReadDeadline(time.Time{})
	if err == nil && o.kind != offerCarrier {
		err = errOffer
	}
	if err != nil {
		return nil, err
	}
	limited, cancel := context.WithTimeout(ctx, showTime)
	defer cancel()
	lane, err := l.client.show(limited, live, o)
	if err != nil {
		return nil, err
	}
	session, err := yamux.Client(&wary{Conn: lane.Conn}, carrierConfig(l.client.log, DefaultCarriedWindow))
	if err != nil {
		stream.Abort(lane)
		return nil, fmt.Errorf("beginning the carrier: %w", err)
	}
	return session, nil
}

var errKeeps = fmt.Errorf("the relay keeps %d streams of the carrier", carrierStreams)

// carriedLane opens a lane as a stream of the carrier, unless there are so many that none is offered
// (carrierStreams): what is over here keeps its window for as long as the relay does not end it, too,
// 2 × lingerTime at most. yamux's open has no context and may wait for the relay.
func carriedLane(ctx context.Context, session *yamux.Session, live *link.Live, o offer) (net.Conn, error) {
	type result struct {
		y   *yamux.Stream
		err error
	}
	opened := make(chan result, 1)
	go func() {
		if session.NumStreams() >= carrierStreams { // not on the goroutine of ctx: this may wait, too
			opened <- result{nil, errKeeps}
			return
		}
		y, err := session.OpenStream()
		opened <- result{y, err}
	}()
	select {
	case r := <-opened:
		if r.err != nil {
			return nil, r.err
		}
		return begin(ctx, &carried{Stream: r.y}, live, o)
	case <-ctx.Done():
		go func() { // the open ends with the session at the latest
			if r := <-opened; r.err == nil {
				r.y.Close()
			}
		}()
		return nil, ctx.Err()
	}
}
