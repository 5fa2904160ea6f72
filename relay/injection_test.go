package relay_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/authority"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/store"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/outlet"
	"github.com/portal-tunnel/portal/relay"
	"github.com/portal-tunnel/portal/routing"
)

const (
	adminAddr     = "10.0.0.2:4101"
	authorityAddr = "10.0.0.3:4200"
)

// crossroads is a town with a node of each role. All of them are one node to an
// attacker's eyes: whatever address there is at any is tried at each.
type crossroads struct {
	*town
	s        *relay.Server
	nodes    []*routing.Node
	store    *store.Store
	canaries []*routing.Actor

	visits  atomic.Int32 // to any target
	reached atomic.Int32 // messages that came to a canary
	logged  atomic.Int32 // what was said in logs
}

// canary is an actor that takes every message, from wherever it comes.
func (x *crossroads) canary(n *routing.Node, at routing.Address) {
	x.Helper()
	a, err := n.Spawn(at, routing.WorkerFunc(func(*routing.Actor, *routing.Message) error {
		x.reached.Add(1)
		return nil
	}), &routing.Options{Guard: func(*routing.Message) error { return nil }})
	if err != nil {
		x.Fatal(err)
	}
	x.canaries = append(x.canaries, a)
}

// A journal is a log that escapes nothing itself: what peers chose must come to it on one line, without
// a character that a terminal obeys.
type journal struct{ x *crossroads }

func (j journal) Enabled(context.Context, slog.Level) bool { return true }
func (j journal) WithGroup(string) slog.Handler            { return j }

func (j journal) WithAttrs(all []slog.Attr) slog.Handler {
	for _, a := range all {
		j.keep(a)
	}
	return j
}

func (j journal) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(j.keep)
	return nil
}

func (j journal) keep(a slog.Attr) bool {
	if text := a.Value.String(); strings.ContainsFunc(text, func(c rune) bool { return !strconv.IsPrint(c) }) {
		j.x.Errorf("in a log: %s=%q", a.Key, text)
	}
	j.x.logged.Add(1)
	return true
}

func (w *town) crossroads() *crossroads {
	w.Helper()
	x := &crossroads{town: w}
	log := slog.New(journal{x})
	agents, err := abac.ShortAny("connect", `principal has role && principal.role == "agent"`)
	if err != nil {
		w.Fatal(err)
	}
	x.s, _ = w.relay(func(s *relay.Server) {
		s.Logger, s.AllowConnect, s.Next = log, agents, map[string]relay.Hop{"b": {Addr: nextAddr}}
	})
	// Two outlets of one process.
	db := w.member(serves("db", "admin"))
	node := w.node()
	c := &relay.Client{Addr: relayAddr, Dial: w.net.Dial, Node: node, Self: db, Trust: w.trust()}
	for _, o := range []struct{ name, role, addr string }{{"db", "agent", outletAddr}, {"admin", "root", adminAddr}} {
		allow, err := abac.Short("open", o.name, fmt.Sprintf("principal.role == %q", o.role))
		if err != nil {
			w.Fatal(err)
		}
		s := &outlet.Server{Node: node, Name: o.name, Self: db, Trust: w.trust(), Allow: allow, Logger: log, Target: func(ctx context.Context, r *outlet.Request) (net.Conn, error) {
			x.visits.Add(1)
			return echoing(ctx, r)
		}}
		ready := make(chan struct{})
		near, far := w.listen(o.addr), c.Listen(o.name, func(s link.State) {
			if s.Kind == link.Ready {
				close(ready)
			}
		})
		w.run(func(ctx context.Context) error { return s.Serve(ctx, near) })
		w.run(func(ctx context.Context) error { return s.Serve(ctx, far) })
		defer func() { <-ready }()
	}
	w.run(c.Run)

	x.store, err = store.Open(filepath.Join(w.TempDir(), "store"))
	if err != nil {
		w.Fatal(err)
	}
	at := &authority.Server{Self: w.authority, Store: x.store, Node: w.node(), Logger: log}
	server := &link.Server{Services: map[channel.Kind]link.Service{channel.Authority: at.Service()}, Logger: log}
	ln := w.listen(authorityAddr)
	w.run(func(ctx context.Context) error {
		err := server.Serve(ctx, ln)
		at.Close()
		x.store.Close()
		return err
	})
	x.nodes = []*routing.Node{x.s.Node, node, at.Node}
	for _, n := range x.nodes {
		x.canary(n, "canary")
		x.canary(n, "db")
	}
	w.stops = append(w.stops, func() { // before the nodes are counted
		for _, a := range x.canaries {
			a.Stop(nil)
		}
	})
	return x
}

