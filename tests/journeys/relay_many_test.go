package journeys_test

import (
	"context"
	"errors"
	"net"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/relay"
	"github.com/portal-tunnel/portal/routing"
	"github.com/portal-tunnel/portal/tests/process"
)

// crowd is inlets of one member in this process, each with a channel of its own. Relay and outlet
// are processes of their own.
type crowd struct {
	client *relay.Client
	self   *identity.Self
	trust  *identity.Trust
	ctx    context.Context
	all    sync.WaitGroup

	mu      sync.Mutex
	changed sync.Cond // L is mu
	inlets  []*one
}

// one is an inlet of a crowd.
type one struct {
	*inlet.Server
	state inlet.State
	full  bool // since it waits, a lane was refused because the carrier has as many as it may
	leave func()
}

func newCrowd(m *meeting, host string) *crowd {
	m.t.Helper()
	c := new(crowd)
	c.changed.L = &c.mu
	c.self, c.trust = m.as(host)
	node := new(routing.Node)
	c.client = &relay.Client{ID: m.id("relay"), Addr: m.at, Node: node, Self: c.self, Trust: c.trust}
	ctx, cancel := context.WithCancel(context.Background())
	c.ctx = ctx
	c.all.Go(func() { c.client.Run(ctx) })
	m.t.Cleanup(func() {
		cancel()
		c.all.Wait()
		node.Close()
	})
	return c
}

// join adds n inlets.
func (c *crowd) join(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for range n {
		i := &one{Server: &inlet.Server{Node: c.client.Node, Name: "db", Self: c.self, Trust: c.trust, Paths: []inlet.Path{
			{Name: "via", Dial: func(ctx context.Context) (net.Conn, error) { return c.client.Lane(ctx, "db", identity.ID{}) }},
		}}}
		i.OnState = func(s inlet.State) {
			c.mu.Lock()
			defer c.mu.Unlock()
			i.state = s
			if s.Kind == link.Ready {
				i.full = false
			}
			var refused *stream.RefusedError
			i.full = i.full || errors.As(s.Err, &refused) && refused.Code == stream.CodeBusy && strings.Contains(s.Reason, "64 lanes")
			c.changed.Broadcast()
		}
		ctx, cancel := context.WithCancel(c.ctx)
		ended := make(chan struct{})
		c.all.Go(func() {
			i.Run(ctx)
			close(ended)
		})
		i.leave = sync.OnceFunc(func() {
			cancel()
			<-ended
		})
		c.inlets = append(c.inlets, i)
	}
}

// until waits for how many inlets are to be ready and how many to be refused a lane of a full carrier.
func (c *crowd) until(t testing.TB, ready, full int) (all []*one) {
	t.Helper()
	late := time.AfterFunc(2*patience, c.changed.Broadcast)
	defer late.Stop()
	end := time.Now().Add(2 * patience)
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		all = nil
		refused, others := 0, ""
		for _, i := range c.inlets {
			switch {
			case i.state.Kind == link.Ready:
				all = append(all, i)
			case i.state.Kind == link.Waiting && i.full:
				refused++
			case i.state.Kind != link.Draining:
				others += "\n\t" + i.state.Kind.String() + ": " + i.state.Reason
			}
		}
		if len(all) == ready && refused == full {
			return all
		}
		if !time.Now().Before(end) {
			t.Fatalf("%d inlets are ready, %d refused because a carrier is full, not %d and %d; the others:%s", len(all), refused, ready, full, others)
		}
		c.changed.Wait()
	}
}

// dialAll opens a stream of each.
func dialAll(t testing.TB, inlets []*one) (conns []net.Conn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for n, i := range inlets {
		c, err := i.Dial(ctx)
		if err == nil {
			_, err = c.Write([]byte("E"))
		}
		if err == nil {
			err = echo(c)
		}
		if err != nil {
			t.Fatalf("inlet %d: %v", n, err)
		}
		conns = append(conns, c)
	}
	return conns
}

func echoAll(t testing.TB, conns []net.Conn) {
	t.Helper()
	for n, c := range conns {
		if err := echo(c); err != nil {
			t.Errorf("stream %d: %v", n, err)
		}
	}
}

