package routing

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
)

// A Node runs the actors of one process and finds them by address. The zero value runs. It must not be copied, and its
// exported fields must not change after first use.
type Node struct {
	Remote Remote       // carries messages for addresses that are not on this node; nil: ErrNoActor
	Logger *slog.Logger // hears of panics, restarts and lost reports; nil: nobody does

	closed atomic.Bool
	live   sync.WaitGroup // actors from Spawn until the last watcher is told
	waits  waits
	shards [64]shard // so that streams that come and go on all cores seldom meet on a lock
}

// A shard is a part of the table.
type shard struct {
	mu     sync.RWMutex
	actors map[Address]*Actor
	calls  map[Address]*call // reply addresses of pending calls
}

// seed makes the spread over shards unknown to whoever chooses names.
var seed = maphash.MakeSeed()

func (n *Node) shard(at Address) *shard {
	return &n.shards[maphash.String(seed, string(at))%uint64(len(n.shards))]
}

// lookup returns what is at an address: an actor, a pending call, or neither.
func (n *Node) lookup(at Address) (*Actor, *call) {
	s := n.shard(at)
	s.mu.RLock()
	a := s.actors[at]
	var c *call
	if a == nil && s.calls != nil {
		c = s.calls[at]
	}
	s.mu.RUnlock()
	return a, c
}

// Remote carries messages to addresses that are not on this node.
//
// Send takes m, whose Origin is nil and whose Onward is whole, or returns an error and leaves it as it was. It waits
// while there is no room, until ctx ends. A ctx that has already ended means: take m now, without waiting, or return
// ErrFull; Post calls it so.
type Remote interface {
	Send(ctx context.Context, m *Message) error
}

// Overflow is what happens to a message that does not fit into a mailbox.
type Overflow uint8

const (
	Wait       Overflow = iota // Send waits for room, Post fails with ErrFull
	Refuse                     // Send and Post fail with ErrFull
	DropOldest                 // the oldest messages make room; their senders get ErrFull
)

// DefaultLimit is the size of a mailbox unless Options says otherwise: one full frame, or 512 empty messages.
const DefaultLimit = 64 << 10

// Options say how an actor treats its messages. Many actors may share one Options, which must not change any more.
type Options struct {
	// Limit is what may wait in the mailbox, in bytes: bodies, routes and 128 for each message. 0: DefaultLimit.
	// A message that is larger by itself is refused with ErrFull.
	Limit int

	Full Overflow // what happens beyond Limit

	// Guard is asked about each message with an Origin, on the goroutine of whoever brings it in, and by several at
	// once; its error refuses the message (ErrRefused), as does a panic. It sees Onward whole. It must not wait and
	// must not change m. nil refuses every such message.
	Guard func(m *Message) error

	// Restart says how the actor goes on after an error or a panic of its worker; nil: it stops.
	Restart *Restart
}

var defaults Options

func (o *Options) limit() int {
	if o.Limit == 0 {
		return DefaultLimit
	}
	return o.Limit
}

// admits asks the guard.
func (o *Options) admits(m *Message) (err error) {
	if m.Origin == nil {
		return nil
	}
	if o.Guard == nil {
		return ErrRefused
	}
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("%w: guard panicked: %v", ErrRefused, v)
		}
	}()
	if err := o.Guard(m); err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return nil
}

// Spawn makes an actor at an address, "" for a new random one, and returns its handle. nil options are the defaults.
// It starts no goroutine. Errors: ErrTaken, ErrStopped on a closed node, ErrRoute for an address that is too long.
func (n *Node) Spawn(at Address, w Worker, o *Options) (*Actor, error) {
	if w == nil {
		return nil, errors.New("spawning an actor: it has no worker")
	}
	if at == "" {
		at = NewAddress()
	}
	if o == nil {
		o = &defaults
	}
	if o.Limit != 0 && (o.Limit < overhead || o.Limit > math.MaxInt32) {
		return nil, fmt.Errorf("spawning the actor %v: its limit of %d bytes is not between %d and %d", at, o.Limit, overhead, math.MaxInt32)
	}
	var buf [1 + MaxAddress]byte
	if len(at) > MaxAddress {
		return nil, fmt.Errorf("spawning an actor: %w", errAddressLong)
	}
	buf[0] = byte(len(at))
	wire := string(buf[:1+copy(buf[1:], at)])
	a := &Actor{wire: wire, worker: w, node: n, opts: o}
	at = a.Address() // shares the memory of a.wire

	s := n.shard(at)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case n.closed.Load():
		return nil, fmt.Errorf("spawning the actor %v: node is %w", at, ErrStopped)
	case s.actors[at] != nil || s.calls[at] != nil:
		return nil, fmt.Errorf("spawning the actor %v: %w", at, ErrTaken)
	case s.actors == nil:
		s.actors = make(map[Address]*Actor)
	}
	n.live.Add(1) // under the lock of a shard that Close has still to visit, hence before it waits
	s.actors[at] = a
	return a, nil
}

// remove takes a stopped actor out of the table.
func (n *Node) remove(a *Actor) {
	s := n.shard(a.Address())
	s.mu.Lock()
	delete(s.actors, a.Address())
	s.mu.Unlock()
}

// List yields the address of every actor, in no order. Actors that come or go meanwhile may be missing or present.
func (n *Node) List() iter.Seq[Address] {
	return func(yield func(Address) bool) {
		var some []Address
		for i := range n.shards {
			s := &n.shards[i]
			some = some[:0]
			s.mu.RLock()
			for at := range s.actors {
				some = append(some, at)
			}
			s.mu.RUnlock()
			for _, at := range some {
				if !yield(at) {
					return
				}
			}
		}
	}
}

// Len returns the number of actors.
func (n *Node) Len() int {
	sum := 0
	for i := range n.shards {
		s := &n.shards[i]
		s.mu.RLock()
		sum += len(s.actors)
		s.mu.RUnlock()
	}
	return sum
}

// Close ends the node: from now on Spawn, Post, Send and Call fail with ErrStopped, and so do those that wait; then every
// actor is stopped in good order (Stop(nil)), and Close returns when the last turn of the last actor is over and its
// watchers are told. It always returns nil and may be called again, and at once.
//
// Close waits for turns that are running and cannot end them: whoever owns the socket or the lock in which a worker may
// be blocked closes it first, or lets the worker see [Actor.Stopping]. A turn must not call Close: it would wait for
// itself.
func (n *Node) Close() error {
	n.closed.Store(true)
	for i := range n.shards {
		s := &n.shards[i]
		s.mu.RLock()
		all := make([]*Actor, 0, len(s.actors))
		for _, a := range s.actors {
			all = append(all, a)
		}
		s.mu.RUnlock()
		for _, a := range all {
			a.Stop(nil)
		}
	}
	n.waits.cut(nil)
	n.live.Wait()
	return nil
}

// log returns the logger.
func (n *Node) log() *slog.Logger {
	if n.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return n.Logger
}
