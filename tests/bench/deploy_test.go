package main

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/tests/process"

	"github.com/portal-tunnel/portal/tests/tunnels"
)

// The programs of this file's rigs are this test's own: see TestMain.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && slices.Contains([]string{"serve", "forward", "shape", "hold", "lossy"}, os.Args[1]) {
		main()
		return
	}
	os.Exit(m.Run())
}

// TestTheWayOfTwoRelaysCarriesLoadsAndIsMeasured has everything in it that the shorter ways have.
func TestTheWayOfTwoRelaysCarriesLoadsAndIsMeasured(t *testing.T) {
	b := builtIn(t.TempDir())
	if _, err := process.BuildPortal(t.Context(), filepath.Dir(b.measured.Path), "measure"); err != nil {
		t.Fatal(err)
	}
	s := *profileSetting
	s.delay, s.rate = time.Millisecond, gigabit // through a link, too
	r, err := newRig(t.Context(), &s, b)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := r.close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(r.dir); !os.IsNotExist(err) {
			t.Errorf("its directory: %v", err)
		}
	}()
	chosen, err := chooseSystems("twohops")
	if err != nil {
		t.Fatal(err)
	}
	d, err := r.deploy(t.Context(), chosen[0])
	if err != nil {
		t.Fatal(err)
	}
	p := &plan{d: 50 * time.Millisecond}
	for _, l := range s.loads {
		for _, part := range d.Parts {
			if err := beginProfile(t.Context(), part); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := l.run(t.Context(), d, p); err != nil {
			t.Errorf("%s: %v", l.name, err)
		}
		for _, part := range d.Parts {
			file := filepath.Join(t.TempDir(), "pprof")
			spent, err := endProfile(t.Context(), part, file)
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasPrefix(spent, "0 ") { // the profile itself takes some
				t.Errorf("%s, %s: %s", part.Name, l.name, spent)
			}
			if b, err := os.ReadFile(file); err != nil || len(b) == 0 {
				t.Errorf("the profile of %s: %d bytes, %v", part.Name, len(b), err)
			}
		}
	}

	const n = 50
	o, err := idle(t.Context(), d, n)
	if err != nil {
		t.Fatal(err)
	}
	at := func(part, figure string) float64 {
		i := slices.IndexFunc(o.parts, func(n note) bool { return n.part == part && n.figure == figure })
		if i < 0 {
			t.Fatalf("no %s of %s in %v", figure, part, o.parts)
		}
		return o.parts[i].value
	}
	for _, part := range []string{"inlet", "outlet"} {
		if got := at(part, "idle goroutines"); got < 1 || got > 2 {
			t.Errorf("%s: %g goroutines a stream", part, got)
		}
	}
	for _, part := range []string{"relay", "first relay"} {
		if got := at(part, "idle goroutines"); got > .2 {
			t.Errorf("%s: %g goroutines a stream", part, got)
		}
	}
	d.Stop()
	if err := d.Ended(); err == nil {
		t.Error("it has been stopped and runs")
	}
}

func TestWhatASystemSpendsIsCountedWithItsChildren(t *testing.T) {
	if _, err := os.Stat("/proc/self/smaps_rollup"); err != nil {
		t.Skip("no such /proc here: ", err)
	}
	// It burns CPU in a child that ends, then in one that stays.
	cmd := exec.Command("sh", "-c", `burn() { i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; }; (burn); echo one >&2; read x; (burn; echo two >&2; read x)`)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p, err := process.Start("the script", cmd)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stop(time.Second)
	var spent []time.Duration
	for _, said := range []string{"one", "two"} {
		if _, err := tunnels.Line(t.Context(), p, "^("+said+")$"); err != nil {
			t.Fatal(err)
		}
		cpu, err := cpuTime(p.Pid())
		if err != nil {
			t.Fatal(err)
		}
		spent = append(spent, cpu)
		if _, err := stdin.Write([]byte("\n")); err != nil {
			t.Fatal(err)
		}
		if said == "one" {
			continue
		}
	}
	if spent[0] == 0 || spent[1] <= spent[0] {
		t.Errorf("after a child has ended %v, with another that burnt as much %v", spent[0], spent[1])
	}
}

func TestMemoryOfAProcessGrowsWithWhatItHolds(t *testing.T) {
	if _, err := os.Stat("/proc/self/smaps_rollup"); err != nil {
		t.Skip("no such /proc here: ", err)
	}
	const size = 64 << 20
	before, threads, err := memory(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if threads < 1 {
		t.Errorf("%g threads", threads)
	}
	held, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Munmap(held)
	for i := 0; i < size; i += os.Getpagesize() {
		held[i] = 1
	}
	after, _, err := memory(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if grown := after - before; grown < size/2 {
		t.Errorf("%d bytes more are held, %g seen", size, grown)
	}
}

func TestTheLossyLinkLosesAndCarries(t *testing.T) {
	b := builtIn(t.TempDir())
	p := &plan{rounds: 1, d: 20 * time.Millisecond, loads: []string{"down1-loss"}}
	var err error
	if p.systems, err = chooseSystems("nothing,copy"); err != nil {
		t.Fatal(err)
	}
	s := settings[slices.IndexFunc(settings, func(s *setting) bool { return s.lossy })]
	r := newReport(p)
	if err := inNamespaces(t.Context(), p, s, b, r); err != nil {
		var skip *skipped
		if ok := errors.As(err, &skip); ok {
			t.Skip(err)
		}
		t.Fatal(err)
	}
	r.finish()
	for _, m := range r.Systems {
		if m.Median["down1-loss"] <= 0 {
			t.Errorf("%s: %v, %v", m.Name, m.Rounds, m.Failed)
		}
	}
	if interfaces, err := net.Interfaces(); err != nil || slices.ContainsFunc(interfaces, func(i net.Interface) bool { return i.Name == "near" || i.Name == "far" }) {
		t.Errorf("what it made is left or was never apart: %v, %v", interfaces, err)
	}
}
