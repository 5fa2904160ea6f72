package stream

import (
	"sync"
	"sync/atomic"
)

// DefaultBudget is how much memory a node holds for readers that are slower
// than their streams.
const DefaultBudget = 256 << 20

// Budget counts the memory that all streams of a node hold in buffers, not the
// bytes that were granted, nor those in them: a frame of 16.1 KiB is held in 64
// KiB. Above half of Limit no window grows, above Limit no stream is accepted; at
// twice Limit the stream that holds most is reset.
type Budget struct {
	Limit int64 // 0: DefaultBudget

	held  atomic.Int64
	mu    sync.Mutex
	muxes map[*Mux]struct{}
}

func (b *Budget) limit() int64 {
	if b.Limit > 0 {
		return b.Limit
	}
	return DefaultBudget
}

// Held is how many bytes of memory are held now.
func (b *Budget) Held() int64 { return b.held.Load() }

func (b *Budget) grow() bool { return b.held.Load() <= b.limit()/2 }
func (b *Budget) open() bool { return b.held.Load() <= b.limit() }

// check resets the stream that holds most when too much is held. The caller
// holds no lock.
func (b *Budget) check() {
	if b.held.Load() > 2*b.limit() {
		b.relieve()
	}
}

func (b *Budget) join(m *Mux) {
	b.mu.Lock()
	if b.muxes == nil {
		b.muxes = make(map[*Mux]struct{})
	}
	b.muxes[m] = struct{}{}
	b.mu.Unlock()
}

func (b *Budget) leave(m *Mux) {
	b.mu.Lock()
	delete(b.muxes, m)
	b.mu.Unlock()
}

// relieve resets the stream that holds most.
func (b *Budget) relieve() {
	var most *Conn
	var bytes int
	b.mu.Lock()
	for m := range b.muxes {
		m.mu.Lock()
		for _, c := range m.conns {
			if n := int(c.held.Load()); n > bytes {
				most, bytes = c, n
			}
		}
		m.mu.Unlock()
	}
	b.mu.Unlock()
	if most != nil {
		most.Reset(CodeBusy, "out of memory for streams that are not read")
	}
}
