// Package channel is a secure channel between two identities over one lane,
// that is over one ordered net.Conn.
//
// In the order in which bytes meet it: the preface (preface.go), three
// handshake messages (handshake.go), one confirmation record each way
// (channel.go), then records of frames until an authenticated close (record.go,
// seal.go, open.go). SPEC.md describes every byte. Of a flood of first messages
// Turns says which are answered, and when (turns.go).
//
// A missing, repeated, swapped or altered record ends the channel. So does any
// other error: nothing is tried again on the same lane.
package channel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/routing"
)

// handshakeTime is the absolute limit from the first byte to confirmation: a
// peer that sends a byte a second is gone after it.
const handshakeTime = 10 * time.Second

// maxConfirm is the plaintext of a confirmation: a credential and a history of
// at most 4 KiB each, with their lengths and the frame's header.
const maxConfirm = frameHeader + 2*(2+4<<10)

// Lane is a connection with a key that only its two ends know, given to them
// by a relay. Any other net.Conn has the zero key.
type Lane struct {
	net.Conn
	Key [32]byte
	// Leaving is closed when whoever carries the lane says that it is going away:
	// what is on it may end, what is new should take another. Nil: never.
	Leaving <-chan struct{}
	// Peer is who is at the other end by the word of the relay that led here, to be
	// demanded besides whatever else is; zero: it says nothing.
	Peer identity.ID
}

// Format shows no key, whatever the verb.
func (Lane) Format(f fmt.State, _ rune) { io.WriteString(f, "channel.Lane") }

// LogValue shows no key.
func (Lane) LogValue() slog.Value { return slog.StringValue("channel.Lane") }

// Config says who speaks and whom it wants to hear.
type Config struct {
	Node  *routing.Node   // where the channel's two actors live
	Self  *identity.Self  // what this end proves
	Trust *identity.Trust // whose credentials count
	Kind  Kind            // the service wanted (initiator) or served (responder)
	Suite Suite           // initiator: 0 is AESGCM; a responder takes the initiator's
	Pin   identity.ID     // initiator: the only identity that message 3 is sent to; zero: any

	// Judge decides about the other end after its credential is known: an
	// initiator's before its own credential is sent, a responder's before
	// anything else is read. Nil refuses everybody.
	Judge func(*identity.Peer) error

	// Proofless takes a peer that shows no credential. It is for relays and
	// authorities; towards a service both ends must show one.
	Proofless bool

	// Turns is shared by the responders of one server, Source whom this one answers,
	// where that is somebody in particular. Nil: each computes when it has to.
	Turns  *Turns
	Source string

	Now    func() time.Time // nil: time.Now
	Logger *slog.Logger     // nil: discard
}

func (c *Config) now() time.Time {
	if c.Now != nil {
		return c.Now()
	}
	return time.Now()
}

// Refused is returned when this end does not accept the other.
type Refused struct{ Err error }

func (e *Refused) Error() string { return e.Err.Error() }
func (e *Refused) Unwrap() error { return e.Err }

// ErrPin is wrapped in a *Refused when the other end is not the identity that
// was asked for.
var ErrPin = errors.New("the other end is another identity than the one asked for")

// Initiate begins a channel on a lane that this end wants something from. It
// returns after both confirmations have been exchanged. The lane is the
// channel's from the call on, and closed when Initiate fails.
func Initiate(ctx context.Context, lane net.Conn, c *Config) (*End, error) {
	p := Preface{Kind: c.Kind, Suite: c.Suite}
	if p.Suite == 0 {
		p.Suite = AESGCM
	}
	return begin(ctx, lane, c, func(l *opening) error { return l.initiate(p) })
}

// Respond answers on a lane. Of a peer that has not proved itself it reads at
// most 14 KiB, one message at a time, and gives it ten seconds in all.
// The preface is read here.
func Respond(ctx context.Context, lane net.Conn, c *Config) (*End, error) {
	return begin(ctx, lane, c, func(l *opening) error {
		p, err := ReadPreface(l.lane)
		if err != nil {
			return err
		}
		if p.Kind != c.Kind {
			return fmt.Errorf("%w: it asks for kind %v", ErrPreface, p.Kind)
		}
		return l.respond(p)
	})
}

// RespondAfter is Respond on a lane whose preface has been read already, by
// whoever had to know its kind.
func RespondAfter(ctx context.Context, lane net.Conn, p Preface, c *Config) (*End, error) {
	return begin(ctx, lane, c, func(l *opening) error { return l.respond(p) })
}

// opening is a channel until its confirmation.
type opening struct {
	ctx      context.Context
	deadline time.Time // absolute
	lane     net.Conn
	config   *Config
	key      [32]byte
	in, out  *records
	binding  [32]byte
	peer     *identity.Peer
	shown    *identity.Credential // ours, as it went into the confirmation
	rtt      time.Duration
	back     func() // gives back what a long proof took of its allowance; nil: nothing
}

