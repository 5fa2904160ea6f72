package channel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/socket"
	"github.com/portal-tunnel/portal/routing"
)

const (
	// A ping goes out every pingEvery; a peer of which no record has come for deadAfter
	// is dead. Two pings fit in between, so one lost tick is forgiven. Bytes that make no
	// record are no sign of life: whoever is on the way could put a length in front that
	// swallows all that follows. The longest record comes in time by a line of 3 KiB/s.
	pingEvery = 10 * time.Second
	deadAfter = 25 * time.Second
	lookEvery = 5 * time.Second
	// A peer that is heard but takes nothing is dead too: what is queued for it
	// would be held for as long as it likes. The longest write, of 240 KiB, needs a
	// line of 4 KiB/s for this; writes become shorter on one that is slow.
	deafAfter = 60 * time.Second

	// closeTime is how long whoever closes first goes on reading, so that the
	// other end's last bytes and its close are not thrown away by a reset.
	closeTime = 2 * time.Second

	// maxSpurned is how many renewed credentials in a row may fail to verify: each
	// costs a signature's check and a line in the log, and an honest end sends one
	// in a credential's half life.
	maxSpurned = 16
	errSpurned = abuseError("it shows one credential after another that does not verify")

	// lostTime is how long the lane reader goes on when a write has failed.
	lostTime = time.Second
)

var (
	// ErrCut is why a channel ended whose lane ended without an authenticated
	// close: the connection was cut, by whomever.
	ErrCut = errors.New("the connection was cut")
	// ErrDead is why a channel ended whose other end fell silent.
	ErrDead = errors.New("nothing was heard from the other end for 25 s")
	// ErrDeaf is why a channel ended whose other end took nothing.
	ErrDeaf = errors.New("the other end took nothing for 60 s")
	// ErrClosed is why a channel ended that this end closed in good order.
	ErrClosed = errors.New("the channel is closed")
)

// Handler takes the frames of all streams, on the lane reader's goroutine. It
// must not wait, but for Clear. A body is valid until the Flush that follows it returns. One
// that has a method Fail(error) is told by it when what came was wrong.
type Handler interface {
	Frame(kind uint8, stream uint32, body []byte) error
	Flush() error
}

// End is one end of a confirmed channel. Run owns the incoming direction, the
// sealer the outgoing one; everything else may be called from anywhere.
type End struct {
	sealer
	lane   net.Conn
	config *Config
	peer   *identity.Peer
	bind   [32]byte
	opener *routing.Actor
	in     *records // the lane reader's

	rtt     atomic.Int64                  // of the last ping, or of the handshake
	heard   atomic.Int64                  // time since begin when a record last came in
	asked   atomic.Pointer[chan struct{}] // closed by the next answer to a ping; nil: nobody waits
	begin   time.Time
	pinged  time.Duration // the tick's, as the next two
	wrote   int64         // writes, when they last moved or nothing was owed
	took    time.Duration // when that was
	spurned int           // renewed credentials that did not verify, in a row; the lane reader's
	tick    *time.Timer

	ending   sync.Mutex
	ended    bool
	unlisten func()        // under ending
	done     chan struct{} // closed when err is set
	why      error
	leaving  atomic.Pointer[error] // why this end closes, once its close is queued
	agreed   atomic.Bool           // the other end closed in good order
}

func newEnd(o *opening) (*End, error) {
	c := o.config
	if c.Node == nil {
		return nil, errors.New("channel: no node for its actors")
	}
	e := &End{
		lane: o.lane, config: c, peer: o.peer, bind: o.binding, in: o.in,
		begin: time.Now(), done: make(chan struct{}), unlisten: func() {},
	}
	e.rtt.Store(int64(o.rtt))
	e.sealer.lane, e.sealer.records, e.sealer.fail = socket.NewWriter(o.lane), o.out, e.fail
	e.sealer.lost = e.lost
	e.sealer.slots = make(map[uint64]int)
	e.sealer.fewer.L = &e.sealer.mu
	e.sealer.sent = make(chan struct{})
	e.sealer.budget.Store(buffer.Batch)
	// Started last, so that look finds everything in its place.
	e.tick = time.AfterFunc(math.MaxInt64, e.look)
	setLane(o.lane)
	// A node that is closed meanwhile ends the channel, which takes both actors: it waits
	// here until both are there, or finds that it has ended.
	e.ending.Lock()
	err := e.spawn()
	e.ended = err != nil
	e.ending.Unlock()
	if err != nil {
		e.why = err
		e.tick.Stop()
		close(e.done)
		if e.opener != nil {
			e.opener.Stop(err)
		}
		return nil, err
	}
	e.listen(o.shown)
	e.tick.Reset(lookEvery)
	return e, nil
}

