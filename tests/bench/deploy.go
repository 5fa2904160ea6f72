package main

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
	"syscall"
	"time"

	"github.com/portal-tunnel/portal/examples/postgres/server"
	"github.com/portal-tunnel/portal/tests/process"
)

// A host is one side of a setting: here, or a network namespace that a process of ours holds.
type host struct {
	ip    string // by which the other side reaches it
	holds int    // the process in whose network namespace it is; 0: ours
	ports int    // the last one given out, where none but ours are taken; 0: ask the kernel
}

// port finds one that nobody listens on.
func (h *host) port() (int, error) {
	if h.holds != 0 {
		h.ports++
		return h.ports, nil
	}
	l, err := net.Listen("tcp4", net.JoinHostPort(h.ip, "0"))
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func (h *host) addr() (string, error) {
	port, err := h.port()
	return net.JoinHostPort(h.ip, strconv.Itoa(port)), err
}

// accepts gives an address for a system's end there: clients come to the near one over loopback, the
// near one to the far one over what is between the hosts.
func (r *rig) accepts(at *host) (string, error) {
	if at == r.near {
		return (&host{ip: loopback}).addr()
	}
	return at.addr()
}

const loopback = "127.0.0.1"

// command runs a program on the host, as the process that is started: what it prints on stdout goes
// to stderr, where process.Process reads it.
func (h *host) command(program string, args ...string) *exec.Cmd {
	line := append([]string{"sh", "-c", `exec "$0" "$@" >&2`, program}, args...)
	if h.holds != 0 {
		line = append([]string{"nsenter", "-t", strconv.Itoa(h.holds), "-n", "--"}, line...)
	}
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Env = process.Environ()
	return cmd
}

// A rig is what all systems of a setting share: the hosts, and the target behind every system.
type rig struct {
	setting   *setting
	binaries  *binaries
	dir       string
	near, far *host  // where clients are, where the target is
	target    string // its address
	deployed  []*deployment
	stops     []func() error
}

func newRig(ctx context.Context, s *setting, b *binaries) (*rig, error) {
	dir, err := os.MkdirTemp("", "portal-bench-") // 0700: there are keys in it
	if err != nil {
		return nil, err
	}
	r := &rig{setting: s, binaries: b, dir: dir, near: &host{ip: loopback}, far: &host{ip: loopback}}
	if err := r.fill(ctx); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

func (r *rig) fill(ctx context.Context) (err error) {
	if r.setting.lossy {
		r.near, r.far, err = r.lossyHosts(ctx)
		if err != nil {
			return err
		}
	}
	if r.setting.postgres {
		db, err := startPostgres(ctx)
		if errors.Is(err, server.ErrMissing) || errors.Is(err, exec.ErrNotFound) {
			return &skipped{err.Error()}
		} else if err != nil {
			return err
		}
		r.stops = append(r.stops, db.Close)
		r.target = db.Addr()
		return nil
	}
	r.target, err = r.self(ctx, r.far, "serve", r.far.ip)
	return err
}

// close stops the last started first.
func (r *rig) close() error {
	var errs []error
	for i := len(r.deployed) - 1; i >= 0; i-- {
		r.deployed[i].stop()
	}
	for i := len(r.stops) - 1; i >= 0; i-- {
		errs = append(errs, r.stops[i]())
	}
	return errors.Join(append(errs, os.RemoveAll(r.dir))...)
}

// self runs this program in another part, which prints where it listens, until the rig ends.
func (r *rig) self(ctx context.Context, at *host, args ...string) (addr string, err error) {
	path, err := os.Executable()
	if err != nil {
		return "", err
	}
	p, err := process.Start("bench "+args[0], at.command(path, args...))
	if err != nil {
		return "", err
	}
	r.stops = append(r.stops, func() error { p.Stop(stopWithin); return nil })
	return line(ctx, p, "^"+regexp.QuoteMeta(listening)+`(\S+)$`)
}

// stopWithin is for programs that wait for connections which our loads have closed.
const stopWithin = 5 * time.Second

// startWithin is what a program may take to print that it is there, or a system to carry a
// connection.
const startWithin = 30 * time.Second

// line waits for a line of p and returns its first submatch.
func line(ctx context.Context, p *process.Process, pattern string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, startWithin, fmt.Errorf("nothing for %v", startWithin))
	defer cancel()
	m, err := p.Line(ctx, regexp.MustCompile(pattern))
	if err != nil {
		return "", err
	}
	return m[1], nil
}

// A deployment is a system's processes in a setting, and their files.
type deployment struct {
	*rig
	system system
	dir    string
	addr   string // where clients connect
	parts  []*part
}

// A part is one of a system's processes.
type part struct {
	name     string
	process  *process.Process
	measured bool // it answers SIGUSR1 and SIGUSR2; see cmd/portal/measure.go
	answers  int
}

// deploy starts a system and waits until a connection comes through it.
func (r *rig) deploy(ctx context.Context, s system) (*deployment, error) {
	d := &deployment{rig: r, system: s, dir: filepath.Join(r.dir, s.key)}
	r.deployed = append(r.deployed, d)
	if err := os.Mkdir(d.dir, 0o700); err != nil {
		return nil, err
	}
	var err error
	if d.addr, err = s.start(ctx, d); err == nil {
		err = d.carries(ctx)
	}
	if err != nil {
		d.stop()
		return nil, err
	}
	return d, nil
}

// stop ends the last started first; it may be called again. What a program says to SIGTERM is its
// own affair.
func (d *deployment) stop() {
	for i := len(d.parts) - 1; i >= 0; i-- {
		d.parts[i].process.Stop(stopWithin)
	}
}

// carries waits until the target answers through the system. Systems are tried again: not all of
// them say when they are ready.
func (d *deployment) carries(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startWithin, fmt.Errorf("no connection came through for %v", startWithin))
	defer cancel()
	for {
		var err error
		if d.setting.postgres {
			err = askPostgres(ctx, d.addr)
		} else {
			err = connection(ctx, d.addr, 0)
		}
		if err == nil {
			return nil
		}
		if ended := d.ended(); ended != nil {
			return errors.Join(ended, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// ended says which process is gone that should not be.
func (d *deployment) ended() error {
	for _, p := range d.parts {
		select {
		case <-p.process.Done():
			said := p.process.Lines()
			return fmt.Errorf("%s ended: %s", p.name, strings.Join(said[max(len(said)-5, 0):], "; "))
		default:
		}
	}
	return nil
}

// run starts a part of the system.
func (d *deployment) run(at *host, name, program string, args ...string) (*process.Process, error) {
	cmd := at.command(program, args...)
	cmd.Dir = d.dir
	p, err := process.Start(name, cmd)
	if err != nil {
		return nil, err
	}
	d.parts = append(d.parts, &part{name: name, process: p})
	return p, nil
}

// listens is run for a program that does not say when it listens on addr.
func (d *deployment) listens(ctx context.Context, addr string, at *host, name, program string, args ...string) error {
	p, err := d.run(at, name, program, args...)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, startWithin, fmt.Errorf("it does not listen on %s after %v", addr, startWithin))
	defer cancel()
	for {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		if err == nil {
			return c.Close()
		}
		select {
		case <-p.Done():
			return d.ended()
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", name, context.Cause(ctx))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// file writes one of the system's files, readable by this user alone, and gives its path.
func (d *deployment) file(name, content string) (string, error) {
	path := filepath.Join(d.dir, name)
	return path, os.WriteFile(path, []byte(content), 0o600)
}

// link gives the address by which the client's side reaches addr: through the setting's link.
func (d *deployment) link(ctx context.Context, addr string) (string, error) {
	if d.setting.delay == 0 {
		return addr, nil
	}
	return d.self(ctx, d.near, "shape", d.setting.delay.String(), strconv.FormatFloat(d.setting.rate, 'f', 0, 64), addr)
}

// holdings is what a process of portal holds after a collection.
type holdings struct{ heap, stacks, goroutines float64 }

func (p *part) holdings(ctx context.Context) (h holdings, err error) {
	answer, err := p.ask(ctx, syscall.SIGUSR1)
	if err != nil {
		return h, err
	}
	if _, err := fmt.Sscanf(answer, "heap=%g stacks=%g goroutines=%g", &h.heap, &h.stacks, &h.goroutines); err != nil {
		return h, fmt.Errorf("%s answered %q: %w", p.name, answer, err)
	}
	return h, nil
}

// profile begins a CPU profile, or with a file ends it there.
func (p *part) profile(ctx context.Context, file string) error {
	answer, err := p.ask(ctx, syscall.SIGUSR2)
	if err != nil {
		return err
	}
	written, ended := strings.CutPrefix(answer, "profile ")
	if ended != (file != "") || !ended && answer != "profiling" {
		return fmt.Errorf("profiling %s: %s", p.name, answer)
	}
	if !ended {
		return nil
	}
	b, err := os.ReadFile(written)
	if err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o644)
}

func (p *part) ask(ctx context.Context, sig syscall.Signal) (string, error) {
	if err := syscall.Kill(p.process.Pid(), sig); err != nil {
		return "", fmt.Errorf("asking %s: %w", p.name, err)
	}
	p.answers++
	return line(ctx, p.process, fmt.Sprintf(`^measure: %d (.*)$`, p.answers))
}

// binaries are portal as it is shipped, and as it is measured.
type binaries struct {
	dir               string
	shipped, measured *process.Portal
}

func newBinaries(ctx context.Context) (*binaries, error) {
	dir, err := os.MkdirTemp("", "portal-bench-bin-")
	if err != nil {
		return nil, err
	}
	for into, tags := range map[string][]string{"shipped": nil, "measured": {"measure"}} {
		if _, err := process.BuildPortal(ctx, filepath.Join(dir, into), tags...); err != nil {
			return nil, errors.Join(err, os.RemoveAll(dir))
		}
	}
	return builtIn(dir), nil
}

func builtIn(dir string) *binaries {
	in := func(name string) *process.Portal { return &process.Portal{Path: filepath.Join(dir, name, "portal")} }
	return &binaries{dir: dir, shipped: in("shipped"), measured: in("measured")}
}

func (b *binaries) remove() { os.RemoveAll(b.dir) }

var numbered = regexp.MustCompile(`(?:^|[ v])\d+\.\d+`)

// version is what a program prints when asked for it: the first line with a number of the kind 1.2,
// or with any.
func version(ctx context.Context, program string, args ...string) string {
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
