package channel

import (
	"io"
	"net"
	"syscall"

	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/socket"
)

// laneReader takes records off a lane, several a read. It holds a buffer only
// while bytes are in it: on a socket it waits for readability first.
//
// Not safe for concurrent use; the lane reader's goroutine owns it.
type laneReader struct {
	lane net.Conn
	raw  syscall.RawConn // nil: the lane is no socket
	buf  *buffer.Buffer
	r, w int // unread bytes are buf.Raw()[r:w]
	busy int // consecutive reads that filled the buffer

	// For the one closure that every wait uses.
	try func(fd uintptr) bool
	n   int
	err error
}

func newLaneReader(lane net.Conn) *laneReader {
	l := &laneReader{lane: lane, raw: socket.Raw(lane)}
	l.try = l.attempt
	return l
}

// fill reads at least one byte more. The bytes of earlier records are gone
// after it.
func (l *laneReader) fill() error {
	if l.r == l.w {
		l.release()
	} else if l.r > 0 || l.w == len(l.buf.Raw()) {
		// A record is incomplete: what there is of it goes to the front of a
		// buffer that can hold the rest.
		b := buffer.Get(max(l.want(), buffer.Record))
		n := copy(b.Raw(), l.buf.Raw()[l.r:l.w])
		l.buf.Release()
		l.buf, l.r, l.w = b, 0, n
	}
	if l.raw != nil {
		return l.wait()
	}
	if l.buf == nil {
		l.buf = buffer.Get(l.want())
	}
	n, err := l.lane.Read(l.buf.Raw()[l.w:])
	return l.took(n, err)
}

// wait parks until the lane is readable and takes a buffer only then, unless an incomplete record is
// in one: a goroutine parked with 32 KiB in hand costs ten times one without.
func (l *laneReader) wait() error {
	l.n, l.err = 0, nil
	err := l.raw.Read(l.try)
	if err == nil {
		err = l.err
	}
	if err == nil && l.n == 0 {
		err = io.EOF
	}
	return l.took(l.n, err)
}

// attempt is one read without waiting; false parks until the lane is readable.
func (l *laneReader) attempt(fd uintptr) bool {
	b := l.buf
	if b == nil {
		b = buffer.Get(l.want())
	}
	if l.n, l.err = socket.Read(fd, b.Raw()[l.w:]); l.err == syscall.EAGAIN {
		if l.buf == nil {
			b.Release()
		}
		l.err = nil
		return false
	}
	l.buf = b
	return true
}

func (l *laneReader) took(n int, err error) error {
	if l.buf != nil {
		if l.w += n; l.w == len(l.buf.Raw()) {
			l.busy++
		} else if n < len(l.buf.Raw())/4 {
			l.busy = 0
		}
	}
	if n > 0 {
		return nil // an error comes again with the next read
	}
	return err
}

// want is the size of the next buffer: small for a lane that whispers, the
// largest for one that fills what it is given.
func (l *laneReader) want() int {
	switch l.busy {
	case 0:
		return buffer.Shared
	case 1:
		return buffer.Record
	}
	return buffer.Batch
}

// record returns the next whole record, or nil when more must be read first.
func (l *laneReader) record() ([]byte, error) {
	if l.w-l.r < buffer.Prefix {
		return nil, nil
	}
	b := l.buf.Raw()
	n, err := length(b[l.r:])
	if err != nil {
		return nil, err
	}
	if l.w-l.r < n {
		return nil, nil
	}
	rec := b[l.r : l.r+n : l.r+n]
	l.r += n
	return rec, nil
}

func (l *laneReader) release() {
	if l.buf != nil {
		l.buf.Release()
		l.buf, l.r, l.w = nil, 0, 0
	}
}

// notSent bounds what the kernel holds unsent of a lane, so that a keystroke
// does not queue behind megabytes of a bulk stream.
const notSent = 128 << 10

// setLane prepares a lane's socket. What the kernel does not know is left out.
func setLane(c net.Conn) {
	const tcpNotSentLowat = 25 // linux/tcp.h
	if t, ok := c.(*net.TCPConn); ok {
		t.SetNoDelay(true)
		if raw, err := t.SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) {
				_ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpNotSentLowat, notSent)
			})
		}
	}
}
