package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/portal-tunnel/portal/tests/process"
)

// A system is something that TCP connections can be sent through to the target.
type system struct {
	key, name string
	is        string   // what is measured, in one line
	peer      bool     // somebody else's: may be missing, may break
	seldom    bool     // not in a run that names no systems
	programs  []string // without one of them it is missing
	install   string   // how to get them
	version   []string // the command that tells it
	streams   int      // at most so many idle ones; 0: any
	// descriptors of one of its processes for a stream; 0: 2
	descriptors int
	way         string // of portal, which is not found but built

	start func(ctx context.Context, d *deployment) (addr string, err error) // where its connections are taken
}

var systems = []system{
	{key: "nothing", name: bare, is: "TCP to the target",
		start: func(ctx context.Context, d *deployment) (string, error) { return d.link(ctx, d.target) }},
	{key: "copy", name: yardstick, is: "a read and a write of up to 64 KiB in Go, twice; no cipher",
		start: func(ctx context.Context, d *deployment) (string, error) { return d.forwarders(ctx, "copy") }},
	{key: "splice", name: "two forwarders, splice", is: "the kernel moves the bytes; no cipher", seldom: true, descriptors: 6, // a pipe each way
		start: func(ctx context.Context, d *deployment) (string, error) { return d.forwarders(ctx, "splice") }},
	{key: "socat", name: "two socats", is: "a process for each connection; no cipher", peer: true,
		programs: []string{"socat"}, install: "Debian: socat", version: []string{"socat", "-V"}, streams: 500, // two processes each
		start: startSocat},
	{key: "ssh", name: "ssh -L", is: "one connection with a channel for each; the ciphers that both prefer", peer: true,
		programs: []string{"ssh", "ssh-keygen", "sshd"}, install: "Debian: openssh-client openssh-server", version: []string{"ssh", "-V"},
		start: startSSH},
	{key: "stunnel", name: "stunnel", is: "a TLS connection for each, certificates at both ends", peer: true,
		programs: []string{"stunnel"}, install: "Debian: stunnel4", version: []string{"stunnel", "-version"},
		start: startStunnel},
	{key: "spiped", name: "spiped", is: "a connection for each; one secret key at both ends", peer: true,
		programs: []string{"spiped"}, install: "Debian: spiped", version: []string{"spiped", "-v"},
		start: startSpiped},
	{key: "ghostunnel", name: "ghostunnel", is: "a TLS connection for each, certificates at both ends", peer: true,
		programs: []string{"ghostunnel"}, install: "go install github.com/ghostunnel/ghostunnel@latest", version: []string{"ghostunnel", "--version"},
		start: startGhostunnel},
	{key: "chisel", name: "chisel", is: "ssh in a WebSocket; a password and the server's fingerprint", peer: true,
		programs: []string{"chisel"}, install: "go install github.com/jpillora/chisel@latest", version: []string{"chisel", "--version"},
		start: startChisel},
	{key: "frp", name: "frp stcp", is: "through frps; useEncryption at both ends, beside the TLS to frps that is its default", peer: true,
		programs: []string{"frps", "frpc"}, install: "go install github.com/fatedier/frp/cmd/frps@latest github.com/fatedier/frp/cmd/frpc@latest", version: []string{"frps", "--version"},
		start: startFrp},
	{key: "rathole", name: "rathole", is: "Noise NK between its two ends", peer: true,
		programs: []string{"rathole"}, install: "cargo install rathole", version: []string{"rathole", "--version"},
		start: startRathole},
	portalSystem("portal", "portal, direct", "direct", false),
	portalSystem("relay", "portal, one relay", "relay", false),
	portalSystem("twohops", "portal, two relays", "twohops", false),
	portalSystem("yamux", "portal, relay, yamux", "yamux", true),
}

const (
	bare      = "nothing in between"
	yardstick = "two forwarders, copy" // whose multiples the others are given in
)

func portalSystem(key, name, way string, seldom bool) system {
	is := map[string]string{
		"direct":  "the inlet dials the outlet",
		"relay":   "lanes joined by a relay, which hosts the authority",
		"twohops": "the inlet goes on by --via from one relay to another, where the outlet is",
		"yamux":   "the outlet has one connection to the relay",
	}[way]
	return system{key: key, name: name, is: is, seldom: seldom, way: way,
		start: func(ctx context.Context, d *deployment) (string, error) { return d.portal(ctx, way) }}
}

// systemKeys are the names of all systems, or of those that a run takes when it is told none.
func systemKeys(all bool) (keys []string) {
	for _, s := range systems {
		if all || !s.seldom {
			keys = append(keys, s.key)
		}
	}
	return keys
}

