package relay

import (
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"

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
		f.pipe = getPipe()
	}
	if f.pipe != nil {
		n, f.err = socket.Splice(fd, f.pipe.in, pipeSize)
		f.held = n
		f.busy = n > buffer.Shared
		if n == 0 && f.err == nil {
			f.rest() // the end, or an urgent byte, before which it stops: a read tells
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
		pipes.Put(f.pipe)
		f.pipe = nil
	}
}

// drop gives back all. A pipe with bytes in it is of no more use.
func (f *forwarder) drop() {
	if f.held > 0 {
		f.pipe.close()
		f.pipe = nil
	}
	f.rest()
}

// A pipe has one owner, or is in the pool, from where the collector takes it.
type pipe struct {
	in, out uintptr
	cleanup runtime.Cleanup
}

var (
	pipes    sync.Pool
	pipeLeft = func() *atomic.Int32 { n := new(atomic.Int32); n.Store(MaxPipes); return n }()
)

// getPipe gives an empty pipe, or nil when there are too many or there is no descriptor for one.
func getPipe() *pipe {
	if p, ok := pipes.Get().(*pipe); ok {
		return p
	}
	if pipeLeft.Add(-1) < 0 {
		pipeLeft.Add(1)
		return nil
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		pipeLeft.Add(1)
		return nil
	}
	// Where that is refused it takes what the kernel gives, 64 KiB or, to a user who has many, 8.
	unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize)
	p := &pipe{in: uintptr(fds[1]), out: uintptr(fds[0])}
	p.cleanup = runtime.AddCleanup(p, closePipe, fds)
	return p
}

func (p *pipe) close() {
	p.cleanup.Stop()
	closePipe([2]int{int(p.out), int(p.in)})
}

func closePipe(fds [2]int) {
	unix.Close(fds[0])
	unix.Close(fds[1])
	pipeLeft.Add(1)
}
