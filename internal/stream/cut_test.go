package stream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/internal/alloc"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
)

// cuts are the ways in which a lane ends that nobody has closed. Each acts at
// byte off of what c writes.
var cuts = map[string]func(c *memnet.Conn, off int64){
	"FIN": func(c *memnet.Conn, off int64) { c.FinAt(off) },
	"RST": func(c *memnet.Conn, off int64) { c.CutAt(off) },
	"altered": func(c *memnet.Conn, off int64) {
		c.OnWrite(func(at int64, b []byte) []byte {
			if at <= off && off < at+int64(len(b)) {
				b[off-at] ^= 0x40
			}
			return b
		})
	},
	"silence": func(c *memnet.Conn, off int64) {
		c.OnWrite(func(at int64, b []byte) []byte {
			if at+int64(len(b)) > off {
				return b[:max(off-at, 0)]
			}
			return b
		})
	},
}

func cutOffsets() int64 {
	if alloc.Raced {
		return 16
	}
	return 64
}

// TestCutLaneIsAPrefixAndAReset cuts the lane in the middle of a transfer, at
// 64 places of either direction of the lane, for an upload and a download. Both
// applications must see it: the reader after an exact prefix.
func TestCutLaneIsAPrefixAndAReset(t *testing.T) {
	const size = 128 << 10
	for name, cut := range cuts {
		for _, upload := range []bool{true, false} {
			for _, forth := range []bool{true, false} { // the half of the lane that carries the data, or the other
				t.Run(fmt.Sprintf("%s, upload %v, data's half %v", name, upload, forth), func(t *testing.T) {
					for i := range cutOffsets() {
						off := i * size / cutOffsets()
						if !forth {
							off = i // of a few credits and pongs
						}
						cutOnce(t, cut, upload, forth, off, size)
					}
				})
			}
		}
	}
}

func cutOnce(t *testing.T, cut func(*memnet.Conn, int64), upload, forth bool, off int64, size int) {
	t.Helper()
	data := random(size, 1)
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		f := join(w, w.x, w.incoming, inMemory)
		w.alive() // the answer is in: nothing but data and credits follow
		lane, at := w.a, w.now(0)
		if upload != forth {
			lane, at = w.b, w.now(1)
		}
		cut(lane, at+off)
		from, to := f.near, f.far
		if !upload {
			from, to = to, from
		}
		var both sync.WaitGroup
		both.Go(func() {
			// With an end behind the data half of the time; never when the other
			// half of the lane is cut, for then it may have come through.
			from.Write(data)
			if forth && off%2 == 0 {
				from.CloseWrite()
			}
			prefixThenReset(t, "writer", from, nil)
		})
		both.Go(func() { prefixThenReset(t, "reader", to, data) })
		both.Wait()
		for _, err := range []error{<-f.joinX, <-f.joinY} {
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("offset %d: Join returned %v", off, err)
			}
		}
		<-w.x.ran
		<-w.y.ran
		w.x.ran <- nil
		w.y.ran <- nil
	})
}

// TestADamagedRecordResetsStreamsBeforeTheOtherEndIsTold: the lane's other direction
// has seconds of data in front of the reason.
func TestADamagedRecordResetsStreamsBeforeTheOtherEndIsTold(t *testing.T) {
	virtual(t, memnet.Link{Rate: 32 << 10}, stream.Limits{}, func(w *world) {
		f := join(w, w.x, w.incoming, inMemory)
		flows := []*flow{f}
		var all sync.WaitGroup
		for range 16 { // each has a window of 64 KiB
			g := join(w, w.x, w.incoming, inMemory)
			flows = append(flows, g)
			all.Go(func() { g.far.Write(random(256<<10, 1)) })
		}
		time.Sleep(5 * time.Second)
		w.alive()
		w.a.OnWrite(func(_ int64, b []byte) []byte { b[len(b)-1] ^= 1; return b })
		begin := time.Now()
		if _, err := f.near.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if n, err := f.far.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%d bytes, %v", n, err)
		}
		if d := time.Since(begin); d > time.Second {
			t.Errorf("reset after %v", d)
		}
		all.Wait()
		for _, g := range flows {
			<-g.joinX
			<-g.joinY
		}
		<-w.x.ran
		<-w.y.ran
		w.x.ran <- nil
		w.y.ran <- nil
	})
}

