package routing

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

type remoteFunc func(ctx context.Context, m *Message) error

func (f remoteFunc) Send(ctx context.Context, m *Message) error { return f(ctx, m) }

// gate is a worker that handles a message each time it is let.
type gate struct {
	let  chan struct{}
	got  []string
	errs []error
}

func newGate() *gate { return &gate{let: make(chan struct{})} }

func (g *gate) Receive(_ *Actor, m *Message) error {
	<-g.let
	g.got = append(g.got, string(m.Body))
	if m.Err != nil {
		g.errs = append(g.errs, m.Err)
	}
	return nil
}

// fill posts one message, waits until it is being handled, and posts more until the mailbox is full; it returns how many
// fitted.
func fill(t *testing.T, n *Node, at Address) int {
	t.Helper()
	want(t, n.Post(to(at, "0")), nil)
	synctest.Wait()
	for i := 1; ; i++ {
		if err := n.Post(to(at, fmt.Sprint(i))); err != nil {
			want(t, err, ErrFull)
			return i - 1
		}
	}
}

func TestMailboxIsBoundedInBytes(t *testing.T) {
	for _, tt := range []struct{ limit, body, fit int }{
		{0, 0, 512},
		{1024, 0, 8},
		{1024, 128, 4},
		{1024, 1024 - overhead, 1},
	} {
		t.Run(fmt.Sprintf("%d bytes in %d", tt.body, tt.limit), func(t *testing.T) {
			bubble(t, func(t *testing.T, n *Node) {
				g := newGate()
				spawn(t, n, "a", g, &Options{Limit: tt.limit})
				defer close(g.let)
				want(t, n.Post(to("a", "")), nil)
				synctest.Wait()
				body := strings.Repeat("x", tt.body)
				for range tt.fit {
					want(t, n.Post(to("a", body)), nil)
				}
				want(t, n.Post(to("a", body)), ErrFull)
			})
		})
	}
}

func TestRoutesAreChargedToo(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		g := newGate()
		a := spawn(t, n, "a", g, nil)
		defer close(g.let)
		want(t, n.Post(to("a", "")), nil)
		synctest.Wait()
		m := to("a", "body")
		m.Onward, m.Return = route(t, "a", "beyond"), route(t, "back")
		want(t, n.Post(m), nil)
		if want := int32(overhead + 1 + 6 + 1 + 4 + 4); a.charged != want {
			t.Errorf("charged %d bytes, want %d", a.charged, want)
		}
	})
}

func TestMessageThatNeverFitsIsRefusedAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		for _, full := range []Overflow{Wait, Refuse, DropOldest} {
			spawn(t, n, "a", newGate(), &Options{Limit: 256, Full: full})
			m := to("a", strings.Repeat("x", 129))
			err := n.Send(t.Context(), m)
			want(t, err, ErrFull)
			if m.Onward != route(t, "a") || m.Hops != 0 || len(m.Body) != 129 {
				t.Errorf("refused message was changed: %+v", m)
			}
			n.mustStop(t, "a")
		}
	})
}

// mustStop stops the actor at an address and waits until it is gone.
func (n *Node) mustStop(t *testing.T, at Address) {
	t.Helper()
	a, _ := n.lookup(at)
	if a == nil {
		t.Fatalf("no actor %v", at)
	}
	a.Stop(nil)
	synctest.Wait()
}

func TestSendWaitsForRoom(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		g := newGate()
		spawn(t, n, "a", g, &Options{Limit: 300})
		if fit := fill(t, n, "a"); fit != 2 {
			t.Fatalf("%d messages fitted", fit)
		}
		sent := make(chan string, 3)
		for _, s := range []string{"x", "y", "z"} {
			go func() {
				want(t, n.Send(t.Context(), to("a", s)), nil)
				sent <- s
			}()
			synctest.Wait()
		}
		g.let <- struct{}{}
		synctest.Wait()
		if len(sent) != 1 || <-sent != "x" {
			t.Error("after one message was handled, not the first sender alone went on")
		}
		want(t, n.Post(to("a", "")), ErrFull)
		for range 5 {
			g.let <- struct{}{}
		}
		synctest.Wait()
		if want := []string{"0", "1", "2", "x", "y", "z"}; !slices.Equal(g.got, want) {
			t.Errorf("received %v, want %v", g.got, want)
		}
	})
}