func (e *End) spawn() (err error) {
	if e.opener, err = e.config.Node.Spawn("", opener{e.fail}, nil); err == nil {
		e.sealer.actor, err = e.config.Node.Spawn("", &e.sealer, nil)
	}
	return err
}

// listen has every renewed credential shown to the other end, also one that was
// renewed since the confirmation was written.
func (e *End) listen(shown *identity.Credential) {
	if e.config.Kind == Authority {
		return // where none is shown
	}
	stop := e.config.Self.OnChange(e.showCredential)
	e.ending.Lock()
	e.unlisten = stop
	ended := e.ended
	e.ending.Unlock()
	if ended { // by a renewal that could not be written
		stop()
	}
	if c, _ := e.config.Self.Show(); c != shown {
		e.showCredential()
	}
}

// opener is the actor of a channel's incoming direction. Its bytes come by the lane
// reader, who sits on the descriptor. Whoever watches its address is told why the
// channel ended, and whoever stops it ends the channel.
type opener struct{ fail func(error) }

func (opener) Receive(*routing.Actor, *routing.Message) error { return nil }

// Stopped ends the channel, as the sealer's does.
func (o opener) Stopped(err error) {
	if err == nil {
		err = ErrClosed
	}
	o.fail(err)
}

// Peer is the identity at the other end, live.
func (e *End) Peer() *identity.Peer { return e.peer }

// Binding is the handshake's hash h: the same at both ends, and of no other
// channel (Noise rev. 34, §11.2).
func (e *End) Binding() [32]byte { return e.bind }

// RTT is the last measured round trip through the channel.
func (e *End) RTT() time.Duration { return time.Duration(e.rtt.Load()) }

// Aged says that the soft limit of a key is behind and a successor is due.
func (e *End) Aged() bool { return e.aged.Load() }

// Done is closed when the channel has ended; Err then says why.
func (e *End) Done() <-chan struct{} { return e.done }

// Agreed reports whether the other end closed the channel in good order, by itself
// or in answer to this end's close, which is then behind everything it has read.
func (e *End) Agreed() bool { return e.agreed.Load() }

// Err is nil until the channel has ended.
func (e *End) Err() error {
	select {
	case <-e.done:
		return e.why
	default:
		return nil
	}
}

// fail ends the channel at once. The first reason stays.
func (e *End) fail(err error) {
	e.ending.Lock()
	first, unlisten := !e.ended, e.unlisten
	e.ended = true
	e.ending.Unlock()
	if !first {
		<-e.done // whoever comes second relies on the end as the first does
		return
	}
	e.why = err
	unlisten()
	e.tick.Stop()
	e.sealer.stop(err)
	e.lane.Close() // frees the lane reader and a blocked write
	e.sealer.actor.Stop(err)
	e.opener.Stop(err)
	close(e.done)
}

// lost is told that a write to the lane failed. What the other end said before
// it hung up may be unread yet, so the lane reader has a moment to find it.
func (e *End) lost(err error) {
	e.sealer.stop(err)
	time.AfterFunc(lostTime, func() { e.fail(err) })
}

// Abort tells the other end why and ends the channel without waiting for it.
func (e *End) Abort(code CloseCode, reason error) {
	if e.leave(code, reason, reason.Error()) {
		time.AfterFunc(closeTime, func() { e.fail(reason) })
	}
}

// Close ends the channel in good order: what is queued goes out, then an
// authenticated close; then the other end's close is awaited, at most two
// seconds. A lane that takes nothing for two seconds is given up. Run must be
// running, and not be what calls Close.
func (e *End) Close() error {
	e.leave(CloseDone, ErrClosed, "")
	if e.flushed() {
		t := time.NewTimer(closeTime)
		defer t.Stop()
		select {
		case <-e.done:
		case <-t.C:
		}
	}
	e.fail(ErrClosed)
	return nil
}

