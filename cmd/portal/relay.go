package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/relay"
)

type relayOptions struct {
	member    memberOptions
	listen    []string
	advertise []string
	trust     []string // IDs
	serve     []string // policies
	connect   []string
	next      []string // NAME=HOST:PORT
	allowNext []string
	from      []string // CIDRs
	grace     time.Duration
}

// relayPlan is what the options say, checked; nothing has been done yet.
type relayPlan struct {
	relayOptions
	ports    []listenAddress
	ways     []identity.Way
	trusts   []identity.ID
	hops     map[string]relay.Hop
	prefixes []netip.Prefix
	policies relayPolicies
}

type relayPolicies struct{ serve, connect, next *abac.Policy }

func (o relayOptions) plan() (*relayPlan, error) {
	p := &relayPlan{relayOptions: o, hops: make(map[string]relay.Hop)}
	var err error
	if len(o.listen) == 0 {
		return nil, fail(codeUsage, "--listen :4000", "relay: nothing says where to listen")
	}
	if p.ports, err = parseListens("listen", o.listen, false); err != nil {
		return nil, err
	}
	if p.ways, err = dialable("advertise", o.advertise); err != nil {
		return nil, err
	}
	for _, text := range o.trust {
		id, err := parsePin(text)
		if err != nil {
			return nil, fail(codeUsage, "`portal authority` prints it", "--trust: %w", err)
		}
		p.trusts = append(p.trusts, id)
	}
	for _, text := range o.next {
		name, addr, ok := strings.Cut(text, "=")
		if !ok || identity.ValidName(name) != nil {
			return nil, fail(codeUsage, "NAME=HOST:PORT", "--next %q: there is no name before the address", plain(text))
		}
		hop, err := relayAddresses("next", []string{addr}, false)
		if err != nil {
			return nil, err
		}
		p.hops[name] = relay.Hop{Addr: hop[0].Addr}
	}
	for _, text := range o.from {
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, fail(codeUsage, "192.0.2.7/32", "--from-relay %q is no prefix", plain(text))
		}
		p.prefixes = append(p.prefixes, prefix)
	}
	if p.policies, err = p.readPolicies(); err != nil {
		return nil, err
	}
	return p, atLeast("grace", o.grace, 0)
}

func (p *relayPlan) readPolicies() (r relayPolicies, err error) {
	for _, f := range []struct {
		flag, action string
		texts        []string
		to           **abac.Policy
	}{
		{"allow-serve", "serve", p.serve, &r.serve},
		{"allow-connect", "connect", p.connect, &r.connect},
		{"allow-next", "next", p.allowNext, &r.next},
	} {
		if *f.to, err = policyForAny(f.flag, f.action, f.texts); err != nil {
			return r, err
		}
	}
	return r, nil
}

// relayIs reports whether an address is in one of the prefixes of --from-relay.
func (p *relayPlan) relayIs(a net.Addr) bool {
	addr, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return false
	}
	for _, prefix := range p.prefixes {
		if prefix.Contains(addr.Addr().Unmap()) {
			return true
		}
	}
	return false
}

// runRelay runs a relay. It needs no membership: with --trust it is only an
// identity, which others pin.
func runRelay(ctx context.Context, s *session, o relayOptions) error {
	p, err := o.plan()
	if err != nil {
		return err
	}
	var m *member
	if len(p.trusts) == 0 {
		if m, err = s.member(o.member); err != nil {
			return fail(codeUsage, "--trust ID of the authority, which need not run here; or `portal enroll` with a ticket made with --as-relay",
				"relay: nothing says whose members meet here: %w", err)
		}
	} else if m, err = s.identityOnly(o.member.home, p.trusts); err != nil {
		return err
	}
	defer m.close()
	lns, err := listenAll(ctx, p.ports, socketOptions{everywhere: true})
	if err != nil {
		return err
	}
	server := &relay.Server{
		Node: m.node, Self: m.self, Trust: m.trust, Next: p.hops, Logger: s.log,
		AllowServe: p.policies.serve, AllowConnect: p.policies.connect, AllowNext: p.policies.next,
	}
	if len(p.prefixes) > 0 {
		server.Many = p.relayIs
	}
	t := s.teller("relay", "")
	return s.supervise(ctx, job{
		role: "relay", grace: o.grace,
		run: func(ctx context.Context) error {
			defer closeAll(lns)
			if err := m.join(ctx, t); err != nil {
				return err
			}
			text := "ready on " + list(addresses(lns))
			if len(p.ways) > 0 {
				text += " as " + list(wayTexts(p.ways))
			}
			t.ready(event{Address: addresses(lns), ID: m.self.ID().String()}, fmt.Sprintf("%s (%s)", text, m.self.ID().Short()))
			var parts []func(context.Context) error
			if m.client != nil {
				parts = append(parts, m.client.Run, m.follow)
			}
			for _, ln := range lns {
				parts = append(parts, func(ctx context.Context) error { return server.Serve(ctx, ln) })
			}
			return together(ctx, parts...)
		},
		streams: server.Lanes,
		drain:   server.Drain,
		reload: func() error {
			policies, err := p.readPolicies()
			if err != nil {
				return err
			}
			server.SetPolicies(policies.serve, policies.connect, policies.next)
			return nil
		},
	})
}