func TestSendThatWaitsEndsWithItsContext(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		g := newGate()
		a := spawn(t, n, "a", g, &Options{Limit: 300})
		defer close(g.let)
		fill(t, n, "a")

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		m, start := to("a", "x"), time.Now()
		err := n.Send(ctx, m)
		want(t, err, ErrTimeout)
		want(t, err, context.DeadlineExceeded)
		if time.Since(start) != time.Second || m.Onward != route(t, "a") || m.Hops != 0 {
			t.Errorf("after %v: %+v", time.Since(start), m)
		}

		reason := errors.New("reason")
		ctx2, cancel2 := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel2(reason) })
		want(t, n.Send(ctx2, m), reason)
		if a.rare != nil {
			t.Error("the actor remembers senders that have left")
		}
	})
}

func TestSendThatWaitsEndsWhenTheReceiverStops(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		g := newGate()
		a := spawn(t, n, "a", g, &Options{Limit: 300})
		fill(t, n, "a")
		done := make(chan error)
		go func() { done <- n.Send(t.Context(), to("a", "x")) }()
		synctest.Wait()
		a.Stop(nil)
		close(g.let)
		want(t, <-done, ErrStopped)
	})
}

func TestSmallSenderPassesWhenTheBigOneInFrontLeaves(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		g := newGate()
		spawn(t, n, "a", g, &Options{Limit: 512})
		want(t, n.Post(to("a", "0")), nil)
		synctest.Wait()
		want(t, n.Post(to("a", strings.Repeat("x", 100))), nil)
		ctx, cancel := context.WithCancel(t.Context())
		big, small := make(chan error, 1), make(chan error, 1)
		go func() { big <- n.Send(ctx, to("a", strings.Repeat("y", 300))) }()
		synctest.Wait()
		go func() { small <- n.Send(t.Context(), to("a", "")) }()
		synctest.Wait()
		if len(small) != 0 {
			t.Error("a small message passed the big one that waits")
		}
		cancel()
		want(t, <-big, context.Canceled)
		want(t, <-small, nil)
		close(g.let)
	})
}

func TestRefuseNeverWaits(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		g := newGate()
		spawn(t, n, "a", g, &Options{Limit: 256, Full: Refuse})
		defer close(g.let)
		fill(t, n, "a")
		want(t, n.Send(t.Context(), to("a", "x")), ErrFull)
	})
}

func TestDropOldestTellsTheSender(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		g, sender := newGate(), newGate()
		close(sender.let)
		a := spawn(t, n, "a", g, &Options{Limit: 512, Full: DropOldest})
		s := spawn(t, n, "sender", sender, nil)
		want(t, s.Post(to("a", "0")), nil)
		synctest.Wait()
		for i := range 5 { // 128 + 8 + 1 bytes each: three fit
			want(t, s.Post(to("a", fmt.Sprint(i+1))), nil)
		}
		synctest.Wait()
		if !slices.Equal(sender.got, []string{"1", "2"}) || len(sender.errs) != 2 {
			t.Errorf("the sender was told of %v, %v", sender.got, sender.errs)
		}
		for _, err := range sender.errs {
			want(t, err, ErrFull)
		}
		want(t, s.Send(t.Context(), to("a", strings.Repeat("x", 370))), nil) // takes all the room
		close(g.let)
		synctest.Wait()
		if len(g.got) != 2 || g.got[0] != "0" || len(g.got[1]) != 370 || a.charged != 0 {
			t.Errorf("received %q, charged %d", g.got, a.charged)
		}
		if !slices.Equal(sender.got, []string{"1", "2", "3", "4", "5"}) {
			t.Errorf("the sender was told of %v", sender.got)
		}
	})
}

