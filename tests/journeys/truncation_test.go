package journeys_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/portal-tunnel/portal/tests/fault/proxy"
	"github.com/portal-tunnel/portal/tests/fault/ruler"
	"github.com/portal-tunnel/portal/tests/process"
)

// place is the i-th of n offsets across a transfer. The first kilobyte of a lane is left to what a
// connection before may still say.
func place(i, n int) int64 {
	return 1<<10 + int64(i)*transfer/int64(n) + rand.Int64N(1<<10)
}

// Whatever ends a transfer early across a relay, either application reads a prefix and then a reset: an
// end, a reset, silence or a changed bit between the relay and either, a kill -9 of any of the three.
func TestNoCutAcrossARelayIsAnEnd(t *testing.T) {
	offsets, kills, stalls, tracks := 3, 1, 2, 2
	if long() {
		offsets, kills, stalls, tracks = 64, 64, 64, 16
	}
	for _, carrier := range []string{"dial-back", "yamux"} {
		t.Run(carrier, func(t *testing.T) {
			t.Parallel()
			x := newCrossing(t)
			k := x.track("db", carrier)
			counts := map[string]*atomic.Int64{}
			for _, cause := range []string{"fin", "rst", "flip", "stall", "kill"} {
				counts[cause] = new(atomic.Int64)
			}

			for _, victim := range k.victims() {
				for i := range kills {
					for _, down := range []bool{true, false} {
						ready(t, k.addr)
						p := *victim.process // restart puts another one there
						m := mark{i*transfer/kills + rand.IntN(transfer/kills/2), func() { kill(t, p) }}
						if err := x.cut(k.addr, down, m, true); err != nil {
							t.Errorf("%s killed at %d, down %v: %v", victim.name, m.n, down, err)
						}
						victim.restart()
						counts["kill"].Add(1)
					}
				}
			}

			// Silence is noticed after up to 30 s. That is waited for on tracks of their own.
			var silent sync.WaitGroup
			for j := range tracks {
				k := x.track(fmt.Sprintf("db/%d", j), carrier)
				silent.Go(func() {
					for i := j; i < stalls; i += tracks {
						for _, down := range []bool{true, false} {
							if !long() && down != (j == 0) {
								continue // one of either
							}
							if err := again(k.addr); err != nil {
								t.Error(err)
								return
							}
							d := k.hit(proxy.Stall, i%2, down, place(i, stalls))
							if err := x.cut(k.addr, down, mark{}, false); err != nil {
								t.Errorf("%v, leg %d, down %v: %v", d, i%2, down, err)
							}
							<-d.Done
							k.legs[i%2].Cut(d.Preface)
							counts["stall"].Add(1)
						}
					}
				})
			}
			for _, kind := range []proxy.Kind{proxy.FIN, proxy.RST, proxy.Flip} {
				for i := range offsets {
					for _, down := range []bool{true, false} {
						ready(t, k.addr) // else the fault meets a handshake, not the transfer
						leg := i % 2
						d := k.hit(kind, leg, down, place(i, offsets))
						if err := x.cut(k.addr, down, mark{}, false); err != nil {
							t.Errorf("%v, leg %d, down %v: %v", d, leg, down, err)
						}
						<-d.Done
						counts[kind.String()].Add(1)
					}
				}
			}
			silent.Wait()
			sum := int64(0)
			for cause, n := range counts {
				t.Logf("%s: %d", cause, n.Load())
				sum += n.Load()
			}
			t.Logf("F-01: %d cuts, 0 clean ends", sum)
		})
	}
}

// So does a credential that ends in mid-transfer, of whichever end.
func TestACredentialThatEndsInMidTransferIsNoEnd(t *testing.T) {
	offsets := 8
	if long() {
		offsets = 64
	}
	for i, carrier := range []string{"dial-back", "yamux"} {
		for j, host := range []string{"bot", "db1"} {
			if !long() && i != j {
				continue
			}
			t.Run(carrier+", "+host, func(t *testing.T) {
				t.Parallel()
				x := newCrossing(t, host)
				k := x.track("db", carrier)
				ready(t, k.addr)

				var under, over sync.WaitGroup // way at their offsets, over
				for i := range offsets {
					n := int64(i)*transfer/int64(offsets) + 1 + rand.Int64N(transfer/int64(offsets)-1)
					under.Add(2)
					over.Go(func() {
						if err := x.paused(k.addr, true, n, under.Done); err != nil {
							t.Errorf("download, the credential ended at %d: %v", n, err)
						}
					})
					over.Go(func() {
						if err := x.paused(k.addr, false, n, under.Done); err != nil {
							t.Errorf("upload, the credential ended at %d: %v", n, err)
						}
					})
				}
				under.Wait()
				kill(t, x.keeper) // nobody renews it now
				over.Wait()
				k.line(map[string]*process.Process{"bot": k.in, "db1": k.out}[host], `credential expired at`)
				t.Logf("F-01: %d cuts by the end of the credential, 0 clean ends", 2*offsets)
			})
		}
	}
}