// now is how many bytes end i has written to the lane: base counts the
// handshake, the rest is counted here from the frames that are known.
func (w *world) now(i int) int64 {
	var n int64
	c := []*memnet.Conn{w.a, w.b}[i]
	c.OnWrite(func(off int64, b []byte) []byte { n = off + int64(len(b)); return b })
	[]*side{w.x, w.y}[i].end.Ping()
	synctest.Wait()
	c.OnWrite(nil)
	return n
}

// TestCutLaneIsAResetOfRealSockets is the same through the kernel: the fast
// path of Join, and an RST on the wire.
func TestCutLaneIsAResetOfRealSockets(t *testing.T) {
	const size = 128 << 10
	data := random(size, 2)
	for _, name := range []string{"FIN", "RST", "altered"} {
		cut := cuts[name]
		for _, upload := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, upload %v", name, upload), func(t *testing.T) {
				for i := range cutOffsets() {
					a, b := memnet.Pipe(memnet.Link{})
					lane := b
					if upload {
						lane = a
					}
					var written atomic.Int64
					lane.OnWrite(func(off int64, b []byte) []byte { written.Store(off + int64(len(b))); return b })
					x, y, incoming := pair(t, a, b, stream.Limits{})
					f := join(t, x, incoming, overTCP)
					if err := f.sx.Wait(t.Context()); err != nil {
						t.Fatal(err)
					}
					// The answer was the last frame until there is data.
					cut(lane, written.Load()+i*size/cutOffsets())
					from, to := f.near, f.far
					if !upload {
						from, to = to, from
					}
					var both sync.WaitGroup
					both.Go(func() {
						// The kernel tells an error once: to the writer or the reader.
						if _, err := from.Write(data); err == nil && from.CloseWrite() == nil {
							prefixThenReset(t, "writer", from, nil)
						}
					})
					both.Go(func() { prefixThenReset(t, "reader", to, data) })
					both.Wait()
					f.joined()
					stop(t, x, y)
				}
			})
		}
	}
}

// TestStreamThatIsOverOnTheWireOutlivesTheChannel: both ends are in, and what
// is held belongs to a reader that is only slow.
func TestStreamThatIsOverOnTheWireOutlivesTheChannel(t *testing.T) {
	data := random(60<<10, 3)
	t.Run("by its user", func(t *testing.T) {
		virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
			c, d := w.open()
			d.Write(data)
			d.CloseWrite()
			c.CloseWrite()
			synctest.Wait()
			w.a.Cut()
			synctest.Wait()
			if w.x.end.Err() == nil {
				t.Fatal("the channel is not cut")
			}
			wholeThenEnd(t, "reader", c, data)
			if _, err := d.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("the other end reads %v", err)
			}
		})
	})
	t.Run("by a joined connection", func(t *testing.T) {
		virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
			c, d := w.open()
			app, local := memnet.Pipe(memnet.Link{Buffer: 1 << 10}) // takes little at a time
			joined := make(chan error, 1)
			go func() { joined <- c.Join(local) }()
			d.Write(data)
			d.CloseWrite()
			synctest.Wait() // the last of it is being written
			app.CloseWrite()
			synctest.Wait()
			w.a.Cut()
			synctest.Wait()
			wholeThenEnd(t, "application", app, data)
			if err := <-joined; err != nil {
				t.Errorf("Join returned %v", err)
			}
			d.Close()
		})
	})
	t.Run("but not a reset of its own end", func(t *testing.T) {
		virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
			c, d := w.open()
			app, local := memnet.Pipe(memnet.Link{Buffer: 1 << 10})
			joined := make(chan error, 1)
			go func() { joined <- c.Join(local) }()
			d.Write(data)
			d.CloseWrite()
			app.CloseWrite()
			synctest.Wait()
			w.x.mux.ResetAll(stream.CodeAway, "")
			w.x.mux.WaitIdle()
			prefixThenReset(t, "application", app, data)
			if err := <-joined; !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("Join returned %v", err)
			}
			d.Close()
		})
	})
}

