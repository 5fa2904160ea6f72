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
// allowance: half a second of each core at once, then a thirty-second of its time, of which
// what is verified behind them takes its part. Whoever proves himself gives both back, so that members are never held up
// by their number; towards an authority nobody shows a credential, and all are
// strangers. Those that wait take turns by source, sources that have proved themselves
// before three times as often as all others together.
type Turns struct {
	once    sync.Once // of begin
	mu      sync.Mutex
	cores   int
	running int           // answers that are computed now
	spent   time.Duration // of the allowance
	at      time.Time     // of spent
	price   time.Duration // of an answer: the least that one has taken; others had the core in the rest of a longer one
	turn    uint          // how many there have been
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
)

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
		t.at = time.Now()
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
		t.spent -= t.price
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
		if wait := t.wait(); wait > 0 {
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
		t.spent += t.price
		close(w.ready)
	}
}

// wait is how long it takes until the allowance has room for one more; at most 0: it has.
func (t *Turns) wait() time.Duration {
	const per = strangersShare
	cores := time.Duration(t.cores)
	now := time.Now()
	if now.Before(t.at) {
		t.at = now
	}
	back := now.Sub(t.at) * cores / per
	t.at = t.at.Add(back * per / cores) // what is less than a nanosecond of it is counted next time
	if t.spent -= back; t.spent <= 0 {
		t.spent, t.at = 0, now
	}
	over := t.spent + t.price - strangersBurst*cores
	if over <= 0 {
		return 0
	}
	return over*per/cores + per // rounded up: a timer that comes too early finds nothing new
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

// charge takes from the allowance what it costs to verify n bytes. It holds nobody up who
// had an answer, but those who come behind.
func (t *Turns) charge(n int) (cost time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	cost = t.price * time.Duration(n) / verifiedBytes
	t.spent += cost
	return cost
}

// proved gives back the answer to a source that has proved itself since, and what verifying
// it was charged, and remembers the source. Of too many one is forgotten, by chance.
func (t *Turns) proved(name string, verified time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.spent -= t.price + verified
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

// verify runs f, which verifies n bytes that came behind message 2, when it is its turn.
func (o *opening) verify(n int, f func() error) error {
	t := o.config.Turns
	if t == nil {
		return o.compute(f)
	}
	t.begin()
	select {
	case t.lasts <- struct{}{}:
		defer func() { <-t.lasts }()
		o.charged += t.charge(n)
		return o.compute(f)
	case <-o.ctx.Done():
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
