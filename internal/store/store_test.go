package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

func open(t *testing.T) (*Store, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "store")
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, path
}

func TestASecondOpenNamesTheHolderAndDoesNotWait(t *testing.T) {
	_, path := open(t)
	_, err := Open(path)
	var held *HeldError
	if !errors.As(err, &held) || held.PID != os.Getpid() {
		t.Fatalf("got %v", err)
	}
}

func TestAFileThatOthersCanReadIsRefused(t *testing.T) {
	s, path := open(t)
	s.Close()
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if s, err := Open(path); err == nil {
		s.Close()
		t.Fatal("opened")
	}
}

func TestOneOfManyTakesOnce(t *testing.T) {
	s, _ := open(t)
	if err := s.Put("tickets", []byte("t"), []byte("1")); err != nil {
		t.Fatal(err)
	}
	var winners atomic.Int32
	var all sync.WaitGroup
	for range 200 {
		all.Go(func() {
			err := s.Update(func(tx *Tx) error {
				v, err := tx.Get("tickets", []byte("t"))
				if err != nil || v == nil {
					return errors.Join(err, errors.New("used"))
				}
				return tx.Delete("tickets", []byte("t"))
			})
			if err == nil {
				winners.Add(1)
			}
		})
	}
	all.Wait()
	if n := winners.Load(); n != 1 {
		t.Fatalf("%d winners", n)
	}
}

func TestAFailedStepChangesNothing(t *testing.T) {
	s, path := open(t)
	fail := errors.New("no")
	err := s.Update(func(tx *Tx) error {
		if err := tx.Put("a", []byte("k"), []byte("v")); err != nil {
			return err
		}
		return fail
	})
	if !errors.Is(err, fail) {
		t.Fatal(err)
	}
	s.Close()
	s, err = Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if v, err := s.Get("a", []byte("k")); v != nil || err != nil {
		t.Fatalf("%q, %v", v, err)
	}
}

func TestAScanMayDeleteWhatItSees(t *testing.T) {
	s, _ := open(t)
	err := s.Update(func(tx *Tx) error {
		for i := range 1000 {
			if err := tx.Put("b", fmt.Appendf(nil, "%04d", i), []byte("v")); err != nil {
				return err
			}
		}
		seen := 0
		err := tx.Scan("b", func(k, _ []byte) error {
			seen++
			return tx.Delete("b", k)
		})
		if seen != 1000 {
			t.Errorf("saw %d", seen)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Scan("b", func(k, _ []byte) error { return fmt.Errorf("%s is left", k) }); err != nil {
		t.Fatal(err)
	}
}

// A full disk is a real one: a small tmpfs of the test's own.
func TestAFullDiskLeavesTheStoreAsItWas(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a small disk needs root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	defer syscall.Unmount(dir, syscall.MNT_DETACH)
	s, err := Open(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Put("a", []byte("kept"), []byte("v")); err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(dir, "filler")
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	f.Close()
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if err := s.Put("a", []byte("big"), make([]byte, 512<<10)); err == nil {
		t.Fatal("a record larger than the disk was stored")
	}
	if v, err := s.Get("a", []byte("kept")); string(v) != "v" || err != nil {
		t.Fatalf("%q, %v", v, err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if err := s.Put("a", []byte("more"), []byte("w")); err != nil {
		t.Fatalf("with room again: %v", err)
	}
	if v, err := s.Get("a", []byte("big")); v != nil || err != nil {
		t.Fatalf("half applied: %d bytes, %v", len(v), err)
	}
}
