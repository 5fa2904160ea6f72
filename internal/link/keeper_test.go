package link_test

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
)

func TestBackOffDoublesToThreeTenthsOfASecondForAMinuteThenToThirtySeconds(t *testing.T) {
	in(t, func(w *town) {
		begin := time.Now()
		var tries []time.Time
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{{Name: "down", Dial: func(context.Context) (net.Conn, error) {
			tries = append(tries, time.Now())
			return nil, errDown
		}}}}
		stop := w.run(k.Run)
		w.sleep(time.Hour)
		stop()
		want := 50 * time.Millisecond
		for i := 1; i < len(tries); i++ {
			if gap := tries[i].Sub(tries[i-1]); gap < want/2 || gap > want*3/2 {
				t.Fatalf("try %d came %v after the one before, want %v ± 50 %%", i, gap, want)
			}
			limit := 30 * time.Second
			if tries[i].Sub(begin) < time.Minute {
				limit = 300 * time.Millisecond
			}
			want = min(2*want, limit)
		}
		if len(tries) < 200 || len(tries) > 500 { // ~200 in the first minute, then 2 a minute
			t.Errorf("%d tries in an hour", len(tries))
		}
	})
}

func TestEachNextTryIsToldAndComesThen(t *testing.T) {
	in(t, func(w *town) {
		var due []time.Time
		tries := 0
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{{Name: "down", Dial: func(context.Context) (net.Conn, error) {
			if tries > 0 && (len(due) != tries || !due[tries-1].Equal(time.Now())) {
				t.Errorf("try %d comes at %v, %d were told: %v", tries, time.Now(), len(due), due[max(len(due)-1, 0):])
			}
			tries++
			return nil, errDown
		}}}, OnState: func(s link.State) { due = append(due, time.Now().Add(s.Next)) }}
		stop := w.run(k.Run)
		w.sleep(5 * time.Minute)
		stop()
		if tries < 100 {
			t.Errorf("%d tries", tries)
		}
	})
}

func TestACutChannelIsReplacedWithinASecond(t *testing.T) {
	in(t, func(w *town) {
		stopServer := w.serve(w.server(), "10.0.0.2:1")
		var states told
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.2:1")}, OnState: states.add}
		stop := w.run(k.Run)
		first := w.get(k)
		c := w.open(first)
		w.sleep(time.Minute)

		cut := time.Now()
		w.lane(0).Cut()
		if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("a stream of the cut channel reads %v, want a reset", err)
		}
		if err := k.Wait(context.Background(), first); err != nil {
			t.Fatal(err)
		}
		second := w.get(k)
		if second == first || time.Since(cut) > time.Second {
			t.Errorf("a new channel: %v, after %v", second != first, time.Since(cut))
		}
		w.echoes(w.open(second))
		stop()
		want := []link.StateKind{link.Ready, link.Waiting, link.Ready, link.Draining}
		if got := states.kinds(); !slices.Equal(got, want) {
			t.Errorf("the states were %v, want %v", got, want)
		}
		stopServer()
	})
}

func TestAFarEndThatHangsUpIsNotDialledInALoop(t *testing.T) {
	in(t, func(w *town) {
		s := w.server()
		s.Limits.Channels = 1
		stopServer := w.serve(s, "10.0.0.2:1")
		holder := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.2:1")}}
		stopHolder := w.run(holder.Run)
		w.get(holder)

		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.2:1")}}
		stop := w.run(k.Run)
		w.sleep(10 * time.Minute)
		if n := w.dialled() - 1; n < 10 || n > 60 {
			t.Errorf("%d channels in ten minutes to an end that takes none", n)
		}
		stopHolder() // its place is free
		w.sleep(time.Minute)
		if l := k.Live(); l == nil || k.State().Kind != link.Ready {
			t.Errorf("not ready a minute after a place came free: %+v", k.State())
		}
		stop()
		stopServer()
	})
}