// TestCutUnixSocketKeepsItsPrefix: a Unix socket has no reset, so nothing is
// claimed about how it ends, only about its bytes and about Join.
func TestCutUnixSocketKeepsItsPrefix(t *testing.T) {
	data := random(256<<10, 4)
	a, b := memnet.Pipe(memnet.Link{})
	x, y, incoming := pair(t, a, b, stream.Limits{})
	a.CutAt(100 << 10)
	f := join(t, x, incoming, overUnix)
	go f.near.Write(data)
	got, _ := io.ReadAll(f.far)
	if len(got) > len(data) || string(got) != string(data[:len(got)]) {
		t.Errorf("the %d bytes read are no prefix", len(got))
	}
	ex, ey := f.joined()
	if !errors.Is(ex, syscall.ECONNRESET) || !errors.Is(ey, syscall.ECONNRESET) {
		t.Errorf("Join returned %v and %v", ex, ey)
	}
	stop(t, x, y)
	f.near.Close()
	f.far.Close()
}

// TestCutResetsEveryKindOfWaiter: Read, Write, Wait and Join.
func TestCutResetsEveryKindOfWaiter(t *testing.T) {
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		c, _ := w.open()
		_, d := w.open()
		unanswered, err := w.x.mux.Open(stream.Header{Kind: stream.Bytes})
		if err != nil {
			t.Fatal(err)
		}
		in := <-w.incoming
		local, app := net.Pipe()
		e, _ := w.open()
		waiters := map[string]func() error{
			"Read":  func() error { _, err := c.Read(make([]byte, 1)); return err },
			"Write": func() error { _, err := d.Write(make([]byte, 1<<20)); return err },
			"Wait":  func() error { return unanswered.Wait(context.Background()) },
			"Join":  func() error { return e.Join(local) },
		}
		var all sync.WaitGroup
		for name, f := range waiters {
			all.Go(func() {
				if err := f(); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%s returned %v", name, err)
				}
			})
		}
		synctest.Wait()
		w.b.Cut()
		all.Wait()
		if _, err := app.Read(make([]byte, 1)); err == nil {
			t.Error("the local connection is not closed")
		}
		synctest.Wait() // the last stream of the table may be reset behind those that were waited for
		if !in.Gone() {
			t.Error("a stream that waits for its answer is not gone")
		}
		if _, err := w.x.mux.Open(stream.Header{}); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Open on a dead channel: %v", err)
		}
		in.Accept() // must leave nothing behind
	})
}

// A channel that ends takes no more bytes some time before its streams are reset.
func TestAWriteIntoAChannelThatEndsIsAReset(t *testing.T) {
	for name, end := range map[string]func(w *world){
		"given up by this end": func(w *world) {
			w.a.Stall() // so that the other end does not end it sooner
			w.x.end.Abort(channel.CloseInternal, errors.New("given up"))
		},
		"a lane that takes nothing": func(w *world) {
			w.b.Stall() // so that it is heard of by writing only
			w.b.Close()
			w.a.CloseWrite()
		},
	} {
		t.Run(name, func(t *testing.T) {
			virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
				c, _ := w.open()
				end(w)
				var err error
				for i := 0; i < 3 && err == nil; i++ { // what fails on the way is heard of by the next
					_, err = c.Write([]byte("x"))
				}
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("it ends with %v", err)
				}
			})
		})
	}
}

// TestSilenceIsFoundInHalfAMinute: a lane that swallows everything.
func TestSilenceIsFoundInHalfAMinute(t *testing.T) {
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		c, d := w.open()
		w.alive()
		w.a.Stall()
		w.b.Stall()
		start := time.Now()
		_, err := c.Read(make([]byte, 1))
		_, err2 := d.Read(make([]byte, 1))
		if !errors.Is(err, syscall.ECONNRESET) || !errors.Is(err2, syscall.ECONNRESET) {
			t.Errorf("reads end with %v and %v", err, err2)
		}
		if took := time.Since(start); took > 30*time.Second {
			t.Errorf("noticed after %v", took)
		}
	})
}
