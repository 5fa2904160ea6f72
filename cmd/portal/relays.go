package main

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/relay"
	"github.com/portal-tunnel/portal/routing"
)

// relays are the relays of this process, one client each, whatever it is that they
// are used for. A client begins when it is first asked for.
type relays struct {
	node    *routing.Node
	self    *identity.Self
	trust   *identity.Trust
	log     *slog.Logger
	carrier relay.Carrier // set before the first is asked for

	mu      sync.Mutex
	clients map[string]*relay.Client // by hops.key
	ctx     context.Context
	cancel  context.CancelFunc
	all     sync.WaitGroup
}

func newRelays(node *routing.Node, self *identity.Self, trust *identity.Trust, log *slog.Logger) *relays {
	r := &relays{node: node, self: self, trust: trust, log: log, clients: make(map[string]*relay.Client)}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// client is this process's end of the relay at w.
func (r *relays) client(w identity.Way) *relay.Client { return r.through(hops{w}) }

// through is this process's end of the last relay of h, behind those before it. It
// does not renew before it dials: the way to the authority may lead through it.
func (r *relays) through(h hops) *relay.Client {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.throughLocked(h)
}

func (r *relays) throughLocked(h hops) *relay.Client {
	if c := r.clients[h.key()]; c != nil {
		return c
	}
	last := h[len(h)-1]
	c := &relay.Client{ID: last.ID, Addr: last.Addr, Node: r.node, Self: r.self, Trust: r.trust, Carrier: r.carrier, Logger: r.log}
	if before := h[:len(h)-1]; len(before) > 0 {
		first := r.throughLocked(before)
		c.Dial, c.Watch = first.Hop(last.Addr), first.OnReady
	}
	r.clients[h.key()] = c
	r.all.Go(func() { c.Run(r.ctx) })
	return c
}

// toAuthority dials an authority by whatever way.
func (r *relays) toAuthority(id identity.ID) func(context.Context, identity.Way) (net.Conn, error) {
	return func(ctx context.Context, w identity.Way) (net.Conn, error) {
		if w.ID.IsZero() {
			return new(net.Dialer).DialContext(ctx, "tcp", w.Addr)
		}
		return r.client(w).Lane(ctx, relay.AuthorityName, id)
	}
}

func (r *relays) close() {
	r.cancel()
	r.all.Wait()
}

// relayAddresses reads [ID@]HOST:PORT each; pin says that the ID must be there.
func relayAddresses(flag string, texts []string, pin bool) ([]identity.Way, error) {
	var ways []identity.Way
	for _, text := range texts {
		id, addr, err := pinned(text)
		if err != nil {
			return nil, fmt.Errorf("--%s: %w", flag, err)
		}
		if pin && id.IsZero() {
			return nil, fail(codeAddress, "ID@HOST:PORT; `portal identity show` on the relay's host prints the ID", "--%s %s: an address alone makes nobody a relay", flag, plain(text))
		}
		ways = append(ways, identity.Way{ID: id, Addr: addr})
	}
	return ways, nil
}

// distinct are the ways without those that occur twice, once what the membership
// knows of them has been added.
func distinct(ways []identity.Way) (out []identity.Way) {
	for _, w := range ways {
		if !slices.Contains(out, w) {
			out = append(out, w)
		}
	}
	return out
}

// absences are relays of several that are not there, by address, and why: the first
// reason of each, so that its line stays the same until it is back.
type absences map[string]string

func (a absences) note(addr string, state link.State) {
	switch _, there := a[addr]; {
	case state.Kind == link.Ready:
		delete(a, addr)
	case state.Err != nil && !there:
		a[addr] = fmt.Sprintf("via %s: %s", addr, strings.TrimPrefix(reasonText(state.Err), addr+": "))
	}
}

// list is in the order of addresses; nil when all are there.
func (a absences) list() (all []string) {
	for _, addr := range slices.Sorted(maps.Keys(a)) {
		all = append(all, a[addr])
	}
	return all
}

// without is what a line says of them behind all else.
func without(absent []string) (text string) {
	for _, way := range absent {
		text += "; not " + way
	}
	return text
}
