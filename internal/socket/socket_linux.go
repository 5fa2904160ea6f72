package socket

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Raw gives the descriptor of a TCP or Unix socket, for the calls of this package; nil for any other
// connection, and for a socket that was set to wait, as os.File.Fd does to one that it is asked for:
// there a call would keep a core for as long as it waits. The functions that Read and Write of
// what is returned are given return false to wait. Those of a closed socket fail with net.ErrClosed.
func Raw(c net.Conn) syscall.RawConn {
	switch c.(type) {
	case *net.TCPConn, *net.UnixConn:
	default:
		return nil
	}
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return nil
	}
	waits := false // nor does one that is closed
	raw.Control(func(fd uintptr) {
		flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
		waits = err != nil || flags&unix.O_NONBLOCK == 0
	})
	if waits {
		return nil
	}
	return raw
}

// Read is read(2), or readv(2) into several buffers, at most 64. The error is unix.EAGAIN when there is
// nothing yet; n is 0 with any error, and without one at the end.
func Read(fd uintptr, bufs ...[]byte) (n int, err error) {
	// Write has this loop again: by a function value bufs would escape to the heap.
	for {
		if len(bufs) == 1 {
			n, err = read(int(fd), bufs[0])
		} else {
			n, err = readv(int(fd), bufs[:min(len(bufs), most)])
		}
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// Write is write(2), or writev(2) of several buffers, of which it takes 64 at most. The error is
// unix.EAGAIN when nothing is taken now; n is 0 with any error.
func Write(fd uintptr, bufs ...[]byte) (n int, err error) {
	for {
		if len(bufs) == 1 {
			n, err = write(int(fd), bufs[0])
		} else {
			n, err = writev(int(fd), bufs[:min(len(bufs), most)])
		}
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// Splice is splice(2): at most n bytes from one descriptor to the other, one of which is a pipe's. The
// error is unix.EAGAIN when nothing can be moved now; moved is 0 with any error, and without one at
// the end.
func Splice(from, to uintptr, n int) (moved int, err error) {
	for {
		moved, err = splice(int(from), int(to), n)
		if err != unix.EINTR {
			return max(moved, 0), err
		}
	}
}

// most buffers go into one call.
const most = 64

func (w *Writer) attempt(fd uintptr) bool {
	for len(w.rest) > 0 {
		n, err := Write(fd, w.rest...)
		if err == unix.EAGAIN {
			return false
		}
		if err != nil {
			w.err = err
			return true
		}
		for n > 0 || len(w.rest) > 0 && len(w.rest[0]) == 0 {
			if k := len(w.rest[0]); n >= k {
				n -= k
				w.rest[0], w.rest = nil, w.rest[1:]
				continue
			}
			w.rest[0] = w.rest[0][n:]
			break
		}
	}
	return true
}
