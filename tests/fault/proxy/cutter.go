package proxy

import (
	"bytes"
	"encoding/binary"
)

const (
	prefaceSize = 24
	magic       = "prtl"
)

// mayBePreface says whether b begins, as far as it goes, like a preface.
func mayBePreface(b []byte) bool {
	n := min(len(b), len(magic))
	return string(b[:n]) == magic[:n]
}

// prefaceKind is what a connection that begins with b is for; 0 when it is not of this wire.
func prefaceKind(b []byte) uint8 {
	if len(b) < prefaceSize || !mayBePreface(b) {
		return 0
	}
	return b[5]
}

// purpose is what a connection that begins with b is for: its preface's kind, or that of the one behind a
// hop's; 0 when it is not of this wire. more says that b is too short to tell.
func purpose(b []byte) (kind uint8, more bool) {
	for mayBePreface(b) {
		if len(b) < prefaceSize {
			return kind, true
		}
		if kind = prefaceKind(b); kind != Hop {
			return kind, false
		}
		b = b[prefaceSize:]
	}
	return kind, false
}

// A piece is what a cutter gives: a record, a message, or something that is neither, which has no
// number.
type piece struct {
	unit   Unit // Byte: neither
	number int64
	bytes  []byte
}

// cutter splits one direction of a connection where the wire does (SPEC.md §1 to §3): prefaces, then
// messages of the handshake, then records, each behind its length. A carrier's lanes are mixed by yamux
// and are not told apart here: what is in one, as what is no connection of this wire, comes as it came.
type cutter struct {
	have      []byte // not given out yet
	begun     bool   // the prefaces are behind
	plain     bool
	initiator bool
	messages  int64
	records   int64
}

// next gives the next piece of what was fed, once it is whole. of is what the connection is for. The
// piece's bytes are the cutter's until it is fed again.
func (c *cutter) next(of uint8) (piece, bool) {
	if len(c.have) == 0 {
		return piece{}, false
	}
	if !c.begun {
		switch {
		case of == 0:
			c.begun, c.plain = true, true
		case !mayBePreface(c.have):
			c.begun = true
		case len(c.have) < prefaceSize:
			return piece{}, false
		default:
			k := prefaceKind(c.have)
			c.initiator = k != Lane && k != Carrier
			c.begun, c.plain = k != Lane && k != Hop, k == Carrier // behind those another may come
			return piece{bytes: c.take(prefaceSize)}, true
		}
		c.plain = c.plain || of == Carrier
	}
	if c.plain {
		return piece{bytes: c.take(len(c.have))}, true
	}
	if len(c.have) < 2 {
		return piece{}, false
	}
	n := 2 + int(binary.BigEndian.Uint16(c.have))
	if len(c.have) < n {
		return piece{}, false
	}
	b := c.take(n)
	switch {
	case c.initiator && c.messages < 2:
		c.messages++
		return piece{Message, 2*c.messages - 1, b}, true // 1, 3
	case !c.initiator && c.messages < 1:
		c.messages++
		return piece{Message, 2, b}, true
	}
	c.records++
	return piece{Record, c.records - 1, b}, true
}

func (c *cutter) take(n int) []byte {
	b := c.have[:n:n]
	c.have = c.have[n:]
	return b
}

func (c *cutter) feed(b []byte) { c.have = append(c.have, b...) }

// rest gives what is not whole.
func (c *cutter) rest() []byte { return c.take(len(c.have)) }

// alter does a fault to a record or a message that is not to be used otherwise, and gives what is to
// come in its place.
func (f Fault) alter(b []byte) []byte {
	b = bytes.Clone(b)
	switch f.Kind {
	case Flip:
		bit := f.N
		if bit < 0 {
			bit += 8 * len(b)
		}
		bit = min(max(bit, 0), 8*len(b)-1)
		b[bit/8] ^= 0x80 >> (bit % 8)
	case Duplicate:
		b = append(b, b...)
	case Insert:
		fake := bytes.Repeat([]byte{f.Fill}, f.N)
		binary.BigEndian.PutUint16(fake, uint16(f.N-2))
		b = append(fake, b...)
	case Truncate:
		b = b[:max(len(b)-f.N, 0)]
	case Extend:
		b = append(b, bytes.Repeat([]byte{f.Fill}, f.N)...)
		b = b[:min(len(b), maxUnit)]
	}
	if f.Fit && len(b) >= 2 {
		binary.BigEndian.PutUint16(b, uint16(len(b)-2))
	}
	return b
}