func begin(ctx context.Context, lane net.Conn, c *Config, steps func(*opening) error) (*End, error) {
	own := *c // the caller may begin several channels with one Config
	if own.Logger == nil {
		own.Logger = slog.New(slog.DiscardHandler)
	}
	o := &opening{lane: lane, config: &own}
	switch l := lane.(type) {
	case *Lane:
		o.key, o.lane = l.Key, l.Conn
	case Lane:
		o.key, o.lane = l.Key, l.Conn
	}
	deadline := time.Now().Add(handshakeTime)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	o.ctx, o.deadline = ctx, deadline
	o.lane.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { o.lane.SetDeadline(time.Unix(1, 0)) })
	err := steps(o)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		o.lane.Close()
		if ctx.Err() != nil {
			err = fmt.Errorf("%w (%w)", ctx.Err(), err)
		}
		return nil, err
	}
	o.lane.SetDeadline(time.Time{})
	e, err := newEnd(o)
	if err != nil {
		o.lane.Close()
	}
	return e, err
}

func (o *opening) initiate(p Preface) error {
	c := o.config
	h, err := newHandshake(c.Self, true, p, o.key, c.now(), nil)
	if err != nil {
		return err
	}
	m, err := h.write1()
	if err != nil {
		return err
	}
	start := time.Now()
	// The preface and message 1 leave in one write.
	if _, err := o.lane.Write(appendField(p.Append(nil), m)); err != nil {
		return lost(err)
	}
	if m, err = o.readMessage(message2Least, message2Most); err != nil {
		return err
	}
	o.rtt = time.Since(start)
	if err := h.read2(m); err != nil {
		return err
	}
	if !c.Pin.IsZero() && h.peer.ID() != c.Pin {
		return &Refused{fmt.Errorf("%w: it is %s, asked for was %s", ErrPin, h.peer.ID(), c.Pin)}
	}
	if m, err = h.write3(); err != nil {
		return err
	}
	if _, err := o.lane.Write(appendField(nil, m)); err != nil {
		return lost(err)
	}
	if err := o.keys(h, h.toR, h.toI); err != nil {
		return err
	}
	if err := o.readConfirm(); err != nil {
		return err
	}
	if err := o.judge(); err != nil {
		return err
	}
	return o.writeConfirm()
}

func (o *opening) respond(p Preface) error {
	c := o.config
	m, err := o.readMessage(message1, message1)
	if err != nil {
		return err
	}
	var h *handshake
	if err := o.answer(func() (err error) {
		if h, err = newHandshake(c.Self, false, p, o.key, c.now(), nil); err == nil {
			err = h.read1(m)
		}
		if err == nil {
			m, err = h.write2()
		}
		return err
	}); err != nil {
		return err
	}
	start := time.Now()
	if _, err := o.lane.Write(appendField(nil, m)); err != nil {
		return lost(err)
	}
	m = nil // a stranger may be waited for, and 500 more
	if m, err = o.readMessage(message3Least, message3Most); err != nil {
		return err
	}
	o.rtt = time.Since(start)
	if err := o.verify(len(m), func() error {
		if err := h.read3(m); err != nil {
			return err
		}
		return o.keys(h, h.toI, h.toR)
	}); err != nil {
		return err
	}
	if err := o.writeConfirm(); err != nil {
		return err
	}
	plain, err := o.readRecord()
	if err != nil {
		return err
	}
	var unproved error
	if err := o.verify(0, func() (err error) {
		unproved, err = o.takeConfirm(plain)
		return err
	}); err != nil {
		return err
	}
	if unproved != nil {
		return o.refuse(unproved) // which waits for the other end to hear it
	}
	if err := o.judge(); err != nil {
		return err
	}
	if c.Turns != nil && o.peer.Credential() != nil {
		c.Turns.proved(c.Source)
		if o.back != nil {
			o.back()
		}
	}
	return nil
}

// readMessage reads length (2) and message; the length is judged before
// anything is allocated.
func (o *opening) readMessage(least, most int) ([]byte, error) {
	var l [2]byte
	if _, err := io.ReadFull(o.lane, l[:]); err != nil {
		return nil, lost(err)
	}
	n := int(binary.BigEndian.Uint16(l[:]))
	if n < least || n > most {
		return nil, ErrHandshake
	}
	m := make([]byte, n)
	if _, err := io.ReadFull(o.lane, m); err != nil {
		return nil, lost(err)
	}
	return m, nil
}

// lost is what is said about a lane that ended or fell silent on the way. It
// does not say where either: the other end hangs up on a message that does not
// verify.
func lost(err error) error { return fmt.Errorf("opening the channel: %w", err) }