// paused is a transfer that goes no further than n bytes, of which under is told, until it is cut.
func (s *station) paused(addr string, down bool, n int64, under func()) error {
	tell := sync.OnceFunc(under)
	defer tell() // also when it never gets there
	x := s.expect(mark{})
	kind := byte('U')
	if down {
		kind = 'D'
	}
	c, err := x.dial(addr, kind, transfer)
	if err != nil {
		return err
	}
	defer c.Close()
	got := ruler.Checker{Transfer: x.number}
	if down {
		_, err = io.CopyN(&got, struct{ io.Reader }{c}, n)
	} else {
		_, err = ruler.Send(c, x.number, n)
	}
	if err != nil {
		return fmt.Errorf("on the way: %w", err)
	}
	tell()
	if !down {
		if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
			return fmt.Errorf("the client was told %v, not a reset", err)
		}
		return x.ended(addr, true)
	}
	if err := x.ended(addr, true); err != nil {
		return err
	}
	_, err = io.Copy(struct{ io.Writer }{&got}, struct{ io.Reader }{c})
	if err := (outcome{n: got.N, err: err}).verdict(); err != nil {
		return fmt.Errorf("the client read %w", err)
	}
	return nil
}

// A download whose length is told by its end alone, as HTTP/1.0 has them: curl must not take a cut one for
// whole.
func TestCurlNoticesEachCutOfADownloadWithoutALength(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("curl is not installed")
	}
	t.Parallel()
	rounds := 1
	if long() {
		rounds = 16
	}
	// fetch fetches a page and says what is wrong with how that ended.
	fetch := func(x *crossing, dir, addr string, m mark) error {
		v := x.expect(m)
		file := filepath.Join(dir, fmt.Sprint(v.number))
		defer os.Remove(file)
		cmd := exec.CommandContext(x.ctx, "curl", "-sS", "--noproxy", "*", "--max-time", fmt.Sprint(silence.Seconds()), "-o", file, fmt.Sprintf("http://%s/%d", addr, v.number))
		cmd.Env = process.Environ()
		said, err := cmd.CombinedOutput()
		got, readErr := os.ReadFile(file)
		if readErr != nil && !errors.Is(readErr, os.ErrNotExist) {
			return readErr
		}
		want := make([]byte, transfer)
		ruler.Fill(want, v.number, 0)
		switch exit := (*exec.ExitError)(nil); {
		case !bytes.HasPrefix(want, got):
			return fmt.Errorf("curl got %d bytes that are no prefix", len(got))
		case err == nil:
			return fmt.Errorf("curl takes %d bytes of %d for all", len(got), transfer)
		case !errors.As(err, &exit), exit.ExitCode() != 56 && exit.ExitCode() != 52: // receiving failed; nothing came
			return fmt.Errorf("curl: %w: %s", err, said)
		}
		return nil
	}

	t.Run("through nothing at all a cut one is a whole one", func(t *testing.T) {
		x := newCrossing(t)
		p, err := proxy.Listen("", x.station.addr())
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		p.Arm(proxy.Fault{Kind: proxy.FIN, Direction: proxy.In, At: transfer / 2})
		if err := fetch(x, t.TempDir(), p.Addr(), mark{}); err == nil {
			t.Error("curl notices an end that is too early: these would pass whatever happened")
		}
	})
	for i, carrier := range []string{"dial-back", "yamux"} {
		t.Run(carrier, func(t *testing.T) {
			t.Parallel()
			x, dir := newCrossing(t), t.TempDir()
			k := x.track("db", carrier)
			cuts := 0
			for round := range rounds {
				for _, kind := range []proxy.Kind{proxy.FIN, proxy.RST, proxy.Flip, proxy.Stall} {
					if kind == proxy.Stall && !long() && i > 0 {
						continue // it takes 30 s
					}
					ready(t, k.addr)
					leg := round % 2
					d := k.hit(kind, leg, true, place(round, rounds))
					if err := fetch(x, dir, k.addr, mark{}); err != nil {
						t.Errorf("%v, leg %d: %v", d, leg, err)
					}
					<-d.Done
					k.legs[leg].Cut(d.Preface)
					cuts++
				}
				for _, victim := range k.victims() {
					ready(t, k.addr)
					p := *victim.process // restart puts another one there
					m := mark{1 + rand.IntN(transfer-1), func() { kill(t, p) }}
					if err := fetch(x, dir, k.addr, m); err != nil {
						t.Errorf("%s killed at %d: %v", victim.name, m.n, err)
					}
					victim.restart()
					cuts++
				}
			}
			t.Logf("F-01: %d downloads cut, curl notices each", cuts)
		})
	}
}
