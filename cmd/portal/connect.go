package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
)

// `portal connect`: inlets for the life of one command, or, without one, a stream
// on stdin and stdout (connect_stream.go). How CMD finds the inlets is in
// connect_env.go.
//
// The terminal is CMD's. It is in our process group, so what is typed there, ^C
// and ^\, reaches it without us, and SIGINT and SIGQUIT do nothing here while it
// runs; SIGTERM and SIGHUP, which are sent to us alone, are handed on. A line is
// printed only when there is trouble, and when that is over.
//
// The order of the end: CMD, then its streams, then the sockets and their
// directories, the channels, the process.

const connectUsage = `portal connect orders-db --kind pg -- psql -U reader orders
portal connect orders-db --env 'DATABASE_URL=postgres://reader@{addr}/orders' -- ./migrate
portal connect orders-db,cache -- ./app
ssh -o ProxyCommand='portal connect ssh-db1' db1

CMD starts when an outlet of every name lets this member in; otherwise portal exits with 3 (refused)
or 4 (not there within --timeout), and CMD never starts. Then the exit status is CMD's own, 128+N when
signal N ended it. SIGTERM and SIGHUP are handed on to CMD; stdin, stdout, stderr and what is typed at
the terminal are its own. While it runs portal prints only that a name cannot be reached, or is
refused, and when that is over.

CMD finds the first name in PORTAL_ADDR, PORTAL_HOST and PORTAL_PORT, a port of 127.0.0.1, and every
name in PORTAL_<NAME>_ADDR, _HOST and _PORT: orders-db is PORTAL_ORDERS_DB_ADDR. In the value of --env
{addr}, {host} and {port} are the first name's, {cache.addr} and so on those of cache; {{ and }} are
braces. Variables that hold a ticket, and NOTIFY_SOCKET, are taken out of CMD's environment.

With --kind pg each name has a Unix socket in a directory that only this user can enter. HOST is that
directory, PORT is 5432, and ADDR is both in the form that stands in a postgres:// URL; PGHOST and PGPORT
are the first name's, and PGHOSTADDR and PGSERVICE, which would lead elsewhere, are taken out.

Without CMD stdin and stdout are the stream. The end of stdin ends that direction, the outlet's end
ends stdout (and all of it when stdin is a terminal); the exit status is 0 when both have ended and
the outlet has all of stdin, and 1 when the stream was cut.

There is no -o json: stdout is CMD's, or the stream's.`

const (
	// lastWords is how long streams may go on that are left when CMD ends: those
	// that their clients have closed have their last bytes on the way. The rest is
	// reset.
	lastWords = 500 * time.Millisecond
	// leaveTime is how long the end of the process waits for its channels to close.
	// Nothing is in them any more.
	leaveTime = time.Second
)

type connectOptions struct {
	member  memberOptions
	way     wayOptions
	list    string // of names, with commas between
	kind    string
	setting []string // --env
	timeout time.Duration
	command []string // nil: stdin and stdout are the stream
}

// connectPlan is what the options say, checked; nothing has been done yet.
type connectPlan struct {
	connectOptions
	names  []string
	route  *route
	speaks inlet.Kind
	path   string // of the command
	set    []setting
}

// lend is the Action of a command whose stdin and stdout are another's.
func (s *session) lend(least, most int, do action) cli.ActionFunc {
	return func(c *cli.Context) error {
		if err := arguments(c, s, least, most); err != nil {
			return err
		}
		if err := s.begin(c, "warn"); err != nil {
			return err
		}
		if s.json {
			return fail(codeUsage, "leave it out", "connect: -o json: stdout is the command's, or the stream's")
		}
		return do(c.Context, c)
	}
}