func (o *opening) keys(h *handshake, out, in [32]byte) (err error) {
	o.peer, o.binding = h.peer, h.binding
	if o.out, err = newRecords(h.suite, out); err != nil {
		return err
	}
	o.in, err = newRecords(h.suite, in)
	return err
}

// writeConfirm shows the credential: the first record of this direction.
func (o *opening) writeConfirm() error {
	var frame []byte
	frame, o.shown = appendConfirm(nil, kindConfirm, o.config)
	return o.writeRecord(frame)
}

func (o *opening) writeRecord(plain []byte) error {
	rec := make([]byte, buffer.Prefix, buffer.Around+len(plain))
	rec = append(append(rec, plain...), make([]byte, buffer.Suffix)...)
	if err := o.out.seal(rec); err != nil {
		return err
	}
	if _, err := o.lane.Write(rec); err != nil {
		return lost(err)
	}
	return nil
}

// appendConfirm appends a frame with this end's credential (it may be empty)
// and its issuer's history, and says which credential that is.
func appendConfirm(b []byte, kind uint8, config *Config) ([]byte, *identity.Credential) {
	if config.Kind == Authority {
		// The identity is the proof, also of whoever has an expired credential, or one of a change before, to renew.
		b = AppendHeader(b, kind, 0, 4)
		return appendField(appendField(b, nil), nil), nil
	}
	var raw []byte
	c, issuer := config.Self.Show()
	if c != nil && config.Kind == Relay && !config.now().Before(c.Expires) {
		// By a relay an authority may be reached, to renew it; meanwhile it is as good
		// as none, and would be refused.
		issuer = nil
	} else if c != nil {
		raw = c.Raw()
	}
	b = AppendHeader(b, kind, 0, 4+len(raw)+len(issuer))
	return appendField(appendField(b, raw), issuer), c
}

// readConfirm reads the other end's first record.
func (o *opening) readConfirm() error {
	plain, err := o.readRecord()
	if err != nil {
		return err
	}
	unproved, err := o.takeConfirm(plain)
	if unproved != nil {
		return o.refuse(unproved)
	}
	return err
}

// takeConfirm takes the other end's first record, which may be a close instead;
// unproved is why the credential in it does not count.
func (o *opening) takeConfirm(plain []byte) (unproved, err error) {
	kind, stream, body, rest, err := cutFrame(plain)
	switch {
	case err != nil:
		return nil, ErrHandshake
	case stream == 0 && kind == kindClose:
		closed, err := parseClose(body)
		if err != nil {
			return nil, ErrHandshake
		}
		return nil, closed
	case stream != 0 || kind != kindConfirm || len(rest) != 0:
		return nil, ErrHandshake
	}
	raw, issuer, err := decodeTwo(body)
	if err != nil {
		return nil, err
	}
	if len(raw) == 0 {
		return nil, nil
	}
	credential, err := o.config.Trust.Verify(raw, issuer, o.peer.ID(), o.peer.Latest(), o.config.now())
	if err == nil {
		err = o.peer.Accept(credential)
	}
	return err, nil
}

func (o *opening) readRecord() ([]byte, error) {
	var prefix [buffer.Prefix]byte
	if _, err := io.ReadFull(o.lane, prefix[:]); err != nil {
		return nil, lost(err)
	}
	n, err := length(prefix[:])
	if err != nil || n > maxConfirm+buffer.Around {
		return nil, ErrHandshake
	}
	rec := make([]byte, n)
	copy(rec, prefix[:])
	if _, err := io.ReadFull(o.lane, rec[buffer.Prefix:]); err != nil {
		return nil, lost(err)
	}
	plain, err := o.in.open(rec)
	if err != nil {
		return nil, ErrHandshake
	}
	return plain, nil
}

var errNoCredential = errors.New("it shows no credential")

func (o *opening) judge() error {
	if o.config.Judge == nil {
		return o.refuse(errors.New("nobody is accepted here"))
	}
	if o.peer.Credential() == nil && !o.config.Proofless {
		return o.refuse(errNoCredential)
	}
	if err := o.config.Judge(o.peer); err != nil {
		return o.refuse(err)
	}
	return nil
}

// refuse tells the other end that it is not accepted, so that a person there
// is told too, and gives the error of this end. The reason said is one that
// the other end may know: it is about its own credential.
func (o *opening) refuse(err error) error {
	o.writeRecord(appendClose(nil, CloseRefused, err.Error()))
	// Without this a lane with bytes still unread here is reset on close, and
	// the refusal is lost with it.
	if w, ok := o.lane.(interface{ CloseWrite() error }); ok {
		w.CloseWrite()
		o.lane.SetReadDeadline(time.Now().Add(time.Second))
		io.CopyN(io.Discard, o.lane, maxConfirm+buffer.Around)
	}
	return &Refused{fmt.Errorf("%s: %w", o.peer.ID().Short(), err)}
}
