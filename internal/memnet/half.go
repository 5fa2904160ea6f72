package memnet

import (
	"slices"
	"time"
)

// kind says what a segment carries.
type kind uint8

const (
	data kind = iota
	fin       // the writer has ended this direction
	bye       // the writer has closed: end of this direction, and nobody reads the other
	rst       // the writer has reset
)

// segment is a piece of a direction under way. at is the link time of its arrival.
type segment struct {
	at   time.Duration
	kind kind
	b    []byte
}

// half is one direction of a connection: the send buffer, the wire and the receive buffer in one queue. All is under the pair's lock.
//
// Its clock is link time: it starts at zero with the connection and stands still during a stall, so that a stall delays all that is under
// way by its own length and needs no bookkeeping. Bytes written at link time t leave when the link is free and the rate has carried
// them, and arrive one latency later; this is worked out once, in send.
type half struct {
	from, to *Conn
	link     Link
	piece    int // bytes of one segment at most
	limit    int // bytes held at most: send buffer, wire and receive buffer

	epoch   time.Time
	paused  time.Duration // length of the stalls that have ended
	stalled bool
	frozen  time.Duration // link time of the stall under way

	free    time.Duration // when the link has sent all that it was given
	carry   int64         // byte·nanoseconds that free lost to rounding, so that many small writes take as long as one large
	pending int           // bytes given to a link without rate while it is stalled

	queue   []segment // arrived ones first
	arrived int       // segments of queue that the reader may have
	held    int       // bytes in queue
	bytes   int64     // of data that ever arrived
	sent    int64     // of data that was ever given to the link
	eof     bool
	discard bool  // nobody will read: what is sent only takes time
	finAt   int64 // negative: none
	cutAt   int64

	readable, writable event
	want               int // room that the waiting writer needs below limit

	// What must act on time though nobody may be reading: the arrival of bye or rst, and of the byte at which cutAt cuts.
	// Link times, negative for none.
	markDue, cutDue time.Duration
	alarm           *time.Timer
}

func newHalf(l Link) *half {
	if l.Buffer <= 0 {
		l.Buffer = defaultBuffer
	}
	h := &half{link: l, epoch: time.Now(), finAt: -1, cutAt: -1, markDue: -1, cutDue: -1}
	switch {
	case l.Rate > 0:
		// The receive buffer is as large as the send buffer; what the wire holds comes on top.
		h.piece = int(min(l.Rate/int64(time.Second/quantum), maxSegment, int64(l.Buffer/2)))
		h.limit = 2*l.Buffer + int(l.Latency.Seconds()*float64(l.Rate))
	case l.Latency > 0:
		h.piece, h.limit = maxSegment, l.Buffer+maxInFlight
	default:
		h.piece, h.limit = maxSegment, l.Buffer
	}
	h.piece = max(h.piece, 1)
	return h
}

func (h *half) clock() time.Duration {
	if h.stalled {
		return h.frozen
	}
	return time.Since(h.epoch) - h.paused
}

// room returns how many of n bytes send may take now. When it is 0 it returns how long until there is room, negative when that is not
// for the clock to say.
func (h *half) room(n int) (int, time.Duration) {
	batch := min(n, max(h.piece, h.link.Buffer/8)) // what is waited for at a time: bytes that trickled in would cost a timer each
	n = min(n, h.piece)
	if h.link.Rate > 0 {
		free := h.link.Buffer - h.unsent(h.clock())
		switch {
		case free >= n:
		case h.stalled:
			return 0, -1
		default:
			return 0, h.sendTime(batch - free)
		}
	} else if h.stalled {
		n = min(n, h.link.Buffer-h.pending)
	}
	if h.discard {
		return max(n, 0), -1
	}
	if h.want = min(n, max(h.limit/4, 1)); h.limit-h.held < h.want {
		return 0, -1
	}
	return max(min(n, h.limit-h.held), 0), -1
}

// unsent returns the bytes that the link has been given and not yet sent.
func (h *half) unsent(now time.Duration) int {
	if h.free <= now {
		return 0
	}
	return int((int64(h.free-now)*h.link.Rate + int64(time.Second) - 1) / int64(time.Second))
}

// sendTime returns how long the link sends n bytes, rounded up.
func (h *half) sendTime(n int) time.Duration {
	return time.Duration((int64(n)*int64(time.Second) + h.link.Rate - 1) / h.link.Rate)
}

// send gives b, at most one piece, to the link.
func (h *half) send(b []byte) {
	now := h.clock()
	if h.free < now {
		h.free, h.carry = now, 0
	}
	if h.link.Rate > 0 {
		work := int64(len(b))*int64(time.Second) + h.carry
		h.free += time.Duration(work / h.link.Rate)
		h.carry = work % h.link.Rate
	} else if h.stalled {
		h.pending += len(b)
	}
	if h.discard {
		return
	}
	h.held += len(b)
	at := h.free + h.link.Latency
	if h.sent += int64(len(b)); h.cutAt >= 0 && h.cutDue < 0 && h.sent >= h.cutAt {
		h.cutDue = at
		h.arm()
	}
	if n := len(h.queue); n > h.arrived {
		if last := &h.queue[n-1]; last.kind == data && last.at == at && len(last.b)+len(b) <= maxSegment {
			last.b = append(last.b, b...)
			return
		}
	}
	h.push(segment{at: at, b: append([]byte(nil), b...)})
}