func TestARefusalIsTriedAgainSeldomOrOnANewCredential(t *testing.T) {
	in(t, func(w *town) {
		stopServer := w.serve(w.server(), "10.0.0.2:1")
		var states told
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.2:1")}, OnState: states.add}
		k.Config.Judge = func(*identity.Peer) error { return errors.New("not this one") }
		stop := w.run(k.Run)
		synctest.Wait()
		if got := states.kinds(); !slices.Equal(got, []link.StateKind{link.Refused}) {
			t.Fatalf("the states were %v", got)
		}
		w.sleep(10 * time.Minute)
		if n := w.dialled(); n < 14 || n > 41 {
			t.Errorf("refused %d times in ten minutes, want once in 30 s ± 50 %%", n)
		}
		before := w.dialled()
		w.renew(k.Config.Self, 2*time.Hour)
		synctest.Wait()
		if n := w.dialled() - before; n != 1 {
			t.Errorf("a new credential is shown %d times at once", n)
		}
		stop()
		stopServer()
	})
}

func TestATryThatTheEndCutsShortIsNoReason(t *testing.T) {
	in(t, func(w *town) {
		var states told
		refused := false
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{{Name: "down, then silent", Dial: func(context.Context) (net.Conn, error) {
			if !refused {
				refused = true
				return nil, errDown
			}
			near, far := memnet.Pipe(memnet.Link{})
			w.Cleanup(func() { far.Close() })
			return near, nil
		}}}, OnState: states.add}
		deadline := time.Now().Add(time.Second)
		ctx, cancel := context.WithDeadline(context.Background(), deadline.Add(time.Millisecond))
		defer cancel()
		k.Run(lateContext{ctx, deadline})
		if got := states.kinds(); !slices.Equal(got, []link.StateKind{link.Waiting, link.Draining}) || !errors.Is(states.states[0].Err, errDown) {
			t.Errorf("the states were %v, want waiting and draining: %+v", got, states.states)
		}
	})
}

// A lateContext says a little late that its deadline has passed.
type lateContext struct {
	context.Context
	deadline time.Time
}

func (c lateContext) Deadline() (time.Time, bool) { return c.deadline, true }

func TestTheRenewalBeforeADialDoesNotHurryTheNextOne(t *testing.T) {
	in(t, func(w *town) {
		life := time.Hour
		var tries atomic.Int64
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{{Name: "down", Dial: func(context.Context) (net.Conn, error) {
			tries.Add(1)
			return nil, &channel.Refused{Err: errDown}
		}}}}
		k.Fresh = func(context.Context) error {
			life += time.Minute
			w.renew(k.Config.Self, life)
			return nil
		}
		stop := w.run(k.Run)
		w.sleep(14 * time.Second)
		if n := tries.Load(); n != 1 {
			t.Errorf("%d tries in 14 s", n)
		}
		stop()
	})
}

func TestAFailedRenewalDoesNotStopTheDial(t *testing.T) {
	in(t, func(w *town) {
		stopServer := w.serve(w.server(), "10.0.0.2:1")
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.2:1")}}
		k.Fresh = func(context.Context) error { return errDown }
		stop := w.run(k.Run)
		w.echoes(w.open(w.get(k)))
		stop()
		stopServer()
	})
}

func TestGetWaitsForAChannel(t *testing.T) {
	in(t, func(w *town) {
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.2:1")}}
		stop := w.run(k.Run)
		limited, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		begin := time.Now()
		if _, err := k.Get(limited); err == nil || time.Since(begin) != 5*time.Second || !strings.Contains(err.Error(), "10.0.0.2:1") {
			t.Errorf("after %v: %v; want the path's error after 5 s", time.Since(begin), err)
		}
		cancel()
		got := make(chan *link.Live)
		go func() { got <- w.get(k) }()
		synctest.Wait()
		stopServer := w.serve(w.server(), "10.0.0.2:1")
		w.echoes(w.open(<-got))
		stop()
		if _, err := k.Get(context.Background()); err == nil {
			t.Error("a Keeper that has ended gives a channel")
		}
		stopServer()
	})
}

