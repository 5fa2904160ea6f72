package journeys_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/tests/process"
)

// Idle streams are held, cost little, and leave nothing behind: no descriptor, and no goroutine
// that a pair of processes which served a single stream has not.
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

	w := newWay(t, m[1])
	processes := map[string]*process.Process{"outlet": w.out, "inlet": w.in}
	descriptors, memory := map[string]int{}, map[string]int{}
	for name, p := range processes {
		descriptors[name], memory[name] = settled(t, p, 0), rss(t, p)
	}
	conns := make([]net.Conn, n)
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

	one := newWay(t, m[1])
	ready(t, one.addr)
	for name, pair := range map[string][2]*process.Process{"outlet": {one.out, w.out}, "inlet": {one.in, w.in}} {
		settled(t, pair[0], descriptors[name])
		before, after := goroutines(t, pair[0]), goroutines(t, pair[1])
		if len(after) > len(before) {
			t.Errorf("%s: %d goroutines after one stream, %d after %d:\n%s", name,
				len(before), len(after), n, strings.Join(after, "\n"))
		}
	}
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
	for end := time.Now().Add(patience); ; {
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.Pid()))
		if err != nil {
			t.Fatal(err)
		}
		if want == 0 || len(fds) <= want {
			return len(fds)
		}
		if time.Now().After(end) {
			t.Fatalf("%s has %d descriptors, %d before", p.Name, len(fds), want)
		}
	}
}

// goroutines ends a process by SIGQUIT, upon which Go's runtime lists the goroutines there are, and
// gives for each of the program's what it waits for and who created it; the runtime's own come and
// go with its collections.
func goroutines(t testing.TB, p *process.Process) []string {
	t.Helper()
	if err := syscall.Kill(p.Pid(), syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	var all []string
	head := ""
	for _, line := range p.Lines() {
		if strings.HasPrefix(line, "goroutine ") {
			head = line
		} else if by, ok := strings.CutPrefix(line, "created by "); ok && !strings.HasPrefix(by, "runtime.") {
			all = append(all, head+" "+line)
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
