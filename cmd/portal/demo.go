package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/authority"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/store"
	"github.com/portal-tunnel/portal/outlet"
	"github.com/portal-tunnel/portal/relay"
	"github.com/portal-tunnel/portal/routing"
)

type demoOptions struct {
	log *slog.Logger // nil: discard
}

const (
	demoName   = "orders-db"
	demoPolicy = `principal.role == "agent"`
	demoCanary = "the salary of row 7"
	demoTime   = 30 * time.Second // each step is a matter of milliseconds
)

// runDemo shows the whole path in this process, on loopback and in a temporary
// home, and proves each step while it runs.
func runDemo(ctx context.Context, s *session, o demoOptions) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, demoTime, errors.New("nothing moved for too long"))
	defer cancel()
	dir, err := os.MkdirTemp("", "portal-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if o.log == nil {
		o.log = slog.New(slog.DiscardHandler)
	}
	d := &demo{s: s, dir: dir, log: o.log}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		stop()
		d.all.Wait()
		for i := len(d.ends) - 1; i >= 0; i-- {
			d.ends[i]()
		}
	}()
	for _, step := range []struct {
		name string
		do   func(ctx, run context.Context) error
	}{
		{"authority", d.startAuthority},
		{"relay", d.startRelay},
		{"outlet", d.startOutlet},
		{"inlet", d.startInlets},
		{"alice", d.aliceIsAnswered},
		{"mallory", d.malloryIsRefused},
		{"relay", d.relayIsBlind},
		{"cut", d.cutIsAReset},
		{"back", d.backAgain},
	} {
		if err := step.do(ctx, run); err != nil {
			if ctx.Err() != nil {
				err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
			}
			return fail(codeFailed, "", "demo: %s: %w", step.name, err)
		}
	}
	return nil
}

// A demo is one run: what it has started, in that order.
type demo struct {
	s   *session
	dir string
	log *slog.Logger

	lines int
	all   sync.WaitGroup // what runs until the end
	ends  []func()       // what is closed after that, the last first

	self      *identity.Self // the authority
	authority *authority.Server
	at        string // where it answers
	target    net.Listener
	outlet    *outlet.Server
	relay     *identity.Self
	wire      *wire  // in front of the relay
	stopRelay func() // kills it, and waits
	alice     *inlet.Server
	door      string // alice's inlet
	mallory   *inlet.Server
	states    chan inlet.State // mallory's
}

// line prints a numbered part that now runs.
func (d *demo) line(format string, args ...any) error {
	d.lines++
	return d.s.print("%3d %s\n", d.lines, fmt.Sprintf(format, args...))
}

// ok prints what has just been seen to be true.
func (d *demo) ok(what, format string, args ...any) error {
	return d.s.print("ok  %-8s %s\n", what, fmt.Sprintf(format, args...))
}

func (d *demo) later(end func()) { d.ends = append(d.ends, end) }

func (d *demo) listen(ctx context.Context) (net.Listener, error) {
	return new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
}

func (d *demo) startAuthority(ctx, run context.Context) error {
	h, err := identity.Open(filepath.Join(d.dir, "authority"))
	if err != nil {
		return err
	}
	if d.self, err = h.Authority(true); err != nil {
		return err
	}
	st, err := store.Open(storePath(h))
	if err != nil {
		return err
	}
	d.later(func() { st.Close() })
	node := &routing.Node{Logger: d.log}
	d.later(func() { node.Close() })
	d.authority = &authority.Server{Self: d.self, Store: st, Node: node, Logger: d.log}
	d.later(func() { d.authority.Close() })
	ln, err := d.listen(ctx)
	if err != nil {
		return err
	}
	d.at = ln.Addr().String()
	links := &link.Server{Services: map[channel.Kind]link.Service{channel.Authority: d.authority.Service()}, Logger: d.log}
	d.all.Go(func() { links.Serve(run, ln) })
	return d.line("%-10s %s  issues credentials", "authority", d.self.ID().Short())
}

// startRelay starts a relay behind the wire that looks at what it carries.
func (d *demo) startRelay(ctx, run context.Context) error {
	h, err := identity.Open(filepath.Join(d.dir, "relay"))
	if err != nil {
		return err
	}
	if d.relay, err = h.Self(); err != nil {
		return err
	}
	ln, err := d.listen(ctx)
	if err != nil {
		return err
	}
	d.wire = &wire{to: ln.Addr().String(), lanes: make(map[net.Conn]bool)}
	d.serveRelay(run, ln)
	front, err := d.listen(ctx)
	if err != nil {
		return err
	}
	d.all.Go(func() { d.wire.serve(run, front) })
	d.wire.at = front.Addr().String()
	return d.line("%-10s %s  %s  passes sealed bytes", "relay", d.wire.at, d.relay.ID().Short())
}

