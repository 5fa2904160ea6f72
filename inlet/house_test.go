package inlet_test

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
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

// build starts an outlet named db for target and an inlet to it. The inlet's
// member has the attribute role.
func build(t testing.TB, target outlet.Target, role string, change func(*outlet.Server, *inlet.Server)) *house {
	t.Helper()
	authority, err := identity.NewSelf()
	if err != nil {
		t.Fatal(err)
	}
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
	lanes, local := listen(t), listen(t)
	h.addr = local.Addr().String()
	h.inlet = &inlet.Server{
		Node: new(routing.Node), Name: "db",
		Self:  member(t, authority, identity.Attributes{"name": "bot", "role": role}, time.Hour),
		Trust: identity.NewTrust(authority.ID()),
		Paths: []inlet.Path{{Name: "direct " + lanes.Addr().String(), Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", lanes.Addr().String())
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
	all.Go(func() { h.outlet.Serve(ctx, lanes) })
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