// leave queues this end's close and reports whether it was the first to do so.
func (e *End) leave(code CloseCode, why error, text string) bool {
	if !e.leaving.CompareAndSwap(nil, &why) {
		return false
	}
	e.finish(appendClose(nil, code, text))
	return true
}

// flushed waits until the close is written and reports whether it was. It gives
// up a lane that has taken nothing for two seconds, or not all in 25.
func (e *End) flushed() bool {
	t := time.NewTicker(closeTime)
	defer t.Stop()
	before := e.writes.Load()
	for range deadAfter / closeTime {
		select {
		case <-e.sent:
			return true
		case <-t.C:
		}
		now := e.writes.Load()
		if now == before {
			return false
		}
		before = now
	}
	return false
}

// aborted is why this end gave the channel up, nil when it did not.
func (e *End) aborted() error {
	if why := e.leaving.Load(); why != nil && *why != ErrClosed {
		return *why
	}
	return nil
}

// look runs every five seconds: it pings, and ends a channel whose other end
// has been silent for too long.
func (e *End) look() {
	now := time.Since(e.begin)
	if now-time.Duration(e.heard.Load()) >= deadAfter {
		e.fail(ErrDead)
		return
	}
	if n := e.writes.Load(); n != e.wrote || !e.owes() {
		e.wrote, e.took = n, now
	} else if now-e.took >= deafAfter {
		e.fail(ErrDeaf)
		return
	}
	if now-e.pinged >= pingEvery {
		e.pinged = now
		var frame [frameHeader + 8]byte
		b := AppendHeader(frame[:0], kindPing, 0, 8)
		b = binary.BigEndian.AppendUint64(b, uint64(now))
		e.Control(kindPing, b)
	}
	e.ending.Lock()
	if !e.ended {
		e.tick.Reset(lookEvery)
	}
	e.ending.Unlock()
}

// Ping measures the round trip now; RTT has it when the answer is in.
func (e *End) Ping() {
	b := AppendHeader(nil, kindPing, 0, 8)
	e.Control(kindPing, binary.BigEndian.AppendUint64(b, uint64(time.Since(e.begin))))
}

// Measure measures the round trip now. That of the handshake, which RTT has at
// first, is longer by what the other end had to do before it could answer.
func (e *End) Measure(ctx context.Context) (time.Duration, error) {
	answered := make(chan struct{})
	for !e.asked.CompareAndSwap(nil, &answered) {
		if theirs := e.asked.Load(); theirs != nil {
			answered = *theirs // somebody asks already
			break
		}
	}
	e.Ping()
	select {
	case <-answered:
		return e.RTT(), nil
	case <-e.Done():
		return 0, e.Err()
	case <-ctx.Done():
		return 0, fmt.Errorf("measuring the round trip: %w", ctx.Err())
	}
}

// Doubt asks the other end for a sign of life and ends the channel with ErrDead
// when none comes within d: for a machine that slept, where silence may have
// lasted longer than its clocks say.
func (e *End) Doubt(d time.Duration) {
	before := e.heard.Load()
	e.Ping()
	time.AfterFunc(d, func() {
		if e.heard.Load() == before {
			e.fail(ErrDead)
		}
	})
}

// showCredential sends a renewed credential into the open channel.
func (e *End) showCredential() {
	frame, _ := appendConfirm(nil, kindCredential, e.config)
	e.Control(kindCredential, frame)
}

// Run reads the lane until the channel ends and returns why. It is the only
// reader, on the caller's goroutine.
func (e *End) Run(h Handler) error {
	err := e.read(h)
	switch closed := (*Closed)(nil); {
	case err == nil: // their close: answer it, then it is over
		e.agreed.Store(true)
		e.leave(CloseDone, ErrClosed, "")
		e.flushed()
		err = ErrClosed
	case errors.As(err, &closed), errors.Is(err, ErrCut), e.Err() != nil:
		// Nobody is there to be told.
	default:
		code := CloseProtocol
		if abuse := (interface{ Abuse() bool })(nil); errors.As(err, &abuse) {
			code = CloseAbuse
		}
		// First of all: telling the other end takes as long as the lane does.
		if f, ok := h.(interface{ Fail(error) }); ok {
			f.Fail(err)
		}
		if e.leave(code, err, "") {
			e.flushed()
		}
	}
	e.fail(err)
	return e.Err()
}

