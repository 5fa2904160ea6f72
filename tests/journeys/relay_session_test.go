package journeys_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/portal-tunnel/portal/examples/postgres/server"
	"github.com/portal-tunnel/portal/tests/process"
)

// typed is a line of README.md that somebody types, and what it shows below.
type typed struct {
	host, line string
	shows      []string
}

// section is what is typed under a heading of README.md.
func section(t testing.TB, heading string) (all []typed) {
	t.Helper()
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(b), "\n## "+heading+"\n")
	text, _, _ = strings.Cut(text, "\n## ")
	prompt := regexp.MustCompile(`^(\w+)\$ +(.*)$`)
	for i, block := range strings.Split(text, "\n```\n") {
		if i%2 == 0 {
			continue // between blocks
		}
		for line := range strings.SplitSeq(block, "\n") {
			if m := prompt.FindStringSubmatch(line); m != nil {
				all = append(all, typed{host: m[1], line: m[2]})
			} else if n := len(all); n > 0 && strings.HasPrefix(line, "portal: ") {
				all[n-1].shows = append(all[n-1].shows, line)
			}
		}
	}
	if len(all) == 0 {
		t.Fatalf("README.md has nothing to type under %q", heading)
	}
	return all
}

// terminals are where the lines are typed: a home for each host, where ssh leads to another.
type terminals struct {
	*house
	says    *strings.Replacer // what README.md calls them, to what they are here
	ids     map[string]string // PR7M… of README.md to the identifier here
	running map[string]*process.Process
}

// openTerminals has README.md's ports and names stand for what is free on this machine.
func openTerminals(t testing.TB, db *server.Server) *terminals {
	t.Helper()
	_, relay, _ := net.SplitHostPort(free(t))
	_, inlet, _ := net.SplitHostPort(free(t))
	return &terminals{
		house:   newHomes(t, "relay"),
		says:    strings.NewReplacer("relay.example.com", "localhost", ":4000", ":"+relay, "15432", inlet, "5432", fmt.Sprint(db.Port)),
		ids:     make(map[string]string),
		running: make(map[string]*process.Process),
	}
}

func (w *terminals) command(ctx context.Context, host, line string) *exec.Cmd {
	line = w.says.Replace(line)
	for short, id := range w.ids {
		line = strings.ReplaceAll(line, short, id)
	}
	cmd := exec.CommandContext(ctx, "sh", "-c", `ssh() { host=$1; shift; PORTAL_HOME="$HOMES/$host" "$@"; }
`+line)
	cmd.Env = append(process.Environ(), "HOMES="+w.dir, "PORTAL_HOME="+w.home(host), "PATH="+filepath.Dir(portal.Path)+":"+os.Getenv("PATH"))
	return cmd
}

var shortID = regexp.MustCompile(`P[A-Z2-7]{3}…`)

// shown is a line of README.md as a pattern: identifiers are others here, and a machine may be
// without ::1.
func (w *terminals) shown(line string) *regexp.Regexp {
	text := regexp.QuoteMeta(w.says.Replace(line))
	text = shortID.ReplaceAllString(text, `P[A-Z2-7]{3,}…?`)
	text = regexp.MustCompile(` and \\\[::1\\\]:\d+`).ReplaceAllString(text, `( and \[::1\]:\d+)?`)
	return regexp.MustCompile("^" + text + "$")
}

// do types a line. What goes on is left running, named by its command.
func (w *terminals) do(l typed) string {
	w.t.Helper()
	name := strings.Fields(l.line)[1]
	if strings.HasPrefix(l.line, "portal ") && !strings.Contains(l.line, "|") && name != "identity" {
		p, err := process.Start("portal "+name, w.command(context.Background(), l.host, "exec "+l.line))
		if err != nil {
			w.t.Fatal(err)
		}
		w.t.Cleanup(func() { p.Stop(patience) })
		w.running[name] = p
		for _, line := range l.shows {
			if _, err := p.Line(w.ctx, w.shown(line)); err != nil {
				w.t.Fatal(err)
			}
		}
		return ""
	}
	cmd := w.command(w.ctx, l.host, l.line)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		w.t.Fatalf("%s$ %s: %v\n%s", l.host, l.line, err, stderr.String())
	}
	for _, line := range l.shows {
		found := false
		for said := range strings.Lines(stderr.String()) {
			found = found || w.shown(line).MatchString(strings.TrimSpace(said))
		}
		if !found {
			w.t.Errorf("%s$ %s\nshows\n%s, not %s", l.host, l.line, stderr.String(), line)
		}
	}
	return strings.TrimSpace(stdout.String())
}

