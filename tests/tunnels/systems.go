package tunnels

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/portal-tunnel/portal/tests/process"
)

// A System is something that TCP connections can be sent through to the target.
type System struct {
	Key, Name string
	Is        string   // what is measured, in one line
	Peer      bool     // somebody else's: may be missing, may break
	Seldom    bool     // not in a run that names no systems
	Programs  []string // without one of them it is missing
	Install   string   // how to get them
	Version   []string // the command that tells it
	Streams   int      // at most so many idle ones; 0: any
	// Descriptors of one of its processes for a stream; 0: 2
	Descriptors int
	Way         string // of portal, which is not found but built
	Backwards   bool   // what Site.Between is between is dialled from the far host

	Start func(ctx context.Context, d *Deployment) (addr string, err error) // where its connections are taken
}

// Systems are portal, and the peers that do the same.
var Systems = []System{
	{Key: "socat", Name: "two socats", Is: "a process for each connection; no cipher", Peer: true,
		Programs: []string{"socat"}, Install: "Debian: socat", Version: []string{"socat", "-V"}, Streams: 500, // two processes each
		Start: startSocat},
	{Key: "ssh", Name: "ssh -L", Is: "one connection with a channel for each; the ciphers that both prefer", Peer: true,
		Programs: []string{"ssh", "ssh-keygen", "sshd"}, Install: "Debian: openssh-client openssh-server", Version: []string{"ssh", "-V"},
		Start: startSSH},
	{Key: "stunnel", Name: "stunnel", Is: "a TLS connection for each, certificates at both ends", Peer: true,
		Programs: []string{"stunnel"}, Install: "Debian: stunnel4", Version: []string{"stunnel", "-version"},
		Start: startStunnel},
	{Key: "spiped", Name: "spiped", Is: "a connection for each; one secret key at both ends", Peer: true,
		Programs: []string{"spiped"}, Install: "Debian: spiped", Version: []string{"spiped", "-v"},
		Start: startSpiped},
	{Key: "ghostunnel", Name: "ghostunnel", Is: "a TLS connection for each, certificates at both ends", Peer: true,
		Programs: []string{"ghostunnel"}, Install: "go install github.com/ghostunnel/ghostunnel@latest", Version: []string{"ghostunnel", "--version"},
		Start: startGhostunnel},
	{Key: "chisel", Name: "chisel", Is: "ssh in a WebSocket; a password and the server's fingerprint", Peer: true,
		Programs: []string{"chisel"}, Install: "go install github.com/jpillora/chisel@latest", Version: []string{"chisel", "--version"},
		Start: startChisel},
	{Key: "frp", Name: "frp stcp", Is: "through frps; useEncryption at both ends, beside the TLS to frps that is its default", Peer: true,
		Programs: []string{"frps", "frpc"}, Install: "go install github.com/fatedier/frp/cmd/frps@latest github.com/fatedier/frp/cmd/frpc@latest", Version: []string{"frps", "--version"},
		Start: startFrp},
	{Key: "rathole", Name: "rathole", Is: "Noise NK between its two ends", Peer: true,
		Programs: []string{"rathole"}, Install: "cargo install rathole", Version: []string{"rathole", "--version"},
		Backwards: true, Start: startRathole},
	{Key: "ockam", Name: "Ockam", Is: "a secure channel between two nodes, each of which takes any identity", Peer: true,
		Programs: []string{"ockam"}, Install: "cargo install ockam_command", Version: []string{"ockam", "--version"},
		Start: startOckam},
	portalSystem("portal", "portal, direct", "direct", false),
	portalSystem("relay", "portal, one relay", "relay", false),
	portalSystem("twohops", "portal, two relays", "twohops", false),
	portalSystem("yamux", "portal, relay, yamux", "yamux", true),
}

func portalSystem(key, name, way string, seldom bool) System {
	is := map[string]string{
		"direct":  "the inlet dials the outlet",
		"relay":   "lanes joined by a relay, which hosts the authority",
		"twohops": "the inlet goes on by --via from one relay to another, where the outlet is",
		"yamux":   "the outlet has one connection to the relay",
	}[way]
	return System{Key: key, Name: name, Is: is, Seldom: seldom, Way: way,
		Start: func(ctx context.Context, d *Deployment) (string, error) { return d.portal(ctx, way) }}
}

// Absent says which program of a system is not installed, and how to install it.
func (s System) Absent() error {
	for _, p := range s.Programs {
		if _, err := programPath(p); err != nil {
			return &Missing{fmt.Sprintf("%s is not installed (%s)", p, s.Install)}
		}
	}
	return nil
}

