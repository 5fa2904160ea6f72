package journeys_test

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/tests/serving"
)

const transfer = 1 << 20

// pattern is 1 MiB in which every place tells where it is.
func pattern() []byte {
	b := make([]byte, transfer)
	for i := 0; i < len(b); i += 4 {
		binary.BigEndian.PutUint32(b[i:], uint32(i)*2654435761)
	}
	return b
}

// patience is for one step. Nothing waits for it but what has failed.
const patience = 30 * time.Second

// service is what stands behind an outlet. A client says with its first byte what it wants:
//
//	D number   the pattern, without an end behind it; a result says how the connection ended
//	U number   reading until the end; a result says what came and how it ended
//	H number   the pattern and an end, then as U
//	S          reading until the end, then the SHA-256 of what came, then an end
//	E          an echo, ended when the client ends
//	R          the pattern, then, once a byte has come, a reset
//	M          reading nothing: a byte now and then, until the connection is reset
//	B number   the pattern over and over, until the client has ended, then an end; as U meanwhile
//	G number   a byte, then, once there is one in the gate, as B with little in the kernel
//
// A number (4 bytes, big-endian) tells one transfer's result from those before.
type service struct {
	server  *serving.Server
	results chan result
	marks   chan mark     // of the next U
	stuck   chan struct{} // a write of B has waited for a second
	gate    chan struct{} // of G
	full    chan struct{} // from each G, once: a write has waited for a second

	accepted atomic.Int64 // connections

	mu     sync.Mutex
	number uint32
}

type result struct {
	number uint32
	received
}

// received is what an application read.
type received struct {
	bytes []byte
	err   error // nil: an end of file
}

// mark calls do once n bytes have come.
type mark struct {
	n  int
	do func()
}

// halfCloser is a connection over TCP or a Unix socket.
type halfCloser interface{ CloseWrite() error }

// serve listens on a free port of loopback until close.
func serve() (*service, error) { return serveOn("127.0.0.1:0") }

// serveOn is serve on an address: host:port or unix:path.
func serveOn(addr string) (*service, error) {
	network := "tcp"
	if path, ok := unixPath(addr); ok {
		network, addr = "unix", path
	}
	s := &service{results: make(chan result, 256), marks: make(chan mark, 1), stuck: make(chan struct{}, 1), gate: make(chan struct{}, 64), full: make(chan struct{}, 256)}
	var err error
	s.server, err = serving.Listen(network, addr, func(c net.Conn) {
		s.accepted.Add(1)
		s.answer(c)
	})
	return s, err
}

func (s *service) close() {
	close(s.gate)
	s.server.Close()
}

func (s *service) addr() string { return s.server.Addr() }

func newService(t testing.TB) *service {
	t.Helper()
	s, err := serve()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)
	return s
}

func (s *service) answer(c net.Conn) {
	var kind [1]byte
	var number [4]byte
	if _, err := io.ReadFull(c, kind[:]); err != nil {
		return
	}
	switch kind[0] {
	case 'D', 'U', 'H', 'B', 'G':
		if _, err := io.ReadFull(c, number[:]); err != nil {
			return
		}
		c.SetDeadline(time.Now().Add(2 * patience))
	}
	stuck := s.stuck
	report := func(r received) { s.results <- result{binary.BigEndian.Uint32(number[:]), r} }
	switch kind[0] {
	case 'D':
		// Not ended behind the data: an end of file that a client sees is the tunnel's invention.
		c.Write(pattern())
		_, err := io.Copy(io.Discard, c)
		report(received{nil, err})
	case 'U':
		var m mark
		select {
		case m = <-s.marks:
		default:
		}
		report(readAll(c, m))
	case 'H':
		_, failed := c.Write(pattern())
		c.(halfCloser).CloseWrite()
		r := readAll(c, mark{})
		if r.err == nil { // a reset is told once: a write that was told of it leaves an end to be read
			r.err = failed
		}
		report(r)
	case 'S':
		sum := sha256.New()
		if _, err := io.Copy(sum, c); err == nil {
			c.Write(sum.Sum(nil))
		}
	case 'E':
		// Not spliced by the kernel: each idle connection would hold a pipe, two descriptors more.
		io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
		c.(halfCloser).CloseWrite()
	case 'M':
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for _, err := c.Write(kind[:]); err == nil; _, err = c.Write(kind[:]) {
			<-tick.C
		}
	case 'G':
		c.Write(kind[:])
		late := time.NewTimer(2 * patience)
		defer late.Stop()
		select {
		case <-s.gate:
		case <-late.C:
		}
		// Megabytes of each, once grown, are seconds of work for everybody beside.
		c.(interface{ SetWriteBuffer(int) error }).SetWriteBuffer(64 << 10)
		stuck = s.full
		fallthrough
	case 'B':
		ended := make(chan struct{})
		go func() {
			report(readAll(c, mark{}))
			close(ended)
		}()
		for rest := pattern(); ; {
			c.SetWriteDeadline(time.Now().Add(time.Second))
			n, err := c.Write(rest)
			rest = rest[n:]
			if errors.Is(err, os.ErrDeadlineExceeded) {
				select {
				case stuck <- struct{}{}:
					if kind[0] == 'G' {
						stuck = nil
					}
				default:
				}
			} else if err != nil {
				break
			}
			if len(rest) > 0 {
				continue
			}
			select {
			case <-ended:
				c.(halfCloser).CloseWrite()
				return
			default:
				rest = pattern()
			}
		}
		<-ended
	case 'R':
		c.Write(pattern())
		io.ReadFull(c, kind[:])
		c.(*net.TCPConn).SetLinger(0)
	}
}

// numbered gives a transfer its number, and the first bytes that a client sends for it.
func (s *service) numbered(kind byte) (uint32, []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.number++
	return s.number, binary.BigEndian.AppendUint32([]byte{kind}, s.number)
}

// result waits for a transfer's result; those of other transfers are dropped.
func (s *service) result(number uint32, within time.Duration) (received, bool) {
	late := time.NewTimer(within)
	defer late.Stop()
	for {
		select {
		case r := <-s.results:
			if r.number == number {
				return r.received, true
			}
		case <-late.C:
			return received{}, false
		}
	}
}

// readAll reads until the connection ends.
func readAll(c net.Conn, m mark) received {
	got := make([]byte, 0, transfer)
	buf := make([]byte, 4096)
	for {
		k, err := c.Read(buf)
		got = append(got, buf[:k]...)
		if m.do != nil && len(got) >= m.n {
			m.do()
			m.do = nil
		}
		if errors.Is(err, io.EOF) {
			return received{got, nil}
		}
		if err != nil {
			return received{got, err}
		}
	}
}

// dial connects to an inlet, as TCP or unix:path, and says what the client wants.
func dial(t testing.TB, addr string, first []byte) net.Conn {
	t.Helper()
	c, err := connect(addr, first)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func connect(addr string, first []byte) (net.Conn, error) {
	network := "tcp"
	if path, ok := unixPath(addr); ok {
		network, addr = "unix", path
	}
	c, err := net.Dial(network, addr)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write(first); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// echo sends one byte on a connection that asked for E, and waits for it.
func echo(c net.Conn) error {
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

// ready tries until an echo comes back: everything is there again by itself.
func ready(t testing.TB, addr string) {
	t.Helper()
	for end := time.Now().Add(patience); ; {
		c, err := connect(addr, []byte("E"))
		if err == nil {
			err = echo(c)
			c.Close()
		}
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not there again: %v", err)
		}
	}
}
