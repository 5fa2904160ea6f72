package stream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
)

const gigabit = 125_000_000 // bytes a second

// meter counts what is written to it.
type meter struct {
	mu sync.Mutex
	n  int64
}

func (m *meter) Write(b []byte) (int, error) {
	m.mu.Lock()
	m.n += int64(len(b))
	m.mu.Unlock()
	return len(b), nil
}

func (m *meter) count() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.n
}

// pour writes to w until that fails.
func pour(w io.Writer) {
	b := make([]byte, 256<<10)
	for {
		if _, err := w.Write(b); err != nil {
			return
		}
	}
}

// echoes sends 16 bytes to and fro for d, and gives how long each took, the shortest first.
func (w *world) echoes(c *stream.Conn, d time.Duration) (took []time.Duration) {
	w.Helper()
	b := make([]byte, 16)
	for start := time.Now(); time.Since(start) < d; {
		at := time.Now()
		if _, err := c.Write(b); err != nil {
			w.Fatal(err)
		}
		if _, err := io.ReadFull(c, b); err != nil {
			w.Fatal(err)
		}
		took = append(took, time.Since(at))
	}
	slices.Sort(took)
	return took
}

// TestWindowFollowsTheLine: above 8 MiB where the line holds 12.5 MB, so that
// one stream fills it; below 1 MiB where it holds an eighth of that.
func TestWindowFollowsTheLine(t *testing.T) {
	for _, c := range []struct {
		name        string
		latency     time.Duration // one way
		least, most int
		joined      bool
	}{
		{"100 ms", 50 * time.Millisecond, 8 << 20, 16 << 20, false},
		{"100 ms, joined", 50 * time.Millisecond, 8 << 20, 16 << 20, true},
		{"1 ms", 500 * time.Microsecond, 128 << 10, 1<<20 - 1, false},
		{"1 ms, joined", 500 * time.Microsecond, 128 << 10, 1<<20 - 1, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			virtual(t, memnet.Link{Latency: c.latency, Rate: gigabit}, stream.Limits{}, func(w *world) {
				m := new(meter)
				var reader *stream.Conn
				var all sync.WaitGroup
				if c.joined {
					f := join(w, w.x, w.incoming, inMemory)
					reader = f.sx
					all.Go(func() { pour(f.far) })
					all.Go(func() { io.Copy(m, f.near) })
					all.Go(func() { f.joined() })
				} else {
					s, d := w.open()
					reader = s
					all.Go(func() { pour(d) })
					all.Go(func() { io.Copy(m, s) })
				}
				for range 10 { // to ramp up; the round trip is measured under load meanwhile
					time.Sleep(4 * c.latency)
					w.x.end.Ping()
					w.y.end.Ping()
				}
				before, span := m.count(), max(8*c.latency, 100*time.Millisecond)
				time.Sleep(span)
				rate := float64(m.count()-before) / span.Seconds()
				window := reader.Window()
				if window < c.least || window > c.most {
					t.Errorf("the window is %d KiB, want %d to %d", window>>10, c.least>>10, c.most>>10)
				}
				if rate < gigabit*8/10 {
					t.Errorf("%.1f MB/s of %.1f", rate/1e6, gigabit/1e6)
				}
				t.Logf("window %d KiB, %.1f %% of the link, round trip %v", window>>10, rate/gigabit*100, w.x.end.RTT())
				reader.Reset(stream.CodeLocal, "")
				all.Wait()
			})
		})
	}
}

// TestLineFillsQuickly: the window grows about once a round trip, and the only stream's to what the line
// carries as soon as that can be told. Growing fourfold and twofold 64 MiB took 1.01 s.
func TestLineFillsQuickly(t *testing.T) {
	virtual(t, memnet.Link{Latency: 50 * time.Millisecond, Rate: gigabit}, stream.Limits{}, func(w *world) {
		c, d := w.open()
		start := time.Now()
		go pour(d)
		var got int64
		b := make([]byte, 256<<10)
		for got < 64<<20 {
			n, err := c.Read(b)
			if err != nil {
				t.Fatal(err)
			}
			got += int64(n)
		}
		// 64 and 256 KiB, 2 and 16 MiB make 3 steps; at the full rate the bytes themselves
		// take 0.54 s. Half a round trip is for the first bytes' way.
		if took := time.Since(start); took > 900*time.Millisecond {
			t.Errorf("64 MiB took %v", took)
		} else {
			t.Logf("64 MiB took %v", took)
		}
		c.Reset(stream.CodeLocal, "")
	})
}

