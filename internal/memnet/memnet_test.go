package memnet

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/nettest"
)

func TestConnConformsToNetConn(t *testing.T) {
	for name, l := range map[string]Link{
		"zero":    {},
		"latency": {Latency: time.Millisecond},
		"rate":    {Latency: time.Millisecond, Rate: 125 << 20},
		"small":   {Buffer: 7},
	} {
		t.Run(name, func(t *testing.T) {
			nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
				a, b := Pipe(l)
				return a, b, func() { a.Close(); b.Close() }, nil
			})
		})
	}
}

func TestFastLinkWithHighLatencyIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate, size, latency = 125_000_000, 125_000_000, 50 * time.Millisecond
		a, b := Pipe(Link{Latency: latency, Rate: rate})
		sent := sha256.New()
		go func() {
			src := rand.NewChaCha8([32]byte{1})
			if _, err := io.CopyN(io.MultiWriter(a, sent), src, size); err != nil {
				t.Error(err)
			}
			a.CloseWrite()
		}()
		start := time.Now()
		received := sha256.New()
		if n, err := io.Copy(received, struct{ io.Reader }{b}); n != size || err != nil {
			t.Fatalf("received %d bytes, %v", n, err)
		}
		if d := time.Since(start); d != time.Second+latency {
			t.Errorf("%d bytes took %v", size, d)
		}
		if !bytes.Equal(sent.Sum(nil), received.Sum(nil)) {
			t.Error("other bytes arrived than were sent")
		}
		a.Close()
		b.Close()
	})
}

func TestBytesArriveWhenTheLinkHasCarriedThem(t *testing.T) {
	for _, tc := range []struct {
		link   Link
		writes []int
		read   int
		at     time.Duration
	}{
		{Link{Latency: 30 * time.Millisecond}, []int{10}, 10, 30 * time.Millisecond},
		{Link{Latency: 30 * time.Millisecond, Rate: 1000}, []int{1, 1}, 1, 31 * time.Millisecond},
		{Link{Latency: 30 * time.Millisecond, Rate: 1000}, []int{100}, 50, 80 * time.Millisecond},
		{Link{Rate: 3}, []int{1, 1, 1}, 3, time.Second},
		{Link{Rate: 1000, Buffer: 10}, []int{100}, 100, 100 * time.Millisecond},
	} {
		t.Run(fmt.Sprint(tc.link, tc.read), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := Pipe(tc.link)
				go func() {
					for _, n := range tc.writes {
						a.Write(make([]byte, n))
					}
				}()
				start := time.Now()
				if _, err := io.ReadFull(b, make([]byte, tc.read)); err != nil {
					t.Fatal(err)
				}
				if d := time.Since(start); d != tc.at {
					t.Errorf("arrived after %v, want %v", d, tc.at)
				}
				a.Close()
				b.Close()
			})
		})
	}
}

// Small writes must not gain time by rounding.
func TestManySmallWritesTakeAsLongAsOneLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := Pipe(Link{Rate: 3_000_000_000})
		go func() {
			for range 300_000 / 3 {
				a.Write([]byte("abc"))
			}
			a.CloseWrite()
		}()
		start := time.Now()
		if n, _ := io.Copy(io.Discard, b); n != 300_000 {
			t.Fatalf("received %d bytes", n)
		}
		if d := time.Since(start); d != 100*time.Microsecond {
			t.Errorf("took %v, want 100µs", d)
		}
	})
}

func TestWriteBlocksWhenTheBufferIsFull(t *testing.T) {
	for _, tc := range []struct {
		name  string
		link  Link
		stall bool
		take  int           // bytes that are written without a wait
		after time.Duration // when one more byte is
	}{
		{"not sent", Link{Rate: 1000, Buffer: 500}, false, 500, time.Millisecond},
		{"default", Link{Rate: 64 << 10, Latency: time.Second}, false, 64 << 10, time.Second/(64<<10) + 2},
		{"not read", Link{Buffer: 500}, false, 500, 0},
		{"stalled", Link{Buffer: 500}, true, 500, 0},
		{"stalled with rate", Link{Rate: 1000, Buffer: 500}, true, 500, 0},
		{"stalled with latency", Link{Latency: time.Second, Buffer: 500}, true, 500, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := Pipe(tc.link)
				if tc.stall {
					a.Stall()
				}
				start := time.Now()
				if n, err := a.Write(make([]byte, tc.take)); n != tc.take || err != nil || time.Since(start) != 0 {
					t.Fatalf("Write: %d, %v after %v", n, err, time.Since(start))
				}
				a.SetWriteDeadline(start.Add(time.Hour))
				_, err := a.Write([]byte{1})
				if d := time.Since(start); tc.after > 0 && (err != nil || d > tc.after) {
					t.Errorf("one more byte: %v after %v", err, d)
				} else if tc.after == 0 && !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("one more byte: %v", err)
				}
				if tc.after == 0 {
					a.SetWriteDeadline(time.Time{})
					a.Resume()
					go io.Copy(io.Discard, b)
					if _, err := a.Write([]byte{1}); err != nil {
						t.Errorf("once there is room: %v", err)
					}
				}
				a.Close()
				b.Close()
			})
		})
	}
}

