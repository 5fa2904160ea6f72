package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/urfave/cli/v2"
)

// wayOptions say how to reach an outlet.
type wayOptions struct {
	direct []string
	relay  []string
	via    []string
	peer   string
}

func wayOf(c *cli.Context) wayOptions {
	return wayOptions{direct: c.StringSlice("direct"), relay: c.StringSlice("relay"), via: c.StringSlice("via"), peer: c.String("peer")}
}

// hops are the relays of one way: the first has an address, each behind it the name
// by which the one before knows it.
type hops []identity.Way

// maxHops is more than anybody nests: each hop is a control channel and a
// connection more for every lane. Routes have the same limit.
const maxHops = 8

// String is the way without its pins.
func (h hops) String() string {
	addrs := make([]string, len(h))
	for i, w := range h {
		addrs[i] = w.Addr
	}
	return strings.Join(addrs, ",")
}

// key tells ways apart, those with other pins too.
func (h hops) key() string {
	ways := make([]string, len(h))
	for i, w := range h {
		ways[i] = w.String()
	}
	return strings.Join(ways, ",")
}

// parseVia reads [ID@]HOST:PORT,[ID@]NAME,…
func parseVia(text string) (hops, error) {
	const form = "[ID@]HOST:PORT,[ID@]NAME: an address first, then names that the relay before knows"
	parts := strings.Split(text, ",")
	if len(parts) > maxHops {
		return nil, fail(codeAddress, "", "--via %s: %d relays one behind another; at most %d are used", plain(text), len(parts), maxHops)
	}
	var h hops
	for i, part := range parts {
		if i == 0 {
			first, err := relayAddresses("via", []string{part}, false)
			if err != nil {
				return nil, err
			}
			h = first
			continue
		}
		id, name, pinned := strings.Cut(part, "@")
		w := identity.Way{Addr: name}
		if !pinned {
			w.Addr = part
		} else {
			var err error
			if w.ID, err = parsePin(id); err != nil {
				return nil, fail(codeAddress, form, "--via %s: %q: %w", plain(text), plain(part), err)
			}
		}
		if err := identity.ValidName(w.Addr); err != nil {
			return nil, fail(codeAddress, form, "--via %s: %q: %w", plain(text), plain(part), err)
		}
		h = append(h, w)
	}
	return h, nil
}

// A route is the ways to an outlet, checked, and the identity it must have;
// zero: any that may serve the name. Without a name it is the ways to relays.
type route struct {
	command, name string
	addrs         []string // direct
	relays        []hops   // none of either: those of the membership
	pin           identity.ID
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
	ways, err := relayAddresses("relay", o.relay, false)
	if err != nil {
		return nil, err
	}
	for _, w := range ways {
		r.relays = append(r.relays, hops{w})
	}
	for _, text := range o.via {
		h, err := parseVia(text)
		if err != nil {
			return nil, err
		}
		r.relays = append(r.relays, h)
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

// known says how the outlet is reached, as a member of m's authority.
func (r *route) known(m *member) error {
	if len(r.addrs)+len(r.relays) == 0 {
		for _, w := range m.relayWays() {
			r.relays = append(r.relays, hops{w})
		}
	}
	for _, h := range r.relays {
		h[0] = m.pinned(h[0])
	}
	switch {
	case len(r.addrs)+len(r.relays) > 0:
		return nil
	case r.name == "":
		return fail(codeUsage, "--relay ID@HOST:PORT", "%s: nothing says which relay to ask", r.command)
	default:
		return fail(codeUsage, "--direct HOST:PORT, the --listen of `portal outlet "+r.name+"`, or --relay ID@HOST:PORT",
			"%s %s: nothing says how to reach the outlet", r.command, r.name)
	}
}

// memberFor opens the home, and finds the ways that the line does not give in it.
func (s *session) memberFor(ctx context.Context, r *route, o memberOptions) (*member, error) {
	m, err := s.member(ctx, o)
	if err != nil {
		return nil, err
	}
	if err := r.known(m); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

// inlet is the way's end on this side.
func (r *route) inlet(name string, m *member, log *slog.Logger) *inlet.Server {
	server := &inlet.Server{Node: m.node, Name: name, Self: m.self, Trust: m.trust, Fresh: m.client.Fresh, Pin: r.pin, Logger: log}
	for _, addr := range r.addrs {
		server.Paths = append(server.Paths, inlet.Path{Name: "direct " + addr, Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}})
	}
	for _, h := range r.relays {
		client := m.relays.through(h)
		server.Paths = append(server.Paths, inlet.Path{Name: viaText(h), Dial: func(ctx context.Context) (net.Conn, error) {
			return client.Lane(ctx, name, r.pin)
		}, Watch: client.OnReady})
	}
	return server
}

func viaText(h hops) string { return "via " + h.String() }

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
