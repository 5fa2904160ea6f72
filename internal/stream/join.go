package stream

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/socket"
)

// local is the socket that a stream is joined to.
type local struct {
	conn  net.Conn
	raw   syscall.RawConn // nil: no socket, written by the actor only
	ended bool            // the other end's end was passed on
	now   nowWriter

	aborts sync.WaitGroup // closes conn after a reset
}

// Arm makes a TCP socket reset its peer whenever it is closed without Disarm,
// also when this process is killed: SO_LINGER with a time of zero. It is the
// first thing to happen to a socket that was accepted or dialled.
func Arm(c net.Conn) {
	if t, ok := c.(interface{ SetLinger(int) error }); ok {
		t.SetLinger(0)
	}
}

// Abort closes a socket so that its peer sees a reset.
func Abort(c net.Conn) {
	Arm(c)
	c.Close()
}

// Disarm lets a socket end as TCP ends; only after both directions have.
func Disarm(c net.Conn) {
	if t, ok := c.(interface{ SetLinger(int) error }); ok {
		t.SetLinger(-1)
	}
}

// closeWrite passes on an end. A connection that cannot half-close is left
// open: its reader sees the end when everything is over.
func closeWrite(c net.Conn) error {
	w, ok := c.(interface{ CloseWrite() error })
	if !ok {
		return nil
	}
	// ENOTCONN: the peer is gone, after an exchange that its reader has judged.
	if err := w.CloseWrite(); err != nil && !errors.Is(err, syscall.ENOTCONN) {
		return err
	}
	return nil
}

// Join connects the stream with a local connection, which must be armed, and
// owns it from then on. It returns when both are over: nil when both
// directions ended in good order, else why the stream was reset. The local
// connection is closed, in good order or by a reset accordingly. A stream is joined
// once: a second connection is reset, and the first goes on.
//
// This goroutine reads the local connection; the lane reader and the stream's
// actor write it.
func (c *Conn) Join(l net.Conn) error { return c.JoinChecked(l, nil) }

// JoinChecked is Join that shows check what the local connection sends, in order,
// before it goes out: an error resets both sides.
func (c *Conn) JoinChecked(l net.Conn, check func([]byte) error) error {
	c.recv.Lock()
	why := c.why
	switch {
	case why != nil:
	case c.closed:
		why = net.ErrClosed
	case c.local.conn != nil:
		why = errJoined
	}
	if why != nil {
		c.recv.Unlock()
		Abort(l)
		return why
	}
	c.local.conn = l
	c.local.raw = socket.Raw(l)
	c.local.now.init()
	wake := !c.emptyLocked() || c.ended
	c.recv.Unlock()
	if wake {
		c.actor.Wake()
	}
	c.pump(l, check)
	<-c.done
	c.recv.Lock()
	why = c.why
	c.recv.Unlock()
	if why != nil {
		c.local.aborts.Wait()
		return why
	}
	Disarm(l)
	l.Close()
	return nil
}

// pump reads the local connection and sends what it reads, until its end.
func (c *Conn) pump(l net.Conn, check func([]byte) error) {
	in := reader{conn: l, raw: c.local.raw, check: check}
	in.init()
	for {
		room, err := c.credited(&in)
		if err != nil {
			return // reset; whoever did it has closed l
		}
		b, n, err := in.read(min(room, c.mux.over.Budget()), c.id)
		if in.objection != nil {
			c.kill(&ResetError{Code: CodeLocal, Reason: in.objection.Error(), Local: true}, true)
			return
		}
		if n > 0 {
			c.writes.Lock()
			err := c.push(b, n)
			c.doneWriting()
			if err != nil { // what was read is lost
				var why *ResetError
				if !errors.As(err, &why) {
					why = &ResetError{Code: CodeLocal, Reason: err.Error(), Local: true}
				}
				c.kill(why, true)
				return
			}
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			if c.toldAWriter() {
				c.localFailed()
				return
			}
			if err := c.CloseWrite(); err != nil {
				c.kill(&ResetError{Code: CodeChannel, Reason: err.Error(), Local: true}, true)
				return
			}
			if in.awaitReset() {
				c.localFailed()
			}
			return
		default:
			c.localFailed()
			return
		}
	}
}

