package channel

import (
	"container/list"
	"context"
	"errors"
	"net"
	"runtime"
	"sync"
	"time"
)

// Turns say when the responders that share them compute. Anybody can send first
// messages, and an answer costs a quarter of a millisecond: without turns a flood of
// them takes the cores from the channels that are there. The zero value is ready.
//
// Answers to message 1 have half of the cores at most. For strangers they have an
// allowance: half a second of each core at once, then a thirty-second of its time. Proofs that
// take longer than an answer have as much again, for which nobody else waits, and those of known
// sources as much once more. Whoever proves himself gives back what he took, so that members are never held up
// by their number; towards an authority nobody shows a credential, and all are
// strangers. Those that wait take turns by source, sources that have proved themselves
// before three times as often as all others together.
type Turns struct {
	once    sync.Once // of begin
	mu      sync.Mutex
	cores   int
	running int // answers that are computed now
	answers allowance
	// Of long proofs: of strangers, and of sources that have proved themselves.
	proofs [2]proofs
	price  time.Duration // of an answer: the least that one has taken; others had the core in the rest of a longer one
	turn   uint          // how many there have been
	// Who waits: sources in the order of their turns, those that are known apart.
	waiting [2]list.List             // of *source
	sources map[string]*list.Element // in waiting; those without a name are not in it
	known   map[string]struct{}      // sources that have proved themselves
	wake    *time.Timer              // for when the allowance has room; nil while nobody waits for it
	// lasts are verifications of message 3 and of a credential, of those whose message
	// 2 arrived: half of the cores. They do not queue behind the others.
	lasts chan struct{}
}

const (
	strangersShare = 32                     // one part of so many of the cores' time
	strangersBurst = 500 * time.Millisecond // of each core
	// knownSources bounds what is remembered: 4,096 addresses are some 400 KB.
	knownSources = 4096
	// verifiedBytes of message 3 take as long as an answer: one change of a history, some 205
	// bytes, is two signatures (0.24 ms for 1 change and 2.08 for 16, beside answers of 0.25).
	verifiedBytes = 400
	// Up to shortProof bytes, which are two changes, nobody waits: there is an answer for each.
	shortProof = 600
	longLook   = 50 * time.Millisecond
)

// An allowance is what strangers may have computed: a burst, then a part of the time.
type allowance struct {
	spent time.Duration
	at    time.Time // of spent
}

// proofs are the long ones of a class. One of them looks at the allowance, the others wait behind it.
type proofs struct {
	allowance
	queue chan struct{}
}

// wait is how long it takes until there is room for one more at such a price; at most 0: there is.
func (a *allowance) wait(cores int, price time.Duration) time.Duration {
	const per = strangersShare
	n := time.Duration(cores)
	now := time.Now()
	if now.Before(a.at) {
		a.at = now
	}
	back := now.Sub(a.at) * n / per
	a.at = a.at.Add(back * per / n) // what is less than a nanosecond of it is counted next time
	if a.spent -= back; a.spent <= 0 {
		a.spent, a.at = 0, now
	}
	over := a.spent + price - strangersBurst*n
	if over <= 0 {
		return 0
	}
	return over*per/n + per // rounded up: a timer that comes too early finds nothing new
}

// A source is an address that answers are waited for from, each a *waiter.
type source struct {
	name  string
	class int // of waiting
	queue list.List
}

type waiter struct {
	ready chan struct{} // closed under mu when it may compute
	from  *list.Element // of waiting
	self  *list.Element // of its source's queue; nil once it may compute
}

func (t *Turns) begin() {
	t.once.Do(func() {
		t.cores = runtime.GOMAXPROCS(0)
		t.answers.at = time.Now()
		for i := range t.proofs {
			t.proofs[i] = proofs{allowance{at: t.answers.at}, make(chan struct{}, 1)}
		}
		t.sources, t.known = make(map[string]*list.Element), make(map[string]struct{})
		t.lasts = make(chan struct{}, t.half())
	})
}

func (t *Turns) half() int { return max(t.cores/2, 1) }