func (o connectOptions) plan() (*connectPlan, error) {
	p := &connectPlan{connectOptions: o, names: strings.Split(o.list, ",")}
	seen := make(map[string]string)
	for _, name := range p.names {
		if err := validName(name); err != nil {
			return nil, err
		}
		v := nameVariable(name)
		switch other, again := seen[v]; {
		case again && other == name:
			return nil, fail(codeUsage, "once is enough", "connect: the name %s stands there twice", name)
		case again:
			return nil, fail(codeUsage, "leave out one of them; or portal connect "+other+" --env VAR={addr} -- portal connect "+name+" -- CMD",
				"connect: the names %s and %s would share the variable %s", other, name, v+"ADDR")
		}
		seen[v] = name
	}
	var err error
	if p.speaks, err = inlet.ParseKind(o.kind); err != nil {
		return nil, fail(codeUsage, "raw, pg or http", "there is no --kind %q", plain(o.kind))
	}
	if o.command == nil {
		const both = "connect: without -- CMD stdin and stdout are the stream"
		switch {
		case len(p.names) > 1:
			return nil, fail(codeUsage, "give one name, or a command behind --", both+" of one name, not of %d", len(p.names))
		case p.speaks != inlet.Raw:
			return nil, fail(codeUsage, "leave out --kind, or give a command behind --", both+", and a refusal is the exit status: there is no --kind %s", o.kind)
		case len(o.setting) > 0:
			return nil, fail(codeUsage, "leave out --env, or give a command behind --", both+": nobody has the variables of --env")
		}
	} else if p.path, err = exec.LookPath(o.command[0]); err != nil {
		return nil, fail(codeUsage, "", "connect: its command: %w", err)
	}
	if p.set, err = parseSettings(o.setting, p.names); err != nil {
		return nil, err
	}
	if p.route, err = o.way.plan("connect", p.names[0]); err != nil {
		return nil, err
	}
	return p, atLeast("timeout", o.timeout, time.Millisecond)
}

// A door is the inlet of one name.
type door struct {
	name             string
	server           *inlet.Server
	lns              []net.Listener // none: stdin and stdout are the stream
	dir              string         // the private one that holds its socket; "" for a port
	host, port, addr string         // as CMD finds it; addr as in a URL

	t    *teller
	told bool // of trouble, which is not over; OnState's
}

// connection is one run of the command.
type connection struct {
	*session
	*connectPlan
	member  *member
	doors   []*door
	changed chan struct{} // one slot: a door's state did
	running atomic.Bool   // CMD is

	work  context.Context // of what runs behind the doors
	stop  context.CancelFunc
	ended chan error // of it; nil before it began
}

func runConnect(ctx context.Context, s *session, o connectOptions) error {
	p, err := o.plan()
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 4)
	hear(signals, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)
	surviveReaders()

	m, err := s.memberFor(ctx, p.route, o.member)
	if err != nil {
		return err
	}
	c := &connection{session: s, connectPlan: p, member: m, changed: make(chan struct{}, 1)}
	c.work, c.stop = context.WithCancel(context.WithoutCancel(ctx))
	defer c.leave()
	if err := c.open(ctx); err != nil {
		return err
	}
	defer s.visible(m.home, c.entries()...)()
	if err := c.until(ctx, signals, c.begin); err != nil {
		return err
	}
	if o.command == nil {
		return c.until(ctx, signals, c.stream)
	}
	select {
	case sig := <-signals: // the last moment in which it is for us
		return afterSignal(sig)
	default:
	}
	return c.run(ctx, signals)
}

// until does what ends by itself, or by a signal.
func (c *connection) until(ctx context.Context, signals <-chan os.Signal, do func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- do(ctx) }()
	select {
	case err := <-done:
		return err
	case sig := <-signals:
		cancel()
		<-done
		return afterSignal(sig)
	}
}

// afterSignal is the exit status of what a signal ended.
func afterSignal(sig os.Signal) error {
	if sig == syscall.SIGINT {
		return exitStatus(exitInterrupted)
	}
	return exitStatus(exitFailed)
}

// open makes the doors; those of a command listen.
func (c *connection) open(ctx context.Context) error {
	for _, name := range c.names {
		d := &door{name: name, server: c.route.inlet(name, c.member, c.log), t: c.teller("connect", name)}
		d.t.notified = true // the service manager is told when CMD runs
		d.server.Kind = c.speaks
		d.server.OnState = func(state inlet.State) {
			d.tell(state, c.running.Load())
			select {
			case c.changed <- struct{}{}:
			default:
			}
		}
		c.doors = append(c.doors, d)
	}
	c.room.doors(c.doors)
	if c.command == nil {
		return nil
	}
	for _, d := range c.doors {
		if err := d.listen(ctx, c.speaks, c.env); err != nil {
			return err
		}
	}
	return nil
}