func (d *demo) serveRelay(run context.Context, ln net.Listener) {
	node := &routing.Node{Logger: d.log}
	server := &relay.Server{Node: node, Self: d.relay, Trust: identity.NewTrust(d.self.ID()), Logger: d.log}
	life, kill := context.WithCancel(run)
	ended := make(chan struct{})
	d.all.Go(func() {
		defer close(ended)
		server.Serve(life, ln)
		node.Close()
	})
	d.stopRelay = func() {
		d.wire.cut()
		kill()
		<-ended
	}
}

func (d *demo) way() identity.Way { return identity.Way{ID: d.relay.ID(), Addr: d.wire.at} }

// enroll makes a member with a home of its own, by a ticket.
func (d *demo) enroll(ctx context.Context, name string, g authority.Grant) (*member, error) {
	g.Name, g.Ways = name, []identity.Way{{Addr: d.at}}
	ticket, err := d.authority.CreateTicket(ctx, g)
	if err != nil {
		return nil, err
	}
	h, err := identity.Open(filepath.Join(d.dir, name))
	if err != nil {
		return nil, err
	}
	self, err := h.Self()
	if err != nil {
		return nil, err
	}
	m := &member{home: h, self: self, trust: identity.NewTrust(d.self.ID()), node: &routing.Node{Logger: d.log}}
	m.relays = newRelays(m.node, self, m.trust, d.log)
	d.later(m.close)
	m.client = &authority.Client{Node: m.node, Self: self, Trust: m.trust, Home: h, Logger: d.log}
	_, err = m.client.Enroll(ctx, ticket)
	return m, err
}

func (d *demo) startOutlet(ctx, run context.Context) error {
	m, err := d.enroll(ctx, "db1", authority.Grant{Serve: []string{demoName}})
	if err != nil {
		return err
	}
	if d.target, err = d.listen(ctx); err != nil {
		return err
	}
	d.all.Go(func() { demoService(run, d.target) })
	allow, err := abac.Short("open", demoName, demoPolicy)
	if err != nil {
		return err
	}
	d.outlet = &outlet.Server{
		Node: m.node, Name: demoName, Target: outlet.TCP(d.target.Addr().String()), Self: m.self, Trust: m.trust, Allow: allow, Logger: d.log,
	}
	lanes := m.relays.client(d.way()).Listen(demoName, nil)
	d.all.Go(func() { d.outlet.Serve(run, lanes) })
	return d.line("%-10s %s -> %s (a demo service)  allow: %s", "outlet", demoName, d.target.Addr(), demoPolicy)
}

func (d *demo) startInlets(ctx, run context.Context) error {
	d.states = make(chan inlet.State, 16)
	for _, who := range []struct {
		name, role string
	}{{"alice", "agent"}, {"mallory", "guest"}} {
		m, err := d.enroll(ctx, who.name, authority.Grant{Attributes: identity.Attributes{"role": who.role}})
		if err != nil {
			return err
		}
		way := &route{relays: []hops{{d.way()}}}
		server := way.inlet(demoName, m, d.log)
		ln, err := d.listen(ctx)
		if err != nil {
			return err
		}
		if who.name == "alice" {
			d.alice, d.door = server, ln.Addr().String()
		} else {
			d.mallory = server
			server.OnState = func(state inlet.State) {
				select {
				case d.states <- state:
				default:
				}
			}
		}
		d.all.Go(func() { server.Run(run) })
		d.all.Go(func() { server.Serve(run, ln) })
		if err := d.line("%-10s %s -> %s  as %-8s role=%s", "inlet", ln.Addr(), demoName, who.name, who.role); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) dial(ctx context.Context) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", d.door)
	if err == nil {
		deadline, _ := ctx.Deadline()
		c.SetDeadline(deadline)
	}
	return c, err
}

