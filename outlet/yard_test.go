package outlet_test

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/outlet"
	"github.com/portal-tunnel/portal/routing"
)

const agents = `principal.role == "agent"`

// yard is an outlet named db and the callers who reach it over memory.
type yard struct {
	testing.TB
	net       memnet.Network
	authority *identity.Self
	outlet    *outlet.Server
	nodes     []*routing.Node
	lives     []*link.Live
	end       func()
}

// virtual runs f with an outlet in virtual time, and then ends it. Nothing may
// be left: no goroutine, which the bubble sees to, no stream and no actor.
func virtual(t *testing.T, target outlet.Target, change func(*outlet.Server), f func(y *yard)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		y := open(t, target, change)
		f(y)
		y.close()
		synctest.Wait()
		y.empty()
	})
}

// open starts an outlet in whatever time it is.
func open(t testing.TB, target outlet.Target, change func(*outlet.Server)) *yard {
	t.Helper()
	y := &yard{TB: t}
	var err error
	if y.authority, err = identity.NewSelf(); err != nil {
		t.Fatal(err)
	}
	y.outlet = &outlet.Server{
		Node: y.node(), Name: "db", Target: target, Allow: y.policy(agents),
		Self: y.member(identity.Attributes{"name": "db1", "serve": []string{"db"}}), Trust: identity.NewTrust(y.authority.ID()),
	}
	if change != nil {
		change(y.outlet)
	}
	ln, err := y.net.Listen("10.0.0.2:1")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- y.outlet.Serve(ctx, ln) }()
	y.end = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return y
}

// close ends the outlet first and then the callers.
func (y *yard) close() {
	y.Helper()
	y.end()
	for _, l := range y.lives {
		l.Close(nil)
	}
}

func (y *yard) actors() (n int) {
	for _, node := range y.nodes {
		n += node.Len()
	}
	return n
}

func (y *yard) empty() {
	y.Helper()
	if n := y.outlet.Streams(); n != 0 {
		y.Errorf("%d streams are left", n)
	}
	for i, n := range y.nodes {
		if n.Len() != 0 {
			y.Errorf("%d actors are left at node %d", n.Len(), i)
		}
	}
}

func (y *yard) node() *routing.Node {
	n := new(routing.Node)
	y.nodes = append(y.nodes, n)
	return n
}

func (y *yard) policy(expr string) *abac.Policy {
	y.Helper()
	p, err := abac.Short("open", "db", expr)
	if err != nil {
		y.Fatal(err)
	}
	return p
}

func (y *yard) member(attrs identity.Attributes) *identity.Self {
	y.Helper()
	self, err := identity.NewSelf()
	if err != nil {
		y.Fatal(err)
	}
	y.issue(self, attrs, time.Hour)
	return self
}

func (y *yard) issue(self *identity.Self, attrs identity.Attributes, life time.Duration) {
	y.Helper()
	now := time.Now()
	c, err := y.authority.Issue(self.ID(), self.Latest(), attrs, now, now.Add(life))
	if err == nil {
		err = self.Renew(c, y.authority.History())
	}
	if err != nil {
		y.Fatal(err)
	}
}

// call opens a channel as a member with these attributes.
func (y *yard) call(attrs identity.Attributes) *link.Live {
	y.Helper()
	return y.callAs(y.member(attrs))
}

func (y *yard) callAs(self *identity.Self) *link.Live {
	y.Helper()
	lane, err := y.net.Dial(context.Background(), "mem", "10.0.0.2:1")
	if err != nil {
		y.Fatal(err)
	}
	l, err := link.Dial(context.Background(), lane, &channel.Config{
		Node: y.node(), Self: self, Trust: identity.NewTrust(y.authority.ID()), Kind: channel.Service,
		Judge: func(*identity.Peer) error { return nil },
	}, nil)
	if err != nil {
		y.Fatal(err)
	}
	y.lives = append(y.lives, l)
	return l
}

// ask opens a stream and waits for the answer.
func ask(l *link.Live, kind stream.HeaderKind, name string) (*stream.Conn, error) {
	c, err := l.Mux.Open(stream.Header{Kind: kind, Name: name})
	if err != nil {
		return nil, err
	}
	return c, c.Wait(context.Background())
}

// stream opens one that is admitted.
func (y *yard) stream(l *link.Live) *stream.Conn {
	y.Helper()
	c, err := ask(l, stream.Bytes, "db")
	if err != nil {
		y.Fatal(err)
	}
	return c
}

// echoes fails the test when c does not.
func (y *yard) echoes(c io.ReadWriter) {
	y.Helper()
	got := make([]byte, 5)
	_, err := c.Write([]byte("hello"))
	if err == nil {
		_, err = io.ReadFull(c, got)
	}
	if err != nil || string(got) != "hello" {
		y.Fatalf("%q came back: %v", got, err)
	}
}

var (
	agent = identity.Attributes{"role": "agent"}
	guest = identity.Attributes{"role": "guest"}
)

// targets counts dials and gives connections to a service in memory.
type targets struct {
	mu    sync.Mutex
	dials int
	link  memnet.Link
	serve func(c *memnet.Conn)
}

func echoing() *targets {
	return &targets{serve: func(c *memnet.Conn) {
		io.Copy(c, c)
		c.CloseWrite()
		c.Close()
	}}
}

func (s *targets) dial(context.Context, *outlet.Request) (net.Conn, error) {
	s.mu.Lock()
	s.dials++
	s.mu.Unlock()
	a, b := memnet.Pipe(s.link)
	go s.serve(b)
	return a, nil
}

func (s *targets) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dials
}