// first waits for the turn of one more answer for a source; "" is one that shares its
// name with nobody. Without an error the caller ends it by done.
func (t *Turns) first(ctx context.Context, name string) error {
	t.begin()
	t.mu.Lock()
	w := &waiter{ready: make(chan struct{})}
	t.enter(w, name)
	t.next()
	t.mu.Unlock()
	select {
	case <-w.ready:
		return nil
	case <-ctx.Done():
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if w.self == nil { // both at once
		t.running--
		t.answers.spent -= t.price
		t.next()
	} else {
		t.take(w)
	}
	return context.Cause(ctx)
}

// enter puts w behind those that its source waits for already.
func (t *Turns) enter(w *waiter, name string) {
	e := t.sources[name]
	if name == "" || e == nil {
		s := &source{name: name, class: 1}
		if _, known := t.known[name]; known {
			s.class = 0
		}
		e = t.waiting[s.class].PushBack(s)
		if name != "" {
			t.sources[name] = e
		}
	}
	w.from = e
	w.self = e.Value.(*source).queue.PushBack(w)
}

// take takes w out, and its source behind the others, or out with the last of it.
func (t *Turns) take(w *waiter) {
	s := w.from.Value.(*source)
	s.queue.Remove(w.self)
	w.self = nil
	if s.queue.Len() > 0 {
		t.waiting[s.class].MoveToBack(w.from)
		return
	}
	t.waiting[s.class].Remove(w.from)
	if s.name != "" {
		delete(t.sources, s.name)
	}
}

// next lets those compute whose turn it is.
func (t *Turns) next() {
	for t.running < t.half() {
		class := 0
		if t.turn%4 == 3 {
			class = 1
		}
		e := t.waiting[class].Front()
		if e == nil {
			e = t.waiting[1-class].Front()
		}
		if e == nil {
			return
		}
		if wait := t.answers.wait(t.cores, t.price); wait > 0 {
			if t.wake == nil {
				t.wake = time.AfterFunc(wait, func() {
					t.mu.Lock()
					defer t.mu.Unlock()
					t.wake = nil
					t.next()
				})
			}
			return
		}
		w := e.Value.(*source).queue.Front().Value.(*waiter)
		t.take(w)
		t.turn++
		t.running++
		t.answers.spent += t.price
		close(w.ready)
	}
}

// done ends an answer that took so long; 0: there was none to give.
func (t *Turns) done(took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.running--
	if took > 0 && (t.price == 0 || took < t.price) {
		t.price = took
	}
	t.next()
}

// long waits until the allowance has room for a proof of n bytes from a source, and takes its cost, which back
// gives back.
func (t *Turns) long(ctx context.Context, name string, n int) (back func(), err error) {
	class := &t.proofs[0]
	if t.Known(name) {
		class = &t.proofs[1]
	}
	select {
	case class.queue <- struct{}{}:
		defer func() { <-class.queue }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	for {
		t.mu.Lock()
		// At most all that there is: the price may be from a busy moment.
		cost := min(t.price*time.Duration(n)/verifiedBytes, strangersBurst*time.Duration(t.cores))
		wait := class.wait(t.cores, cost)
		if wait <= 0 {
			class.spent += cost
		}
		t.mu.Unlock()
		if wait <= 0 {
			return func() {
				t.mu.Lock()
				defer t.mu.Unlock()
				class.spent -= cost
			}, nil
		}
		timer := time.NewTimer(min(wait, longLook)) // the price may fall, and what was taken come back
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, context.Cause(ctx)
		}
	}
}

// proved gives back the answer to a source that has proved itself since, and remembers
// the source. Of too many one is forgotten, by chance.
func (t *Turns) proved(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.answers.spent -= t.price
	t.next()
	t.remember(name)
}

// Vouch remembers a source that somebody who has proved himself answers for.
func (t *Turns) Vouch(name string) {
	t.begin()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.remember(name)
}

func (t *Turns) remember(name string) {
	if _, known := t.known[name]; name == "" || known {
		return
	}
	if len(t.known) >= knownSources {
		for old := range t.known {
			delete(t.known, old)
			break
		}
	}
	t.known[name] = struct{}{}
}

// Known reports whether a source has proved itself before.
func (t *Turns) Known(name string) bool {
	t.begin()
	t.mu.Lock()
	defer t.mu.Unlock()
	_, known := t.known[name]
	return known
}

// answer runs f, which answers message 1, when it is its turn.
func (o *opening) answer(f func() error) error {
	t := o.config.Turns
	if t == nil {
		return o.compute(f)
	}
	if err := t.first(o.ctx, o.config.Source); err != nil {
		return lost(err)
	}
	var took time.Duration
	defer func() { t.done(took) }()
	return o.compute(func() error {
		begin := time.Now()
		err := f()
		if err == nil {
			took = time.Since(begin)
		}
		return err
	})
}

// verify runs f, which verifies what came behind message 2, when it is its turn: n bytes of
// proof, 0 for what has none of its sender's making.
func (o *opening) verify(n int, f func() error) error {
	t := o.config.Turns
	if t == nil {
		return o.compute(f)
	}
	t.begin()
	back := func() {}
	if n > shortProof {
		var err error
		if back, err = t.long(o.ctx, o.config.Source, n); err != nil {
			return lost(err)
		}
		o.back = back
	}
	select {
	case t.lasts <- struct{}{}:
		defer func() { <-t.lasts }()
		return o.compute(f)
	case <-o.ctx.Done():
		back() // nothing was verified
		return lost(context.Cause(o.ctx))
	}
}

// compute runs f on a goroutine of its own: the arithmetic makes a stack of it that
// whoever goes on to wait for the other end, or serves the channel, would keep.
// Nothing is computed for a lane that was given up meanwhile.
func (o *opening) compute(f func() error) error {
	if err := o.lane.SetDeadline(o.deadline); errors.Is(err, net.ErrClosed) || o.ctx.Err() != nil {
		return lost(errors.Join(err, o.ctx.Err()))
	}
	done := make(chan error, 1)
	go func() { done <- f() }()
	return <-done
}
