package channel

import (
	"errors"
	"fmt"
	"io"
)

// Kind says which service the initiator wants at the other end of a lane.
type Kind uint8

// The kinds of SPEC.md, "Preface". Lane, Carrier and Hop are for a relay; they
// precede the channel's own preface and enter no prologue. Lane and Carrier carry an
// id, Hop the number of relays that have passed the connection on.
const (
	Relay     Kind = 1
	Service   Kind = 2
	Authority Kind = 3
	KindLane  Kind = 16
	Carrier   Kind = 17
	Hop       Kind = 18
)

// MaxHops is how many relays may pass a connection on: ways through that many serve
// nobody, and in a loop each byte costs as many.
const MaxHops = 8

func (k Kind) String() string {
	switch k {
	case Relay:
		return "relay"
	case Service:
		return "service"
	case Authority:
		return "authority"
	case KindLane:
		return "lane"
	case Carrier:
		return "carrier"
	case Hop:
		return "hop"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Suite names a complete handshake: Noise protocol, KEM and record cipher.
// Nothing is negotiated; the initiator's configuration says which.
type Suite uint8

const (
	// AESGCM is Noise_XXpsk3_25519_AESGCM_SHA256 with ML-KEM-768; the default.
	AESGCM Suite = 1
	// ChaChaPoly is Noise_XXpsk3_25519_ChaChaPoly_BLAKE2s with ML-KEM-768, for
	// processors without AES instructions.
	ChaChaPoly Suite = 2
)

const (
	// PrefaceSize is the length of a preface on the wire.
	PrefaceSize = 24

	magic   = "prtl"
	version = 1
)

// Preface is what a lane begins with, in clear:
//
//	magic "prtl" (4) | version 1 (1) | kind (1) | suite (1) | zero (1) | id (16)
type Preface struct {
	Kind  Kind
	Suite Suite
	ID    [16]byte
}

// ErrPreface is returned for bytes that do not begin a lane of this version.
var ErrPreface = errors.New("not a portal lane of version 1")

// HopPreface is what a relay, the nth on the way, begins a connection to the next with.
func HopPreface(n int) Preface { return Preface{Kind: Hop, ID: [16]byte{byte(n)}} }

// Hops is how many relays have passed the connection on, by a preface of kind Hop.
func (p Preface) Hops() int { return int(p.ID[0]) }

// Append appends the 24 bytes of p.
func (p Preface) Append(b []byte) []byte {
	b = append(b, magic...)
	b = append(b, version, byte(p.Kind), byte(p.Suite), 0)
	return append(b, p.ID[:]...)
}

// ReadPreface reads exactly 24 bytes and never one more: what follows belongs
// to whoever the lane is handed to.
func ReadPreface(r io.Reader) (Preface, error) {
	var b [PrefaceSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return Preface{}, fmt.Errorf("reading the preface: %w", err)
	}
	return ParsePreface(b)
}

// ParsePreface checks everything that can be checked without knowing what the
// reader serves. An unknown version or suite is an error, never a reason to
// try another.
func ParsePreface(b [PrefaceSize]byte) (Preface, error) {
	p := Preface{Kind: Kind(b[5]), Suite: Suite(b[6])}
	copy(p.ID[:], b[8:])
	switch {
	case string(b[:4]) != magic, b[4] != version, b[7] != 0:
		return Preface{}, ErrPreface
	case p.Kind == Relay || p.Kind == Service || p.Kind == Authority:
		if p.ID != [16]byte{} || (p.Suite != AESGCM && p.Suite != ChaChaPoly) {
			return Preface{}, ErrPreface
		}
	case p.Kind == KindLane || p.Kind == Carrier:
		if p.Suite != 0 {
			return Preface{}, ErrPreface
		}
	case p.Kind == Hop:
		if n := p.Hops(); p.Suite != 0 || n < 1 || n > MaxHops || p.ID != HopPreface(n).ID {
			return Preface{}, ErrPreface
		}
	default:
		return Preface{}, ErrPreface
	}
	return p, nil
}
