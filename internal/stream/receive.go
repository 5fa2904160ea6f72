package stream

import (
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/routing"
)

const (
	// A window grows when it is used up within two round trips: fourfold up to
	// fastWindow, which fills a long line in half the time, and twofold from there.
	// One that takes longer than quickTrip round trips fills its line, and grows to what
	// two of them carry; one that has grown beyond that goes back to it. More would only
	// queue before other streams. On a machine's own loopback the round trip is shorter
	// than the scheduler's turn, so it counts as at least leastRTT, and as twice that
	// where more than aFew streams take turns.
	//
	// Most of a window that has grown comes as one train, whose second half has the line's
	// pace (Keshav's packet pair, of many packets), if its reader waited for it. The only
	// stream of a channel, idle ones counted, grows to what two round trips carry at that
	// pace, at most eightfold; several that begin together would each take the line for its
	// own. Where the wait for credit falls into the second half, that is slower than the line:
	// what the whole window tells is the least. A window of less than trainWindow is too few
	// records to tell a pace by.
	quickTrip   = 1.25
	leastRTT    = time.Millisecond
	aFew        = 4
	fastWindow  = 4 << 20
	trainWindow = 256 << 10
	// pathFor is how long a measured round trip counts as the path's when later
	// ones are longer: those contain the queue of a busy lane, and a window must
	// not grow by what it has queued itself.
	pathFor = 5 * time.Minute
	// Credit is given when it has become a longStep of the window: early, since on a long
	// line it is under way while the rest is used up. Where it arrives within leastRTT it is
	// given by halves: each is a frame, a write and a wakened sender. One of less than
	// leastStep bytes is not worth that anywhere.
	longStep  = 8
	nearStep  = 2
	leastStep = 16 << 10
)

// halfway is how much of a window was used up, and how long that took, when it was half of it
// and nothing waited for its reader; zero before.
type halfway struct {
	used uint64
	took time.Duration
}

// chunk is held bytes: buf.Raw()[r:w]. What it costs is the whole buffer.
type chunk struct {
	buf  *buffer.Buffer
	r, w int
}

func (k chunk) cost() int { return len(k.buf.Raw()) }

func (c *Conn) emptyLocked() bool { return c.first.buf == nil }

// data takes bytes off the lane. It reports true when they are to be delivered
// by deliver, straight into the local socket; else they have been copied.
func (c *Conn) data(body []byte) (later bool, err error) {
	c.recv.Lock()
	switch {
	case c.why != nil: // reset meanwhile
		c.recv.Unlock()
		return false, nil
	case c.ended:
		c.recv.Unlock()
		return false, &ProtocolError{fmt.Sprintf("data behind the end of stream %d", c.id)}
	case c.received+uint64(len(body)) > c.granted:
		c.recv.Unlock()
		return false, &ProtocolError{fmt.Sprintf("stream %d overran its credit", c.id)}
	}
	c.received += uint64(len(body))
	switch {
	case c.closed:
		c.recv.Unlock()
		c.Reset(CodeClosed, "")
		return false, nil
	case c.local.raw != nil && c.emptyLocked() && !c.writing:
		c.recv.Unlock()
		return true, nil
	}
	c.holdLocked(body)
	c.readable.Broadcast()
	c.recv.Unlock()
	c.mux.limits.Budget.check()
	return false, nil
}

// deliver writes data to the local socket as far as it takes them without
// waiting, and holds the rest for the actor.
func (c *Conn) deliver(data [][]byte) {
	c.recv.Lock()
	if c.why != nil {
		c.recv.Unlock()
		return
	}
	n, err := c.local.writeNow(data)
	if err != nil {
		c.recv.Unlock()
		c.localFailed()
		return
	}
	c.consumedLocked(n)
	held := false
	for _, b := range data {
		if n >= len(b) {
			n -= len(b)
			continue
		}
		c.holdLocked(b[n:])
		n, held = 0, true
	}
	c.recv.Unlock()
	if held {
		c.mux.limits.Budget.check()
	}
}

