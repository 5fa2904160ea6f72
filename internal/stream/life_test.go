package stream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/internal/alloc"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
)

// TestStreamsOfAChannelAreLimited to 16,384 at both ends: an opener does not
// ask for more, and one that does all the same is refused.
func TestStreamsOfAChannelAreLimited(t *testing.T) {
	const limit = 16384
	t.Run("opener", func(t *testing.T) {
		virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
			for range limit {
				if _, err := w.x.mux.Open(stream.Header{Kind: stream.Bytes}); err != nil {
					t.Fatal(err)
				}
			}
			var refusal *stream.RefusedError
			if _, err := w.x.mux.Open(stream.Header{Kind: stream.Bytes}); !errors.As(err, &refusal) || refusal.Code != stream.CodeBusy {
				t.Errorf("one more: %v", err)
			}
			w.alive()
			(<-w.incoming).Accept().Reset(stream.CodeLocal, "")
			synctest.Wait()
			if _, err := w.x.mux.Open(stream.Header{Kind: stream.Bytes}); err != nil {
				t.Errorf("after one has gone: %v", err)
			}
		})
	})
	t.Run("acceptor", func(t *testing.T) {
		against(t, true, stream.Limits{}, func(p *peer) {
			id := uint32(1)
			for range limit / 4096 {
				for range 4096 {
					p.key++
					p.end.Control(1<<40|p.key, append(channel.AppendHeader(nil, opening, id, 12), openBody(1, 1, "db")...))
					id += 2
				}
				synctest.Wait()
			}
			if n := p.y.mux.Streams(); n != limit {
				t.Fatalf("%d streams are open", n)
			}
			p.send(hello(id))
			if p.count(refused, id) != 1 {
				t.Error("one more is not refused")
			}
			p.send(frame{reset, 1, []byte{8}}, hello(id+2))
			if p.count(refused, id+2) != 0 || p.y.mux.Streams() != limit {
				t.Error("after one has gone, the next is refused")
			}
		})
	})
}

// TestPeerThatOnlyOpensAndResetsLosesItsChannel, and one whose opens come to
// nothing now and then does not.
func TestPeerThatOnlyOpensAndResetsLosesItsChannel(t *testing.T) {
	// Each attempt opens id; it returns what follows the open.
	attempts := map[string]func(p *peer, id uint32){
		"reset by the opener": func(p *peer, id uint32) {
			p.send(hello(id), frame{reset, id, []byte{8}})
			(<-p.incoming).Accept()
		},
		"reset after the answer": func(p *peer, id uint32) {
			p.send(hello(id))
			(<-p.incoming).Accept()
			p.send(frame{reset, id, []byte{8}})
		},
		"refused": func(p *peer, id uint32) {
			p.send(hello(id))
			(<-p.incoming).Refuse(stream.CodeRefused, "")
		},
	}
	for name, attempt := range attempts {
		t.Run(name, func(t *testing.T) {
			against(t, true, stream.Limits{}, func(p *peer) {
				id := uint32(1)
				try := func(n int) {
					for range n {
						if p.y.end.Err() == nil {
							attempt(p, id)
							id += 2
						}
					}
				}
				try(1900) // a burst
				if p.y.end.Err() != nil {
					t.Fatal("a burst of 1,900 ends the channel")
				}
				for range 20 { // 150 a second for a while
					time.Sleep(time.Second)
					try(150)
				}
				if p.y.end.Err() != nil {
					t.Fatal("150 a second end the channel")
				}
				try(3000)
				var abuse *stream.AbuseError
				if err := p.y.end.Err(); !errors.As(err, &abuse) {
					t.Fatalf("3,000 at once: %v", err)
				}
				var closed *channel.Closed
				if err := <-p.over; !errors.As(err, &closed) || closed.Code != channel.CloseAbuse {
					t.Errorf("the peer is told %v", err)
				}
				p.over <- nil
			})
		})
	}
	t.Run("reset after a byte of an answer", func(t *testing.T) {
		against(t, true, stream.Limits{}, func(p *peer) {
			for id := uint32(1); id < 6000; id += 2 {
				p.send(hello(id))
				c := (<-p.incoming).Accept()
				c.Write([]byte("x"))
				p.send(frame{reset, id, []byte{8}})
			}
			if err := p.y.end.Err(); err != nil {
				t.Errorf("the channel has ended: %v", err)
			}
		})
	})
}

