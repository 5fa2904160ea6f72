package journeys_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/tests/process"
)

// ports is the last that free gave. They begin at 20,000: kernels take those of outgoing connections from
// 32,768 up (49,152 elsewhere), and one of those taken in the meantime keeps others from listening.
var ports atomic.Int32

// free is an address of loopback where nobody listens, on a port that is given once.
func free(t testing.TB) string {
	t.Helper()
	for range 10_000 {
		// Two of these processes at once, whose numbers are near one another, begin far apart.
		port := 20_000 + (os.Getpid()*997+int(ports.Add(1)))%10_000
		ln, err := net.Listen("tcp", fmt.Sprintf(":%d", port)) // on every interface, as some will
		if err != nil {
			continue
		}
		ln.Close()
		return fmt.Sprintf("127.0.0.1:%d", port)
	}
	t.Fatal("no port is free")
	return ""
}

func TestAConnectionThatComesBeforeTheOutletIsHeldAndThenServed(t *testing.T) {
	t.Parallel()
	s := newService(t)
	h := newHouse(t)
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	lanes := free(t)
	in, addr := h.inlet("bot", "0", lanes, "--hold", "60s")
	h.line(in, `inlet db waiting: .*; next try in `)
	c := dial(t, addr, []byte("E"))
	h.outlet(lanes, s.addr())
	if err := echo(c); err != nil {
		t.Fatal(err)
	}
	c.Close()
	h.line(in, `inlet db ready direct`)
}

func TestAConnectionIsResetWhenItWasHeldInVain(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.enroll("bot", "--attr", "role=agent")
	in, addr := h.inlet("bot", "0", free(t), "--hold", "300ms")
	h.line(in, `inlet db waiting: `)
	start := time.Now()
	wantReset(t, addr)
	if held := time.Since(start); held < 300*time.Millisecond {
		t.Errorf("it was held for %v only", held)
	}
}

func TestAnOutletThatIsToldToEndWaitsForItsStreams(t *testing.T) {
	t.Parallel()
	s := newService(t)
	w := newWay(t, s.addr())
	c := dial(t, w.addr, []byte("E"))
	if err := echo(c); err != nil {
		t.Fatal(err)
	}
	terminate(t, w.out)
	w.line(w.out, `draining 1 stream for 25 s`)
	// Both directions still work, and the stream ends as its ends wish.
	sent := pattern()[:64<<10]
	if _, err := c.Write(sent); err != nil {
		t.Fatal(err)
	}
	c.(halfCloser).CloseWrite()
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d of %d bytes came back, %v", len(got), len(sent), err)
	}
	c.Close()
	wantStatus(t, w.out, 0)
}

func TestAnOutletWhoseStreamsOutliveTheGraceTimeResetsThem(t *testing.T) {
	t.Parallel()
	s := newService(t)
	h := newHouse(t)
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	out, lanes := h.outlet("127.0.0.1:0", s.addr(), "--grace", "1s")
	_, addr := h.inlet("bot", "0", lanes)
	c := dial(t, addr, []byte("E"))
	if err := echo(c); err != nil {
		t.Fatal(err)
	}
	terminate(t, out)
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client read %d bytes and %v, not a reset", n, err)
	}
	wantStatus(t, out, 5)
}

func terminate(t testing.TB, p *process.Process) {
	t.Helper()
	if err := syscall.Kill(p.Pid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
}

// wantStatus waits for the end of a program that was told to.
func wantStatus(t testing.TB, p *process.Process, want int) {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(patience):
		t.Fatalf("%s goes on", p.Name)
	}
	got := 0
	if err := p.Stop(patience); err != nil {
		exit := (*exec.ExitError)(nil)
		if !errors.As(err, &exit) {
			t.Fatal(err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		t.Errorf("%s ended with %d, not %d", p.Name, got, want)
	}
}

func TestUnixSocketsCarryHalfClosesOnBothSides(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	// Not below the test's directory: a socket's path has at most 107 bytes.
	dir, err := os.MkdirTemp("", "portal")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	target, from := "unix:"+filepath.Join(dir, "target"), "unix:"+filepath.Join(dir, "inlet")
	s, err := serveOn(target)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	_, lanes := h.outlet("127.0.0.1:0", target)
	_, addr := h.inlet("bot", from, lanes)
	if addr != from {
		t.Fatalf("the inlet listens on %s, not %s", addr, from)
	}
	if info, err := os.Stat(strings.TrimPrefix(from, "unix:")); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the socket: %v, %v", info, err)
	}
	c := dial(t, addr, []byte("S"))
	if _, err := c.Write(pattern()); err != nil {
		t.Fatal(err)
	}
	c.(halfCloser).CloseWrite()
	got, err := io.ReadAll(c)
	if want := sha256.Sum256(pattern()); err != nil || !bytes.Equal(got, want[:]) {
		t.Fatalf("%d bytes of an answer, %v", len(got), err)
	}
	number, first := s.numbered('H')
	c = dial(t, addr, first)
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, pattern()) {
		t.Fatalf("%d bytes from the service, %v", len(got), err)
	}
	c.(halfCloser).CloseWrite()
	if got, ok := s.result(number, patience); !ok || got.err != nil || len(got.bytes) != 0 {
		t.Fatalf("the service read %d bytes, %v", len(got.bytes), got.err)
	}
}

