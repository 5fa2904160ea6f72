package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os/exec"
	"strings"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/outlet"
)

type outletOptions struct {
	member      memberOptions
	name        string
	to          string
	command     []string // in place of to: one process a stream
	allow       []string
	listen      []string
	label       []string
	streams     int
	dials       int
	dialTimeout time.Duration
	grace       time.Duration
}

// outletPlan is what the options say, checked; nothing has been done yet.
type outletPlan struct {
	outletOptions
	target targetAddress // zero: command
	policy *abac.Policy
	ports  []listenAddress
	labels map[string]any
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
	if len(o.listen) == 0 {
		return nil, fail(codeUsage, "--listen :4100, and `portal inlet "+o.name+" --direct HOST:4100` on the other side",
			"outlet %s: nothing says where inlets reach it", o.name)
	}
	if p.ports, err = parseListens("listen", o.listen, false); err != nil {
		return nil, err
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
	m, err := s.member(o.member)
	if err != nil {
		return err
	}
	lns, err := listenAll(ctx, p.ports, socketOptions{everywhere: true})
	if err != nil {
		return err
	}
	server := p.server(m, s.log)
	t := s.teller("outlet", o.name)
	return s.supervise(ctx, job{
		role: "outlet", name: o.name, grace: o.grace,
		run: func(ctx context.Context) error {
			defer m.node.Close()
			defer closeAll(lns)
			if err := m.join(ctx, t); err != nil {
				return err
			}
			parts := []func(context.Context) error{m.client.Run, m.follow, func(ctx context.Context) error {
				p.report(ctx, m, server, t, addresses(lns))
				return nil
			}}
			for _, ln := range lns {
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
			server.SetAllow(policy)
			return m.reload()
		},
	})
}

func (p *outletPlan) server(m *member, log *slog.Logger) *outlet.Server {
	return &outlet.Server{
		Node: m.node, Name: p.name, Labels: p.labels, Target: p.reach(), Self: m.self, Trust: m.trust, Allow: p.policy,
		Limits: outlet.Limits{Streams: p.streams, Dials: p.dials, DialTimeout: p.dialTimeout}, Logger: log,
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
// credential says that it may serve the name. The target is dialled once, for
// the line to say what it answered.
func (p *outletPlan) report(ctx context.Context, m *member, server *outlet.Server, t *teller, addrs []string) {
	ev := event{Address: addrs}
	answer := "each stream runs " + plain(strings.Join(p.command, " "))
	if p.command == nil {
		ev.Target, ev.Answer = p.target.String(), "answers"
		if err := server.CheckTarget(ctx); err != nil {
			ev.Answer = "does not answer: " + reasonText(err)
		}
		answer = "target " + ev.Target + " " + ev.Answer
	}
	m.watch(ctx, func(c *identity.Credential) error {
		if c.MayServe(p.name) {
			return nil
		}
		return fail(codeRefused, "", "the credential of %s may not serve %s; a ticket made with --serve %s can change that",
			memberName(c.Name()), p.name, p.name)
	}, func(err error) {
		switch {
		case err == nil:
			t.ready(ev, "ready on "+list(addrs)+"; "+answer)
		case classify(err).code == codeRefused:
			t.refused(err)
		default:
			t.waiting(err, 0)
		}
	})
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