// TestGoingAwayTakesNoNewStreamsAndFinishesOpenOnes.
func TestGoingAwayTakesNoNewStreamsAndFinishesOpenOnes(t *testing.T) {
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		c, d := w.open()
		told := 0
		w.x.mux.OnAway(func() { told++ })
		w.y.mux.Away()
		synctest.Wait()
		if told != 1 || !w.x.mux.Going() || w.y.mux.Going() {
			t.Errorf("told %d times; going %v and %v", told, w.x.mux.Going(), w.y.mux.Going())
		}
		w.x.mux.OnAway(func() { told++ })
		if told != 2 {
			t.Error("who asks later is not told")
		}
		if _, err := w.x.mux.Open(stream.Header{Kind: stream.Bytes}); !errors.Is(err, stream.ErrAway) {
			t.Errorf("Open: %v", err)
		}
		if _, err := w.y.mux.Open(stream.Header{Kind: stream.Bytes}); err == nil {
			t.Error("the end that goes away opens a stream")
		}
		payload := random(300<<10, 13)
		go func() { c.Write(payload); c.CloseWrite() }()
		wholeThenEnd(t, "open stream", d, payload)
		idle := make(chan struct{})
		go func() { w.y.mux.WaitIdle(); close(idle) }()
		synctest.Wait()
		select {
		case <-idle:
			t.Error("idle with a stream that is half open")
		default:
		}
		d.CloseWrite()
		wholeThenEnd(t, "its other end", c, nil)
		<-idle
	})
	// An open that crosses the going away is refused, so that its opener can go
	// elsewhere at once.
	against(t, true, stream.Limits{}, func(p *peer) {
		p.y.mux.Away()
		p.send(hello(1))
		for _, f := range p.got {
			if f.kind == refused && (f.id != 1 || stream.Code(f.body[0]) != stream.CodeAway) {
				t.Errorf("answer %+v", f)
			}
		}
		if p.count(refused, 1) != 1 || p.count(away, 0) != 1 {
			t.Error("no refusal")
		}
	})
}

// TestNodeListsStreamEndsAndTheChannel, and nothing of them afterwards.
func TestNodeListsStreamEndsAndTheChannel(t *testing.T) {
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		listed := func(when string, want int) {
			t.Helper()
			synctest.Wait()
			for i, s := range []*side{w.x, w.y} {
				if got := len(slices.Collect(s.node.List())); got != want {
					t.Errorf("%s, end %d lists %d actors, want %d", when, i, got, want)
				}
			}
		}
		listed("idle", 2) // sealer and opener
		c, d := w.open()
		e, g := w.open()
		listed("with two streams", 4)
		c.Close()
		d.Close()
		listed("one is closed", 3)
		e.CloseWrite()
		listed("one is half closed", 3)
		g.Reset(stream.CodeLocal, "")
		listed("it is reset", 2)
		s, err := w.x.mux.Open(stream.Header{Kind: stream.Bytes})
		if err != nil {
			t.Fatal(err)
		}
		in := <-w.incoming
		s.Reset(stream.CodeLocal, "")
		synctest.Wait()
		if !in.Gone() {
			t.Error("the opener has given up and Gone says no")
		}
		in.Accept() // too late
		listed("accepted after a reset", 2)
	})
}

// TestAcceptOnAClosedNodeIsARefusal.
func TestAcceptOnAClosedNodeIsAReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := memnet.Pipe(memnet.Link{})
		x, y, incoming := pair(t, a, b, stream.Limits{})
		c, err := x.mux.Open(stream.Header{Kind: stream.Bytes})
		if err != nil {
			t.Fatal(err)
		}
		in := <-incoming
		go y.node.Close()
		synctest.Wait()
		d := in.Accept()
		if _, err := d.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the stream reads %v", err)
		}
		stop(t, x, y)
		if err := c.Wait(context.Background()); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the opener is told %v", err)
		}
	})
}