// TestBulkBehindLittleFillsItsLineQuickly: what a kept stream had before decides where in a window its bulk
// begins, and with it where the wait for credit falls.
func TestBulkBehindLittleFillsItsLineQuickly(t *testing.T) {
	const rtt, bulk = 100 * time.Millisecond, 32 << 20
	for _, c := range []struct{ first, second int }{
		{320 << 10, 0}, {320 << 10, 10 << 10}, {320 << 10, 200 << 10}, {64 << 10, 10 << 10}, {64 << 10, 160 << 10},
	} {
		t.Run(fmt.Sprintf("%d and %d KiB", c.first>>10, c.second>>10), func(t *testing.T) {
			virtual(t, memnet.Link{Latency: rtt / 2, Rate: gigabit, Buffer: 32 << 20}, stream.Limits{}, func(w *world) {
				from, to := w.open()
				took := make(chan time.Duration)
				for _, n := range []int{c.first, c.second, bulk} {
					go func() {
						start := time.Now()
						io.CopyN(io.Discard, to, int64(n))
						took <- time.Since(start)
					}()
					from.Write(make([]byte, n))
					last := <-took
					if n == bulk {
						// At the full rate the bytes themselves take 0.27 s.
						t.Logf("%d MiB took %v; the window is %d KiB", n>>20, last, to.Window()>>10)
						if last > 810*time.Millisecond {
							t.Errorf("%d MiB took %v", n>>20, last)
						}
						break
					}
					<-time.After(10 * rtt)
				}
				to.Reset(stream.CodeLocal, "")
			})
		})
	}
}

// largest reads n bytes of what pours in, and gives the largest window on the way.
func (w *world) largest(c *stream.Conn, n int64) (window int) {
	b := make([]byte, 64<<10)
	for n > 0 {
		got, err := c.Read(b)
		if err != nil {
			w.Error(err)
			return window
		}
		n -= int64(got)
		window = max(window, c.Window())
	}
	return window
}

// TestTheOnlyStreamGrowsToWhatItsLineCarries: the pace of a train of records tells it, so that a window
// that grows eightfold does not beyond it. Eightfold without that, 100 ms at 200 Mbit/s had 16 MiB for 4,882 KiB.
// Up to 256 KiB there are too few records to tell.
func TestTheOnlyStreamGrowsToWhatItsLineCarries(t *testing.T) {
	for _, c := range []struct {
		rtt  time.Duration
		rate int64
	}{
		{100 * time.Millisecond, gigabit / 2},
		{100 * time.Millisecond, gigabit / 5},
		{100 * time.Millisecond, gigabit / 8},
		{100 * time.Millisecond, gigabit / 20},
		{70 * time.Millisecond, gigabit / 5},
		{30 * time.Millisecond, gigabit},
		{30 * time.Millisecond, gigabit / 10},
		{20 * time.Millisecond, gigabit / 10},
		{20 * time.Millisecond, gigabit / 20},
		{20 * time.Millisecond, gigabit / 100},
	} {
		for _, up := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v, %d Mbit/s, up %v", c.rtt, c.rate*8/1e6, up), func(t *testing.T) {
				virtual(t, memnet.Link{Latency: c.rtt / 2, Rate: c.rate, Buffer: 32 << 20}, stream.Limits{}, func(w *world) {
					from, to := w.open()
					if !up {
						from, to = to, from
					}
					var all sync.WaitGroup
					all.Go(func() { pour(from) })
					carried := int(2 * c.rtt.Seconds() * float64(c.rate))
					window := w.largest(to, int64(8*carried))
					t.Logf("the window was %d KiB at most, %d at the end; two round trips carry %d", window>>10, to.Window()>>10, carried>>10)
					if most := max(carried+carried/10, 256<<10); window > most {
						t.Errorf("the window was %d KiB, more than %d", window>>10, most>>10)
					}
					if least := carried * 8 / 10; to.Window() < least {
						t.Errorf("the window is %d KiB at the end, less than %d", to.Window()>>10, least>>10)
					}
					to.Reset(stream.CodeLocal, "")
					all.Wait()
				})
			})
		}
	}
}

