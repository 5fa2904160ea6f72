package journeys_test

import (
	"bufio"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/tests/process"
)

// A row is a relay that hosts the authority, an outlet and an inlet, each a process with a home and a
// log of its own; each can be killed and started again where it was. With direct the outlet listens
// itself, and the relay is the authority only.
type row struct {
	*house
	relay, out, in *process.Process
	at, lanes      string // the relay's address; with direct the outlet's
	addr           string // the inlet's
	o              rowOptions
	logs           map[*process.Process]string
}

type rowOptions struct {
	to     string
	direct bool
	from   string   // the inlet's; a free port unless said
	outlet []string // flags
	inlet  []string
	// shell is what each process's shell does first, by role, such as a limit: "ulimit -n 256".
	shell map[string]string
	// under is a command that each process runs under, by role, such as "ip netns exec NAME".
	under map[string]string
	host  string // the relay's; 127.0.0.1 unless said
	env   []string
}

func newRow(t testing.TB, o rowOptions) *row {
	t.Helper()
	w := &row{house: newHomes(t, "authority"), at: free(t), lanes: free(t), o: o, addr: o.from, logs: make(map[*process.Process]string)}
	if w.addr == "" {
		w.addr = free(t)
	}
	if o.host != "" {
		_, port, _ := strings.Cut(w.at, ":")
		w.at = o.host + ":" + port
	}
	w.startRelay()
	w.enroll("db1", "--serve", "db")
	w.enroll("bot", "--attr", "role=agent")
	w.startOutlet()
	w.startInlet()
	w.await(w.in, `inlet db ready`)
	return w
}

func (w *row) startRelay() {
	w.relay = w.launch("relay", "authority", "relay", "--listen", w.at, "--authority")
	w.keeper = w.relay
	w.await(w.relay, `relay ready on`)
}

func (w *row) startOutlet() {
	args := []string{"outlet", "db", "--allow", `principal.role == "agent"`, "--to", w.o.to}
	if w.o.direct {
		args = append(args, "--listen", w.lanes)
	}
	w.out = w.launch("outlet", "db1", append(args, w.o.outlet...)...)
}

func (w *row) startInlet() {
	args := []string{"inlet", "db", "--from", w.addr}
	if w.o.direct {
		args = append(args, "--direct", w.lanes)
	}
	w.in = w.launch("inlet", "bot", append(args, w.o.inlet...)...)
}

// each are the processes by role.
func (w *row) each() map[string]*process.Process {
	all := map[string]*process.Process{"relay": w.relay, "outlet": w.out, "inlet": w.in}
	if w.o.direct {
		delete(all, "relay")
	}
	return all
}

// launch starts a command whose log goes to a file of its own: more than a process.Process keeps.
func (w *row) launch(role, host string, args ...string) *process.Process {
	w.t.Helper()
	file := filepath.Join(w.dir, fmt.Sprintf("%s.%d.log", role, len(w.logs)))
	script := `exec ` + w.o.under[role] + ` "$0" "$@" 2>"$LOG"`
	if first := w.o.shell[role]; first != "" {
		script = first + " && " + script
	}
	cmd := exec.Command("sh", append([]string{"-c", script, portal.Path, "--home", w.home(host)}, args...)...)
	cmd.Env = append(append(process.Environ(), "LOG="+file), w.o.env...)
	p, err := process.Start("portal "+role, cmd)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { p.Stop(5 * time.Second) })
	w.logs[p] = file
	return p
}

// logged gives the lines of a process's log that match.
func (w *row) logged(p *process.Process, pattern string) (all []string) {
	w.t.Helper()
	f, err := os.Open(w.logs[p])
	if os.IsNotExist(err) { // its shell has not come so far
		return nil
	}
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	re := regexp.MustCompile(pattern)
	in := bufio.NewScanner(f)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		if re.MatchString(in.Text()) {
			all = append(all, in.Text())
		}
	}
	return all
}

// await waits until a process has printed a line that matches.
func (w *row) await(p *process.Process, pattern string) string {
	w.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) {
		if all := w.logged(p, pattern); len(all) > 0 {
			return all[0]
		}
		select {
		case <-p.Done():
			w.t.Fatalf("%s ended and printed no %s: %s", p.Name, pattern, strings.Join(w.logged(p, ``), "\n"))
		default:
		}
		if time.Now().After(end) {
			w.t.Fatalf("%s printed no %s: %s", p.Name, pattern, strings.Join(w.logged(p, ``), "\n"))
		}
	}
}

// quit ends the row's processes by SIGQUIT and gives, by role, for each goroutine that they list what
// it waited for and who created it; see dumpedWay.
func (w *row) quit() map[string][]string {
	w.t.Helper()
	d := dumpedWay{printed: w.logs}
	for _, p := range w.each() {
		if err := syscall.Kill(p.Pid(), syscall.SIGQUIT); err != nil {
			w.t.Fatal(err)
		}
	}
	all := make(map[string][]string)
	for role, p := range w.each() {
		all[role] = d.goroutines(w.t, p)
	}
	return all
}

// A stand is what the processes of a row hold at a time.
type stand struct{ descriptors, memory map[string]int }

func (w *row) stand() stand {
	s := stand{map[string]int{}, map[string]int{}}
	for role, p := range w.each() {
		s.descriptors[role], s.memory[role] = settled(w.t, p, 0), rss(w.t, p)
	}
	return s
}

// peaks clears what the kernel keeps of the most memory each process had; mostSince gives it.
func (w *row) peaks() {
	w.t.Helper()
	for _, p := range w.each() {
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.Pid()), []byte("5"), 0); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *row) mostSince() map[string]int {
	w.t.Helper()
	all := map[string]int{}
	for role, p := range w.each() {
		all[role] = highWater(w.t, p)
	}
	return all
}

// highWater is the most resident memory that a process had.
func highWater(t testing.TB, p *process.Process) (n int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "VmHWM:")
	if _, err := fmt.Sscan(rest, &n); err != nil {
		t.Fatal(err)
	}
	return n << 10
}

// elsewhere is the service in a process of its own: one process may not have the descriptors for both
// ends of all streams.
func elsewhere(t testing.TB) string {
	t.Helper()
	s, err := process.Start("the service", asService())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Stop(patience) })
	m, err := s.Line(t.Context(), regexp.MustCompile(`listening on (\S+)`))
	if err != nil {
		t.Fatal(err)
	}
	return m[1]
}

// mebibytes says what each process has now and had before.
func mebibytes(now, before map[string]int) string {
	var all []string
	for _, role := range slices.Sorted(maps.Keys(now)) {
		all = append(all, fmt.Sprintf("%s %.1f MiB (%.1f before)", role, mib(now[role]), mib(before[role])))
	}
	return strings.Join(all, ", ")
}

// spent is how much of the processors a process has used.
func spent(t testing.TB, p *process.Process) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), ") ") // the name before may contain anything
	f := strings.Fields(rest)
	var user, system int64
	if _, err := fmt.Sscan(f[11]+" "+f[12], &user, &system); err != nil {
		t.Fatal(err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100
}