func TestAHundredInletsOfOneMemberComeToOneOutletByDialBack(t *testing.T) {
	t.Parallel()
	s := newService(t)
	m := newMeeting(t)
	m.enroll("db1", "--serve", "db")
	m.enroll("bot", "--attr", "role=agent")
	m.outlet("db1", s.addr(), "--max-streams", "200")
	c := newCrowd(m, "bot")
	c.join(100)
	conns := dialAll(t, c.until(t, 100, 0))
	echoAll(t, conns)
	for _, c := range conns {
		c.Close()
	}
}

func TestTheSixtyFifthLaneOfACarrierIsRefusedBusyUntilAnotherEnds(t *testing.T) {
	t.Parallel()
	s := newService(t)
	m := newMeeting(t)
	m.enroll("db1", "--serve", "db")
	m.enroll("bot", "--attr", "role=agent")
	m.outlet("db1", s.addr(), "--max-streams", "200", "--carrier", "yamux")
	c := newCrowd(m, "bot")
	c.join(64)
	first := c.until(t, 64, 0)
	conns := dialAll(t, first)
	c.join(1)
	c.until(t, 64, 1)
	echoAll(t, conns) // nobody else has noticed
	first[0].leave()
	conns[0].Close()
	c.until(t, 64, 0)
	c.join(35)
	c.until(t, 64, 35)
	for _, i := range first[1:36] {
		i.leave()
	}
	last := c.until(t, 64, 0)
	for _, c := range append(dialAll(t, last), conns...) {
		c.Close()
	}
}

// Several inlets, so that each of the two outlets has one at least.
func TestWhenOneOutletOfAPoolIsKilledOnlyItsStreamsEndAndTheOtherTakesTheNewOnes(t *testing.T) {
	for _, carrier := range carriers {
		t.Run(carrier, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			m := newMeeting(t)
			outs := map[string]*process.Process{}
			for _, host := range []string{"db1", "db2"} {
				m.enroll(host, "--serve", "db")
				outs[host] = m.outlet(host, s.addr(), "--carrier", carrier)
			}
			m.enroll("bot", "--attr", "role=agent")
			type client struct {
				in   *process.Process
				addr string
				conn net.Conn
			}
			by := map[string][]client{} // the outlet
			for n := 0; len(by) < 2; n++ {
				if n == 24 {
					t.Fatalf("%d inlets have come to %v only", n, by)
				}
				in, addr := m.inlet("bot", "0")
				host := m.line(in, `inlet db ready via \S+ \((\w+), `)
				c := dial(t, addr, []byte("E"))
				if err := echo(c); err != nil {
					t.Fatal(err)
				}
				by[host] = append(by[host], client{in, addr, c})
			}
			kill(t, outs["db1"])
			for _, c := range by["db1"] {
				if n, err := c.conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("a stream of the one that is dead: %d bytes and %v, not a reset", n, err)
				}
				// The first try succeeds: nobody is sent to the one that is dead.
				again := dial(t, c.addr, []byte("E"))
				if err := echo(again); err != nil {
					t.Errorf("a new connection: %v", err)
				}
				m.line(c.in, `inlet db ready via \S+ \(db2, `)
			}
			for _, c := range by["db2"] {
				if err := echo(c.conn); err != nil {
					t.Errorf("a stream of the other: %v", err)
				}
			}
		})
	}
}

func TestAnInletOfANameThatNobodyServesSaysSoAndIsReadyWhenSomebodyDoes(t *testing.T) {
	t.Parallel()
	s := newService(t)
	m := newMeeting(t)
	m.enroll("db1", "--serve", "db")
	m.enroll("bot", "--attr", "role=agent")
	in, addr := m.inlet("bot", "0")
	m.line(in, `inlet db waiting: .*nobody serves it.*; next try in `)
	if out := m.fails("bot", 4, "ping", "db", "--timeout", "3s"); !regexp.MustCompile(`nobody serves it.*PORTAL-E0401`).MatchString(out) {
		t.Errorf("ping says %s", out)
	}
	m.outlet("db1", s.addr())
	m.line(in, `inlet db ready via \S+ \(db1, `)
	if err := echo(dial(t, addr, []byte("E"))); err != nil {
		t.Error(err)
	}
	m.run("bot", "ping", "db")
}
