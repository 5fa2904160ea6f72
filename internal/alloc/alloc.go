// Package alloc bounds what a decoder allocates, in tests: an input that lies about lengths must cost no
// more than its own size can justify.
package alloc

import (
	"flag"
	"runtime"
	"runtime/metrics"
	"testing"
)

const (
	// Input is how large an input the bound is for.
	Input = 64 << 10
	// Limit is what may be allocated for it, by the whole process.
	Limit = 1 << 20
)

// Bound returns what is to be deferred: it fails t when more than Limit was allocated meanwhile and the
// input was smaller than Input.
func Bound(t testing.TB, input int) func() {
	limit := uint64(Limit)
	if f := flag.Lookup("test.fuzz"); f != nil && f.Value.String() != "" {
		limit *= 4 // the engine allocates beside it; and who believes a length takes more
	}
	before := allocated()
	return func() {
		if n := allocated() - before; input < Input && n > limit {
			t.Errorf("%d bytes were allocated for an input of %d", n, input)
		}
	}
}

// Spent is how many bytes were allocated while f ran, exactly: it stops the world twice.
func Spent(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// allocated is how many bytes have been allocated in all, also those that are free again.
func allocated() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}
