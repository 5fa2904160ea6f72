package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/portal-tunnel/portal/tests/process"
)

// A system is something that TCP connections can be sent through to the server.
type system struct {
	key, name string
	peer      bool                                                       // somebody else's: may be missing, may break
	start     func(ctx context.Context, r *rig) (addr string, err error) // where its connections are taken
}

var systems = []system{
	{"nothing", "nothing in between", false, func(_ context.Context, r *rig) (string, error) { return r.server, nil }},
	{"copy", "two forwarders, copy", false, func(ctx context.Context, r *rig) (string, error) { return r.forwarders(ctx, "copy") }},
	{"splice", "two forwarders, splice", false, func(ctx context.Context, r *rig) (string, error) { return r.forwarders(ctx, "splice") }},
	{"ssh", "ssh -L", true, func(ctx context.Context, r *rig) (string, error) { return r.ssh(ctx) }},
	{"portal", "portal, direct", false, func(ctx context.Context, r *rig) (string, error) { return r.portal(ctx, "direct") }},
	{"relay", "portal, one relay", false, func(ctx context.Context, r *rig) (string, error) { return r.portal(ctx, "relay") }},
	{"yamux", "portal, relay, yamux", false, func(ctx context.Context, r *rig) (string, error) { return r.portal(ctx, "yamux") }},
}

// yardstick is the system whose multiples the others are given in.
const yardstick = "two forwarders, copy"

func systemNames() (keys []string) {
	for _, s := range systems {
		keys = append(keys, s.key)
	}
	return keys
}

func choose(keys []string) (chosen []system, err error) {
	for _, k := range keys {
		i := slices.IndexFunc(systems, func(s system) bool { return s.key == k })
		if i < 0 {
			return nil, fmt.Errorf("no system %q; there are %s", k, strings.Join(systemNames(), ", "))
		}
		chosen = append(chosen, systems[i])
	}
	return chosen, nil
}

// A rig owns the processes of a run and their files.
type rig struct {
	dir    string
	server string // address of the server that all of them lead to
	stops  []func() error
}

func newRig(ctx context.Context) (*rig, error) {
	dir, err := os.MkdirTemp("", "portal-bench-") // 0700: there are keys in it
	if err != nil {
		return nil, err
	}
	r := &rig{dir: dir}
	if r.server, err = r.self(ctx, "serve"); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

// close stops the last started first.
func (r *rig) close() error {
	var errs []error
	for i := len(r.stops) - 1; i >= 0; i-- {
		errs = append(errs, r.stops[i]())
	}
	return errors.Join(append(errs, os.RemoveAll(r.dir))...)
}

// own has p stopped with the rig. What it says to SIGTERM is its own affair.
func (r *rig) own(p *process.Process, err error) (*process.Process, error) {
	if err == nil {
		r.stops = append(r.stops, func() error { p.Stop(10 * time.Second); return nil })
	}
	return p, err
}

// self runs this program again, as a server or a forwarder, and returns where it listens.
func (r *rig) self(ctx context.Context, args ...string) (addr string, err error) {
	path, err := os.Executable()
	if err != nil {
		return "", err
	}
	p, err := r.own(process.Start("bench "+args[0], exec.Command(path, args...)))
	if err != nil {
		return "", err
	}
	return line(ctx, p, "^"+regexp.QuoteMeta(listening)+`(\S+)$`)
}

// line waits for a line of p and returns its first submatch.
func line(ctx context.Context, p *process.Process, pattern string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("nothing for 30 s"))
	defer cancel()
	m, err := p.Line(ctx, regexp.MustCompile(pattern))
	if err != nil {
		return "", err
	}
	return m[1], nil
}

func (r *rig) forwarders(ctx context.Context, how string) (string, error) {
	exit, err := r.self(ctx, "forward", how, r.server)
	if err != nil {
		return "", err
	}
	return r.self(ctx, "forward", how, exit)
}