// mark sends the end of this direction behind all data.
func (h *half) mark(k kind) {
	at := max(h.clock(), h.free) + h.link.Latency
	if k != fin {
		h.markDue = at
	}
	h.push(segment{at: at, kind: k})
	h.arm()
}

func (h *half) push(s segment) {
	first := len(h.queue) == h.arrived
	h.queue = append(h.queue, s)
	if first {
		h.settle()
		h.readable.wake() // a reader that waits for an earlier segment has its timer already
	}
}

// unsend takes back what the link has not sent.
func (h *half) unsend() {
	now := h.clock()
	h.settle()
	if h.link.Rate == 0 && !h.stalled {
		return
	}
	h.queue = slices.DeleteFunc(h.queue, func(s segment) bool {
		late := s.kind == data && s.at > now+h.link.Latency
		if late {
			h.held -= len(s.b)
		}
		return late
	})
	h.free = min(h.free, now)
}

// settle lets arrive what is due.
func (h *half) settle() {
	if h.stalled || h.arrived == len(h.queue) {
		return
	}
	now := h.clock()
	for h.arrived < len(h.queue) && h.queue[h.arrived].at <= now {
		s := &h.queue[h.arrived]
		switch s.kind {
		case data:
			if end := h.nextLimit(); end >= 0 && h.bytes+int64(len(s.b)) > end {
				keep := int(end - h.bytes)
				h.held -= len(s.b) - keep
				s.b = s.b[:keep]
			}
			h.bytes += int64(len(s.b))
			h.arrived++
			h.checkLimits()
			continue
		case fin:
			h.eof = true
		case bye:
			h.markDue = -1
			h.eof = true
			h.to.gone = true
			h.to.out.writable.wake()
		case rst:
			h.to.reset = true
			h.drop()
			h.to.out.drop()
			h.readable.wake()
			h.to.out.writable.wake()
			return
		}
		h.queue = slices.Delete(h.queue, h.arrived, h.arrived+1)
	}
}

// nextLimit returns the lesser of finAt and cutAt, negative when there is none.
func (h *half) nextLimit() int64 {
	if h.finAt < 0 || h.cutAt >= 0 && h.cutAt < h.finAt {
		return h.cutAt
	}
	return h.finAt
}

func (h *half) setCut(off int64) {
	h.settle()
	h.cutAt, h.cutDue = off, -1
	h.checkLimits()
	n := h.bytes
	for _, s := range h.queue[h.arrived:] {
		if n += int64(len(s.b)); h.cutAt >= 0 && n >= h.cutAt {
			h.cutDue = s.at
			break
		}
	}
	h.arm()
}

func (h *half) checkLimits() {
	switch {
	case h.cutAt >= 0 && h.bytes >= h.cutAt:
		h.cutAt = -1
		h.from.pair.cut()
	case h.finAt >= 0 && h.bytes >= h.finAt && !h.discard:
		h.eof, h.discard = true, true
		h.cutDue = -1
		h.dropData(h.arrived)
		h.readable.wake()
		h.writable.wake()
	}
}

// dropData drops the data in the queue from segment i on; marks stay.
func (h *half) dropData(i int) {
	kept := h.queue[:i]
	for _, s := range h.queue[i:] {
		if s.kind == data {
			h.held -= len(s.b)
		} else {
			kept = append(kept, s)
		}
	}
	clear(h.queue[len(kept):])
	h.queue = kept
	h.arrived = min(h.arrived, i)
}

// drop drops all that is under way or unread, for a reset.
func (h *half) drop() {
	h.queue, h.arrived, h.held = nil, 0, 0
	h.markDue, h.cutDue = -1, -1
	h.discard = true
	h.arm()
}

// take moves arrived bytes to b. Only data counts as arrived: settle takes marks out of the queue.
func (h *half) take(b []byte) int {
	n := 0
	for n < len(b) && h.arrived > 0 {
		s := &h.queue[0]
		k := copy(b[n:], s.b)
		n += k
		if s.b = s.b[k:]; len(s.b) == 0 {
			s.b = nil
			h.queue = h.queue[1:]
			h.arrived--
		}
	}
	h.held -= n
	if h.limit-h.held >= h.want {
		h.writable.wake()
	}
	return n
}

// nextArrival returns how long until the next segment arrives, negative when none is under way.
func (h *half) nextArrival() time.Duration {
	if h.stalled || h.arrived == len(h.queue) {
		return -1
	}
	return max(h.queue[h.arrived].at-h.clock(), 0)
}

func (h *half) stall() {
	if h.stalled {
		return
	}
	h.settle()
	h.frozen, h.stalled = h.clock(), true
	h.arm()
	h.writable.wake() // its time has stopped, too
}

func (h *half) resume() {
	if !h.stalled {
		return
	}
	h.stalled, h.pending = false, 0
	h.paused = time.Since(h.epoch) - h.frozen
	h.settle()
	h.arm()
	h.readable.wake()
	h.writable.wake()
}

// arm sets the alarm to what is due next.
func (h *half) arm() {
	due := h.markDue
	if h.cutDue >= 0 && (due < 0 || h.cutDue < due) {
		due = h.cutDue
	}
	switch left := max(due-h.clock(), 0); {
	case due < 0 || h.stalled || h.to.closed:
		if h.alarm != nil {
			h.alarm.Stop()
		}
	case h.alarm == nil:
		h.alarm = time.AfterFunc(left, func() {
			h.from.pair.mu.Lock()
			defer h.from.pair.mu.Unlock()
			h.settle()
			h.arm()
		})
	default:
		h.alarm.Reset(left)
	}
}