func TestGetReturnsARefusalAtOnce(t *testing.T) {
	in(t, func(w *town) {
		stopServer := w.serve(w.server(), "10.0.0.2:1")
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.2:1")}}
		k.Config.Judge = func(*identity.Peer) error { return errDown }
		stop := w.run(k.Run)
		begin := time.Now()
		_, err := k.Get(context.Background())
		if !errors.Is(err, errDown) || time.Since(begin) != 0 {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
		stop()
		stopServer()
	})
}

func TestOneRefusalAmongPathsThatAreDownIsNotARefusal(t *testing.T) {
	in(t, func(w *town) {
		refused := link.Path{Name: "a", Dial: func(context.Context) (net.Conn, error) { return nil, &channel.Refused{Err: errDown} }}
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{refused, w.to("10.0.0.2:1")}}
		stop := w.run(k.Run)
		synctest.Wait()
		if s := k.State(); s.Kind != link.Waiting || !strings.Contains(s.Reason, "a: ") || !strings.Contains(s.Reason, "10.0.0.2:1") || s.Next > time.Second {
			t.Errorf("%+v", s)
		}
		stopServer := w.serve(w.server(), "10.0.0.2:1")
		begin := time.Now()
		w.get(k)
		if time.Since(begin) > time.Second {
			t.Errorf("the path that came back was dialled after %v", time.Since(begin))
		}
		stop()
		stopServer()
	})
}

func TestGoingAwayOldStreamsFinishAndNewOnesGoToTheSuccessor(t *testing.T) {
	in(t, func(w *town) {
		old, next := w.server(), w.server()
		stopOld, stopNext := w.serve(old, "10.0.0.2:1"), w.serve(next, "10.0.0.3:1")
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.2:1"), w.to("10.0.0.3:1")}}
		stop := w.run(k.Run)
		first := w.get(k)
		c := w.open(first)
		w.sleep(time.Minute)

		old.Drain()
		synctest.Wait()
		second := w.get(k)
		if second == first {
			t.Fatal("the channel that is going away is still the live one")
		}
		if _, err := first.Mux.Open(stream.Header{Kind: stream.Bytes, Name: "db"}); err == nil {
			t.Error("the old channel takes a new stream")
		}
		w.echoes(w.open(second))
		w.sleep(time.Hour)
		w.echoes(c)
		if n := len(k.All()); n != 2 {
			t.Errorf("%d channels, want the live one and the old one", n)
		}
		c.CloseWrite()
		if b, err := io.ReadAll(c); err != nil || len(b) != 0 {
			t.Errorf("the old stream ends with %q, %v", b, err)
		}
		c.Close()
		<-first.Done()
		if !errors.Is(first.Err(), channel.ErrClosed) {
			t.Errorf("the old channel ended with %v", first.Err())
		}
		synctest.Wait()
		if n := len(k.All()); n != 1 {
			t.Errorf("%d channels are left", n)
		}
		stop()
		stopOld()
		stopNext()
	})
}

func TestPathsAreTriedFastestMeasuredFirstAndFailingOnesLast(t *testing.T) {
	in(t, func(w *town) {
		stopServer := w.serve(w.server(), "10.0.0.2:1")
		var mu sync.Mutex
		var order []string
		var down atomic.Bool
		dialled := func() []string {
			mu.Lock()
			defer mu.Unlock()
			got := order
			order = nil
			return got
		}
		path := func(name string, d time.Duration, works bool) link.Path {
			return link.Path{Name: name, Dial: func(ctx context.Context) (net.Conn, error) {
				mu.Lock()
				order = append(order, name)
				mu.Unlock()
				time.Sleep(d)
				if !works || down.Load() {
					return nil, errDown
				}
				return w.net.Dial(ctx, "mem", "10.0.0.2:1")
			}}
		}
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{
			path("dead", 0, false), path("slow", 200*time.Millisecond, true), path("fast", 20*time.Millisecond, true),
		}}
		stop := w.run(k.Run)
		for _, want := range [][]string{{"dead", "slow"}, {"fast"}, {"fast"}} {
			l := w.get(k)
			w.sleep(time.Minute)
			if got := dialled(); !slices.Equal(got, want) {
				t.Errorf("dialled %v, want %v", got, want)
			}
			w.lane(w.dialled() - 1).Cut()
			k.Wait(context.Background(), l)
		}
		w.get(k)
		w.sleep(time.Minute)
		dialled()
		down.Store(true)
		w.lane(w.dialled() - 1).Cut()
		w.sleep(221 * time.Millisecond) // one round of all three
		want := []string{"fast", "slow", "dead"}
		if got := dialled(); len(got) < 3 || !slices.Equal(got[:3], want) {
			t.Errorf("dialled %v, want %v", got, want)
		}
		stop()
		stopServer()
	})
}

