package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func startAt(t *testing.T, path string, h Handler) (stop func()) {
	t.Helper()
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, ln, h) }()
	return sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// counted checks that what f starts and opens is over when it returns.
func counted(t *testing.T, f func()) {
	t.Helper()
	c, err := net.Listen("unix", filepath.Join(t.TempDir(), "s")) // the poller's own descriptors are open from here on
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	descriptors := func() int {
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	g, d := runtime.NumGoroutine(), descriptors()
	f()
	for range 1000 { // a goroutine that has signalled its end may still be on its way out
		if runtime.NumGoroutine() <= g {
			break
		}
		runtime.Gosched()
		time.Sleep(time.Millisecond)
	}
	if n := runtime.NumGoroutine(); n > g {
		all := make([]byte, 1<<20)
		t.Errorf("%d goroutines, before %d\n%s", n, g, all[:runtime.Stack(all, true)])
	}
	if n := descriptors(); n > d {
		t.Errorf("%d descriptors, before %d", n, d)
	}
}

func TestManyCallsAreAnsweredAFewAtATime(t *testing.T) {
	counted(t, func() {
		var mu sync.Mutex
		var now, most int
		path := filepath.Join(t.TempDir(), "control.sock")
		gate := make(chan struct{})
		open := sync.OnceFunc(func() { close(gate) })
		stop := startAt(t, path, func(ctx context.Context, method string, params json.RawMessage) (any, error) {
			mu.Lock()
			now++
			most = max(most, now)
			if now == atOnce {
				open()
			}
			mu.Unlock()
			<-gate
			mu.Lock()
			now--
			mu.Unlock()
			return params, nil
		})
		defer stop()
		var all sync.WaitGroup
		for i := range 2 * atOnce {
			all.Go(func() {
				var got int
				if err := Call(t.Context(), path, "m", i, &got); err != nil || got != i {
					t.Errorf("call %d: %d, %v", i, got, err)
				}
			})
		}
		all.Wait()
		if most != atOnce {
			t.Errorf("%d at once, want %d", most, atOnce)
		}
	})
}

func TestAStopWaitsForHandlersAndForNoClient(t *testing.T) {
	counted(t, func() {
		path := filepath.Join(t.TempDir(), "control.sock")
		started, ended := make(chan struct{}), false
		stop := startAt(t, path, func(ctx context.Context, method string, params json.RawMessage) (any, error) {
			close(started)
			<-ctx.Done()
			ended = true
			return nil, ctx.Err()
		})
		var silent []net.Conn
		for range 5 {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.Write([]byte(`{"method":`))
			silent = append(silent, c)
		}
		called := make(chan error, 1)
		go func() { called <- Call(context.Background(), path, "m", nil, nil) }()
		<-started
		stop()
		if !ended {
			t.Error("Serve returned before its handler")
		}
		if err := <-called; err == nil {
			t.Error("the call succeeded")
		}
		for _, c := range silent {
			if _, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, syscall.ECONNRESET) {
				t.Error(err)
			}
		}
	})
}

func TestASilentClientIsGivenUp(t *testing.T) {
	counted(t, func() {
		path := filepath.Join(t.TempDir(), "control.sock")
		ln, err := Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.Write([]byte(`{"me`))
		at, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		// Returns though the client neither goes on nor closes.
		serve(t.Context(), at, func(context.Context, string, json.RawMessage) (any, error) {
			t.Error("half a request was handled")
			return nil, nil
		}, 20*time.Millisecond)
	})
}

func TestACallEndsWithItsContext(t *testing.T) {
	counted(t, func() {
		path := filepath.Join(t.TempDir(), "control.sock")
		started := make(chan struct{})
		stop := startAt(t, path, func(ctx context.Context, method string, params json.RawMessage) (any, error) {
			close(started)
			<-ctx.Done()
			return nil, ctx.Err()
		})
		defer stop()
		ctx, cancel := context.WithCancel(t.Context())
		go func() { <-started; cancel() }()
		if err := Call(ctx, path, "m", nil, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}

func TestSizesAreBoundedBothWays(t *testing.T) {
	counted(t, func() {
		path := filepath.Join(t.TempDir(), "control.sock")
		stop := startAt(t, path, func(_ context.Context, method string, params json.RawMessage) (any, error) {
			if method == "long" {
				return strings.Repeat("x", maxMessage), nil
			}
			if method == "never" {
				return make(chan int), nil
			}
			return params, nil
		})
		defer stop()
		if err := Call(t.Context(), path, "m", strings.Repeat("x", maxMessage), nil); err == nil || !strings.Contains(err.Error(), "bytes") {
			t.Errorf("long request: %v", err)
		}
		for _, method := range []string{"long", "never"} {
			var e *Error
			if err := Call(t.Context(), path, method, nil, nil); !errors.As(err, &e) || e.Code != "failed" {
				t.Errorf("%s answer: %v", method, err)
			}
		}
		large := strings.Repeat("x", maxMessage-100)
		var got string
		if err := Call(t.Context(), path, "m", large, &got); err != nil || got != large {
			t.Errorf("large request and answer: %d bytes, %v", len(got), err)
		}
	})
}

func TestAnErrorWithoutACodeIsAFailure(t *testing.T) {
	path, stop := start(t, func(context.Context, string, json.RawMessage) (any, error) {
		return nil, fmt.Errorf("creating: %w", os.ErrExist)
	})
	defer stop()
	var e *Error
	if err := Call(t.Context(), path, "m", nil, nil); !errors.As(err, &e) || *e != (Error{"failed", "creating: file already exists"}) {
		t.Errorf("got %v", err)
	}
}

func TestNobodyListens(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control.sock")
	if err := Call(t.Context(), path, "m", nil, nil); !errors.Is(err, ErrNobody) {
		t.Errorf("no socket: %v", err)
	}
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	if err := Call(t.Context(), path, "m", nil, nil); !errors.Is(err, ErrNobody) {
		t.Errorf("dead socket: %v", err)
	}
	if err := Call(t.Context(), "/"+strings.Repeat("x", 120), "m", nil, nil); err == nil || !strings.Contains(err.Error(), "--home") {
		t.Errorf("long path: %v", err)
	}
}

func TestALiveSocketIsNotReplacedWhenItsLockIsGone(t *testing.T) {
	path, stop := start(t, echo)
	defer stop()
	if err := os.Remove(path + ".lock"); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path); !errors.Is(err, ErrTaken) {
		t.Errorf("got %v", err)
	}
	if err := Call(t.Context(), path, "m", nil, nil); err != nil {
		t.Errorf("the first no longer answers: %v", err)
	}
}

func TestListenAgainAfterCloseAndAfterFailure(t *testing.T) {
	counted(t, func() {
		path := filepath.Join(t.TempDir(), "control.sock")
		for range 20 {
			ln, err := Listen(path)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Listen(path); !errors.Is(err, ErrTaken) {
				t.Fatalf("second: %v", err)
			}
			for range 2 {
				if err := ln.Close(); err != nil {
					t.Fatal(err)
				}
			}
			if all, err := os.ReadDir(filepath.Dir(path)); len(all) != 1 || err != nil { // the lock
				t.Fatalf("left over: %v, %v", all, err)
			}
		}
	})
}
