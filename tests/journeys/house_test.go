// Package journeys_test walks whole ways with real processes: an authority, a relay,
// outlets and inlets, as a person would start them.
package journeys_test

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/tests/process"
)

var portal *process.Portal

// serviceEnv makes this program a service in a process of its own.
const serviceEnv = "JOURNEYS_SERVICE"

func TestMain(m *testing.M) {
	if os.Getenv(serviceEnv) != "" {
		s, err := serve()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Fprintln(os.Stderr, "listening on", s.addr())
		select {} // until SIGTERM
	}
	if setting := os.Getenv(siegeEnv); setting != "" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		s, err := pour(ctx, setting)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Fprintf(os.Stderr, "begun %d refused %d\n", s.begun.Load(), s.refused.Load())
		os.Exit(0)
	}
	dir, err := os.MkdirTemp("", "portal-journeys-")
	if err == nil {
		portal, err = process.BuildPortal(context.Background(), dir)
	}
	code := 1
	if err == nil {
		// A third of their time is waiting. -parallel counts when it is given.
		flag.Set("test.parallel", "4")
		code = m.Run()
	} else {
		fmt.Fprintln(os.Stderr, "journeys:", err)
	}
	os.RemoveAll(dir)
	os.Exit(code)
}

// long says whether the long forms run, as `make long` does.
func long() bool { return os.Getenv("PORTAL_LONG") != "" }

// bar is a time or a share that a figure must keep to. It is judged in the long form alone, which has
// the machine to itself.
func bar(t testing.TB, keeps bool, format string, args ...any) {
	t.Helper()
	if long() && !keeps {
		t.Errorf(format, args...)
	}
}

// house is a set of homes with one authority.
type house struct {
	t         testing.TB
	ctx       context.Context
	dir       string
	issuer    string           // the host whose home has the authority
	authority string           // its address
	keeper    *process.Process // the authority

	within map[string][]string // what a host's commands begin with; see process.Portal
}

func newHouse(t testing.TB, flags ...string) *house {
	t.Helper()
	h := newHomes(t, "authority")
	h.keeper = h.start("authority", append([]string{"authority", "--listen", "127.0.0.1:0"}, flags...)...)
	h.authority = h.line(h.keeper, `authority ready on (\S+) `)
	return h
}

// newHomes is a house in which nothing runs yet.
func newHomes(t testing.TB, issuer string) *house {
	t.Helper()
	limit := 4 * time.Minute
	if long() {
		limit = time.Hour
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return &house{t: t, ctx: ctx, dir: t.TempDir(), issuer: issuer}
}

func (h *house) home(host string) string {
	dir := filepath.Join(h.dir, host)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		h.t.Fatal(err)
	}
	return dir
}

func (h *house) portal(host string) *process.Portal {
	return &process.Portal{Path: portal.Path, Within: h.within[host]}
}

// start starts a long-running command of a host and stops it at the test's end.
func (h *house) start(host string, args ...string) *process.Process {
	h.t.Helper()
	p, err := h.portal(host).Start(h.home(host), args...)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { p.Stop(5 * time.Second) })
	return p
}

func (h *house) run(host string, args ...string) string {
	h.t.Helper()
	out, err := h.portal(host).Run(h.ctx, h.home(host), args...)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// line waits for a line and gives its first submatch.
func (h *house) line(p *process.Process, pattern string) string {
	h.t.Helper()
	m, err := p.Line(h.ctx, regexp.MustCompile(pattern))
	if err != nil {
		h.t.Fatal(err)
	}
	if len(m) > 1 {
		return m[1]
	}
	return m[0]
}

// ticket makes a file with a ticket for a host.
func (h *house) ticket(host string, grants ...string) (file string) {
	h.t.Helper()
	ticket := h.run(h.issuer, append([]string{"ticket", "create", "--name", host}, grants...)...)
	file = filepath.Join(h.dir, host+".ticket")
	if err := os.WriteFile(file, []byte(ticket), 0o600); err != nil {
		h.t.Fatal(err)
	}
	return file
}

// enroll makes a host a member with what the flags grant.
func (h *house) enroll(host string, grants ...string) {
	h.t.Helper()
	h.run(host, "enroll", h.ticket(host, grants...))
}

// id is a host's identity.
func (h *house) id(host string) identity.ID {
	h.t.Helper()
	id, err := identity.ParseID(strings.TrimSpace(h.run(host, "identity", "show")))
	if err != nil {
		h.t.Fatal(err)
	}
	return id
}

// member is the authority of which a host is one.
func (h *house) member(host string) identity.ID {
	h.t.Helper()
	home, err := identity.Open(h.home(host))
	if err != nil {
		h.t.Fatal(err)
	}
	m, err := home.Membership()
	if err != nil {
		h.t.Fatal(err)
	}
	return m.Authority
}

// serial is that of the credential which a host's home has now.
func (h *house) serial(host string) string {
	h.t.Helper()
	var list []struct{ Serial string }
	if err := json.Unmarshal([]byte(h.run(host, "credential", "list", "-o", "json")), &list); err != nil || len(list) != 1 {
		h.t.Fatalf("%v: %v", list, err)
	}
	return list[0].Serial
}

// outlet starts an outlet for members whose role is agent, and gives its address. With no target in
// to the flags end with "--" and a command.
func (h *house) outlet(listen, to string, flags ...string) (*process.Process, string) {
	h.t.Helper()
	args := []string{"outlet", "db", "--listen", listen, "--allow", `principal.role == "agent"`}
	if to != "" {
		args = append(args, "--to", to)
	}
	p := h.start("db1", append(args, flags...)...)
	return p, h.line(p, `outlet db ready on ([^; ]+)`)
}

// inlet starts an inlet and gives its address once it listens.
func (h *house) inlet(host, from, direct string, flags ...string) (*process.Process, string) {
	h.t.Helper()
	args := []string{"inlet", "db", "--from", from, "--direct", direct}
	p := h.start(host, append(args, flags...)...)
	return p, h.line(p, `inlet db listening on (\S+)`)
}

// unixPath is the path in an address unix:path.
func unixPath(addr string) (string, bool) { return strings.CutPrefix(addr, "unix:") }

// way is an outlet in front of a service and an inlet that is ready.
type way struct {
	*house
	out, in *process.Process
	lanes   string // the outlet's address
	addr    string // the inlet's
}

func newWay(t testing.TB, to string) *way {
	t.Helper()
	w := &way{house: newHouse(t)}
	w.enroll("db1", "--serve", "db")
	w.enroll("bot", "--attr", "role=agent")
	w.out, w.lanes = w.outlet("127.0.0.1:0", to, "--max-streams", "20000")
	w.in, w.addr = w.inlet("bot", "0", w.lanes, "--max-streams", "20000")
	w.line(w.in, `inlet db ready direct`)
	return w
}
