// Package buffer is pooled memory in the shape that goes on the wire.
//
// A Buffer holds records one behind another exactly as a lane carries them:
//
//	length (2) | plaintext … | tag (16) || length (2) | plaintext … | tag (16) || …
//
// Whoever has bytes to send writes the plaintext where it will be sealed, so
// that sealing happens in place and all records leave in one write.
package buffer

import (
	"sync"
	"sync/atomic"
)

// Wire sizes of a record around its plaintext (SPEC.md, "Records").
const (
	Prefix = 2                  // big-endian length of what follows
	Suffix = 16                 // AEAD tag
	Around = Prefix + Suffix    // what a record costs beside its plaintext
	Record = 1<<16 - 1 + Prefix // the longest record: a u16 counts plaintext and tag
	Plain  = Record - Around    // the longest plaintext: 65,519 bytes
	most   = 4                  // records in one Buffer: as many as one write carries
	Frame  = 7                  // frame header inside the plaintext
	Bulk   = 60 << 10           // payload of a frame when one stream has the lane to itself
	Shared = 16 << 10           // payload of a frame when several streams have data waiting
	Batch  = most * Bulk        // payload of the largest Buffer: 240 KiB
	stride = Around + Frame + Bulk
)

// The classes: a frame without data, as an open or an end is; one small frame, one
// shared frame, one bulk frame, a batch. Each holds one frame header besides; the
// last holds four whole records.
var classes = [...]int{
	128 + Frame + Around,
	2<<10 + Frame + Around,
	Shared + Frame + Around,
	Record, // any record fits, also one that a peer filled to the limit
	most*stride + Record - stride,
}

var pools [len(classes)]sync.Pool

// A Buffer has one owner at a time. It is handed on with the bytes in it;
// the last owner releases it.
type Buffer struct {
	mem   []byte
	used  int
	lens  [most]int32 // plaintext lengths
	count int
	class int
}

// Get returns an empty Buffer with room for at least n bytes of memory, at
// most the largest class.
func Get(n int) *Buffer {
	class := len(classes) - 1
	for i, size := range classes {
		if n <= size {
			class = i
			break
		}
	}
	if b, ok := pools[class].Get().(*Buffer); ok {
		return b
	}
	return &Buffer{mem: make([]byte, classes[class]), class: class}
}

// ForPayload returns an empty Buffer that takes n bytes of payload, at most
// Batch, in frames of at most Bulk bytes.
func ForPayload(n int) *Buffer {
	if n > Bulk {
		return Get(classes[len(classes)-1])
	}
	return Get(n + Frame + Around)
}

// Release gives the memory back. The Buffer must not be used afterwards.
func (b *Buffer) Release() {
	b.Reset()
	pools[b.class].Put(b)
}

// Reset forgets what the Buffer holds and keeps its memory.
func (b *Buffer) Reset() { b.used, b.count = 0, 0 }

// Raw is the whole memory, for a reader that fills it as it likes.
func (b *Buffer) Raw() []byte { return b.mem }

// Next is where the plaintext of the next record goes: everything that is
// left but the tag's place. It is empty when the Buffer is full.
func (b *Buffer) Next() []byte {
	lo, hi := b.used+Prefix, len(b.mem)-Suffix
	if b.count == most || lo >= hi {
		return nil
	}
	return b.mem[lo:min(hi, lo+Plain)]
}

// Commit makes the first n bytes of Next a record.
func (b *Buffer) Commit(n int) {
	b.lens[b.count] = int32(n)
	b.count++
	b.used += n + Around
}

// Slots appends to s where the payloads of the frames to come lie when each
// but the last is Bulk bytes long, for one scattered read of at most n bytes.
func (b *Buffer) Slots(s [][]byte, n int) [][]byte {
	at := b.used + Prefix + Frame
	for range most - b.count {
		if n <= 0 || at+Suffix >= len(b.mem) {
			break
		}
		size := min(n, Bulk, len(b.mem)-Suffix-at)
		s = append(s, b.mem[at:at+size])
		n -= size
		at += stride
	}
	return s
}

// Count is the number of records.
func (b *Buffer) Count() int { return b.count }

// Payload is the number of plaintext bytes in all records.
func (b *Buffer) Payload() int { return b.used - b.count*Around }

// Bytes is all records as they go on the wire.
func (b *Buffer) Bytes() []byte { return b.mem[:b.used] }

// Records calls seal with each record in order: its prefix, its plaintext and
// the room for its tag.
func (b *Buffer) Records(seal func(record []byte) error) error {
	at := 0
	for i := range b.count {
		end := at + int(b.lens[i]) + Around
		if err := seal(b.mem[at:end:end]); err != nil {
			return err
		}
		at = end
	}
	return nil
}

// A Queue is what one stream has waiting in a channel's data queue. Its fields
// belong to the channel's sealer and are guarded by the sealer's lock; Async
// is the stream's.
type Queue struct {
	Waiting int        // buffers queued and not yet written; at most two
	Room    *sync.Cond // signalled when Waiting falls or Stop is set; nil until somebody waits
	Stop    error      // why nothing more may be queued
	Sealed  bool       // a buffer of this queue has been sealed
	Turn    uint64     // of the sealer, when this queue was last sent from

	// Async keeps the sealer off the sender's goroutine, so that a sender with
	// a deadline never sits in a write to the lane.
	Async atomic.Bool
}
