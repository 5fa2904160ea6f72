package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/authority"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/control"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/store"
	"github.com/portal-tunnel/portal/relay"
	"github.com/portal-tunnel/portal/routing"
)

type authorityOptions struct {
	home      string
	listen    []string
	relay     []string // ID@HOST:PORT
	advertise []string
	ttl       time.Duration
	grace     time.Duration
}

// runAuthority answers on its addresses, and on HOME/control.sock for the
// commands of the same user. It has the store for itself.
func runAuthority(ctx context.Context, s *session, o authorityOptions) error {
	if len(o.listen)+len(o.relay) == 0 {
		return fail(codeUsage, "--listen :4000, or --relay ID@HOST:PORT", "authority: nothing says where members reach it")
	}
	through, err := relayAddresses("relay", o.relay, true)
	if err != nil {
		return err
	}
	through = distinct(through)
	ports, err := parseListens("listen", o.listen, false)
	if err != nil {
		return err
	}
	ways, err := dialable("advertise", o.advertise)
	if err != nil {
		return err
	}
	if err := atLeast("credential-ttl", o.ttl, authority.MinTTL); err != nil {
		return err
	}
	if err := atLeast("grace", o.grace, 0); err != nil {
		return err
	}
	b, err := s.openBureau(o.home, o.ttl)
	if err != nil {
		return err
	}
	defer b.close()
	lns, err := listenAll(ctx, ports, socketOptions{everywhere: true})
	if err != nil {
		return err
	}
	defer closeAll(lns)
	guessed := false
	if len(ways) == 0 {
		if ways, guessed, err = ownWays(lns); err != nil {
			return err
		}
	}
	ways = append(ways, through...)
	if err := storeWays(b.store, knownWays{ways: ways, guessed: guessed}); err != nil {
		return err
	}
	self, links := b.self, b.links
	t := s.teller("authority", "")
	rs := newRelays(b.node, self, identity.NewTrust(), s.log)
	defer rs.close()
	at := &posts{t: t, self: self.ID(), addrs: addresses(lns), relays: make(map[string]bool), absent: make(absences)}
	return s.supervise(ctx, job{
		role: "authority", grace: o.grace,
		run: func(ctx context.Context) error {
			all := slices.Clone(lns)
			for _, w := range through {
				all = append(all, rs.client(w).Listen(relay.AuthorityName, func(state link.State) { at.relay(w.Addr, state) }))
			}
			if len(lns) > 0 {
				at.tell()
			}
			s.say("authority %s: whoever controls this host can issue credentials", self.ID().Short())
			if len(through) > 0 {
				s.say("the relay serves its members with --trust %s", self.ID())
			}
			if guessed {
				s.warnGuess("tickets will name", wayTexts(ways))
			}
			return b.run(ctx, all)
		},
		// A question takes a moment and asks again by itself.
		streams: func() int { return 0 },
		drain:   func(context.Context) int { links.Drain(); return 0 },
		home:    b.home,
		entries: []entry{{t: t, self: self, hosts: self.ID(), address: addresses(lns)}},
	})
}

// A bureau is an authority that has its home for itself: the store, and the socket on
// which commands ask.
type bureau struct {
	home   *identity.Home
	self   *identity.Self
	store  *store.Store
	socket net.Listener
	node   *routing.Node
	server *authority.Server
	links  *link.Server
}

// openBureau opens the authority of a home and makes it on first need.
func (s *session) openBureau(home string, ttl time.Duration) (*bureau, error) {
	h, err := s.openHome(home)
	if err != nil {
		return nil, err
	}
	b := &bureau{home: h, node: &routing.Node{Logger: s.log}}
	if b.self, err = h.Authority(true); err != nil {
		return nil, err
	}
	// Before anything that a running authority has: its process is named.
	if b.store, err = store.Open(storePath(h)); err != nil {
		return nil, running(h, err)
	}
	if b.socket, err = control.Listen(controlPath(h)); err != nil {
		b.store.Close()
		return nil, running(h, err)
	}
	b.server = &authority.Server{Self: b.self, Store: b.store, TTL: ttl, Node: b.node, Logger: s.log}
	b.links = &link.Server{Services: map[channel.Kind]link.Service{channel.Authority: b.server.Service()}, Limits: s.room.link(), Logger: s.log}
	return b, nil
}

// run answers members on lns, and commands, until ctx ends.
func (b *bureau) run(ctx context.Context, lns []net.Listener) error {
	d := &desk{server: b.server, store: b.store}
	parts := []func(context.Context) error{func(ctx context.Context) error { return control.Serve(ctx, b.socket, d.answer) }}
	for _, ln := range lns {
		parts = append(parts, func(ctx context.Context) error { return b.links.Serve(ctx, ln) })
	}
	return errors.Join(together(ctx, parts...), b.server.Close())
}

func (b *bureau) close() {
	b.node.Close()
	b.socket.Close()
	b.store.Close()
}

// posts are where an authority answers: its own addresses, and relays that hold its
// name.
type posts struct {
	t     *teller
	self  identity.ID
	addrs []string

	mu     sync.Mutex
	relays map[string]bool
	absent absences
}

