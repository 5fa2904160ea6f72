package pace

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/internal/memnet"
)

// echo is a connection whose far end answers after what late says, in nanoseconds.
func echo(t *testing.T, late *atomic.Int64) net.Conn {
	a, b := memnet.Pipe(memnet.Link{})
	var far sync.WaitGroup
	t.Cleanup(func() {
		a.Close()
		far.Wait()
	})
	far.Go(func() {
		defer b.Close()
		for buf := make([]byte, 16<<10); ; {
			if _, err := io.ReadFull(b, buf); err != nil {
				return
			}
			<-time.After(time.Duration(late.Load()))
			if _, err := b.Write(buf); err != nil {
				return
			}
		}
	})
	return a
}

// In virtual time, in which the far end alone takes any.
func TestAComparisonSeesWhatSlowsDown(t *testing.T) {
	const alone = 10 * time.Millisecond
	for _, c := range []struct {
		name        string
		beside      time.Duration
		want        string
		keeps       bool
		whenStalled bool
	}{
		{"nothing", alone, "100 % of the throughput (100 to 100), p99 1.00 × (1.00 to 1.00)", true, false},
		{"a third more", alone * 4 / 3, "", false, false},
		{"four times", 4 * alone, "25 % of the throughput (25 to 25), p99 4.00 × (4.00 to 4.00)", false, false},
		{"longer than it is looked at", 5 * time.Second, "1 % of the throughput (1 to 1), p99 500.00 × (500.00 to 500.00)", false, false},
		{"a stall", 11 * time.Second, "", false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var late atomic.Int64
				late.Store(int64(alone))
				conns := []net.Conn{echo(t, &late), echo(t, &late)}
				got, err := Compare(3, conns, time.Second, func() func() {
					late.Store(int64(c.beside))
					return func() { late.Store(int64(alone)) }
				})
				if (err != nil) != c.whenStalled {
					t.Fatalf("err is %v", err)
				}
				if err != nil {
					return
				}
				if s := got.String(); c.want != "" && s != c.want {
					t.Errorf("%s, not %s", s, c.want)
				}
				if got.Keeps() != c.keeps {
					t.Errorf("%v: keeps is %v", got, got.Keeps())
				}
			})
		})
	}
}

func TestALongTailIsNoLessThanALossOfThroughput(t *testing.T) {
	for _, c := range []struct {
		throughput, p99 float64
		keeps           bool
	}{{1, 1, true}, {.9, 2, true}, {.89, 1, false}, {1, 2.01, false}} {
		if got := (Comparison{[]float64{0, c.throughput, 9}, []float64{0, c.p99, 9}}); got.Keeps() != c.keeps {
			t.Errorf("%v: keeps is %v", got, got.Keeps())
		}
	}
}
