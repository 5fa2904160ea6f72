package stream

import (
	"errors"
	"os"
	"time"

	"github.com/portal-tunnel/portal/internal/buffer"
)

// credit takes a new limit. It is an absolute offset: a repeated or late one
// changes nothing.
func (c *Conn) credit(n uint64) {
	c.send.Lock()
	if n > c.limit {
		c.limit = n
		c.writableLocked()
	}
	c.send.Unlock()
}

// writableLocked wakes whoever waits in room or starve, to look again.
func (c *Conn) writableLocked() {
	c.writable.Broadcast()
	if c.starved != nil {
		c.starved.SetReadDeadline(time.Unix(1, 0))
	}
}

// room waits for credit and says how many bytes may be sent, at least one. It
// returns 0 at once when none are wanted.
func (c *Conn) room(wanted int) (int, error) { return c.roomWithin(wanted, 0) }

// starvedFor is how long Join waits for credit before it watches what it reads from, which its
// peer may reset meanwhile. Most waits are far shorter.
const starvedFor = 250 * time.Millisecond

var errStarved = errors.New("no credit came")

// roomWithin is room that gives up with errStarved after d, where that is not 0.
func (c *Conn) roomWithin(wanted int, d time.Duration) (int, error) {
	var till time.Time
	c.send.Lock()
	defer func() {
		if !till.IsZero() {
			c.hunger.Stop()
		}
		c.send.Unlock()
	}()
	for {
		switch {
		case c.failed != nil:
			return 0, c.failed
		case c.ending:
			return 0, errEnding
		case past(c.writeTill):
			return 0, os.ErrDeadlineExceeded
		case wanted == 0:
			return 0, nil
		case c.limit > c.sent:
			return int(min(c.limit-c.sent, uint64(wanted), buffer.Batch)), nil
		case past(till):
			return 0, errStarved
		}
		if d > 0 && till.IsZero() {
			till = time.Now().Add(d)
			if c.hunger == nil { // one for all of its waits: bulk has many
				c.hunger = time.AfterFunc(d, func() {
					c.send.Lock()
					c.writable.Broadcast()
					c.send.Unlock()
				})
			} else {
				c.hunger.Reset(d)
			}
		}
		c.writable.Wait()
	}
}

// Write sends b as data frames. It waits for credit and for the lane.
func (c *Conn) Write(b []byte) (n int, err error) {
	c.writes.Lock()
	defer c.doneWriting()
	for {
		room, err := c.room(len(b))
		if err != nil || len(b) == 0 {
			return n, err
		}
		buf := buffer.ForPayload(min(room, c.mux.over.Budget()))
		took := 0
		for took < room {
			next := buf.Next()
			if len(next) <= headerSize {
				break
			}
			body := next[headerSize:]
			k := copy(body[:min(len(body), buffer.Bulk, room-took)], b[took:])
			putHeader(next, frameData, c.id, k)
			buf.Commit(headerSize + k)
			took += k
		}
		if err := c.push(buf, took); err != nil {
			return n, err
		}
		n += took
		if b = b[took:]; len(b) == 0 {
			return n, nil
		}
	}
}

// push sends a buffer with n bytes of payload. The caller holds writes: the end
// must not get between the bytes and their count.
func (c *Conn) push(b *buffer.Buffer, n int) error {
	c.send.Lock()
	ending := c.ending
	c.send.Unlock()
	if ending {
		b.Release()
		return errEnding
	}
	if err := c.mux.over.Send(&c.queue, b); err != nil {
		return c.sendError(err)
	}
	c.send.Lock()
	c.sent += uint64(n)
	c.send.Unlock()
	return nil
}

// sendError prefers the stream's own reason to the channel's. A channel that takes
// nothing more is about to end, and to reset this stream.
func (c *Conn) sendError(err error) error {
	c.send.Lock()
	defer c.send.Unlock()
	switch {
	case c.failed != nil:
		return c.failed
	case c.ending:
		return errEnding
	case errors.Is(err, os.ErrDeadlineExceeded):
		return err
	}
	return &ResetError{Code: CodeChannel, Reason: err.Error()}
}

// doneWriting lets the next writer in and sends the end that was asked for
// meanwhile.
func (c *Conn) doneWriting() {
	c.writes.Unlock()
	c.send.Lock()
	owed := c.ending && !c.sentEnd
	c.send.Unlock()
	if owed {
		c.sendEnd()
	}
}

// CloseWrite ends this direction: an end with the total goes behind the data,
// and the other end's reader sees io.EOF after exactly that many bytes. A Write
// that waits gives up; what it has sent so far counts, and the end follows it.
func (c *Conn) CloseWrite() error {
	c.send.Lock()
	if !c.ending {
		c.ending = true
		c.writableLocked()
		c.mux.over.Stop(&c.queue, os.ErrDeadlineExceeded)
		// No deadline counts any more: it would cut the end off.
		c.writeTill = time.Time{}
		stopTimer(&c.writeTime)
	}
	c.send.Unlock()
	return c.sendEnd()
}

// sendEnd sends the end, unless somebody is writing: who does so may be waiting
// for the lane, and sends the end itself afterwards (doneWriting).
func (c *Conn) sendEnd() error {
	if !c.writes.TryLock() {
		return nil
	}
	c.mux.over.Stop(&c.queue, nil)
	c.send.Lock()
	err, again, total := c.failed, c.sentEnd, c.sent
	c.sentEnd = true
	c.send.Unlock()
	if err != nil || again {
		c.writes.Unlock()
		return err
	}
	b := buffer.Get(headerSize + 8 + buffer.Around)
	b.Commit(len(appendOffset(b.Next()[:0], frameEnd, c.id, total)))
	// Posted, not sent: one frame more than the queue holds does no harm, and
	// nobody waits who only closes.
	err = c.mux.over.Post(&c.queue, b)
	c.writes.Unlock()
	if err != nil {
		return c.sendError(err)
	}
	c.doneSend.Store(true)
	if c.queue.Async.Load() {
		c.mux.over.Wake()
	} else {
		c.mux.over.Flush()
	}
	c.settle()
	return nil
}
