package outlet_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/outlet"
)

// real opens a stream to target in real time and ends everything afterwards.
func real(t *testing.T, target outlet.Target) *stream.Conn {
	t.Helper()
	y := open(t, target, nil)
	t.Cleanup(func() {
		y.close()
		for end := time.Now().Add(5 * time.Second); y.actors() > 0 && time.Now().Before(end); {
			runtime.Gosched() // an actor that was stopped ends on a goroutine of its own
		}
		y.empty()
	})
	return y.stream(y.call(agent))
}

func TestACommandsExitIsTheStreamsEnd(t *testing.T) {
	for _, c := range []struct {
		name, script, in, out string
		reset                 bool
	}{
		{"half-close reaches its input", "cat; echo end", "hello ", "hello end\n", false},
		{"an exit before the input's end is an end", "echo hi", "", "hi\n", false},
		{"a failure is a reset", "cat; exit 3", "hello", "", true},
		{"a kill is a reset", "cat; kill -9 $$", "hello", "", true},
		{"what it leaves behind does not hold the stream", "sleep 1000 & echo hi", "", "hi\n", false},
		{"it knows the name", `printf %s "$PORTAL_NAME"`, "", "db", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := real(t, outlet.Exec("sh", "-c", c.script))
			io.WriteString(s, c.in)
			s.CloseWrite()
			got, err := io.ReadAll(s)
			if c.reset {
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%q, %v; want a reset", got, err)
				}
			} else if err != nil || string(got) != c.out {
				t.Errorf("%q, %v; want %q", got, err, c.out)
			}
		})
	}
}

func TestAResetKillsTheCommandsWholeGroup(t *testing.T) {
	s := real(t, outlet.Exec("sh", "-c", "sleep 1000 & echo $!; wait"))
	line, err := bufio.NewReader(s).ReadString('\n')
	pid, _ := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || pid == 0 {
		t.Fatalf("%q, %v", line, err)
	}
	s.Reset(stream.CodeLocal, "")
	gone(t, "behind a reset", pid)
}

// readers is a script that has four processes read its input and leave a mark in
// a folder, which is $1, when they read an end. Its first line are the numbers of
// its processes.
const readers = `exec 3<&0
for i in 1 2 3 4; do
	(cat <&3 >/dev/null && : >"$1/$$.$i") &
	pids="$pids $!"
done
echo $$ $pids
wait`

// reading starts readers as a target's command.
func reading(t testing.TB, marks string) (c net.Conn, pids []int) {
	t.Helper()
	c, err := outlet.Exec("sh", "-c", readers, "sh", marks)(context.Background(), &outlet.Request{Name: "db"})
	if err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range strings.Fields(line) {
		n, err := strconv.Atoi(pid)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, n)
	}
	return c, pids
}

// unmarked fails the test when an end was read.
func unmarked(t testing.TB, marks string, of int) {
	t.Helper()
	all, err := os.ReadDir(marks)
	if err != nil || len(all) != 0 {
		t.Errorf("%d of %d readers took a cut for an end (%v)", len(all), of, err)
	}
}

func gone(t testing.TB, what string, pids ...int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); slices.ContainsFunc(pids, alive); {
		if time.Now().After(end) {
			t.Fatalf("%s: one of the processes %v is left", what, pids)
		}
		time.Sleep(time.Millisecond)
	}
}

// long says whether the long forms run, as `make long` does.
func long() bool { return os.Getenv("PORTAL_LONG") != "" }

func TestACommandWhoseStreamIsResetReadsNoEnd(t *testing.T) {
	marks, times := t.TempDir(), 200
	if long() {
		times = 1000
	}
	for range times {
		c, pids := reading(t, marks)
		c.Write(make([]byte, 1000))
		c.Close()
		gone(t, "behind a reset", pids...)
	}
	unmarked(t, marks, 4*times)
}

