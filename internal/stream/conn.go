package stream

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/routing"
)

// closedFor is how long a stream that its user has closed waits for the other
// end's end, as FIN_WAIT2 does.
const closedFor = 60 * time.Second

// Conn is one end of a stream. It is a net.Conn for Go programs; Join gives it
// to a local socket instead. Its actor is the only one that may wait on that
// socket's writes.
//
// The two directions have a lock each; when both are taken, recv comes first.
type Conn struct {
	mux    *Mux
	id     uint32
	opener bool // this end opened it
	actor  *routing.Actor
	queue  buffer.Queue

	recv     sync.Mutex
	readable sync.Cond // L is recv: bytes, the end, an error, an answer
	answered bool      // opened
	why      error     // why the stream is over, if not in good order
	received uint64    // offset after the last byte taken off the lane
	consumed uint64    // offset after the last byte its reader has
	granted  uint64    // the credit that the other end has
	window   int
	smaller  int    // the window before it grew, until it has been used up once more; else 0
	mark     uint64 // consumed, when the window was last looked at
	near     bool   // the path was a short one then
	markAt   time.Time
	half     halfway
	first    chunk // held bytes, oldest first
	chunks   []chunk
	held     atomic.Int64
	scratch  [headerSize + 8]byte // where a credit frame is written
	ended    bool                 // an end came and its total was right
	writing  bool                 // the actor is writing a chunk to local
	closed   bool                 // the user has closed it: what comes is not wanted
	settled  bool                 // it ended in good order and everything is delivered
	readTill time.Time
	readTime *time.Timer
	linger   *time.Timer // after Close

	local local // set by Join

	send      sync.Mutex
	writable  sync.Cond   // L is send: credit, an error
	hunger    *time.Timer // of a wait for credit that gives up; roomWithin's
	starved   net.Conn    // what Join reads from and watches while there is no credit; else nil
	writes    sync.Mutex  // one Write at a time; taken before send
	ending    bool        // CloseWrite was called: no more credit is given out
	sent      uint64
	limit     uint64 // credit: bytes up to here may be sent
	sentEnd   bool
	failed    error // why, for writers
	writeTill time.Time
	writeTime *time.Timer

	doneRecv, doneSend atomic.Bool   // over on the wire, by direction
	done               chan struct{} // closed when nothing is left to do here
}

func newConn(m *Mux, id uint32) *Conn {
	c := &Conn{mux: m, id: id, window: firstWindow, done: make(chan struct{})}
	c.readable.L, c.writable.L = &c.recv, &c.send
	return c
}

// spawn gives the stream its address on the node. An acceptor's needs recv.
func (c *Conn) spawn() (err error) {
	c.actor, err = c.mux.node.Spawn("", c, nil)
	return err
}

// ID is the stream's number in its channel, the same at both ends.
func (c *Conn) ID() uint32 { return c.id }

// over reports, under recv, that the stream was reset or refused.
func (c *Conn) over() bool { return c.why != nil }

// Wait returns when the other end has answered: nil when it admitted the
// stream, else a *RefusedError or why the stream was reset.
func (c *Conn) Wait(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		c.recv.Lock()
		c.readable.Broadcast()
		c.recv.Unlock()
	})
	defer stop()
	c.recv.Lock()
	defer c.recv.Unlock()
	for !c.answered && c.why == nil && ctx.Err() == nil {
		c.readable.Wait()
	}
	switch {
	case c.answered:
		return nil
	case c.why != nil:
		return c.why
	}
	return fmt.Errorf("waiting for the stream's answer: %w", ctx.Err())
}

