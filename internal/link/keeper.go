package link

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/stream"
)

const (
	// Back-off between dials, each ± 50 %: quick while an outage is young, so
	// that a restart is hardly noticed; gentle later, so that a thousand inlets
	// do not stampede. Who waits some 300 ms is back within a second of a
	// relay's start, its start and both ends' handshakes included.
	firstWait   = 50 * time.Millisecond
	youngWait   = 300 * time.Millisecond
	longestWait = 30 * time.Second
	young       = time.Minute
	// A channel that ended sooner is as good as a dial that failed: whoever takes
	// us in only to hang up is not dialled in a loop.
	steady = 10 * time.Second

	dialTime    = 10 * time.Second // one path's connection
	headStart   = time.Second      // of a path before the next; a host that is gone says nothing for all of dialTime
	checkTime   = 10 * time.Second
	refusedWait = 30 * time.Second // a refusal is tried again as seldom, or on a new credential

	successorWait = 3 * time.Second // between dials of a successor while the old channel works
)

// Path is one way to the other end.
type Path struct {
	Name string // as people read it: "direct 127.0.0.1:4100"
	Dial func(context.Context) (net.Conn, error)
	// Watch has f told, until stop is called, when the way may lead somewhere again.
	// nil: nobody knows that before it is tried.
	Watch func(f func()) (stop func())
}

// StateKind is what a Keeper is doing.
type StateKind int

// The states. Waiting and Refused try again by themselves.
const (
	Waiting StateKind = iota
	Ready
	Refused
	Draining
)

func (k StateKind) String() string {
	return [...]string{"waiting", "ready", "refused", "draining"}[k]
}

// State is what a person is told about a Keeper.
type State struct {
	Kind   StateKind
	Reason string        // why it waits or was refused
	Err    error         // the same, for programs
	Next   time.Duration // until the next try
	Path   string        // ready: the way
	Peer   *identity.Peer
}

// Keeper keeps one channel to a service.
type Keeper struct {
	Paths  []Path
	Config channel.Config
	Limits stream.Limits

	// Fresh renews the credential before a dial when that is due; a failure does
	// not stop the dial. Nil does nothing.
	Fresh func(context.Context) error
	// Check asks the other end whether it serves us; nil is Ready as soon as the
	// channel is confirmed. A *stream.RefusedError makes the state Refused, with
	// the channel kept.
	Check func(context.Context, *Live) error
	// Accept takes streams that the other end opens; nil refuses them.
	Accept func(*Live, *stream.Incoming)
	// OnState is told each change, one at a time, also when only the next try is
	// another. It must not wait.
	OnState func(State)
	Logger  *slog.Logger // nil: discard

	mu      sync.Mutex
	live    *Live
	state   State
	changed chan struct{} // closed and replaced with each change
	kick    chan struct{}
	wanted  chan struct{}   // somebody waits in Get
	took    []time.Duration // measured connect time by path; the loop's
	retired map[*Live]struct{}
	old     sync.WaitGroup // the retired channels, whose streams finish, and tries
}

// Run dials, and dials again, until ctx ends; then it closes what is left, which
// resets the streams, and waits for it. It returns nil.
func (k *Keeper) Run(ctx context.Context) error {
	if k.Logger == nil {
		k.Logger = slog.New(slog.DiscardHandler)
	}
	k.mu.Lock()
	if k.kick == nil {
		k.kick = make(chan struct{}, 1)
	}
	k.retired = make(map[*Live]struct{})
	k.wanted = make(chan struct{}, 1)
	k.mu.Unlock()
	k.took = make([]time.Duration, len(k.Paths))
	defer k.Config.Self.OnChange(k.Kick)()
	for _, p := range k.Paths {
		if p.Watch != nil {
			defer p.Watch(k.Kick)()
		}
	}

	wait, since := firstWait, time.Now() // since: when there was last a channel
	brief := firstWait                   // the wait behind the next channel that ends too soon
	var l *Live
	for ctx.Err() == nil {
		var err error
		if l == nil {
			l, err = k.connect(ctx)
		}
		kind := Waiting
		if err == nil {
			begin := time.Now()
			var next *Live
			next, err = k.hold(ctx, l)
			k.finish(ctx, l)
			l, since = next, time.Now()
			if l != nil { // made before the old one was given up
				continue
			}
			if since.Sub(begin) >= steady {
				wait, brief = firstWait, firstWait
				if ctx.Err() == nil {
					k.set(nil, State{Kind: Waiting, Reason: err.Error(), Err: err})
				}
				continue
			}
			most := longestWait
			if k.Check != nil && k.State().Kind == Ready {
				most = youngWait // it did serve us: something on the way cuts it
			}
			wait, brief = brief, min(2*brief, most)
		} else if allRefused(err) {
			kind = Refused
		}
		if over(ctx) {
			break
		}
		pause := jitter(wait)
		if kind == Refused {
			pause = jitter(refusedWait)
		}
		k.set(nil, State{Kind: kind, Reason: err.Error(), Err: err, Next: pause})
		k.pause(ctx, pause)
		limit := longestWait
		if time.Since(since) < young {
			limit = youngWait
		}
		wait = min(2*wait, limit)
	}
	if l != nil {
		k.finish(ctx, l)
	}
	k.set(nil, State{Kind: Draining})
	k.old.Wait()
	return nil
}

