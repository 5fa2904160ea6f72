// Package pace says what many connections carry while something goes on beside them, in multiples of what
// they carry without it.
package pace

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// Comparison is what the turns of Compare gave, in order of size.
type Comparison struct {
	throughput []float64
	p99        []float64
}

// patience is how long a connection may take for an answer: one that takes longer is stalled.
const patience = 10 * time.Second

// Compare measures conns, whose far ends echo, in turns: each for d as they are, and for d between begin
// and the end that it gives. Every connection asks once at least. It ends with the first that fails, or has
// no answer for ten seconds.
func Compare(turns int, conns []net.Conn, d time.Duration, begin func() (end func())) (Comparison, error) {
	var c Comparison
	for range turns {
		n, p, err := window(conns, d)
		if err != nil {
			return c, fmt.Errorf("alone: %w", err)
		}
		end := begin()
		m, q, err := window(conns, d)
		end()
		if err != nil {
			return c, fmt.Errorf("beside it: %w", err)
		}
		c.throughput = append(c.throughput, float64(m)/float64(n))
		c.p99 = append(c.p99, float64(q)/float64(p))
	}
	slices.Sort(c.throughput)
	slices.Sort(c.p99)
	return c, nil
}

// Keeps says whether the median of the turns is at least nine tenths of the throughput, in at most twice
// the time.
func (c Comparison) Keeps() bool {
	return middle(c.throughput, 2, 4) >= 0.9 && middle(c.p99, 2, 4) <= 2
}

// String gives the medians and the quartiles.
func (c Comparison) String() string {
	return fmt.Sprintf("%.0f %% of the throughput (%.0f to %.0f), p99 %.2f × (%.2f to %.2f)",
		100*middle(c.throughput, 2, 4), 100*middle(c.throughput, 1, 4), 100*middle(c.throughput, 3, 4),
		middle(c.p99, 2, 4), middle(c.p99, 1, 4), middle(c.p99, 3, 4))
}

func middle(sorted []float64, i, n int) float64 { return sorted[len(sorted)*i/n] }

// window has all of them ask and answer for d, 16 KiB each time; it gives how often, and the 99th
// percentile of how long that took.
func window(conns []net.Conn, d time.Duration) (n int, p99 time.Duration, err error) {
	took := make([][]time.Duration, len(conns))
	errs := make([]error, len(conns))
	end := time.Now().Add(d)
	var all sync.WaitGroup
	for i, c := range conns {
		all.Go(func() {
			b := make([]byte, 16<<10)
			for begin := time.Now(); len(took[i]) == 0 || begin.Before(end); begin = time.Now() {
				c.SetDeadline(begin.Add(patience))
				_, err := c.Write(b)
				if err == nil {
					_, err = io.ReadFull(c, b)
				}
				if err != nil {
					errs[i] = fmt.Errorf("connection %d of %d: %w", i, len(conns), err)
					return
				}
				took[i] = append(took[i], time.Since(begin))
			}
		})
	}
	all.Wait()
	if err := cmp.Or(errs...); err != nil {
		return 0, 0, err
	}
	every := slices.Concat(took...)
	slices.Sort(every)
	return len(every), every[len(every)*99/100], nil
}
