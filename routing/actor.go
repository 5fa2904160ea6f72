package routing

import (
	"fmt"
	"runtime/debug"
	"sync"
)

// A Worker is what an actor does with a message.
//
// Receive handles one; the node never calls it while another turn of the same actor runs. An error or a panic stops the
// actor (or restarts it, see Options) and nothing else. m is the worker's from then on.
//
// A worker may also have either of these methods:
//
//	Drained(self *Actor) error   the mailbox has become empty, or Wake or Run asked for it: flush. Fails as Receive does.
//	Stopped(err error)           once, last: release everything. err is nil when the actor was stopped in good order.
type Worker interface {
	Receive(self *Actor, m *Message) error
}

// WorkerFunc is a function as a Worker.
type WorkerFunc func(self *Actor, m *Message) error

// Receive calls f.
func (f WorkerFunc) Receive(self *Actor, m *Message) error { return f(self, m) }

type drainer interface{ Drained(self *Actor) error }

type stopper interface{ Stopped(err error) }

// An Actor is the record of an actor and the handle to it. While the actor is idle the record is all there is: 80 bytes,
// besides the address and a slot in the table.
type Actor struct {
	// static after Spawn
	wire string // its address as the encoding of a route: u8 length ‖ address
	node *Node
	opts *Options

	worker Worker // owned by whoever set running

	// guarded by mu
	mu      sync.Mutex
	state   state
	charged int32    // bytes that wait in the mailbox
	tail    *Message // newest message of the mailbox, a ring: tail.next is the oldest; nil: empty
	rare    *rare    // nil unless there is something to put in it
}

// rare is what few actors have at any time. Guarded by the actor's mu.
type rare struct {
	err      error         // why it stops
	stopping chan struct{} // for Stopping: closed when stopping
	watches  watches       // who is told when it has stopped
	turns    []func()      // of its own watches, to be called in a turn
	room     []*parked     // senders that wait for room, in order
	restarts restarts
}

type state uint32

// What an actor is doing. At most one goroutine has set running and not cleared it: only that one calls the worker.
//
//	idle ── message, Wake, Run ──► running ── nothing left to do ──► idle
//	running ── error, with Restart ──► paused ── back-off is over ──► running
//	any ── Stop, or error ──► stopping (running stays or is set) ── Stopped ──► gone
const (
	running  state = 1 << iota // a goroutine is in run or Run
	owed                       // messages were handled since Drained
	woken                      // Wake or Run asked for Drained
	paused                     // waits for a restart; not running
	stale                      // the worker failed and Restart.New makes the next one
	stopping                   // takes nothing any more
	gone                       // stopped, and every watcher is told
)

// Address returns the actor's address.
func (a *Actor) Address() Address { return Address(a.wire[1:]) }

// route returns the route to a alone.
func (a *Actor) route() Route { return Route{a.wire} }

// rareLocked returns a.rare, made on first need.
func (a *Actor) rareLocked() *rare {
	if a.rare == nil {
		a.rare = new(rare)
	}
	return a.rare
}

// tidyLocked lets go of a.rare when nothing is in it any more. A stopping actor keeps it: err may be nil there.
func (a *Actor) tidyLocked() {
	if r := a.rare; r != nil && a.state&stopping == 0 && r.stopping == nil && r.watches.first == nil &&
		len(r.turns) == 0 && len(r.room) == 0 && r.restarts.count == 0 {
		a.rare = nil
	}
}

// pushLocked puts m, which costs cost, at the end of the mailbox and takes a's own address off its onward route.
func (a *Actor) pushLocked(m *Message, cost int) {
	_, m.Onward, _ = m.Onward.Pop()
	m.Hops++
	m.charge = int32(cost)
	if a.tail == nil {
		m.next = m
	} else {
		m.next, a.tail.next = a.tail.next, m
	}
	a.tail = m
	a.charged += m.charge
}

// popLocked takes the oldest message out of the mailbox; nil when there is none.
func (a *Actor) popLocked() *Message {
	if a.tail == nil {
		return nil
	}
	m := a.tail.next
	if m == a.tail {
		a.tail = nil
	} else {
		a.tail.next = m.next
	}
	m.next = nil
	a.charged -= m.charge
	return m
}

// startLocked reports whether the caller must start run, which it does after it has unlocked.
func (a *Actor) startLocked() bool {
	if a.state&(running|paused|gone) != 0 {
		return false
	}
	a.state |= running
	return true
}