const threeHosts = "A private PostgreSQL in two minutes"

// orders is what stands behind the outlet of README.md.
func orders(t *testing.T) *server.Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	db, err := server.Start(ctx, &server.Options{MaxConnections: 40, Setup: `
create role reader login;
create database orders owner reader;
\connect orders reader
create table orders as select generate_series(1, 1234) as id;
`})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// query types the psql of README.md with a query behind it.
func (w *terminals) query(psql typed) {
	w.t.Helper()
	psql.line += " -XAtc 'select count(*) from orders'"
	if got := w.do(psql); got != "1234" {
		w.t.Errorf("%s\nsays %s", psql.line, got)
	}
}

// pgbench fills tables through the portal, reads them and writes them, and compares the books.
func (w *terminals) pgbench(psql typed) {
	w.t.Helper()
	bench := func(args string) string {
		w.t.Helper()
		return w.do(typed{host: psql.host, line: strings.Replace(psql.line, "psql", "pgbench "+args, 1)})
	}
	each := 40
	if long() {
		each = 2000
	}
	bench("-i -q -s 1")
	for _, builtin := range []string{"-S", "-b tpcb-like"} {
		out := bench(fmt.Sprintf("-n -c 10 -j 2 -t %d %s", each, builtin))
		if want := fmt.Sprintf("%d/%d", 10*each, 10*each); !strings.Contains(out, want) {
			w.t.Errorf("pgbench %s: not %s transactions:\n%s", builtin, want, out)
		}
	}
	psql.line += ` -XAtc 'select (select count(*) from pgbench_history),
		(select sum(delta) from pgbench_history) = all(array[(select sum(abalance) from pgbench_accounts),
			(select sum(bbalance) from pgbench_branches), (select sum(tbalance) from pgbench_tellers)])'`
	if got, want := w.do(psql), fmt.Sprintf("%d|t", 10*each); got != want {
		w.t.Errorf("the books say %s, not %s", got, want)
	}
}

func TestTheThreeHostsOfTheReadmeServePsqlAndPgbench(t *testing.T) {
	t.Parallel()
	w := openTerminals(t, orders(t))
	for _, l := range section(t, threeHosts) {
		if strings.HasPrefix(l.line, "psql ") {
			w.query(l)
			w.pgbench(l)
		} else {
			w.do(l)
		}
	}
	if len(w.running) != 3 {
		t.Errorf("%d commands go on, not relay, outlet and inlet", len(w.running))
	}
}

func TestTheBlindRelayOfTheReadmeServesPsql(t *testing.T) {
	t.Parallel()
	w := openTerminals(t, orders(t))
	for _, l := range section(t, "A blind relay") {
		id := w.do(l)
		switch strings.Fields(l.line)[1] {
		case "identity":
			w.ids[shortID.FindString(l.line)] = id
		case "authority":
			said, err := w.running["authority"].Line(w.ctx, regexp.MustCompile(`--trust (P[A-Z2-7]{52})$`))
			if err != nil {
				t.Fatal(err)
			}
			w.ids[shortID.FindString(l.shows[0])] = said[1]
		}
	}
	for _, p := range []string{"relay", "authority"} {
		if _, err := w.running[p].Line(w.ctx, regexp.MustCompile(p+" ready")); err != nil {
			t.Fatal(err)
		}
	}
	// From then on tickets are made on db1, and all else is as with the first relay.
	for _, l := range section(t, threeHosts) {
		switch {
		case strings.HasPrefix(l.line, "portal relay"):
		case strings.HasPrefix(l.line, "portal ticket"):
			l.host = "db1"
			w.do(l)
		case strings.HasPrefix(l.line, "psql"):
			w.query(l)
		default:
			w.do(l)
		}
	}
	if out := w.fails("relay", 2, "ticket", "create", "--name", "eve"); !strings.Contains(out, "PORTAL-E0212") {
		t.Errorf("the relay's host is told %s", out)
	}
}
