package link_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/routing"
)

// town is a network in memory with an authority whose members meet there.
type town struct {
	*testing.T
	net       memnet.Network
	authority *identity.Self
	nodes     []*routing.Node

	mu    sync.Mutex
	lanes []*memnet.Conn // as the dialers hold them, in the order of their dials
}

// in runs f in a town in virtual time. Nothing may be left behind: no
// goroutine, which the bubble sees to, and no actor.
func in(t *testing.T, f func(w *town)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &town{T: t}
		var err error
		if w.authority, err = identity.NewSelf(); err != nil {
			t.Fatal(err)
		}
		w.net.OnConnect = func(_ string, dialer, _ *memnet.Conn) {
			w.mu.Lock()
			w.lanes = append(w.lanes, dialer)
			w.mu.Unlock()
		}
		f(w)
		synctest.Wait()
		for i, n := range w.nodes {
			if n.Len() != 0 {
				t.Errorf("%d actors are left at node %d", n.Len(), i)
			}
		}
	})
}

// member makes an identity with a credential of an hour.
func (w *town) member() *identity.Self {
	w.Helper()
	self, err := identity.NewSelf()
	if err != nil {
		w.Fatal(err)
	}
	w.renew(self, time.Hour)
	return self
}

func (w *town) renew(self *identity.Self, life time.Duration) {
	w.Helper()
	now := time.Now()
	c, err := w.authority.Issue(self.ID(), self.Latest(), identity.Attributes{"role": "agent"}, now, now.Add(life))
	if err == nil {
		err = self.Renew(c, w.authority.History())
	}
	if err != nil {
		w.Fatal(err)
	}
}

func (w *town) config() channel.Config {
	n := new(routing.Node)
	w.nodes = append(w.nodes, n)
	return channel.Config{
		Node: n, Self: w.member(), Trust: identity.NewTrust(w.authority.ID()), Kind: channel.Service,
		Judge: func(*identity.Peer) error { return nil },
	}
}

// server serves echoing streams.
func (w *town) server() *link.Server {
	return &link.Server{Services: map[channel.Kind]link.Service{channel.Service: {
		Config: w.config(),
		Accept: func(_ *link.Live, in *stream.Incoming) { go echo(in.Accept()) },
	}}}
}

func echo(c *stream.Conn) {
	io.Copy(c, c)
	c.Close()
}

// serve starts s at addr; stop ends it and waits.
func (w *town) serve(s *link.Server, addr string) (stop func()) {
	w.Helper()
	ln, err := w.net.Listen(addr)
	if err != nil {
		w.Fatal(err)
	}
	return w.run(func(ctx context.Context) error { return s.Serve(ctx, ln) })
}

// run starts f; stop ends it, waits, and wants no error of it.
func (w *town) run(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	return sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.Error(err)
		}
	})
}

// to is the path to addr.
func (w *town) to(addr string) link.Path {
	return link.Path{Name: "direct " + addr, Dial: func(ctx context.Context) (net.Conn, error) {
		return w.net.Dial(ctx, "mem", addr)
	}}
}

// dialled is how many lanes there have been.
func (w *town) dialled() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.lanes)
}

func (w *town) lane(i int) *memnet.Conn {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lanes[i]
}

// sleep lets d go by, and all happen that is due until then.
func (w *town) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// told collects the states of a Keeper.
type told struct {
	mu     sync.Mutex
	states []link.State
}

func (s *told) add(state link.State) {
	s.mu.Lock()
	s.states = append(s.states, state)
	s.mu.Unlock()
}

func (s *told) kinds() (kinds []link.StateKind) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, state := range s.states {
		kinds = append(kinds, state.Kind)
	}
	return kinds
}

func (w *town) get(k *link.Keeper) *link.Live {
	w.Helper()
	l, err := k.Get(context.Background())
	if err != nil {
		w.Fatal(err)
	}
	return l
}

// open opens a stream that has been answered.
func (w *town) open(l *link.Live) *stream.Conn {
	w.Helper()
	c, err := l.Mux.Open(stream.Header{Kind: stream.Bytes, Name: "db"})
	if err == nil {
		err = c.Wait(context.Background())
	}
	if err != nil {
		w.Fatal(err)
	}
	return c
}

// echoes fails the test when c does not.
func (w *town) echoes(c *stream.Conn) {
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

var errDown = errors.New("the way is down")
