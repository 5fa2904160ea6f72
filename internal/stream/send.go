package stream

import (
	"net"
	"os"

	"github.com/portal-tunnel/portal/internal/buffer"
)

// credit takes a new limit. It is an absolute offset: a repeated or late one
// changes nothing.
func (c *Conn) credit(n uint64) {
	c.send.Lock()
	if n > c.limit {
		c.limit = n
		c.writable.Broadcast()
	}
	c.send.Unlock()
}

// room waits for credit and says how many bytes may be sent, at least one.
func (c *Conn) room() (int, error) {
	c.send.Lock()
	defer c.send.Unlock()
	for {
		switch {
		case c.failed != nil:
			return 0, c.failed
		case c.ending:
			return 0, net.ErrClosed
		case past(c.writeTill):
			return 0, os.ErrDeadlineExceeded
		case c.limit > c.sent:
			return int(min(c.limit-c.sent, buffer.Batch)), nil
		}
		c.writable.Wait()
	}
}

// Write sends b as data frames. It waits for credit and for the lane.
func (c *Conn) Write(b []byte) (n int, err error) {
	c.writes.Lock()
	defer c.writes.Unlock()
	for {
		room, err := c.room()
		if err != nil || len(b) == 0 {
			return n, err
		}
		buf := buffer.ForPayload(min(len(b), room, c.mux.over.Budget()))
		took := 0
		for took < room && took < len(b) {
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
		b = b[took:]
	}
}

// push sends a buffer with n bytes of payload. The caller is the only sender.
func (c *Conn) push(b *buffer.Buffer, n int) error {
	if err := c.mux.over.Send(&c.queue, b); err != nil {
		return c.sendError(err)
	}
	c.send.Lock()
	c.sent += uint64(n)
	c.send.Unlock()
	return nil
}

// sendError prefers the stream's own reason to the channel's.
func (c *Conn) sendError(err error) error {
	c.send.Lock()
	defer c.send.Unlock()
	if c.failed != nil {
		return c.failed
	}
	return err
}

// CloseWrite ends this direction: an end with the total goes behind the data,
// and the other end's reader sees io.EOF after exactly that many bytes.
func (c *Conn) CloseWrite() error {
	// A Write that waits gives up; what it has sent so far counts.
	c.send.Lock()
	c.ending = true
	c.writable.Broadcast()
	c.send.Unlock()
	c.mux.over.Stop(&c.queue, os.ErrDeadlineExceeded)

	c.writes.Lock()
	defer c.writes.Unlock()
	c.mux.over.Stop(&c.queue, nil)
	c.send.Lock()
	if c.failed != nil || c.sentEnd {
		err := c.failed
		c.send.Unlock()
		return err
	}
	c.sentEnd = true
	total := c.sent
	c.send.Unlock()
	b := buffer.Get(headerSize + 8 + buffer.Around)
	b.Commit(len(appendOffset(b.Next()[:0], frameEnd, c.id, total)))
	// Posted, not sent: one frame more than the queue holds does no harm, and
	// no deadline may cut the end off.
	if err := c.mux.over.Post(&c.queue, b); err != nil {
		return c.sendError(err)
	}
	c.wireDone(&c.doneSend)
	c.mux.over.Flush()
	c.settle()
	return nil
}