func TestUnreadLinkTakesABoundedNumberOfBytes(t *testing.T) {
	for _, l := range []Link{{}, {Latency: time.Second}, {Rate: 1 << 20}, {Rate: 1 << 20, Latency: time.Second}} {
		synctest.Test(t, func(t *testing.T) {
			a, b := Pipe(l)
			a.SetWriteDeadline(time.Now().Add(time.Hour))
			n, err := a.Write(make([]byte, 64<<20))
			if !errors.Is(err, os.ErrDeadlineExceeded) || n > defaultBuffer+maxInFlight {
				t.Errorf("%v: wrote %d bytes, %v", l, n, err)
			}
			if got, err := io.Copy(io.Discard, io.LimitReader(b, int64(n))); got != int64(n) || err != nil {
				t.Errorf("%v: of %d bytes written %d were read, %v", l, n, got, err)
			}
			a.Close()
			b.Close()
		})
	}
}

func TestCloseDeliversAllThenEOF(t *testing.T) {
	for _, l := range []Link{{}, {Latency: time.Second}, {Latency: time.Second, Rate: 1000}} {
		for name, end := range map[string]func(*Conn) error{"Close": (*Conn).Close, "CloseWrite": (*Conn).CloseWrite} {
			synctest.Test(t, func(t *testing.T) {
				a, b := Pipe(l)
				a.Write(make([]byte, 5000))
				if err := end(a); err != nil {
					t.Fatal(err)
				}
				if _, err := a.Write([]byte{1}); err == nil {
					t.Errorf("%s: a write after it succeeded", name)
				}
				got, err := io.ReadAll(b)
				if len(got) != 5000 || err != nil {
					t.Errorf("%s over %v: %d bytes, %v", name, l, len(got), err)
				}
				b.Close()
				a.Close()
			})
		}
	}
}

func TestHalfCloseLeavesTheOtherDirection(t *testing.T) {
	a, b := Pipe(Link{})
	defer a.Close()
	defer b.Close()
	a.CloseWrite()
	if _, err := b.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("Read: %v", err)
	}
	if _, err := b.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 9)
	if n, err := a.Read(buf); string(buf[:n]) != "answer" || err != nil {
		t.Fatalf("Read: %q, %v", buf[:n], err)
	}
	if _, err := a.Write([]byte{1}); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("Write after CloseWrite: %v", err)
	}
}

// each way to reset a connection, with the time after which the end that did not ask is told.
var resets = map[string]struct {
	reset func(a *Conn)
	after time.Duration
}{
	"Cut":       {func(a *Conn) { a.Cut() }, 0},
	"SetLinger": {func(a *Conn) { a.SetLinger(0); a.Close() }, time.Second},
	"CutAt":     {func(a *Conn) { a.CutAt(3); a.Write([]byte("abcd")) }, time.Second},
}

func TestResetEndsWhatIsWaiting(t *testing.T) {
	for name, tc := range resets {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := Pipe(Link{Latency: time.Second, Buffer: 100})
				b.Stall() // so that b's writer waits
				var wg sync.WaitGroup
				start := time.Now().Add(time.Minute)
				check := func(op string, err error) {
					var oe *net.OpError
					if !errors.Is(err, syscall.ECONNRESET) || !errors.As(err, &oe) {
						t.Errorf("%s: %v", op, err)
					}
					if d := time.Since(start); d != tc.after {
						t.Errorf("%s ended after %v, want %v", op, d, tc.after)
					}
				}
				wg.Go(func() {
					_, err := b.Write(make([]byte, 1000))
					check("Write", err)
				})
				if name != "CutAt" { // there the reader gets the bytes: the next test
					wg.Go(func() {
						_, err := b.Read(make([]byte, 1000))
						check("Read", err)
					})
				}
				time.Sleep(time.Minute)
				tc.reset(a)
				wg.Wait()
				b.Close()
				a.Close()
			})
		})
	}
}

