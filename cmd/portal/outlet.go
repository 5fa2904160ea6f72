package main

import (
	"context"
	"fmt"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
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
	return serveOutlet(ctx, s, p)
}

func validName(name string) error {
	if err := identity.ValidName(name); err != nil {
		return fail(codeName, causes[codeName][1], "%q: %w", plain(name), err)
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
