package store

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	bolterrors "go.etcd.io/bbolt/errors"
)

func TestMain(m *testing.M) {
	switch path := os.Getenv("PORTAL_STORE_TEST"); {
	case path == "":
		os.Exit(m.Run())
	case os.Getenv("PORTAL_STORE_ROLE") == "hold":
		if _, err := Open(path); err != nil {
			panic(err)
		}
		fmt.Println("held")
		os.Stdin.Read(make([]byte, 1))
	default:
		if err := takeAll(path); err != nil {
			panic(err)
		}
	}
}

// child runs this program in a role; it dies with the test.
func child(t *testing.T, path, role string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "PORTAL_STORE_TEST="+path, "PORTAL_STORE_ROLE="+role)
	cmd.Stderr = os.Stderr
	cmd.StdinPipe()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd, bufio.NewReader(out)
}

const tickets = 5000

// takeAll takes one ticket after the other, each in one step that also counts it, and says so once it is done.
func takeAll(path string) error {
	s, err := Open(path)
	if err != nil {
		return err
	}
	for {
		var taken []byte
		err := s.Update(func(tx *Tx) error {
			errFound := errors.New("found")
			err := tx.Scan("tickets", func(key, _ []byte) error {
				taken = bytes.Clone(key)
				return errFound
			})
			if err != errFound {
				return fmt.Errorf("none is left: %v", err)
			}
			n, err := tx.Get("counts", []byte("taken"))
			if err != nil {
				return err
			}
			return errors.Join(
				tx.Delete("tickets", taken),
				tx.Put("taken", taken, make([]byte, 100)),
				tx.Put("counts", []byte("taken"), binary.BigEndian.AppendUint64(nil, number(n)+1)))
		})
		if err != nil {
			return err
		}
		fmt.Printf("%s\n", taken)
	}
}

