package control

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// among is ListenAmong for a process of this number, answering with it.
func among(t *testing.T, dir string, pid int) (path string, stop func()) {
	t.Helper()
	ln, err := listenAmong(dir, pid)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Serve(ctx, ln, func(context.Context, string, json.RawMessage) (any, error) { return pid, nil })
	}()
	return ln.(*listener).path, sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// left is a socket that a killed process leaves behind.
func left(t *testing.T, path string) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
}

func found(t *testing.T, dir string) (names []string) {
	t.Helper()
	all, err := Among(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		names = append(names, filepath.Base(s.Path))
		if got, _, _ := strings.Cut(filepath.Base(s.Path), "."); got != strconv.Itoa(s.PID) {
			t.Errorf("%s is of process %d", s.Path, s.PID)
		}
	}
	return names
}

func TestProcessesOfOneDirectoryAreFoundAndAnswer(t *testing.T) {
	counted(t, func() {
		dir := filepath.Join(t.TempDir(), "run")
		if names := found(t, dir); names != nil {
			t.Errorf("before there is a directory: %v", names)
		}
		var stops []func()
		for _, pid := range []int{300, 20} {
			path, stop := among(t, dir, pid)
			stops = append(stops, stop)
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%v, %v", info.Mode(), err)
			}
		}
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%v, %v", info.Mode(), err)
		}
		// What is no socket, or named otherwise, is nobody's.
		for _, name := range []string{"5.sock", "x.sock", "7.sock.lock"} {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		left(t, filepath.Join(dir, "other.sock"))
		if names := found(t, dir); !slices.Equal(names, []string{"20.sock", "300.sock"}) {
			t.Errorf("found %v", names)
		}
		for _, pid := range []int{20, 300} {
			var got int
			if err := Call(t.Context(), filepath.Join(dir, strconv.Itoa(pid)+".sock"), "m", nil, &got); err != nil || got != pid {
				t.Errorf("process %d: %d, %v", pid, got, err)
			}
		}
		for _, stop := range stops {
			stop()
		}
		if names := found(t, dir); names != nil {
			t.Errorf("left behind: %v", names)
		}
	})
}

func TestSocketsOfTheDeadAreRemovedAndOfNobodyElse(t *testing.T) {
	for _, by := range []string{"sweep", "the next process"} {
		t.Run(by, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "run")
			_, stop := among(t, dir, 10)
			defer stop()
			left(t, filepath.Join(dir, "11.sock"))
			left(t, filepath.Join(dir, "12.2.sock"))
			left(t, filepath.Join(dir, "mine")) // named by somebody else
			// One that hangs: its queue is full, and it is alive.
			fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer syscall.Close(fd)
			hangs := filepath.Join(dir, "13.sock")
			if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: hangs}), syscall.Listen(fd, 0)); err != nil {
				t.Fatal(err)
			}
			var held []net.Conn
			for {
				c, err := net.Dial("unix", hangs)
				if err != nil {
					if !errors.Is(err, syscall.EAGAIN) {
						t.Fatal(err)
					}
					break
				}
				held = append(held, c)
			}
			want := []string{"10.sock", "13.sock"}
			if by == "sweep" {
				if err := Sweep(dir); err != nil {
					t.Fatal(err)
				}
			} else {
				_, stop := among(t, dir, 11)
				defer stop()
				want = []string{"10.sock", "11.sock", "13.sock"}
			}
			if names := found(t, dir); !slices.Equal(names, want) {
				t.Errorf("found %v, want %v", names, want)
			}
			if _, err := os.Lstat(filepath.Join(dir, "mine")); err != nil {
				t.Error(err)
			}
			for _, c := range held {
				c.Close()
			}
		})
	}
	if err := Sweep(filepath.Join(t.TempDir(), "none")); err != nil {
		t.Errorf("without a directory: %v", err)
	}
}

// Containers that share a home may each have a process 1.
func TestProcessesOfTheSameNumberHaveASocketEach(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	_, first := among(t, dir, 1)
	_, second := among(t, dir, 1)
	defer second()
	if names := found(t, dir); !slices.Equal(names, []string{"1.2.sock", "1.sock"}) {
		t.Errorf("found %v", names)
	}
	first()
	if names := found(t, dir); !slices.Equal(names, []string{"1.2.sock"}) {
		t.Errorf("when the first has ended: %v", names)
	}
}

// While sockets are made and swept at once, none of a living process is lost.
func TestASweepTakesNoSocketThatIsBeingMade(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	ctx, cancel := context.WithCancel(t.Context())
	var sweeper sync.WaitGroup
	sweeper.Go(func() {
		for ctx.Err() == nil {
			if err := Sweep(dir); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for i := range 200 {
		path, stop := among(t, dir, 40+i)
		if err := Call(t.Context(), path, "m", nil, nil); err != nil {
			t.Errorf("process %d: %v", i, err)
		}
		stop()
	}
	cancel()
	sweeper.Wait()
}

func TestADirectoryThatCannotBeUsedIsSaid(t *testing.T) {
	base := t.TempDir()
	open := filepath.Join(base, "open")
	file := filepath.Join(base, "file")
	link := filepath.Join(base, "link")
	err := errors.Join(os.Mkdir(open, 0o700), os.Chmod(open, 0o755), os.WriteFile(file, nil, 0o600), os.Symlink(t.TempDir(), link))
	if err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]string{
		open:                          "chmod 700 " + open,
		file:                          "not a directory",
		link:                          "directory",
		filepath.Join(base, "no/dir"): "no such file",
		"/" + strings.Repeat("x", 99): "--home",
	} {
		if _, err := listenAmong(dir, 4194304); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", dir, err)
		}
	}
	var long *LongPathError
	if _, err := ListenAmong("/" + strings.Repeat("x", 120)); !errors.As(err, &long) {
		t.Errorf("got %v", err)
	}
	if err := FitsAmong("/" + strings.Repeat("x", 93)); err != nil {
		t.Error(err)
	}
	if err := FitsAmong("/" + strings.Repeat("x", 94)); !errors.As(err, &long) {
		t.Errorf("got %v", err)
	}
}

// Stopped while it holds the lock, a process delays the next one and no more.
func TestALockThatIsNotGivenBackIsNotWaitedForLong(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listenAmong(dir, 1); err == nil || !strings.Contains(err.Error(), "another process has locked it") {
		t.Errorf("got %v", err)
	}
	lock.Close()
	_, stop := among(t, dir, 1)
	stop()
}

// A kill leaves the socket of a real process, which refuses from then on.
func TestAKilledProcessIsNobody(t *testing.T) {
	if dir := os.Getenv("CONTROL_TEST_LISTENS"); dir != "" {
		if _, err := ListenAmong(dir); err != nil {
			t.Fatal(err)
		}
		os.Stdout.WriteString("listens\n")
		select {}
	}
	dir := filepath.Join(t.TempDir(), "run")
	cmd := exec.Command(os.Args[0], "-test.run=^TestAKilledProcessIsNobody$")
	cmd.Env = append(os.Environ(), "CONTROL_TEST_LISTENS="+dir)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, strconv.Itoa(cmd.Process.Pid)+".sock")
	if err := Sweep(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("while it lives: %v", err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	if err := Call(t.Context(), path, "m", nil, nil); !errors.Is(err, ErrNobody) {
		t.Errorf("got %v", err)
	}
	if err := Sweep(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("when it is dead: %v", err)
	}
}