// ssh starts an sshd of its own, with keys made for the run, and one ssh -L over one connection,
// both with the ciphers that they choose by default.
func (r *rig) ssh(ctx context.Context) (string, error) {
	for _, program := range []string{"ssh", "ssh-keygen"} {
		if _, err := exec.LookPath(program); err != nil {
			return "", errors.New(program + " is not installed (Debian: openssh-client)")
		}
	}
	sshd, err := exec.LookPath("sshd") // it insists on being started by its full path
	if err != nil {
		sshd = "/usr/sbin/sshd"
	}
	if _, err := os.Stat(sshd); err != nil {
		return "", errors.New("sshd is not installed (Debian: openssh-server)")
	}
	me, err := user.Current()
	if err != nil {
		return "", err
	}
	if os.Geteuid() == 0 {
		// sshd's privilege separation directory: its service makes it, and we do not run that.
		if err := os.Mkdir("/run/sshd", 0o755); err == nil {
			r.stops = append(r.stops, func() error { return os.Remove("/run/sshd") })
		} else if !errors.Is(err, os.ErrExist) {
			return "", err
		}
	}
	in := func(name string) string { return filepath.Join(r.dir, name) }
	for _, key := range []string{"host", "user"} {
		if out, err := exec.CommandContext(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", in(key)).CombinedOutput(); err != nil {
			return "", fmt.Errorf("ssh-keygen: %w: %s", err, out)
		}
	}
	hostKey, err := os.ReadFile(in("host.pub"))
	if err != nil {
		return "", err
	}
	ports, err := freePorts(2)
	if err != nil {
		return "", err
	}
	daemon, client := ports[0], ports[1]
	config := fmt.Sprintf(`ListenAddress 127.0.0.1
Port %d
HostKey %s
AuthorizedKeysFile %s
StrictModes no
UsePAM no
PidFile none
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
`, daemon, in("host"), in("user.pub"))
	if err := os.WriteFile(in("sshd_config"), []byte(config), 0o600); err != nil {
		return "", err
	}
	if err := os.WriteFile(in("known_hosts"), fmt.Appendf(nil, "[127.0.0.1]:%d %s", daemon, hostKey), 0o600); err != nil {
		return "", err
	}
	d, err := r.own(process.Start("sshd", exec.Command(sshd, "-D", "-e", "-f", in("sshd_config"))))
	if err != nil {
		return "", err
	}
	if _, err := line(ctx, d, `^Server (listening) on `); err != nil {
		return "", err
	}
	listen := fmt.Sprintf("127.0.0.1:%d", client)
	// LocalCommand runs once the forwarding listens: the line to wait for.
	c, err := r.own(process.Start("ssh", exec.Command("ssh", "-F", "none", "-N", "-i", in("user"), "-p", strconv.Itoa(daemon),
		"-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "ExitOnForwardFailure=yes",
		"-o", "StrictHostKeyChecking=yes", "-o", "UserKnownHostsFile="+in("known_hosts"),
		"-o", "PermitLocalCommand=yes", "-o", "LocalCommand=echo forwarding >&2",
		"-L", listen+":"+r.server, me.Username+"@127.0.0.1")))
	if err != nil {
		return "", err
	}
	if _, err := line(ctx, c, `^(forwarding)$`); err != nil {
		return "", err
	}
	return listen, nil
}

// freePorts finds n loopback ports that nobody listens on, all different.
func freePorts(n int) (ports []int, err error) {
	for range n {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // after the last was found
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

// portal starts an authority, an outlet and an inlet, each a process with its own home:
// direct, or through a relay that hosts the authority, by either carrier.
func (r *rig) portal(ctx context.Context, way string) (string, error) {
	p, err := process.BuildPortal(ctx, r.dir)
	if err != nil {
		return "", err
	}
	home := func(host string) string { return filepath.Join(r.dir, way+"-"+host) }
	start := func(host, pattern string, args ...string) (string, error) {
		c, err := r.own(p.Start(home(host), args...))
		if err != nil {
			return "", err
		}
		if host == "inlet" {
			if _, err := line(ctx, c, `^portal: inlet bench (ready) (?:direct|via) `); err != nil {
				return "", err
			}
		}
		return line(ctx, c, pattern)
	}
	enroll := func(host string, grants ...string) error {
		ticket, err := p.Run(ctx, home("authority"), append([]string{"ticket", "create", "--name", host}, grants...)...)
		if err != nil {
			return err
		}
		file := home(host) + ".ticket"
		if err := os.WriteFile(file, []byte(ticket), 0o600); err != nil {
			return err
		}
		_, err = p.Run(ctx, home(host), "enroll", file)
		return err
	}
	authority := []string{"authority", "--listen", "127.0.0.1:0"}
	if way != "direct" {
		authority = []string{"relay", "--listen", "127.0.0.1:0", "--authority"}
	}
	if _, err := start("authority", `^portal: \w+ (ready) on `, authority...); err != nil {
		return "", err
	}
	if err := errors.Join(enroll("outlet", "--serve", "bench"), enroll("inlet", "--attr", "role=bench")); err != nil {
		return "", err
	}
	outlet := []string{"outlet", "bench", "--to", r.server, "--allow", `principal.role == "bench"`}
	switch way {
	case "direct":
		outlet = append(outlet, "--listen", "127.0.0.1:0")
	case "yamux":
		outlet = append(outlet, "--carrier", "yamux")
	}
	at, err := start("outlet", `^portal: outlet bench ready (?:on|via) ([^\s;]+)`, outlet...)
	if err != nil {
		return "", err
	}
	inlet := []string{"inlet", "bench", "--from", "0"}
	if way == "direct" {
		inlet = append(inlet, "--direct", at)
	}
	return start("inlet", `^portal: inlet bench listening on (127\.0\.0\.1:\d+)`, inlet...)
}