// TestACommandWhoseOutletIsKilledReadsNoEnd has a process with commands killed by
// kill -9, with its whole group.
func TestACommandWhoseOutletIsKilledReadsNoEnd(t *testing.T) {
	const marksEnv, commands = "OUTLET_TEST_MARKS", 4
	if marks := os.Getenv(marksEnv); marks != "" {
		var all []string
		for range commands {
			c, pids := reading(t, marks)
			go func() {
				for {
					c.Write(make([]byte, 1000))
				}
			}()
			group, err := syscall.Getpgid(pids[0])
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, fmt.Sprint(group), strings.Trim(fmt.Sprint(pids), "[]"))
		}
		c, err := outlet.Exec("setsid", "sh", "-c", "echo $$; exec sleep 1000")(context.Background(), &outlet.Request{})
		if err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(c).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println("processes", strings.Join(all, " "), line)
		select {}
	}

	marks, kills := t.TempDir(), 20
	if long() {
		kills = 200
	}
	for range kills {
		victim := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
		victim.Env = append(os.Environ(), marksEnv+"="+marks)
		victim.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		victim.Stderr = os.Stderr
		out, err := victim.StdoutPipe()
		if err == nil {
			err = victim.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadString('\n')
		syscall.Kill(-victim.Process.Pid, syscall.SIGKILL)
		victim.Wait()
		var pids []int
		for _, pid := range strings.Fields(strings.TrimPrefix(line, "processes")) {
			n, err := strconv.Atoi(pid)
			if err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			pids = append(pids, n)
		}
		if want := commands*(1+5) + 1; err != nil || len(pids) != want {
			t.Fatalf("%d processes, want %d: %q, %v", len(pids), want, line, err)
		}
		gone(t, "behind a kill", pids...)
	}
	unmarked(t, marks, 4*commands*kills)
}

func TestACommandsInputEndsOnlyWhenTheStreamDoes(t *testing.T) {
	marks := t.TempDir()
	c, pids := reading(t, marks)
	defer c.Close()
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || len(b) != 0 {
		t.Errorf("%q, %v", b, err)
	}
	if all, err := os.ReadDir(marks); err != nil || len(all) != 4 {
		t.Errorf("%d of 4 read the end: %v", len(all), err)
	}
	gone(t, "behind an end", pids...)
}

func TestACommandThatLeftItsGroupIsKilledAsWell(t *testing.T) {
	s := real(t, outlet.Exec("setsid", "sh", "-c", "echo $$; exec sleep 1000"))
	line, err := bufio.NewReader(s).ReadString('\n')
	pid, _ := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || pid == 0 {
		t.Fatalf("%q, %v", line, err)
	}
	s.Reset(stream.CodeLocal, "")
	gone(t, "behind a reset", pid)
}

// Without its holder a command would read an end when the outlet is killed.
func TestACommandWhoseHolderIsKilledIsReset(t *testing.T) {
	s := real(t, outlet.Exec("sh", "-c", "echo $$; sleep 1000"))
	line, err := bufio.NewReader(s).ReadString('\n')
	pid, _ := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || pid == 0 {
		t.Fatalf("%q, %v", line, err)
	}
	holder, err := syscall.Getpgid(pid)
	if err != nil || holder == pid {
		t.Fatalf("the group is %d: %v", holder, err)
	}
	syscall.Kill(holder, syscall.SIGKILL)
	if _, err := io.ReadAll(s); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
	gone(t, "behind the holder", pid)
}

// A service manager that stops a service may signal each of its processes, while
// its streams are drained.
func TestAHolderHeedsNoSignalToEnd(t *testing.T) {
	s := real(t, outlet.Exec("sh", "-c", "trap '' HUP INT TERM; echo $$; cat"))
	lines := bufio.NewReader(s)
	line, err := lines.ReadString('\n')
	pid, _ := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || pid == 0 {
		t.Fatalf("%q, %v", line, err)
	}
	holder, err := syscall.Getpgid(pid)
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); !ignores(t, holder, syscall.SIGTERM); {
		if time.Now().After(end) {
			t.Fatal("it does not ignore them")
		}
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		syscall.Kill(-holder, sig)
	}
	io.WriteString(s, "hello")
	s.CloseWrite()
	if got, err := io.ReadAll(lines); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
}

// ignores reports whether a process ignores a signal.
func ignores(t testing.TB, pid int, sig syscall.Signal) bool {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "SigIgn:\t")
	line, _, _ := strings.Cut(rest, "\n")
	mask, err := strconv.ParseUint(line, 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return mask&(1<<(sig-1)) != 0
}

func TestUnixAndTCPTargetsAreReached(t *testing.T) {
	for network, addr := range map[string]string{"unix": filepath.Join(t.TempDir(), "s"), "tcp": "127.0.0.1:0"} {
		ln, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			c, err := ln.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			io.Copy(c, c)
			c.Close()
		}()
		target := outlet.TCP(ln.Addr().String())
		if network == "unix" {
			target = outlet.Unix(addr)
		}
		s := real(t, target)
		io.WriteString(s, "hello")
		s.CloseWrite()
		if got, err := io.ReadAll(s); err != nil || string(got) != "hello" {
			t.Errorf("%s: %q, %v", network, got, err)
		}
		<-done
		ln.Close()
		if _, err := target(context.Background(), &outlet.Request{}); err == nil {
			t.Errorf("%s: a target that is gone was reached", network)
		}
	}
}
