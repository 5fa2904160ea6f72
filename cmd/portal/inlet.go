package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/urfave/cli/v2"
)

type inletOptions struct {
	member  memberOptions
	way     wayOptions
	name    string
	from    []string
	require []string
	kind    string
	unsafe  bool
	mode    string
	group   string
	hold    time.Duration
	streams int
	grace   time.Duration
}

// inletPlan is what the options say, checked; nothing has been done yet.
type inletPlan struct {
	inletOptions
	routes *route
	ports  []listenAddress
	socket socketOptions
	demand *abac.Policy
	speaks inlet.Kind
}

func (o inletOptions) plan() (*inletPlan, error) {
	p := &inletPlan{inletOptions: o}
	var err error
	if err := validName(o.name); err != nil {
		return nil, err
	}
	if len(o.from) == 0 {
		return nil, fail(codeUsage, "--from 15432, or --from unix:/path", "inlet %s: nothing says where to listen", o.name)
	}
	if p.ports, err = parseListens("from", o.from, true); err != nil {
		return nil, err
	}
	for _, a := range p.ports {
		if a.everywhere() && !o.unsafe {
			return nil, a.exposed()
		}
	}
	p.socket.everywhere = o.unsafe
	if p.socket.mode, err = parseMode(o.mode); err != nil {
		return nil, err
	}
	if p.socket.group = o.group; o.group != "" && !slices.ContainsFunc(p.ports, func(a listenAddress) bool { return a.path != "" }) {
		return nil, fail(codeUsage, "--from unix:/path", "--group %q: there is no Unix socket to give it", plain(o.group))
	}
	if p.routes, err = o.way.plan("inlet", o.name); err != nil {
		return nil, err
	}
	if p.demand, err = p.readDemand(); err != nil {
		return nil, err
	}
	if p.speaks, err = inlet.ParseKind(o.kind); err != nil {
		return nil, fail(codeUsage, "raw, pg or http", "--kind %q is none", plain(o.kind))
	}
	if o.streams < 1 {
		return nil, fail(codeUsage, "", "--max-streams %d: at least 1", o.streams)
	}
	if err := atLeast("hold", o.hold, 0); err != nil {
		return nil, err
	}
	return p, atLeast("grace", o.grace, 0)
}

// readDemand is --require as it is now: files are read again.
func (p *inletPlan) readDemand() (*abac.Policy, error) {
	return policy("require", "serve", p.name, p.require)
}

func runInlet(ctx context.Context, s *session, o inletOptions) error {
	p, err := o.plan()
	if err != nil {
		return err
	}
	m, err := s.memberFor(p.routes, o.member)
	if err != nil {
		return err
	}
	defer m.close()
	lns, err := listenAll(ctx, p.ports, p.socket)
	if err != nil {
		return err
	}
	t := s.teller("inlet", o.name)
	t.listening(addresses(lns))
	server := p.routes.inlet(o.name, m, s.log)
	server.Require, server.Kind, server.Hold, server.MaxStreams = p.demand, p.speaks, o.hold, o.streams
	server.OnState = t.inlet
	return s.supervise(ctx, job{
		role: "inlet", name: o.name, grace: o.grace,
		run: func(ctx context.Context) error {
			parts := []func(context.Context) error{func(ctx context.Context) error {
				if err := m.join(ctx, t); err != nil {
					return err
				}
				return together(ctx, m.client.Run, m.follow, server.Run)
			}}
			for _, ln := range lns {
				parts = append(parts, func(ctx context.Context) error { return server.Serve(ctx, ln) })
			}
			return together(ctx, parts...)
		},
		streams: server.Streams,
		drain:   server.Drain,
		reload: func() error {
			demand, err := p.readDemand()
			if err != nil {
				return err
			}
			server.SetRequire(demand)
			return m.reload()
		},
	})
}

// inlet prints a state of an inlet.
func (t *teller) inlet(state inlet.State) {
	if state.Err == nil {
		state.Err = errors.New(state.Reason)
	}
	switch state.Kind {
	case link.Ready:
		c := state.Peer.Credential()
		ev := event{Via: state.Path, Peer: state.Peer.ID().String(), Member: c.Name()}
		t.ready(ev, fmt.Sprintf("ready %s (%s, %s)", state.Path, memberName(c.Name()), state.Peer.ID().Short()))
	case link.Refused:
		t.refused(state.Err)
	case link.Waiting:
		t.waiting(state.Err, state.Next)
	}
}