// A command for each stream, each with its own input and output; it ends with its stream, however
// that ends, and nothing of it is left.
func TestACommandOfAStreamEndsWithTheStream(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	out, lanes := h.outlet("127.0.0.1:0", "", "--", "sh", "-c", "cat; echo over")
	in, addr := h.inlet("bot", "0", lanes)
	h.line(in, `inlet db ready direct`) // the outlet has the channel's descriptor
	whole := func() {
		t.Helper()
		sent := pattern()[:64<<10]
		c := dial(t, addr, sent)
		c.(halfCloser).CloseWrite()
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, append(sent[:len(sent):len(sent)], "over\n"...)) {
			t.Fatalf("%d bytes came back, %v", len(got), err)
		}
		c.Close()
	}
	before := settled(t, out, 0)
	whole()
	const n = 20
	var conns []net.Conn
	for range n {
		c := dial(t, addr, nil)
		if err := echo(c); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	// Each with the one that holds its input.
	if got := len(children(t, out)); got != 2*n {
		t.Errorf("%d processes for %d streams", got, n)
	}
	for i, c := range conns {
		if i%2 == 0 {
			c.(*net.TCPConn).SetLinger(0)
		}
		c.Close()
	}
	settled(t, out, before)
	for end := time.Now().Add(patience); len(children(t, out)) > 0; {
		if time.Now().After(end) {
			t.Fatalf("processes %v are left", children(t, out))
		}
	}
	whole()
}

func TestACommandOfAKilledOutletDoesNotTakeAnUploadForWhole(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	dir := t.TempDir()
	out, lanes := h.outlet("127.0.0.1:0", "", "--", "sh", "-c", `exec 3>"$0/$$.part"; echo; cat >&3 && mv "$0/$$.part" "$0/$$.whole"`, dir)
	_, addr := h.inlet("bot", "0", lanes)
	const n = 8
	for range n {
		c := dial(t, addr, pattern()[:64<<10])
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	all := children(t, out)
	kill(t, out)
	for end := time.Now().Add(patience); slices.ContainsFunc(all, runs); {
		if time.Now().After(end) {
			t.Fatalf("of the processes %v some are left", all)
		}
	}
	part, err := filepath.Glob(dir + "/*.part")
	if err != nil || len(part) != n {
		t.Errorf("%d of %d uploads are where a cut leaves them: %v", len(part), n, err)
	}
}

// runs reports whether a process goes on; a zombie only waits for whoever inherited it.
func runs(pid string) bool {
	b, err := os.ReadFile("/proc/" + pid + "/stat")
	_, rest, _ := strings.Cut(string(b), ") ")
	return err == nil && !strings.HasPrefix(rest, "Z")
}

// children are a process's children, dead ones that were not waited for among them.
func children(t testing.TB, p *process.Process) []string {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.Pid()))
	if err != nil || len(threads) == 0 {
		t.Fatalf("the children of %s cannot be counted: %v", p.Name, err)
	}
	var all []string
	for _, file := range threads {
		b, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
		all = append(all, strings.Fields(string(b))...)
	}
	return all
}

func TestInletsOfOneHomeShareItsRenewals(t *testing.T) {
	t.Parallel()
	s := newService(t)
	h := newHouse(t, "--credential-ttl", "2s")
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	_, lanes := h.outlet("127.0.0.1:0", s.addr())
	var conns []net.Conn
	for range 2 {
		_, addr := h.inlet("bot", "0", lanes)
		c := dial(t, addr, []byte("E"))
		if err := echo(c); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	last, renewals := h.serial("bot"), 0
	for end := time.Now().Add(patience); renewals < 4; {
		if now := h.serial("bot"); now != last {
			last, renewals = now, renewals+1
		}
		for i, c := range conns {
			if err := echo(c); err != nil {
				t.Fatalf("inlet %d after %d renewals: %v", i+1, renewals, err)
			}
		}
		if time.Now().After(end) {
			t.Fatalf("%d renewals", renewals)
		}
	}
}