// TestDeadlines: a read and a write that wait for the other end, for credit or
// for the lane.
func TestDeadlines(t *testing.T) {
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		c, d := w.open()
		w.alive()
		timed := func(what string, f func() (int, error)) int {
			t.Helper()
			start := time.Now()
			n, err := f()
			var timeout net.Error
			if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() {
				t.Errorf("%s: %v", what, err)
			}
			if took := time.Since(start); took != time.Second {
				t.Errorf("%s took %v", what, took)
			}
			return n
		}
		soon := func() time.Time { return time.Now().Add(time.Second) }
		c.SetReadDeadline(soon())
		timed("read", func() (int, error) { return c.Read(make([]byte, 1)) })
		c.SetReadDeadline(time.Time{})

		c.SetWriteDeadline(soon())
		n := timed("write without credit", func() (int, error) { return c.Write(make([]byte, 1<<20)) })
		if n != 64<<10 {
			t.Errorf("%d bytes were written with 64 KiB of credit", n)
		}
		if got, err := io.ReadFull(d, make([]byte, n)); err != nil {
			t.Errorf("%d bytes arrived: %v", got, err)
		}
		c.SetWriteDeadline(time.Time{})
		grow(w, c, d, 1<<20)
		w.a.Stall()
		c.SetWriteDeadline(soon())
		m := timed("write on a lane that takes nothing", func() (int, error) {
			sum := 0
			for { // until two buffers are queued
				n, err := c.Write(make([]byte, 1<<10))
				if sum += n; err != nil {
					return sum, err
				}
				if sum > 1<<20 {
					t.Fatal("a lane that takes nothing takes everything")
				}
			}
		})
		// The end goes behind what was counted; no deadline cuts it off.
		closed := make(chan error, 1)
		go func() { closed <- c.CloseWrite() }()
		w.a.Resume()
		if err := <-closed; err != nil {
			t.Error(err)
		}
		c.SetWriteDeadline(time.Now().Add(-time.Second))
		if got, err := io.Copy(io.Discard, d); got != int64(m) || err != nil {
			t.Errorf("%d bytes and %v arrived, %d were counted", got, err, m)
		}
		// A write in time clears the deadline's mark.
		d.SetWriteDeadline(time.Now().Add(-time.Second))
		if _, err := d.Write([]byte("x")); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
		d.SetWriteDeadline(time.Time{})
		d.Write([]byte("late"))
		d.CloseWrite()
		wholeThenEnd(t, "opener", c, []byte("late"))
	})
}

// TestCloseWithUnreadDataResetsTheOther, as TCP does, also when both ends are in.
func TestCloseWithUnreadDataResetsTheOther(t *testing.T) {
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		c, d := w.open()
		c.Write([]byte("unread"))
		synctest.Wait()
		d.Close()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the other end reads %v", err)
		}
		if _, err := c.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the other end writes %v", err)
		}
		c.Close()
		w.clean()

		c, d = w.open()
		c.Write([]byte("unread"))
		c.CloseWrite()
		d.CloseWrite()
		wholeThenEnd(t, "opener", c, nil)
		synctest.Wait()
		d.Close()
		w.clean()
	})
}

// TestCloseEndsInGoodOrder: what was written arrives, then an end; what the
// other still sends is answered by a reset; one that never ends is reset.
func TestCloseEndsInGoodOrder(t *testing.T) {
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		c, d := w.open()
		c.Write([]byte("last words"))
		c.Close()
		if err := c.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Close again: %v", err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Read after Close: %v", err)
		}
		if _, err := c.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Write after Close: %v", err)
		}
		wholeThenEnd(t, "other", d, []byte("last words"))
		d.Write([]byte("to nobody"))
		synctest.Wait()
		if _, err := d.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a write to a closed stream: %v", err)
		}
		w.clean()

		c, d = w.open()
		c.Close()
		time.Sleep(59 * time.Second)
		if w.x.mux.Streams() != 1 {
			t.Error("a closed stream does not wait for the other's end")
		}
		time.Sleep(2 * time.Second)
		if _, err := d.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a minute after Close, the other writes %v", err)
		}
		w.clean()
	})
}

