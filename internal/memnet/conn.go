// Package memnet is a network in memory for tests: ordered connections with latency, bandwidth, stalls, cuts and tampering.
//
// A connection behaves as TCP does where it matters to a program: an end of file arrives after all data, a reset drops what was not read,
// a full send buffer blocks the writer, deadlines work. Where it differs from TCP:
//   - the path neither loses nor reorders, and acknowledgements cost nothing: throughput is the link's rate whatever its latency;
//   - Close with unread data sends an end of file, as without; SetLinger(0) is the way to a reset;
//   - a write fails as soon as the peer's Close has arrived, not one write later.
//
// Nothing here owns a goroutine. Times are worked out when bytes are written, and whoever waits does so on a channel and a timer, so that
// inside a testing/synctest bubble every wait is durable and a transfer takes exactly the virtual time that its link asks. A connection
// belongs to the bubble in which it was made.
package memnet

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Link describes both directions of a connection. The zero value is a link without delay or limit of bandwidth.
type Link struct {
	Latency time.Duration // one way
	Rate    int64         // bytes a second in each direction; 0: unlimited
	Buffer  int           // bytes that Write takes before the link has sent them; 0: 64 KiB
}

const (
	defaultBuffer = 64 << 10
	maxSegment    = 64 << 10               // bytes that travel as one piece
	quantum       = 100 * time.Microsecond // the link time of one piece when a rate is set: no byte is late by more
	maxInFlight   = 16 << 20               // bytes on a link with latency and no rate: in virtual time a writer could fill memory before the first arrives
)

// Addr is the address of an end. Its network is "mem".
type Addr string

func (Addr) Network() string  { return "mem" }
func (a Addr) String() string { return string(a) }

// ErrReset is what reads and writes fail with after a cut, wrapped in a *net.OpError.
const ErrReset = syscall.ECONNRESET

// pair is what the two ends of a connection share. Its lock is never held while anything waits.
type pair struct {
	mu   sync.Mutex
	ends [2]*Conn
}

// Conn is one end of a connection, a net.Conn. Its methods may be called by several goroutines at once; concurrent writes do not mix.
type Conn struct {
	pair          *pair
	peer          *Conn
	out, in       *half // what this end writes, what it reads
	local, remote Addr
	writing       chan struct{} // holds one token while a Write is under way: a channel, because a wait for a mutex is not durable

	// Under pair.mu.
	closed        bool // by Close of this end
	shut          bool // by CloseWrite of this end
	reset         bool // a reset has arrived
	gone          bool // the peer's Close has arrived
	lingerZero    bool
	readDeadline  time.Time
	writeDeadline time.Time
	tamper        func(int64, []byte) []byte
	offset        int64 // of the next byte written by this end
}

// Pipe returns the two ends of a new connection over l.
func Pipe(l Link) (a, b *Conn) {
	return pipe(l, "a", "b")
}

func pipe(l Link, addrA, addrB Addr) (a, b *Conn) {
	p := new(pair)
	ab, ba := newHalf(l), newHalf(l)
	a = &Conn{pair: p, out: ab, in: ba, local: addrA, remote: addrB, writing: make(chan struct{}, 1)}
	b = &Conn{pair: p, out: ba, in: ab, local: addrB, remote: addrA, writing: make(chan struct{}, 1), peer: a}
	a.peer = b
	ab.from, ab.to = a, b
	ba.from, ba.to = b, a
	p.ends = [2]*Conn{a, b}
	return a, b
}

// Read reads what has arrived. It returns io.EOF after the peer's CloseWrite or Close and all data before it, and a *net.OpError around
// ErrReset after a reset, net.ErrClosed after Close, os.ErrDeadlineExceeded after the deadline.
func (c *Conn) Read(b []byte) (int, error) {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	for {
		c.in.settle()
		switch {
		case c.closed:
			return 0, c.fail("read", net.ErrClosed)
		case expired(c.readDeadline):
			return 0, c.fail("read", os.ErrDeadlineExceeded)
		case c.reset:
			return 0, c.fail("read", os.NewSyscallError("read", ErrReset))
		case len(b) == 0:
			return 0, nil
		case c.in.arrived > 0:
			return c.in.take(b), nil
		case c.in.eof:
			return 0, io.EOF
		}
		c.pair.wait(&c.in.readable, c.in.nextArrival(), c.readDeadline)
	}
}

// Write hands b to the link and blocks while more than Link.Buffer bytes wait to be sent, or while the peer does not read. It fails with
// EPIPE after CloseWrite and after the peer's Close, and otherwise as Read does.
func (c *Conn) Write(b []byte) (int, error) {
	c.writing <- struct{}{}
	defer func() { <-c.writing }()
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	rest := b
	if c.tamper != nil && len(b) > 0 {
		if err := c.writeError(); err != nil {
			return 0, err
		}
		rest = c.tampered(b)
	}
	c.offset += int64(len(b))
	n := 0
	for {
		if err := c.writeError(); err != nil {
			c.offset -= int64(len(b) - min(n, len(b)))
			return min(n, len(b)), err
		}
		if len(rest) == 0 {
			return len(b), nil
		}
		room, wait := c.out.room(len(rest))
		if room == 0 {
			c.pair.wait(&c.out.writable, wait, c.writeDeadline)
			continue
		}
		c.out.send(rest[:room])
		rest, n = rest[room:], n+room
	}
}

