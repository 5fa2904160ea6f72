package routing

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestEveryActorEndsOnceInAStorm has actors send, call, watch, wake, fail and stop one another at random, and closes the
// node in the middle of it. Each must be stopped once and told of once, two turns must never overlap, and nothing may be
// left: the bubble sees to goroutines, waits and pending calls.
func TestEveryActorEndsOnceInAStorm(t *testing.T) {
	for seed := range uint64(20) {
		bubble(t, func(t *testing.T, n *Node) {
			const count = 24
			names := make([]Address, count)
			for i := range names {
				names[i] = Address([]byte{'a' + byte(i)})
			}
			var spawned, stopped, watched, told atomic.Int32
			var mu sync.Mutex
			rng := rand.New(rand.NewPCG(seed, 0))
			dice := func(sides int) int {
				mu.Lock()
				defer mu.Unlock()
				return rng.IntN(sides)
			}
			var make func(at Address, o *Options)
			make = func(at Address, o *Options) {
				var inside atomic.Int32
				act := func(self *Actor) error {
					if inside.Add(1) != 1 {
						t.Error("two turns at once")
					}
					defer inside.Add(-1)
					other := names[dice(count)]
					ctx, cancel := context.WithTimeout(context.Background(), time.Second)
					defer cancel()
					switch dice(12) {
					case 0, 1, 2:
						self.Post(to(other, "x"))
					case 3, 4:
						self.Send(ctx, to(other, "x"))
					case 5, 6:
						self.Call(ctx, to(other, "x"))
					case 7:
						self.Watch(other, func(error) {})
					case 8:
						if a, _ := n.lookup(other); a != nil {
							a.Run()
						}
					case 9:
						time.Sleep(time.Millisecond)
					case 10:
						if dice(4) == 0 {
							panic("dice")
						}
					case 11:
						if a, _ := n.lookup(other); a != nil && dice(4) == 0 {
							a.Stop(nil)
						}
					}
					return nil
				}
				_, err := n.Spawn(at, &probe{
					receive: func(self *Actor, m *Message) error {
						err := act(self)
						if m.Return.Len() > 0 && m.Err == nil && dice(2) == 0 {
							self.Reply(m, nil)
						}
						return err
					},
					drained: act,
					stopped: func(error) { stopped.Add(1) },
				}, o)
				if err != nil {
					want(t, err, ErrStopped)
					return
				}
				spawned.Add(1)
				watched.Add(1)
				n.Watch(at, func(err error) {
					told.Add(1)
					if err == nil || !errors.Is(err, ErrNoActor) {
						make(at, o)
					}
				})
			}
			for i, at := range names {
				o := &Options{Limit: 300, Full: Overflow(i % 3)}
				if i%4 == 0 {
					o.Restart = &Restart{Min: time.Millisecond, Max: time.Millisecond}
				}
				make(at, o)
			}
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for !n.closed.Load() {
						ctx, cancel := context.WithTimeout(t.Context(), time.Second)
						at := names[dice(count)]
						if dice(2) == 0 {
							n.Send(ctx, to(at, "x"))
						} else {
							n.Call(ctx, to(at, "x"))
						}
						cancel()
						time.Sleep(time.Microsecond)
					}
				})
			}
			time.Sleep(20 * time.Millisecond)
			n.Close()
			wg.Wait()
			t.Logf("spawned %d", spawned.Load())
			if spawned.Load() != stopped.Load() || watched.Load() != told.Load() || spawned.Load() < count {
				t.Errorf("spawned %d, stopped %d; watched %d, told %d", spawned.Load(), stopped.Load(), watched.Load(), told.Load())
			}
		})
	}
}
