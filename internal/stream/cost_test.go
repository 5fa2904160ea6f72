//go:build !race

// The race detector drops pooled memory at random and allocates by itself.

package stream_test

import (
	"io"
	"net"
	"runtime"
	"runtime/debug"
	"sync"
	"testing"

	"github.com/portal-tunnel/portal/internal/stream"
)

// exchange sends n messages of size bytes from the opener's application to the
// other, which answers each with as many, and waits for the answer.
func exchange(t testing.TB, near, far net.Conn, n, size int) {
	var echo sync.WaitGroup
	echo.Go(func() {
		b := make([]byte, size)
		for range n {
			if _, err := io.ReadFull(far, b); err != nil {
				t.Error(err)
				return
			}
			far.Write(b)
		}
	})
	b := make([]byte, size)
	for range n {
		near.Write(b)
		if _, err := io.ReadFull(near, b); err != nil {
			t.Error(err)
			return
		}
	}
	echo.Wait()
}

// transfer sends n messages of size bytes from one to the other.
func transfer(t testing.TB, from, to net.Conn, n, size int) {
	var read sync.WaitGroup
	read.Go(func() {
		b := make([]byte, 256<<10)
		for left := n * size; left > 0; {
			k, err := to.Read(b)
			if left -= k; err != nil {
				t.Error(err)
				return
			}
		}
	})
	b := make([]byte, size)
	for range n {
		from.Write(b)
	}
	read.Wait()
}

// TestSteadyFlowAllocatesNothing, in each direction, for keystrokes and in bulk.
// The collector is off, since it empties the pools. What is tolerated beside
// the frames: for keystrokes one allocation in a hundred (a buffer more when
// goroutines meet in another order than before, the runtime's own); in bulk one
// in five, because a credit wakes the sealer on a goroutine of its own, and
// starting that costs the runtime 16 bytes.
func TestSteadyFlowAllocatesNothing(t *testing.T) {
	x, y, incoming := overLoopback(t, stream.Limits{})
	f := join(t, x, incoming, overTCP)
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	for _, c := range []struct {
		name   string
		n      int
		frames int // at least
		most   float64
		run    func(n int)
	}{
		{"keystrokes both ways", 10000, 2 * 10000, 0.01, func(n int) { exchange(t, f.near, f.far, n, 64) }},
		{"bulk up", 4096, 4096, 0.2, func(n int) { transfer(t, f.near, f.far, n, 60<<10) }},
		{"bulk down", 4096, 4096, 0.2, func(n int) { transfer(t, f.far, f.near, n, 60<<10) }},
	} {
		c.run(c.n / 4) // fills the pools, the windows and the slices that grow
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		c.run(c.n)
		runtime.ReadMemStats(&after)
		each := float64(after.Mallocs-before.Mallocs) / float64(c.frames)
		t.Logf("%s: %.4f allocations a frame, %.0f bytes a frame", c.name, each, float64(after.TotalAlloc-before.TotalAlloc)/float64(c.frames))
		if each > c.most {
			t.Errorf("%s: %.3f allocations a frame", c.name, each)
		}
	}
	f.near.Close()
	f.far.Close()
	f.joined()
	stop(t, x, y)
}

// BenchmarkExchange is the time of 64 bytes there and back, joined at both ends.
func BenchmarkExchange(b *testing.B) {
	x, y, incoming := overLoopback(b, stream.Limits{})
	f := join(b, x, incoming, overTCP)
	b.ReportAllocs()
	b.ResetTimer()
	exchange(b, f.near, f.far, b.N, 64)
	b.StopTimer()
	f.near.Close()
	f.far.Close()
	f.joined()
	stop(b, x, y)
}

// BenchmarkTransfer is bulk in one direction, joined at both ends.
func BenchmarkTransfer(b *testing.B) {
	x, y, incoming := overLoopback(b, stream.Limits{})
	f := join(b, x, incoming, overTCP)
	b.ReportAllocs()
	b.SetBytes(60 << 10)
	b.ResetTimer()
	transfer(b, f.near, f.far, b.N, 60<<10)
	b.StopTimer()
	f.near.Close()
	f.far.Close()
	f.joined()
	stop(b, x, y)
}

// BenchmarkOpen is a stream from its open to the last of it.
func BenchmarkOpen(b *testing.B) {
	x, y, incoming := overLoopback(b, stream.Limits{})
	b.ReportAllocs()
	for b.Loop() {
		c, d := open(b, x, incoming)
		c.CloseWrite()
		d.CloseWrite()
		<-c.Done()
		<-d.Done()
	}
	stop(b, x, y)
}