// addresses are those of every actor there is now.
func (x *crossroads) addresses() (all []routing.Address) {
	for _, n := range x.nodes {
		for at := range n.List() {
			all = append(all, at)
		}
	}
	return all
}

// names is everything that might be taken for one: names of outlets, of the authority
// and its questions, of hops, addresses of actors, and what is no name.
func (x *crossroads) names() []string {
	all := []string{"db", "admin", "authority", "enroll", "renew", "b", "nothing", "nothing/else", "", "DB", "../db", "db/", "/db", "db\x00", "db*", "*", "admin/*", "db\n", "db admin"}
	for _, at := range x.addresses() {
		all = append(all, string(at))
	}
	return append(all, "canary")
}

// bodies are header bodies: none, those of a relay's headers, and a message with a
// route.
func (x *crossroads) bodies() [][]byte {
	id := x.authority.ID()
	all := [][]byte{nil, make([]byte, 17), id[:]}
	return append(all, x.message("canary"))
}

// message is one to an actor, as nodes would write it.
func (x *crossroads) message(at routing.Address) []byte {
	x.Helper()
	route, err := routing.NewRoute(at, "db")
	if err != nil {
		x.Fatal(err)
	}
	b, err := (&routing.Message{Onward: route, Return: route, Body: []byte("open")}).AppendBinary(nil)
	if err != nil {
		x.Fatal(err)
	}
	return b
}

// quiet wants that nothing came anywhere since the last time: no target, no actor, no
// lane or name at the relay, no member of the authority.
func (x *crossroads) quiet(who string) {
	x.Helper()
	synctest.Wait()
	if n := x.visits.Swap(0); n != 0 {
		x.Errorf("%s: %d targets were dialled", who, n)
	}
	if n := x.reached.Swap(0); n != 0 {
		x.Errorf("%s: %d messages came to an actor", who, n)
	}
	if x.logged.Load() == 0 {
		x.Errorf("%s: nothing is logged", who)
	}
	x.until("no lane is left", func() bool { return x.s.Lanes() == 0 })
	for name, n := range map[string]int{"db": 1, "admin": 1, "authority": 0} {
		if got := x.s.Registrations(name); got != n {
			x.Errorf("%s: %d serve %s", who, got, name)
		}
	}
}

// answer is what a stream was told.
func answer(err error) string {
	if err == nil {
		return "admitted"
	}
	return fmt.Sprintf("%d %v", code(err), err)
}

// attack is a peer at one address, on channels of one kind.
type attack struct {
	*crossroads
	who, addr string
	kind      channel.Kind
	self      *identity.Self
	node      *routing.Node
	live      *link.Live
}

func (a *attack) dial() *link.Live {
	a.Helper()
	lane, err := a.net.Dial(context.Background(), "mem", a.addr)
	if err != nil {
		a.Fatal(err)
	}
	l, err := link.Dial(context.Background(), lane, &channel.Config{
		Node: a.node, Self: a.self, Trust: a.trust(), Kind: a.kind, Proofless: true, Judge: anybody,
	}, nil)
	if err != nil {
		return nil
	}
	synctest.Wait() // it may be ended as soon as we have said who we are
	if l.Err() != nil {
		return nil
	}
	return l
}

