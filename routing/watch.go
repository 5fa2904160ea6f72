package routing

import (
	"runtime/debug"
	"sync/atomic"
)

// A watch is one who is told when an actor has stopped. Its links are guarded by the mu of the actor watched.
type watch struct {
	f          func(error)
	prev, next *watch
	listed     bool
}

// watches is a list of them, in order.
type watches struct{ first, last *watch }

func (l *watches) add(w *watch) {
	w.listed, w.prev, w.next = true, l.last, nil
	if l.last == nil {
		l.first = w
	} else {
		l.last.next = w
	}
	l.last = w
}

func (l *watches) remove(w *watch) {
	if w.prev == nil {
		l.first = w.next
	} else {
		w.prev.next = w.next
	}
	if w.next == nil {
		l.last = w.prev
	} else {
		w.next.prev = w.prev
	}
	w.listed, w.prev, w.next = false, nil, nil
}

// watch has w told when a has stopped; false when all are told already.
func (a *Actor) watch(w *watch) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.state&gone != 0 {
		return false
	}
	a.rareLocked().watches.add(w)
	return true
}

// unwatch takes w back, if it is not told yet.
func (a *Actor) unwatch(w *watch) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if w.listed {
		a.rare.watches.remove(w)
		a.tidyLocked()
	}
}

// tell tells everybody that a has stopped because of err.
func (a *Actor) tell(err error) {
	for {
		a.mu.Lock()
		w := a.rare.watches.first
		if w == nil {
			a.state |= gone
			a.rare = nil
			a.mu.Unlock()
			return
		}
		a.rare.watches.remove(w)
		a.mu.Unlock()
		a.tellOne(w, err)
	}
}

func (a *Actor) tellOne(w *watch, err error) {
	defer func() {
		if v := recover(); v != nil {
			a.logFailure("watcher of the actor panicked", &PanicError{Value: v, Stack: debug.Stack()})
		}
	}()
	w.f(err)
}

// Watch has f called once when the actor at an address has stopped, with its error: nil when in good order, a *PanicError
// after a panic. f runs on the goroutine of the actor that stops, after its Stopped, and must not wait; the address is
// free again. When there is no such actor f is called with ErrNoActor before Watch returns. stop ends the watch; f may be
// running when it returns.
func (n *Node) Watch(at Address, f func(error)) (stop func()) {
	w := &watch{f: f}
	a, _ := n.lookup(at)
	if a == nil || !a.watch(w) {
		f(&DeliveryError{at, ErrNoActor})
		return func() {}
	}
	return func() { a.unwatch(w) }
}

// Watch is [Node.Watch] in the name of a: f is called in a turn of a's, so it needs no lock for what the worker owns, and
// the watch ends with a. An error that stops f's own actor is reported with Stop; a panic in f stops it.
func (a *Actor) Watch(at Address, f func(error)) (stop func()) {
	var over atomic.Bool
	inTurn := func(err error) {
		a.later(func() {
			if !over.Load() {
				f(err)
			}
		})
	}
	on, _ := a.node.lookup(at)
	if on == nil {
		inTurn(&DeliveryError{at, ErrNoActor})
		return func() { over.Store(true) }
	}

	// Two watches that end each other: on is forgotten when a stops and the other way round, or a long-lived actor would
	// collect those of all who ever watched it.
	own, theirs := new(watch), new(watch)
	own.f = func(error) { on.unwatch(theirs) }
	theirs.f = func(err error) { a.unwatch(own); inTurn(err) }
	stop = func() {
		over.Store(true)
		on.unwatch(theirs)
		a.unwatch(own)
	}
	if !a.watch(own) {
		return stop
	}
	if !on.watch(theirs) {
		theirs.f(&DeliveryError{at, ErrNoActor})
	}
	return stop
}

// later has f called in a turn of a's, unless it stops first.
func (a *Actor) later(f func()) {
	a.mu.Lock()
	if a.state&stopping != 0 {
		a.mu.Unlock()
		return
	}
	r := a.rareLocked()
	r.turns = append(r.turns, f)
	start := a.startLocked()
	a.mu.Unlock()
	if start {
		go a.run()
	}
}