func chooseSystems(names string) (chosen []system, err error) {
	keys := strings.Split(names, ",")
	switch names {
	case "":
		keys = systemKeys(false)
	case "all":
		keys = systemKeys(true)
	}
	for _, k := range keys {
		i := slices.IndexFunc(systems, func(s system) bool { return s.key == k })
		if i < 0 {
			return nil, fmt.Errorf("no system %q; there are %s", k, strings.Join(systemKeys(true), ", "))
		}
		chosen = append(chosen, systems[i])
	}
	return chosen, nil
}

// missing says which program of a system is not installed, and how to install it.
func (s system) missing() error {
	for _, p := range s.programs {
		if _, err := programPath(p); err != nil {
			return &missing{fmt.Sprintf("%s is not installed (%s)", p, s.install)}
		}
	}
	return nil
}

type missing struct{ why string }

func (m *missing) Error() string { return m.why }

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

func (d *deployment) forwarders(ctx context.Context, how string) (string, error) {
	path, err := os.Executable()
	if err != nil {
		return "", err
	}
	one := func(at *host, name, ip, to string) (string, error) {
		p, err := d.run(at, name, path, "forward", how, ip, to)
		if err != nil {
			return "", err
		}
		return line(ctx, p, "^"+listening+`(\S+)$`)
	}
	exit, err := one(d.far, "exit", d.far.ip, d.target)
	if err != nil {
		return "", err
	}
	if exit, err = d.link(ctx, exit); err != nil {
		return "", err
	}
	return one(d.near, "entry", loopback, exit)
}

// portal starts an authority, an outlet and an inlet, each a process with its own home: direct,
// through a relay that hosts the authority, by either carrier, or through that one and another.
func (d *deployment) portal(ctx context.Context, way string) (string, error) {
	binary := d.binaries.shipped
	if d.setting.measured {
		binary = d.binaries.measured
	}
	home := func(name string) string { return d.dir + "/" + name }
	run := func(name string, args ...string) (string, error) { return binary.Run(ctx, home(name), args...) }
	start := func(at *host, name, pattern string, args ...string) (string, error) {
		cmd := at.command(binary.Path, append([]string{"--home", home(name)}, args...)...)
		cmd.Env = append(cmd.Env, "MEASURE_DIR="+d.dir)
		p, err := process.Start("portal "+name, cmd)
		if err != nil {
			return "", err
		}
		d.parts = append(d.parts, &part{name: name, process: p, measured: d.setting.measured})
		if name == "inlet" {
			if _, err := line(ctx, p, `^portal: inlet bench (ready) (?:direct|via) `); err != nil {
				return "", err
			}
		}
		return line(ctx, p, pattern)
	}
	enroll := func(by, name string, grants ...string) error {
		ticket, err := run(by, append([]string{"ticket", "create", "--name", name}, grants...)...)
		if err != nil {
			return err
		}
		file, err := d.file(name+".ticket", ticket)
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
	serve := []string{members, "--listen", d.far.ip + ":0"}
	if way != "direct" {
		members = "relay"
		serve = []string{members, "--listen", d.far.ip + ":0", "--authority"}
	}
	at, err := start(d.far, members, ready, serve...)
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
	outlet := []string{"outlet", "bench", "--to", d.target, "--allow", `principal.role == "bench"`, "--max-streams", streams, "--max-dials", dials}
	switch way {
	case "direct":
		outlet = append(outlet, "--listen", d.far.ip+":0")
	case "yamux":
		outlet = append(outlet, "--carrier", "yamux")
	}
	outletAt, err := start(d.far, "outlet", `^portal: outlet bench ready (?:on|via) ([^\s;]+)`, outlet...)
	if err != nil {
		return "", err
	}

	inlet := []string{"inlet", "bench", "--from", "0", "--max-streams", streams}
	if way == "direct" {
		if outletAt, err = d.link(ctx, outletAt); err != nil {
			return "", err
		}
		inlet = append(inlet, "--direct", outletAt)
		return start(d.near, "inlet", `^portal: inlet bench listening on (127\.0\.0\.1:\d+)`, inlet...)
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
		if at, err = start(d.far, first, ready, "relay", "--listen", d.far.ip+":0", "--trust", authority,
			"--next", "last="+last, "--allow-next", `principal.role == "bench"`); err != nil {
			return "", err
		}
		then = "," + strings.Split(last, "@")[0] + "@last"
	}
	if at, err = d.link(ctx, at); err != nil {
		return "", err
	}
	if at, err = pinned(first, at); err != nil {
		return "", err
	}
	return start(d.near, "inlet", `^portal: inlet bench listening on (127\.0\.0\.1:\d+)`, append(inlet, flag, at+then)...)
}