func (e *End) read(h Handler) error {
	in := newLaneReader(e.lane)
	defer in.release()
	for {
		if err := in.fill(); err != nil {
			if why := e.aborted(); why != nil {
				return why
			}
			return fmt.Errorf("%w: %w", ErrCut, err)
		}
		for heard := false; ; heard = true {
			rec, err := in.record()
			if err != nil {
				return err
			}
			if rec == nil {
				break
			}
			plain, err := e.in.open(rec)
			if err != nil {
				return err
			}
			if !heard {
				e.heard.Store(int64(time.Since(e.begin)))
			}
			if e.aborted() != nil {
				continue // read on only so that the close arrives
			}
			ended, err := e.frames(plain, h)
			if err == nil && ended {
				err = h.Flush()
				if err == nil {
					return nil
				}
			}
			if err != nil {
				h.Flush()
				return err
			}
		}
		if err := h.Flush(); err != nil {
			return err
		}
		if e.in.aged() { // the other end may not be the one that makes successors
			e.aged.Store(true)
		}
	}
}

// frames hands on each frame of a record. It reports whether the last one was
// the other end's close.
func (e *End) frames(plain []byte, h Handler) (ended bool, err error) {
	for len(plain) > 0 {
		kind, stream, body, rest, err := cutFrame(plain)
		if err != nil {
			return false, err
		}
		plain = rest
		if stream != 0 || kind >= 0x10 || kind == 0x06 {
			err = h.Frame(kind, stream, body)
		} else {
			ended, err = e.frame(kind, body)
		}
		if err != nil {
			return false, err
		}
		if ended {
			return true, nil
		}
	}
	return false, nil
}

// frame handles one of the channel's own frames.
func (e *End) frame(kind uint8, body []byte) (ended bool, err error) {
	switch kind {
	case kindPing:
		if len(body) != 8 {
			return false, errFrame
		}
		var frame [frameHeader + 8]byte
		// Behind our own close nothing may follow, and nothing need be said.
		e.Control(kindPong, append(AppendHeader(frame[:0], kindPong, 0, 8), body...))
		return false, nil
	case kindPong:
		if len(body) != 8 {
			return false, errFrame
		}
		if d := int64(time.Since(e.begin)) - int64(binary.BigEndian.Uint64(body)); d >= 0 {
			e.rtt.Store(d)
			if asked := e.asked.Swap(nil); asked != nil {
				close(*asked)
			}
		}
		return false, nil
	case kindCredential:
		return false, e.renewed(body)
	case kindClose:
		closed, err := parseClose(body)
		if err != nil {
			return false, err
		}
		if closed.Code != CloseDone {
			return false, closed
		}
		return true, nil
	}
	return false, errFrame
}

// renewed takes a credential that the other end shows anew. Whether streams may
// go on under it is decided by whoever holds leases on the peer.
func (e *End) renewed(body []byte) error {
	raw, issuer, err := decodeTwo(body)
	if err != nil {
		return errFrame
	}
	if now := e.peer.Credential(); now != nil && bytes.Equal(now.Raw(), raw) {
		return nil
	}
	c, err := e.config.Trust.Verify(raw, issuer, e.peer.ID(), e.peer.Latest(), e.config.now())
	if err == nil {
		err = e.peer.Accept(c)
	}
	if err != nil {
		// The old credential still counts until it ends: a renewal that does not
		// verify takes nothing away and gives nothing.
		e.config.Logger.Warn("a renewed credential is not accepted", "peer", e.peer.ID(), "err", err)
		if e.spurned++; e.spurned == maxSpurned {
			return errSpurned
		}
		return nil
	}
	e.spurned = 0
	return nil
}

// abuseError ends the channel of a peer that uses up its budget.
type abuseError string

func (e abuseError) Error() string { return string(e) }
func (abuseError) Abuse() bool     { return true }