// TestAResetBehindBothEndsTakesNoEndBack: what is queued still, the end included, reaches the other
// end, which would wait for it else.
func TestAResetBehindBothEndsTakesNoEndBack(t *testing.T) {
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		c, d := w.open()
		e, g := w.open()
		if _, err := d.Write([]byte("never read")); err != nil {
			t.Fatal(err)
		}
		d.CloseWrite()
		synctest.Wait()
		w.a.Stall()
		go e.Write(make([]byte, 64<<10)) // sits in the lane
		synctest.Wait()
		c.SetWriteDeadline(time.Now().Add(time.Hour)) // a Write does not wait in the lane
		if _, err := c.Write([]byte("all of it")); err != nil {
			t.Fatal(err)
		}
		c.CloseWrite()
		c.Reset(stream.CodeLocal, "")
		w.a.Resume()
		d.SetReadDeadline(time.Now().Add(time.Minute))
		if b, err := io.ReadAll(d); err != nil || string(b) != "all of it" {
			t.Errorf("the other end reads %q, %v", b, err)
		}
		g.Reset(stream.CodeLocal, "")
	})
}

// TestCloseWhileAWriteWaits, for credit or for the lane: Close does not wait for
// it, and the other end gets what the Write has counted, and an end.
func TestCloseWhileAWriteWaits(t *testing.T) {
	for _, what := range []string{"credit", "the lane", "its turn in the lane"} {
		t.Run(what, func(t *testing.T) {
			virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
				c, d := w.open()
				e, g := w.open()
				grow(w, c, d, 1<<20)
				w.alive()
				size := 4 << 20
				if what != "credit" {
					w.a.Stall()
					size = 1 << 20
				}
				if what == "its turn in the lane" {
					go e.Write(make([]byte, 64<<10)) // sits in the lane
					synctest.Wait()
				}
				counted := make(chan int, 1)
				go func() {
					n, err := c.Write(make([]byte, size))
					if what != "the lane" && !errors.Is(err, net.ErrClosed) {
						t.Errorf("Write: %v", err)
					}
					counted <- n
				}()
				synctest.Wait()
				start := time.Now()
				c.Close()
				if took := time.Since(start); took != 0 {
					t.Errorf("Close waited %v", took)
				}
				if what == "its turn in the lane" {
					synctest.Wait()
					if len(counted) == 0 {
						t.Error("the Write goes on waiting")
					}
				}
				if what != "credit" {
					w.a.Resume()
				}
				got, err := io.Copy(io.Discard, d)
				if n := <-counted; err != nil || got != int64(n) || n == 0 {
					t.Errorf("%d bytes and %v arrived, %d were counted", got, err, n)
				}
				d.Close()
				e.Reset(stream.CodeLocal, "")
				_ = g
			})
		})
	}
}

// TestCloseOfAJoinedStreamIsAReset.
func TestCloseOfAJoinedStreamIsAReset(t *testing.T) {
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		f := join(w, w.x, w.incoming, inMemory)
		synctest.Wait()
		f.sx.Close()
		prefixThenReset(t, "near", f.near, nil)
		prefixThenReset(t, "far", f.far, nil)
		f.joined()
	})
}

// TestCloseWriteBesideASocketNeverLies: bytes that the pump is sending meanwhile
// count or are lost with a reset, but the total is never wrong.
func TestCloseWriteBesideASocketNeverLies(t *testing.T) {
	for i := range 50 {
		virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
			f := join(w, w.x, w.incoming, inMemory)
			go pour(f.near)
			var got bytes.Buffer
			read := make(chan struct{})
			go func() { io.Copy(&got, f.far); close(read) }()
			for range i {
				runtime.Gosched()
			}
			f.sx.CloseWrite()
			<-read
			f.sx.Reset(stream.CodeLocal, "")
			f.joined()
			w.alive() // a lie would have ended the channel
		})
	}
}