// open gives the answer to one header.
func (a *attack) open(h stream.Header) string {
	a.Helper()
	for {
		c, err := a.live.Mux.Open(h)
		if err == nil {
			err = c.Wait(context.Background())
			c.Reset(stream.CodeLocal, "")
		}
		time.Sleep(50 * time.Millisecond) // within what may be asked in a second
		if a.live.Err() == nil {
			return answer(err)
		}
		// An authority ends channels on which nothing comes of anything.
		if a.live = a.dial(); a.live == nil {
			a.Fatal("it does not become a channel again")
		}
	}
}

// Every kind of header with everything that might be a name, at every role, by whoever
// is not permitted: nothing is delivered, and one answer does for all names.
func TestNothingIsReachedByAHeaderThatNoPolicyPermits(t *testing.T) {
	guest := identity.Attributes{"name": "eve", "role": "guest", "serve": []string{"other"}}
	all := identity.Attributes{"name": "eve", "role": "guest", "team": "root", "admin": true, "serve": []string{"dba", "d/*", "admin/*"}}
	for _, target := range []struct {
		name string
		addr string
		kind channel.Kind
	}{
		{"an outlet", outletAddr, channel.Service}, {"another of its process", adminAddr, channel.Service},
		{"an authority", authorityAddr, channel.Authority}, {"a relay", relayAddr, channel.Relay},
	} {
		for who, self := range map[string]func(w *town) *identity.Self{
			"a stranger":             func(w *town) *identity.Self { return w.stranger() },
			"a foreign agent":        func(w *town) *identity.Self { return w.foreign(agent) },
			"a member":               func(w *town) *identity.Self { return w.member(identity.Attributes{}) },
			"a guest":                func(w *town) *identity.Self { return w.member(guest) },
			"a guest with much else": func(w *town) *identity.Self { return w.member(all) },
		} {
			t.Run(who+" at "+target.name, func(t *testing.T) {
				in(t, func(w *town) {
					x := w.crossroads()
					a := &attack{crossroads: x, who: who, addr: target.addr, kind: target.kind, self: self(w), node: w.node()}
					if a.live = a.dial(); a.live == nil {
						x.quiet(who)
						return
					}
					tried := 0
					defer func() { t.Logf("F-25: %d headers, nothing reached that no policy permits", tried) }()
					for _, kind := range kinds {
						for i, body := range x.bodies() {
							answers := make(map[string]string)
							for _, name := range x.names() {
								h := stream.Header{Kind: kind, Name: name, Body: body}
								begin := time.Now()
								got := a.open(h)
								tried++
								if x.mayAsk(target.kind, a.self, h) {
									continue
								}
								if d := time.Since(begin); d%(50*time.Millisecond) != 0 || d > 100*time.Millisecond {
									t.Errorf("%v is answered after %v", h, d)
								}
								if got == "admitted" {
									t.Errorf("%v is admitted", h)
								}
								if identity.ValidName(name) == nil && name != relay.AuthorityName {
									answers[got] = name
								}
							}
							if len(answers) > 1 && !(target.kind == channel.Authority && kind == stream.Request) {
								t.Errorf("kind %d with body %d: names have different answers: %v", kind, i, answers)
							}
						}
					}
					a.live.Close(nil)
					x.quiet(who)
				})
			})
		}
	}
}

// mayAsk is what anybody may, or any member: questions to an authority, and of a relay
// for one.
func (x *crossroads) mayAsk(kind channel.Kind, self *identity.Self, h stream.Header) bool {
	id := x.authority.ID()
	switch {
	case kind == channel.Authority:
		return h.Kind == stream.Request && h.Body == nil && (h.Name == "enroll" || h.Name == "renew")
	case kind == channel.Relay && h.Kind == stream.Connect:
		return h.Name == relay.AuthorityName && string(h.Body) == string(id[:])
	case kind == channel.Relay && h.Kind == stream.Names:
		return h.Name == "" && h.Body == nil && self.Credential() != nil
	}
	return false
}

