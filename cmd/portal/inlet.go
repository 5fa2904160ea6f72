package main

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
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
	routes  *route
	from    []listenAddress
	socket  socketOptions
	require *abac.Policy
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
	if p.from, err = parseListens("from", o.from, true); err != nil {
		return nil, err
	}
	for _, a := range p.from {
		if a.everywhere() && !o.unsafe {
			return nil, fail(codeWildcard, fmt.Sprintf("--from %d listens on loopback; --unsafe-listen allows this", a.port),
				"--from %s: an inlet on every interface is open to whoever reaches this host", plain(a.text))
		}
	}
	if p.socket.mode, err = parseMode(o.mode); err != nil {
		return nil, err
	}
	if p.socket.group = o.group; o.group != "" && !slices.ContainsFunc(p.from, func(a listenAddress) bool { return a.path != "" }) {
		return nil, fail(codeUsage, "--from unix:/path", "--group %q: there is no Unix socket to give it", plain(o.group))
	}
	if p.routes, err = o.way.plan("inlet", o.name); err != nil {
		return nil, err
	}
	if p.require, err = policy("require", "serve", o.name, o.require); err != nil {
		return nil, err
	}
	if !slices.Contains([]string{"raw", "pg", "http"}, o.kind) {
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

func runInlet(ctx context.Context, s *session, o inletOptions) error {
	p, err := o.plan()
	if err != nil {
		return err
	}
	return serveInlet(ctx, s, p)
}

// wayOptions say how to reach an outlet.
type wayOptions struct {
	direct []string
	peer   string
}

func wayOf(c *cli.Context) wayOptions {
	return wayOptions{direct: c.StringSlice("direct"), peer: c.String("peer")}
}

// A route is the ways to an outlet, checked, and the identity it must have;
// zero: any that may serve the name.
type route struct {
	addrs []string
	pin   identity.ID
}

func (o wayOptions) plan(command, name string) (*route, error) {
	r := new(route)
	if o.peer != "" {
		id, err := identity.ParseID(o.peer)
		if err != nil {
			return nil, fail(codeUsage, "`portal identity show` on the outlet's host prints it", "--peer: %w", err)
		}
		r.pin = id
	}
	if len(o.direct) == 0 {
		return nil, fail(codeUsage, "--direct HOST:PORT, the --listen of `portal outlet "+name+"`",
			"%s %s: nothing says how to reach the outlet", command, name)
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

// pinned reads [ID@]HOST:PORT.
func pinned(text string) (identity.ID, string, error) {
	id, addr, ok := strings.Cut(text, "@")
	if !ok {
		addr, err := dialAddress(text)
		return identity.ID{}, addr, err
	}
	pin, err := identity.ParseID(id)
	if err != nil {
		return pin, "", fail(codeAddress, "ID@HOST:PORT", "%q: %w", plain(text), err)
	}
	addr, err = dialAddress(addr)
	return pin, addr, err
}

// advertised is HOST:PORT as others can dial it.
func advertised(flag string, texts []string) ([]identity.Way, error) {
	var out []identity.Way
	for _, text := range texts {
		addr, err := dialAddress(text)
		if err != nil {
			return nil, fmt.Errorf("--%s: %w", flag, err)
		}
		out = append(out, identity.Way{Addr: addr})
	}
	return out, nil
}

func portOf(a net.Addr) string {
	if t, ok := a.(*net.TCPAddr); ok {
		return strconv.Itoa(t.Port)
	}
	return ""
}
