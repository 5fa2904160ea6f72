package relay

import (
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/socket"
)

// pipeSize is what a pipe takes at once: as much as a channel writes at once.
const pipeSize = 256 << 10

// forward moves what comes from one connection to the other until its end. Between sockets,
// what is little goes by a buffer, and a direction that fills that by a pipe in the kernel (splice(2)).
// Either is held only as long as bytes are in it: an idle lane has its two sockets and nothing else.
func forward(to, from net.Conn) error {
	in, out := socket.Raw(from), socket.Raw(to)
	if in == nil || out == nil {
		_, err := io.Copy(to, from)
		return err
	}
	f := new(forwarder)
	defer f.drop()
	take, give := f.take, f.give
	for {
		err := in.Read(take)
		if err == nil && f.err == nil && !f.ended {
			err = out.Write(give)
		}
		if err == nil {
			err = f.err
		}
		if err != nil || f.ended {
			return err
		}
	}
}

// A forwarder has what is on its way in one direction. Its goroutine owns it.
type forwarder struct {
	busy bool // the last read took all that it could: the next goes by a pipe

	buf  *buffer.Buffer
	data []byte // of buf, not written yet
	pipe *pipe
	held int // bytes in pipe

	ended bool
	err   error
}

// take is one read without waiting; false waits until there is something.
func (f *forwarder) take(fd uintptr) bool {
	var n int
	if f.busy {
		f.pipe = pipes.get()
	}
	if f.pipe != nil {
		n, f.err = socket.Splice(fd, f.pipe.in, pipeSize)
		f.held = n
		f.busy = n > buffer.Shared
		if n == 0 && (f.err == nil || f.err == unix.EAGAIN) {
			f.rest() // the end, nothing yet, or an urgent byte, before which it stops: a read tells
		}
	}
	if f.pipe == nil {
		f.buf = buffer.Get(buffer.Shared)
		n, f.err = socket.Read(fd, f.buf.Raw())
		f.data = f.buf.Raw()[:n]
		f.busy = n == len(f.buf.Raw())
	}
	if n > 0 {
		return true
	}
	f.rest()
	if f.err == unix.EAGAIN {
		f.err = nil
		return false
	}
	f.ended = f.err == nil
	return true
}

// give writes what was taken, as far as that is taken without waiting; false waits for more.
func (f *forwarder) give(fd uintptr) bool {
	for f.held > 0 || len(f.data) > 0 {
		var n int
		if f.held > 0 {
			n, f.err = socket.Splice(f.pipe.out, fd, f.held)
			f.held -= n
		} else {
			n, f.err = socket.Write(fd, f.data)
			f.data = f.data[n:]
		}
		switch {
		case f.err == unix.EAGAIN:
			f.err = nil
			return false
		case f.err != nil:
			return true
		case n == 0: // no system does that
			f.err = io.ErrShortWrite
			return true
		}
	}
	f.rest()
	return true
}

// rest gives back what holds nothing.
func (f *forwarder) rest() {
	if f.buf != nil {
		f.buf.Release()
		f.buf, f.data = nil, nil
	}
	if f.pipe != nil {
		pipes.put(f.pipe)
		f.pipe = nil
	}
}

// drop gives back all. A pipe with bytes in it is of no more use.
func (f *forwarder) drop() {
	if f.held > 0 {
		pipes.close(f.pipe)
		f.pipe = nil
	}
	f.rest()
}

// A pipe has one owner, or is idle in the pool.
type pipe struct{ in, out uintptr }

// pipeIdle is how long a pipe is kept that nobody needs: bulk needs it again within milliseconds.
const pipeIdle = time.Second

// pipes are those of this process.
var pipes pipePool

// A pipePool owns its idle pipes. It closes them itself and leaves none to the collector,
// which comes minutes later to a process that does nothing.
type pipePool struct {
	mu       sync.Mutex
	open     int     // those with an owner and those without
	idle     []*pipe // the last one that was used is last
	unneeded int     // so many of idle, from the first, had no owner since the last sweep
	trimming bool    // a timer will trim
}

// get gives an empty pipe, or nil when there are too many or there is no descriptor for one.
func (l *pipePool) get() *pipe {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := len(l.idle); n > 0 {
		p := l.idle[n-1]
		l.idle = l.idle[:n-1]
		l.unneeded = min(l.unneeded, n-1)
		return p
	}
	if l.open == MaxPipes {
		return nil
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil
	}
	// Where that is refused it takes what the kernel gives, 64 KiB or, to a user who has many, 8.
	unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize)
	l.open++
	return &pipe{in: uintptr(fds[1]), out: uintptr(fds[0])}
}

// put takes a pipe back that is empty.
func (l *pipePool) put(p *pipe) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.idle = append(l.idle, p)
	if !l.trimming {
		l.trimming = true
		time.AfterFunc(pipeIdle, l.trim)
	}
}

// close takes a pipe back that is not.
func (l *pipePool) close(p *pipe) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed(p)
}

// trim sweeps as long as there is what may be unneeded the next time.
func (l *pipePool) trim() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sweep()
	if l.trimming = len(l.idle) > 0; l.trimming {
		time.AfterFunc(pipeIdle, l.trim)
	}
}

// sweep closes what was unneeded since the last time.
func (l *pipePool) sweep() {
	l.closed(l.idle[:l.unneeded]...)
	l.idle = slices.Delete(l.idle, 0, l.unneeded)
	l.unneeded = len(l.idle)
}

func (l *pipePool) closed(all ...*pipe) {
	for _, p := range all {
		unix.Close(int(p.in))
		unix.Close(int(p.out))
		l.open--
	}
}