// hold keeps l until it ends or ctx does, and says which. One whose keys are used
// up, or whose lane's carrier is going away, it replaces first: next is the
// successor.
func (k *Keeper) hold(ctx context.Context, l *Live) (next *Live, err error) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	watch := k.clock()
	for {
		var again <-chan time.Time
		if after := k.check(ctx, l); after > 0 {
			again = time.After(after)
		}
		leaving := l.leaving
		var retry <-chan time.Time // of the successor that is owed
		var owed error
	wait:
		for {
			replace := error(nil)
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-l.Done():
				return nil, l.Err()
			case <-l.Away():
				return nil, stream.ErrAway
			case <-leaving:
				l.leave()
				leaving, replace = nil, errLeaving
			case <-retry:
				replace = owed
			case <-tick.C:
				if watch.slept() {
					l.End.Doubt(doubtTime)
				}
				if retry == nil && l.End.Aged() {
					replace = errAged
				}
			case <-k.kick:
				break wait
			case <-again:
				break wait
			}
			if replace == nil {
				continue
			}
			next, err := k.connect(ctx)
			switch {
			case err == nil:
				return next, replace
			case replace == errLeaving && l.Mux.Streams() == 0:
				return nil, replace // nobody is on it: let the carrier go
			}
			owed, retry = replace, time.After(jitter(successorWait))
		}
	}
}

var (
	errAged    = errors.New("the channel's keys are used up, a successor is dialled")
	errLeaving = errors.New("the way is going away, another is dialled")
)

const (
	// A machine that slept has a wall clock that ran on and a monotonic one that
	// stood still (Linux: CLOCK_MONOTONIC). Anything a clock is slewed by is less.
	sleptFor  = 10 * time.Second
	doubtTime = 2 * time.Second // for a sign of life after that
)

// clockWatch notices that the machine slept.
type clockWatch struct {
	now  func() time.Time // the wall clock
	wall time.Time
	mono time.Time
}

func (k *Keeper) clock() *clockWatch {
	w := &clockWatch{now: k.Config.Now}
	if w.now == nil {
		w.now = time.Now
	}
	w.slept()
	return w
}

// slept reports whether the machine did since it was last asked.
func (w *clockWatch) slept() bool {
	wall, mono := w.now().Round(0), time.Now()
	d := wall.Sub(w.wall) - mono.Sub(w.mono)
	w.wall, w.mono = wall, mono
	return d >= sleptFor
}

// finish lets the streams of a channel that is no longer live come to their
// end, with ctx at the latest, and closes it.
func (k *Keeper) finish(ctx context.Context, l *Live) {
	k.mu.Lock()
	if k.live == l {
		k.live = nil
	}
	k.retired[l] = struct{}{}
	k.mu.Unlock()
	l.Mux.Away() // whoever got it before opens no stream behind our back
	k.old.Go(func() {
		idle := make(chan struct{})
		go func() { l.Mux.WaitIdle(); close(idle) }()
		select {
		case <-idle:
		case <-ctx.Done():
		}
		l.Close(nil)
		// What was over on the wire may not have been delivered yet.
		l.Mux.ResetAll(stream.CodeAway, "")
		<-idle
		k.mu.Lock()
		delete(k.retired, l)
		k.mu.Unlock()
	})
}

