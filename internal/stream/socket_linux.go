package stream

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/portal-tunnel/portal/internal/buffer"
)

// maxWrite is how many frames of one lane read leave in one write.
const maxWrite = 16

// rawOf gives the descriptor of a socket that can be read and written without
// waiting, nil for any other connection.
func rawOf(c net.Conn) syscall.RawConn {
	switch s := c.(type) {
	case *net.TCPConn:
		raw, err := s.SyscallConn()
		if err == nil {
			return raw
		}
	case *net.UnixConn:
		raw, err := s.SyscallConn()
		if err == nil {
			return raw
		}
	}
	return nil
}

// attempt is one read without waiting, scattered over as many frames as were
// asked for. False parks the goroutine until the socket is readable.
func (r *reader) attempt(fd uintptr) bool {
	b := buffer.ForPayload(r.max)
	r.slots = b.Slots(r.slots[:0], r.max)
	for {
		if len(r.slots) == 1 {
			r.n, r.err = unix.Read(int(fd), r.slots[0])
		} else {
			r.n, r.err = unix.Readv(int(fd), r.slots)
		}
		if r.err != unix.EINTR {
			break
		}
	}
	if r.err == unix.EAGAIN {
		b.Release()
		r.err = nil
		return false
	}
	r.n = max(r.n, 0)
	r.buf = b
	return true
}

// awaitReset waits, behind the end of what the socket's peer sends, for a reset
// of it: reads no longer tell. It returns false when the stream is over: then
// the socket is closed or its read deadline is past.
func (r *reader) awaitReset() bool {
	if r.raw == nil {
		return false
	}
	reset := false
	r.raw.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd)}}
		_, err := unix.Poll(p, 0)
		for err == unix.EINTR {
			_, err = unix.Poll(p, 0)
		}
		reset = err == nil && p[0].Revents&unix.POLLERR != 0
		return reset
	})
	return reset
}

// nowWriter writes to a socket without waiting. Its fields are for the one
// closure that every write uses; the stream's recv lock guards them.
type nowWriter struct {
	try  func(fd uintptr) bool
	data [][]byte
	n    int
	err  error
}

func (w *nowWriter) init() { w.try = w.attempt }

func (w *nowWriter) attempt(fd uintptr) bool {
	for {
		if len(w.data) == 1 {
			w.n, w.err = unix.Write(int(fd), w.data[0])
		} else {
			w.n, w.err = unix.Writev(int(fd), w.data)
		}
		if w.err != unix.EINTR {
			break
		}
	}
	if w.err == unix.EAGAIN {
		w.n, w.err = 0, nil
	}
	w.n = max(w.n, 0)
	return true
}

// writeNow writes as much of data as the socket takes at once.
func (l *local) writeNow(data [][]byte) (int, error) {
	if l.raw == nil {
		return 0, nil
	}
	w := &l.now
	w.data, w.n, w.err = data, 0, nil
	err := l.raw.Write(w.try)
	w.data = nil
	if w.err != nil {
		err = w.err
	}
	return w.n, err
}