// tampered asks the hook without the lock, so that the hook may cut or stall.
func (c *Conn) tampered(b []byte) []byte {
	hook, off := c.tamper, c.offset
	c.pair.mu.Unlock()
	defer c.pair.mu.Lock()
	return hook(off, append([]byte(nil), b...))
}

func (c *Conn) writeError() error {
	c.in.settle() // a reset or the peer's Close may be due
	switch {
	case c.closed:
		return c.fail("write", net.ErrClosed)
	case expired(c.writeDeadline):
		return c.fail("write", os.ErrDeadlineExceeded)
	case c.reset:
		return c.fail("write", os.NewSyscallError("write", ErrReset))
	case c.shut, c.gone:
		return c.fail("write", os.NewSyscallError("write", syscall.EPIPE))
	}
	return nil
}

// CloseWrite ends this direction: the peer reads io.EOF after all that was written. Reading goes on.
func (c *Conn) CloseWrite() error {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	c.in.settle()
	switch {
	case c.closed:
		return c.fail("close", net.ErrClosed)
	case c.reset:
		return c.fail("close", os.NewSyscallError("shutdown", syscall.ENOTCONN))
	case c.shut:
		return nil
	}
	c.shut = true
	c.out.mark(fin)
	c.out.writable.wake()
	return nil
}

// Close ends both directions. The peer reads all that was written and then io.EOF; after SetLinger(0) what the link has not sent yet is
// dropped and the peer is reset.
func (c *Conn) Close() error {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	if c.closed {
		return c.fail("close", net.ErrClosed)
	}
	c.in.settle()
	c.closed = true
	c.in.discard = true
	c.in.dropData(0)
	if !c.reset {
		if c.lingerZero {
			c.out.unsend()
			c.out.mark(rst)
		} else {
			c.out.mark(bye)
		}
	}
	c.pair.wakeAll()
	c.in.arm()
	c.out.arm()
	return nil
}

// SetLinger with 0 makes Close reset the peer. Other values restore the default.
func (c *Conn) SetLinger(sec int) error {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	if c.closed {
		return c.fail("set", net.ErrClosed)
	}
	c.lingerZero = sec == 0
	return nil
}

// Cut breaks the connection at once, as a reset that reaches both ends: what was not read is dropped, reads and writes fail with ErrReset.
func (c *Conn) Cut() {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	c.pair.cut()
}

// CutAt cuts the connection when the first off bytes written by this end have arrived, or at once when they have. They are dropped with
// the rest unless the peer read them before.
func (c *Conn) CutAt(off int64) {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	c.out.setCut(off)
}

// FinAt ends what this end writes after its first off bytes: the peer reads them, then io.EOF. This end is not told; what it writes
// further vanishes. Bytes that have already arrived stay.
func (c *Conn) FinAt(off int64) {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	c.out.settle()
	c.out.finAt = off
	c.out.checkLimits()
}

// Stall stops the link from this end to the peer: what is under way, ends of file and resets included, arrives only after Resume, and
// writes block when the buffer is full. Cut is not held up.
func (c *Conn) Stall() {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	c.out.stall()
}

// Resume lets a stalled link go on from where it stood.
func (c *Conn) Resume() {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	c.out.resume()
}

// OnWrite has f called for each Write of this end with the stream offset of its first byte and a copy of its bytes. What f returns is sent
// in their place; nil sends nothing. The offset counts the bytes given to Write. A nil f ends it. f may call any method of either end but Write of this one.
func (c *Conn) OnWrite(f func(off int64, b []byte) []byte) {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	c.tamper = f
}

func (c *Conn) LocalAddr() net.Addr  { return c.local }
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

func (c *Conn) SetDeadline(t time.Time) error      { return c.setDeadline(t, true, true) }
func (c *Conn) SetReadDeadline(t time.Time) error  { return c.setDeadline(t, true, false) }
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(t, false, true) }

func (c *Conn) setDeadline(t time.Time, read, write bool) error {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	if c.closed {
		return c.fail("set", net.ErrClosed)
	}
	if read {
		c.readDeadline = t
		c.in.readable.wake()
	}
	if write {
		c.writeDeadline = t
		c.out.writable.wake()
	}
	return nil
}

func (c *Conn) fail(op string, err error) error {
	return &net.OpError{Op: op, Net: "mem", Source: c.local, Addr: c.remote, Err: err}
}

// cut resets both ends. Called with the lock held.
func (p *pair) cut() {
	for _, c := range p.ends {
		c.reset = true
		c.out.drop()
	}
	p.wakeAll()
}

func (p *pair) wakeAll() {
	for _, c := range p.ends {
		c.out.readable.wake()
		c.out.writable.wake()
	}
}

// wait releases the lock until e is woken, d has passed (negative: never) or the deadline is reached.
func (p *pair) wait(e *event, d time.Duration, deadline time.Time) {
	if !deadline.IsZero() {
		if left := time.Until(deadline); d < 0 || left < d {
			d = max(left, 0)
		}
	}
	woken := e.wait()
	p.mu.Unlock()
	defer p.mu.Lock()
	if d < 0 {
		<-woken
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-woken:
	case <-t.C:
	}
}

func expired(deadline time.Time) bool {
	return !deadline.IsZero() && time.Until(deadline) <= 0
}

// event is a broadcast. It is guarded by the lock of what it belongs to.
type event struct{ ch chan struct{} }

func (e *event) wait() <-chan struct{} {
	if e.ch == nil {
		e.ch = make(chan struct{})
	}
	return e.ch
}

func (e *event) wake() {
	if e.ch != nil {
		close(e.ch)
		e.ch = nil
	}
}
