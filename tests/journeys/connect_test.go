package journeys_test

import (
	"bytes"
	crypto "crypto/rand"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/tests/fault/proxy"
	"github.com/portal-tunnel/portal/tests/process"
)

// connect runs a command through `portal connect db` as bot, and gives what it printed and its exit
// status.
func (h *house) connect(lanes string, stdin []byte, args ...string) (stdout, stderr string, status int) {
	h.t.Helper()
	cmd := exec.CommandContext(h.ctx, portal.Path, append([]string{"--home", h.home("bot"), "connect", "db", "--direct", lanes}, args...)...)
	cmd.Env, cmd.Stdin = process.Environ(), bytes.NewReader(stdin)
	var out, failure bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &failure
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		h.t.Fatal(err)
	}
	return out.String(), failure.String(), cmd.ProcessState.ExitCode()
}

// psql is given neither a host nor a port: connect leads it to the database, by a socket that only
// this user can open.
func TestPsqlIsLedByConnect(t *testing.T) {
	t.Parallel()
	db := postgres(t, 20)
	h := newHouse(t)
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	out, lanes := h.outlet("127.0.0.1:0", db.Addr())

	for name, c := range map[string]struct {
		args   []string
		stdout string
		status int
		stderr string
	}{
		"by PGHOST and PGPORT": {[]string{"--kind", "pg", "--", "psql", "-U", "bench", "-d", "bench", "-XAtc", "select 6*7"}, "42\n", 0, ""},
		"by a URL with a socket": {[]string{"--kind", "pg", "--env", "DATABASE_URL=postgres://bench@{addr}/bench", "--",
			"sh", "-c", `psql "$DATABASE_URL" -XAtc "select 6*7"`}, "42\n", 0, ""},
		"by a URL with a host in its query": {[]string{"--kind", "pg", "--env", "DATABASE_URL=postgres:///bench?user=bench&host={db.host}&port={db.port}", "--",
			"sh", "-c", `psql "$DATABASE_URL" -XAtc "select 6*7"`}, "42\n", 0, ""},
		"by a URL with a port": {[]string{"--env", "DATABASE_URL=postgres://bench@{addr}/bench", "--",
			"sh", "-c", `psql "$DATABASE_URL" -XAtc "select 6*7"`}, "42\n", 0, ""},
		"a query that fails": {[]string{"--kind", "pg", "--", "psql", "-U", "bench", "-d", "bench", "-XAtc", "select 6/0"}, "", 1, "division by zero"},
	} {
		t.Run(name, func(t *testing.T) {
			stdout, stderr, status := h.connect(lanes, nil, c.args...)
			if stdout != c.stdout || status != c.status || !strings.Contains(stderr, c.stderr) || c.stderr == "" && stderr != "" {
				t.Errorf("exit status %d\n%s%s", status, stdout, stderr)
			}
		})
	}

	// What psql says when the database is gone: the outlet lets us in, and its target is not there.
	out.Stop(patience)
	h.outlet(lanes, "127.0.0.1:1")
	stdout, stderr, status := h.connect(lanes, nil, "--kind", "pg", "--", "psql", "-U", "bench", "-d", "bench", "-XAtc", "select 6*7")
	if status != 2 || stdout != "" || !strings.Contains(stderr, "FATAL:  portal: db cannot be reached") || !strings.Contains(stderr, "PORTAL-E0402") {
		t.Errorf("exit status %d\n%s%s", status, stdout, stderr)
	}
}

