package relay_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/outlet"
	"github.com/portal-tunnel/portal/relay"
	"github.com/portal-tunnel/portal/routing"
)

const relayAddr = "10.0.0.1:4000"

// town is an authority, a relay and whoever meets there, over a network in memory.
type town struct {
	*testing.T
	virtual   bool
	s         *relay.Server // of a test that wants it later
	net       memnet.Network
	limits    outlet.Limits                       // of the outlets that come
	tap       func(dialer, listener *memnet.Conn) // told each connection; nil: nobody
	authority *identity.Self
	nodes     []*routing.Node
	stops     []func() // the last first

	mu      sync.Mutex
	dialled []*memnet.Conn // as the dialers hold them, in the order of their dials
}

// in runs f in a town in virtual time. Nothing may be left behind: no goroutine,
// which the bubble sees to, and no actor.
func in(t *testing.T, f func(w *town)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { runTown(&town{T: t, virtual: true}, f) })
}

// with is in for lanes by a carrier: yamux keeps its timers in a pool of the whole
// process, so it runs in real time only.
func with(t *testing.T, carrier relay.Carrier, f func(w *town)) {
	t.Helper()
	if carrier != relay.Yamux {
		in(t, f)
		return
	}
	before := runtime.NumGoroutine()
	runTown(&town{T: t}, f)
	(&town{T: t}).until("the goroutines are gone", func() bool { return runtime.NumGoroutine() <= before })
}

func runTown(w *town, f func(w *town)) {
	w.Helper()
	var err error
	if w.authority, err = identity.NewSelf(); err != nil {
		w.Fatal(err)
	}
	w.net.OnConnect = func(_ string, dialer, listener *memnet.Conn) {
		if w.tap != nil {
			w.tap(dialer, listener)
		}
		w.mu.Lock()
		w.dialled = append(w.dialled, dialer)
		w.mu.Unlock()
	}
	f(w)
	for i := len(w.stops) - 1; i >= 0; i-- {
		w.stops[i]()
	}
	for i, n := range w.nodes {
		w.until(fmt.Sprintf("the actors of node %d are gone", i), func() bool { return n.Len() == 0 })
	}
}

// until waits for what is about to be.
func (w *town) until(what string, is func() bool) {
	w.Helper()
	for limit := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(limit) {
			w.Fatalf("not in 20 s: %s", what)
		}
	}
}

func (w *town) node() *routing.Node {
	n := new(routing.Node)
	w.nodes = append(w.nodes, n)
	return n
}

func (w *town) stranger() *identity.Self {
	w.Helper()
	self, err := identity.NewSelf()
	if err != nil {
		w.Fatal(err)
	}
	return self
}

func (w *town) member(attrs identity.Attributes) *identity.Self {
	w.Helper()
	self := w.stranger()
	w.issue(self, attrs, time.Hour)
	return self
}

// rotated is an identity's old keys and its new ones.
func (w *town) rotated() (keys [2]*identity.Self) {
	w.Helper()
	var dirs [2]string
	for i := range keys {
		dirs[i] = w.TempDir()
		if i == 1 { // a copy from before
			if err := filepath.WalkDir(dirs[0], func(path string, d fs.DirEntry, err error) error {
				if err != nil || d.IsDir() {
					return err
				}
				b, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				return os.WriteFile(filepath.Join(dirs[1], d.Name()), b, 0o600)
			}); err != nil {
				w.Fatal(err)
			}
		}
		if err := os.Chmod(dirs[i], 0o700); err != nil {
			w.Fatal(err)
		}
		home, err := identity.Open(dirs[i])
		if err != nil {
			w.Fatal(err)
		}
		if keys[i], err = home.Self(); err != nil {
			w.Fatal(err)
		}
	}
	if err := keys[1].Rotate(); err != nil {
		w.Fatal(err)
	}
	return keys
}

func (w *town) issue(self *identity.Self, attrs identity.Attributes, life time.Duration) {
	w.Helper()
	now := time.Now()
	c, err := w.authority.Issue(self.ID(), self.Latest(), attrs, now, now.Add(life))
	if err == nil {
		err = self.Renew(c, w.authority.History())
	}
	if err != nil {
		w.Fatal(err)
	}
}

func (w *town) trust() *identity.Trust { return identity.NewTrust(w.authority.ID()) }

// run starts f; stop ends it, waits, and wants no error of it. It is stopped with
// the town at the latest.
func (w *town) run(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.Error(err)
		}
	})
	w.stops = append(w.stops, stop)
	return stop
}

func (w *town) listen(addr string) net.Listener {
	w.Helper()
	ln, err := w.net.Listen(addr)
	if err != nil {
		w.Fatal(err)
	}
	return ln
}

// relay starts a relay at relayAddr.
func (w *town) relay(change func(*relay.Server)) (s *relay.Server, stop func()) {
	w.Helper()
	return w.relayAt(relayAddr, change)
}