// wayOptions say how to reach an outlet.
type wayOptions struct {
	direct []string
	relay  []string
	peer   string
}

func wayOf(c *cli.Context) wayOptions {
	return wayOptions{direct: c.StringSlice("direct"), relay: c.StringSlice("relay"), peer: c.String("peer")}
}

// A route is the ways to an outlet, checked, and the identity it must have;
// zero: any that may serve the name.
type route struct {
	command, name string
	addrs         []string       // direct
	relays        []identity.Way // none of either: those of the membership
	pin           identity.ID
}

// known says how the outlet is reached, as a member of m's authority; m is nil when
// this home is none's.
func (r *route) known(m *member) error {
	if len(r.addrs)+len(r.relays) > 0 {
		return nil
	}
	if m != nil {
		r.relays = m.relayWays()
	}
	if len(r.relays) == 0 {
		return fail(codeUsage, "--direct HOST:PORT, the --listen of `portal outlet "+r.name+"`, or --relay ID@HOST:PORT",
			"%s %s: nothing says how to reach the outlet", r.command, r.name)
	}
	return nil
}

// memberFor opens the home, and finds the ways that the line does not give in it.
func (s *session) memberFor(r *route, o memberOptions) (*member, error) {
	m, err := s.member(o)
	if err != nil {
		if way := r.known(nil); way != nil {
			return nil, way
		}
		return nil, err
	}
	if err := r.known(m); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func (o wayOptions) plan(command, name string) (*route, error) {
	r := &route{command: command, name: name}
	if o.peer != "" {
		id, err := parsePin(o.peer)
		if err != nil {
			return nil, fail(codeUsage, "`portal identity show` on the outlet's host prints it", "--peer: %w", err)
		}
		r.pin = id
	}
	var err error
	if r.relays, err = relayAddresses("relay", o.relay, false); err != nil {
		return nil, err
	}
	for _, text := range o.direct {
		id, addr, err := pinned(text)
		if err != nil {
			return nil, fmt.Errorf("--direct: %w", err)
		}
		if !id.IsZero() {
			if !r.pin.IsZero() && r.pin != id {
				return nil, fail(codePin, causes[codePin][1], "--direct %s: %s is demanded elsewhere on the line", plain(text), r.pin)
			}
			r.pin = id
		}
		r.addrs = append(r.addrs, addr)
	}
	return r, nil
}

// inlet is the way's end on this side.
func (r *route) inlet(name string, m *member, log *slog.Logger) *inlet.Server {
	server := &inlet.Server{Node: m.node, Name: name, Self: m.self, Trust: m.trust, Fresh: m.client.Fresh, Pin: r.pin, Logger: log}
	for _, addr := range r.addrs {
		server.Paths = append(server.Paths, inlet.Path{Name: "direct " + addr, Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}})
	}
	for _, w := range r.relays {
		client := m.relays.client(m.pinned(w))
		server.Paths = append(server.Paths, inlet.Path{Name: "via " + w.Addr, Dial: func(ctx context.Context) (net.Conn, error) {
			return client.Lane(ctx, name, r.pin)
		}})
	}
	return server
}

// pinned reads [ID@]HOST:PORT.
func pinned(text string) (identity.ID, string, error) {
	id, addr, ok := strings.Cut(text, "@")
	if !ok {
		addr, err := dialAddress(text)
		return identity.ID{}, addr, err
	}
	pin, err := parsePin(id)
	if err != nil {
		return pin, "", fail(codeAddress, "ID@HOST:PORT", "%q: %w", plain(text), err)
	}
	addr, err = dialAddress(addr)
	return pin, addr, err
}

// parsePin reads an identifier that is demanded. The zero one is no pin
// elsewhere, so it must not be taken for one here.
func parsePin(text string) (identity.ID, error) {
	id, err := identity.ParseID(text)
	if err == nil && id.IsZero() {
		err = errors.New("nobody has the identifier zero")
	}
	return id, err
}
