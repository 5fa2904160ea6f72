// Package walk is what the examples have in common: portal typed as people would on several
// hosts, each with a home of its own, and a numbered line for everything that was proved.
package walk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/portal-tunnel/portal/tests/process"
)

const (
	// whole bounds a walk: a cold build of portal is most of it.
	whole = 5 * time.Minute
	// patience is how long a line that must come may take.
	patience = 30 * time.Second
	// stopWithin is how long a portal without streams may take to end.
	stopWithin = 10 * time.Second
)

// Main is the main function of an example. It exits 0 when all that the example claims held, else 1.
func Main(name string, run func(ctx context.Context, out io.Writer) error) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, whole)
	defer cancel()
	if err := run(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, name+" example:", err)
		os.Exit(1)
	}
}

// A Walk is one run of an example.
type Walk struct {
	Portal *process.Portal

	dir   string // the binary, and a home for each host
	out   io.Writer
	lines int
	stops []func() error // in the order of the starts
}

// Run builds portal and takes the steps. What was started is gone when it returns, the last one
// first; that portal did not end with status 0 is an error too.
func Run(ctx context.Context, out io.Writer, steps func(context.Context, *Walk) error) (err error) {
	w := &Walk{out: out}
	if w.dir, err = os.MkdirTemp("", "portal-example-"); err != nil {
		return err
	}
	defer func() {
		for i := len(w.stops) - 1; i >= 0; i-- {
			err = errors.Join(err, w.stops[i]())
		}
		err = errors.Join(err, os.RemoveAll(w.dir))
	}()
	if w.Portal, err = process.BuildPortal(ctx, w.dir); err != nil {
		return err
	}
	return steps(ctx, w)
}

// Say prints a numbered line: what has just been checked.
func (w *Walk) Say(format string, args ...any) {
	w.lines++
	fmt.Fprintf(w.out, "%3d  %s\n", w.lines, fmt.Sprintf(format, args...))
}

// Later has stop called at the end of the walk, before those that were given earlier.
func (w *Walk) Later(stop func() error) { w.stops = append(w.stops, stop) }

// Home is the home of a host.
func (w *Walk) Home(host string) string { return filepath.Join(w.dir, host) }

// Start starts a long-running command on a host; it must end with status 0 when it is stopped.
func (w *Walk) Start(host string, args ...string) (*process.Process, error) {
	p, err := w.Portal.Start(w.Home(host), args...)
	if err != nil {
		return nil, err
	}
	w.Later(func() error {
		if err := p.Stop(stopWithin); err != nil {
			return fmt.Errorf("stopping %s on %s: %w", p.Name, host, err)
		}
		return nil
	})
	return p, nil
}

// Line waits for a line of a command and returns its first submatch.
func Line(ctx context.Context, p *process.Process, pattern string) (string, error) {
	ctx, cancel := Patience(ctx, "nothing")
	defer cancel()
	m, err := p.Line(ctx, regexp.MustCompile(pattern))
	if err != nil {
		return "", err
	}
	return m[1], nil
}

// Patience bounds the wait for something that must come. Its cause says what came instead.
func Patience(ctx context.Context, format string, args ...any) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, patience, fmt.Errorf(format+" for %v", append(args, patience)...))
}

// Relay starts a relay that issues the tickets as well, on the host "relay".
func (w *Walk) Relay(ctx context.Context) (addr string, err error) {
	p, err := w.Start("relay", "relay", "--listen", "127.0.0.1:0", "--authority")
	if err != nil {
		return "", err
	}
	return Line(ctx, p, `^portal: relay ready on (\S+) `)
}

// Enroll makes a ticket on the authority's host and redeems it on another.
func (w *Walk) Enroll(ctx context.Context, authority, host string, grants ...string) error {
	ticket, err := w.Portal.Run(ctx, w.Home(authority), append([]string{"ticket", "create", "--name", host}, grants...)...)
	if err != nil {
		return err
	}
	// A ticket is a secret: in a file that only we can read, never on a command line.
	file := w.Home(host + ".ticket")
	if err := os.WriteFile(file, []byte(ticket), 0o600); err != nil {
		return err
	}
	_, err = w.Portal.Run(ctx, w.Home(host), "enroll", file)
	return err
}

// Outlet starts an outlet and returns the rest of its ready line.
func (w *Walk) Outlet(ctx context.Context, host, name string, args ...string) (p *process.Process, ready string, err error) {
	if p, err = w.Start(host, append([]string{"outlet", name}, args...)...); err != nil {
		return nil, "", err
	}
	ready, err = Line(ctx, p, `^portal: outlet `+name+` ready (.*)`)
	return p, ready, err
}

// Inlet starts an inlet on a free port and returns its address and, after a line that begins with
// state, "ready" or "refused:", the rest of that.
func (w *Walk) Inlet(ctx context.Context, host, state, name string, args ...string) (addr, how string, err error) {
	p, err := w.Start(host, append([]string{"inlet", name, "--from", "0"}, args...)...)
	if err != nil {
		return "", "", err
	}
	if addr, err = Line(ctx, p, `^portal: inlet `+name+` listening on (127\.0\.0\.1:\d+)`); err != nil {
		return "", "", err
	}
	how, err = Line(ctx, p, `^portal: inlet `+name+` `+state+` (.*)`)
	return addr, how, err
}