// frame takes every frame but data, from the lane reader.
func (c *Conn) frame(kind uint8, body []byte) error {
	switch kind {
	case frameCredit:
		n, err := parseOffset(body)
		if err == nil {
			c.credit(n)
		}
		return err
	case frameOpened:
		n, err := parseOffset(body)
		if err != nil {
			return err
		}
		c.recv.Lock()
		again := c.answered || !c.opener
		c.answered = true
		c.readable.Broadcast()
		c.recv.Unlock()
		if again {
			return &ProtocolError{fmt.Sprintf("stream %d is answered twice or by its opener", c.id)}
		}
		c.credit(n)
		return nil
	case frameEnd:
		n, err := parseOffset(body)
		if err != nil {
			return err
		}
		return c.theirEnd(n)
	}
	code, reason, err := parseCode(body)
	if err != nil {
		return err
	}
	if kind == frameReset {
		if !c.opener && !c.answeredBytes() {
			// Opened and given up before a byte of an answer: that can be done in
			// a loop, so it is counted.
			c.mux.refused.Add(1)
		}
		if !c.end(&ResetError{Code: code, Reason: reason}, false, nil) {
			c.mux.lateReset(c.id, code) // over in this moment
		}
		return nil
	}
	c.recv.Lock()
	wrong := !c.opener || c.answered
	c.recv.Unlock()
	if wrong {
		return &ProtocolError{fmt.Sprintf("stream %d is refused after it was opened", c.id)}
	}
	c.end(&RefusedError{Code: code, Reason: reason}, false, nil)
	return nil
}

func (c *Conn) answeredBytes() bool {
	c.send.Lock()
	defer c.send.Unlock()
	return c.sent > 0
}

// Reset ends both directions at once: the other end's application gets a
// connection reset, and so does the local one, also when everything has arrived
// and only its reader is slow.
func (c *Conn) Reset(code Code, reason string) {
	c.kill(&ResetError{Code: code, Reason: reason, Local: true}, true)
}

// kill ends the stream at this end and tells the other, unless the other end
// never heard of it or the stream is over on the wire. One that is over on the
// wire is ended only when undelivered is set.
func (c *Conn) kill(why *ResetError, undelivered bool) {
	var tell []byte
	if !c.wireOver() && why.Code != CodeChannel {
		tell = appendCode(nil, frameReset, c.id, why.Code, why.Reason)
	}
	c.end(why, undelivered, tell)
}

func (c *Conn) wireOver() bool { return c.doneRecv.Load() && c.doneSend.Load() }

// end ends the stream at this end for a reason that is not good order. A
// stream that is over on the wire goes on to its reader, unless what it holds
// cannot be delivered. The other end is told by the frame tell, if it ever heard of the stream, and
// before anything that it says next is answered. end reports false when the stream had ended before.
func (c *Conn) end(why error, undelivered bool, tell []byte) (ended bool) {
	over := c.wireOver()
	if over && !undelivered {
		return false
	}
	c.recv.Lock()
	if c.why != nil || c.settled {
		c.recv.Unlock()
		return false
	}
	c.why = why
	c.dropLocked()
	if tell != nil && !c.opener {
		c.mux.over.Control(key(frameReset, c.id), tell)
	}
	c.readable.Broadcast()
	l := c.local.conn
	// Both directions at once: who has read the reset must not write to nobody.
	c.send.Lock()
	c.failed = why
	c.writableLocked()
	c.send.Unlock()
	c.recv.Unlock()
	// What is queued of a stream that is over on the wire goes out, its end with it: the other
	// end is told of nothing else.
	if !over || tell != nil {
		if sealed := c.mux.over.Discard(&c.queue, why); sealed && tell != nil && c.opener {
			c.mux.over.Control(key(frameReset, c.id), tell)
		}
	}
	c.doneRecv.Store(true)
	c.doneSend.Store(true)
	switch {
	case l == nil:
	case c.local.raw != nil:
		Abort(l) // closing a socket does not wait
	default:
		c.local.aborts.Go(func() { Abort(l) })
	}
	c.finished(why)
	return true
}

// settle finishes a stream both of whose directions are over and delivered.
func (c *Conn) settle() {
	c.recv.Lock()
	c.send.Lock()
	// doneSend, not sentEnd: the end is queued, so nothing that closes the channel
	// in good order gets before it.
	settled := c.doneSend.Load() && c.ended && c.emptyLocked() && !c.writing && c.why == nil && !c.settled
	c.send.Unlock()
	if !settled {
		c.recv.Unlock()
		return
	}
	c.settled = true
	if c.local.raw != nil {
		c.local.conn.SetReadDeadline(time.Unix(1, 0)) // ends awaitReset
	}
	c.recv.Unlock()
	c.finished(nil)
}

