package routing

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
)

// A wait is an actor, or a goroutine that is none, in a Send or Call that has not returned.
type wait struct {
	on     *Actor // must take a turn before the wait is over; nil: not known, or on another node
	cancel context.CancelCauseFunc
}

// waits are all waits on a node. Touched only by those that really wait. Its mu is taken before that of an actor.
type waits struct {
	mu sync.Mutex
	by map[*Actor][]*wait // by who waits; nil: no actor
}

// enter takes note that from waits, and returns the context under which to do so, which also ends when from is stopped.
// It fails with ErrCycle when this would close a circle, and with ErrStopped. leave follows in every case.
func (n *Node) enter(ctx context.Context, from *Actor, w *wait) (context.Context, error) {
	ctx, w.cancel = context.WithCancelCause(ctx)
	n.waits.mu.Lock()
	if from != nil && n.waits.reachesLocked(w.on, from, nil) {
		n.waits.mu.Unlock()
		return ctx, ErrCycle
	}
	if n.waits.by == nil {
		n.waits.by = make(map[*Actor][]*wait)
	}
	n.waits.by[from] = append(n.waits.by[from], w)
	n.waits.mu.Unlock()

	// A stop from here on finds w, an earlier one is seen now.
	over := n.closed.Load()
	if from != nil {
		from.mu.Lock()
		over = from.state&stopping != 0
		from.mu.Unlock()
	}
	if over {
		return ctx, ErrStopped
	}
	return ctx, nil
}

// leave ends a wait.
func (n *Node) leave(from *Actor, w *wait) {
	w.cancel(nil)
	n.waits.mu.Lock()
	defer n.waits.mu.Unlock()
	rest := n.waits.by[from]
	if i := slices.Index(rest, w); i >= 0 {
		rest = slices.Delete(rest, i, i+1)
		n.waits.by[from] = rest
	}
	if len(rest) == 0 {
		delete(n.waits.by, from)
	}
}

// reachesLocked reports whether a is to or waits for it, itself or through others. seen breaks circles that are there
// for a moment, until the one who closed them has left.
func (ws *waits) reachesLocked(a, to *Actor, seen map[*Actor]bool) bool {
	if a == nil || a == to {
		return a != nil
	}
	if len(ws.by[a]) == 0 || seen[a] {
		return false
	}
	if seen == nil {
		seen = make(map[*Actor]bool)
	}
	seen[a] = true
	for _, w := range ws.by[a] {
		if ws.reachesLocked(w.on, to, seen) {
			return true
		}
	}
	return false
}

// cut ends all waits of from with ErrStopped.
func (ws *waits) cut(from *Actor) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for _, w := range ws.by[from] {
		w.cancel(ErrStopped)
	}
}

// A call is a Call that waits for its answer, at an address of its own.
type call struct {
	from   *Actor // nil: no actor
	route  Route  // to its address alone
	answer chan *Message
	ended  atomic.Bool
	wait   wait  // on: who holds the question; guarded by waits.mu
	watch  watch // ends the call when that actor stops
	over   bool  // guarded by waits.mu
}

// end gives c its answer; false when it has one.
func (c *call) end(m *Message) bool {
	if c.ended.Swap(true) {
		return false
	}
	c.answer <- m // has room for one
	return true
}

// Call sends m and waits for its answer until ctx ends (then ErrTimeout, or the cause of the cancellation). The return
// route becomes an address made for this call; the first message that comes there is the answer, whatever its origin. It
// is for goroutines that are not actors: an actor uses its own. Besides those of Send there are these errors: ErrStopped
// when the actor that holds the question stops or fails on it, and what another node reports.
func (n *Node) Call(ctx context.Context, m *Message) (*Message, error) { return n.call(ctx, nil, m) }

// Call is [Node.Call] in the name of a, from one of its turns: ErrCycle when whoever holds the question waits, itself or
// through others, for a; ErrStopped when a is stopped meanwhile. The question is followed while the same *Message is sent
// on, and sending it on to an actor that waits for the caller fails with ErrCycle. Circles across nodes are not seen: ctx
// ends those.
func (a *Actor) Call(ctx context.Context, m *Message) (*Message, error) {
	return a.node.call(ctx, a, m)
}

func (n *Node) call(ctx context.Context, from *Actor, m *Message) (*Message, error) {
	to, _, _ := m.Onward.Pop()
	failed := func(err error) (*Message, error) { return nil, &DeliveryError{to, err} }

	c := &call{from: from, answer: make(chan *Message, 1)}
	c.watch.f = func(error) { c.end(&Message{Err: &DeliveryError{to, ErrStopped}}) }
	at := NewAddress()
	c.route, _ = NewRoute(at)
	s := n.shard(at)
	s.mu.Lock()
	if s.calls == nil {
		s.calls = make(map[Address]*call)
	}
	s.calls[at] = c
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.calls, at)
		s.mu.Unlock()
	}()

	ctx, err := n.enter(ctx, from, &c.wait)
	defer n.leave(from, &c.wait)
	defer n.release(c)
	if err != nil {
		return failed(err)
	}
	back, asked := m.Return, m.call
	m.Return, m.call = c.route, c
	if err := n.send(ctx, from, m); err != nil {
		m.Return, m.call = back, asked
		return nil, err
	}
	select {
	case answer := <-c.answer:
		switch err := answer.Err.(type) {
		case nil:
			return answer, nil
		case *DeliveryError:
			return nil, err
		default:
			return failed(err) // the bare reason, from another node
		}
	case <-ctx.Done():
		return failed(ended(ctx))
	}
}

// ask delivers m, the question of a Call, to a, or to another node when a is nil. Who is to hold the question is noted
// before it is handed over, so that notes are in the order in which it is sent on.
func (n *Node) ask(ctx context.Context, from, a *Actor, m *Message) error {
	c := m.call
	before, err := n.hold(c, a)
	if err == nil {
		if err = n.hand(ctx, from, a, m); err == nil {
			return nil
		}
	}
	if before != nil {
		if _, lost := n.hold(c, before); lost != nil {
			c.end(&Message{Err: &DeliveryError{before.Address(), lost}})
		}
	}
	return err
}

// hold takes note that a, nil for another node, holds the question of c, and returns who held it. ErrCycle, and no note,
// when a waits for the caller; ErrStopped when a has stopped.
func (n *Node) hold(c *call, a *Actor) (before *Actor, err error) {
	n.waits.mu.Lock()
	defer n.waits.mu.Unlock()
	before = c.wait.on
	if c.over || before == a {
		return before, nil
	}
	if c.from != nil && n.waits.reachesLocked(a, c.from, nil) {
		return before, ErrCycle
	}
	if before != nil {
		before.unwatch(&c.watch)
		c.wait.on = nil
	}
	if a == nil {
		return before, nil
	}
	if !a.watch(&c.watch) {
		return before, ErrStopped
	}
	c.wait.on = a
	return before, nil
}

// failed ends c when a, which failed on its question but may be restarted, still holds it.
func (n *Node) failed(c *call, a *Actor) {
	n.waits.mu.Lock()
	defer n.waits.mu.Unlock()
	if c.wait.on == a {
		c.end(&Message{Err: &DeliveryError{a.Address(), ErrStopped}})
	}
}

// release ends what hold began.
func (n *Node) release(c *call) {
	n.waits.mu.Lock()
	defer n.waits.mu.Unlock()
	c.over = true
	if a := c.wait.on; a != nil {
		a.unwatch(&c.watch)
	}
}