func TestResetDropsWhatWasNotRead(t *testing.T) {
	for name, tc := range resets {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := Pipe(Link{Latency: time.Second})
				a.Write([]byte("unread"))
				time.Sleep(10 * time.Second)
				tc.reset(a)
				time.Sleep(10 * time.Second)
				for range 2 {
					if n, err := b.Read(make([]byte, 10)); n != 0 || !errors.Is(err, ErrReset) {
						t.Errorf("Read: %d, %v", n, err)
					}
				}
				if _, err := b.Write([]byte{1}); !errors.Is(err, ErrReset) {
					t.Errorf("Write: %v", err)
				}
				if err := b.CloseWrite(); err == nil {
					t.Error("CloseWrite succeeded")
				}
				if err := b.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
			})
		})
	}
}

func TestCutReachesTheEndThatCalled(t *testing.T) {
	a, b := Pipe(Link{})
	defer a.Close()
	defer b.Close()
	a.Cut()
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, ErrReset) {
		t.Errorf("Read: %v", err)
	}
	if _, err := a.Write(make([]byte, 1)); !errors.Is(err, ErrReset) {
		t.Errorf("Write: %v", err)
	}
}

func TestLingerZeroDropsWhatWasNotSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := Pipe(Link{Latency: time.Second, Rate: 1000})
		a.Write(make([]byte, 1000))
		time.Sleep(500 * time.Millisecond)
		a.SetLinger(0)
		a.Close()
		n, err := io.Copy(io.Discard, b)
		if n == 0 || n > 500 || !errors.Is(err, ErrReset) {
			t.Errorf("read %d bytes, %v", n, err)
		}
		b.Close()
	})
}

func TestWriteFailsOnceThePeerHasClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := Pipe(Link{Latency: time.Second, Buffer: 100, Rate: 1})
		defer b.Close()
		a.Close()
		start := time.Now()
		n, err := b.Write(make([]byte, 1000))
		if n != 100 || !errors.Is(err, syscall.EPIPE) || time.Since(start) != time.Second {
			t.Errorf("Write: %d, %v after %v", n, err, time.Since(start))
		}
	})
}

func TestStallHoldsEverythingForItsLength(t *testing.T) {
	for _, l := range []Link{{Latency: time.Second}, {Latency: time.Second, Rate: 1000}} {
		synctest.Test(t, func(t *testing.T) {
			timed := func(stall bool) time.Duration {
				a, b := Pipe(l)
				defer a.Close()
				defer b.Close()
				start := time.Now()
				a.Write(make([]byte, 1000))
				a.CloseWrite()
				if stall {
					time.AfterFunc(500*time.Millisecond, a.Stall)
					time.AfterFunc(time.Hour+500*time.Millisecond, a.Resume)
				}
				if n, err := io.Copy(io.Discard, b); n != 1000 || err != nil {
					t.Errorf("read %d bytes, %v", n, err)
				}
				return time.Since(start)
			}
			if plain, stalled := timed(false), timed(true); stalled != plain+time.Hour {
				t.Errorf("%v: took %v, stalled for an hour %v", l, plain, stalled)
			}
		})
	}
}

func TestStallLeavesWhatHasArrivedAndTheOtherDirection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := Pipe(Link{Latency: time.Second})
		a.Write([]byte("early"))
		time.Sleep(2 * time.Second)
		a.Stall()
		a.Write([]byte("late"))
		buf := make([]byte, 20)
		if n, err := b.Read(buf); string(buf[:n]) != "early" || err != nil {
			t.Errorf("Read: %q, %v", buf[:n], err)
		}
		b.Write([]byte("answer"))
		if n, err := a.Read(buf); string(buf[:n]) != "answer" || err != nil {
			t.Errorf("Read: %q, %v", buf[:n], err)
		}
		b.SetReadDeadline(time.Now().Add(time.Hour))
		if n, err := b.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Read during the stall: %q, %v", buf[:n], err)
		}
		a.Close()
		b.Close()
	})
}