// Wake has Drained called once more, on a goroutine of the actor's. It never waits. Several calls before Drained begins
// are one; a call while it runs is one more. It does nothing to an actor that is stopped.
func (a *Actor) Wake() {
	a.mu.Lock()
	if a.state&stopping != 0 {
		a.mu.Unlock()
		return
	}
	a.state |= woken
	start := a.startLocked()
	a.mu.Unlock()
	if start {
		go a.run()
	}
}

// inlinePasses bounds how often Run calls Drained for others who woke the actor meanwhile: enough that a moment of
// contention costs no goroutine, few enough that nobody is kept working for the rest of the world.
const inlinePasses = 4

// Run is Wake, except that Drained of an idle actor runs on the calling goroutine before Run returns; it allocates
// nothing. When the actor is in a turn, on whatever goroutine (the caller's own included), it is woken instead. An error
// or a panic in Drained stops the actor, not the caller; Stopped then runs on a goroutine of the actor's. A worker whose
// Drained waits in Send or Call is not for Run from another actor's turn: that circle would not be seen.
func (a *Actor) Run() {
	a.mu.Lock()
	if a.state&(running|paused|stopping) != 0 {
		a.state |= woken
		a.mu.Unlock()
		return
	}
	a.state |= running
	for pass := 1; ; pass++ {
		a.state &^= woken | owed
		a.mu.Unlock()
		err := a.drained()
		if err != nil && !a.fail(err) {
			return // paused: the restart goes on from here
		}
		a.mu.Lock()
		again := a.state&woken != 0 && pass < inlinePasses
		switch {
		case a.state&stopping != 0 || a.busyLocked():
			again = false
		case a.state&woken == 0:
			a.state &^= running
			a.mu.Unlock()
			return
		}
		if !again {
			a.mu.Unlock()
			go a.run() // running stays set: it is handed over
			return
		}
	}
}

// busyLocked reports whether there are messages or functions of watches to handle.
func (a *Actor) busyLocked() bool {
	return a.tail != nil || a.rare != nil && len(a.rare.turns) > 0
}

// run takes turns until there is nothing left to do. Its caller has set running.
func (a *Actor) run() {
	flushed := false // the last turn was a Drained: what waits behind it comes next
	for {
		a.mu.Lock()
		var err error
		switch {
		case a.state&stopping != 0:
			a.mu.Unlock()
			a.finish()
			return

		case a.state&stale != 0:
			a.state &^= stale
			a.mu.Unlock()
			err = a.renew()

		case a.state&woken != 0 && !(flushed && a.busyLocked()):
			a.state &^= woken | owed
			a.mu.Unlock()
			flushed = true
			err = a.drained()

		case a.rare != nil && len(a.rare.turns) > 0:
			turns := a.rare.turns
			a.rare.turns = nil
			a.state |= owed
			a.tidyLocked()
			a.mu.Unlock()
			flushed = false
			for _, f := range turns {
				if err = a.turn(f); err != nil {
					break
				}
			}

		case a.tail != nil:
			m := a.popLocked()
			a.state |= owed
			if a.rare != nil {
				a.admitLocked()
			}
			a.mu.Unlock()
			flushed = false
			c := m.call // read now: m is the worker's after this line
			if err = a.receive(m); err != nil && c != nil {
				a.node.failed(c, a)
			}

		case a.state&owed != 0:
			a.state &^= owed
			a.mu.Unlock()
			flushed = true
			err = a.drained()

		default:
			a.state &^= running
			a.mu.Unlock()
			return
		}
		if err != nil && !a.fail(err) {
			return
		}
	}
}

// The calls of the worker. Each turns a panic into an error; after runtime.Goexit the goroutine is lost, so another one
// takes over.

func (a *Actor) receive(m *Message) (err error) {
	done := false
	defer func() {
		if !done {
			err = a.caught(recover())
		}
	}()
	err = a.worker.Receive(a, m)
	done = true
	return err
}

func (a *Actor) drained() (err error) {
	w, ok := a.worker.(drainer)
	if !ok {
		return nil
	}
	done := false
	defer func() {
		if !done {
			err = a.caught(recover())
		}
	}()
	err = w.Drained(a)
	done = true
	return err
}

