package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/link"
)

type inletOptions struct {
	member  memberOptions
	way     wayOptions
	name    string
	from    []string
	require []string
	kind    string
	hosts   []string
	unsafe  bool
	mode    string
	moded   bool // --mode was given
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
	p.socket.group = o.group
	switch unix := slices.ContainsFunc(p.ports, func(a listenAddress) bool { return a.path != "" }); {
	case o.group != "" && !unix:
		return nil, fail(codeUsage, "--from unix:/path", "--group %q: there is no Unix socket to give it", plain(o.group))
	case o.moded && !unix:
		return nil, fail(codeUsage, "--from unix:/path", "--mode %q: there is no Unix socket to give it", plain(o.mode))
	}
	if p.routes, err = o.way.plan("inlet", o.name); err != nil {
		return nil, err
	}
	if p.demand, err = p.readDemand(); err != nil {
		return nil, err
	}
	if p.speaks, err = inlet.ParseKind(o.kind); err != nil {
		return nil, fail(codeUsage, "raw, pg or http", "there is no --kind %q", plain(o.kind))
	}
	if len(o.hosts) > 0 && p.speaks != inlet.HTTP {
		return nil, fail(codeUsage, "--kind http", "--host %s: only requests of --kind http name hosts", plain(o.hosts[0]))
	}
	for i, host := range o.hosts {
		if host == "" || strings.ContainsFunc(host, func(r rune) bool { return unprintable(r) || strings.ContainsRune(" /:@", r) }) {
			return nil, fail(codeUsage, "--host llm.internal: a name without a port", "--host %q is no name", plain(host))
		}
		o.hosts[i] = strings.ToLower(host)
	}
	if o.streams < 1 {
		return nil, fail(codeUsage, "", "--max-streams %d: at least 1", o.streams)
	}
	if err := atLeast("hold", o.hold, 0); err != nil {
		return nil, err
	}
	p.hold = max(o.hold, time.Nanosecond) // the server's 0 is its default
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
	m, err := s.memberFor(ctx, p.routes, o.member)
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
	server.Require, server.Kind, server.Hosts, server.Hold = p.demand, p.speaks, o.hosts, p.hold
	s.room.inlet(server, o.streams)
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
			if err := m.reload(); err != nil {
				return err
			}
			server.SetRequire(demand)
			return nil
		},
		home:    m.home,
		entries: []entry{{t: t, self: m.self, streams: server.Streams}},
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
		t.again(state.Next)
	case link.Waiting:
		t.waiting(state.Err, state.Next)
	}
}
