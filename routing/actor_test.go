package routing

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// probe is a worker made of functions, each of which may be missing.
type probe struct {
	receive func(self *Actor, m *Message) error
	drained func(self *Actor) error
	stopped func(err error)
}

func (p *probe) Receive(self *Actor, m *Message) error {
	if p.receive == nil {
		return nil
	}
	return p.receive(self, m)
}

func (p *probe) Drained(self *Actor) error {
	if p.drained == nil {
		return nil
	}
	return p.drained(self)
}

func (p *probe) Stopped(err error) {
	if p.stopped != nil {
		p.stopped(err)
	}
}

func spawn(t testing.TB, n *Node, at Address, w Worker, o *Options) *Actor {
	t.Helper()
	a, err := n.Spawn(at, w, o)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func to(at Address, body string) *Message {
	r, err := NewRoute(at)
	if err != nil {
		panic(err)
	}
	return &Message{Onward: r, Body: []byte(body)}
}

func want(t testing.TB, err, is error) {
	t.Helper()
	if !errors.Is(err, is) {
		t.Errorf("error %v, want %v", err, is)
	}
}

// bubble runs f in virtual time with a node that is closed at the end; a goroutine that is left fails the test.
func bubble(t *testing.T, f func(t *testing.T, n *Node)) {
	synctest.Test(t, func(t *testing.T) {
		var n Node
		before := bubbleGoroutines()
		defer func() {
			n.Close()
			if n.Len() != 0 || len(n.waits.by) != 0 {
				t.Errorf("%d actors and %d waits are left on a closed node", n.Len(), len(n.waits.by))
			}
			for i := range n.shards {
				if len(n.shards[i].calls) != 0 {
					t.Errorf("pending calls are left on a closed node")
				}
			}
			synctest.Wait()
			if left := bubbleGoroutines() - before; left != 0 {
				t.Errorf("%d goroutines are left on a closed node", left)
			}
		}()
		f(t, &n)
	})
}

// bubbleGoroutines counts the goroutines of the caller's bubble, by its mark in their traces.
func bubbleGoroutines() int {
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	return strings.Count(string(buf), "synctest bubble ")
}

func TestMessagesOfOneSenderKeepTheirOrder(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		const senders, each = 8, 500
		next := make(map[byte]int)
		var inside atomic.Int32
		a := spawn(t, n, "a", WorkerFunc(func(_ *Actor, m *Message) error {
			if inside.Add(1) != 1 {
				t.Error("two turns at once")
			}
			defer inside.Add(-1)
			var i int
			fmt.Sscan(string(m.Body[1:]), &i)
			if next[m.Body[0]] != i {
				t.Errorf("sender %c: message %d, want %d", m.Body[0], i, next[m.Body[0]])
			}
			next[m.Body[0]] = i + 1
			return nil
		}), &Options{Limit: 1024}) // so small that senders wait all the time
		var wg sync.WaitGroup
		for s := range senders {
			wg.Go(func() {
				for i := range each {
					if err := n.Send(t.Context(), to("a", fmt.Sprintf("%c%d", 'a'+s, i))); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		synctest.Wait()
		for s := range senders {
			if next[byte('a'+s)] != each {
				t.Errorf("sender %d: %d of %d messages", s, next[byte('a'+s)], each)
			}
		}
		if a.charged != 0 || a.rare != nil || a.tail != nil {
			t.Errorf("idle actor is charged %d bytes and keeps %v", a.charged, a.rare)
		}
	})
}

func TestDrainedFollowsTheLastMessage(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var got []string
		hold := make(chan struct{})
		spawn(t, n, "a", &probe{
			receive: func(_ *Actor, m *Message) error { got = append(got, string(m.Body)); <-hold; return nil },
			drained: func(*Actor) error { got = append(got, "drained"); return nil },
		}, nil)
		for _, s := range []string{"1", "2", "3"} {
			want(t, n.Post(to("a", s)), nil)
		}
		close(hold)
		synctest.Wait()
		want(t, n.Post(to("a", "4")), nil)
		synctest.Wait()
		if !slices.Equal(got, []string{"1", "2", "3", "drained", "4", "drained"}) {
			t.Errorf("turns %v", got)
		}
	})
}

func TestWakeRunsDrainedOnceMore(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		count, hold := 0, make(chan struct{})
		a := spawn(t, n, "a", &probe{drained: func(*Actor) error { count++; <-hold; return nil }}, nil)
		a.Wake()
		synctest.Wait() // the first is running
		for range 5 {
			a.Wake()
		}
		close(hold)
		synctest.Wait()
		if count != 2 {
			t.Errorf("Drained ran %d times, want 2: once, and once for all who woke it meanwhile", count)
		}
	})
}

