package main

import (
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/portal-tunnel/portal/tests/tunnels"
)

// A link in user space. It ends TCP on either side, holds what it reads for its delay and lets it
// out at its rate, which all connections share: each direction is a wire with a short queue before
// it, as a router has one. A connection's bytes keep their order, and its end comes behind them.
// Connecting takes no time.

const (
	// shapeChunk is what is read at once: half a millisecond of a gigabit a second.
	shapeChunk = 64 << 10
	// shapeQueue is how far a wire may be behind: what a router's buffer holds. Whoever gave it more
	// waits.
	shapeQueue = 5 * time.Millisecond
	// shapeParcels is how many reads of a connection may be on a wire: more than its window has, for
	// any but the smallest.
	shapeParcels = 4096
)

// A wire is one direction of a link: it says when bytes come out, and holds none.
type wire struct {
	delay time.Duration
	rate  float64 // bytes a second

	mu   sync.Mutex
	free time.Time // when it has sent what it was given
}

// take gives the wire n bytes at a time: when the last of them comes out, and how long whoever gave
// them is to wait before the next.
func (w *wire) take(now time.Time, n int) (out time.Time, wait time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.free.Before(now) {
		w.free = now
	}
	w.free = w.free.Add(time.Duration(float64(n) / w.rate * float64(time.Second)))
	return w.free.Add(w.delay), max(0, w.free.Sub(now)-shapeQueue)
}

// window is how many bytes of one connection may be under way: twice what is on the wire at its
// rate, so that a receiver who keeps up is never waited for, and a sender feels one who does not.
func (w *wire) window() int64 {
	return int64(2*w.rate*(w.delay+shapeQueue).Seconds()) + 2*shapeChunk
}

// shapeable is a connection whose directions end apart: TCP, or one in memory.
type shapeable interface {
	net.Conn
	CloseWrite() error
	SetLinger(seconds int) error
}

// A shaped connection has a reader and a writer for each direction. The first error of any resets
// both sides, which ends the others.
type shaped struct {
	near, far shapeable
	once      sync.Once
	err       error
	broken    chan struct{}
}

// shape carries a connection over the wires of a link until both directions have ended.
func shape(near, far shapeable, there, back *wire) error {
	s := &shaped{near: near, far: far, broken: make(chan struct{})}
	var all sync.WaitGroup
	for _, way := range []struct {
		dst, src shapeable
		wire     *wire
	}{{far, near, there}, {near, far, back}} {
		f := &flow{parcels: make(chan parcel, shapeParcels), drained: make(chan struct{}, 1)}
		all.Go(func() { s.check(s.read(f, way.src, way.wire)) })
		all.Go(func() { s.check(s.write(f, way.dst)) })
	}
	all.Wait()
	near.Close()
	far.Close()
	return s.err
}

func (s *shaped) check(err error) {
	if err == nil {
		return
	}
	s.once.Do(func() {
		s.err = err
		close(s.broken)
		for _, c := range []shapeable{s.near, s.far} {
			c.SetLinger(0)
			c.Close()
		}
	})
}

// A parcel is bytes on a wire; none are the end.
type parcel struct {
	out   time.Time
	bytes []byte
}

// A flow is one direction of a connection.
type flow struct {
	parcels chan parcel
	held    atomic.Int64  // bytes under way
	drained chan struct{} // some have been written
}

// read puts src's bytes and its end onto the wire.
func (s *shaped) read(f *flow, src io.Reader, w *wire) error {
	buf := make([]byte, shapeChunk)
	send := func(b []byte) bool {
		f.held.Add(int64(len(b)))
		out, wait := w.take(time.Now(), len(b))
		select {
		case f.parcels <- parcel{out, b}:
			return pause(wait, s.broken)
		case <-s.broken:
			return false
		}
	}
	for {
		for f.held.Load() >= w.window() {
			select {
			case <-f.drained:
			case <-s.broken:
				return nil
			}
		}
		n, err := src.Read(buf)
		if n > 0 && !send(append([]byte(nil), buf[:n]...)) {
			return nil
		}
		if err == io.EOF {
			send(nil)
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// write takes bytes and the end from the wire when they come out.
func (s *shaped) write(f *flow, dst shapeable) error {
	for {
		var p parcel
		select {
		case p = <-f.parcels:
		case <-s.broken:
			return nil
		}
		if !pause(time.Until(p.out), s.broken) {
			return nil
		}
		if p.bytes == nil {
			return dst.CloseWrite()
		}
		if _, err := dst.Write(p.bytes); err != nil {
			return err
		}
		f.held.Add(-int64(len(p.bytes)))
		select {
		case f.drained <- struct{}{}:
		default:
		}
	}
}

// pause waits for d; it is false when stop was closed before.
func pause(d time.Duration, stop <-chan struct{}) bool {
	if d <= 0 {
		return true
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-stop:
		return false
	}
}

// shapeCommand is a link: `shape DELAY RATE TARGET`, the delay one way, the rate in bytes a second.
func shapeCommand(args []string) error {
	usage := errors.New("usage: shape DELAY RATE TARGET")
	if len(args) != 3 {
		return usage
	}
	delay, err := time.ParseDuration(args[0])
	if err != nil {
		return errors.Join(usage, err)
	}
	rate, err := strconv.ParseFloat(args[1], 64)
	if err != nil || rate <= 0 {
		return errors.Join(usage, err)
	}
	l, err := listen(tunnels.Loopback)
	if err != nil {
		return err
	}
	there, back := &wire{delay: delay, rate: rate}, &wire{delay: delay, rate: rate}
	return accept(l, func(c *net.TCPConn) error {
		far, err := net.Dial("tcp", args[2])
		if err != nil {
			return err
		}
		return shape(c, far.(*net.TCPConn), there, back)
	})
}
