package main

import (
	"encoding/binary"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// serving runs handle behind a loopback port until the test ends.
func serving(t *testing.T, handle func(*net.TCPConn) error) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		accept(l.(*net.TCPListener), handle)
	}()
	t.Cleanup(func() { l.Close(); <-ended })
	return l.Addr().String()
}

func forwarding(t *testing.T, target string, how func(dst, src *net.TCPConn) error) string {
	return serving(t, func(c *net.TCPConn) error { return forward(c, target, how) })
}

func TestEveryLoadPassesTwoForwarders(t *testing.T) {
	server := serving(t, serve)
	for name, addr := range map[string]string{
		"nothing": server,
		"copy":    forwarding(t, forwarding(t, server, copyBytes), copyBytes),
		"splice":  forwarding(t, forwarding(t, server, spliceBytes), spliceBytes),
	} {
		for _, l := range loads {
			values, err := l.run(t.Context(), addr, l.streams, 50*time.Millisecond)
			if err != nil {
				t.Errorf("%s, %s: %v", name, l.name, err)
				continue
			}
			if len(values) != len(l.figures) {
				t.Fatalf("%s, %s: %d values for %d figures", name, l.name, len(values), len(l.figures))
			}
			for i, v := range values {
				if v <= 0 {
					t.Errorf("%s, %s: %g", name, l.figures[i].Name, v)
				}
			}
		}
	}
}

// TestALoadNoticesWhatATunnelGetsWrong: figures of a tunnel that loses bytes or ends are worth
// nothing, so each load must fail on one.
func TestALoadNoticesWhatATunnelGetsWrong(t *testing.T) {
	server := serving(t, serve)
	for _, c := range []struct {
		wrong string
		load  func(addr string) error
		addr  string
		want  string
	}{
		{"one byte lost on the way up", runUp(t), forwarding(t, server, func(dst, src *net.TCPConn) error {
			if src.RemoteAddr().String() != server { // the client's direction
				if _, err := io.CopyN(dst, src, 1); err != nil { // the operation
					return err
				}
				if _, err := io.CopyN(io.Discard, src, 1); err != nil {
					return err
				}
			}
			return copyBytes(dst, src)
		}), "the server got"},
		{"a half-close that closes both sides", runUp(t), forwarding(t, server, func(dst, src *net.TCPConn) error {
			err := copyBytes(dst, src)
			dst.Close()
			src.Close()
			return err
		}), "the count after half-close"},
		{"a download that ends early with a clean end", runDown(t), serving(t, func(c *net.TCPConn) error {
			_, err := c.Write(make([]byte, 1<<20))
			if err == nil {
				_, err = io.CopyN(io.Discard, c, 9)
			}
			return err
		}), "clean end"},
		{"a download that counts wrong", runDown(t), serving(t, func(c *net.TCPConn) error {
			if _, err := io.CopyN(io.Discard, c, 9); err != nil {
				return err
			}
			_, err := c.Write(binary.BigEndian.AppendUint64(make([]byte, 100), 101))
			return err
		}), "the last 8 say 101"},
		{"an echo of other bytes", func(addr string) error {
			_, err := roundTrips(t.Context(), addr, 1, 50*time.Millisecond)
			return err
		}, serving(t, func(c *net.TCPConn) error {
			_, err := c.ReadFrom(io.LimitReader(zeros{}, 1<<20))
			if err == nil {
				_, err = io.Copy(io.Discard, c)
			}
			return err
		}), "not what was sent"},
		{"a connection that ends unanswered", func(addr string) error {
			_, err := connections(t.Context(), addr, 1, 50*time.Millisecond)
			return err
		}, serving(t, func(c *net.TCPConn) error { _, err := io.CopyN(io.Discard, c, 1); return err }), "answered"},
	} {
		if err := c.load(c.addr); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want an error with %q", c.wrong, err, c.want)
		}
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func runUp(t *testing.T) func(string) error {
	return func(addr string) error { _, err := up(t.Context(), addr, 1, 50*time.Millisecond); return err }
}

func runDown(t *testing.T) func(string) error {
	return func(addr string) error { _, err := down(t.Context(), addr, 1, 50*time.Millisecond); return err }
}

func TestForwardersPassAReset(t *testing.T) {
	reset := make(chan error, 1)
	server := serving(t, func(c *net.TCPConn) error {
		_, err := io.Copy(io.Discard, onlyReader{c})
		reset <- err
		return err
	})
	c, err := dial(t.Context(), forwarding(t, forwarding(t, server, copyBytes), copyBytes), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("half of a")); err != nil {
		t.Fatal(err)
	}
	c.SetLinger(0)
	c.Close()
	if err := <-reset; err == nil {
		t.Fatal("the server saw a clean end")
	}
}

func TestRatiosAreOfMediansToTheYardstick(t *testing.T) {
	r := newReport(3, time.Second)
	r.Systems = []*measured{
		{Name: yardstick, Rounds: map[string][]float64{"rtt1 p50": {100, 900, 110}, "up1": {1000, 1000, 1000}, "down1": {1, 1, 1}}},
		{Name: "portal, direct", Rounds: map[string][]float64{"rtt1 p50": {121, 1, 900}, "up1": {499, 400, 600}, "down1": {1, 1}}},
		{Name: "ssh -L", Missing: "sshd is not installed", peer: true},
	}
	r.finish()
	portal := r.Systems[1]
	if got := portal.Ratio["rtt1 p50"]; got != 1.1 {
		t.Errorf("round trip: %g, want 121 / 110", got)
	}
	if got, ok := portal.Median["down1"]; ok {
		t.Errorf("a figure that failed in one round has the median %g", got)
	}
	var out strings.Builder
	r.print(&out)
	for _, want := range []string{"missing", "failed", "rtt1 p50 1.100 × two forwarders, copy, bar ≤ 1.25: holds", "up1 0.499 × two forwarders, copy, bar ≥ 0.50: MISSED", "down1 0.000 × two forwarders, copy, bar ≥ 0.50: MISSED"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, &out)
		}
	}
}
