package journeys_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// island is a network of its own, joined to this one by a cable that can be cut without a word: what is
// sent is dropped, nobody is told.
type island struct {
	t           testing.TB
	name, cable string
}

var islands atomic.Int32

const (
	mainland = "10.231.77.1"
	shore    = "10.231.77.2"
)

func newIsland(t testing.TB) *island {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a network namespace takes root")
	}
	for _, tool := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(tool + " is not installed (Debian: iproute2, nftables)")
		}
	}
	// A name of its own each: the kernel takes the one before away in its own time.
	n := islands.Add(1)
	i := &island{t, fmt.Sprintf("portal-%d-%d", os.Getpid(), n), fmt.Sprintf("pt%d-%d", os.Getpid(), n)}
	i.do("ip", "netns", "add", i.name)
	t.Cleanup(func() { i.do("ip", "netns", "del", i.name) })
	i.do("ip", "link", "add", i.cable, "type", "veth", "peer", "name", "eth0", "netns", i.name)
	t.Cleanup(func() { i.do("ip", "link", "del", i.cable) })
	i.do("ip", "addr", "add", mainland+"/30", "dev", i.cable)
	i.do("ip", "link", "set", i.cable, "up")
	i.do("ip", "-n", i.name, "addr", "add", shore+"/30", "dev", "eth0")
	i.do("ip", "-n", i.name, "link", "set", "eth0", "up")
	i.do("ip", "-n", i.name, "link", "set", "lo", "up")
	return i
}

func (i *island) do(name string, args ...string) {
	i.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		i.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// cut drops what comes from the island, and with both what goes there, until the returned function is
// called.
func (i *island) cut(both bool) (mend func()) {
	i.t.Helper()
	rules := fmt.Sprintf("table inet %s {\n chain in { type filter hook input priority 0; iifname %q drop; }\n", i.table(), i.cable)
	if both {
		rules += fmt.Sprintf(" chain out { type filter hook output priority 0; oifname %q drop; }\n", i.cable)
	}
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules + "}\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		i.t.Fatalf("nft: %v\n%s", err, out)
	}
	mend = sync.OnceFunc(func() { i.do("nft", "delete", "table", "inet", i.table()) })
	i.t.Cleanup(mend)
	return mend
}

func (i *island) table() string { return strings.ReplaceAll(i.name, "-", "_") }

// A watch is an echo that says when each of its connections was reset.
type watch struct {
	ln     net.Listener
	resets chan time.Time
}

func newWatch(t testing.TB) *watch {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &watch{ln, make(chan time.Time, 1000)}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				if _, err := io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}); errors.Is(err, syscall.ECONNRESET) {
					w.resets <- time.Now()
				}
			})
		}
	})
	// The row is stopped before: what is open ends with it.
	t.Cleanup(func() { ln.Close(); all.Wait() })
	return w
}

// A band is streams that stay open.
type band struct {
	t     testing.TB
	w     *watch
	conns []net.Conn
}

func newBand(t testing.TB, w *watch, addr string, n int) *band {
	t.Helper()
	b := &band{t: t, w: w}
	for range n {
		b.conns = append(b.conns, dial(t, addr, nil))
	}
	b.work()
	return b
}

// work sees that every stream goes on.
func (b *band) work() {
	b.t.Helper()
	for i, c := range b.conns {
		if err := echo(c); err != nil {
			b.t.Fatalf("stream %d: %v", i, err)
		}
	}
}

// ended waits until all have been reset at both ends and says how long after begin that was, at the
// clients and at the service.
func (b *band) ended(begin time.Time) (clients, service time.Duration) {
	b.t.Helper()
	var all sync.WaitGroup
	var mu sync.Mutex
	for i, c := range b.conns {
		all.Go(func() {
			c.SetDeadline(time.Now().Add(2 * patience))
			n, err := c.Read(make([]byte, 1))
			mu.Lock()
			defer mu.Unlock()
			clients = max(clients, time.Since(begin))
			// A Unix socket has no reset; what matters here is when.
			if timeout := net.Error(nil); n > 0 || errors.As(err, &timeout) && timeout.Timeout() {
				b.t.Errorf("stream %d read %d bytes, %v", i, n, err)
			}
			c.Close()
		})
	}
	for i := range b.conns {
		select {
		case at := <-b.w.resets:
			service = max(service, at.Sub(begin))
		case <-time.After(2 * patience):
			b.t.Fatalf("the service was told of %d resets", i)
		}
	}
	all.Wait()
	return clients, service
}