func TestGuardDecidesAboutMessagesWithAnOrigin(t *testing.T) {
	no := errors.New("not you")
	for name, tt := range map[string]struct {
		guard  func(*Message) error
		origin any
		is     error
	}{
		"nil guard, origin":    {nil, "peer", ErrRefused},
		"nil guard, no origin": {nil, nil, nil},
		"guard takes it":       {func(m *Message) error { return nil }, "peer", nil},
		"guard refuses":        {func(m *Message) error { return no }, "peer", ErrRefused},
		"guard is not asked":   {func(m *Message) error { return no }, nil, nil},
		"guard panics":         {func(m *Message) error { panic("guard") }, "peer", ErrRefused},
		"guard's reason":       {func(m *Message) error { return no }, "peer", no},
		"guard sees the whole route": {func(m *Message) error {
			_, rest, _ := m.Onward.Pop()
			return map[bool]error{true: nil, false: no}[rest.Len() == 1]
		}, "peer", nil},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, n *Node) {
				received := 0
				spawn(t, n, "a", WorkerFunc(func(_ *Actor, m *Message) error {
					received++
					if m.Origin != tt.origin || m.Onward != route(t, "b") {
						t.Errorf("received %+v", m)
					}
					return nil
				}), &Options{Guard: tt.guard})
				m := &Message{Onward: route(t, "a", "b"), Origin: tt.origin}
				want(t, n.Post(m), tt.is)
				synctest.Wait()
				if received != btoi(tt.is == nil) {
					t.Errorf("received %d messages", received)
				}
			})
		})
	}
}

// TestPeerReachesNobodyThroughAReturnRoute: what a stranger's message causes is judged as the stranger's.
func TestPeerReachesNobodyThroughAReturnRoute(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		spawn(t, n, "private", WorkerFunc(func(_ *Actor, m *Message) error {
			t.Errorf("private actor received %q, %v", m.Body, m.Err)
			return nil
		}), nil)
		var channel []*Message
		spawn(t, n, "channel", WorkerFunc(func(_ *Actor, m *Message) error { channel = append(channel, m); return nil }),
			&Options{Guard: func(m *Message) error {
				if m.Origin != "peer" {
					return ErrRefused
				}
				return nil
			}})
		any := func(*Message) error { return nil }
		hold := make(chan struct{})
		spawn(t, n, "public", WorkerFunc(func(self *Actor, m *Message) error {
			err := self.Reply(m, []byte("answer"))
			if m.Return == route(t, "private") {
				want(t, err, ErrRefused)
			} else {
				want(t, err, nil)
			}
			return nil
		}), &Options{Guard: any})
		dying := spawn(t, n, "dying", WorkerFunc(func(*Actor, *Message) error { <-hold; return nil }), &Options{Guard: any})
		want(t, n.Post(to("dying", "")), nil)
		for _, at := range []Address{"public", "dying"} {
			for _, back := range []Address{"private", "channel"} {
				m := to(at, "")
				m.Return, m.Origin = route(t, back), "peer"
				want(t, n.Post(m), nil)
			}
		}
		dying.Stop(nil)
		close(hold)
		synctest.Wait()
		if len(channel) != 2 {
			t.Fatalf("the peer's channel received %d messages", len(channel))
		}
		for _, m := range channel {
			if m.Origin != "peer" {
				t.Errorf("origin %v", m.Origin)
			}
		}
	})
}

func TestUndeliverableMessageIsATypedError(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		spawn(t, n, "a", WorkerFunc(func(*Actor, *Message) error { return nil }), nil)
		err := n.Post(to("nobody", ""))
		want(t, err, ErrNoActor)
		var d *DeliveryError
		if !errors.As(err, &d) || d.To != "nobody" || err.Error() != "delivering a message to nobody: no such actor" {
			t.Errorf("%v", err)
		}
		want(t, n.Post(&Message{}), ErrUnreachable)
		m := to("a", "")
		m.Hops = MaxHops
		want(t, n.Post(m), ErrRefused)
	})
}

