package routing

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestRestartGoesOnAfterABackOff(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var mu sync.Mutex
		var got []string
		var at []time.Time
		received := func() []string {
			mu.Lock()
			defer mu.Unlock()
			return got
		}
		spawn(t, n, "a", WorkerFunc(func(_ *Actor, m *Message) error {
			mu.Lock()
			defer mu.Unlock()
			got, at = append(got, string(m.Body)), append(at, time.Now())
			switch string(m.Body) {
			case "error":
				return errors.New("reason")
			case "panic":
				panic("reason")
			}
			return nil
		}), &Options{Restart: &Restart{Min: time.Second}})
		n.Watch("a", func(err error) { want(t, err, nil) })
		for _, s := range []string{"error", "panic", "well"} {
			want(t, n.Post(to("a", s)), nil)
		}
		synctest.Wait()
		if got := received(); !slices.Equal(got, []string{"error"}) {
			t.Errorf("before the back-off: %v", got)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := received(); !slices.Equal(got, []string{"error", "panic", "well"}) {
			t.Fatalf("after the back-off: %v", got)
		}
		for i, base := range []time.Duration{time.Second, 2 * time.Second} {
			if d := at[i+1].Sub(at[i]); d < base/2 || d > base*3/2 {
				t.Errorf("back-off %d took %v, want %v ± 50 %%", i+1, d, base)
			}
		}
	})
}

func TestRestartGivesUpAtItsLimit(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		reason := errors.New("reason")
		runs, stops := 0, 0
		var told error
		a := spawn(t, n, "a", &probe{
			drained: func(*Actor) error { runs++; return reason },
			stopped: func(error) { stops++ },
		}, &Options{Restart: &Restart{Limit: 3}})
		n.Watch("a", func(err error) { told = err })
		for range 10 {
			a.Wake()
			time.Sleep(time.Second)
			synctest.Wait()
		}
		want(t, told, reason)
		if runs != 4 || stops != 1 || n.Len() != 0 {
			t.Errorf("ran %d times, want 1 and 3 restarts; Stopped %d times; %d actors are left", runs, stops, n.Len())
		}
	})
}

func TestRestartCountsWithinItsWindowOnly(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		runs := 0
		spawn(t, n, "a", WorkerFunc(func(*Actor, *Message) error { runs++; return errors.New("reason") }),
			&Options{Restart: &Restart{Limit: 1, Window: time.Minute}})
		for range 10 {
			want(t, n.Post(to("a", "")), nil)
			time.Sleep(2 * time.Minute)
			synctest.Wait()
		}
		if runs != 10 || n.Len() != 1 {
			t.Errorf("ran %d times; %d actors are left", runs, n.Len())
		}
	})
}

func TestRestartMakesANewWorkerAndEachIsStoppedOnce(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		reason := errors.New("reason")
		var log []string
		made := 0
		worker := func() *probe {
			made++
			i := made
			return &probe{
				receive: func(_ *Actor, m *Message) error {
					log = append(log, fmt.Sprintf("%d received %s", i, m.Body))
					if string(m.Body) == "fail" {
						return reason
					}
					return nil
				},
				stopped: func(err error) { log = append(log, fmt.Sprintf("%d stopped: %v", i, err)) },
			}
		}
		fails := 2
		a := spawn(t, n, "a", worker(), &Options{Restart: &Restart{New: func() (Worker, error) {
			switch fails--; fails {
			case 1:
				return nil, errors.New("not yet")
			case 0:
				panic("not yet")
			}
			return worker(), nil
		}}})
		want(t, n.Post(to("a", "fail")), nil)
		want(t, n.Post(to("a", "x")), nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		a.Stop(nil)
		synctest.Wait()
		if want := []string{"1 received fail", "1 stopped: reason", "2 received x", "2 stopped: <nil>"}; !slices.Equal(log, want) {
			t.Errorf("%v, want %v", log, want)
		}
	})
}

func TestStopDuringABackOffEndsIt(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		for _, fresh := range []bool{false, true} {
			o := &Options{Restart: &Restart{Min: time.Hour, Max: time.Hour}}
			if fresh {
				o.Restart.New = func() (Worker, error) { t.Error("made a worker for a stopped actor"); return nil, nil }
			}
			reason := errors.New("reason")
			var stopped []error
			a := spawn(t, n, "a", &probe{
				receive: func(*Actor, *Message) error { return errors.New("failure") },
				stopped: func(err error) { stopped = append(stopped, err) },
			}, o)
			want(t, n.Post(to("a", "")), nil)
			synctest.Wait()
			want(t, n.Post(to("a", "")), nil) // it still takes mail
			a.Wake()
			a.Run()
			a.Stop(reason)
			synctest.Wait()
			if !slices.Equal(stopped, []error{reason}) || n.Len() != 0 {
				t.Errorf("Stopped with %v; %d actors are left", stopped, n.Len())
			}
		}
	})
}

func TestPausedActorOwnsNoGoroutine(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		before := bubbleGoroutines()
		spawn(t, n, "a", WorkerFunc(func(*Actor, *Message) error { return errors.New("failure") }), &Options{Restart: &Restart{Min: time.Hour}})
		want(t, n.Post(to("a", "")), nil)
		synctest.Wait()
		if got := bubbleGoroutines(); got != before {
			t.Errorf("%d goroutines, %d before", got, before)
		}
	})
}

func TestCallOfAFailedTurnFailsThoughTheActorGoesOn(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		spawn(t, n, "a", WorkerFunc(func(*Actor, *Message) error { panic("failure") }), &Options{Restart: &Restart{Min: time.Hour}})
		_, err := n.Call(t.Context(), to("a", ""))
		want(t, err, ErrStopped)
		if n.Len() != 1 {
			t.Error("the actor stopped")
		}
	})
}

func TestPauseDoublesUpToItsMost(t *testing.T) {
	r := &Restart{Min: 10 * time.Millisecond, Max: 70 * time.Millisecond}
	for i, base := range []time.Duration{10, 20, 40, 70, 70} {
		base *= time.Millisecond
		spread := map[time.Duration]bool{}
		for range 200 {
			d := r.pause(i + 1)
			if d < base/2 || d > base*3/2 {
				t.Fatalf("pause %d is %v, want %v ± 50 %%", i+1, d, base)
			}
			spread[d] = true
		}
		if len(spread) < 100 {
			t.Errorf("pause %d has %d values of 200", i+1, len(spread))
		}
	}
}
