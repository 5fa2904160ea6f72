package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/outlet"
	"github.com/portal-tunnel/portal/relay"
)

type outletOptions struct {
	member       memberOptions
	name         string
	to           string
	command      []string // in place of to: one process a stream
	allow        []string
	listen       []string
	relay        []string
	carrier      string
	carrierGiven bool
	label        []string
	streams      int
	streamsEach  int // of one identity; 0: all
	eachGiven    bool
	dials        int
	dialTimeout  time.Duration
	grace        time.Duration
}

// outletPlan is what the options say, checked; nothing has been done yet.
type outletPlan struct {
	outletOptions
	target targetAddress // zero: command
	policy *abac.Policy
	ports  []listenAddress
	relays []identity.Way // with no ports either: those of the membership
	lanes  relay.Carrier
	labels map[string]any
}

// reachable says by which relays, as a member of m's authority.
func (p *outletPlan) reachable(m *member) error {
	for i, w := range p.relays {
		p.relays[i] = m.pinned(w)
	}
	p.relays = distinct(p.relays)
	if len(p.ports)+len(p.relays) > 0 {
		return nil
	}
	if p.relays = m.relayWays(); len(p.relays) == 0 {
		return fail(codeUsage, "--relay ID@HOST:PORT; or --listen :4100, and `portal inlet "+p.name+" --direct HOST:4100` on the other side",
			"outlet %s: nothing says where inlets reach it", p.name)
	}
	return nil
}

func (o outletOptions) plan() (*outletPlan, error) {
	p := &outletPlan{outletOptions: o}
	var err error
	if err := validName(o.name); err != nil {
		return nil, err
	}
	switch {
	case o.to == "" && o.command == nil:
		return nil, fail(codeUsage, "--to 5432, or -- CMD for one process a stream", "outlet %s: there is no target", o.name)
	case o.to != "" && o.command != nil:
		return nil, fail(codeUsage, "leave out one of them", "outlet %s: --to and -- CMD are two targets", o.name)
	case o.to != "":
		if p.target, err = parseTarget(o.to); err != nil {
			return nil, fmt.Errorf("--to: %w", err)
		}
	}
	if o.command != nil {
		if _, err := exec.LookPath(o.command[0]); err != nil {
			return nil, fail(codeUsage, "", "outlet %s: its command: %w", o.name, err)
		}
	}
	if len(o.allow) == 0 {
		return nil, fail(codeUsage, `--allow 'principal.role == "agent"', or --allow true for every member`,
			"outlet %s: without --allow nobody may open it", o.name)
	}
	if p.policy, err = p.readPolicy(); err != nil {
		return nil, err
	}
	if p.relays, err = relayAddresses("relay", o.relay, false); err != nil {
		return nil, err
	}
	if p.lanes, err = relay.ParseCarrier(o.carrier); err != nil {
		return nil, fail(codeUsage, "dial-back or yamux", "there is no --carrier %q", plain(o.carrier))
	}
	if p.ports, err = parseListens("listen", o.listen, false); err != nil {
		return nil, err
	}
	if p.carrierGiven && len(p.relays) == 0 && len(p.ports) > 0 { // where it listens, the membership's relays are not asked
		return nil, fail(codeUsage, "--relay ID@HOST:PORT, or no --carrier", "outlet %s: --carrier is how lanes come from a relay, and there is none", p.name)
	}
	if p.labels, err = attributes("label", o.label); err != nil {
		return nil, err
	}
	for _, n := range []struct {
		flag string
		n    int
	}{{"max-streams", o.streams}, {"max-dials", o.dials}} {
		if n.n < 1 {
			return nil, fail(codeUsage, "", "--%s %d: at least 1", n.flag, n.n)
		}
	}
	if o.eachGiven && (o.streamsEach < 1 || o.streamsEach > o.streams) {
		return nil, fail(codeUsage, "", "--max-streams-each %d: from 1 to the %d of --max-streams", o.streamsEach, o.streams)
	}
	if err := atLeast("dial-timeout", o.dialTimeout, time.Millisecond); err != nil {
		return nil, err
	}
	return p, atLeast("grace", o.grace, 0)
}