func TestAPathThatSaysNothingDoesNotHoldTheOthersUp(t *testing.T) {
	in(t, func(w *town) {
		stopServer := w.serve(w.server(), "10.0.0.2:1")
		var silent, late atomic.Int32
		gone := link.Path{Name: "gone", Dial: func(ctx context.Context) (net.Conn, error) {
			silent.Add(1)
			defer silent.Add(-1)
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		// One that comes through although it was called off.
		slow := link.Path{Name: "slow", Dial: func(ctx context.Context) (net.Conn, error) {
			late.Add(1)
			time.Sleep(5 * time.Second)
			return w.net.Dial(context.Background(), "mem", "10.0.0.2:1")
		}}
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{gone, slow, w.to("10.0.0.2:1")}}
		stop := w.run(k.Run)
		begin := time.Now()
		l := w.get(k)
		if took := time.Since(begin); took > 3*time.Second {
			t.Errorf("the path that answers was taken after %v", took)
		}
		if l.Path != "direct 10.0.0.2:1" {
			t.Errorf("it is %s", l.Path)
		}
		synctest.Wait()
		if n := silent.Load(); n != 0 {
			t.Errorf("%d dials go on that nobody waits for", n)
		}
		w.sleep(10 * time.Second)
		if n := w.dialled(); n != 2 {
			t.Fatalf("%d lanes, not those of the path and of the late one", n)
		}
		w.echoes(w.open(l)) // the late one took nothing from it
		if w.lane(1).Close(); k.Live() != l || l.Err() != nil {
			t.Error("the late one is in use")
		}

		// The path in use is known to be the fastest: it is the first again.
		begin = time.Now()
		w.lane(0).Cut()
		k.Wait(context.Background(), l)
		w.get(k)
		if took := time.Since(begin); took > time.Second {
			t.Errorf("the fastest path was taken again after %v", took)
		}
		stop()
		stopServer()
	})
}

func TestRunEndsInTheMiddleOfItsQuestion(t *testing.T) {
	in(t, func(w *town) {
		stopServer := w.serve(w.server(), "10.0.0.2:1")
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.2:1")}}
		k.Check = func(ctx context.Context, _ *link.Live) error { <-ctx.Done(); return ctx.Err() }
		stop := w.run(k.Run)
		synctest.Wait()
		stop()
		stopServer()
	})
}

func TestRunEndsAStreamThatNobodyReads(t *testing.T) {
	in(t, func(w *town) {
		stopServer := w.serve(w.server(), "10.0.0.2:1")
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.2:1")}}
		stop := w.run(k.Run)
		c := w.open(w.get(k))
		c.Write([]byte("unread"))
		c.CloseWrite()
		synctest.Wait() // both ends are in, six bytes are held
		stop()
		select {
		case <-c.Done():
		default:
			t.Error("a stream outlives the Keeper")
		}
		stopServer()
	})
}

func TestWhoWaitsForAChannelIsNotLeftToTheLongPauses(t *testing.T) {
	in(t, func(w *town) {
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.2:1")}}
		stop := w.run(k.Run)
		w.sleep(10 * time.Minute) // nobody is there: dials are half a minute apart
		before := w.dialled()
		w.sleep(time.Minute)
		if n := w.dialled() - before; n > 5 {
			t.Errorf("%d dials in a minute for nobody", n)
		}
		stopServer := w.serve(w.server(), "10.0.0.2:1")
		began := time.Now()
		w.get(k)
		if took := time.Since(began); took > time.Second {
			t.Errorf("a client that came waited %v for an outlet that was there", took)
		}
		stop()
		stopServer()
	})
}

// leaving is a path whose lanes' carrier can say that it is going away.
func (w *town) leaving(addr string, away <-chan struct{}) link.Path {
	p := w.to(addr)
	dial := p.Dial
	p.Dial = func(ctx context.Context) (net.Conn, error) {
		select {
		case <-away:
			return nil, errDown
		default:
		}
		c, err := dial(ctx)
		return &channel.Lane{Conn: c, Leaving: away}, err
	}
	return p
}

func TestASuccessorIsMadeBeforeAChannelWhoseCarrierLeavesIsGivenUp(t *testing.T) {
	in(t, func(w *town) {
		stopA, stopB := w.serve(w.server(), "10.0.0.2:1"), w.serve(w.server(), "10.0.0.3:1")
		away := make(chan struct{})
		var states told
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.leaving("10.0.0.2:1", away), w.to("10.0.0.3:1")}, OnState: states.add}
		stop := w.run(k.Run)
		first := w.get(k)
		c := w.open(first)
		close(away)
		synctest.Wait()
		if second := w.get(k); second == first || second.Path != "direct 10.0.0.3:1" {
			t.Errorf("the channel is still by %s", second.Path)
		}
		w.echoes(c) // an open stream goes on where it is
		w.echoes(w.open(w.get(k)))
		if got := states.kinds(); !slices.Equal(got, []link.StateKind{link.Ready, link.Ready}) {
			t.Errorf("the states were %v, want no pause", got)
		}
		c.Close()
		w.sleep(time.Second)
		if first.Err() == nil {
			t.Error("the old channel outlived its last stream")
		}
		stop()
		stopA()
		stopB()
	})
}

