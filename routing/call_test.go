package routing

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// echo answers with the body it got.
var echo = WorkerFunc(func(self *Actor, m *Message) error { return self.Reply(m, m.Body) })

func TestCallReturnsTheAnswer(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		spawn(t, n, "echo", echo, nil)
		answer, err := n.Call(t.Context(), to("echo", "hello"))
		if err != nil || string(answer.Body) != "hello" || answer.Return != route(t, "echo") || answer.Onward != (Route{}) {
			t.Errorf("%+v, %v", answer, err)
		}
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				self := NewAddress()
				answer, err := n.Call(t.Context(), to("echo", string(self)))
				if err != nil || string(answer.Body) != string(self) {
					t.Errorf("%+v, %v", answer, err)
				}
			})
		}
		wg.Wait()
	})
}

func TestCallWithoutAnAnswer(t *testing.T) {
	no := errors.New("no")
	for name, tt := range map[string]struct {
		w  Worker
		is error
	}{
		"nobody there": {nil, ErrNoActor},
		"not answered": {&probe{}, ErrTimeout},
		"fails":        {WorkerFunc(func(*Actor, *Message) error { return no }), ErrStopped},
		"panics":       {WorkerFunc(func(*Actor, *Message) error { panic(no) }), ErrStopped},
		"stops":        {WorkerFunc(func(self *Actor, _ *Message) error { self.Stop(nil); return nil }), ErrStopped},
		"keeps it and stops": {WorkerFunc(func(self *Actor, _ *Message) error {
			time.AfterFunc(time.Millisecond, func() { self.Stop(no) })
			return nil
		}), ErrStopped},
		"answers with itself": {WorkerFunc(func(self *Actor, m *Message) error {
			_, err := self.Call(context.Background(), to("a", ""))
			return err
		}), ErrStopped},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *Node) {
				if tt.w != nil {
					spawn(t, n, "a", tt.w, nil)
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				start := time.Now()
				m, err := n.Call(ctx, to("a", ""))
				want(t, err, tt.is)
				if m != nil || tt.is != ErrTimeout && time.Since(start) >= time.Second {
					t.Errorf("%+v after %v", m, time.Since(start))
				}
			})
		})
	}
}

func TestLateAnswerIsNobodys(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var late, twice error
		spawn(t, n, "slow", WorkerFunc(func(self *Actor, m *Message) error {
			time.Sleep(time.Minute)
			late = self.Reply(m, nil)
			return nil
		}), nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := n.Call(ctx, to("slow", ""))
		want(t, err, ErrTimeout)
		time.Sleep(time.Hour)
		synctest.Wait()
		want(t, late, ErrNoActor)

		spawn(t, n, "twice", WorkerFunc(func(self *Actor, m *Message) error {
			m.Origin = nil
			if err := self.Reply(m, []byte("first")); err != nil {
				return err
			}
			twice = self.Reply(m, []byte("second"))
			return nil
		}), nil)
		answer, err := n.Call(t.Context(), to("twice", ""))
		if err != nil || string(answer.Body) != "first" {
			t.Errorf("%+v, %v", answer, err)
		}
		synctest.Wait()
		want(t, twice, ErrNoActor)
	})
}

func TestCallInTheMailboxOfAStoppedActorFails(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		g := newGate()
		a := spawn(t, n, "a", g, nil)
		want(t, n.Post(to("a", "")), nil)
		synctest.Wait()
		done := make(chan error)
		go func() {
			_, err := n.Call(t.Context(), to("a", ""))
			done <- err
		}()
		synctest.Wait()
		a.Stop(nil)
		close(g.let)
		want(t, <-done, ErrStopped)
	})
}

func TestCallFollowsTheQuestion(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var b *Actor
		spawn(t, n, "a", WorkerFunc(func(self *Actor, m *Message) error {
			m.Onward = route(t, "b")
			return errors.Join(self.Post(m), errors.New("a fails, but b has the question"))
		}), nil)
		b = spawn(t, n, "b", WorkerFunc(func(self *Actor, m *Message) error {
			time.Sleep(time.Second)
			if string(m.Body) == "stop" {
				return errors.New("reason")
			}
			return self.Reply(m, []byte("from b"))
		}), nil)
		answer, err := n.Call(t.Context(), to("a", ""))
		if err != nil || string(answer.Body) != "from b" {
			t.Errorf("%+v, %v", answer, err)
		}
		synctest.Wait()
		if n.Len() != 1 || b.rare != nil {
			t.Errorf("%d actors, b keeps %+v", n.Len(), b.rare)
		}
		spawn(t, n, "a", WorkerFunc(func(self *Actor, m *Message) error {
			m.Onward = route(t, "b")
			return self.Post(m)
		}), nil)
		_, err = n.Call(t.Context(), to("a", "stop"))
		want(t, err, ErrStopped)
	})
}

func TestErrorFromAnotherNodeEndsTheCall(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		n.Remote = remoteFunc(func(_ context.Context, m *Message) error {
			go func() { // as a lane reader would
				b, _ := (&Message{Onward: m.Return, Err: ErrNoActor}).AppendBinary(nil)
				back, err := DecodeMessage(b)
				if err != nil {
					t.Error(err)
				}
				back.Origin = "peer"
				want(t, n.Post(back), nil)
			}()
			return nil
		})
		_, err := n.Call(t.Context(), to("far", ""))
		want(t, err, ErrNoActor)
		var d *DeliveryError
		if !errors.As(err, &d) || d.To != "far" {
			t.Errorf("%v", err)
		}
	})
}