// Missing says that a program is not there.
type Missing struct{ Why string }

func (m *Missing) Error() string { return m.Why }

// programPath finds a program: sshd, which insists on being started by its full path, is not on
// everybody's.
func programPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil && name == "sshd" {
		path = "/usr/sbin/sshd"
		_, err = os.Stat(path)
	}
	return path, err
}

// portal starts an authority, an outlet and an inlet, each a process with its own home: direct,
// through a relay that hosts the authority, by either carrier, or through that one and another.
func (d *Deployment) portal(ctx context.Context, way string) (string, error) {
	home := func(name string) string { return d.Dir + "/" + name }
	run := func(name string, args ...string) (string, error) { return d.Portal.Run(ctx, home(name), args...) }
	start := func(at *Host, name, pattern string, args ...string) (string, error) {
		cmd := at.Command(d.Portal.Path, append([]string{"--home", home(name)}, args...)...)
		cmd.Env = append(cmd.Env, "MEASURE_DIR="+d.Dir)
		p, err := process.Start("portal "+name, cmd)
		if err != nil {
			return "", err
		}
		d.Parts = append(d.Parts, &Part{Name: name, Process: p, Measured: d.Measured})
		if name == "inlet" {
			if _, err := Line(ctx, p, `^portal: inlet bench (ready) (?:direct|via) `); err != nil {
				return "", err
			}
		}
		return Line(ctx, p, pattern)
	}
	enroll := func(by, name string, grants ...string) error {
		ticket, err := run(by, append([]string{"ticket", "create", "--name", name}, grants...)...)
		if err != nil {
			return err
		}
		file, err := d.File(name+".ticket", ticket)
		if err == nil {
			_, err = run(name, "enroll", file)
		}
		return err
	}
	pinned := func(name, addr string) (string, error) {
		id, err := run(name, "identity", "show")
		return strings.TrimSpace(id) + "@" + addr, err
	}

	const ready = `^portal: \w+ ready on ([^\s;]+)`
	members := "authority"
	serve := []string{members, "--listen", d.Far.IP + ":0"}
	if way != "direct" {
		members = "relay"
		serve = []string{members, "--listen", d.Far.IP + ":0", "--authority"}
	}
	at, err := start(d.Far, members, ready, serve...)
	if err != nil {
		return "", err
	}
	if err := enroll(members, "outlet", "--serve", "bench"); err != nil {
		return "", err
	}
	if err := enroll(members, "inlet", "--attr", "role=bench"); err != nil {
		return "", err
	}
	// Neither bounds what a load asks for.
	const streams, dials = "20000", "256"
	outlet := []string{"outlet", "bench", "--to", d.Target, "--allow", `principal.role == "bench"`, "--max-streams", streams, "--max-dials", dials}
	switch way {
	case "direct":
		outlet = append(outlet, "--listen", d.Far.IP+":0")
	case "yamux":
		outlet = append(outlet, "--carrier", "yamux")
	}
	outletAt, err := start(d.Far, "outlet", `^portal: outlet bench ready (?:on|via) ([^\s;]+)`, outlet...)
	if err != nil {
		return "", err
	}

	inlet := []string{"inlet", "bench", "--from", "0", "--max-streams", streams}
	if way == "direct" {
		if outletAt, err = d.Link(ctx, outletAt); err != nil {
			return "", err
		}
		inlet = append(inlet, "--direct", outletAt)
		return start(d.Near, "inlet", `^portal: inlet bench listening on (127\.0\.0\.1:\d+)`, inlet...)
	}
	first, flag, then := members, "--relay", ""
	if way == "twohops" {
		last, err := pinned(members, at)
		if err != nil {
			return "", err
		}
		authority, err := authorityOf(run, members)
		if err != nil {
			return "", err
		}
		first, flag = "first relay", "--via"
		if at, err = start(d.Far, first, ready, "relay", "--listen", d.Far.IP+":0", "--trust", authority,
			"--next", "last="+last, "--allow-next", `principal.role == "bench"`); err != nil {
			return "", err
		}
		then = "," + strings.Split(last, "@")[0] + "@last"
	}
	if at, err = d.Link(ctx, at); err != nil {
		return "", err
	}
	if at, err = pinned(first, at); err != nil {
		return "", err
	}
	return start(d.Near, "inlet", `^portal: inlet bench listening on (127\.0\.0\.1:\d+)`, append(inlet, flag, at+then)...)
}