// check asks the other end and sets the state; it returns when to ask again,
// 0 for never.
func (k *Keeper) check(ctx context.Context, l *Live) time.Duration {
	if k.Check != nil {
		limited, cancel := context.WithTimeout(ctx, checkTime)
		err := k.Check(limited, l)
		cancel()
		if err != nil {
			if l.Err() != nil || over(ctx) {
				return 0
			}
			next := jitter(refusedWait)
			kind := Refused
			if !refusal(err) {
				kind, next = Waiting, jitter(2*time.Second)
			}
			k.set(l, State{Kind: kind, Reason: err.Error(), Err: err, Next: next, Path: l.Path, Peer: l.Peer()})
			return next
		}
	}
	k.set(l, State{Kind: Ready, Path: l.Path, Peer: l.Peer()})
	return 0
}

// pathError is why a path did not lead to a channel. Those of several paths are
// one chain.
type pathError struct {
	path string
	err  error
	next *pathError
}

func (e *pathError) Error() string {
	s := e.path + ": " + e.err.Error()
	if e.next != nil {
		s += "; " + e.next.Error()
	}
	return s
}

func (e *pathError) Unwrap() []error {
	if e.next == nil {
		return []error{e.err}
	}
	return []error{e.err, e.next}
}

// allRefused reports whether we are refused by every path: one that is only
// down may come back at any time.
func allRefused(err error) bool {
	e, _ := err.(*pathError)
	for ; e != nil; e = e.next {
		if !refusal(e.err) {
			return false
		}
		if e.next == nil {
			return true
		}
	}
	return false
}

func refusal(err error) bool {
	var here *channel.Refused
	var there *channel.Closed
	var refused *stream.RefusedError
	return errors.As(err, &here) ||
		errors.As(err, &there) && there.Code == channel.CloseRefused ||
		errors.As(err, &refused) && refused.Code == stream.CodeRefused
}

// connect tries each path once: those not yet measured, then the fastest first,
// at last those that failed. Each has a head start before the next, which begins
// at once when it has failed; the first channel is the one, and the other tries are
// called off.
func (k *Keeper) connect(ctx context.Context) (*Live, error) {
	if k.Fresh != nil {
		if err := k.Fresh(ctx); err != nil {
			k.Logger.Warn("the credential could not be renewed before dialling", "err", err)
		}
	}
	// What happened until now, the renewal too, is answered by this dial.
	select {
	case <-k.kick:
	default:
	}
	if len(k.Paths) == 0 {
		return nil, errors.New("no way to the other end is configured")
	}
	order := make([]int, len(k.Paths))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(k.took[a], k.took[b]) })
	tries, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan *attempt, len(order))
	under := make(map[int]*attempt) // way, by its number in Paths
	failed := make([]error, len(k.Paths))
	head := time.NewTimer(headStart)
	defer head.Stop()
	begun := 0
	try := func() {
		if begun == len(order) {
			return
		}
		a := &attempt{path: order[begun], begin: time.Now()}
		begun++
		under[a.path] = a
		k.old.Go(func() { k.dial(tries, a); answers <- a })
		head.Reset(headStart)
	}
	for try(); len(under) > 0; {
		select {
		case <-head.C:
			try()
		case a := <-answers:
			delete(under, a.path)
			if a.err != nil && ctx.Err() == nil {
				k.took[a.path] = math.MaxInt64 // behind every path that answered
				failed[a.path] = a.err
				try()
				continue
			}
			if n := len(under); n > 0 {
				k.old.Go(func() { k.callOff(answers, n) })
			}
			if a.err != nil {
				return nil, ctx.Err()
			}
			k.took[a.path] = max(time.Since(a.begin), 1)
			for i, late := range under { // it takes longer than this, at least
				k.took[i] = max(k.took[i], time.Since(late.begin))
			}
			return k.start(a, k.Accept), nil
		}
	}
	var chain *pathError
	for _, i := range slices.Backward(order) {
		chain = &pathError{path: k.Paths[i].Name, err: failed[i], next: chain}
	}
	return nil, chain
}

// callOff waits for n tries whose context has ended, and ends the channels of those that
// came through all the same.
func (k *Keeper) callOff(answers <-chan *attempt, n int) {
	for range n {
		if a := <-answers; a.err == nil {
			l := k.start(a, nil)
			l.Close(nil)
			<-l.Done()
		}
	}
}

// An attempt is one path's, and what came of it.
type attempt struct {
	path    int // in Paths
	begin   time.Time
	config  channel.Config
	leaving <-chan struct{}
	end     *channel.End
	took    time.Duration // the handshake
	err     error
}