func TestCallThatIsRefusedLeavesTheMessage(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		m := to("nobody", "")
		m.Return = route(t, "me")
		_, err := n.Call(t.Context(), m)
		want(t, err, ErrNoActor)
		if m.Return != route(t, "me") || m.call != nil || m.Hops != 0 {
			t.Errorf("%+v", m)
		}
	})
}

// circle makes n actors of which each calls or sends to the next when it is told to, and tells all to at once. It returns
// their errors.
func circle(t *testing.T, n *Node, names []Address, send bool) []error {
	t.Helper()
	errs := make([]error, len(names))
	start := make(chan struct{})
	for i, at := range names {
		next := names[(i+1)%len(names)]
		spawn(t, n, at, WorkerFunc(func(self *Actor, m *Message) error {
			switch string(m.Body) {
			case "go":
				<-start
				if send {
					// Full in any case: each mailbox has room for one and each actor sends two.
					for range 2 {
						errs[i] = errors.Join(errs[i], self.Send(t.Context(), to(next, "x")))
					}
					return nil
				}
				_, errs[i] = self.Call(t.Context(), to(next, "x"))
				return nil
			}
			if send {
				return nil
			}
			return self.Reply(m, nil)
		}), &Options{Limit: 2*overhead - 1})
	}
	for _, at := range names {
		want(t, n.Post(to(at, "go")), nil)
	}
	synctest.Wait()
	close(start)
	synctest.Wait() // a deadlock would leave them blocked for ever, and the bubble would say so
	return errs
}

func TestCircleOfWaitingActorsIsFound(t *testing.T) {
	for _, names := range [][]Address{{"a"}, {"a", "b"}, {"a", "b", "c"}, {"a", "b", "c", "d", "e", "f", "g", "h"}} {
		for _, send := range []bool{false, true} {
			for range 20 { // all orders of the last step
				bubble(t, func(t *testing.T, n *Node) {
					errs := circle(t, n, names, send)
					cycles := 0
					for _, err := range errs {
						if err != nil {
							want(t, err, ErrCycle)
							cycles++
						}
					}
					if cycles != 1 {
						t.Errorf("%d actors, send %v: %d got ErrCycle, want 1: %v", len(names), send, cycles, errs)
					}
				})
			}
		}
	}
}

func TestCircleOfSendAndCallIsFound(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var err error
		hold := make(chan struct{})
		spawn(t, n, "a", WorkerFunc(func(self *Actor, m *Message) error {
			if m.Err != nil || string(m.Body) != "go" {
				return nil
			}
			<-hold
			self.Call(t.Context(), to("b", ""))
			return nil
		}), &Options{Limit: 2 * overhead})
		spawn(t, n, "b", WorkerFunc(func(self *Actor, m *Message) error {
			for err == nil {
				err = self.Send(t.Context(), to("a", "")) // full at the second
			}
			return self.Reply(m, nil)
		}), nil)
		want(t, n.Post(to("a", "go")), nil)
		synctest.Wait()
		close(hold)
		synctest.Wait()
		want(t, err, ErrCycle)
	})
}

func TestCircleThatForwardingClosesIsFound(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var err error
		release := make(chan struct{})
		// a calls b; c calls a and waits; then b sends a's question on to c.
		spawn(t, n, "a", WorkerFunc(func(self *Actor, m *Message) error {
			if string(m.Body) == "go" {
				var answer *Message
				if answer, err = self.Call(t.Context(), to("b", "")); err == nil && string(answer.Body) != "from b" {
					t.Errorf("answer %q", answer.Body)
				}
				return nil
			}
			return self.Reply(m, nil)
		}), nil)
		spawn(t, n, "b", WorkerFunc(func(self *Actor, m *Message) error {
			<-release
			m.Onward = route(t, "c")
			want(t, self.Post(m), ErrCycle)
			return self.Reply(m, []byte("from b"))
		}), nil)
		var answered error
		spawn(t, n, "c", WorkerFunc(func(self *Actor, m *Message) error {
			if string(m.Body) == "go" {
				_, answered = self.Call(t.Context(), to("a", "question"))
			}
			return nil
		}), nil)
		want(t, n.Post(to("a", "go")), nil)
		synctest.Wait()
		want(t, n.Post(to("c", "go")), nil)
		synctest.Wait()
		close(release)
		synctest.Wait()
		want(t, err, nil)
		want(t, answered, nil)
	})
}

func TestWaitingIsNoCircle(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		// A diamond: b and c both call d, a calls both, and everybody is slow.
		var got []string
		relay := func(at Address) Worker {
			return WorkerFunc(func(self *Actor, m *Message) error {
				time.Sleep(time.Second)
				answer, err := self.Call(t.Context(), to("d", string(at)))
				if err != nil {
					t.Error(err)
				}
				return self.Reply(m, answer.Body)
			})
		}
		spawn(t, n, "b", relay("b"), nil)
		spawn(t, n, "c", relay("c"), nil)
		spawn(t, n, "d", WorkerFunc(func(self *Actor, m *Message) error { time.Sleep(time.Second); return self.Reply(m, m.Body) }), nil)
		spawn(t, n, "a", WorkerFunc(func(self *Actor, m *Message) error {
			for _, at := range []Address{"b", "c", "b"} {
				answer, err := self.Call(t.Context(), to(at, ""))
				if err != nil {
					t.Error(err)
					continue
				}
				got = append(got, string(answer.Body))
			}
			return nil
		}), nil)
		want(t, n.Post(to("a", "")), nil)
		_, err := n.Call(t.Context(), to("b", ""))
		want(t, err, nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		if !slices.Equal(got, []string{"b", "c", "b"}) {
			t.Errorf("answers %v", got)
		}
	})
}
