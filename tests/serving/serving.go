// Package serving is a listener whose connections are each handled by a goroutine, and all ended by Close;
// and, for who needs no more, the two ends of one connection.
package serving

import (
	"net"
	"path/filepath"
	"sync"
	"testing"
)

// Server owns its listener, its connections and their goroutines until Close.
type Server struct {
	ln  net.Listener
	all sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]struct{}
	over  bool
}

// Listen calls handle with each connection, which is closed when handle returns.
func Listen(network, addr string, handle func(net.Conn)) (*Server, error) {
	ln, err := net.Listen(network, addr)
	if err != nil {
		return nil, err
	}
	s := &Server{ln: ln, conns: make(map[net.Conn]struct{})}
	s.all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			if !s.enter(c) {
				c.Close()
				continue
			}
			s.all.Go(func() {
				handle(c)
				c.Close()
				s.mu.Lock()
				delete(s.conns, c)
				s.mu.Unlock()
			})
		}
	})
	return s, nil
}

// enter is false once Close ends what there is: one more would be ended by nobody.
func (s *Server) enter(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.over {
		s.conns[c] = struct{}{}
	}
	return !s.over
}

// Addr is where it listens.
func (s *Server) Addr() string { return s.ln.Addr().String() }

// Close ends every connection and waits for its handler.
func (s *Server) Close() {
	s.ln.Close()
	s.mu.Lock()
	s.over = true
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.all.Wait()
}

// Pair is a TCP connection on the loopback interface: who dialled, who accepted. The test's end closes both.
func Pair(t testing.TB) (dialled, accepted *net.TCPConn) {
	t.Helper()
	a, b := pair(t, "tcp", "127.0.0.1:0")
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

// UnixPair is the same by a Unix socket.
func UnixPair(t testing.TB) (dialled, accepted *net.UnixConn) {
	t.Helper()
	a, b := pair(t, "unix", filepath.Join(t.TempDir(), "s"))
	return a.(*net.UnixConn), b.(*net.UnixConn)
}

func pair(t testing.TB, network, address string) (dialled, accepted net.Conn) {
	t.Helper()
	ln, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if dialled, err = net.Dial(network, ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dialled.Close() })
	if accepted, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { accepted.Close() })
	return dialled, accepted
}