func (w *town) relayAt(addr string, change func(*relay.Server)) (s *relay.Server, stop func()) {
	w.Helper()
	s = &relay.Server{Node: w.node(), Self: w.member(identity.Attributes{"relay": true}), Trust: w.trust(), Dial: w.net.Dial}
	if change != nil {
		change(s)
	}
	ln := w.listen(addr)
	return s, w.run(func(ctx context.Context) error {
		err := s.Serve(ctx, ln)
		if n := s.Held(); n != 0 {
			w.Errorf("the relay at %s has ended and keeps %d things", addr, n)
		}
		return err
	})
}

// client keeps a control channel to the relay for self.
func (w *town) client(self *identity.Self, change func(*relay.Client)) *relay.Client {
	w.Helper()
	c := &relay.Client{Addr: relayAddr, Dial: w.net.Dial, Node: w.node(), Self: self, Trust: w.trust()}
	if change != nil {
		change(c)
	}
	w.run(c.Run)
	return c
}

// outlet serves a name through the relay, which holds it when outlet returns.
func (w *town) outlet(name string, self *identity.Self, target outlet.Target, change func(*relay.Client)) (s *outlet.Server, stop func()) {
	w.Helper()
	allow, err := abac.Short("open", name, `principal.role == "agent"`)
	if err != nil {
		w.Fatal(err)
	}
	s = &outlet.Server{Node: w.node(), Name: name, Target: target, Self: self, Trust: w.trust(), Allow: allow, Limits: w.limits}
	c := &relay.Client{Addr: relayAddr, Dial: w.net.Dial, Node: s.Node, Self: self, Trust: w.trust()}
	if change != nil {
		change(c)
	}
	ready := make(chan struct{})
	once := sync.OnceFunc(func() { close(ready) })
	ln := c.Listen(name, func(s link.State) {
		if s.Kind == link.Ready {
			once()
		}
	})
	stopOutlet := w.run(func(ctx context.Context) error { return s.Serve(ctx, ln) })
	stopClient := w.run(c.Run)
	<-ready
	return s, func() { stopClient(); stopOutlet() }
}

const outletAddr = "10.0.0.2:4100"

// direct serves a name at outletAddr, without a relay.
func (w *town) direct(name string, self *identity.Self, target outlet.Target) *outlet.Server {
	w.Helper()
	allow, err := abac.Short("open", name, `principal.role == "agent"`)
	if err != nil {
		w.Fatal(err)
	}
	s := &outlet.Server{Node: w.node(), Name: name, Target: target, Self: self, Trust: w.trust(), Allow: allow}
	ln := w.listen(outletAddr)
	w.run(func(ctx context.Context) error { return s.Serve(ctx, ln) })
	return s
}

// inlet reaches a name through clients of relays.
func (w *town) inlet(name string, self *identity.Self, clients ...*relay.Client) *inlet.Server {
	w.Helper()
	s := &inlet.Server{Node: w.node(), Name: name, Self: self, Trust: w.trust()}
	for _, c := range clients {
		s.Paths = append(s.Paths, inlet.Path{Name: "via " + c.Addr, Dial: func(ctx context.Context) (net.Conn, error) {
			return c.Lane(ctx, name, s.Pin)
		}, Watch: c.OnReady})
	}
	w.run(s.Run)
	return s
}

func serves(names ...string) identity.Attributes {
	return identity.Attributes{"name": "db1", "serve": names}
}

var agent = identity.Attributes{"name": "bot", "role": "agent"}

func echoing(context.Context, *outlet.Request) (net.Conn, error) {
	a, b := memnet.Pipe(memnet.Link{})
	go func() {
		io.Copy(b, b)
		b.CloseWrite()
		b.Close()
	}()
	return a, nil
}

// dial opens a stream that echoes.
func (w *town) dial(s *inlet.Server) net.Conn {
	w.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	c, err := s.Dial(ctx)
	if err != nil {
		w.Fatal(err)
	}
	w.echoes(c)
	return c
}

func (w *town) echoes(c io.ReadWriter) {
	w.Helper()
	got := make([]byte, 5)
	_, err := c.Write([]byte("hello"))
	if err == nil {
		_, err = io.ReadFull(c, got)
	}
	if err != nil || string(got) != "hello" {
		w.Fatalf("%q came back: %v", got, err)
	}
}

// isReset fails the test unless the next that c reads is a reset.
func (w *town) isReset(c io.Reader) {
	w.Helper()
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		w.Errorf("read %d bytes, %v; want a reset", n, err)
	}
}

// code is the code in an error of a stream, 0 for any other.
func code(err error) stream.Code {
	var refused *stream.RefusedError
	if errors.As(err, &refused) {
		return refused.Code
	}
	return 0
}

// sleep lets d go by, and all happen that is due until then.
func (w *town) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}