// TestStormLeavesNothing does everything to the same streams at once.
func TestStormLeavesNothing(t *testing.T) {
	rounds := 60
	if alloc.Raced {
		rounds = 25
	}
	for round := range rounds {
		virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
			const count = 8
			var all sync.WaitGroup
			var opened [count][2]func() *stream.Conn
			for i := range opened {
				c, err := w.x.mux.Open(stream.Header{Kind: stream.Bytes})
				if err != nil {
					t.Fatal(err)
				}
				opened[i] = [2]func() *stream.Conn{func() *stream.Conn { return c }, (<-w.incoming).Accept}
			}
			for i := range opened {
				for side, get := range opened[i] {
					all.Go(func() {
						s := get()
						var ops sync.WaitGroup
						for op := range 9 {
							if (round*7+i*5+op*3+side)%4 == 0 {
								continue
							}
							ops.Go(func() {
								for range (round + i*3 + op*5) % 11 {
									runtime.Gosched()
								}
								switch op {
								case 0:
									s.Write(make([]byte, 100<<10))
								case 1:
									io.CopyN(io.Discard, s, 50<<10)
								case 2:
									s.CloseWrite()
								case 3:
									app, local := memnet.Pipe(memnet.Link{Buffer: 4 << 10})
									ops.Go(func() { app.Write(make([]byte, 30<<10)); app.CloseWrite() })
									ops.Go(func() { io.Copy(io.Discard, app) })
									s.Join(local)
								case 4:
									s.SetDeadline(time.Now().Add(time.Millisecond))
								case 5:
									s.Close()
								case 6:
									s.SetDeadline(time.Time{})
								case 7:
									if round%3 == 0 {
										s.Reset(stream.CodeLocal, "storm")
									}
								case 8:
									if round%5 == 0 && i == 0 {
										w.x.mux.ResetAll(stream.CodeAway, "storm")
									}
								}
							})
						}
						// Whatever is left ends with the channel.
						ops.Wait()
						s.Reset(stream.CodeLocal, "end")
					})
				}
			}
			done := make(chan struct{})
			go func() { all.Wait(); close(done) }()
			if round%2 == 0 {
				for range round {
					runtime.Gosched()
				}
				w.a.Cut()
			} else {
				synctest.Wait()
				w.y.mux.ResetAll(stream.CodeRevoked, "storm")
				w.x.mux.ResetAll(stream.CodeRevoked, "storm")
			}
			<-done
			synctest.Wait()
			w.clean()
		})
	}
	if n := goroutines(); n > 1 { // beside this one
		t.Errorf("%d goroutines are left", n-1)
	}
}

// TestIdleStreamsCostOneGoroutineASocket and no buffer. As many as 10,000, or
// what the limit of descriptors allows: two each.
func TestIdleStreamsCostOneGoroutineASocket(t *testing.T) {
	n := 10000
	if alloc.Raced {
		n = 1000
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	n = min(n, (int(limit.Cur)-500)/2)
	x, y, incoming := overLoopback(t, stream.Limits{})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var apps, locals []net.Conn
	for range n {
		app, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		local, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		stream.Arm(local)
		apps, locals = append(apps, app), append(locals, local)
	}
	memory := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	before, used := runtime.NumGoroutine(), memory()
	var joins sync.WaitGroup
	var conns []*stream.Conn
	for i := range n {
		c, d := open(t, x, incoming)
		conns = append(conns, c)
		joins.Go(func() { d.Join(locals[i]) })
	}
	// Each has carried a byte both ways, so nothing is new about it.
	b := make([]byte, 1)
	for i, c := range conns {
		c.Write(b)
		if _, err := io.ReadFull(apps[i], b); err != nil {
			t.Fatal(err)
		}
		apps[i].Write(b)
		if _, err := io.ReadFull(c, b); err != nil {
			t.Fatal(err)
		}
	}
	each := float64(memory()-used) / float64(n)
	// The lane readers and whoever happens to run are the 16.
	if g := runtime.NumGoroutine() - before; g > n+16 {
		t.Errorf("%d streams own %d goroutines", n, g)
	}
	t.Logf("%d streams: %.0f bytes each for both ends and the goroutine of the one that is joined", n, each)
	if each > 8<<10 && !alloc.Raced {
		t.Errorf("an idle stream costs %.0f bytes", each)
	}
	y.mux.ResetAll(stream.CodeAway, "")
	joins.Wait()
	x.mux.WaitIdle()
	for _, c := range apps {
		c.Close()
	}
	stop(t, x, y)
	if n := goroutines(); n > 1 { // beside this one
		t.Errorf("%d goroutines are left", n-1)
	}
}

// TestAddressesNameTheStream at both ends alike.
func TestAddressesNameTheStream(t *testing.T) {
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		c, d := w.open()
		if a, b := fmt.Sprint(c.LocalAddr(), c.RemoteAddr()), fmt.Sprint(d.RemoteAddr(), d.LocalAddr()); a != b || a != "stream 1 stream 1" {
			t.Errorf("%s and %s", a, b)
		}
		c.Close()
		d.Close()
	})
}