func TestFloodOfMessagesDoesNotStarveWake(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var woken bool
		left, hold := 100, make(chan struct{})
		a := spawn(t, n, "a", &probe{
			receive: func(self *Actor, m *Message) error {
				<-hold
				if left--; left > 0 {
					return self.Post(to("a", "again")) // the mailbox is never empty
				}
				return nil
			},
			drained: func(*Actor) error { woken = woken || left > 0; return nil },
		}, nil)
		want(t, n.Post(to("a", "first")), nil)
		synctest.Wait()
		a.Wake()
		close(hold)
		synctest.Wait()
		if !woken {
			t.Error("Drained did not run until the flood was over")
		}
	})
}

func TestFloodOfWakesDoesNotStarveMessages(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		left, at := 100, 0
		a := spawn(t, n, "a", &probe{
			receive: func(*Actor, *Message) error { at = left; return nil },
			drained: func(self *Actor) error {
				if left == 100 { // from within the flood: it may be over before another goroutine's turn
					want(t, n.Post(to("a", "")), nil)
				}
				if left--; left > 0 {
					self.Wake()
				}
				return nil
			},
		}, nil)
		a.Wake()
		synctest.Wait()
		if at == 0 {
			t.Error("the message was not received until the flood was over")
		}
	})
}

// goid returns the first line of the caller's stack, which names its goroutine.
func goid() string {
	buf := make([]byte, 64)
	return strings.Fields(string(buf[:runtime.Stack(buf, false)]))[1]
}

func TestRunOfIdleActorRunsOnTheCaller(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var on string
		a := spawn(t, n, "a", &probe{drained: func(*Actor) error { on = goid(); return nil }}, nil)
		a.Run()
		if on != goid() {
			t.Errorf("Drained ran on goroutine %q, the caller is %q", on, goid())
		}
		on = ""
		a.Wake()
		synctest.Wait()
		if on == goid() || on == "" {
			t.Errorf("after Wake, Drained ran on goroutine %q, the caller is %q", on, goid())
		}
	})
}

func TestRunInsideATurnOfTheSameActorWakesIt(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var got []string
		a := spawn(t, n, "a", &probe{
			receive: func(self *Actor, m *Message) error {
				self.Run()
				self.Run()
				got = append(got, "received")
				return nil
			},
			drained: func(self *Actor) error {
				got = append(got, "drained")
				if len(got) == 1 {
					self.Run()
					got = append(got, "after")
				}
				return nil
			},
		}, nil)
		a.Run()
		if want := []string{"drained", "after", "drained"}; !slices.Equal(got, want) {
			t.Errorf("turns %v, want %v", got, want)
		}
		got = nil
		want(t, n.Post(to("a", "")), nil)
		synctest.Wait()
		if want := []string{"received", "drained"}; !slices.Equal(got, want) {
			t.Errorf("turns %v, want %v", got, want)
		}
	})
}

