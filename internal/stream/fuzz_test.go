package stream

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/internal/alloc"
	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/routing"
)

// sink is an Over that takes everything and keeps nothing.
type sink struct {
	mu      sync.Mutex
	control map[uint64]bool
	ended   error
}

func (s *sink) Send(q *buffer.Queue, b *buffer.Buffer) error { return s.Post(q, b) }

func (s *sink) Unsent() int { return 0 }

func (s *sink) Clear(int, time.Duration) bool { return true }

func (s *sink) Post(q *buffer.Queue, b *buffer.Buffer) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	b.Release()
	if q.Stop != nil {
		return q.Stop
	}
	q.Sealed = true
	return s.ended
}

func (s *sink) Flush() {}
func (s *sink) Wake()  {}

func (s *sink) Stop(q *buffer.Queue, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	q.Stop = err
}

func (s *sink) Discard(q *buffer.Queue, why error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	q.Stop = why
	return q.Sealed
}

func (s *sink) Control(key uint64, _ []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.control[key] = true
	return s.ended
}

func (s *sink) Budget() int        { return buffer.Batch }
func (s *sink) RTT() time.Duration { return time.Millisecond }

// FuzzFrames feeds a mux frames as they come. A sequence is, each:
//
//	kind (1) | id (1) | length (2) | what to do locally (1) | body, repeated to length
//
// Nothing may panic; what is held is what was granted at most, and nothing is
// left after the channel has ended.
func FuzzFrames(f *testing.F) {
	seq := func(frames ...[]byte) (b []byte) {
		for _, x := range frames {
			b = append(b, x...)
		}
		return b
	}
	one := func(kind, id byte, local byte, body ...byte) []byte {
		return append([]byte{kind, id, 0, byte(len(body)), local}, body...)
	}
	n8 := func(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
	open := append(append([]byte{1}, n8(1<<16)...), 2, 'd', 'b')
	f.Add(seq(one(frameOpen, 2, 1, open...), one(frameData, 2, 0, []byte("hello")...), one(frameCredit, 2, 0, n8(1<<20)...), one(frameEnd, 2, 2, n8(5)...)))
	f.Add(seq(one(frameOpen, 2, 3, open...), one(frameReset, 2, 0, 8, 'x')))
	f.Add(seq(one(frameOpened, 1, 0, n8(1<<16)...), one(frameData, 1, 4, 1, 2, 3), one(frameEnd, 1, 5, n8(3)...)))
	f.Add(seq(one(frameRefused, 1, 0, 1, 'n', 'o'), one(frameAway, 0, 0)))
	f.Add(seq(one(frameOpen, 2, 1, open...), []byte{frameData, 2, 0x40, 0, 6, 'x'}, one(frameData, 2, 7, 1), one(frameEnd, 2, 8, n8(0x4001)...)))
	f.Fuzz(func(t *testing.T, in []byte) {
		// Five bytes make a frame of 64 KiB here: what is held is bounded below, not by alloc.
		if len(in) > 4<<10 {
			return
		}
		var n routing.Node
		over := &sink{control: make(map[uint64]bool)}
		var budget Budget
		var conns []*Conn
		var waiting *Incoming
		var all sync.WaitGroup
		m := NewMux(&n, over, true, Limits{Streams: 4, Budget: &budget}, func(i *Incoming) { waiting = i })
		c, err := m.Open(Header{Kind: Bytes})
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		for len(in) >= 5 {
			kind, id, size, local := in[0], uint32(in[1]), int(binary.BigEndian.Uint16(in[2:])), in[4]
			in = in[5:]
			own := in[:min(size, len(in))]
			in = in[len(own):]
			body := own
			if len(own) > 0 && len(own) < size { // a long body for few bytes of input
				body = bytes.Repeat(own, size/len(own)+1)[:size]
			}
			if err = m.Frame(kind, id, body); err != nil {
				break
			}
			last := conns[len(conns)-1]
			switch local % 10 {
			case 1:
				if waiting != nil {
					conns = append(conns, waiting.Accept())
					waiting = nil
				}
			case 2:
				last.CloseWrite()
			case 3:
				if waiting != nil {
					waiting.Refuse(CodeBusy, "fuzz")
					waiting = nil
				}
			case 4:
				last.SetReadDeadline(time.Unix(1, 0))
				last.Read(make([]byte, 100))
			case 5:
				last.Close()
			case 6:
				last.Reset(CodeLocal, "fuzz")
			case 7:
				app, l := memnet.Pipe(memnet.Link{})
				all.Go(func() { last.Join(l) })
				all.Go(func() { io.Copy(io.Discard, app) })
				all.Go(func() { app.Write([]byte("fuzz")); app.CloseWrite() })
			case 8:
				err = m.Flush()
			case 9:
				m.Away()
			}
			if held := budget.Held(); held > 5*4*(firstWindow+buffer.Record) {
				t.Fatalf("%d bytes are held", held)
			}
		}
		m.Flush()
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		over.mu.Lock()
		over.ended = err
		if len(over.control) > 4*300 {
			t.Errorf("%d control frames are queued", len(over.control))
		}
		over.mu.Unlock()
		m.Fail(err)
		for _, c := range conns {
			c.Reset(CodeLocal, "end")
		}
		m.WaitIdle()
		all.Wait()
		n.Close()
		if held := budget.Held(); held != 0 {
			t.Errorf("%d bytes are held after the end", held)
		}
		if len(budget.muxes) != 0 {
			t.Error("the node's budget keeps a mux that has ended")
		}
	})
}

func FuzzParseOpen(f *testing.F) {
	for _, h := range []Header{{Kind: Bytes, Name: "db"}, {Kind: Request, Name: "enroll", Body: []byte("body")}, {}} {
		b, err := appendOpen(nil, 1, h, 1<<20)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b[headerSize:])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		h, credit, err := parseOpen(b)
		if err != nil {
			if !errors.Is(err, errFrame) {
				t.Error(err)
			}
			return
		}
		again, err := appendOpen(nil, 1, h, credit)
		if err != nil || !bytes.Equal(again[headerSize:], b) {
			t.Errorf("%x becomes %x (%v)", b, again, err)
		}
	})
}

