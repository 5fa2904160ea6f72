package journeys_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/routing"
	"github.com/portal-tunnel/portal/tests/process"
)

// A door is what strangers can reach: a relay, an outlet that listens, an authority. Each has a
// channel that whoever is honest may open.
type door struct {
	name string
	p    *process.Process
	addr string
	kind channel.Kind
}

// doors starts them, and an inlet with a stream open.
func doors(t *testing.T) (*row, []door) {
	t.Helper()
	w := newRow(t, rowOptions{to: elsewhere(t), direct: true})
	at := free(t)
	office := w.launch("authority", "office", "authority", "--listen", at)
	w.await(office, `authority ready on`)
	return w, []door{
		{"relay", w.relay, w.at, channel.Relay},
		{"outlet", w.out, w.lanes, channel.Service},
		{"authority", office, at, channel.Authority},
	}
}

// enter opens a channel as a member, asks the outlet for its decision where it is one, and leaves.
func (d door) enter(ctx context.Context, source string, self *identity.Self, trust *identity.Trust) error {
	var p *peer
	answered := make(chan uint8, 1)
	p, err := raw(ctx, source, d.addr, d.kind, self, trust, func(kind uint8, _ uint32, _ []byte) {
		select {
		case answered <- kind:
		default:
		}
	})
	if err != nil {
		return err
	}
	p.read()
	defer func() {
		p.Close()
		<-p.ran
		p.node.Close()
	}()
	if d.kind != channel.Service {
		_, err := p.Measure(ctx)
		return err
	}
	if err := p.Control(1<<40, frame(nil, frameOpen, 1, opens(stream.Probe, 0, "db"))); err != nil {
		return err
	}
	select {
	case kind := <-answered:
		if kind != frameOpened {
			return fmt.Errorf("a probe was answered by a frame of kind %#x", kind)
		}
		return nil
	case <-p.Done():
		return p.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// message1 is a preface and a valid first message of a handshake, of which whoever sends it needs no
// more than to have seen it.
func message1(t testing.TB, kind channel.Kind) []byte {
	t.Helper()
	self, trust := nobody(t)
	a, b := net.Pipe()
	go func() {
		channel.Initiate(t.Context(), a, &channel.Config{Node: new(routing.Node), Self: self, Trust: trust, Kind: kind})
		a.Close()
	}()
	buf := make([]byte, 4096)
	n, err := b.Read(buf)
	b.Close()
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

// visits enters again and again until stop, and says how long each time took.
func (d door) visits(ctx context.Context, w *row, source string, stop <-chan struct{}) (took []time.Duration, err error) {
	self, trust := w.as("bot")
	for {
		begin := time.Now()
		limited, cancel := context.WithTimeout(ctx, patience)
		err := d.enter(limited, source, self, trust)
		cancel()
		if err != nil {
			return took, fmt.Errorf("visit %d: %w", len(took)+1, err)
		}
		took = append(took, time.Since(begin))
		select {
		case <-stop:
			return took, nil
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func spread(all []time.Duration) string {
	if len(all) == 0 {
		return "none"
	}
	slices.Sort(all)
	at := func(part float64) time.Duration {
		return all[int(part*float64(len(all)-1)+0.5)].Round(time.Millisecond)
	}
	return fmt.Sprintf("%d: median %v, p99 %v, most %v", len(all), at(0.5), at(0.99), at(1))
}

// Whoever connects and says nothing, or a byte a second, costs little, is gone after ten seconds, and
// keeps nobody out.
func TestStrangersWhoAreSlowCostLittleAndKeepNobodyOut(t *testing.T) {
	t.Parallel()
	silent, slow := 200, 50
	if long() {
		silent, slow = 5000, 500
	}
	w, all := doors(t)
	open := dial(t, w.addr, []byte("E"))
	for _, d := range all {
		t.Run(d.name, func(t *testing.T) {
			if !long() { // there, all of them at once are more descriptors than one process has
				t.Parallel()
			}
			before, files := rss(t, d.p), settled(t, d.p, 0)
			first := message1(t, d.kind)
			var strangers sync.WaitGroup
			var longest atomic.Int64
			var early atomic.Int32
			begin := time.Now()
			for i := range silent + slow {
				c, err := knock(w.ctx, "127.0.0.9", d.addr)
				if err != nil {
					t.Fatalf("stranger %d: %v", i, err)
				}
				at := time.Now()
				over := make(chan struct{})
				strangers.Go(func() {
					defer close(over)
					c.SetReadDeadline(time.Now().Add(patience))
					n, err := io.Copy(io.Discard, c)
					if timeout := net.Error(nil); n > 0 || errors.As(err, &timeout) && timeout.Timeout() {
						t.Errorf("stranger %d was told %d bytes, %v", i, n, err)
					}
					lived := time.Since(at)
					if lived < 9*time.Second {
						early.Add(1)
					}
					for was := longest.Load(); int64(lived) > was && !longest.CompareAndSwap(was, int64(lived)); {
						was = longest.Load()
					}
					c.Close()
				})
				if i >= silent {
					strangers.Go(func() {
						for _, b := range first {
							if _, err := c.Write([]byte{b}); err != nil {
								return
							}
							select {
							case <-over:
								return
							case <-time.After(time.Second):
							}
						}
					})
				}
			}
			there := time.Since(begin)
			stop := make(chan struct{})
			result := make(chan error, 1)
			var took []time.Duration
			go func() {
				var err error
				took, err = d.visits(w.ctx, w, "127.0.0.1", stop)
				result <- err
			}()
			most := 0
			gone := make(chan struct{})
			go func() { strangers.Wait(); close(gone) }()
			for waiting := true; waiting; {
				select {
				case <-gone:
					waiting = false
				case <-time.After(100 * time.Millisecond):
					most = max(most, rss(t, d.p))
				}
			}
			close(stop)
			if err := <-result; err != nil {
				t.Error(err)
			}
			if err := echo(open); err != nil {
				t.Errorf("a stream that was open: %v", err)
			}
			settled(t, d.p, files+1)
			each := (most - before) / min(silent+slow, link.DefaultHalfOpen)
			limit := 32 << 10
			if !long() {
				limit = 64 << 10 // of few, the collector's own share is the larger part
			}
			if each > limit {
				t.Errorf("%d B each", each)
			}
			t.Logf("%d silent and %d slow, all there after %v: %d B each at most; gone after %v at most, %d to make room; visits meanwhile %s",
				silent, slow, there.Round(time.Millisecond), each, time.Duration(longest.Load()).Round(10*time.Millisecond), early.Load(), spread(took))
		})
	}
}

// handshakes begins handshakes at a rate, each from the next of so many addresses, and ends none, until stop.
// end closes what was not given up, and says how many were begun and how many could not be.
func handshakes(ctx context.Context, addr string, first []byte, sources int, rate float64, stop <-chan struct{}) (end func() (begun, failed int64)) {
	var begun, failed atomic.Int64
	var mu sync.Mutex
	conns := make(map[net.Conn]struct{}) // that were not given up yet
	var attackers, dialler sync.WaitGroup
	dialler.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for start := time.Now(); ; {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			for float64(begun.Load()+failed.Load()) < time.Since(start).Seconds()*rate {
				select {
				case <-stop:
					return
				default:
				}
				n := begun.Load()
				c, err := knock(ctx, fmt.Sprintf("127.0.1.%d", 1+n%int64(sources)), addr)
				if err == nil {
					_, err = c.Write(first)
				}
				if err != nil {
					failed.Add(1)
					continue
				}
				begun.Add(1)
				mu.Lock()
				conns[c] = struct{}{}
				mu.Unlock()
				attackers.Go(func() {
					io.Copy(io.Discard, c) // until it is given up
					c.Close()
					mu.Lock()
					delete(conns, c)
					mu.Unlock()
				})
			}
		}
	})
	return func() (int64, int64) {
		dialler.Wait() // which stop ends
		mu.Lock()
		for c := range conns {
			c.Close()
		}
		mu.Unlock()
		attackers.Wait()
		return begun.Load(), failed.Load()
	}
}

// sink takes connections, as many as may be half open, and gives up the oldest for the next.
func sink(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		var held [link.DefaultHalfOpen]net.Conn
		for i := 0; ; i++ {
			c, err := ln.Accept()
			if err != nil {
				break
			}
			if old := held[i%len(held)]; old != nil {
				old.Close()
			}
			held[i%len(held)] = c
		}
		for _, c := range held {
			if c != nil {
				c.Close()
			}
		}
	}()
	t.Cleanup(func() { ln.Close(); <-over })
	return ln.Addr().String()
}

// A flood of handshakes that are begun and never ended takes no more than its share, from one place or
// from many, and lets others in.
func TestAFloodOfHandshakesTakesItsShareOnly(t *testing.T) {
	t.Parallel()
	const rate = 2000 // a second; fewer where the machine makes no more
	lasts := 2 * time.Second
	if long() {
		lasts = time.Minute
	}
	for _, sources := range []int{1, 200} {
		t.Run(fmt.Sprintf("from %d", sources), func(t *testing.T) {
			w, all := doors(t)
			for _, d := range all {
				if !long() && d.name != map[int]string{1: "relay", 200: "outlet"}[sources] {
					continue
				}
				t.Run(d.name, func(t *testing.T) {
					open := dial(t, w.addr, []byte("E"))
					pace := func(d time.Duration) float64 {
						n, begin := 0, time.Now()
						for time.Since(begin) < d {
							if err := echo(open); err != nil {
								t.Fatal("a stream that was open: ", err)
							}
							n++
						}
						return float64(n) / time.Since(begin).Seconds()
					}
					first := message1(t, d.kind)
					self, trust := w.as("bot")
					if err := d.enter(w.ctx, "127.0.0.1", self, trust); err != nil {
						t.Fatal(err)
					}
					usual := pace(lasts / 4)
					before, files := rss(t, d.p), settled(t, d.p, 0)
					// What is left of the pace when somebody else on this machine gets the flood, who does no more
					// than to take connections and to give them up.
					idle := sink(t)
					stop := make(chan struct{})
					time.AfterFunc(lasts/4, func() { close(stop) })
					end := handshakes(w.ctx, idle, first, sources, rate, stop)
					beside := pace(lasts / 4)
					end()

					stop = make(chan struct{})
					time.AfterFunc(lasts, func() { close(stop) })
					end = handshakes(w.ctx, d.addr, first, sources, rate, stop)
					result := make(chan error, 1)
					var took []time.Duration
					go func() {
						var err error
						took, err = d.visits(w.ctx, w, "127.0.0.1", stop)
						result <- err
					}()
					most, held := 0, 0
					watched := make(chan struct{})
					go func() {
						defer close(watched)
						for {
							select {
							case <-stop:
								return
							case <-time.After(50 * time.Millisecond):
								most, held = max(most, rss(t, d.p)), max(held, settled(t, d.p, 0))
							}
						}
					}()
					worked := spent(t, d.p)
					during := pace(lasts)
					worked = spent(t, d.p) - worked
					<-watched
					if err := <-result; err != nil {
						t.Errorf("whoever is honest: %v", err)
					}
					begun, failed := end()
					settled(t, d.p, files+1)
					if held > files+link.DefaultHalfOpen+50 {
						t.Errorf("%d descriptors, %d before", held, files)
					}
					t.Logf("%d handshakes begun in %v (%d could not): %d descriptors at most, %d before; memory %.1f MiB at most, %.1f before; %.2f of a core; visits meanwhile %s; an open stream at %.0f %% of its pace, %.0f %% when others on the machine have the flood",
						begun, lasts, failed, held, files, mib(most), mib(before), worked.Seconds()/lasts.Seconds(), spread(took), 100*during/usual, 100*beside/usual)
					// Live are some 11 KiB each, 6 MiB of all; the rest is the collector's.
					if most-before > 16<<20 {
						t.Errorf("memory has grown by %.1f MiB", mib(most-before))
					}
				})
			}
		})
	}
}