// TestOneOfTwoTakesTheLineForItsOwnOnlyFourfold: two that begin together each see the pace of the whole
// line, and what they have under way is what others wait for.
func TestOneOfTwoTakesTheLineForItsOwnOnlyFourfold(t *testing.T) {
	virtual(t, memnet.Link{Latency: 50 * time.Millisecond, Rate: gigabit, Buffer: 64 << 20}, stream.Limits{}, func(w *world) {
		var all sync.WaitGroup
		var done atomic.Bool // one is, and the other alone
		for range 2 {
			c, d := w.open()
			all.Go(func() { pour(d) })
			all.Go(func() {
				b := make([]byte, 64<<10)
				window := c.Window()
				for got := 0; got < 64<<20 && !done.Load(); {
					n, err := c.Read(b)
					if err != nil {
						t.Error(err)
						return
					}
					got += n
					if now := c.Window(); now > 4*window {
						t.Errorf("the window grew from %d to %d KiB", window>>10, now>>10)
					}
					window = c.Window()
				}
				if window < 8<<20 {
					t.Errorf("the window is %d KiB", window>>10)
				}
				done.Store(true)
				c.Reset(stream.CodeLocal, "")
			})
		}
		all.Wait()
	})
}

// TestAStreamBesideBulkWaitsForTwoRoundTrips: what bulk has under way is what two round trips carry, and
// another stream's bytes are behind it on a line that queues all that it is given.
func TestAStreamBesideBulkWaitsForTwoRoundTrips(t *testing.T) {
	for _, rtt := range []time.Duration{8 * time.Millisecond, 20 * time.Millisecond, 30 * time.Millisecond} {
		t.Run(rtt.String(), func(t *testing.T) {
			virtual(t, memnet.Link{Latency: rtt / 2, Rate: gigabit, Buffer: 32 << 20}, stream.Limits{}, func(w *world) {
				var all sync.WaitGroup
				bulk, far := w.open()
				m := new(meter)
				all.Go(func() { pour(far) })
				grown := make(chan struct{})
				all.Go(func() {
					io.CopyN(m, bulk, int64(15*rtt.Seconds()*gigabit))
					close(grown)
					io.Copy(m, bulk)
				})
				c, d := w.open()
				all.Go(func() { io.Copy(d, d) })
				<-grown
				before, start := m.count(), time.Now()
				took := w.echoes(c, 10*rtt)
				rate := float64(m.count()-before) / time.Since(start).Seconds()
				worst := took[len(took)-1]
				t.Logf("the longest %v, half within %v; window %d KiB, %.1f %% of the link", worst, took[len(took)/2], bulk.Window()>>10, rate/gigabit*100)
				if worst > 2*rtt+rtt/10 {
					t.Errorf("beside bulk a round trip of %v takes %v", rtt, worst)
				}
				if rate < gigabit*9/10 {
					t.Errorf("the bulk goes at %.1f MB/s of %.1f", rate/1e6, gigabit/1e6)
				}
				bulk.Reset(stream.CodeLocal, "")
				c.Reset(stream.CodeLocal, "")
				all.Wait()
			})
		})
	}
}

// TestAnUploadThatBeginsBesideADownloadGrows: its credits come behind what the
// download has under way. Before that was two round trips' worth its window never grew: it had 1 %.
func TestAnUploadThatBeginsBesideADownloadGrows(t *testing.T) {
	virtual(t, memnet.Link{Latency: 10 * time.Millisecond, Rate: gigabit, Buffer: 32 << 20}, stream.Limits{}, func(w *world) {
		var all sync.WaitGroup
		var downs, ups meter
		down, far := w.open()
		all.Go(func() { pour(far) })
		begin := make(chan struct{})
		all.Go(func() {
			io.CopyN(&downs, down, gigabit/5)
			close(begin)
			io.Copy(&downs, down)
		})
		<-begin
		up, end := w.open()
		all.Go(func() { pour(up) })
		io.CopyN(&ups, end, gigabit/4) // the window grows
		before, start := downs.count(), time.Now()
		io.CopyN(&ups, end, gigabit/10)
		span := time.Since(start).Seconds() * gigabit
		upward, downward := float64(gigabit/10)/span, float64(downs.count()-before)/span
		t.Logf("%.0f %% up, %.0f %% down; windows %d and %d KiB", 100*upward, 100*downward, end.Window()>>10, down.Window()>>10)
		if upward < 0.3 || downward < 0.8 {
			t.Errorf("%.0f %% of the line up, %.0f %% down", 100*upward, 100*downward)
		}
		down.Reset(stream.CodeLocal, "")
		up.Reset(stream.CodeLocal, "")
		all.Wait()
	})
}

