package authority

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/store"
)

var aWay = []identity.Way{{Addr: "127.0.0.1:4100"}}

// clock is a wall clock that tests move.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func newClock() *clock { return &clock{at: time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

// logBuffer collects a log; it is safe for concurrent use.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newLogger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func newSelf(t testing.TB) *identity.Self {
	t.Helper()
	s, err := identity.NewSelf()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// newServer returns an authority whose store is in a new directory, closed when the test ends.
func newServer(t testing.TB, now func() time.Time) *Server {
	t.Helper()
	st, err := store.Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Self: newSelf(t), Store: st, Now: now}
	t.Cleanup(func() { st.Close() })
	return s
}

func newTicket(t testing.TB, s *Server, g Grant) *identity.Ticket {
	t.Helper()
	if g.Ways == nil {
		g.Ways = aWay
	}
	ticket, err := s.CreateTicket(t.Context(), g)
	if err != nil {
		t.Fatal(err)
	}
	return ticket
}

// peerOf is what a channel's handshake proves of self.
func peerOf(self *identity.Self, now time.Time) (*identity.Peer, error) {
	key, attestation, err := self.Static(now)
	if err != nil {
		return nil, err
	}
	return identity.VerifyProof(self.History(), attestation, key.PublicKey().Bytes(), now)
}

// exchange is a stream whose other end answers when this one has asked.
type exchange struct {
	in, out bytes.Buffer
	answer  func(question []byte) ([]byte, error)
}

func (e *exchange) Write(b []byte) (int, error) { return e.in.Write(b) }
func (e *exchange) Read(b []byte) (int, error)  { return e.out.Read(b) }
func (e *exchange) CloseWrite() error {
	b, err := e.answer(e.in.Bytes())
	e.out.Write(b)
	return err
}

// memory is the server's end of an exchange.
type memory struct {
	io.Reader
	io.Writer
}

func (memory) CloseWrite() error { return nil }

// network joins clients of a test to one server.
type network struct {
	server  *Server
	latency time.Duration // slept for each question

	mu        sync.Mutex
	asked     map[string]int
	at        []time.Time // of each question
	down      bool        // nobody answers
	loseReply bool        // the answer is lost, and with it this setting is spent
}

var errDown = errors.New("connection refused")

func (n *network) join(c *Client) *Client {
	c.question = func(ctx context.Context, _ identity.Way, authority identity.ID, name string, ask func(halfCloser, [32]byte) error) error {
		n.mu.Lock()
		down := n.down
		if !down {
			if n.asked == nil {
				n.asked = make(map[string]int)
			}
			n.asked[name]++
			n.at = append(n.at, c.now())
		}
		n.mu.Unlock()
		if n.latency > 0 {
			select {
			case <-time.After(n.latency):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if down || authority != n.server.Self.ID() {
			return errDown
		}
		peer, err := peerOf(c.Self, c.now())
		if err != nil {
			return err
		}
		var binding [32]byte
		rand.Read(binding[:])
		return ask(&exchange{answer: func(question []byte) ([]byte, error) {
			var out bytes.Buffer
			if err := serve(memory{bytes.NewReader(question), &out}, func(question []byte) (*answer, error) {
				return n.server.answer(name, question, peer, binding), nil
			}); err != nil {
				return nil, err
			}
			n.mu.Lock()
			defer n.mu.Unlock()
			if n.loseReply {
				n.loseReply = false
				return nil, io.ErrUnexpectedEOF
			}
			return out.Bytes(), nil
		}}, binding)
	}
	return c
}

func (n *network) setDown(down bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.down = down
}

// forget begins the list of questions anew.
func (n *network) forget() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.at = nil
}

func (n *network) count(name string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.asked[name]
}

// newClient returns a client in memory, or of the home.
func newClient(t testing.TB, n *network, home *identity.Home) *Client {
	t.Helper()
	self := newSelf(t)
	if home != nil {
		var err error
		if self, err = home.Self(); err != nil {
			t.Fatal(err)
		}
	}
	return n.join(&Client{Self: self, Home: home, Trust: new(identity.Trust), Now: n.server.Now})
}

func newHome(t testing.TB, dir string) *identity.Home {
	t.Helper()
	h, err := identity.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func enroll(t testing.TB, c *Client, ticket *identity.Ticket) *Enrolled {
	t.Helper()
	e, err := c.Enroll(t.Context(), ticket)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// counted fails the test when it leaves goroutines behind.
func counted(t *testing.T) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		for range 100 {
			if runtime.NumGoroutine() <= before {
				return
			}
			runtime.Gosched()
			time.Sleep(time.Millisecond) // ending goroutines have no event to wait for
		}
		t.Errorf("%d goroutines at the end, %d at the start", runtime.NumGoroutine(), before)
	})
}

// homeDir returns where no home is yet; a test's own directory can be read by others.
func homeDir(t testing.TB) string { return filepath.Join(t.TempDir(), "home") }
