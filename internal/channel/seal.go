package channel

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/socket"
	"github.com/portal-tunnel/portal/routing"
)

const (
	// maxQueued is how many buffers a stream may have in the data queue: one
	// being written, one ready behind it. More would only add delay for others.
	maxQueued = 2

	// maxControl bounds the control frames that wait for a lane which takes
	// nothing: an answer, a credit and a reset for each stream that may be open
	// (16,384 a channel), and 64 besides.
	maxControl = 3*16384 + 64

	// smallFrame is up to where a frame is copied next to others into one
	// record: copying 2 KiB costs less than a record and a write of its own.
	smallFrame = 2 << 10

	// slowWrite is how long one write to the lane may take before writes become
	// smaller: a keystroke must not wait behind a batch on a slow line.
	slowWrite = 4 * time.Millisecond

	// together bounds what goes out in one write of several streams: the other end opens the
	// first half of a batch while this one seals the second.
	together = buffer.Batch / 2

	// few is how many buffers may wait for those behind them to be of half a batch each. They
	// take the memory of a whole one, so these are 4 MB; of more, a record each.
	few = 16
)

var errControl = errors.New("the other end does not read what it is told")

// sealer is the actor that owns a channel's outgoing direction. It has two
// queues: control frames, which replace one another by key and go first, and
// data buffers in order of arrival. Records are sealed when they are written,
// so nothing sealed ever waits or is thrown away.
//
// While idle it runs on the goroutine of whoever sends.
type sealer struct {
	actor *routing.Actor
	lane  *socket.Writer
	fail  func(error) // ends the channel
	lost  func(error) // ends it too, when the reader has read the rest

	mu      sync.Mutex
	control []slot
	slots   map[uint64]int // key to index in control
	fewer   sync.Cond      // L is mu: control became shorter, or err was set
	data    []waiting
	err     error         // nothing is taken any more
	last    bool          // a close is queued: nothing may follow it
	sent    chan struct{} // closed when the close is written, or never will be
	told    bool          // sent is closed

	turn    uint64       // Sends
	small   bool         // the last of them was of a small buffer
	posted  int          // of data, those that Post queued
	writing bool         // Drained is at it
	writes  atomic.Int64 // to the lane, that went well
	depth   atomic.Int32 // len(data), for Budget
	budget  atomic.Int32 // payload bytes a buffer should have

	// Owned by the running actor.
	records     *records
	spareSlots  []slot
	spareData   []waiting
	pack        *buffer.Buffer   // small frames on their way into one record
	held        []*buffer.Buffer // sealed, on their way into one write
	heldPayload int              // of held
	quick       int              // how much may go out together
	vector      net.Buffers      // held, for that write
	aged        atomic.Bool
}

type slot struct {
	key   uint64
	frame []byte
}

type waiting struct {
	queue  *buffer.Queue
	buf    *buffer.Buffer
	posted bool
}

// Send takes b and writes it, on this goroutine when the lane is free. It waits
// while the stream has two buffers queued, until there is room or q.Stop is set.
//
// Where many streams have little to send, each would be a write of its own as long as the
// lane is quick. So whoever has little, after another that had, lets those go first that
// have been woken together with it: what they send goes out in the same write.
func (s *sealer) Send(q *buffer.Queue, b *buffer.Buffer) error {
	small := b.Payload() <= smallFrame
	s.mu.Lock()
	for s.err == nil && q.Stop == nil && q.Waiting >= maxQueued {
		if q.Room == nil {
			q.Room = sync.NewCond(&s.mu)
		}
		q.Room.Wait()
	}
	err := s.appendLocked(q, b, false)
	crowd := small && s.small && q.Turn != s.turn
	s.turn++
	q.Turn, s.small = s.turn, small
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if crowd {
		runtime.Gosched()
	}
	if q.Async.Load() {
		s.actor.Wake()
	} else {
		s.actor.Run()
	}
	return nil
}

// Post queues b without writing anything; Flush does that.
func (s *sealer) Post(q *buffer.Queue, b *buffer.Buffer) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.appendLocked(q, b, true)
}