// TestUnreadStreamStallsOnlyItself: a reader that stops holds up neither the
// other direction of its own stream nor its neighbours. Measured in virtual
// time against the same without it.
func TestUnreadStreamStallsOnlyItself(t *testing.T) {
	const neighbours = 20
	const measured = 200 * time.Millisecond
	run := func(t *testing.T, stalled bool) (rate int64, worst time.Duration) {
		virtual(t, memnet.Link{Latency: 5 * time.Millisecond, Rate: gigabit}, stream.Limits{}, func(w *world) {
			var all sync.WaitGroup
			var resets []*stream.Conn
			own := new(meter)
			if stalled {
				f := join(w, w.x, w.incoming, inMemory)
				all.Go(func() { pour(f.far) }) // a download that nobody reads
				all.Go(func() { f.joined() })
				time.Sleep(500 * time.Millisecond) // until its window is full
				all.Go(func() { pour(f.near) })
				all.Go(func() { io.Copy(own, f.far) }) // its upload
				resets = append(resets, f.sx)
			}
			m := new(meter)
			for range neighbours {
				c, d := w.open()
				resets = append(resets, c)
				all.Go(func() { pour(d) })
				all.Go(func() { io.Copy(m, c) })
			}
			c, d := w.open()
			all.Go(func() { io.Copy(d, d) })
			time.Sleep(300 * time.Millisecond)
			before, ownBefore := m.count(), own.count()
			took := w.echoes(c, measured)
			rate = int64(float64(m.count()-before) / measured.Seconds())
			worst = took[len(took)*99/100]
			if n := float64(own.count()-ownBefore) / measured.Seconds(); stalled && n < gigabit*8/10 {
				t.Errorf("the upload of the unread stream goes at %.1f MB/s", n/1e6)
			}
			for _, r := range append(resets, c) {
				r.Reset(stream.CodeLocal, "")
			}
			all.Wait()
		})
		return rate, worst
	}
	rate, worst := run(t, false)
	stalledRate, stalledWorst := run(t, true)
	t.Logf("%.1f MB/s, p99 %v; beside a stalled stream %.1f MB/s, p99 %v", float64(rate)/1e6, worst, float64(stalledRate)/1e6, stalledWorst)
	// More than the line carries is what was under way when the measurement began.
	if stalledRate*10 < min(rate, gigabit)*9 {
		t.Errorf("neighbours get %.1f MB/s beside a stalled stream, %.1f without", float64(stalledRate)/1e6, float64(rate)/1e6)
	}
	if stalledWorst > 2*worst {
		t.Errorf("neighbours wait %v beside a stalled stream, %v without", stalledWorst, worst)
	}
}

