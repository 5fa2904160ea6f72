package inlet_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/outlet"
	"github.com/portal-tunnel/portal/routing"
)

// house is an authority, an outlet and an inlet on loopback sockets.
type house struct {
	authority *identity.Self
	outlet    *outlet.Server
	inlet     *inlet.Server
	addr      string // of the inlet
	states    chan inlet.State
	stop      func()

	stopOutlet func() // alone, and returns when it is gone
}

// member makes an identity with a credential.
func member(t testing.TB, authority *identity.Self, attrs identity.Attributes, life time.Duration) *identity.Self {
	t.Helper()
	self, err := identity.NewSelf()
	if err != nil {
		t.Fatal(err)
	}
	issue(t, authority, self, attrs, life)
	return self
}

func issue(t testing.TB, authority, self *identity.Self, attrs identity.Attributes, life time.Duration) {
	t.Helper()
	now := time.Now()
	c, err := authority.Issue(self.ID(), self.Latest(), attrs, now, now.Add(life))
	if err != nil {
		t.Fatal(err)
	}
	if err := self.Renew(c, authority.History()); err != nil {
		t.Fatal(err)
	}
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

type dialer func(ctx context.Context, network, addr string) (net.Conn, error)

// build starts an outlet named db for target and an inlet to it. The inlet's
// member has the attribute role.
func build(t testing.TB, target outlet.Target, role string, change func(*outlet.Server, *inlet.Server)) *house {
	t.Helper()
	authority, err := identity.NewSelf()
	if err != nil {
		t.Fatal(err)
	}
	lanes, local := listen(t), listen(t)
	return raise(t, authority, lanes, local, new(net.Dialer).DialContext, target, role, change)
}

// raise is build between any two listeners.
func raise(t testing.TB, authority *identity.Self, lanes, local net.Listener, dial dialer, target outlet.Target, role string, change func(*outlet.Server, *inlet.Server)) *house {
	t.Helper()
	allow, err := abac.Short("open", "db", `principal.role == "agent"`)
	if err != nil {
		t.Fatal(err)
	}
	h := &house{authority: authority, states: make(chan inlet.State, 64)}
	h.outlet = &outlet.Server{
		Node: new(routing.Node), Name: "db", Target: target, Allow: allow,
		Self:  member(t, authority, identity.Attributes{"name": "db1", "serve": []string{"db"}}, time.Hour),
		Trust: identity.NewTrust(authority.ID()),
	}
	h.addr = local.Addr().String()
	h.inlet = &inlet.Server{
		Node: new(routing.Node), Name: "db",
		Self:  member(t, authority, identity.Attributes{"name": "bot", "role": role}, time.Hour),
		Trust: identity.NewTrust(authority.ID()),
		Paths: []inlet.Path{{Name: "direct " + lanes.Addr().String(), Dial: func(ctx context.Context) (net.Conn, error) {
			return dial(ctx, "tcp", lanes.Addr().String())
		}}},
		OnState: func(s inlet.State) {
			select {
			case h.states <- s:
			default:
			}
		},
	}
	if change != nil {
		change(h.outlet, h.inlet)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	serving, stopOutlet := context.WithCancel(ctx)
	over := make(chan struct{})
	all.Go(func() {
		h.outlet.Serve(serving, lanes)
		close(over)
	})
	h.stopOutlet = func() { stopOutlet(); <-over }
	all.Go(func() { h.inlet.Run(ctx) })
	all.Go(func() { h.inlet.Serve(ctx, local) })
	h.stop = sync.OnceFunc(func() {
		cancel()
		all.Wait()
		for _, n := range []*routing.Node{h.outlet.Node, h.inlet.Node} {
			if err := n.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	t.Cleanup(h.stop)
	return h
}

// street is a house in virtual time: its sockets and its target are in memory.
type street struct {
	testing.TB
	*house
	net memnet.Network
}

// virtual runs f beside a house in virtual time, and then ends it. Nothing may be
// left: no goroutine, which the bubble sees to, no stream and no actor.
func virtual(t *testing.T, role string, change func(*outlet.Server, *inlet.Server), f func(s *street)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &street{TB: t}
		authority, err := identity.NewSelf()
		if err != nil {
			t.Fatal(err)
		}
		s.house = raise(t, authority, s.listen("10.0.0.2:1"), s.listen("10.0.0.3:1"), s.net.Dial, echoing, role, change)
		f(s)
		s.stop()
		if n := s.inlet.Streams() + s.inlet.Node.Len() + s.outlet.Node.Len(); n != 0 {
			t.Errorf("%d streams and actors are left", n)
		}
	})
}

func (s *street) listen(addr string) net.Listener {
	s.Helper()
	ln, err := s.net.Listen(addr)
	if err != nil {
		s.Fatal(err)
	}
	return ln
}

// echoing is a target in memory.
func echoing(context.Context, *outlet.Request) (net.Conn, error) {
	a, b := memnet.Pipe(memnet.Link{})
	go func() {
		io.Copy(b, b)
		b.CloseWrite()
		b.Close()
	}()
	return a, nil
}

// connect is a local client whose stream has come out at the target.
func (s *street) connect() *memnet.Conn {
	s.Helper()
	c, err := s.net.Dial(s.Context(), "mem", s.addr)
	if err != nil {
		s.Fatal(err)
	}
	s.echoes(c)
	return c.(*memnet.Conn)
}

func (s *street) echoes(c io.ReadWriter) {
	s.Helper()
	got := make([]byte, 5)
	_, err := c.Write([]byte("hello"))
	if err == nil {
		_, err = io.ReadFull(c, got)
	}
	if err != nil || string(got) != "hello" {
		s.Fatalf("%q came back: %v", got, err)
	}
}

// isReset fails the test unless the next that c reads is a reset.
func (s *street) isReset(c io.Reader) {
	s.Helper()
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		s.Errorf("read %d bytes, %v; want a reset", n, err)
	}
}