// readPolicy is --allow as it is now: files are read again.
func (p *outletPlan) readPolicy() (*abac.Policy, error) {
	return policy("allow", "open", p.name, p.allow)
}

func runOutlet(ctx context.Context, s *session, o outletOptions) error {
	p, err := o.plan()
	if err != nil {
		return err
	}
	m, err := s.member(ctx, o.member)
	if err != nil {
		return err
	}
	defer m.close()
	m.relays.carrier = p.lanes
	if err := p.reachable(m); err != nil {
		return err
	}
	lns, err := listenAll(ctx, p.ports, socketOptions{everywhere: true})
	if err != nil {
		return err
	}
	server := p.server(m, s.room, s.log)
	t := s.teller("outlet", o.name)
	return s.supervise(ctx, job{
		role: "outlet", name: o.name, grace: o.grace,
		run: func(ctx context.Context) error {
			defer closeAll(lns)
			if err := m.join(ctx, t); err != nil {
				return err
			}
			at := &presence{plan: p, t: t, addrs: addresses(lns), relays: make(map[string]link.State), absent: make(absences)}
			all := slices.Clone(lns)
			for _, w := range p.relays {
				all = append(all, m.relays.client(m.pinned(w)).Listen(p.name, func(state link.State) { at.relay(w.Addr, state) }))
			}
			parts := []func(context.Context) error{m.client.Run, m.follow, func(ctx context.Context) error {
				p.report(ctx, m, server, at)
				return nil
			}}
			for _, ln := range all {
				parts = append(parts, func(ctx context.Context) error { return server.Serve(ctx, ln) })
			}
			return together(ctx, parts...)
		},
		streams: server.Streams,
		drain:   server.Drain,
		reload: func() error {
			policy, err := p.readPolicy()
			if err != nil {
				return err
			}
			if err := m.reload(); err != nil {
				return err
			}
			server.SetAllow(policy)
			return nil
		},
		home: m.home,
		entries: []entry{{
			t: t, self: m.self, address: addresses(lns), target: p.target.String(), command: p.command, streams: server.Streams,
		}},
	})
}

func (p *outletPlan) server(m *member, r room, log *slog.Logger) *outlet.Server {
	limits := r.outlet(p.streams, p.command != nil)
	limits.Dials, limits.DialTimeout = p.dials, p.dialTimeout
	if limits.StreamsEach = p.streamsEach; p.eachGiven && limits.Streams < p.streams { // the same part of what there is room for
		limits.StreamsEach = max(int(int64(p.streamsEach)*int64(limits.Streams)/int64(p.streams)), 1)
	}
	return &outlet.Server{
		Node: m.node, Name: p.name, Labels: p.labels, Target: p.reach(), Self: m.self, Trust: m.trust, Allow: p.policy,
		Limits: limits, Logger: log,
	}
}

func (p *outletPlan) reach() outlet.Target {
	switch {
	case p.command != nil:
		return outlet.Exec(p.command[0], p.command[1:]...)
	case p.target.network == "unix":
		return outlet.Unix(p.target.addr)
	}
	return outlet.TCP(p.target.addr)
}