func (k *Keeper) dial(ctx context.Context, a *attempt) {
	limited, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	var lane net.Conn
	if lane, a.err = k.Paths[a.path].Dial(limited); a.err != nil {
		return
	}
	a.config = k.Config
	if l, ok := lane.(*channel.Lane); ok {
		a.leaving = l.Leaving
		if a.config.Pin.IsZero() {
			a.config.Pin = l.Peer
		}
	}
	begin := time.Now()
	a.end, a.err = channel.Initiate(limited, lane, &a.config)
	a.took = time.Since(begin)
}

func (k *Keeper) start(a *attempt, accept func(*Live, *stream.Incoming)) *Live {
	return start(a.end, &a.config, true, k.Paths[a.path].Name, k.Limits, accept, func(l *Live) { l.leaving, l.Took = a.leaving, a.took })
}

// Kick makes a waiting Keeper try at once.
func (k *Keeper) Kick() {
	k.mu.Lock()
	if k.kick == nil {
		k.kick = make(chan struct{}, 1)
	}
	c := k.kick
	k.mu.Unlock()
	select {
	case c <- struct{}{}:
	default:
	}
}

// pause waits before the next dial. Somebody who waits in Get makes it short:
// the long pauses are for nobody's sake.
func (k *Keeper) pause(ctx context.Context, d time.Duration) {
	begin := time.Now()
	t := time.NewTimer(d)
	defer t.Stop()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	watch := k.clock()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			return
		case <-k.kick:
			return
		case <-tick.C:
			if watch.slept() {
				return
			}
		case <-k.wanted:
			if soon := jitter(youngWait); soon < d {
				d = soon
				t.Reset(max(d-time.Since(begin), 0))
			}
		}
	}
}

// over reports whether ctx is. A dial or read that was given its deadline may say so before
// ctx does: that is no reason, and must not take the place of the last try's.
func over(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && !time.Now().Before(deadline)
}

func jitter(d time.Duration) time.Duration {
	return d/2 + rand.N(d)
}

func (k *Keeper) set(l *Live, s State) {
	k.mu.Lock()
	same := k.state.Kind == s.Kind && k.state.Reason == s.Reason && k.state.Peer == s.Peer && k.state.Next == s.Next && k.changed != nil
	k.live, k.state = l, s
	if k.changed != nil {
		close(k.changed)
	}
	k.changed = make(chan struct{})
	k.mu.Unlock()
	if !same && k.OnState != nil {
		k.OnState(s)
	}
}

// State is the last state told.
func (k *Keeper) State() State {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.state
}

// Get returns the live channel and waits for one while there is none; who waits
// is dialled for about three times a second at least. A refusal is returned at
// once: waiting would not change it.
func (k *Keeper) Get(ctx context.Context) (*Live, error) { return k.get(ctx, false) }

// Try is Get for whoever has other ways: it also returns when a dial, begun or
// awaited since, has failed.
func (k *Keeper) Try(ctx context.Context) (*Live, error) { return k.get(ctx, true) }

func (k *Keeper) get(ctx context.Context, once bool) (*Live, error) {
	for first := true; ; first = false {
		k.mu.Lock()
		if k.changed == nil {
			k.changed = make(chan struct{})
		}
		l, s, changed, wanted := k.live, k.state, k.changed, k.wanted
		k.mu.Unlock()
		switch {
		case l != nil:
			return l, nil
		case s.Kind == Refused:
			return nil, s.Err
		case s.Kind == Draining:
			return nil, errors.New("this end is going away")
		case once && !first && s.Err != nil:
			return nil, s.Err
		}
		select {
		case wanted <- struct{}{}: // nil before Run: there is no pause yet
		default:
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if s.Err != nil {
				return nil, fmt.Errorf("no channel in time: %w", s.Err)
			}
			return nil, fmt.Errorf("no channel in time: %w", ctx.Err())
		}
	}
}

// Live is the live channel, nil when there is none.
func (k *Keeper) Live() *Live {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.live
}

// All are the live channel and those whose streams finish.
func (k *Keeper) All() []*Live {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := make([]*Live, 0, 1+len(k.retired))
	if k.live != nil {
		all = append(all, k.live)
	}
	for l := range k.retired {
		all = append(all, l)
	}
	return all
}

// Wait returns when old is no longer the live channel.
func (k *Keeper) Wait(ctx context.Context, old *Live) error {
	for {
		k.mu.Lock()
		l, changed := k.live, k.changed
		k.mu.Unlock()
		if l != old || changed == nil {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("no channel in time: %w", ctx.Err())
		}
	}
}