func TestRunHandsMessagesToAGoroutineOfTheActor(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var received string
		a := spawn(t, n, "a", &probe{
			receive: func(*Actor, *Message) error { received = goid(); return nil },
			drained: func(self *Actor) error {
				if received == "" {
					return n.Post(to("a", ""))
				}
				return nil
			},
		}, nil)
		a.Run()
		synctest.Wait()
		if received == "" || received == goid() {
			t.Errorf("received on goroutine %q, the caller of Run is %q", received, goid())
		}
	})
}

func TestRunDoesNotKeepItsCallerForEver(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		caller, passes, rest := goid(), 0, 0
		a := spawn(t, n, "a", &probe{drained: func(self *Actor) error {
			if goid() == caller {
				passes++
			} else {
				rest++
			}
			if passes+rest < 20 {
				self.Wake()
			}
			return nil
		}}, nil)
		a.Run()
		synctest.Wait()
		if passes != inlinePasses || passes+rest != 20 {
			t.Errorf("%d passes on the caller, %d on a goroutine of the actor's", passes, rest)
		}
	})
}

// TestNoWakeUpIsLost has many goroutines put things into a queue of their own and wake the actor in all ways there are.
func TestNoWakeUpIsLost(t *testing.T) {
	const callers, each = 8, 2000
	var n Node
	var mu sync.Mutex
	var queue []int
	var inside atomic.Int32
	handled, messages, all := 0, 0, make(chan struct{})
	turn := func() func() {
		if inside.Add(1) != 1 {
			t.Error("two turns at once")
		}
		return func() {
			if handled == callers*each && messages == callers*each/4 {
				close(all)
				handled++
			}
			inside.Add(-1)
		}
	}
	a := spawn(t, &n, "a", &probe{
		receive: func(*Actor, *Message) error { defer turn()(); messages++; return nil },
		drained: func(*Actor) error {
			defer turn()()
			mu.Lock()
			defer mu.Unlock()
			handled += len(queue)
			queue = queue[:0]
			return nil
		},
	}, &Options{Limit: 1 << 20})
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for i := range each {
				mu.Lock()
				queue = append(queue, i)
				mu.Unlock()
				if i%2 == 0 {
					a.Run()
				} else {
					a.Wake()
				}
				if i%4 == 0 {
					if err := n.Send(t.Context(), to("a", "")); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	select {
	case <-all:
	case <-time.After(20 * time.Second): // real time, and only for a test that has failed
		t.Errorf("%d things and %d messages are lost", callers*each-handled, callers*each/4-messages)
	}
	n.Close()
}

func TestStopRunsStoppedOnceAndLast(t *testing.T) {
	for _, how := range []string{"idle", "in Receive", "in Drained", "in inline Run", "from another goroutine in a turn", "while waiting in Send", "twice"} {
		t.Run(how, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *Node) {
				reason := errors.New("reason")
				var stopped []error
				var a *Actor
				hold := make(chan struct{})
				p := &probe{stopped: func(err error) { stopped = append(stopped, err) }}
				a = spawn(t, n, "a", p, nil)
				alive := func() {
					t.Helper()
					if len(stopped) != 0 {
						t.Error("Stopped before the turn was over")
					}
				}
				switch how {
				case "idle":
					a.Stop(reason)
				case "in Receive":
					p.receive = func(self *Actor, _ *Message) error { self.Stop(reason); alive(); return errors.New("later") }
					want(t, n.Post(to("a", "")), nil)
				case "in Drained":
					p.drained = func(self *Actor) error { self.Stop(reason); alive(); return nil }
					a.Wake()
				case "in inline Run":
					p.drained = func(self *Actor) error { self.Stop(reason); alive(); return nil }
					a.Run()
				case "from another goroutine in a turn":
					p.drained = func(self *Actor) error { <-hold; alive(); return nil }
					a.Wake()
					synctest.Wait()
					a.Stop(reason)
					synctest.Wait()
					close(hold)
				case "while waiting in Send":
					spawn(t, n, "full", WorkerFunc(func(*Actor, *Message) error { <-hold; return nil }), &Options{Limit: 256})
					p.receive = func(self *Actor, _ *Message) error {
						for {
							if err := self.Send(t.Context(), to("full", "")); err != nil {
								want(t, err, ErrStopped)
								return nil
							}
						}
					}
					n.Post(to("a", ""))
					synctest.Wait()
					a.Stop(reason)
					synctest.Wait()
					close(hold)
				case "twice":
					p.drained = func(*Actor) error { <-hold; return nil }
					a.Wake()
					synctest.Wait()
					a.Stop(reason)
					a.Stop(nil)
					close(hold)
				}
				synctest.Wait()
				if !slices.Equal(stopped, []error{reason}) {
					t.Errorf("Stopped with %v", stopped)
				}
				if n.Len() != btoi(how == "while waiting in Send") {
					t.Errorf("%d actors are left", n.Len())
				}
				a.Stop(nil)
				a.Wake()
				a.Run()
				want(t, n.Post(to("a", "")), ErrNoActor)
				synctest.Wait()
				if len(stopped) != 1 {
					t.Errorf("Stopped again: %v", stopped)
				}
				select {
				case <-a.Stopping():
				default:
					t.Error("Stopping of a stopped actor is open")
				}
			})
		})
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func TestStoppedActorReturnsItsMail(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		hold := make(chan struct{})
		var reports []*Message
		spawn(t, n, "sender", WorkerFunc(func(self *Actor, m *Message) error {
			if m.Err != nil {
				reports = append(reports, m)
				return nil
			}
			for i := range 3 {
				want(t, self.Post(to("a", fmt.Sprint(i))), nil)
			}
			return nil
		}), nil)
		a := spawn(t, n, "a", WorkerFunc(func(*Actor, *Message) error { <-hold; return nil }), nil)
		want(t, n.Post(to("sender", "go")), nil)
		synctest.Wait()
		a.Stop(nil)
		want(t, n.Post(to("a", "late")), ErrStopped)
		close(hold)
		synctest.Wait()
		if len(reports) != 2 {
			t.Fatalf("%d reports, want 2: one of three messages was being handled", len(reports))
		}
		for i, m := range reports {
			want(t, m.Err, ErrStopped)
			var d *DeliveryError
			if !errors.As(m.Err, &d) || d.To != "a" || m.Return != route(t, "a") || string(m.Body) != fmt.Sprint(i+1) {
				t.Errorf("report %d: %v from %v about %q", i, m.Err, m.Return, m.Body)
			}
		}
	})
}