func (p *posts) relay(addr string, state link.State) {
	p.mu.Lock()
	p.relays[addr] = state.Kind == link.Ready
	p.absent.note(addr, state)
	found := len(p.addrs) > 0 || slices.Contains(slices.Collect(maps.Values(p.relays)), true)
	p.mu.Unlock()
	switch {
	case found:
		p.tell()
	case state.Kind == link.Refused:
		p.t.refused(state.Err)
		p.t.again(state.Next)
	default:
		p.t.waiting(state.Err, state.Next)
	}
}

func (p *posts) tell() {
	p.mu.Lock()
	defer p.mu.Unlock()
	ev, text := event{Address: p.addrs, ID: p.self.String()}, "ready"
	if len(p.addrs) > 0 {
		text += " on " + list(p.addrs)
	}
	var by []string
	for _, addr := range slices.Sorted(maps.Keys(p.relays)) {
		if p.relays[addr] {
			by = append(by, addr)
		}
	}
	if len(by) > 0 {
		text += " via " + list(by)
		ev.Via = "via " + list(by)
	}
	ev.Absent = p.absent.list()
	p.t.ready(ev, fmt.Sprintf("%s (%s)%s", text, p.self.Short(), without(ev.Absent)))
}

// running says that another authority has the home.
func running(h *identity.Home, err error) error {
	var held *store.HeldError
	pid := 0
	switch {
	case errors.As(err, &held):
		pid = held.PID
	case !errors.Is(err, control.ErrTaken):
		return err
	}
	who := "another process"
	if pid != 0 {
		who = "process " + strconv.Itoa(pid)
	}
	return fail(codeHomeBusy, "stop it, or use another --home", "the authority of %s runs already: %s has it%w", plain(h.Dir()), who, quiet{err})
}

func storePath(h *identity.Home) string   { return filepath.Join(h.Dir(), "authority", "store.db") }
func controlPath(h *identity.Home) string { return filepath.Join(h.Dir(), "control.sock") }

// ownWays are the addresses that tickets name when none are advertised: those
// that it listens on. For every interface one is guessed: this host's first
// address that others may know.
func ownWays(lns []net.Listener) (ways []identity.Way, guessed bool, err error) {
	seen := make(map[string]bool)
	for _, ln := range lns {
		a := ln.Addr().(*net.TCPAddr)
		addr := a.String()
		if a.IP.IsUnspecified() {
			host, err := hostAddress()
			if err != nil {
				return nil, false, err
			}
			addr, guessed = net.JoinHostPort(host, strconv.Itoa(a.Port)), true
		}
		if !seen[addr] {
			seen[addr] = true
			ways = append(ways, identity.Way{Addr: addr})
		}
	}
	return ways, guessed, nil
}

func hostAddress() (string, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return "", err
	}
	for _, a := range addrs {
		prefix, err := netip.ParsePrefix(a.String())
		if err == nil && prefix.Addr().IsGlobalUnicast() {
			return prefix.Addr().String(), nil
		}
	}
	return os.Hostname()
}

func (s *session) warnGuess(what string, ways []string) {
	s.say("warning: %s %s, a guess; --advertise HOST:PORT says how members reach the authority", what, unready(plain(list(ways))))
}

// The ways that tickets name are kept in the store, so that tickets can be made
// while the authority does not run.
const (
	waysBucket = "command"
	waysKey    = "ways"
)

type knownWays struct {
	ways    []identity.Way
	guessed bool // nobody said so: this host's own idea of its address
}

type storedWays struct {
	Ways    []string `json:"ways"`
	Guessed bool     `json:"guessed"`
}

func storeWays(st *store.Store, k knownWays) error {
	b, err := json.Marshal(storedWays{wayTexts(k.ways), k.guessed})
	if err != nil {
		return err
	}
	return st.Put(waysBucket, []byte(waysKey), b)
}

func loadWays(st *store.Store) (k knownWays, err error) {
	b, err := st.Get(waysBucket, []byte(waysKey))
	if b == nil || err != nil {
		return k, err
	}
	var w storedWays
	if err = json.Unmarshal(b, &w); err == nil {
		k.guessed = w.Guessed
		k.ways, err = parseWays(w.Ways)
	}
	if err != nil {
		return k, fmt.Errorf("reading the authority's ways: %w", err)
	}
	return k, nil
}

func wayTexts(ways []identity.Way) []string {
	texts := []string{}
	for _, w := range ways {
		texts = append(texts, w.String())
	}
	return texts
}

func parseWays(texts []string) ([]identity.Way, error) {
	var ways []identity.Way
	for _, text := range texts {
		w, err := identity.ParseWay(text)
		if err != nil {
			return nil, err
		}
		ways = append(ways, w)
	}
	return ways, nil
}

// A desk is where commands ask the authority for tickets: in the process that
// runs it, through the control socket, or on the store while none does.
type desk struct {
	server *authority.Server
	store  *store.Store
}

