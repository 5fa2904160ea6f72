package routing

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// Post sends m to the first address of its onward route and never waits. Errors are *DeliveryError, around ErrNoActor,
// ErrFull, ErrRefused, ErrStopped, or what Remote said; m is then unchanged.
func (n *Node) Post(m *Message) error { return n.send(atOnce, nil, m) }

// Send is Post, but waits for room until ctx ends (then ErrTimeout, or the cause of the cancellation). It is for
// goroutines that are not actors: an actor uses its own.
func (n *Node) Send(ctx context.Context, m *Message) error { return n.send(ctx, nil, m) }

// Post is [Node.Post] in the name of a: an empty return route becomes the one to a.
func (a *Actor) Post(m *Message) error {
	m.from(a)
	return a.node.send(atOnce, a, m)
}

// Send is [Node.Send] in the name of a, from one of its turns: an empty return route becomes the one to a; ErrCycle when
// the receiver waits, itself or through others, for a; ErrStopped when a is stopped meanwhile.
func (a *Actor) Send(ctx context.Context, m *Message) error {
	m.from(a)
	return a.node.send(ctx, a, m)
}

// Reply sends body to where the answer to a message goes, in the name of a; it never waits. The reply has the Origin of
// the message, so that the guard of whoever it goes to judges the one who chose the route.
func (a *Actor) Reply(to *Message, body []byte) error {
	return a.Post(&Message{Onward: to.Return, Body: body, Origin: to.Origin})
}

// from fills in an empty return route.
func (m *Message) from(a *Actor) {
	if m.Return.wire == "" {
		m.Return = a.route()
	}
}

// send delivers m for from, nil when it is no actor. Under atOnce it does not wait.
func (n *Node) send(ctx context.Context, from *Actor, m *Message) error {
	at, _, _ := m.Onward.Pop()
	if err := n.deliver(ctx, from, at, m); err != nil {
		return &DeliveryError{at, err}
	}
	return nil
}

func (n *Node) deliver(ctx context.Context, from *Actor, at Address, m *Message) error {
	switch {
	case at == "":
		return errNoRoute
	case m.next != nil:
		return errQueued
	case m.Hops >= MaxHops:
		return errTooFar
	case from == nil && n.closed.Load():
		return ErrStopped
	}
	a, c := n.lookup(at)
	switch {
	case a != nil:
	case c != nil:
		whole, asked := m.Onward, m.call
		_, m.Onward, _ = whole.Pop()
		m.Hops, m.call = m.Hops+1, nil
		if !c.end(m) {
			m.Onward, m.Hops, m.call = whole, m.Hops-1, asked
			return ErrNoActor
		}
		return nil
	case n.Remote == nil:
		return ErrNoActor
	case m.Origin != nil:
		return ErrRefused // this node forwards nothing
	}
	if m.call != nil {
		return n.ask(ctx, from, a, m)
	}
	return n.hand(ctx, from, a, m)
}

// hand gives m to a, or to Remote when a is nil.
func (n *Node) hand(ctx context.Context, from, a *Actor, m *Message) error {
	if a == nil {
		return n.away(ctx, from, m)
	}
	return n.enqueue(ctx, from, a, m)
}

// enqueue puts m into the mailbox of a.
func (n *Node) enqueue(ctx context.Context, from, a *Actor, m *Message) error {
	if err := a.opts.admits(m); err != nil {
		return err
	}
	cost, limit := m.cost(), a.opts.limit()
	if cost > limit {
		return fmt.Errorf("%w: this message takes %d bytes, the mailbox %d", ErrFull, cost, limit)
	}

	a.mu.Lock()
	if a.state&stopping != 0 {
		a.mu.Unlock()
		return ErrStopped
	}
	var dropped *Message
	if int(a.charged)+cost > limit || a.rare != nil && len(a.rare.room) > 0 {
		switch {
		case a.opts.Full == DropOldest:
			dropped = a.dropLocked(limit - cost)
		case a.opts.Full == Refuse || ctx == atOnce:
			a.mu.Unlock()
			return ErrFull
		default:
			p := &parked{m: m, cost: cost, granted: make(chan error, 1)}
			r := a.rareLocked()
			r.room = append(r.room, p)
			a.mu.Unlock()
			return n.park(ctx, from, a, p)
		}
	}
	a.pushLocked(m, cost)
	start := a.startLocked()
	a.mu.Unlock()
	if start {
		go a.run()
	}
	for dropped != nil {
		m := dropped
		dropped, m.next = m.next, nil
		n.undelivered(m, a, ErrFull)
	}
	return nil
}