func TestAChannelWhoseCarrierLeavesIsKeptWhileItsStreamsHaveNoOtherWay(t *testing.T) {
	in(t, func(w *town) {
		stopA := w.serve(w.server(), "10.0.0.2:1")
		away := make(chan struct{})
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.leaving("10.0.0.2:1", away)}}
		stop := w.run(k.Run)
		l := w.get(k)
		c := w.open(l)
		close(away)
		w.sleep(time.Minute)
		w.echoes(c)
		if k.Live() != l {
			t.Error("the channel was given up with a stream on it")
		}
		c.Close()
		w.sleep(10 * time.Second)
		if l.Err() == nil || k.State().Kind != link.Waiting {
			t.Errorf("nobody is on it, and it is kept: %v", k.State())
		}
		stop()
		stopA()
	})
}

func TestAfterASleepADeadChannelIsReplacedInSeconds(t *testing.T) {
	in(t, func(w *town) {
		stopServer := w.serve(w.server(), "10.0.0.2:1")
		var slept atomic.Int64
		c := w.config()
		c.Now = func() time.Time { return time.Now().Add(time.Duration(slept.Load())) }
		k := &link.Keeper{Config: c, Paths: []link.Path{w.to("10.0.0.2:1")}}
		stop := w.run(k.Run)
		first := w.get(k)
		w.sleep(time.Minute)
		slept.Store(int64(20 * time.Minute)) // the channel is fine: it stays
		w.sleep(10 * time.Second)
		if k.Live() != first {
			t.Error("a channel that answers was given up")
		}
		w.lane(0).Stall()
		slept.Store(int64(40 * time.Minute))
		begin := time.Now()
		if err := k.Wait(context.Background(), first); err != nil {
			t.Fatal(err)
		}
		if second := w.get(k); second == first || time.Since(begin) > 5*time.Second {
			t.Errorf("replaced after %v", time.Since(begin))
		}
		stop()
		stopServer()
	})
}
