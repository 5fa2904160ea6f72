package main

import (
	"bufio"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/tests/tunnels"
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
	p := &plan{d: 50 * time.Millisecond, streams: 40}
	for name, addr := range map[string]string{
		"nothing": server,
		"copy":    forwarding(t, forwarding(t, server, copyBytes), copyBytes),
		"splice":  forwarding(t, forwarding(t, server, spliceBytes), spliceBytes),
	} {
		d := &deployment{Deployment: &tunnels.Deployment{Addr: addr}}
		for _, s := range settings {
			if s.postgres {
				continue // it has a target of its own
			}
			for _, l := range s.loads {
				if l.least > time.Second {
					continue // the same one, longer
				}
				o, err := l.run(t.Context(), d, p)
				if err != nil {
					t.Errorf("%s, %s: %v", name, l.name, err)
					continue
				}
				if len(o.values) != len(l.figures) {
					t.Fatalf("%s, %s: %d values for %d figures", name, l.name, len(o.values), len(l.figures))
				}
				for i, v := range o.values {
					// Nothing that is no process costs anything.
					if free := l.figures[i].Topic == topicCPU || l.figures[i].Topic == topicIdle; v <= 0 && !free {
						t.Errorf("%s, %s: %g", name, l.figures[i].Name, v)
					}
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
		{"an idle stream that is dropped", func(addr string) error {
			all, err := gather(t.Context(), addr, 3)
			if err != nil {
				return err
			}
			defer all.disperse()
			return all.lives()
		}, serving(t, func(c *net.TCPConn) error {
			if _, err := io.CopyN(io.Discard, c, 1); err != nil { // the operation
				return err
			}
			_, err := io.CopyN(onlyWriter{c}, onlyReader{c}, 1) // and gone after one byte
			return err
		}), "opened a while ago"},
		{"a download that stops beside round trips", func(addr string) error {
			_, err := beside(t.Context(), addr, 50*time.Millisecond)
			return err
		}, serving(t, func(c *net.TCPConn) error {
			var op [1]byte
			if _, err := io.ReadFull(c, op[:]); err != nil {
				return err
			}
			if op[0] == opEcho {
				_, err := io.Copy(onlyWriter{c}, onlyReader{c})
				return err
			}
			_, err := c.Write(op[:])
			return err
		}), "the bulk beside"},
		{"events of which one is lost", func(addr string) error {
			_, err := sse(t.Context(), addr, 50*time.Millisecond)
			return err
		}, serving(t, func(c *net.TCPConn) error {
			if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
				return err
			}
			_, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
			return err
		}), "event 1 came in place of 0"},
		{"events that end early and cleanly", func(addr string) error {
			_, err := sse(t.Context(), addr, 50*time.Millisecond)
			return err
		}, serving(t, func(c *net.TCPConn) error {
			if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
				return err
			}
			_, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
			return err
		}), "after 0 of 1"},
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
