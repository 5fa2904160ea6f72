// Package tunnels starts portal and what it is compared to, each as the processes that it takes for the
// same thing: a TCP connection to the near one comes out at a target behind the far one.
package tunnels

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/portal-tunnel/portal/tests/process"
)

// A Host is one side of a setting: here, or a network namespace that a process of ours holds.
type Host struct {
	IP    string // by which the other side reaches it
	Holds int    // the process in whose network namespace it is; 0: ours
	Ports int    // the last one given out, where none but ours are taken; 0: ask the kernel
}

// port finds one that nobody listens on.
func (h *Host) port() (int, error) {
	if h.Holds != 0 {
		h.Ports++
		return h.Ports, nil
	}
	l, err := net.Listen("tcp4", net.JoinHostPort(h.IP, "0"))
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func (h *Host) Addr() (string, error) {
	port, err := h.port()
	return net.JoinHostPort(h.IP, strconv.Itoa(port)), err
}

// accepts gives an address for a system's end there: clients come to the near one over loopback, the
// near one to the far one over what is between the hosts.
func (s *Site) accepts(at *Host) (string, error) {
	if at == s.Near {
		return (&Host{IP: Loopback}).Addr()
	}
	return at.Addr()
}

// Loopback is the address of this host.
const Loopback = "127.0.0.1"

// Command runs a program on the host, as the process that is started: what it prints on stdout goes
// to stderr, where process.Process reads it.
func (h *Host) Command(program string, args ...string) *exec.Cmd {
	line := append([]string{"sh", "-c", `exec "$0" "$@" >&2`, program}, args...)
	if h.Holds != 0 {
		line = append([]string{"nsenter", "-t", strconv.Itoa(h.Holds), "-n", "--"}, line...)
	}
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Env = process.Environ()
	return cmd
}

// StopWithin is for programs that wait for connections which our loads have closed.
const StopWithin = 5 * time.Second

// StartWithin is what a program may take to print that it is there, or a system to carry a
// connection.
const StartWithin = 30 * time.Second

// Line waits for a line of p and returns its first submatch.
func Line(ctx context.Context, p *process.Process, pattern string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, StartWithin, fmt.Errorf("nothing for %v", StartWithin))
	defer cancel()
	m, err := p.Line(ctx, regexp.MustCompile(pattern))
	if err != nil {
		return "", err
	}
	return m[1], nil
}

// A Site is where a tunnel runs: its clients are at the near host, its target at the far one.
type Site struct {
	Near, Far *Host
	Target    string // an address
	// Between gives the address by which the near host reaches one of the far host; nil: it is the same.
	Between func(ctx context.Context, addr string) (string, error)
	Portal  *process.Portal
	// Measured says that Portal is of a build that answers SIGUSR1 and SIGUSR2; see cmd/portal/measure.go.
	Measured bool

	cleanups []func() error
}

// NewSite is a site of one host, this one.
func NewSite(target string, portal *process.Portal) *Site {
	return &Site{Near: &Host{IP: Loopback}, Far: &Host{IP: Loopback}, Target: target, Portal: portal}
}

// Close undoes what systems did to the machine, once they are stopped.
func (s *Site) Close() error {
	var errs []error
	for i := len(s.cleanups) - 1; i >= 0; i-- {
		errs = append(errs, s.cleanups[i]())
	}
	s.cleanups = nil
	return errors.Join(errs...)
}

// A Deployment is a system's processes at a site, and their files.
type Deployment struct {
	*Site
	System System
	Dir    string // readable by this user alone
	Addr   string // where clients connect
	Parts  []*Part
}

// A Part is one of a system's processes.
type Part struct {
	Name     string
	Process  *process.Process
	Measured bool
	Answers  int // that were asked of it
}

// Start starts a system, with its files in dir, which it makes. A connection may not come through it
// yet: not all of them say when they are ready. The caller stops it, also when there is an error.
func (s *Site) Start(ctx context.Context, sys System, dir string) (*Deployment, error) {
	d := &Deployment{Site: s, System: sys, Dir: dir}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return d, err
	}
	var err error
	d.Addr, err = sys.Start(ctx, d)
	return d, err
}

// Stop ends the last started first; it may be called again. What a program says to SIGTERM is its
// own affair.
func (d *Deployment) Stop() {
	for i := len(d.Parts) - 1; i >= 0; i-- {
		d.Parts[i].Process.Stop(StopWithin)
	}
}

// Ended says which process is gone that should not be.
func (d *Deployment) Ended() error {
	for _, p := range d.Parts {
		select {
		case <-p.Process.Done():
			said := p.Process.Lines()
			return fmt.Errorf("%s ended: %s", p.Name, strings.Join(said[max(len(said)-5, 0):], "; "))
		default:
		}
	}
	return nil
}

// Run starts a part of the system.
func (d *Deployment) Run(at *Host, name, program string, args ...string) (*process.Process, error) {
	cmd := at.Command(program, args...)
	cmd.Dir = d.Dir
	p, err := process.Start(name, cmd)
	if err != nil {
		return nil, err
	}
	d.Parts = append(d.Parts, &Part{Name: name, Process: p})
	return p, nil
}

// Listens is Run for a program that does not say when it listens on addr.
func (d *Deployment) Listens(ctx context.Context, addr string, at *Host, name, program string, args ...string) error {
	p, err := d.Run(at, name, program, args...)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, StartWithin, fmt.Errorf("it does not listen on %s after %v", addr, StartWithin))
	defer cancel()
	for {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		if err == nil {
			return c.Close()
		}
		select {
		case <-p.Done():
			return d.Ended()
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", name, context.Cause(ctx))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// File writes one of the system's files, readable by this user alone, and gives its path.
func (d *Deployment) File(name, content string) (string, error) {
	path := filepath.Join(d.Dir, name)
	return path, os.WriteFile(path, []byte(content), 0o600)
}

// Link gives the address by which the client's side reaches addr.
func (d *Deployment) Link(ctx context.Context, addr string) (string, error) {
	if d.Between == nil {
		return addr, nil
	}
	return d.Between(ctx, addr)
}

var numbered = regexp.MustCompile(`(?:^|[ v])\d+\.\d+`)

// Version is what a program prints when asked for it: the first line with a number of the kind 1.2,
// or with any.
func Version(ctx context.Context, program string, args ...string) string {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	lines := strings.Split(string(out), "\n")
	for _, is := range []func(string) bool{numbered.MatchString, func(l string) bool { return strings.ContainsAny(l, "0123456789") }} {
		if i := slices.IndexFunc(lines, is); i >= 0 {
			return strings.TrimSpace(lines[i])
		}
	}
	return fmt.Sprintf("unknown (%v)", err)
}
