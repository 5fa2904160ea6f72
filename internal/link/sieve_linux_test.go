package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// dialFrom makes connections from a source until the test ends, and counts those that
// there were within d.
func dialFrom(t *testing.T, source, addr string, n int, d time.Duration) (made int) {
	t.Helper()
	results := make(chan error, n)
	for range n {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}, Timeout: d}
		go func() {
			c, err := dialer.DialContext(context.Background(), "tcp", addr)
			if err == nil {
				t.Cleanup(func() { c.Close() })
			}
			results <- err
		}()
	}
	for range n {
		err := <-results
		if timeout := net.Error(nil); err == nil {
			made++
		} else if !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Fatal(err)
		}
	}
	return made
}

// answer echoes on every connection of a listener.
func answer(t *testing.T, network, addr string) *net.TCPListener {
	t.Helper()
	ln, err := net.Listen(network, addr)
	if err != nil {
		t.Skipf("no %s here: %v", network, err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	return ln.(*net.TCPListener)
}

func dug(t *testing.T, ln net.Listener) pit {
	t.Helper()
	p, err := digTCP(ln)(ln)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.close)
	return p
}

const soon, never = 10 * time.Second, 300 * time.Millisecond

func TestTheKernelDropsWhatComesFromTheBarred(t *testing.T) {
	prefixes := func(first string, n int) (all []netip.Prefix) {
		a := netip.MustParseAddr(first)
		for range n {
			all = append(all, netip.PrefixFrom(a, a.BitLen()))
			a = a.Next()
		}
		return all
	}
	// Addresses whose first bit is set take the kernel an instruction more.
	full := prefixes("192.0.2.1", maxBarred4-1)
	for i := range maxBarred6 - 1 {
		full = append(full, netip.MustParsePrefix(fmt.Sprintf("fd00:0:0:%x::/64", 0x8000+i)))
	}
	for _, of := range []struct {
		name, network, at string
		barred            []netip.Prefix
		falls, passes     string
	}{
		{"one", "tcp4", "127.0.0.1:0", prefixes("127.0.0.3", 1), "127.0.0.3", "127.0.0.2"},
		{"the last of as many as can be", "tcp4", "127.0.0.1:0", append(full[:len(full):len(full)], prefixes("127.0.0.3", 1)...), "127.0.0.3", "127.0.0.2"},
		{"the first of as many as can be", "tcp4", "127.0.0.1:0", append(prefixes("127.0.0.3", 1), full...), "127.0.0.3", "127.0.0.2"},
		{"the last of a block", "tcp4", "127.0.0.1:0", prefixes("127.0.0.3", 200), "127.0.0.202", "127.0.0.203"},
		{"the first of the next block", "tcp4", "127.0.0.1:0", prefixes("127.0.0.3", 201), "127.0.0.203", "127.0.0.204"},
		{"IPv4 at all addresses", "tcp", ":0", prefixes("127.0.0.3", 1), "127.0.0.3", "127.0.0.2"},
		{"IPv6", "tcp6", "[::1]:0", []netip.Prefix{netip.MustParsePrefix("::/64")}, "::1", ""},
		{"IPv6, the last of as many as can be", "tcp", ":0", append(full[:len(full):len(full)], netip.MustParsePrefix("::/64")), "::1", "127.0.0.2"},
		{"IPv6 of another prefix", "tcp6", "[::1]:0", full, "", "::1"},
	} {
		t.Run(of.name, func(t *testing.T) {
			t.Parallel()
			ln := answer(t, of.network, of.at)
			at := func(source string) string {
				host := "127.0.0.1"
				if source == "::1" {
					host = "::1"
				}
				return net.JoinHostPort(host, fmt.Sprint(ln.Addr().(*net.TCPAddr).Port))
			}
			p := dug(t, ln)
			if err := p.steer(of.barred); err != nil {
				t.Fatal(err)
			}
			// One is in the pit's queue, and one in 128 passes: more than 4 of 20 once in
			// a million times.
			const n, pass = 20, 4
			if of.falls != "" {
				dialFrom(t, of.falls, at(of.falls), 1, never)
				if made := dialFrom(t, of.falls, at(of.falls), n, never); made > pass {
					t.Errorf("%d of %d connections from %s are there", made, n, of.falls)
				}
			}
			if of.passes != "" {
				if made := dialFrom(t, of.passes, at(of.passes), n, soon); made != n {
					t.Errorf("%d of %d connections from %s are there", made, n, of.passes)
				}
			}
			p.close()
			if of.falls != "" {
				if made := dialFrom(t, of.falls, at(of.falls), n, soon); made != n {
					t.Errorf("afterwards %d of %d connections from %s are there", made, n, of.falls)
				}
			}
		})
	}
}

func TestWhatIsOpenStaysSoWhenItsSourceIsBarred(t *testing.T) {
	ln := answer(t, "tcp4", "127.0.0.1:0")
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 3)}}
	c, err := d.DialContext(t.Context(), "tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p := dug(t, ln)
	for range 2 {
		if err := p.steer([]netip.Prefix{netip.MustParsePrefix("127.0.0.3/32")}); err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(soon))
		for range 100 { // in neither direction one in 128
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
	}
	p.close()
}

// A pit would take what comes to an address that nobody listens at any more, and keep the
// address from whoever is next.
func TestAPitIsNotInTheWayOfAListener(t *testing.T) {
	ln := answer(t, "tcp4", "127.0.0.1:0")
	at := ln.Addr().String()
	for range 3 { // dug again
		p := dug(t, ln)
		if other, err := net.Listen("tcp4", at); err == nil {
			t.Error("another listener has the same address")
			other.Close()
		}
		p.close()
	}
	dug(t, ln).close()
	ln.Close()
	if p, err := digTCP(ln)(ln); p != nil || err == nil {
		t.Errorf("before a closed listener there is %v, %v", p, err)
	}
	again, err := net.Listen("tcp4", at)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

// Which of several listeners is which, only whoever made them knows.
func TestNoPitIsDugWhereOthersListenToo(t *testing.T) {
	var lc net.ListenConfig
	lc.Control = func(_, _ string, c syscall.RawConn) (err error) {
		if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }); e != nil {
			err = e
		}
		return err
	}
	ln, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if p, err := digTCP(ln)(ln); p != nil || err == nil {
		t.Errorf("there is %v, %v", p, err)
	}
}

// A sieve goes on without a pit when none can be dug.
func TestASieveBeforeAClosedListenerKeepsNobodyOut(t *testing.T) {
	ln := answer(t, "tcp4", "127.0.0.1:0")
	ln.Close()
	s := new(sieve)
	s.open(ln, digTCP(ln), slog.New(slog.DiscardHandler))
	defer s.shut(ln)
	s.bar("10.0.0.1")
	s.sift()
	if s.barring {
		t.Error("somebody is kept out")
	}
}