// Whoever is permitted one name has that by the kinds that there are for it, and
// nothing else.
func TestWhoMayOpenOneNameReachesNothingElse(t *testing.T) {
	in(t, func(w *town) {
		x := w.crossroads()
		tried := 0
		defer func() { t.Logf("F-25: %d headers of one who may open one name: nothing else is reached", tried) }()
		for _, addr := range []string{outletAddr, adminAddr} {
			a := &attack{crossroads: x, addr: addr, kind: channel.Service, self: w.member(agent), node: w.node()}
			a.live = a.dial()
			for _, kind := range kinds {
				for _, body := range x.bodies() {
					for _, name := range x.names() {
						got := a.open(stream.Header{Kind: kind, Name: name, Body: body})
						tried++
						dials := int32(0)
						may := addr == outletAddr && name == "db" && body == nil && (kind == stream.Bytes || kind == stream.Probe || kind == stream.PingTarget)
						if may && kind != stream.Probe {
							dials = 1
						}
						if n := x.visits.Swap(0); (got == "admitted") != may || n != dials {
							t.Errorf("at %s kind %d for %q with %d bytes: %s, %d targets dialled", addr, kind, name, len(body), got, n)
						}
					}
				}
			}
			a.live.Close(nil)
		}
		x.quiet("an agent")
	})
}

// Frames that no stream has, with routes to every actor of every node: each ends the
// channel, none is delivered.
func TestNoFrameIsAMessage(t *testing.T) {
	for _, target := range []struct {
		name string
		addr string
		kind channel.Kind
	}{{"an outlet", outletAddr, channel.Service}, {"an authority", authorityAddr, channel.Authority}, {"a relay", relayAddr, channel.Relay}} {
		t.Run(target.name, func(t *testing.T) {
			in(t, func(w *town) {
				x := w.crossroads()
				a := &attack{crossroads: x, addr: target.addr, kind: target.kind, self: w.member(agent), node: w.node()}
				addresses, tried := x.addresses(), 0
				if !long() {
					addresses = addresses[:3]
				}
				for _, kind := range []byte{0x00, 0x07, 0x08, 0x0b, 0x0c, 0x0f, 0x17, 0x18, 0x7f, 0xff} {
					for _, of := range []uint32{0, 1} {
						for _, to := range append(addresses, "canary") {
							tried++
							if a.live = a.dial(); a.live == nil {
								t.Fatal("it does not become a channel")
							}
							body := x.message(to)
							frame := binary.BigEndian.AppendUint32([]byte{kind}, of)
							frame = append(binary.BigEndian.AppendUint16(frame, uint16(len(body))), body...)
							a.live.End.Control(uint64(kind), frame)
							select {
							case <-a.live.Done():
							case <-time.After(time.Second):
								t.Errorf("the channel goes on behind a frame of kind %#x on stream %d", kind, of)
								a.live.Close(nil)
							}
						}
					}
				}
				x.quiet("frames")
				t.Logf("F-25: %d frames that no stream has, nothing reached", tried)
			})
		})
	}
}

// A raw connection reaches the handshake of its own, whatever it begins with.
func TestARawConnectionReachesOnlyItsHandshake(t *testing.T) {
	in(t, func(w *town) {
		x := w.crossroads()
		direct := func(addr string) func() net.Conn {
			return func() net.Conn {
				c, err := w.net.Dial(context.Background(), "mem", addr)
				if err != nil {
					t.Fatal(err)
				}
				return c
			}
		}
		bot := w.client(w.member(agent), nil)
		tried := 0
		defer func() { t.Logf("F-25: %d raw connections, nothing reached", tried) }()
		for name, dial := range map[string]func() net.Conn{
			"an outlet's": direct(outletAddr), "an authority's": direct(authorityAddr), "a relay's": direct(relayAddr),
			"a lane to an outlet": func() net.Conn {
				time.Sleep(50 * time.Millisecond) // within what may be asked in a second
				c, err := bot.Lane(context.Background(), "db", identity.ID{})
				if err != nil {
					t.Fatal(err)
				}
				return c.(*channel.Lane).Conn
			},
		} {
			for _, kind := range []channel.Kind{0, channel.Relay, channel.Service, channel.Authority, 4, channel.KindLane, channel.Carrier, channel.Hop, 19, 255} {
				for _, said := range x.sayings() {
					c := dial()
					tried++
					preface := channel.Preface{Kind: kind, ID: [16]byte{1}}
					if kind < channel.KindLane {
						preface = channel.Preface{Kind: kind, Suite: channel.AESGCM}
					}
					c.Write(append(preface.Append(nil), said...))
					begin := time.Now()
					b, _ := io.ReadAll(c)
					if d := time.Since(begin); d > 10*time.Second {
						t.Errorf("%s: a connection of kind %v lasts for %v", name, kind, d)
					}
					if len(b) != 0 {
						t.Errorf("%s: a connection of kind %v is answered with %d bytes", name, kind, len(b))
					}
					stream.Abort(c)
				}
			}
		}
		x.quiet("raw connections")
	})
}