func TestFinAtLooksLikeACleanEnd(t *testing.T) {
	for name, early := range map[string]bool{"before": true, "after": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := Pipe(Link{Latency: time.Second, Rate: 1000})
				if early {
					a.FinAt(700)
				}
				for range 10 {
					if n, err := a.Write(make([]byte, 100)); n != 100 || err != nil {
						t.Fatalf("Write: %d, %v", n, err)
					}
				}
				if !early {
					a.FinAt(700)
				}
				if got, err := io.ReadAll(b); len(got) != 700 || err != nil {
					t.Errorf("read %d bytes, %v", len(got), err)
				}
				if _, err := a.Write(make([]byte, 100<<10)); err != nil {
					t.Errorf("a write after the end: %v", err)
				}
				b.Write([]byte("x"))
				if n, err := a.Read(make([]byte, 1)); n != 1 || err != nil {
					t.Errorf("the other direction: %d, %v", n, err)
				}
				a.Close()
				time.Sleep(time.Hour)
				if _, err := b.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
					t.Errorf("Write after Close of the other end: %v", err)
				}
				b.Close()
			})
		})
	}
}

func TestCutAtDeliversUpToTheOffset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := Pipe(Link{Latency: time.Second, Rate: 1000})
		a.CutAt(700)
		a.Write(make([]byte, 1000))
		start := time.Now()
		n, err := io.Copy(io.Discard, b)
		// The reader and the cut race for the last piece, as in life.
		if n > 700 || n < 699 || !errors.Is(err, ErrReset) || time.Since(start) != 1700*time.Millisecond {
			t.Errorf("read %d bytes, %v after %v", n, err, time.Since(start))
		}
		a.Close()
		b.Close()
	})
}

func TestHookSeesEachWriteWithItsOffset(t *testing.T) {
	a, b := Pipe(Link{})
	defer b.Close()
	var seen []string
	a.OnWrite(func(off int64, p []byte) []byte {
		seen = append(seen, fmt.Sprint(off, string(p)))
		switch off {
		case 0:
			return bytes.ToUpper(p)
		case 3:
			return nil
		}
		return append(p, p...)
	})
	mine := []byte("abc")
	for _, p := range [][]byte{mine, []byte("dropped"), []byte("twice")} {
		if n, err := a.Write(p); n != len(p) || err != nil {
			t.Fatalf("Write: %d, %v", n, err)
		}
	}
	a.Close()
	if got, _ := io.ReadAll(b); string(got) != "ABCtwicetwice" {
		t.Errorf("arrived: %q", got)
	}
	if string(mine) != "abc" {
		t.Error("the hook was given the writer's own bytes")
	}
	if fmt.Sprint(seen) != "[0abc 3dropped 10twice]" {
		t.Errorf("hook saw %v", seen)
	}
}

func TestHookMayCut(t *testing.T) {
	a, b := Pipe(Link{})
	defer b.Close()
	defer a.Close()
	a.OnWrite(func(off int64, p []byte) []byte { b.Cut(); return p })
	if _, err := a.Write([]byte("x")); !errors.Is(err, ErrReset) {
		t.Errorf("Write: %v", err)
	}
}

func TestConcurrentWritesDoNotMix(t *testing.T) {
	a, b := Pipe(Link{Buffer: 10})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 20 {
				a.Write(bytes.Repeat([]byte{byte(i)}, 100))
			}
		})
	}
	go func() { wg.Wait(); a.Close() }()
	buf := make([]byte, 100)
	for range 8 * 20 {
		if _, err := io.ReadFull(b, buf); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(buf, bytes.Repeat(buf[:1], 100)) {
			t.Fatalf("mixed: %x", buf)
		}
	}
	b.Close()
}

// Whatever is done in whatever order, both ends come to an end, nobody waits for ever, and a clean end means that all bytes came.
func TestRandomUseAlwaysEnds(t *testing.T) {
	for seed := range uint64(100) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			link := Link{Latency: time.Duration(r.IntN(2)) * time.Second, Rate: int64(r.IntN(2) * 100000), Buffer: r.IntN(2) * 300}
			a, b := Pipe(link)
			var wg sync.WaitGroup
			var reset bool
			var mu sync.Mutex
			var wrote, read [2]int64
			for i, c := range []*Conn{a, b} {
				wg.Go(func() {
					for range 20 {
						n, err := c.Write(make([]byte, r0(seed, i, 2000)))
						wrote[i] += int64(n)
						if err != nil {
							break
						}
					}
					c.CloseWrite()
				})
				wg.Go(func() {
					n, err := io.Copy(io.Discard, struct{ io.Reader }{c})
					read[i] = n
					mu.Lock()
					reset = reset || err != nil
					mu.Unlock()
				})
				wg.Go(func() {
					for k := range 6 {
						time.Sleep(time.Duration(r0(seed, 10*i+k, 3000)) * time.Millisecond)
						switch r0(seed, 100*i+k, 40) {
						case 0:
							c.Cut()
						case 1:
							c.SetLinger(0)
							c.Close()
						case 2, 3:
							c.Close()
						case 4, 5, 6, 7:
							c.Stall()
						default:
							c.Resume()
						}
					}
					c.Resume()
				})
			}
			wg.Wait()
			if !reset && (read[0] != wrote[1] || read[1] != wrote[0]) {
				t.Errorf("seed %d: clean end, but wrote %v and read %v", seed, wrote, read)
			}
			a.Close()
			b.Close()
			for _, h := range []*half{a.out, b.out} {
				if h.held != 0 && !h.to.closed {
					t.Errorf("seed %d: %d bytes held after the end", seed, h.held)
				}
			}
		})
	}
}