func TestMessageIsInOneMailboxAtATime(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		g := newGate()
		spawn(t, n, "a", g, nil)
		want(t, n.Post(to("a", "")), nil)
		synctest.Wait()
		m := to("a", "")
		want(t, n.Post(m), nil)
		m.Onward = route(t, "a")
		if err := n.Post(m); err == nil {
			t.Error("a message that waits in a mailbox was posted again")
		}
		close(g.let)
	})
}

func TestForwardingInACircleEnds(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var deliveries atomic.Int32
		refused := make(chan error, 1)
		for _, pair := range [][2]Address{{"a", "b"}, {"b", "a"}} {
			spawn(t, n, pair[0], WorkerFunc(func(self *Actor, m *Message) error {
				deliveries.Add(1)
				m.Onward = route(t, pair[1])
				if err := self.Post(m); err != nil {
					refused <- err
				}
				return nil
			}), nil)
		}
		want(t, n.Post(to("a", "")), nil)
		synctest.Wait()
		want(t, <-refused, ErrRefused)
		if got := deliveries.Load(); got != MaxHops {
			t.Errorf("delivered %d times", got)
		}
	})
}

func TestActorSendsInItsOwnName(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var got []Route
		spawn(t, n, "b", WorkerFunc(func(_ *Actor, m *Message) error { got = append(got, m.Return); return nil }), nil)
		a := spawn(t, n, "a", &probe{}, nil)
		want(t, a.Post(to("b", "")), nil)
		want(t, a.Send(t.Context(), to("b", "")), nil)
		m := to("b", "")
		m.Return = route(t, "elsewhere")
		want(t, a.Post(m), nil)
		want(t, a.Reply(&Message{Return: route(t, "b")}, nil), nil)
		want(t, a.Reply(&Message{}, nil), ErrUnreachable)
		synctest.Wait()
		self := route(t, "a")
		if want := []Route{self, self, route(t, "elsewhere"), self}; !slices.Equal(got, want) {
			t.Errorf("return routes %v, want %v", got, want)
		}
	})
}

func TestRemoteCarriesWhatIsNotHere(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var got []*Message
		var fail error
		n.Remote = remoteFunc(func(ctx context.Context, m *Message) error {
			if fail == nil {
				got = append(got, m)
			}
			return fail
		})
		spawn(t, n, "here", &probe{}, nil)
		want(t, n.Post(to("here", "")), nil)
		want(t, n.Post(&Message{Onward: route(t, "far", "beyond")}), nil)
		if len(got) != 1 || got[0].Onward != route(t, "far", "beyond") || got[0].Hops != 1 {
			t.Fatalf("remote got %v", got)
		}
		m := to("far", "")
		m.Origin = "peer"
		want(t, n.Post(m), ErrRefused)
		if len(got) != 1 {
			t.Error("this node forwarded the message of a peer")
		}
		for _, tt := range []struct{ err, is error }{
			{errors.New("no way"), ErrUnreachable},
			{fmt.Errorf("said: %w", ErrNoActor), ErrNoActor},
			{ErrFull, ErrFull},
		} {
			fail = tt.err
			m := to("far", "")
			err := n.Send(t.Context(), m)
			want(t, err, tt.is)
			want(t, err, tt.err)
			if m.Hops != 0 || m.Onward != route(t, "far") {
				t.Errorf("message was changed: %+v", m)
			}
		}
	})
}

func TestPostToRemoteNeverWaits(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		n.Remote = remoteFunc(func(ctx context.Context, m *Message) error { <-ctx.Done(); return context.Cause(ctx) })
		start := time.Now()
		want(t, n.Post(to("far", "")), ErrFull)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		want(t, n.Send(ctx, to("far", "")), ErrTimeout)
		if time.Since(start) != time.Second {
			t.Errorf("Post waited, or Send did not: %v", time.Since(start))
		}
	})
}
