package main

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/authority"
	"github.com/portal-tunnel/portal/relay"
)

type relayOptions struct {
	member    memberOptions
	listen    []string
	advertise []string
	trust     []string // IDs
	serve     []string // policies
	connect   []string
	next      []string // NAME=[ID@]HOST:PORT
	allowNext []string
	from      []string // CIDRs
	authority bool     // hosts one
	ttl       time.Duration
	ttlGiven  bool
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
		if _, again := p.hops[name]; again {
			return nil, fail(codeUsage, "one address for each name", "--next: the name %s stands there twice", name)
		}
		hop, err := relayAddresses("next", []string{addr}, false)
		if err != nil {
			return nil, err
		}
		p.hops[name] = relay.Hop{Addr: hop[0].Addr, ID: hop[0].ID}
	}
	for _, text := range o.from {
		prefix, err := netip.ParsePrefix(text)
		if ip, alone := netip.ParseAddr(text); err != nil && alone == nil {
			prefix, err = ip.Prefix(ip.BitLen())
		}
		if err != nil {
			return nil, fail(codeUsage, "192.0.2.7, or 192.0.2.0/24", "--from-relay %q is no address or prefix", plain(text))
		}
		p.prefixes = append(p.prefixes, prefix)
	}
	if p.policies, err = p.readPolicies(); err != nil {
		return nil, err
	}
	if len(o.allowNext) > 0 && len(o.next) == 0 {
		return nil, fail(codeUsage, "--next NAME=[ID@]HOST:PORT", "--allow-next: there is no --next that somebody could go on to")
	}
	if o.ttlGiven && !o.authority {
		return nil, fail(codeUsage, "--authority, or give it to `portal authority`", "--credential-ttl: this relay issues no credentials")
	}
	if o.authority && len(p.trusts) > 0 {
		return nil, fail(codeUsage, "leave out one of them", "relay: --authority hosts an authority, --trust names one elsewhere")
	}
	if (o.authority || len(p.trusts) > 0) && (o.member.ephemeral || o.member.ticket != "") {
		return nil, fail(codeUsage, "leave them out: such a relay is no member", "relay: --ephemeral and --ticket do not go with --authority or --trust")
	}
	if err := atLeast("credential-ttl", o.ttl, authority.MinTTL); err != nil {
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
	var b *bureau // --authority
	if o.authority {
		if b, err = s.openBureau(o.member.home, o.ttl); err != nil {
			return err
		}
		defer b.close()
		p.trusts = []identity.ID{b.self.ID()}
	}
	var m *member
	if len(p.trusts) > 0 {
		m, err = s.identityOnly(o.member.home, p.trusts)
	} else if m, err = s.member(ctx, o.member); err != nil {
		err = fail(codeUsage, "--authority; or --trust ID of the authority, which need not run here; or `portal enroll` with a ticket made with --as-relay",
			"relay: nothing says whose members meet here: %w", err)
	}
	if err != nil {
		return err
	}
	defer m.close()
	lns, err := listenAll(ctx, p.ports, socketOptions{everywhere: true})
	if err != nil {
		return err
	}
	server := &relay.Server{
		Node: m.node, Self: m.self, Trust: m.trust, Next: p.hops, Limits: s.room.relay(), Logger: s.log,
		AllowServe: p.policies.serve, AllowConnect: p.policies.connect, AllowNext: p.policies.next,
	}
	if len(p.prefixes) > 0 {
		server.Many = p.relayIs
	}
	if len(p.hops) > 0 && len(p.allowNext) == 0 {
		s.say("nobody may go on to %s: --allow-next says who may", list(slices.Sorted(maps.Keys(p.hops))))
	}
	hosted := newInbox()
	guessed := false
	if b != nil {
		if guessed, err = p.host(b, m, lns); err != nil {
			return err
		}
		server.Local = map[identity.ID]func(context.Context, net.Conn){b.self.ID(): hosted.put}
	}
	t := s.teller("relay", "")
	shown := entry{t: t, self: m.self, address: addresses(lns), relay: server.Status}
	if b != nil {
		shown.hosts = b.self.ID()
	}
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
			if b != nil {
				s.say(`authority %s: whoever controls this host can issue credentials (see "A blind relay")`, b.self.ID().Short())
				if guessed {
					s.warnGuess("tickets will name", wayTexts(p.ways))
				}
				parts = append(parts, func(ctx context.Context) error { return b.run(ctx, []net.Listener{hosted}) })
			}
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
			if err := m.reload(); err != nil {
				return err
			}
			server.SetPolicies(policies.serve, policies.connect, policies.next)
			return nil
		},
		home:    m.home,
		entries: []entry{shown},
	})
}

// host puts the ways to this relay into the tickets of the authority in its process.
func (p *relayPlan) host(b *bureau, m *member, lns []net.Listener) (guessed bool, err error) {
	if len(p.ways) == 0 {
		var own []identity.Way
		if own, guessed, err = ownWays(lns); err != nil {
			return false, err
		}
		p.ways = own
	}
	ways := make([]identity.Way, 0, len(p.ways))
	for _, w := range p.ways {
		ways = append(ways, identity.Way{ID: m.self.ID(), Addr: w.Addr})
	}
	return guessed, storeWays(b.store, knownWays{ways: ways, guessed: guessed})
}

// inbox is a listener whose connections are put into it.
type inbox struct {
	conns  chan net.Conn
	closed chan struct{}
	close  func()
}

func newInbox() *inbox {
	i := &inbox{conns: make(chan net.Conn), closed: make(chan struct{})}
	i.close = sync.OnceFunc(func() { close(i.closed) })
	return i
}

func (i *inbox) put(ctx context.Context, c net.Conn) {
	select {
	case i.conns <- c:
	case <-i.closed:
		c.Close()
	case <-ctx.Done():
		c.Close()
	}
}

func (i *inbox) Accept() (net.Conn, error) {
	select {
	case c := <-i.conns:
		return c, nil
	case <-i.closed:
		return nil, net.ErrClosed
	}
}

func (i *inbox) Close() error {
	i.close()
	return nil
}

func (i *inbox) Addr() net.Addr { return inboxAddr{} }

type inboxAddr struct{}

func (inboxAddr) Network() string { return "portal" }
func (inboxAddr) String() string  { return "this process" }