func (a *Actor) turn(f func()) (err error) {
	done := false
	defer func() {
		if !done {
			err = a.caught(recover())
		}
	}()
	f()
	done = true
	return nil
}

// caught makes an error of what a deferred function recovered. nil means runtime.Goexit, since panic(nil) is recovered
// as a runtime.PanicNilError: nothing after this call runs on this goroutine, so it also hands the actor over.
func (a *Actor) caught(v any) error {
	if v != nil {
		return &PanicError{Value: v, Stack: debug.Stack()}
	}
	err := &PanicError{}
	if a.fail(err) {
		go a.run()
	}
	return err
}

// fail deals with an error of the worker. It reports whether the caller, which has set running, is to go on in run;
// if not, the actor is paused and running is cleared.
func (a *Actor) fail(err error) bool {
	a.logFailure("worker failed", err)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.state&stopping != 0 {
		// Stopped while it failed. What a stop does to a worker is no news; a panic always is.
		if _, ok := err.(*PanicError); ok && a.rare.err == nil {
			a.rare.err = err
		}
		return true
	}
	if a.opts.Restart != nil {
		final := a.pauseLocked(err)
		if final == nil {
			return false
		}
		err = final
	}
	a.stopLocked(err)
	return true
}

// Stop ends the actor after the turn that is running: Stopped(err) is called, once, on a goroutine of the actor's; what
// waits in the mailbox goes back to its senders with ErrStopped; and watchers are told err. A Send or Call the actor
// itself is waiting in ends with ErrStopped. nil means stopped in good order. Stop does not wait, the first call decides,
// and a turn may stop its own actor.
func (a *Actor) Stop(err error) {
	a.mu.Lock()
	if a.state&stopping != 0 {
		a.mu.Unlock()
		return
	}
	a.stopLocked(err)
	if a.state&paused != 0 {
		a.state &^= paused
		a.rare.restarts.timer.Stop() // if it is too late for that, resume finds paused cleared
	}
	start := a.startLocked()
	a.mu.Unlock()
	a.node.waits.cut(a)
	if start {
		go a.run()
	}
}

// stopLocked takes note that the actor stops, and why.
func (a *Actor) stopLocked(err error) {
	a.state |= stopping
	r := a.rareLocked()
	r.err = err
	if r.stopping != nil {
		close(r.stopping)
	}
}

// Stopping returns a channel that is closed when the actor is told to stop, for a worker that is about to block in
// something that only it can end. It costs nothing to actors that never ask.
func (a *Actor) Stopping() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.rareLocked()
	if r.stopping == nil {
		r.stopping = make(chan struct{})
		if a.state&stopping != 0 {
			close(r.stopping)
		}
	}
	return r.stopping
}

// finish is the end of an actor: the mailbox, Stopped, the table, the watchers, in this order, so that whoever is told can
// spawn at the address again. The later steps are deferred so that no worker can keep them from happening.
func (a *Actor) finish() {
	n := a.node
	a.mu.Lock()
	err := a.rare.err
	room := a.rare.room
	a.rare.room, a.rare.turns = nil, nil
	a.mu.Unlock()

	for _, p := range room {
		p.granted <- ErrStopped
	}
	for {
		a.mu.Lock()
		m := a.popLocked()
		a.mu.Unlock()
		if m == nil {
			break
		}
		n.undelivered(m, a, ErrStopped)
	}
	defer n.live.Done()
	defer a.tell(err)
	defer n.remove(a)
	a.stopped(a.worker, err)
}

// stopped calls Stopped of w.
func (a *Actor) stopped(w Worker, err error) {
	s, ok := w.(stopper)
	if !ok {
		return
	}
	defer func() {
		if v := recover(); v != nil {
			a.logFailure("worker's Stopped panicked", &PanicError{Value: v, Stack: debug.Stack()})
		}
	}()
	s.Stopped(err)
}

// logFailure logs a panic as an error with its stack, anything else for who debugs, since Stopped and the watchers are
// told.
func (a *Actor) logFailure(msg string, err error) {
	if a.node.Logger == nil {
		return
	}
	if p, ok := err.(*PanicError); ok {
		a.node.Logger.Error(msg, "actor", a.Address().String(), "worker", fmt.Sprintf("%T", a.worker), "err", err, "stack", string(p.Stack))
		return
	}
	a.node.Logger.Debug(msg, "actor", a.Address().String(), "err", err)
}