// dropLocked takes the oldest messages out until no more than most bytes wait, and returns them as a list.
func (a *Actor) dropLocked(most int) *Message {
	var first *Message
	for last := &first; int(a.charged) > most; {
		m := a.popLocked()
		*last, last = m, &m.next
	}
	return first
}

// parked is a Send that waits for room.
type parked struct {
	m       *Message
	cost    int
	granted chan error // one value: nil when m is in the mailbox, ErrStopped when the actor is no more
}

// admitLocked puts the messages of waiting senders into the mailbox, in order, as far as there is room.
func (a *Actor) admitLocked() {
	r, limit := a.rare, a.opts.limit()
	for len(r.room) > 0 && int(a.charged)+r.room[0].cost <= limit {
		p := r.room[0]
		r.room[0] = nil
		r.room = r.room[1:]
		a.pushLocked(p.m, p.cost)
		p.granted <- nil
	}
	a.tidyLocked()
}

// park waits until p is admitted to the mailbox of a.
func (n *Node) park(ctx context.Context, from, a *Actor, p *parked) error {
	w := wait{on: a}
	ctx, err := n.enter(ctx, from, &w)
	defer n.leave(from, &w)
	decided := false
	if err == nil {
		select {
		case err = <-p.granted:
			decided = true
		case <-ctx.Done():
			err = ended(ctx)
		}
	}
	if !decided && !a.withdraw(p) {
		err = <-p.granted // meanwhile
	}
	return err
}

// withdraw takes p back; false when it is decided already.
func (a *Actor) withdraw(p *parked) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.rare == nil {
		return false
	}
	i := slices.Index(a.rare.room, p)
	if i < 0 {
		return false
	}
	a.rare.room = slices.Delete(a.rare.room, i, i+1)
	if a.state&stopping == 0 {
		a.admitLocked() // a smaller one behind it may fit
	}
	return true
}

// atOnce is the context of a message that must not wait: one that has ended.
var atOnce = func() context.Context {
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(ErrFull)
	return ctx
}()

// away gives m to Remote.
func (n *Node) away(ctx context.Context, from *Actor, m *Message) error {
	var err error
	m.Hops++
	if ctx == atOnce {
		err = n.Remote.Send(ctx, m)
	} else {
		var w wait
		ctx, err = n.enter(ctx, from, &w)
		if err == nil {
			err = n.Remote.Send(ctx, m)
		}
		if err != nil && ctx.Err() != nil {
			err = ended(ctx)
		}
		n.leave(from, &w)
	}
	if err == nil {
		return nil
	}
	m.Hops--
	for _, known := range reasons {
		if known != nil && errors.Is(err, known) {
			return err
		}
	}
	if errors.Is(err, context.Canceled) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

// undelivered tells the sender of m, which a had accepted, that it will not be handled. Nobody is told of a report.
func (n *Node) undelivered(m *Message, a *Actor, reason error) {
	err := &DeliveryError{a.Address(), reason}
	if m.call != nil && m.call.end(&Message{Err: err}) {
		return
	}
	if m.Err != nil || m.Return.wire == "" {
		n.log().Debug("message lost", "err", err, "report", m.Err != nil)
		return
	}
	report := &Message{Onward: m.Return, Return: a.route(), Body: m.Body, Origin: m.Origin, Err: err}
	to, _, _ := report.Onward.Pop()
	if err := n.deliver(atOnce, a, to, report); err != nil {
		n.log().Debug("report of a lost message lost", "to", to.String(), "err", err)
	}
}