func TestNoErrorForAnError(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		hold := make(chan struct{})
		received := 0
		spawn(t, n, "b", WorkerFunc(func(*Actor, *Message) error { received++; return nil }), nil)
		a := spawn(t, n, "a", WorkerFunc(func(*Actor, *Message) error { <-hold; return nil }), nil)
		report := to("a", "")
		report.Return, report.Err = route(t, "b"), ErrStopped
		want(t, n.Post(to("a", "")), nil)
		want(t, n.Post(report), nil)
		a.Stop(nil)
		close(hold)
		synctest.Wait()
		if received != 0 {
			t.Error("a report that was not delivered was answered by another")
		}
	})
}

func TestPanicStopsOneActorAlone(t *testing.T) {
	boom := errors.New("boom")
	for name, tt := range map[string]struct {
		p     probe
		start func(n *Node, a *Actor)
	}{
		"in Receive":     {probe{receive: func(*Actor, *Message) error { panic(boom) }}, func(n *Node, a *Actor) { n.Post(to("a", "")) }},
		"in Drained":     {probe{drained: func(*Actor) error { panic(boom) }}, func(n *Node, a *Actor) { a.Wake() }},
		"in inline Run":  {probe{drained: func(*Actor) error { panic(boom) }}, func(n *Node, a *Actor) { a.Run() }},
		"of its own":     {probe{}, func(n *Node, a *Actor) { a.Watch("nobody", func(error) { panic(boom) }) }},
		"after its Stop": {probe{receive: func(self *Actor, _ *Message) error { self.Stop(nil); panic(boom) }}, func(n *Node, a *Actor) { n.Post(to("a", "")) }},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *Node) {
				var log bytes.Buffer
				n.Logger = slog.New(slog.NewTextHandler(&log, nil))
				received := 0
				spawn(t, n, "neighbour", WorkerFunc(func(*Actor, *Message) error { received++; return nil }), nil)
				var stopped, told []error
				p := tt.p
				p.stopped = func(err error) { stopped = append(stopped, err) }
				a := spawn(t, n, "a", &p, nil)
				n.Watch("a", func(err error) {
					if len(stopped) != 1 {
						t.Error("watcher told before Stopped")
					}
					told = append(told, err)
				})
				tt.start(n, a)
				synctest.Wait()
				if len(stopped) != 1 || len(told) != 1 || stopped[0] != told[0] {
					t.Fatalf("Stopped with %v, watcher told %v", stopped, told)
				}
				var p2 *PanicError
				if !errors.As(told[0], &p2) || !errors.Is(told[0], boom) || !bytes.Contains(p2.Stack, []byte("actor_test.go")) {
					t.Errorf("told %v", told[0])
				}
				if s := log.String(); strings.Count(s, "level=ERROR") != 1 || !strings.Contains(s, "actor=a") || !strings.Contains(s, "boom") || !strings.Contains(s, "actor_test.go") {
					t.Errorf("log: %s", s)
				}
				want(t, n.Post(to("neighbour", "")), nil)
				synctest.Wait()
				if received != 1 {
					t.Error("the neighbour is gone")
				}
			})
		})
	}
}