// finished lets go of everything, once: why or settled is set.
func (c *Conn) finished(why error) {
	c.recv.Lock()
	stopTimer(&c.readTime)
	stopTimer(&c.linger)
	actor := c.actor
	c.recv.Unlock()
	c.send.Lock()
	stopTimer(&c.writeTime)
	c.send.Unlock()
	if actor != nil {
		actor.Stop(why)
	}
	c.mux.finished(c)
	close(c.done)
}

func stopTimer(t **time.Timer) {
	if *t != nil {
		(*t).Stop()
		*t = nil
	}
}

// Dropped returns the reset that came from the other end behind the stream's end in good order: it has
// given up what it had not read. Nil says that none has come so far.
func (c *Conn) Dropped() error {
	c.mux.mu.Lock()
	defer c.mux.mu.Unlock()
	for _, l := range c.mux.late {
		if l.id == c.id {
			return &ResetError{Code: l.code}
		}
	}
	if c.id <= c.mux.forgot {
		return &ResetError{Code: CodeClosed, Reason: "too many streams were reset since", Local: true}
	}
	return nil
}

// Done is closed when nothing of the stream is left at this end.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Close ends the stream as closing a TCP connection does: what was written is
// delivered, then an end; what the other end still sends is answered by a
// reset, and so is the stream when there are bytes unread. A joined stream is
// reset. Close does not wait for a Write, but may for the lane, as a Write does.
func (c *Conn) Close() error {
	c.recv.Lock()
	if c.closed {
		c.recv.Unlock()
		return net.ErrClosed
	}
	c.closed = true
	abort := !c.emptyLocked() || c.local.conn != nil
	if c.why == nil && !c.settled && !abort {
		c.linger = time.AfterFunc(closedFor, func() { c.Reset(CodeClosed, "") })
	}
	stopTimer(&c.readTime)
	c.readable.Broadcast()
	c.recv.Unlock()
	if abort {
		c.Reset(CodeClosed, "")
		return nil
	}
	c.CloseWrite()
	return nil
}

// SetDeadline is SetReadDeadline and SetWriteDeadline.
func (c *Conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// SetReadDeadline is as for any net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.recv.Lock()
	defer c.recv.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.readTill = t
	stopTimer(&c.readTime)
	if !t.IsZero() && c.why == nil && !c.settled {
		c.readTime = time.AfterFunc(time.Until(t), func() {
			c.recv.Lock()
			c.readable.Broadcast()
			c.recv.Unlock()
		})
	}
	c.readable.Broadcast()
	return nil
}

// SetWriteDeadline is as for any net.Conn. Bytes of a Write that it ends may
// have been sent; they are counted. Behind CloseWrite it changes nothing.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.send.Lock()
	defer c.send.Unlock()
	if c.failed != nil || c.ending {
		return nil
	}
	c.writeTill = t
	stopTimer(&c.writeTime)
	// With a deadline a sender must not sit in a write to the lane.
	c.queue.Async.Store(!t.IsZero())
	c.mux.over.Stop(&c.queue, nil)
	if !t.IsZero() {
		c.writeTime = time.AfterFunc(time.Until(t), func() {
			c.send.Lock()
			if !c.writeTill.IsZero() && !time.Now().Before(c.writeTill) {
				c.mux.over.Stop(&c.queue, os.ErrDeadlineExceeded)
			}
			c.writable.Broadcast()
			c.send.Unlock()
		})
	}
	c.writable.Broadcast()
	return nil
}

func past(t time.Time) bool { return !t.IsZero() && !time.Now().Before(t) }

// Addr is the address of a stream's end: the stream's number.
type Addr struct{ ID uint32 }

// Network is "portal".
func (Addr) Network() string  { return "portal" }
func (a Addr) String() string { return fmt.Sprintf("stream %d", a.ID) }

// LocalAddr and RemoteAddr are both the stream.
func (c *Conn) LocalAddr() net.Addr { return Addr{c.id} }

// RemoteAddr is the stream, as LocalAddr.
func (c *Conn) RemoteAddr() net.Addr { return Addr{c.id} }