// TestBudgetOfTheNode: above half of it no window grows, above it nothing is
// opened, at twice it the stream that holds most is reset.
func TestBudgetOfTheNode(t *testing.T) {
	const limit = 1 << 20
	small := func() stream.Limits { return stream.Limits{Budget: &stream.Budget{Limit: limit}} }
	// ballast makes one unread stream that holds n bytes at y.
	ballast := func(w *world, n int) (c, d *stream.Conn) {
		c, d = w.open()
		grow(w, c, d, n)
		if _, err := c.Write(make([]byte, n)); err != nil {
			w.Fatal(err)
		}
		synctest.Wait()
		return c, d
	}

	t.Run("above half no window grows", func(t *testing.T) {
		virtual(t, memnet.Link{}, small(), func(w *world) {
			_, held := ballast(w, 3*limit/4)
			c, d := w.open()
			go pour(c)
			for range 100 {
				d.Read(make([]byte, 64<<10))
				synctest.Wait()
			}
			if n := d.Window(); n != 64<<10 {
				t.Errorf("the window has grown to %d KiB", n>>10)
			}
			held.Reset(stream.CodeLocal, "")
			for range 100 {
				d.Read(make([]byte, 64<<10))
				synctest.Wait()
			}
			if n := d.Window(); n <= 64<<10 {
				t.Error("the window does not grow again")
			}
			d.Reset(stream.CodeLocal, "")
		})
	})
	t.Run("above it opens are refused", func(t *testing.T) {
		virtual(t, memnet.Link{}, small(), func(w *world) {
			c, d := ballast(w, limit+64<<10)
			s, err := w.x.mux.Open(stream.Header{Kind: stream.Bytes})
			if err != nil {
				t.Fatal(err)
			}
			var refusal *stream.RefusedError
			if err := s.Wait(context.Background()); !errors.As(err, &refusal) || refusal.Code != stream.CodeBusy {
				t.Errorf("the answer is %v", err)
			}
			go c.CloseWrite()
			io.Copy(io.Discard, d) // the old one goes on
			s, e := w.open()
			if err := s.Wait(context.Background()); err != nil {
				t.Error(err)
			}
			d.Close()
			s.Close()
			e.Close()
		})
	})
	t.Run("at twice it the stream that holds most is reset", func(t *testing.T) {
		virtual(t, memnet.Link{}, small(), func(w *world) {
			c, d := w.open()
			grow(w, c, d, limit)
			e, g := w.open()
			grow(w, e, g, 3*limit)
			c.Write(make([]byte, limit/2))
			e.Write(make([]byte, limit+limit/8))
			synctest.Wait()
			if n := w.y.budget.Held(); !holds(n, limit+limit/2+limit/8) {
				t.Errorf("%d KiB are held", n>>10)
			}
			c.Write(make([]byte, limit/2))
			synctest.Wait()
			if n := w.y.budget.Held(); !holds(n, limit) {
				t.Errorf("%d KiB are held after one is reset", n>>10)
			}
			var reset *stream.ResetError
			if _, err := g.Read(make([]byte, 1)); !errors.As(err, &reset) || reset.Code != stream.CodeBusy {
				t.Errorf("the one that holds most reads %v", err)
			}
			if _, err := e.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("its writer gets %v", err)
			}
			if _, err := d.Read(make([]byte, 1)); err != nil {
				t.Errorf("the other reads %v", err)
			}
			d.Reset(stream.CodeLocal, "")
		})
	})
	t.Run("also when both its ends are in", func(t *testing.T) {
		virtual(t, memnet.Link{}, small(), func(w *world) {
			e, g := w.open()
			grow(w, e, g, 3*limit)
			c, d := ballast(w, limit)
			c.CloseWrite()
			d.CloseWrite()
			go pour(e)
			synctest.Wait()
			if n := w.y.budget.Held(); n > 2*limit {
				t.Errorf("%d KiB are held", n>>10)
			}
			d.Reset(stream.CodeLocal, "")
			g.Reset(stream.CodeLocal, "")
		})
	})
	t.Run("across channels, also ended ones", func(t *testing.T) {
		l := small()
		virtual(t, memnet.Link{}, l, func(w *world) {
			a, b := memnet.Pipe(memnet.Link{})
			x, y, incoming := pair(t, a, b, stream.Limits{Budget: l.Budget})
			e, g := open(t, x, incoming)
			grow(w, e, g, 3*limit)
			c, d := ballast(w, limit+limit/2)
			c.CloseWrite()
			d.CloseWrite()
			synctest.Wait()
			w.a.Cut()
			synctest.Wait()
			if n := l.Budget.Held(); !holds(n, limit+limit/2) {
				t.Fatalf("%d KiB are held", n>>10)
			}
			s, err := x.mux.Open(stream.Header{Kind: stream.Bytes})
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Wait(context.Background()); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("the answer is %v", err)
			}
			e.Write(make([]byte, limit))
			synctest.Wait()
			if n := l.Budget.Held(); !holds(n, limit) {
				t.Errorf("%d KiB are held", n>>10)
			}
			if _, err := d.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the one that holds most reads %v", err)
			}
			stop(t, x, y)
		})
	})
}

// holds says whether n bytes of memory are what so many bytes of bulk, or of shared frames, are held in.
func holds(n, bytes int64) bool { return n >= bytes && n <= bytes+bytes/14+128<<10 }

// TestTheBudgetCountsBuffersAndNotTheBytesInThem: else a peer whose frames are a little too long for a
// small one is held in four times as much.
func TestTheBudgetCountsBuffersAndNotTheBytesInThem(t *testing.T) {
	const limit = 1 << 20
	const most = 65537 // the buffer that anything above 16 KiB takes
	against(t, true, stream.Limits{Budget: &stream.Budget{Limit: limit}}, func(p *peer) {
		id := uint32(1)
		for ; p.count(refused, id-2) == 0 && id < 200; id += 2 {
			p.send(hello(id))
			if p.count(refused, id) == 0 {
				(<-p.incoming).Accept()
				p.send(frame{data, id, make([]byte, 16<<10+26)})
			}
		}
		streams := int64(p.y.mux.Streams())
		if n := p.y.budget.Held(); n != streams*most {
			t.Errorf("%d streams hold %d KiB, want %d", streams, n>>10, streams*most>>10)
		}
		if streams != limit/most+1 {
			t.Errorf("%d streams were taken", streams)
		}
	})
}

// grow makes the window of d larger than n, holding little.
func grow(w *world, c, d *stream.Conn, n int) {
	w.Helper()
	b := make([]byte, 16<<10)
	for d.Window() < n {
		c.Write(b)
		if _, err := io.ReadFull(d, b); err != nil {
			w.Fatal(err)
		}
	}
	synctest.Wait() // for the credit
}