// holdLocked copies b, filling the last chunk first, and wakes the actor when
// there is a socket to write to.
func (c *Conn) holdLocked(b []byte) {
	last := &c.first
	if n := len(c.chunks); n > 0 {
		last = &c.chunks[n-1]
	}
	if last.buf != nil {
		n := copy(last.buf.Raw()[last.w:], b)
		last.w += n
		b = b[n:]
	}
	for len(b) > 0 {
		k := chunk{buf: buffer.Get(len(b))}
		k.w = copy(k.buf.Raw(), b)
		c.countLocked(k.cost())
		b = b[k.w:]
		if c.emptyLocked() {
			c.first = k
		} else {
			c.chunks = append(c.chunks, k)
		}
	}
	if c.local.conn != nil {
		c.actor.Wake()
	}
}

// takeLocked removes the oldest chunk.
func (c *Conn) takeLocked() chunk {
	k := c.first
	c.first = chunk{}
	if len(c.chunks) > 0 {
		c.first = c.chunks[0]
		c.chunks[0] = chunk{}
		if c.chunks = c.chunks[1:]; len(c.chunks) == 0 {
			c.chunks = nil
		}
	}
	return k
}

// countLocked counts n bytes of memory that are held from now on, or no more.
func (c *Conn) countLocked(n int) {
	c.held.Add(int64(n))
	c.mux.limits.Budget.held.Add(int64(n))
}

// releaseLocked gives the memory of a chunk back that was taken.
func (c *Conn) releaseLocked(k chunk) {
	c.countLocked(-k.cost())
	k.buf.Release()
}

func (c *Conn) dropLocked() {
	for !c.emptyLocked() {
		c.releaseLocked(c.takeLocked())
	}
}

// consumedLocked counts n bytes that have reached their reader, and gives new
// credit when enough of it has been used.
func (c *Conn) consumedLocked(n int) {
	if n == 0 {
		return
	}
	c.consumed += uint64(n)
	if c.ended {
		return
	}
	if c.markAt.IsZero() {
		c.markAt = time.Now()
	}
	switch used := c.consumed - c.mark; {
	case used >= uint64(c.window):
		c.resizeLocked(time.Now())
	case used >= uint64(c.window/2) && c.half.used == 0 && c.received == c.consumed:
		c.half.used, c.half.took = used, time.Since(c.markAt)
	}
	grant := c.consumed + uint64(c.window)
	step := longStep
	if c.near {
		step = nearStep
	}
	if grant >= c.granted+uint64(max(c.window/step, leastStep)) {
		c.granted = grant
		c.mux.over.Control(key(frameCredit, c.id), appendOffset(c.scratch[:0], frameCredit, c.id, grant))
	}
}

// resizeLocked looks at how fast a window was used up, once it has been, and sets the next.
func (c *Conn) resizeLocked(now time.Time) {
	used, took := c.consumed-c.mark, now.Sub(c.markAt)
	half, smaller := c.half, c.smaller
	c.mark, c.markAt, c.half, c.smaller = c.consumed, now, halfway{}, 0

	rtt, least, streams := c.mux.path.rtt(c.mux.over.RTT(), now), leastRTT, c.mux.Streams()
	c.near = rtt <= least
	if streams > aFew {
		least *= 2
	}
	rtt = max(rtt, least)
	trips := float64(took) / float64(rtt)
	carried := int(float64(used) * 2 / max(trips, quickTrip)) // by two round trips of a full line
	switch {
	case trips > 2 && smaller > 0:
		c.window = min(c.window, max(carried, smaller))
	case trips <= 2 && c.window < c.mux.limits.Window && c.mux.limits.Budget.grow():
		more := 2 * c.window
		if c.window < fastWindow {
			more = min(4*c.window, fastWindow)
		}
		second := used - half.used
		switch {
		case streams == 1 && !c.near && c.window >= trainWindow &&
			half.used > 0 && second >= uint64(c.window/4) && took > half.took:
			pace := float64(second) / float64(took-half.took)
			more = max(carried, int(min(8*float64(c.window), pace*2*float64(rtt))))
		case trips > quickTrip:
			more = min(more, carried)
		}
		c.smaller, c.window = c.window, min(max(more, c.window), c.mux.limits.Window)
	}
}