// entries are what `portal status` sees.
func (c *connection) entries() (all []entry) {
	for _, d := range c.doors {
		e := entry{t: d.t, self: c.member.self, address: addresses(d.lns)}
		if c.command != nil {
			e.streams = d.server.Streams
		}
		all = append(all, e)
	}
	return all
}

// tell prints a state that matters to whoever waits, or works with CMD: trouble,
// and that it is over. A refusal before CMD runs is the error that ends the
// command.
func (d *door) tell(state inlet.State, running bool) {
	quiet := false
	switch state.Kind {
	case link.Ready:
		quiet, d.told = !d.told, false
	case link.Refused:
		quiet = !running
		d.told = d.told || running
	case link.Waiting:
		d.told = true
	}
	d.t.hush(quiet)
	d.t.inlet(state)
}

// begin becomes a member when there is a ticket, starts the inlets and waits for
// all of them, --timeout for both.
func (c *connection) begin(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	if err := c.member.join(ctx, c.teller("connect", c.names[0])); err != nil {
		return err
	}
	parts := []func(context.Context) error{c.member.client.Run, c.member.follow}
	for _, d := range c.doors {
		parts = append(parts, d.server.Run)
		for _, ln := range d.lns {
			parts = append(parts, func(ctx context.Context) error { return d.server.Serve(ctx, ln) })
		}
	}
	c.ended = make(chan error, 1)
	go func() { c.ended <- together(c.work, parts...) }()
	return c.ready(ctx)
}

// ready waits until an outlet of every name lets this member in.
func (c *connection) ready(ctx context.Context) error {
	for {
		var late *door
		for _, d := range c.doors {
			switch state := d.server.State(); {
			case state.Kind == link.Refused:
				return c.refused(d, state.Err)
			case state.Kind != link.Ready && late == nil:
				late = d
			}
		}
		if late == nil {
			return nil
		}
		select {
		case <-c.changed:
		case <-ctx.Done():
			return c.late(ctx, late)
		}
	}
}

func (c *connection) refused(d *door, err error) error {
	if len(c.names) > 1 && len(c.way.direct) > 0 {
		f := classify(err)
		return fail(f.code, "what listens at an address of --direct serves one name: portal connect "+c.names[0]+" --direct … -- portal connect "+c.names[1]+" --direct … -- CMD; or --relay",
			"outlet %s: %w", d.name, err)
	}
	return fmt.Errorf("outlet %s: %w", d.name, err)
}

// late is why a name is not there, ctx being over.
func (c *connection) late(ctx context.Context, d *door) error {
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return context.Cause(ctx)
	}
	state := d.server.State()
	switch {
	case state.Err == nil:
		return fail(codeUnreachable, remedyWithin(c.timeout, c.way), "outlet %s: neither a channel nor a decision within %s", d.name, c.timeout)
	case state.Peer == nil:
		return fail(codeUnreachable, remedyFor(state.Err), "outlet %s: no channel within %s: %w", d.name, c.timeout, state.Err)
	case classify(state.Err).code.exit() == exitRefused: // its answer: a credential is over
		return c.refused(d, state.Err)
	}
	return fail(codeUnreachable, "see the outlet's log", "outlet %s: no decision of its policy within %s: %w", d.name, c.timeout, state.Err)
}

