package stream

import (
	"golang.org/x/sys/unix"

	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/socket"
)

// maxWrite is how many frames of one lane read leave in one write.
const maxWrite = 16

// attempt is one read without waiting, scattered over as many frames as were
// asked for. False parks the goroutine until the socket is readable.
func (r *reader) attempt(fd uintptr) bool {
	b := buffer.ForPayload(r.max)
	r.slots = b.Slots(r.slots[:0], r.max)
	if r.n, r.err = socket.Read(fd, r.slots...); r.err == unix.EAGAIN {
		b.Release()
		r.err = nil
		return false
	}
	r.buf = b
	return true
}

// isReset reports whether a TCP socket is over though its own end has not been sent. One whose peer
// has ended is not: it is in CLOSE-WAIT.
func (l *local) isReset() bool {
	if l.raw == nil {
		return false
	}
	const closed = 7 // TCP_CLOSE of linux/tcp_states.h
	reset := false
	l.raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		reset = err == nil && info.State == closed
	})
	return reset
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
	if w.n, w.err = socket.Write(fd, w.data...); w.err == unix.EAGAIN {
		w.err = nil
	}
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