func TestPanicInStoppedOrWatcherKeepsNothingFromEnding(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		a := spawn(t, n, "a", &probe{stopped: func(error) { panic("in Stopped") }}, nil)
		told := 0
		n.Watch("a", func(error) { told++; panic("in watcher") })
		n.Watch("a", func(error) { told++ })
		a.Stop(nil)
		synctest.Wait()
		if n.Len() != 0 || told != 2 {
			t.Errorf("%d actors are left, %d watchers told", n.Len(), told)
		}
	})
}

func TestGoexitStopsTheActor(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var told []error
		for _, at := range []Address{"receive", "drained", "stopped"} {
			p := &probe{}
			a := spawn(t, n, at, p, nil)
			n.Watch(at, func(err error) { told = append(told, err) })
			switch at {
			case "receive":
				p.receive = func(*Actor, *Message) error { runtime.Goexit(); return nil }
				want(t, n.Post(to(at, "")), nil)
			case "drained":
				p.drained = func(*Actor) error { runtime.Goexit(); return nil }
				a.Wake()
			case "stopped":
				p.stopped = func(error) { runtime.Goexit() }
				a.Stop(errors.New("reason"))
			}
			synctest.Wait()
		}
		if n.Len() != 0 || len(told) != 3 || slices.Contains(told, nil) {
			t.Errorf("%d actors are left, told %v", n.Len(), told)
		}
	})
}

func TestErrorOfReceiveStopsTheActorWithIt(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		reason := errors.New("reason")
		var told error
		spawn(t, n, "a", WorkerFunc(func(*Actor, *Message) error { return reason }), nil)
		n.Watch("a", func(err error) { told = err })
		want(t, n.Post(to("a", "")), nil)
		synctest.Wait()
		if told != reason {
			t.Errorf("told %v", told)
		}
	})
}

func TestStoppingIsClosedByStop(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		a := spawn(t, n, "a", WorkerFunc(func(self *Actor, _ *Message) error { <-self.Stopping(); return nil }), nil)
		want(t, n.Post(to("a", "")), nil)
		synctest.Wait()
		a.Stop(nil)
		synctest.Wait()
		if n.Len() != 0 {
			t.Error("the worker did not hear that it was stopped")
		}
	})
}