func r0(seed uint64, stream, n int) int { return rand.New(rand.NewPCG(seed, uint64(stream))).IntN(n) }

func TestNothingIsLeftAfterClose(t *testing.T) {
	before := runtime.NumGoroutine()
	for range 100 {
		a, b := Pipe(Link{Latency: time.Hour})
		a.Write([]byte("x"))
		a.CutAt(1)
		a.Close()
		b.Close()
		if a.out.alarm != nil && a.out.alarm.Stop() || b.out.alarm != nil && b.out.alarm.Stop() {
			t.Fatal("an alarm is still set")
		}
	}
	if after := runtime.NumGoroutine(); after > before {
		t.Errorf("%d goroutines, before %d", after, before)
	}
}

func TestDialTakesARoundTrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &Network{Link: Link{Latency: time.Second}}
		l, err := n.Listen("relay:4000")
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		go func() {
			c, err := n.Dial(t.Context(), "tcp", "relay:4000")
			if err != nil || time.Since(start) != 2*time.Second {
				t.Errorf("Dial: %v after %v", err, time.Since(start))
				return
			}
			c.Write([]byte("hello"))
			c.Close()
		}()
		c, err := l.Accept()
		if err != nil || time.Since(start) != 3*time.Second {
			t.Fatalf("Accept: %v after %v", err, time.Since(start))
		}
		if c.LocalAddr().String() != "relay:4000" || c.RemoteAddr().String() != "10.0.0.1:1" {
			t.Errorf("addresses %v, %v", c.LocalAddr(), c.RemoteAddr())
		}
		if got, err := io.ReadAll(c); string(got) != "hello" || err != nil {
			t.Errorf("read %q, %v", got, err)
		}
		c.Close()
		l.Close()
	})
}

func TestDialFailsAsTCPDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &Network{Link: Link{Latency: time.Second}}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		if _, err := n.Dial(ctx, "tcp", "nobody:1"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("too slow: %v", err)
		}
		if _, err := n.Dial(t.Context(), "tcp", "nobody:1"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("nobody listens: %v", err)
		}
		l, err := n.Listen("a:0")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Listen(l.Addr().String()); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("second listener: %v", err)
		}
		var waiting []net.Conn
		for range backlog {
			c, err := n.From("10.9.9.9")(t.Context(), "tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			waiting = append(waiting, c)
		}
		ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := n.Dial(ctx, "tcp", l.Addr().String()); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("backlog full: %v", err)
		}
		l.Close()
		for _, c := range waiting {
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, ErrReset) {
				t.Errorf("never accepted: %v", err)
			}
			c.Close()
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept after Close: %v", err)
		}
	})
}

func TestOnConnectSeesBothEndsFirst(t *testing.T) {
	n := &Network{OnConnect: func(addr string, dialer, listener *Conn) { dialer.CutAt(0) }}
	l, err := n.Listen("a:1")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := n.Dial(t.Context(), "tcp", "a:1")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); !errors.Is(err, ErrReset) {
		t.Errorf("Write: %v", err)
	}
}

func BenchmarkPipe(b *testing.B) {
	for name, l := range map[string]Link{"zero": {}, "latency": {Latency: time.Millisecond}} {
		b.Run(name, func(b *testing.B) {
			run := func() {
				x, y := Pipe(l)
				done := make(chan struct{})
				go func() { defer close(done); io.Copy(io.Discard, struct{ io.Reader }{y}) }()
				buf := make([]byte, 32<<10)
				for b.Loop() {
					x.Write(buf)
				}
				x.Close()
				<-done
				y.Close()
			}
			b.SetBytes(32 << 10)
			run()
		})
	}
}