// report tells what the outlet is: it is there for others as long as its
// credential says that it may serve the name, and it listens or a relay holds the
// name. The target is dialled once, for the line to say what it answered.
func (p *outletPlan) report(ctx context.Context, m *member, server *outlet.Server, at *presence) {
	at.answer = "each stream runs " + plain(strings.Join(p.command, " "))
	if p.command == nil {
		at.ev.Target, at.ev.Answer = p.target.String(), "answers"
		if err := server.CheckTarget(ctx); err != nil {
			at.ev.Answer = "does not answer: " + reasonText(err)
		}
		at.answer = "target " + at.ev.Target + " " + at.ev.Answer
	}
	m.watch(ctx, func(c *identity.Credential) error {
		if c.MayServe(p.name) {
			return nil
		}
		// A ticket replaces what was granted: all names that are to be served stand in it.
		return fail(codeRefused, "", "the credential of %s may not serve %s; a ticket made with %s can change that",
			memberName(c.Name()), p.name, "--serve "+strings.Join(append(slices.Clone(c.Serve()), p.name), " --serve "))
	}, at.credential)
}

// presence is where an outlet can be found, and whether its credential lets it be.
type presence struct {
	plan  *outletPlan
	t     *teller
	addrs []string

	ev     event // what is told with it
	answer string

	mu     sync.Mutex
	known  bool  // the credential has been looked at
	err    error // and does not let it
	relays map[string]link.State
	absent absences
}

func (a *presence) credential(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.known, a.err = true, err
	a.tellLocked()
}

func (a *presence) relay(addr string, state link.State) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.relays[addr] = state
	a.absent.note(addr, state)
	a.tellLocked()
}

func (a *presence) tellLocked() {
	switch {
	case !a.known:
		return
	case a.err != nil && classify(a.err).code == codeRefused:
		a.t.refused(a.err)
		return
	case a.err != nil:
		a.t.waiting(a.err, 0)
		return
	}
	var by []string
	var refused, waiting *link.State
	for _, w := range a.plan.relays {
		state, told := a.relays[w.Addr]
		if !told {
			continue
		}
		switch state.Kind {
		case link.Ready:
			by = append(by, w.Addr)
		case link.Refused:
			refused = &state
		default:
			waiting = &state
		}
	}
	switch {
	case len(a.addrs)+len(by) > 0:
		ev, text := a.ev, "ready"
		ev.Address = a.addrs
		if len(a.addrs) > 0 {
			text += " on " + list(a.addrs)
		}
		if len(by) > 0 {
			text += " via " + list(by)
			ev.Via = "via " + list(by)
		}
		ev.Absent = a.absent.list()
		a.t.ready(ev, text+"; "+a.answer+without(ev.Absent))
	case waiting != nil:
		a.t.waiting(waiting.Err, waiting.Next)
	case refused != nil:
		a.t.refused(refused.Err)
		a.t.again(refused.Next)
	}
}

// listenAll opens every address or none.
func listenAll(ctx context.Context, at []listenAddress, o socketOptions) ([]net.Listener, error) {
	var all []net.Listener
	for _, a := range at {
		lns, err := a.listen(ctx, o)
		if err != nil {
			closeAll(all)
			return nil, err
		}
		all = append(all, lns...)
	}
	return all, nil
}

func validName(name string) error {
	if err := identity.ValidName(name); err != nil {
		return fail(codeName, causes[codeName][1], "%q: %w", plain(name), err)
	}
	if identity.ValidServe(name) != nil {
		return fail(codeName, "use another name", "the name %s is reserved: it is the authority's own", name)
	}
	return nil
}

func atLeast(flag string, d, least time.Duration) error {
	if d < least {
		return fail(codeUsage, "", "--%s %s: at least %s", flag, d, least)
	}
	return nil
}

// parseListens reads the addresses of a flag; sockets says whether a Unix
// socket may be among them.
func parseListens(flag string, texts []string, sockets bool) ([]listenAddress, error) {
	var out []listenAddress
	for _, text := range texts {
		a, err := parseListen(text)
		if err != nil {
			return nil, fmt.Errorf("--%s: %w", flag, err)
		}
		if a.path != "" && !sockets {
			return nil, fail(codeAddress, "PORT or HOST:PORT", "--%s %s: a channel needs a TCP address", flag, plain(text))
		}
		out = append(out, a)
	}
	return out, nil
}
