package routing

import (
	"errors"
	"fmt"
)

// MaxHops is how often one message is delivered: what forwarders that send it in a circle can cost.
const MaxHops = 8

// A Message is what actors receive. Once accepted by Post, Send or Call it belongs to the receiver, with its body;
// it is in one mailbox at a time.
type Message struct {
	Onward Route // still to visit; the receiver's own address has been taken off
	Return Route // where an answer goes; the actor that sends it fills in an empty one
	Body   []byte

	// Origin is who let the message in from outside this node, as proved there; nil: it was made on this node.
	// It never travels.
	Origin any

	// Err is not nil when this message reports that one the receiver sent was not delivered: a *DeliveryError, or after
	// a journey the bare reason. Body is then the body that was not delivered (nil after a journey).
	Err error

	Hops   uint8 // deliveries so far, ≤ MaxHops
	charge int32 // what the mailbox it is in accounts for it

	next *Message // in the ring of a mailbox; nil in no mailbox
	call *call    // whose caller waits for the answer
}

// overhead is charged for each message besides its bytes, so that a mailbox of empty ones is bounded too: no less than
// the record takes.
const overhead = 128

// cost is what m takes in a mailbox once its first address has been taken off, in bytes.
func (m *Message) cost() int {
	_, rest, _ := m.Onward.Pop()
	return overhead + len(rest.wire) + len(m.Return.wire) + len(m.Body)
}

const (
	kindMessage     = 0 // rest: body
	kindUndelivered = 1 // rest: u8 reason
)

// What a message is refused for by DecodeMessage, besides ErrRoute.
var (
	ErrMessage    = errors.New("invalid message")
	errShort      = fmt.Errorf("%w: cut short", ErrMessage)
	errKind       = fmt.Errorf("%w: unknown kind", ErrMessage)
	errDecodeHops = fmt.Errorf("%w: more than %d hops", ErrMessage, MaxHops)
)

// AppendBinary appends the encoding of m and returns the extended buffer. Origin stays here, and of a report that
// something was not delivered only the reason is written. More than MaxHops hops are an error.
func (m *Message) AppendBinary(b []byte) ([]byte, error) {
	if m.Hops > MaxHops {
		return b, errDecodeHops
	}
	kind := byte(kindMessage)
	if m.Err != nil {
		kind = kindUndelivered
	}
	b = append(b, kind, m.Hops)
	b = m.Return.Append(m.Onward.Append(b))
	if m.Err != nil {
		return append(b, reasonCode(m.Err)), nil
	}
	return append(b, m.Body...), nil
}

// DecodeMessage reads what AppendBinary wrote. Body is the end of b, not a copy: a caller that does not own b copies it
// first. Origin is nil: the caller sets it before the message is posted. Its errors are ErrMessage or ErrRoute.
func DecodeMessage(b []byte) (*Message, error) {
	if len(b) < 2 {
		return nil, errShort
	}
	kind, hops := b[0], b[1]
	switch {
	case kind > kindUndelivered:
		return nil, errKind
	case hops > MaxHops:
		return nil, errDecodeHops
	}
	onward, b, err := DecodeRoute(b[2:])
	if err != nil {
		return nil, err
	}
	back, b, err := DecodeRoute(b)
	if err != nil {
		return nil, err
	}
	m := &Message{Onward: onward, Return: back, Hops: hops}
	switch {
	case kind == kindMessage:
		m.Body = b
	case len(b) == 0:
		return nil, errShort
	default:
		m.Err = reasonOf(b[0])
	}
	return m, nil
}
