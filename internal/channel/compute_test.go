package channel

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/internal/memnet"
)

func TestNoMoreComputeAtOnceThanTheGateLets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := make(gate, 3)
		var mu sync.Mutex
		now, most := 0, 0
		var all sync.WaitGroup
		begin := time.Now()
		for range 30 {
			a, b := memnet.Pipe(memnet.Link{})
			defer b.Close()
			all.Go(func() {
				o := &opening{ctx: t.Context(), deadline: begin.Add(time.Hour), lane: a}
				if err := o.compute(g, func() error {
					mu.Lock()
					now++
					most = max(most, now)
					mu.Unlock()
					time.Sleep(time.Second)
					mu.Lock()
					now--
					mu.Unlock()
					return nil
				}); err != nil {
					t.Error(err)
				}
				a.Close()
			})
		}
		all.Wait()
		if most != 3 || time.Since(begin) != 10*time.Second {
			t.Errorf("%d at once, all in %v", most, time.Since(begin))
		}
	})
}

func TestNothingIsComputedForWhoeverIsGoneWhenItsTurnComes(t *testing.T) {
	for name, end := range map[string]func(lane net.Conn, cancel context.CancelFunc){
		"the lane was closed to make room": func(lane net.Conn, _ context.CancelFunc) { lane.Close() },
		"its time is over":                 func(_ net.Conn, cancel context.CancelFunc) { cancel() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := make(gate, 1)
				g <- struct{}{}
				a, b := memnet.Pipe(memnet.Link{})
				defer b.Close()
				defer a.Close()
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				result := make(chan error, 1)
				go func() {
					o := &opening{ctx: ctx, deadline: time.Now().Add(time.Hour), lane: a}
					result <- o.compute(g, func() error { t.Error("it was computed for"); return nil })
				}()
				synctest.Wait()
				end(a, cancel)
				synctest.Wait()
				<-g
				if err := <-result; err == nil {
					t.Error("no error")
				}
				select {
				case g <- struct{}{}:
				default:
					t.Error("its place is not given back")
				}
			})
		})
	}
}

func TestAnErrorOfTheArithmeticIsTheHandshakes(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	o := &opening{ctx: t.Context(), deadline: time.Now().Add(time.Hour), lane: a}
	want := errors.New("no")
	if err := o.compute(make(gate, 1), func() error { return want }); err != want {
		t.Error(err)
	}
}
