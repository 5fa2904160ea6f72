package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/portal-tunnel/portal/examples/postgres/server"
	"github.com/portal-tunnel/portal/tests/process"
	"github.com/portal-tunnel/portal/tests/tunnels"
)

// A rig is what all systems of a setting share: the hosts, and the target behind every system.
type rig struct {
	*tunnels.Site
	setting  *setting
	dir      string
	deployed []*deployment
	stops    []func() error
}

func newRig(ctx context.Context, s *setting, b *binaries) (*rig, error) {
	dir, err := os.MkdirTemp("", "portal-bench-") // 0700: there are keys in it
	if err != nil {
		return nil, err
	}
	r := &rig{Site: tunnels.NewSite("", b.shipped), setting: s, dir: dir}
	if s.measured {
		r.Portal, r.Measured = b.measured, true
	}
	if s.delay > 0 {
		r.Between = r.link
	}
	if err := r.fill(ctx); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

func (r *rig) fill(ctx context.Context) (err error) {
	if r.setting.lossy {
		r.Near, r.Far, err = r.lossyHosts(ctx)
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
		r.Target = db.Addr()
		return nil
	}
	r.Target, err = r.self(ctx, r.Far, "serve", r.Far.IP)
	return err
}

// close stops the last started first.
func (r *rig) close() error {
	var errs []error
	for i := len(r.deployed) - 1; i >= 0; i-- {
		r.deployed[i].Stop()
	}
	for i := len(r.stops) - 1; i >= 0; i-- {
		errs = append(errs, r.stops[i]())
	}
	return errors.Join(append(errs, r.Site.Close(), os.RemoveAll(r.dir))...)
}

// self runs this program in another part, which prints where it listens, until the rig ends.
func (r *rig) self(ctx context.Context, at *tunnels.Host, args ...string) (addr string, err error) {
	path, err := os.Executable()
	if err != nil {
		return "", err
	}
	p, err := process.Start("bench "+args[0], at.Command(path, args...))
	if err != nil {
		return "", err
	}
	r.stops = append(r.stops, func() error { p.Stop(tunnels.StopWithin); return nil })
	return tunnels.Line(ctx, p, "^"+regexp.QuoteMeta(listening)+`(\S+)$`)
}

// A deployment is a system's processes in a setting.
type deployment struct {
	*tunnels.Deployment
	rig *rig
}

// deploy starts a system and waits until a connection comes through it.
func (r *rig) deploy(ctx context.Context, s tunnels.System) (*deployment, error) {
	started, err := r.Start(ctx, s, filepath.Join(r.dir, s.Key))
	d := &deployment{started, r}
	r.deployed = append(r.deployed, d)
	if err == nil {
		err = d.carries(ctx)
	}
	if err != nil {
		d.Stop()
		return nil, err
	}
	return d, nil
}

// carries waits until the target answers through the system. Systems are tried again: not all of
// them say when they are ready.
func (d *deployment) carries(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, tunnels.StartWithin, fmt.Errorf("no connection came through for %v", tunnels.StartWithin))
	defer cancel()
	for {
		var err error
		if d.rig.setting.postgres {
			err = askPostgres(ctx, d.Addr)
		} else {
			err = connection(ctx, d.Addr, 0)
		}
		if err == nil {
			return nil
		}
		if ended := d.Ended(); ended != nil {
			return errors.Join(ended, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// link gives the address by which the client's side reaches addr: through the setting's link.
func (r *rig) link(ctx context.Context, addr string) (string, error) {
	return r.self(ctx, r.Near, "shape", r.setting.delay.String(), strconv.FormatFloat(r.setting.rate, 'f', 0, 64), addr)
}

// holdings is what a process of portal holds after a collection.
type holdings struct{ heap, stacks, goroutines float64 }

func holdingsOf(ctx context.Context, p *tunnels.Part) (h holdings, err error) {
	answer, err := ask(ctx, p, syscall.SIGUSR1)
	if err != nil {
		return h, err
	}
	if _, err := fmt.Sscanf(answer, "heap=%g stacks=%g goroutines=%g", &h.heap, &h.stacks, &h.goroutines); err != nil {
		return h, fmt.Errorf("%s answered %q: %w", p.Name, answer, err)
	}
	return h, nil
}

// beginProfile begins a CPU profile.
func beginProfile(ctx context.Context, p *tunnels.Part) error {
	answer, err := ask(ctx, p, syscall.SIGUSR2)
	if err == nil && answer != "profiling" {
		err = fmt.Errorf("profiling %s: %s", p.Name, answer)
	}
	return err
}

// endProfile writes the profile to file, and says what else the process has spent meanwhile.
func endProfile(ctx context.Context, p *tunnels.Part, file string) (spent string, err error) {
	answer, err := ask(ctx, p, syscall.SIGUSR2)
	if err != nil {
		return "", err
	}
	counts, written, ended := strings.Cut(answer, " in ")
	var allocations, bytes uint64
	var waited float64
	if _, err := fmt.Sscanf(counts, "profile allocations=%d bytes=%d waited=%g", &allocations, &bytes, &waited); err != nil || !ended {
		return "", fmt.Errorf("profiling %s: %s", p.Name, answer)
	}
	b, err := os.ReadFile(written)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d allocations, %.0f kB; %.1f ms waited for mutexes", allocations, float64(bytes)/1e3, waited*1e3), os.WriteFile(file, b, 0o644)
}

func ask(ctx context.Context, p *tunnels.Part, sig syscall.Signal) (string, error) {
	if err := syscall.Kill(p.Process.Pid(), sig); err != nil {
		return "", fmt.Errorf("asking %s: %w", p.Name, err)
	}
	p.Answers++
	return tunnels.Line(ctx, p.Process, fmt.Sprintf(`^measure: %d (.*)$`, p.Answers))
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
