package relay

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
)

// What travels in the streams of a control channel (SPEC.md, "Relay").

// AuthorityName is the reserved name under which an authority is found.
const AuthorityName = "authority"

// laneID opens one side of one lane, once; it travels in clear, in a preface.
type laneID [16]byte

func newID() (id laneID) {
	rand.Read(id[:])
	return id
}

// An offer is what a relay says about a lane to one of its two ends: the id that
// the end shows on a fresh connection, and the key that only the ends and this
// relay know. On the wire:
//
//	type (1) | id (16) | key (32)
type offer struct {
	kind offerKind
	id   laneID
	key  [32]byte // zero for a carrier; of a next the identifier of the relay there, if it is known
}

type offerKind uint8

const (
	offerLane    offerKind = 1
	offerCarrier offerKind = 2 // the id admits the connection that carries the lanes to come

	offerSize = 1 + 16 + 32
)

func (o offer) append(b []byte) []byte {
	b = append(b, byte(o.kind))
	b = append(b, o.id[:]...)
	return append(b, o.key[:]...)
}

var errOffer = errors.New("the relay's offer is malformed")

func readOffer(r io.Reader) (offer, error) {
	var b [offerSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return offer{}, err
	}
	return parseOffer(b)
}

func parseOffer(b [offerSize]byte) (o offer, err error) {
	o.kind = offerKind(b[0])
	copy(o.id[:], b[1:])
	copy(o.key[:], b[17:])
	if o.kind != offerLane && o.kind != offerCarrier || o.kind == offerCarrier && o.key != [32]byte{} {
		return offer{}, errOffer
	}
	return o, nil
}

// preface is what the end of a lane shows.
func (o offer) preface() []byte {
	p := channel.Preface{Kind: channel.KindLane, ID: o.id}
	if o.kind == offerCarrier {
		p.Kind = channel.Carrier
	}
	return p.Append(nil)
}

// A registration's header body: instance (16) | carrier (1). The instance is
// random for each process, so that one that comes back replaces itself.
type registerBody struct {
	instance [16]byte
	carrier  Carrier
}

func (r registerBody) bytes() []byte { return append(r.instance[:], byte(r.carrier)) }

func parseRegister(b []byte) (r registerBody, err error) {
	if len(b) != 17 || Carrier(b[16]) > Yamux {
		return r, errors.New("a registration is malformed")
	}
	copy(r.instance[:], b)
	r.carrier = Carrier(b[16])
	return r, nil
}

// A connect's header body is empty, or the identifier (32) of whoever must be
// found behind the name. For the name "authority" it is the authority's.
func connectBody(want identity.ID) []byte {
	if want.IsZero() {
		return nil
	}
	return want[:]
}

func parseConnect(b []byte) (want identity.ID, err error) {
	switch len(b) {
	case 0:
	case len(want):
		copy(want[:], b)
	default:
		return want, errors.New("a connect is malformed")
	}
	return want, nil
}

// maxNames bounds an answer about names: 4,096 of at most 64 bytes each on the
// wire fit twice into one stream's first window and its renewals.
const maxNames = 4096

// Names on the wire: count (4), then length (1) | name for each.
func appendNames(names []string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(names)))
	for _, name := range names {
		b = append(append(b, byte(len(name))), name...)
	}
	return b
}

func readNames(r io.Reader) ([]string, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxNames {
		return nil, fmt.Errorf("the relay lists %d names; at most %d are read", n, maxNames)
	}
	var names []string
	for range n {
		var length [1]byte
		if _, err := io.ReadFull(r, length[:]); err != nil {
			return nil, err
		}
		name := make([]byte, length[0])
		if _, err := io.ReadFull(r, name); err != nil {
			return nil, err
		}
		if err := identity.ValidName(string(name)); err != nil {
			return nil, fmt.Errorf("the relay lists something that is no name: %w", err)
		}
		names = append(names, string(name))
	}
	return names, nil
}