func FuzzParseCode(f *testing.F) {
	f.Add([]byte{1})
	f.Add([]byte("\x02too many connections"))
	f.Add([]byte("\x03\x1b[31m\xff\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		code, reason, err := parseCode(b)
		if err != nil {
			return
		}
		for _, r := range reason {
			if r < ' ' || r == 0x7f {
				t.Errorf("%q has a control character", reason)
			}
		}
		// Cleaning never makes a reason longer than it was.
		if len(reason) > len(b)-1 {
			t.Errorf("%d bytes become %d", len(b)-1, len(reason))
		}
		if c, again, err := parseCode(appendCode(nil, frameReset, 1, code, reason)[headerSize:]); err != nil || c != code || again != reason {
			t.Errorf("%v %q becomes %v %q (%v)", code, reason, c, again, err)
		}
	})
}

func TestDecodersOfLyingInputAllocateLittle(t *testing.T) {
	var opens [][]byte
	for _, h := range []Header{{Kind: Bytes, Name: "db"}, {Kind: Request, Name: "enroll", Body: []byte("body")}} {
		b, err := appendOpen(nil, 1, h, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		opens = append(opens, b[headerSize:])
	}
	code := appendCode(nil, frameReset, 1, CodeBusy, "too many connections")[headerSize:]
	t.Run("open", func(t *testing.T) { alloc.Hostile(t, func(b []byte) { parseOpen(b) }, opens...) })
	t.Run("reset", func(t *testing.T) { alloc.Hostile(t, func(b []byte) { parseCode(b) }, code) })
	t.Run("offset", func(t *testing.T) { alloc.Hostile(t, func(b []byte) { parseOffset(b) }, make([]byte, 8)) })
	// One body of every kind, for a stream that is there and one that is not.
	t.Run("frame", func(t *testing.T) {
		alloc.Hostile(t, func(b []byte) {
			for kind := uint8(frameOpen); kind <= frameCredit; kind++ {
				var n routing.Node
				var budget Budget
				m := NewMux(&n, &sink{control: make(map[uint64]bool)}, true, Limits{Streams: 4, Budget: &budget}, func(*Incoming) {})
				c, err := m.Open(Header{Kind: Bytes})
				if err != nil {
					t.Fatal(err)
				}
				if err = m.Frame(kind, 1, b); err == nil {
					err = m.Frame(kind, 2, b)
				}
				if err == nil {
					err = io.ErrUnexpectedEOF
				}
				m.Fail(err)
				c.Reset(CodeLocal, "end")
				m.WaitIdle()
				n.Close()
			}
		}, append(opens, code, make([]byte, 8))...)
	})
}
