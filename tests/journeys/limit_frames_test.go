package journeys_test

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/tests/baseline"
)

// A member may send what it likes. However much of it: the outlet holds little for it, goes on for
// others, and cuts whoever does nothing but make work.
func TestAMemberThatFloodsAnOutletIsBoundedOrCut(t *testing.T) {
	t.Parallel()
	n := 20000
	if long() {
		n = 1000000
	}
	const ( // whether the channel ends
		goesOn = iota
		mayEnd
		isCut
	)
	open := func(i int, kind stream.HeaderKind, name string) []byte {
		return frame(nil, frameOpen, uint32(2*i+3), opens(kind, 64<<10, name))
	}
	the := func(f []byte) func(int) [][]byte { return func(int) [][]byte { return [][]byte{f} } }
	over := frame(nil, frameReset, 1, []byte{8})
	// Stream 1 is open at first, to an echo.
	for _, f := range []struct {
		name string
		deaf bool // does not read what it is told; the kernel takes some thousand answers
		ends int
		make func(i int) [][]byte // what is sent in round i
	}{
		{"pings", false, goesOn, the(frame(nil, framePing, 0, u64(1)))},
		{"pings whose answers are not read", true, goesOn, the(frame(nil, framePing, 0, u64(1)))},
		{"pongs that nobody asked for", false, goesOn, the(frame(nil, framePong, 0, u64(1)))},
		{"going away", false, goesOn, the(frame(nil, frameAway, 0, nil))},
		{"credit byte by byte", false, goesOn, func(i int) [][]byte {
			return [][]byte{frame(nil, frameData, 1, []byte("x")), frame(nil, frameCredit, 1, u64(uint64(64<<10+i)))}
		}},
		{"credit that was given already", false, goesOn, the(frame(nil, frameCredit, 1, u64(64<<10)))},
		{"credentials that do not verify", false, isCut, the(frame(nil, frameCredential, 0, []byte{0, 1, 'x', 0, 1, 'x'}))},
		{"open and reset", false, isCut, func(i int) [][]byte {
			return [][]byte{open(i, stream.Bytes, "db"), frame(nil, frameReset, uint32(2*i+3), []byte{8})}
		}},
		{"opens of what is not there", false, isCut, func(i int) [][]byte { return [][]byte{open(i, stream.Bytes, "other")} }},
		{"probes", false, mayEnd, func(i int) [][]byte {
			return [][]byte{open(i, stream.Probe, "db"), frame(nil, frameEnd, uint32(2*i+3), u64(0))}
		}},
		{"probes whose answers are not read", true, isCut, func(i int) [][]byte {
			return [][]byte{open(i, stream.Probe, "db"), frame(nil, frameEnd, uint32(2*i+3), u64(0))}
		}},
		{"opens beyond what there is room for", false, goesOn, func(i int) [][]byte { return [][]byte{open(i, stream.Bytes, "db")} }},
		{"opens whose answers are not read", true, isCut, func(i int) [][]byte { return [][]byte{open(i, stream.Bytes, "db")} }},
		{"data for a stream that is over", false, goesOn, func(i int) [][]byte {
			if i == 0 {
				return [][]byte{over}
			}
			return [][]byte{frame(nil, frameData, 1, []byte("x"))}
		}},
		{"resets of a stream that is over", false, goesOn, the(over)},
	} {
		if !long() {
			if f.deaf {
				continue // the kernel takes what is sent in the short form
			}
			if f.name == "open and reset" {
				f.ends = mayEnd // those that find no place do not count
			}
		}
		t.Run(f.name, func(t *testing.T) {
			w := newRow(t, rowOptions{to: elsewhere(t), direct: true})
			self, trust := w.as("bot")
			good := dial(t, w.addr, []byte("E"))
			if err := echo(good); err != nil {
				t.Fatal(err)
			}
			flood := func() (sent int, slowest time.Duration) {
				t.Helper()
				p, err := raw(w.ctx, "127.0.0.1", w.lanes, channel.Service, self, trust, nil)
				if err != nil {
					t.Fatal(err)
				}
				if !f.deaf {
					p.read()
				}
				done := make(chan struct{})
				go func() {
					defer close(done)
					var q buffer.Queue
					err := p.send(&q, frame(nil, frameOpen, 1, opens(stream.Bytes, 64<<10, "db")), frame(nil, frameData, 1, []byte("E")))
					for sent < n && err == nil {
						var all [][]byte
						for range min(500, n-sent) {
							all = append(all, f.make(sent)...)
							sent++
						}
						err = p.send(&q, all...)
					}
				}()
				for sending := true; sending; {
					select {
					case <-done:
						sending = false
					default:
						at := time.Now()
						if err := echo(good); err != nil {
							t.Fatalf("a stream of another channel: %v", err)
						}
						slowest = max(slowest, time.Since(at))
					}
				}
				if f.ends == isCut {
					if f.deaf {
						p.read() // or it does not see its end
					}
					select {
					case <-p.Done():
					case <-time.After(patience):
						t.Errorf("%d of them, and it is not cut", sent)
					}
				} else if f.ends == goesOn && p.Err() != nil {
					t.Errorf("it is cut after %d: %v", sent, p.Err())
				}
				p.Abort(channel.CloseDone, net.ErrClosed)
				if f.deaf && f.ends != isCut {
					p.read()
				}
				<-p.ran
				p.node.Close()
				return sent, slowest
			}
			before := w.stand()
			flood()
			settled(t, w.out, before.descriptors["outlet"])
			first := rss(t, w.out)
			w.peaks()
			sent, slowest := flood()
			settled(t, w.out, before.descriptors["outlet"])
			most, after := highWater(t, w.out), rss(t, w.out)
			t.Logf("F-24: %d of %d; an echo beside them took %v at most; memory %.1f MiB, %.1f behind them, the second time %.1f at most and %.1f behind it",
				sent, n, slowest.Round(time.Millisecond), mib(before.memory["outlet"]), mib(first), mib(most), mib(after))
			if most-first > 48<<20 {
				t.Errorf("memory has grown by %.1f MiB meanwhile", mib(most-first))
			}
			// Go's runtime gives back what is free by the goal of the last collection, and in a process that
			// does nothing there is one in two minutes: the second makes the goal a small one.
			limited, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
			defer cancel()
			m := baseline.Measure{PID: w.out.Pid(), Resident: min(before.memory["outlet"], first), Descriptors: before.descriptors["outlet"]}
			if _, err := m.Back(limited, baseline.Slack{Resident: 16 << 20, Children: 1000}); err != nil {
				t.Error(err)
			}
			if err := echo(good); err != nil {
				t.Errorf("a stream of another channel, behind it: %v", err)
			}
		})
	}
}

func mib(n int) float64 { return float64(n) / (1 << 20) }