// Unsent is how many buffers were posted and are not written yet.
func (s *sealer) Unsent() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.posted
}

// Clear waits until at most n control frames wait for the lane, and reports false
// when after d they are still more. It is for whoever reads what makes more of them:
// an end that does not read its answers is not read either.
func (s *sealer) Clear(n int, d time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.control) <= n {
		return true
	}
	late := false
	t := time.AfterFunc(d, func() {
		s.mu.Lock()
		late = true
		s.fewer.Broadcast()
		s.mu.Unlock()
	})
	defer t.Stop()
	for len(s.control) > n && s.err == nil && !late {
		s.fewer.Wait()
	}
	return len(s.control) <= n || s.err != nil
}

// owes reports whether anything waits for the lane.
func (s *sealer) owes() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.writing || len(s.data)+len(s.control) > 0
}

// Flush writes what is queued, on this goroutine when the lane is free. Wake has another
// one do it.
func (s *sealer) Flush() { s.actor.Run() }
func (s *sealer) Wake()  { s.actor.Wake() }

func (s *sealer) appendLocked(q *buffer.Queue, b *buffer.Buffer, posted bool) error {
	err := s.err
	if err == nil {
		err = q.Stop
	}
	if err == nil && s.last {
		err = net.ErrClosed
	}
	if err != nil {
		b.Release()
		return err
	}
	q.Waiting++
	if posted {
		s.posted++
	}
	s.data = append(s.data, waiting{q, b, posted})
	s.depth.Store(int32(len(s.data)))
	return nil
}

// Stop sets why nothing more may be queued on q, or clears it, and lets a
// waiting Send see it.
func (s *sealer) Stop(q *buffer.Queue, err error) {
	s.mu.Lock()
	if q.Stop == nil || errors.Is(q.Stop, os.ErrDeadlineExceeded) {
		q.Stop = err // a discarded queue stays so
	}
	if q.Room != nil {
		q.Room.Broadcast()
	}
	s.mu.Unlock()
}

// Discard drops what q has queued and refuses more with why. It reports whether
// anything of q was ever sealed.
func (s *sealer) Discard(q *buffer.Queue, why error) (sealed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	q.Stop = why
	if q.Waiting > 0 {
		kept := s.data[:0]
		for _, w := range s.data {
			if w.queue == q {
				s.dropLocked(w)
			} else {
				kept = append(kept, w)
			}
		}
		clear(s.data[len(kept):])
		s.data = kept
		s.depth.Store(int32(len(s.data)))
	}
	if q.Room != nil {
		q.Room.Broadcast()
	}
	return q.Sealed
}

// dropLocked forgets a buffer that will not be written.
func (s *sealer) dropLocked(w waiting) {
	w.queue.Waiting--
	if w.posted {
		s.posted--
	}
	w.buf.Release()
}

// Control queues one whole frame and never waits. A frame of the same key that
// is still unsent is replaced.
func (s *sealer) Control(key uint64, frame []byte) error {
	s.mu.Lock()
	if s.err != nil || s.last {
		err := s.err
		s.mu.Unlock()
		if err == nil {
			err = net.ErrClosed
		}
		return err
	}
	if i, ok := s.slots[key]; ok {
		s.control[i].frame = append(s.control[i].frame[:0], frame...)
	} else if len(s.control) == maxControl {
		s.mu.Unlock()
		s.fail(errControl)
		return errControl
	} else {
		s.slots[key] = len(s.control)
		s.putLocked(key, frame)
	}
	s.mu.Unlock()
	s.actor.Wake()
	return nil
}

// putLocked appends a slot and uses the memory of one that was there before.
func (s *sealer) putLocked(key uint64, frame []byte) {
	n := len(s.control)
	if n < cap(s.control) {
		s.control = s.control[:n+1]
	} else {
		s.control = append(s.control, slot{})
	}
	s.control[n].key = key
	s.control[n].frame = append(s.control[n].frame[:0], frame...)
}

