package routing

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// Restart says how an actor goes on after its worker failed. Meanwhile its mailbox keeps what it has and takes more up to
// its limit, and it owns no goroutine. The message that was being handled is not repeated. Watchers are told only when it
// stops for good. Not for a worker that counts nonces or offsets: what it lost cannot be made anew.
type Restart struct {
	// New makes the next worker, in a turn of the actor's, after Stopped of the one that failed; its error counts as a
	// failure too. nil: the same worker goes on, and Stopped is not called.
	New func() (Worker, error)

	Limit  int           // failures within Window of one another that are followed by a restart; 0: 5
	Window time.Duration // so long without a failure, the count begins again; 0: 1 min

	// The pause before a restart doubles from Min (0: 50 ms) to Max (0: 30 s) and is spread by ± 50 %.
	Min, Max time.Duration
}

// restarts is where an actor stands. Guarded by its mu.
type restarts struct {
	count int
	last  time.Time
	err   error       // the failure that paused it
	timer *time.Timer // resumes it
}

// pause returns how long to wait before restart number i (from 1).
func (r *Restart) pause(i int) time.Duration {
	d, most := orDefault(r.Min, 50*time.Millisecond), orDefault(r.Max, 30*time.Second)
	for ; i > 1 && d < most; i-- {
		d *= 2
	}
	d = min(d, most)
	return d/2 + rand.N(d+1)
}

func orDefault[T int | time.Duration](v, def T) T {
	if v <= 0 {
		return def
	}
	return v
}

// pauseLocked stops the actor running until its back-off is over. When the limit is reached it returns the error with
// which to stop instead.
func (a *Actor) pauseLocked(err error) error {
	o, r := a.opts.Restart, &a.rareLocked().restarts
	now := time.Now()
	if now.Sub(r.last) > orDefault(o.Window, time.Minute) {
		r.count = 0
	}
	if r.count >= orDefault(o.Limit, 5) {
		return fmt.Errorf("giving up after %d restarts: %w", r.count, err)
	}
	r.count, r.last, r.err = r.count+1, now, err
	a.state = a.state&^running | paused
	if o.New != nil {
		a.state |= stale
	}
	r.timer = time.AfterFunc(o.pause(r.count), a.resume)
	return nil
}

// resume goes on after a back-off, on the timer's goroutine. Stop may have come first.
func (a *Actor) resume() {
	a.mu.Lock()
	if a.state&paused == 0 {
		a.mu.Unlock()
		return
	}
	a.state = a.state&^paused | running
	a.rare.restarts.timer = nil
	a.mu.Unlock()
	a.run()
}

// renew replaces the worker. Until there is a new one, a worker that does nothing keeps its place, so that each worker's
// Stopped is called once.
func (a *Actor) renew() error {
	a.mu.Lock()
	failed := a.rare.restarts.err
	a.mu.Unlock()
	old := a.worker
	a.worker = WorkerFunc(nil)
	a.stopped(old, failed)
	var w Worker
	var err error
	if caught := a.turn(func() { w, err = a.opts.Restart.New() }); caught != nil {
		return caught
	}
	switch {
	case err != nil:
		return fmt.Errorf("making a new worker: %w", err)
	case w == nil:
		return fmt.Errorf("making a new worker: there is none")
	}
	a.worker = w
	return nil
}
