package control

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
)

const stranger = 65534

// as runs f on a thread that is another user, and ends that thread.
func as(t *testing.T, uid int, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			t.Errorf("becoming user %d: %v", uid, errno)
			return
		}
		f()
	}()
	<-done
}

func TestAStrangerIsRefusedWhateverTheModes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("becoming another user needs root")
	}
	dir, err := os.MkdirTemp("", "control")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}

	t.Run("caller", func(t *testing.T) {
		var asked atomic.Int32
		path := filepath.Join(dir, "ours.sock")
		stop := startAt(t, path, func(context.Context, string, json.RawMessage) (any, error) { asked.Add(1); return nil, nil })
		defer stop()
		if err := os.Chmod(path, 0o666); err != nil {
			t.Fatal(err)
		}
		as(t, stranger, func() {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			b, err := exchange(c.(*net.UnixConn), []byte(`{"method":"m"}`))
			if err != nil || !strings.Contains(string(b), `"refused"`) {
				t.Errorf("%s, %v", b, err)
			}
		})
		if err := Call(t.Context(), path, "m", nil, nil); err != nil || asked.Load() != 1 {
			t.Errorf("%v, handled %d", err, asked.Load())
		}
	})

	t.Run("server", func(t *testing.T) {
		path := filepath.Join(dir, "theirs.sock")
		var ln net.Listener
		as(t, stranger, func() {
			if ln, err = net.Listen("unix", path); err != nil {
				t.Error(err)
			}
		})
		if ln == nil {
			return
		}
		defer ln.Close()
		err := Call(t.Context(), path, "m", "a secret", nil)
		if err == nil || errors.Is(err, ErrNobody) || !strings.Contains(err.Error(), "user 65534") {
			t.Errorf("got %v", err)
		}
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if n, _ := c.Read(make([]byte, 100)); n != 0 {
			t.Error("the stranger was told something")
		}
	})
}