func (d *demo) echo(ctx context.Context, text string) error {
	c, err := d.dial(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, "echo\n"+text); err != nil {
		return err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	got, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	if string(got) != text {
		return fmt.Errorf("%d bytes came back, and not the %d that were sent", len(got), len(text))
	}
	return nil
}

func (d *demo) aliceIsAnswered(ctx, _ context.Context) error {
	if err := d.echo(ctx, demoCanary); err != nil {
		return err
	}
	return d.ok("alice", "sent %q and got it back through the relay", demoCanary)
}

func (d *demo) malloryIsRefused(ctx, _ context.Context) error {
	for {
		select {
		case state := <-d.states:
			if state.Kind == link.Ready {
				return errors.New("was let in")
			}
			if state.Kind != link.Refused {
				continue
			}
			f := classify(state.Err)
			if f.code != codeRefused {
				return f
			}
			if _, err := d.mallory.Dial(ctx); err == nil {
				return errors.New("was let in after a refusal")
			}
			return d.ok("mallory", "refused by outlet %s: %s (%s)", demoName, reasonText(state.Err), f.code)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (d *demo) relayIsBlind(context.Context, context.Context) error {
	n, found := d.wire.search([]byte("salary"))
	if found {
		return errors.New(`the relay saw "salary" in clear`)
	}
	if n == 0 {
		return errors.New("it carried nothing")
	}
	return d.ok("relay", `carried %s bytes; "salary" is nowhere in them`, thousands(n))
}

// cutIsAReset kills the relay in the middle of a download, in the way that deceives
// most tunnels: with a clean end.
func (d *demo) cutIsAReset(ctx, _ context.Context) error {
	c, err := d.dial(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, "download\n"); err != nil {
		return err
	}
	const first = 1 << 20
	var got int64
	check := func(b []byte) error {
		for i := range b {
			if b[i] != demoByte(got+int64(i)) {
				return fmt.Errorf("byte %d of the download is wrong", got+int64(i))
			}
		}
		got += int64(len(b))
		return nil
	}
	b := make([]byte, 64<<10)
	for cut := false; ; {
		n, err := c.Read(b)
		if wrong := check(b[:n]); wrong != nil {
			return wrong
		}
		switch {
		case errors.Is(err, io.EOF):
			return fmt.Errorf("the download ended like a complete one after %d bytes", got)
		case errors.Is(err, syscall.ECONNRESET):
			if !cut {
				return fmt.Errorf("reset before the cut: %w", err)
			}
			return d.ok("cut", "relay killed in mid-download: alice read an exact prefix (%s bytes), then a reset, not an end of file", thousands(got))
		case err != nil:
			return err
		}
		if got >= first && !cut {
			cut = true
			d.stopRelay()
		}
	}
}

func (d *demo) backAgain(ctx, run context.Context) error {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", d.wire.to)
	if err != nil {
		return err
	}
	d.serveRelay(run, ln)
	if err := d.echo(ctx, demoCanary); err != nil {
		return err
	}
	return d.ok("back", "relay started again: alice's next connection works, nothing else restarted")
}

// demoByte is byte n of the download.
func demoByte(n int64) byte { return byte(n * 167 >> 3) }

// demoService is the private service: it reads a line, and then echoes what
// follows, or sends a download that does not end.
func demoService(ctx context.Context, ln net.Listener) {
	var all sync.WaitGroup
	defer all.Wait()
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		all.Go(func() {
			defer c.Close()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			r := bufio.NewReader(c)
			switch line, _ := r.ReadString('\n'); line {
			case "echo\n":
				io.Copy(c, r)
			case "download\n":
				b := make([]byte, 64<<10)
				for n := int64(0); ; n += int64(len(b)) {
					for i := range b {
						b[i] = demoByte(n + int64(i))
					}
					if _, err := c.Write(b); err != nil {
						return
					}
				}
			}
		})
	}
}

// A wire stands before the relay and sees what the relay sees. It copies bytes,
// looks at them, and can be cut.
type wire struct {
	at, to string

	mu    sync.Mutex
	lanes map[net.Conn]bool // both ends of each; the value is not used
	seen  bytes.Buffer      // the first wireSeen bytes, for the search
	n     atomic.Int64
}

// wireSeen is more than the demo carries before it searches.
const wireSeen = 1 << 20

func (w *wire) serve(ctx context.Context, ln net.Listener) {
	var all sync.WaitGroup
	defer all.Wait()
	defer context.AfterFunc(ctx, func() { ln.Close(); w.cut() })()
	for {
		in, err := ln.Accept()
		if err != nil {
			return
		}
		out, err := new(net.Dialer).DialContext(ctx, "tcp", w.to)
		if err != nil {
			in.Close()
			continue
		}
		w.mu.Lock()
		w.lanes[in], w.lanes[out] = true, true
		w.mu.Unlock()
		if ctx.Err() != nil {
			w.cut()
		}
		for _, way := range [][2]net.Conn{{in, out}, {out, in}} {
			all.Go(func() {
				io.Copy(way[0], io.TeeReader(way[1], w))
				way[0].Close()
				way[1].Close()
				w.mu.Lock()
				delete(w.lanes, way[0])
				delete(w.lanes, way[1])
				w.mu.Unlock()
			})
		}
	}
}

// Write looks at bytes on their way.
func (w *wire) Write(b []byte) (int, error) {
	w.n.Add(int64(len(b)))
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen.Write(b[:min(len(b), wireSeen-w.seen.Len())])
	return len(b), nil
}

// search looks for text in what went over the wire.
func (w *wire) search(text []byte) (n int64, found bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.n.Load(), bytes.Contains(w.seen.Bytes(), text)
}

// cut ends every lane as if the other end had closed it in good order.
func (w *wire) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.lanes {
		c.Close()
	}
}

// thousands is 4212 as "4,212".
func thousands(n int64) string {
	text := fmt.Sprint(n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