// run is the life of CMD.
func (c *connection) run(ctx context.Context, signals <-chan os.Signal) error {
	cmd := &exec.Cmd{
		Path: c.path, Args: c.command, Env: c.environment(c.env),
		Stdin: c.stdin, Stdout: c.stdout, Stderr: os.Stderr,
	}
	c.running.Store(true)
	c.stderr.Flush() // from now on the terminal is CMD's
	if err := cmd.Start(); err != nil {
		remedy := ""
		if errors.Is(err, syscall.ENOEXEC) {
			remedy = "a script begins with #!/bin/sh, or is given to one: sh " + plain(c.command[0])
		}
		return fail(codeUsage, remedy, "connect: starting its command: %w", err)
	}
	c.notify("READY=1")
	over := make(chan error, 1)
	go func() { over <- cmd.Wait() }()
	broken, done := c.ended, ctx.Done()
	for {
		select {
		case err := <-over:
			return exitOf(cmd.ProcessState, err)
		case sig := <-signals:
			if sig == syscall.SIGTERM {
				c.notify("STOPPING=1")
			}
			if sig == syscall.SIGTERM || sig == syscall.SIGHUP {
				cmd.Process.Signal(sig) // one that has ended is told nothing
			}
		case <-done:
			cmd.Process.Signal(syscall.SIGTERM)
			done = nil
		case err := <-broken: // CMD is not ours to end; its next connection is refused
			c.report(err)
			broken = nil
			c.ended <- nil // for leave
		}
	}
}

// exitOf is how a command ended, as a shell puts it.
func exitOf(state *os.ProcessState, err error) error {
	if state == nil {
		return fmt.Errorf("connect: waiting for its command: %w", err)
	}
	status, ok := state.Sys().(syscall.WaitStatus)
	switch {
	case ok && status.Signaled():
		return exitStatus(128 + int(status.Signal()))
	case state.ExitCode() != 0:
		return exitStatus(state.ExitCode())
	case err != nil && !errors.As(err, new(*exec.ExitError)):
		return fmt.Errorf("connect: waiting for its command: %w", err)
	}
	return nil
}

// leave resets the streams that are left, removes what was made, and closes the
// channels.
func (c *connection) leave() {
	if c.ended != nil {
		patience, cancel := context.WithTimeout(context.Background(), lastWords)
		defer cancel()
		var all sync.WaitGroup
		for _, d := range c.doors {
			all.Go(func() {
				d.taken(patience)
				d.server.Drain(patience)
			})
		}
		all.Wait()
	}
	for _, d := range c.doors {
		d.close()
	}
	left := make(chan struct{})
	go func() {
		defer close(left)
		c.stop()
		if c.ended != nil {
			<-c.ended
		}
		c.member.close()
	}()
	t := time.NewTimer(leaveTime)
	defer t.Stop()
	select {
	case <-left:
	case <-t.C:
	}
}

// listen opens the door on a free port of 127.0.0.1, or on a Unix socket in a
// directory of its own.
func (d *door) listen(ctx context.Context, kind inlet.Kind, env environment) (err error) {
	at := listenAddress{text: "127.0.0.1:0", hosts: []string{"127.0.0.1"}}
	if kind == inlet.PG {
		if d.dir, err = privateDir(env); err != nil {
			return err
		}
		at = listenAddress{path: d.dir + "/" + pgSocket}
	}
	if d.lns, err = at.listen(ctx, socketOptions{}); err != nil {
		return err
	}
	if kind == inlet.PG {
		d.host, d.port = d.dir, pgPort
		d.addr = strings.ReplaceAll(d.dir, "/", "%2F") + ":" + pgPort
		return nil
	}
	d.addr = d.lns[0].Addr().String()
	d.host, d.port, err = net.SplitHostPort(d.addr)
	return err
}

// taken waits until no connection is left with the kernel: closing a listener
// resets those that CMD made, wrote and left in its last moment.
func (d *door) taken(ctx context.Context) {
	for _, ln := range d.lns {
		raw, err := ln.(syscall.Conn).SyscallConn()
		for pending := true; pending && err == nil && ctx.Err() == nil; {
			err = raw.Control(func(fd uintptr) {
				p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
				n, err := unix.Poll(p, 0)
				pending = err == unix.EINTR || n > 0
			})
			if pending {
				pause(ctx, time.Millisecond)
			}
		}
	}
}

func (d *door) close() {
	closeAll(d.lns)
	if d.dir != "" {
		os.RemoveAll(d.dir)
	}
}