// The cable between the inlet and the relay is cut without a word.
func TestACutCableIsNoticedInHalfAMinuteAndMendsByItself(t *testing.T) {
	if !long() {
		t.Skip("PORTAL_LONG=1: minutes; TestSilenceIsFoundInHalfAMinute is this in virtual time")
	}
	for _, c := range []struct {
		name  string
		both  bool
		lasts time.Duration
	}{
		{"both ways for 5 s", true, 5 * time.Second},
		{"both ways for 60 s", true, time.Minute},
		{"from the island for 60 s", false, time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			island := newIsland(t)
			dir, err := os.MkdirTemp("", "portal")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			s := newWatch(t)
			w := newRow(t, rowOptions{
				to: s.ln.Addr().String(), host: mainland, from: "unix:" + filepath.Join(dir, "inlet"),
				under: map[string]string{"inlet": "ip netns exec " + island.name},
			})
			ready(t, w.addr)
			before := w.stand()
			joined := func() int { return len(w.logged(w.relay, `"a lane is joined","name":"db"`)) }
			lanes := joined()
			u := newBand(t, s, w.addr, 20)
			begin := time.Now()
			mend := island.cut(c.both)
			if c.lasts < 20*time.Second {
				time.Sleep(c.lasts) // the cut is as long as it is
				mend()
				u.work()
				if n := joined(); n != lanes {
					t.Errorf("a cut of %v made %d lanes", c.lasts, n-lanes)
				}
				t.Logf("F-08: a cut of %v: 20 streams go on", c.lasts)
				return
			}
			clients, service := u.ended(begin)
			time.Sleep(time.Until(begin.Add(c.lasts)))
			mend()
			mended := time.Now()
			ready(t, w.addr)
			back := time.Since(mended)
			for role, p := range w.each() {
				settled(t, p, before.descriptors[role])
			}
			if n := joined() - lanes; n != 1 {
				t.Errorf("%d lanes were made in place of the one that was cut", n)
			}
			// 25 s without a word, looked for every 5: 30, and what it takes to tell.
			if most := max(clients, service); most > 31*time.Second {
				t.Errorf("noticed after %v", most)
			}
			t.Logf("F-08: a cut of %v: 20 streams were reset at the clients after %.1f s and at the service after %.1f s; a new one works %v after the cable; one lane more; descriptors as before",
				c.lasts, clients.Seconds(), service.Seconds(), back.Round(time.Millisecond))
		})
	}
}

// Each process in turn stands still, as one does whose machine hangs.
func TestAProcessThatStandsStillIsGivenUpAndComesBack(t *testing.T) {
	if !long() {
		t.Skip("PORTAL_LONG=1: minutes; TestSilenceIsFoundInHalfAMinute is this in virtual time")
	}
	for _, role := range []string{"relay", "outlet", "inlet"} {
		for _, lasts := range []time.Duration{5 * time.Second, 40 * time.Second} {
			t.Run(fmt.Sprintf("%s for %v", role, lasts), func(t *testing.T) {
				t.Parallel()
				s := newWatch(t)
				w := newRow(t, rowOptions{to: s.ln.Addr().String()})
				ready(t, w.addr)
				before := w.stand()
				u := newBand(t, s, w.addr, 20)
				p := w.each()[role]
				sendSignal(t, p, syscall.SIGSTOP)
				begin := time.Now()
				time.AfterFunc(lasts, func() { syscall.Kill(p.Pid(), syscall.SIGCONT) })
				if lasts < 20*time.Second {
					u.work() // as soon as it goes on
					t.Logf("F-08: 20 streams go on")
					return
				}
				clients, service := u.ended(begin)
				time.Sleep(time.Until(begin.Add(lasts)))
				ready(t, w.addr)
				back := time.Since(begin) - lasts
				for role, p := range w.each() {
					settled(t, p, before.descriptors[role])
				}
				t.Logf("F-08: 20 streams were reset at the clients after %.1f s and at the service after %.1f s; a new one works %v after it goes on; descriptors as before",
					clients.Seconds(), service.Seconds(), back.Round(time.Millisecond))
			})
		}
	}
}