// path keeps the shortest round trip.
type path struct {
	mu    sync.Mutex
	least time.Duration
	at    time.Time
}

func (p *path) rtt(measured time.Duration, now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.at.IsZero() || measured < p.least || now.Sub(p.at) > pathFor {
		p.least, p.at = measured, now
	}
	return p.least
}

// theirEnd takes the other end's end. Its total must be what has arrived: on
// an ordered, authenticated lane anything else is a lie.
func (c *Conn) theirEnd(total uint64) error {
	c.recv.Lock()
	if c.why != nil {
		c.recv.Unlock()
		return nil
	}
	if c.ended || total != c.received {
		c.recv.Unlock()
		return &ProtocolError{fmt.Sprintf("stream %d ends at %d, received are %d", c.id, total, c.received)}
	}
	c.ended = true
	c.readable.Broadcast()
	joined := c.local.conn != nil
	mayWait := !c.emptyLocked() || c.writing || c.local.raw == nil
	c.recv.Unlock()
	c.doneRecv.Store(true)
	switch {
	case !joined:
		c.settle()
	case mayWait:
		c.actor.Wake()
	default:
		c.actor.Run() // nothing to write to a socket: passing on the end does not wait
	}
	return nil
}

// Read gives io.EOF only after the other end's verified end.
func (c *Conn) Read(b []byte) (int, error) {
	c.recv.Lock()
	for {
		switch {
		case c.closed:
			c.recv.Unlock()
			return 0, net.ErrClosed
		case c.why != nil:
			c.recv.Unlock()
			return 0, c.why
		case past(c.readTill):
			c.recv.Unlock()
			return 0, os.ErrDeadlineExceeded
		case len(b) == 0:
			c.recv.Unlock()
			return 0, nil
		case !c.emptyLocked():
			k := &c.first
			n := copy(b, k.buf.Raw()[k.r:k.w])
			k.r += n
			if k.r == k.w {
				c.releaseLocked(c.takeLocked())
			}
			c.consumedLocked(n)
			empty := c.ended && c.emptyLocked()
			c.recv.Unlock()
			if empty {
				c.settle()
			}
			return n, nil
		case c.ended:
			c.recv.Unlock()
			return 0, io.EOF
		}
		c.readable.Wait()
	}
}

// Receive takes no messages: a stream's bytes come by its channel.
func (c *Conn) Receive(*routing.Actor, *routing.Message) error { return nil }

// Drained is the stream's actor: it writes what is held to the local socket
// and may wait there. Behind the last byte it passes on the end.
func (c *Conn) Drained(*routing.Actor) error {
	c.recv.Lock()
	l := c.local.conn
	if l == nil {
		c.recv.Unlock()
		return nil
	}
	for c.why == nil && !c.emptyLocked() {
		k := c.takeLocked()
		c.writing = true
		c.recv.Unlock()
		n, err := l.Write(k.buf.Raw()[k.r:k.w])
		c.recv.Lock()
		c.writing = false
		c.releaseLocked(k)
		if err != nil {
			c.recv.Unlock()
			c.localFailed()
			return nil
		}
		c.consumedLocked(n)
	}
	end := c.why == nil && c.ended && !c.local.ended
	if end {
		c.local.ended = true
	}
	c.recv.Unlock()
	if end {
		if err := closeWrite(l); err != nil {
			c.localFailed()
			return nil
		}
		c.settle()
	}
	return nil
}

// localFailed resets the stream when the local socket takes no more.
func (c *Conn) localFailed() {
	c.kill(&ResetError{Code: CodeLocal, Local: true}, true)
}