// sayings are what a raw connection goes on with: messages to actors, frames, records,
// lengths that lie.
func (x *crossroads) sayings() [][]byte {
	all := [][]byte{nil, []byte("GET / HTTP/1.1\r\nHost: db\r\n\r\n"), {0xff, 0xff}, make([]byte, 2+1232)}
	for _, at := range append(x.addresses(), "canary", "db") {
		m := x.message(at)
		record := append(binary.BigEndian.AppendUint16(nil, uint16(7+len(m))), 0x17, 0, 0, 0, 0)
		record = append(binary.BigEndian.AppendUint16(record, uint16(len(m))), m...)
		open := append(binary.BigEndian.AppendUint16([]byte{0x10, 0, 0, 0, 1}, 12), "\x01\x00\x00\x00\x00\x00\x01\x00\x00\x02db"...)
		all = append(all, m, record, open)
	}
	return all
}

// An outlet that an inlet has come to opens nothing at the inlet.
func TestAnInletTakesNothingFromItsOutlet(t *testing.T) {
	in(t, func(w *town) {
		db := w.member(serves("db"))
		lives := make(chan *link.Live, 64)
		server := &link.Server{Services: map[channel.Kind]link.Service{channel.Service: {
			Config: channel.Config{Node: w.node(), Self: db, Trust: w.trust(), Judge: anybody},
			Accept: func(_ *link.Live, in *stream.Incoming) { in.Accept().Close() },
			Opened: func(l *link.Live) { lives <- l },
		}}}
		ln := w.listen(outletAddr)
		w.run(func(ctx context.Context) error { return server.Serve(ctx, ln) })
		x := &crossroads{town: w}
		bot := &inlet.Server{Node: w.node(), Name: "db", Self: w.member(agent), Trust: w.trust(), Paths: []inlet.Path{{Name: "direct", Dial: func(ctx context.Context) (net.Conn, error) {
			return w.net.Dial(ctx, "mem", outletAddr)
		}}}}
		x.nodes = []*routing.Node{bot.Node}
		x.canary(bot.Node, "canary")
		w.run(bot.Run)
		l := <-lives
		a := &attack{crossroads: x, live: l}
		answers := make(map[string]bool)
		for _, kind := range kinds {
			for _, body := range [][]byte{nil, make([]byte, 17), x.message("canary")} {
				for _, name := range x.names() {
					answers[a.open(stream.Header{Kind: kind, Name: name, Body: body})] = true
				}
			}
		}
		if len(answers) != 1 || answers["admitted"] {
			t.Errorf("the answers were %v", answers)
		}
		m := x.message("canary")
		l.End.Control(0x17, append(binary.BigEndian.AppendUint16([]byte{0x17, 0, 0, 0, 0}, uint16(len(m))), m...))
		<-l.Done()
		if n := x.reached.Load(); n != 0 {
			t.Errorf("%d messages came to an actor", n)
		}
		for _, c := range x.canaries {
			c.Stop(nil)
		}
	})
}