// credited is room for what in reads next. When none comes for a while it watches in, which may be
// reset meanwhile: nobody reads, who would be told.
func (c *Conn) credited(in *reader) (int, error) {
	if in.raw == nil {
		return c.room(buffer.Batch)
	}
	for {
		n, err := c.roomWithin(buffer.Batch, starvedFor)
		if !errors.Is(err, errStarved) {
			return n, err
		}
		c.send.Lock()
		starved := c.failed == nil && !c.ending && c.limit == c.sent
		if starved {
			c.starved = in.conn
		}
		c.send.Unlock()
		if !starved {
			continue
		}
		reset := in.awaitReset() // or until writableLocked
		c.send.Lock()
		c.starved = nil
		c.send.Unlock()
		in.conn.SetReadDeadline(time.Time{})
		if reset {
			c.localFailed() // which the next look finds
		}
	}
}

// toldAWriter reports whether what looks like the end of the local connection is a reset: the kernel
// says that once, to whoever reads or writes first, and to the other it says an end.
func (c *Conn) toldAWriter() bool {
	c.recv.Lock()
	defer c.recv.Unlock()
	// Behind our own end nothing is written, and a connection may be over in good order.
	return !c.local.ended && c.local.isReset()
}

// reader reads a local connection into frames, taking a buffer only when bytes
// are there.
type reader struct {
	conn net.Conn
	raw  syscall.RawConn
	busy int // consecutive reads that filled their buffer

	check     func([]byte) error // nil: nobody looks
	objection error              // check's

	// For the one closure that every wait uses.
	try   func(fd uintptr) bool
	max   int
	buf   *buffer.Buffer
	slots [][]byte
	n     int
	err   error
}

func (r *reader) init() {
	if r.raw != nil {
		r.try = r.attempt
	}
}

// want is how much the next read should take, at most n.
func (r *reader) want(n int) int {
	switch r.busy {
	case 0:
		return min(n, buffer.Shared)
	case 1:
		return min(n, buffer.Bulk)
	}
	return min(n, buffer.Batch)
}

// read gives a buffer with frames of at most n bytes of payload for stream id.
// The buffer is nil when no bytes came.
func (r *reader) read(n int, id uint32) (*buffer.Buffer, int, error) {
	r.max = r.want(n)
	r.n, r.err = 0, nil
	if r.raw != nil {
		if err := r.raw.Read(r.try); err != nil && r.err == nil {
			r.err = err
		} else if r.err == nil && r.n == 0 {
			r.err = io.EOF
		}
	} else {
		r.buf = buffer.ForPayload(min(r.max, buffer.Bulk))
		r.slots = r.buf.Slots(r.slots[:0], min(r.max, buffer.Bulk))
		r.n, r.err = r.conn.Read(r.slots[0])
	}
	b := r.buf
	r.buf = nil
	if r.check != nil {
		left := r.n
		for _, s := range r.slots {
			if left <= 0 || r.objection != nil {
				break
			}
			k := min(left, len(s))
			r.objection = r.check(s[:k])
			left -= k
		}
		if r.objection != nil {
			r.n = 0
		}
	}
	clear(r.slots)
	if r.n <= 0 {
		if b != nil {
			b.Release()
		}
		return nil, 0, r.err
	}
	if r.n == r.max {
		r.busy++
	} else if r.n < r.max/4 {
		r.busy = 0
	}
	for left := r.n; left > 0; {
		k := min(left, buffer.Bulk)
		putHeader(b.Next(), frameData, id, k)
		b.Commit(headerSize + k)
		left -= k
	}
	return b, r.n, r.err
}