// A real ssh reaches a real sshd behind an outlet by `ProxyCommand portal connect`.
func TestSSHGoesThroughConnectAsItsProxyCommand(t *testing.T) {
	t.Parallel()
	sshd, err := exec.LookPath("/usr/sbin/sshd")
	if err != nil {
		t.Skip("no sshd: apt-get install openssh-server")
	}
	if _, err := exec.LookPath("ssh"); err != nil {
		t.Skip("no ssh: apt-get install openssh-client")
	}
	if os.Geteuid() == 0 { // its unprivileged child enters this, which a service's start makes
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			t.Skip(err)
		}
	}
	h := newHouse(t)
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	file := func(name string) string { return filepath.Join(h.dir, name) }
	for _, key := range []string{"host", "user"} {
		if b, err := exec.CommandContext(h.ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file(key)).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, b)
		}
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := free.Addr().String()
	free.Close()
	config := fmt.Sprintf("ListenAddress %s\nHostKey %s\nAuthorizedKeysFile %s\nStrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\nLogLevel INFO\n", at, file("host"), file("user.pub"))
	if err := os.WriteFile(file("sshd_config"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	server, err := process.Start("sshd", exec.Command(sshd, "-D", "-e", "-f", file("sshd_config")))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Stop(patience) })
	h.line(server, "Server listening on "+regexp.QuoteMeta(strings.Split(at, ":")[0])+" port")
	_, lanes := h.outlet("127.0.0.1:0", at)
	ssh := func(stdin []byte, command string) ([]byte, string, error) {
		cmd := exec.CommandContext(h.ctx, "ssh", "-F", "none", "-i", file("user"), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
			"-o", "StrictHostKeyChecking=accept-new", "-o", "UserKnownHostsFile="+file("known"), "-o", "HostKeyAlias=db1",
			"-o", fmt.Sprintf("ProxyCommand='%s' --home '%s' connect db --direct %s", portal.Path, h.home("bot"), lanes), "db1", command)
		cmd.Env, cmd.Stdin = process.Environ(), bytes.NewReader(stdin)
		var out, failure bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &failure
		err := cmd.Run()
		return out.Bytes(), failure.String(), err
	}
	sent := make([]byte, 8<<20)
	crypto.Read(sent)
	got, failure, err := ssh(sent, "cat")
	if err != nil || !bytes.Equal(got, sent) || strings.Contains(failure, "portal:") {
		t.Errorf("%d of %d bytes came back: %v\n%s", len(got), len(sent), err, failure)
	}
	exit := (*exec.ExitError)(nil)
	if _, failure, err := ssh(nil, "exit 23"); !errors.As(err, &exit) || exit.ExitCode() != 23 {
		t.Errorf("%v\n%s", err, failure)
	}
}

// Whatever is cut, and wherever, also in the last bytes: the exit status is 0 only when everything
// arrived on both sides, and else stdout and the service have a beginning of what was sent.
func TestAStreamOnStdinAndStdoutIsWholeOrItsExitStatusSaysNo(t *testing.T) {
	t.Parallel()
	s := newService(t)
	h := newHouse(t)
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	_, lanes := h.outlet("127.0.0.1:0", s.addr())
	p, err := proxy.Listen("", lanes)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	places := 4
	if long() {
		places = 40
	}
	whole, cut := 0, 0
	try := func(what string) {
		t.Helper()
		number, first := s.numbered('H')
		stdout, stderr, status := h.connect(p.Addr(), append(first, pattern()...))
		within := patience
		if status != 0 { // the service need not have seen the stream
			within = time.Second
		}
		r, told := s.result(number, within)
		want := string(pattern())
		switch {
		case status == 0:
			whole++
			if stdout != want || !told || r.err != nil || string(r.bytes) != want {
				t.Errorf("%s: exit status 0, %d bytes came back and %d arrived (%v)", what, len(stdout), len(r.bytes), r.err)
			}
		case status == 1:
			cut++
			if !strings.HasPrefix(want, stdout) || !strings.HasPrefix(want, string(r.bytes)) || told && r.err == nil && len(r.bytes) < transfer {
				t.Errorf("%s: %d bytes came back and %d arrived (%v)\n%s", what, len(stdout), len(r.bytes), r.err, stderr)
			}
			// It says which of the two may be cut.
			switch {
			case strings.Contains(stderr, "portal: outlet db: cut behind"):
			case strings.Contains(stderr, "it is not known whether all of stdin has arrived"), strings.Contains(stderr, "stdout is whole"):
				if stdout != want {
					t.Errorf("%s: %d bytes came back, and it says\n%s", what, len(stdout), stderr)
				}
			default:
				t.Errorf("%s: it says\n%s", what, stderr)
			}
		default:
			t.Errorf("%s: exit status %d\n%s", what, status, stderr)
		}
	}
	for _, kind := range []proxy.Kind{proxy.FIN, proxy.RST, proxy.Flip} {
		for _, direction := range []proxy.Direction{proxy.Out, proxy.In} {
			for range places {
				// Behind the handshake and the question, which may be asked again.
				for _, at := range []int64{16<<10 + rand.Int64N(transfer), transfer - 4<<10 + rand.Int64N(16<<10)} {
					fired := p.Arm(proxy.Fault{Kind: kind, Direction: direction, At: at}).Done
					try(fmt.Sprintf("%v at %d, direction %v", kind, at, direction))
					select {
					case <-fired:
					default: // it was over before
						p.Arm(proxy.Fault{Kind: kind, Direction: direction, At: 1 << 40})
					}
				}
			}
		}
	}
	try("nothing")
	if whole == 0 || cut == 0 {
		t.Errorf("%d whole and %d cut: that shows nothing", whole, cut)
	}
	t.Logf("%d whole, %d cut", whole, cut)
}