// ticketRequest asks for a ticket. Attributes are as on the command line, so
// that integers stay integers.
type ticketRequest struct {
	Name  string        `json:"name"`
	Attr  []string      `json:"attr"`
	Serve []string      `json:"serve"`
	Relay bool          `json:"relay"`
	TTL   time.Duration `json:"ttl"`
	Uses  int           `json:"uses"`
	Ways  []string      `json:"ways"` // empty: the authority's own
}

type ticketReply struct {
	Ticket  string   `json:"ticket"`
	Ways    []string `json:"ways"`
	Guessed bool     `json:"guessed"`
}

func (d *desk) create(ctx context.Context, r ticketRequest) (*ticketReply, error) {
	attrs, err := attributes("attr", r.Attr)
	if err != nil {
		return nil, err
	}
	var known knownWays
	if known.ways, err = parseWays(r.Ways); err != nil {
		return nil, err
	}
	if len(known.ways) == 0 {
		if known, err = loadWays(d.store); err != nil {
			return nil, err
		}
	}
	if len(known.ways) == 0 {
		return nil, fail(codeUsage, "start `portal authority --listen …` once, or say --advertise HOST:PORT", "no address is known where members reach this authority")
	}
	t, err := d.server.CreateTicket(ctx, authority.Grant{
		Name: r.Name, Attributes: attrs, Serve: r.Serve, Relay: r.Relay, TTL: r.TTL, Uses: r.Uses, Ways: known.ways,
	})
	if err != nil {
		return nil, err
	}
	text, err := t.Text()
	if err != nil {
		return nil, err
	}
	return &ticketReply{Ticket: text, Ways: wayTexts(known.ways), Guessed: known.guessed}, nil
}

// answer is the desk behind the control socket. Errors carry their code, so
// that the command at the other end exits as if it had asked the store itself.
func (d *desk) answer(ctx context.Context, method string, params json.RawMessage) (any, error) {
	result, err := d.do(ctx, method, params)
	if err != nil {
		f := classify(err)
		return nil, &control.Error{Code: strconv.Itoa(int(f.code)), Message: f.Error()}
	}
	return result, nil
}

func (d *desk) do(ctx context.Context, method string, params json.RawMessage) (any, error) {
	switch method {
	case "ticket.create":
		var r ticketRequest
		if err := json.Unmarshal(params, &r); err != nil {
			return nil, err
		}
		return d.create(ctx, r)
	case "ticket.list":
		var after ticketCursor
		if err := json.Unmarshal(params, &after); len(params) > 0 && err != nil {
			return nil, err
		}
		return d.list(ctx, after)
	case "ticket.revoke":
		var ref string
		if err := json.Unmarshal(params, &ref); err != nil {
			return nil, err
		}
		return nil, d.server.RevokeTicket(ctx, ref)
	}
	return nil, fmt.Errorf("the authority knows no %q", method)
}

// ticketPage is how many bytes of tickets one answer has: half of what an answer may
// have. One ticket has some 4 KiB at most.
const ticketPage = 512 << 10

// ticketCursor is the last ticket that was listed; the zero one asks for the first.
type ticketCursor struct {
	Created time.Time `json:"created"`
	Ref     string    `json:"ref"`
}

// list is the tickets behind a cursor, as many as fit; none behind the last.
func (d *desk) list(ctx context.Context, after ticketCursor) ([]json.RawMessage, error) {
	tickets, err := d.server.Tickets(ctx)
	if err != nil {
		return nil, err
	}
	page := []json.RawMessage{}
	size := 0
	for _, t := range tickets {
		if !t.Behind(after.Created, after.Ref) {
			continue
		}
		b, err := json.Marshal(t)
		if err != nil {
			return nil, err
		}
		if size += len(b) + 1; size > ticketPage && len(page) > 0 {
			break
		}
		page = append(page, b)
	}
	return page, nil
}

// askAuthority asks the authority of a home: the process that runs it, or the
// store itself while none does.
func askAuthority(ctx context.Context, s *session, home, method string, in, out any) error {
	h, dir, err := s.existingHome(home)
	if err != nil {
		return err
	}
	var self *identity.Self
	if h == nil {
		err = identity.ErrNoAuthority
	} else {
		self, err = h.Authority(false)
	}
	if errors.Is(err, identity.ErrNoAuthority) {
		return fail(codeNoAuthority, causes[codeNoAuthority][1], "there is no authority in %s (of user %d)", plain(dir), os.Geteuid())
	}
	if err != nil {
		return err
	}
	err = control.Call(ctx, controlPath(h), method, in, out)
	var told *control.Error
	if errors.As(err, &told) {
		n, nerr := strconv.Atoi(told.Code)
		if _, known := causes[code(n)]; nerr != nil || !known {
			n = int(codeFailed)
		}
		return fail(code(n), "", "%s", told.Message)
	}
	if !errors.Is(err, control.ErrNobody) {
		return err
	}

	st, err := store.Open(storePath(h))
	if err != nil {
		return err
	}
	defer st.Close()
	d := &desk{server: &authority.Server{Self: self, Store: st, Logger: s.log}, store: st}
	params, err := json.Marshal(in)
	if err != nil {
		return err
	}
	result, err := d.do(ctx, method, params)
	if err != nil || out == nil {
		return err
	}
	b, err := json.Marshal(result)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, out)
}