// finish queues the close: it goes behind all data, and nothing goes behind it.
func (s *sealer) finish(frame []byte) {
	s.mu.Lock()
	if s.err == nil && !s.last {
		b := buffer.Get(len(frame) + buffer.Around)
		b.Commit(copy(b.Next(), frame))
		s.appendLocked(&buffer.Queue{}, b, false)
		s.last = true
	}
	s.mu.Unlock()
	s.actor.Wake()
}

// stop ends the sealer: everything queued is dropped, everybody waiting is told.
func (s *sealer) stop(err error) {
	s.mu.Lock()
	if s.err == nil {
		s.err = err
	}
	for _, w := range s.data {
		s.dropLocked(w)
		if w.queue.Room != nil {
			w.queue.Room.Broadcast()
		}
	}
	clear(s.data)
	s.data, s.control = s.data[:0], nil
	s.fewer.Broadcast()
	s.depth.Store(0)
	clear(s.slots)
	s.tellLocked()
	s.mu.Unlock()
}

func (s *sealer) tellLocked() {
	if !s.told {
		s.told = true
		close(s.sent)
	}
}

// Budget is how many bytes of payload a sender should put into one buffer:
// less while others wait, and less on a lane that takes them slowly.
func (s *sealer) Budget() int {
	n := int(s.budget.Load())
	switch depth := s.depth.Load(); {
	case depth == 0:
	case depth <= few && n == buffer.Batch:
		n /= 2
	default:
		n = min(n, max(n/4, buffer.Shared))
	}
	return n
}

// Receive refuses messages: bytes reach a channel by its streams only.
func (s *sealer) Receive(*routing.Actor, *routing.Message) error { return nil }

// Stopped ends the channel when its node was closed or a write panicked: nobody
// may go on waiting for an actor that is no more.
func (s *sealer) Stopped(err error) {
	if err == nil {
		err = ErrClosed
	}
	s.fail(err)
}

// Drained writes all that was queued when it began, in rounds. What arrives meanwhile
// wakes the actor again.
func (s *sealer) Drained(*routing.Actor) error {
	s.mu.Lock()
	left := len(s.data)
	s.mu.Unlock()
	for {
		took, rest := s.round()
		if left = min(left-took, rest); left <= 0 {
			return nil
		}
	}
}

// round writes all control frames, then a batch of data, or one buffer: credit does not
// wait behind the bulk of many streams, nor do their senders until all of it is written.
// It says how many buffers it has taken and how many wait behind them, none when the channel
// is about to end.
func (s *sealer) round() (took, rest int) {
	s.mu.Lock()
	control, data := s.control, s.takeLocked()
	s.control = s.spareSlots[:0]
	clear(s.slots)
	s.fewer.Broadcast()
	s.depth.Store(int32(len(s.data)))
	for _, w := range data {
		w.queue.Sealed = true
	}
	s.writing = len(control)+len(data) > 0
	s.mu.Unlock()
	if len(control) == 0 && len(data) == 0 {
		s.spareSlots, s.spareData = control, data
		return 0, 0
	}
	err := s.write(control, data)

	s.mu.Lock()
	s.writing = false
	for i := range data {
		q := data[i].queue
		q.Waiting--
		if data[i].posted {
			s.posted--
		}
		if q.Room != nil {
			q.Room.Broadcast()
		}
		data[i] = waiting{}
	}
	rest = len(s.data)
	if s.last && rest == 0 {
		s.tellLocked()
	}
	s.mu.Unlock()
	s.spareSlots, s.spareData = control[:0], data[:0]
	if s.records.aged() {
		s.aged.Store(true)
	}
	switch {
	case err == nil:
		return len(data), rest
	case errors.Is(err, ErrCut):
		s.lost(err)
	default:
		s.fail(err)
	}
	return len(data), 0
}

// takeLocked takes the data of one round off the queue.
func (s *sealer) takeLocked() []waiting {
	n, size := 0, 0
	for n < len(s.data) && (n == 0 || size+payload(s.data[n].buf) <= buffer.Batch) {
		size += payload(s.data[n].buf)
		n++
	}
	if n == len(s.data) {
		data := s.data
		s.data = s.spareData[:0]
		return data
	}
	data := append(s.spareData[:0], s.data[:n]...)
	rest := copy(s.data, s.data[n:])
	clear(s.data[rest:])
	s.data = s.data[:rest]
	return data
}

