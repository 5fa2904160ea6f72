package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/portal-tunnel/portal/tests/process"
	"github.com/portal-tunnel/portal/tests/tunnels"
)

// The lossy link. This program runs itself in a network namespace of its own, where the near ends
// and the load are; another process holds a second one, where the far ends are. Both go when their
// processes do, and the veth pair between them with them: nothing of it is ever seen outside.

const (
	nearIP, farIP = "10.77.0.1", "10.77.0.2"
	// farPorts is where ports of the far ends begin: below those that the kernel gives away.
	farPorts = 10000
)

// drops loses one packet in a hundred of those that come in by a device.
const drops = `table inet loss {
	chain incoming {
		type filter hook prerouting priority -300
		iifname "%s" numgen random mod 100 == 0 counter drop
	}
}
`

// inNamespaces measures the setting in another process, in a network namespace.
func inNamespaces(ctx context.Context, p *plan, s *setting, b *binaries, r *report) error {
	if os.Geteuid() != 0 {
		return &skipped{"it takes root to make network namespaces"}
	}
	for _, program := range []struct{ name, in string }{{"ip", "iproute2"}, {"nft", "nftables"}, {"nsenter", "util-linux"}} {
		if _, err := exec.LookPath(program.name); err != nil {
			return &skipped{fmt.Sprintf("%s is not installed (Debian: %s)", program.name, program.in)}
		}
	}
	path, err := os.Executable()
	if err != nil {
		return err
	}
	file := filepath.Join(b.dir, "lossy.json")
	args := append([]string{"lossy", b.dir, file}, p.args(s)...)
	cmd := exec.Command(path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	child, err := process.Start("bench lossy", cmd)
	if errors.Is(err, syscall.EPERM) {
		return &skipped{"network namespaces are not allowed here: " + err.Error()}
	} else if err != nil {
		return err
	}
	select {
	case <-child.Done():
	case <-ctx.Done():
	}
	failed := child.Stop(time.Minute)
	for _, line := range child.Lines() {
		fmt.Fprintln(os.Stderr, line)
	}
	theirs, err := readReport(file) // also of one that could not go on
	if failed != nil || err != nil {
		if err == nil {
			r.take(theirs)
		}
		return cmp.Or(context.Cause(ctx), failed, err)
	}
	if why := theirs.Skipped[s.name]; why != "" {
		return &skipped{why}
	}
	r.take(theirs)
	return nil
}

// lossyCommand is what runs in the namespace: `lossy BINARIES FILE FLAGS…`.
func lossyCommand(args []string) error {
	if len(args) < 2 {
		return errors.New("usage: lossy BINARIES FILE FLAGS…")
	}
	flags := flag.NewFlagSet("lossy", flag.ContinueOnError)
	p := planFlags(flags)
	if err := flags.Parse(args[2:]); err != nil {
		return err
	}
	if err := p.resolve(); err != nil {
		return err
	}
	raiseDescriptors()
	ctx, stop := untilStopped()
	defer stop()
	b := builtIn(args[0])
	s := settings[slices.IndexFunc(settings, func(s *setting) bool { return s.lossy })]
	r := newReport(p)
	err := together(ctx, p, s, b, r)
	if skip := (*skipped)(nil); errors.As(err, &skip) {
		r.Skipped[s.name], err = skip.why, nil
	}
	return errors.Join(err, r.write(args[1]))
}

// lossyHosts makes the far host and the link to it.
func (r *rig) lossyHosts(ctx context.Context) (near, far *tunnels.Host, err error) {
	path, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.Command(path, "hold")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	holder, err := process.Start("the far network namespace", cmd)
	if err != nil {
		return nil, nil, err
	}
	r.stops = append(r.stops, func() error { holder.Stop(tunnels.StopWithin); return nil })
	if _, err := tunnels.Line(ctx, holder, "^("+holding+")$"); err != nil {
		return nil, nil, err
	}
	there := strconv.Itoa(holder.Pid())
	setup := func(input string, args ...string) {
		if err != nil {
			return
		}
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Stdin = strings.NewReader(input)
		if out, failed := cmd.CombinedOutput(); failed != nil {
			err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), failed, strings.TrimSpace(string(out)))
		}
	}
	setup("", "ip", "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", there)
	for _, end := range []struct {
		enter     []string
		name, net string
	}{{nil, "near", nearIP + "/24"}, {[]string{"nsenter", "-t", there, "-n"}, "far", farIP + "/24"}} {
		in := func(args ...string) []string { return append(slices.Clone(end.enter), args...) }
		setup("", in("ip", "link", "set", "lo", "up")...)
		setup("", in("ip", "address", "add", end.net, "dev", end.name)...)
		// A packet is as long as one on a wire, not 64 KiB: the loss of one is that of one.
		setup("", in("ip", "link", "set", "dev", end.name, "gso_max_segs", "1", "up")...)
		setup(fmt.Sprintf(drops, end.name), in("nft", "-f", "-")...)
	}
	if err != nil {
		return nil, nil, &skipped{err.Error()}
	}
	return &tunnels.Host{IP: nearIP}, &tunnels.Host{IP: farIP, Holds: holder.Pid(), Ports: farPorts}, nil
}

// holding is what a process prints that holds a namespace.
const holding = "bench: holding"

func holdCommand([]string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	fmt.Fprintln(os.Stderr, holding)
	<-ctx.Done()
	return nil
}