func TestSpawnRefusals(t *testing.T) {
	var n Node
	nop := WorkerFunc(func(*Actor, *Message) error { return nil })
	spawn(t, &n, "a", nop, nil)
	for name, tt := range map[string]struct {
		at Address
		w  Worker
		o  *Options
		is error
	}{
		"taken":          {"a", nop, nil, ErrTaken},
		"long address":   {Address(strings.Repeat("x", 65)), nop, nil, ErrRoute},
		"no worker":      {"b", nil, nil, nil},
		"limit too low":  {"b", nop, &Options{Limit: 127}, nil},
		"negative limit": {"b", nop, &Options{Limit: -1}, nil},
	} {
		if a, err := n.Spawn(tt.at, tt.w, tt.o); a != nil || err == nil || tt.is != nil && !errors.Is(err, tt.is) {
			t.Errorf("%s: %v, %v", name, a, err)
		}
	}
	if a := spawn(t, &n, "", nop, nil); len(a.Address()) != 16 {
		t.Errorf("address %v", a.Address())
	}
	if got := slices.Collect(n.List()); len(got) != 2 || !slices.Contains(got, "a") || n.Len() != 2 {
		t.Errorf("listed %v of %d", got, n.Len())
	}
	n.Close()
	_, err := n.Spawn("b", nop, nil)
	want(t, err, ErrStopped)
}

func TestCloseWaitsForTheLastTurn(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var over atomic.Bool
		spawn(t, n, "a", &probe{
			receive: func(*Actor, *Message) error { time.Sleep(time.Hour); return nil },
			stopped: func(err error) {
				want(t, err, nil)
				time.Sleep(time.Hour)
			},
		}, nil)
		n.Watch("a", func(error) { over.Store(true) })
		for range 100 {
			spawn(t, n, "", &probe{}, nil)
		}
		want(t, n.Post(to("a", "")), nil)
		synctest.Wait()
		start := time.Now()
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				n.Close()
				if !over.Load() || time.Since(start) != 2*time.Hour || n.Len() != 0 {
					t.Errorf("Close returned after %v, %d actors are left", time.Since(start), n.Len())
				}
			})
		}
		wg.Wait()
		want(t, n.Post(to("a", "")), ErrStopped)
		want(t, n.Send(t.Context(), to("a", "")), ErrStopped)
		_, err := n.Call(t.Context(), to("a", ""))
		want(t, err, ErrStopped)
	})
}

func TestCloseEndsEveryWait(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		n.Remote = remoteFunc(func(ctx context.Context, m *Message) error { <-ctx.Done(); return context.Cause(ctx) })
		spawn(t, n, "mute", WorkerFunc(func(*Actor, *Message) error { return nil }), nil)
		spawn(t, n, "stuck", WorkerFunc(func(self *Actor, _ *Message) error { <-self.Stopping(); return nil }), &Options{Limit: 128})
		spawn(t, n, "caller", WorkerFunc(func(self *Actor, _ *Message) error {
			_, err := self.Call(t.Context(), to("mute", ""))
			want(t, err, ErrStopped)
			return nil
		}), nil)
		want(t, n.Post(to("caller", "")), nil)
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if err := n.Send(t.Context(), to("stuck", "")); err != nil {
					want(t, err, ErrStopped)
				}
			})
		}
		wg.Go(func() { want(t, n.Send(t.Context(), to("far", "")), ErrStopped) })
		wg.Go(func() {
			_, err := n.Call(t.Context(), to("far", ""))
			want(t, err, ErrStopped)
		})
		wg.Go(func() {
			_, err := n.Call(t.Context(), to("mute", ""))
			want(t, err, ErrStopped)
		})
		synctest.Wait()
		n.Close()
		wg.Wait()
	})
}
