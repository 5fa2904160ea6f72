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
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/tests/baseline"
	"github.com/portal-tunnel/portal/tests/process"
)

// Idle streams are held, cost little, and leave nothing behind: no descriptor, and no goroutine. While
// they are open each costs one goroutine a process, for its local socket, besides those that a pair of
// processes has which served a single stream.
func TestIdleStreamsAreHeldAndLeaveNothingBehind(t *testing.T) {
	const n = 10000
	// Elsewhere than here: one process may not have the descriptors for both ends of all.
	s, err := process.Start("the service", asService())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Stop(patience) })
	m, err := s.Line(t.Context(), regexp.MustCompile(`listening on (\S+)`))
	if err != nil {
		t.Fatal(err)
	}

	w := newDumpedWay(t, m[1])
	processes := map[string]*process.Process{"outlet": w.out, "inlet": w.in}
	descriptors, memory := map[string]int{}, map[string]int{}
	for name, p := range processes {
		descriptors[name], memory[name] = settled(t, p, 0), rss(t, p)
	}
	conns := make([]net.Conn, n)
	open := func() {
		for i := range conns {
			c, err := connect(w.addr, []byte("E"))
			if err == nil {
				err = echo(c)
			}
			if err != nil {
				t.Fatalf("stream %d: %v", i, err)
			}
			conns[i] = c
		}
	}
	open()
	for name, p := range processes {
		t.Logf("%d idle streams: %s %d B of resident memory each", n, name, (rss(t, p)-memory[name])/n)
		if got := settled(t, p, 0); got < n {
			t.Errorf("%s has %d descriptors for %d streams: they are not held", name, got, n)
		}
	}
	for i, c := range conns {
		if err := echo(c); err != nil {
			t.Fatalf("stream %d after a while: %v", i, err)
		}
		c.Close()
	}
	for name, p := range processes {
		settled(t, p, descriptors[name])
	}

	// Opened once more, so that a goroutine which the first ones left behind is one too many.
	open()
	one := newDumpedWay(t, m[1])
	ready(t, one.addr)
	settled(t, one.out, descriptors["outlet"])
	settled(t, one.in, descriptors["inlet"])
	one.quit(t)
	w.quit(t)
	for name, pair := range map[string][2]*process.Process{"outlet": {one.out, w.out}, "inlet": {one.in, w.in}} {
		before, after := one.goroutines(t, pair[0]), w.goroutines(t, pair[1])
		t.Logf("%s: %d goroutines after one stream, %d with %d", name, len(before), len(after), n)
		if len(after) > n+len(before) {
			t.Errorf("%s: %d goroutines after one stream, %d with %d", name, len(before), len(after), n)
			kinds := map[string]int{}
			for _, g := range after {
				kinds[g]++
			}
			for g, k := range kinds {
				t.Logf("%d × %s", k, g)
			}
		}
		if len(after) < n { // the list was cut short, or a socket costs none: then ask for less here
			t.Errorf("%s lists %d goroutines for %d streams", name, len(after), n)
		}
	}
	for _, c := range conns {
		c.Close()
	}
}

// dumpedWay is a way whose processes write what they print to files: a list of 10,000 goroutines is
// more lines than a process.Process keeps.
type dumpedWay struct {
	way
	printed map[*process.Process]string
}

func newDumpedWay(t testing.TB, to string) *dumpedWay {
	t.Helper()
	w := &dumpedWay{way: way{house: newHouse(t), lanes: free(t), addr: free(t)}, printed: make(map[*process.Process]string)}
	w.enroll("db1", "--serve", "db")
	w.enroll("bot", "--attr", "role=agent")
	w.out = w.start(t, "db1", "outlet", "db", "--listen", w.lanes, "--allow", `principal.role == "agent"`, "--to", to, "--max-streams", "20000")
	w.in = w.start(t, "bot", "inlet", "db", "--from", w.addr, "--direct", w.lanes, "--max-streams", "20000")
	ready(t, w.addr)
	return w
}

func (w *dumpedWay) start(t testing.TB, host string, args ...string) *process.Process {
	t.Helper()
	file := filepath.Join(w.dir, host+".log")
	cmd := exec.Command("sh", append([]string{"-c", `exec "$0" "$@" 2>"$LOG"`, portal.Path, "--home", w.home(host)}, args...)...)
	cmd.Env = append(process.Environ(), "LOG="+file)
	p, err := process.Start("portal "+args[0], cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Stop(5 * time.Second) })
	w.printed[p] = file
	return p
}

// asService is this program as a service; see TestMain.
func asService() *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), serviceEnv+"=1")
	return cmd
}

// settled waits until a process has at most want descriptors; with 0 it says how many there are.
func settled(t testing.TB, p *process.Process, want int) int {
	t.Helper()
	m, err := baseline.Of(p.Pid())
	if err == nil && want != 0 {
		m.Descriptors = want
		slack := baseline.Slack{Children: 1000} // which nobody asks about
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		m, err = m.Back(ctx, slack)
	}
	if err != nil {
		t.Fatalf("%s: %v", p.Name, err)
	}
	return m.Descriptors
}

// quit ends both processes by SIGQUIT, upon which Go's runtime stops everything and lists the
// goroutines there are: both at once, or one would see the other's end.
func (w *dumpedWay) quit(t testing.TB) {
	t.Helper()
	for _, p := range []*process.Process{w.out, w.in} {
		if err := syscall.Kill(p.Pid(), syscall.SIGQUIT); err != nil {
			t.Fatal(err)
		}
	}
}

// goroutines gives for each of the program's that a process listed what it waited for and who created
// it; the runtime's own come and go with its collections.
func (w *dumpedWay) goroutines(t testing.TB, p *process.Process) []string {
	t.Helper()
	<-p.Done()
	printed, err := os.ReadFile(w.printed[p])
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	state := ""
	for line := range strings.Lines(string(printed)) {
		if head, ok := strings.CutPrefix(line, "goroutine "); ok {
			_, state, _ = strings.Cut(strings.TrimSuffix(head, ":\n"), " ")
			state, _, _ = strings.Cut(state, ",") // for how long does not matter
		} else if by, ok := strings.CutPrefix(line, "created by "); ok && !strings.HasPrefix(by, "runtime.") {
			by, _, _ = strings.Cut(by, " in goroutine ")
			all = append(all, state+" "+by)
		}
	}
	if len(all) == 0 {
		t.Fatalf("%s listed no goroutines", p.Name)
	}
	return all
}

func rss(t testing.TB, p *process.Process) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.Pid()))
	var size, resident int
	if err == nil {
		_, err = fmt.Sscan(string(b), &size, &resident)
	}
	if err != nil {
		t.Fatal(err)
	}
	return resident * os.Getpagesize()
}