// payload is that of b without the header of the frame that fills a record, as budgets and
// batches count.
func payload(b *buffer.Buffer) int { return b.Payload() - b.Count()*frameHeader }

// write seals and writes control and data, and releases every buffer.
func (s *sealer) write(control []slot, data []waiting) (err error) {
	defer func() {
		if s.pack != nil {
			s.pack.Release()
			s.pack = nil
		}
		s.release()
	}()
	filled := 0             // plaintext bytes of the record being packed
	flush := func() error { // hands on what is packed
		if s.pack == nil {
			return nil
		}
		b := s.pack
		s.pack = nil
		if filled > 0 {
			b.Commit(filled)
			filled = 0
		}
		return s.out(b)
	}
	add := func(frames []byte) error {
		if s.pack != nil && filled > 0 && filled+len(frames) > buffer.Shared {
			s.pack.Commit(filled)
			filled = 0
		}
		if s.pack != nil && len(s.pack.Next()) < filled+len(frames) {
			if err := flush(); err != nil {
				return err
			}
		}
		if s.pack == nil {
			s.pack = buffer.Get(buffer.Record)
		}
		filled += copy(s.pack.Next()[filled:], frames)
		return nil
	}
	for i := range control {
		if err == nil {
			err = add(control[i].frame)
		}
	}
	alone := len(control) == 0 && len(data) == 1
	for i := range data {
		b := data[i].buf
		switch {
		case err != nil:
		case !alone && b.Count() == 1 && b.Payload() <= smallFrame:
			err = add(b.Bytes()[buffer.Prefix : buffer.Prefix+b.Payload()])
		default:
			if err = flush(); err == nil {
				err = s.out(b)
				continue
			}
		}
		b.Release()
	}
	if err == nil {
		err = flush()
	}
	if err == nil {
		err = s.push()
	}
	return err
}

// out seals every record of b in place and owns it. What is sealed goes out together,
// in one write, at the end of the round or when it is as much as the lane has lately
// taken quickly, and no more than half a batch: whoever closes or waits must see that a slow
// one goes on.
func (s *sealer) out(b *buffer.Buffer) error {
	if n := s.heldPayload; n > 0 && n+payload(b) > s.quick {
		if err := s.push(); err != nil {
			b.Release()
			return err
		}
	}
	s.held = append(s.held, b)
	if err := b.Records(s.records.seal); err != nil {
		return err
	}
	s.heldPayload += payload(b)
	return nil
}

// push writes what is sealed, in the order in which it was sealed.
func (s *sealer) push() (err error) {
	if len(s.held) == 0 {
		return nil
	}
	n := s.heldPayload
	large := n > buffer.Shared
	var start time.Time
	if large {
		start = time.Now()
	}
	for _, b := range s.held {
		s.vector = append(s.vector, b.Bytes())
	}
	err = s.lane.Write(s.vector)
	clear(s.vector)
	s.vector = s.vector[:0]
	s.release()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrCut, err)
	}
	s.writes.Add(1)
	if large {
		s.pace(n, time.Since(start))
	}
	return nil
}

// release gives back what is sealed and written, or never will be.
func (s *sealer) release() {
	for i, b := range s.held {
		b.Release()
		s.held[i] = nil
	}
	s.held, s.heldPayload = s.held[:0], 0
}

// pace halves the budget when a full buffer took long and doubles it when one
// went quickly; likewise what goes out together.
func (s *sealer) pace(n int, took time.Duration) {
	switch {
	case took > slowWrite:
		s.quick = 0
	case took < slowWrite/4:
		s.quick = min(max(s.quick, 2*n), together)
	}
	now := int(s.budget.Load())
	switch {
	case took > slowWrite && now > buffer.Shared:
		s.budget.Store(int32(max(now/2, buffer.Shared)))
	case took < slowWrite/4 && n >= now && now < buffer.Batch:
		s.budget.Store(int32(min(now*2, buffer.Batch)))
	}
}