func number(b []byte) uint64 {
	if b == nil {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

func TestAKilledProcessLeavesWholeSteps(t *testing.T) {
	s, path := open(t)
	if err := s.Update(func(tx *Tx) error {
		for i := range tickets {
			if err := tx.Put("tickets", fmt.Appendf(nil, "%04d", i), nil); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	said := make(map[string]bool)
	for round := range 8 {
		cmd, out := child(t, path, "take")
		for range 5 + 17*round {
			line, err := out.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			if key := strings.TrimSpace(line); said[key] {
				t.Fatalf("%s was taken twice", key)
			} else {
				said[key] = true
			}
		}
		cmd.Process.Kill()
		for line, err := out.ReadString('\n'); err == nil; line, err = out.ReadString('\n') {
			said[strings.TrimSpace(line)] = true // said before the end
		}
		cmd.Wait()

		s, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		taken, left := 0, 0
		err = s.View(func(tx *Tx) error {
			n, err := tx.Get("counts", []byte("taken"))
			if err != nil {
				return err
			}
			err = errors.Join(
				tx.Scan("taken", func(key, _ []byte) error { taken++; return nil }),
				tx.Scan("tickets", func(key, _ []byte) error {
					if left++; said[string(key)] {
						return fmt.Errorf("%s was taken and is there again", key)
					}
					return nil
				}))
			if int(number(n)) != taken || taken+left != tickets {
				return fmt.Errorf("%d counted, %d taken, %d left", number(n), taken, left)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if taken < len(said) || taken > len(said)+round+1 {
			t.Fatalf("%d are taken, %d were said to be", taken, len(said))
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTheHolderIsNamedUntilItIsKilled(t *testing.T) {
	s, path := open(t)
	s.Close()
	cmd, out := child(t, path, "hold")
	if _, err := out.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	_, err := Open(path)
	var held *HeldError
	if !errors.As(err, &held) || held.PID != cmd.Process.Pid {
		t.Fatalf("got %v, want a holder %d", err, cmd.Process.Pid)
	}
	cmd.Process.Kill()
	cmd.Wait()
	s, err = Open(path)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

// Each way to be out of room, for any user: the file may not grow, or the store's own limit is reached.
func TestNoRoomLeavesTheStoreAsItWas(t *testing.T) {
	for name, limit := range map[string]struct {
		size int
		full error
	}{
		"system": {maxSize, syscall.EFBIG},
		"own":    {256 << 10, bolterrors.ErrMaxSizeReached},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "store")
			s, err := openSize(path, limit.size)
			if err != nil {
				t.Fatal(err)
			}
			undo := func() {}
			if name == "system" {
				undo = limitFiles(t, 256<<10)
			}
			defer func() { undo() }()
			stored := 0
			for err == nil && stored < 1000 {
				if err = s.Put("a", fmt.Appendf(nil, "%04d", stored), make([]byte, 3000)); err == nil {
					stored++
				}
			}
			if stored == 0 || err == nil {
				t.Fatalf("%d stored, %v", stored, err)
			}
			if name == "own" && !errors.Is(err, limit.full) || !strings.Contains(err.Error(), limit.full.Error()) {
				t.Errorf("got %v", err)
			}
			for range 3 { // a failed step must not eat room either
				if err := s.Put("b", []byte("big"), make([]byte, 300<<10)); err == nil {
					t.Fatal("more was stored than there is room")
				}
			}
			check := func(want int) {
				t.Helper()
				n := 0
				if err := s.Scan("a", func(_, v []byte) error { n++; return nil }); err != nil || n != want {
					t.Fatalf("%d records, want %d, %v", n, want, err)
				}
				if v, err := s.Get("b", []byte("big")); v != nil || err != nil {
					t.Fatalf("half applied: %d bytes, %v", len(v), err)
				}
			}
			check(stored)
			undo()
			undo = func() {}
			for i := range stored / 2 {
				if err := s.Delete("a", fmt.Appendf(nil, "%04d", i)); err != nil {
					t.Fatalf("making room: %v", err)
				}
			}
			if err := s.Put("a", []byte("new"), make([]byte, 3000)); err != nil {
				t.Fatalf("with room again: %v", err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if s, err = Open(path); err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			check(stored - stored/2 + 1)
		})
	}
}

func TestADamagedFileIsAnErrorWhenOpened(t *testing.T) {
	s, path := open(t)
	for i := range 200 {
		if err := s.Put("a", fmt.Appendf(nil, "%04d", i), make([]byte, 2000)); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	bad := map[string][]byte{
		"text":      []byte("this is not a store"),
		"zeros":     make([]byte, 64<<10),
		"one page":  whole[:os.Getpagesize()],
		"metas":     whole[:2*os.Getpagesize()],
		"few pages": whole[:10*os.Getpagesize()],
		"half":      whole[:len(whole)/4],
	}
	for name, b := range bad {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "store")
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			for range 2 { // the first must let go of the file
				s, err := Open(path)
				if err == nil {
					s.Close()
					t.Fatal("opened")
				}
				var held *HeldError
				if errors.As(err, &held) || !strings.Contains(err.Error(), path) {
					t.Fatalf("got %v", err)
				}
			}
			if after, err := os.ReadFile(path); !bytes.Equal(after, b) || err != nil {
				t.Errorf("the file has changed, %v", err)
			}
		})
	}
}

func TestWhatIsNoFileOfOursIsRefused(t *testing.T) {
	s, path := open(t)
	s.Close()
	link := path + ".link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	fifo := path + ".fifo"
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{link, fifo, t.TempDir(), filepath.Join(path, "below a file"), filepath.Join(t.TempDir(), "no", "folder")} {
		if s, err := Open(p); err == nil {
			s.Close()
			t.Errorf("%s opened", p)
		}
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); err == nil || !strings.Contains(err.Error(), "chmod 600 "+path) {
		t.Errorf("got %v, want the remedy", err)
	}
}

func TestTheFileIsItsOwnersAloneAndTheOnlyOne(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	_, path := open(t)
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if all, err := os.ReadDir(filepath.Dir(path)); len(all) != 1 || err != nil {
		t.Errorf("%v, %v", all, err)
	}
}

func TestAClosedStoreSaysSo(t *testing.T) {
	before := runtime.NumGoroutine()
	s, _ := open(t)
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if n := runtime.NumGoroutine(); n > before {
		t.Errorf("%d goroutines, before %d", n, before)
	}
	_, get := s.Get("a", []byte("k"))
	for _, err := range []error{get, s.Put("a", []byte("k"), nil), s.Delete("a", []byte("k")), s.Scan("a", nil)} {
		if !errors.Is(err, ErrClosed) || !errors.Is(err, fs.ErrClosed) {
			t.Errorf("got %v", err)
		}
	}
}

func TestValuesComeBackAsTheyWerePut(t *testing.T) {
	s, _ := open(t)
	value := []byte("value")
	err := s.Update(func(tx *Tx) error {
		if err := tx.Put("a", []byte("k"), value); err != nil {
			return err
		}
		value[0] = 'X' // after Put it is the caller's again
		return tx.Put("a", []byte("empty"), nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.Get("a", []byte("k"))
	if string(got) != "value" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	got[0] = 'Y' // a copy
	if got, _ = s.Get("a", []byte("k")); string(got) != "value" {
		t.Errorf("%q", got)
	}
	if got, err := s.Get("a", []byte("empty")); got == nil || len(got) != 0 || err != nil {
		t.Errorf("empty: %v, %v", got, err)
	}
	for _, where := range [][2]string{{"a", "none"}, {"none", "k"}, {"a", ""}, {"", "k"}} {
		if got, err := s.Get(where[0], []byte(where[1])); got != nil || err != nil {
			t.Errorf("%q: %v, %v", where, got, err)
		}
	}
	for _, err := range []error{
		s.Put("", []byte("k"), nil), s.Put("a", nil, nil), s.Put("a", make([]byte, MaxKey+1), nil),
		s.Put("a", []byte("k"), make([]byte, MaxValue+1)), s.Put(strings.Repeat("b", MaxKey+1), []byte("k"), nil),
		s.View(func(tx *Tx) error { return tx.Put("a", []byte("k"), nil) }),
		s.View(func(tx *Tx) error { return tx.Delete("a", []byte("k")) }),
	} {
		if err == nil {
			t.Error("something out of bounds was stored")
		}
	}
}

func TestAScanByPrefixSeesItsKeysInOrder(t *testing.T) {
	s, _ := open(t)
	for _, k := range []string{"b2", "a", "b", "c", "b1\xff", "b1"} {
		if err := s.Put("keys", []byte(k), nil); err != nil {
			t.Fatal(err)
		}
	}
	var seen []string
	see := func(key, _ []byte) error { seen = append(seen, string(key)); return nil }
	if err := s.View(func(tx *Tx) error { return tx.ScanPrefix("keys", []byte("b"), see) }); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprintf("%q", seen) != `["b" "b1" "b1\xff" "b2"]` {
		t.Errorf("saw %q", seen)
	}
}

func TestAStepOfUnknownEndStopsTheStore(t *testing.T) {
	s, _ := open(t)
	if err := s.Put("a", []byte("k"), nil); err != nil {
		t.Fatal(err)
	}
	s.checkStep(1<<40, syscall.EIO) // never reached the file
	if err := s.Put("a", []byte("k"), nil); err != nil {
		t.Fatal(err)
	}
	s.checkStep(1, syscall.EIO)
	_, get := s.Get("a", []byte("k"))
	for _, err := range []error{get, s.Put("a", []byte("k"), nil)} {
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("got %v", err)
		}
	}
}

func TestAPanicInAStepLeavesTheStoreUsable(t *testing.T) {
	s, _ := open(t)
	func() {
		defer func() { recover() }()
		s.Update(func(tx *Tx) error {
			tx.Put("a", []byte("k"), nil)
			panic("in the step")
		})
	}()
	done := make(chan error, 1)
	go func() { done <- s.Put("a", []byte("other"), nil) }()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the next step waits for ever")
	}
	if v, err := s.Get("a", []byte("k")); v != nil || err != nil {
		t.Errorf("%v, %v", v, err)
	}
}

// limitFiles lets no file of this process grow beyond n bytes until undone.
func limitFiles(t *testing.T, n uint64) (undo func()) {
	t.Helper()
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	signal.Ignore(syscall.SIGXFSZ)
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: min(n, old.Max), Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
			t.Fatal(err)
		}
		signal.Reset(syscall.SIGXFSZ)
	}
}
