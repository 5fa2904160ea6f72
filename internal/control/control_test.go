package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/internal/alloc"
)

func echo(_ context.Context, method string, params json.RawMessage) (any, error) {
	if method == "fail" {
		return nil, &Error{"E1", "it failed"}
	}
	return params, nil
}

func start(t *testing.T, h Handler) (path string, stop func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "control.sock")
	return path, startAt(t, path, h)
}

func TestACallIsAnsweredAndAnErrorKeepsItsCode(t *testing.T) {
	counted(t, func() {
		path, stop := start(t, echo)
		defer stop()
		var got string
		if err := Call(context.Background(), path, "echo", "hello", &got); err != nil || got != "hello" {
			t.Fatalf("%q, %v", got, err)
		}
		var e *Error
		if err := Call(context.Background(), path, "fail", nil, nil); !errors.As(err, &e) || e.Code != "E1" {
			t.Fatalf("got %v", err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Fatalf("%v, %v", info.Mode(), err)
		}
		stop()
		if err := Call(context.Background(), path, "echo", nil, nil); !errors.Is(err, ErrNobody) {
			t.Fatalf("got %v", err)
		}
	})
}

func TestOneOfManyThatStartAtOnceListens(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control.sock")
	// What a killed process leaves behind.
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	var winners atomic.Int32
	var all sync.WaitGroup
	lns := make(chan net.Listener, 50)
	for range 50 {
		all.Go(func() {
			ln, err := Listen(path)
			switch {
			case err == nil:
				winners.Add(1)
				lns <- ln
			case !errors.Is(err, ErrTaken):
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := winners.Load(); n != 1 {
		t.Fatalf("%d listen", n)
	}
	(<-lns).Close()
}

func TestAFileThatIsNoSocketIsLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control.sock")
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path); err == nil {
		t.Fatal("listening")
	}
	if b, err := os.ReadFile(path); string(b) != "mine" || err != nil {
		t.Fatalf("%q, %v", b, err)
	}
}

func TestALongPathSaysWhatToDo(t *testing.T) {
	_, err := Listen("/" + strings.Repeat("x", 120))
	if err == nil || !strings.Contains(err.Error(), "--home") {
		t.Fatalf("got %v", err)
	}
}

func TestMalformedAndLongRequestsAreAnsweredAndForgotten(t *testing.T) {
	path, stop := start(t, echo)
	defer stop()
	for name, b := range map[string][]byte{
		"empty":   nil,
		"no json": []byte("hello"),
		"unnamed": []byte(`{"params":1}`),
		"of HTTP": []byte("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 28\r\n\r\n" + `{"method":"echo","params":1}`),
		"long":    bytes.Repeat([]byte("x"), maxMessage+100),
	} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Write(b); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: %v", name, err)
		}
		c.(*net.UnixConn).CloseWrite()
		var r response
		err = json.NewDecoder(c).Decode(&r)
		if !errors.Is(err, syscall.ECONNRESET) && (err != nil || r.Error == nil || r.Error.Code != "malformed") {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
		c.Close()
	}
	if err := Call(context.Background(), path, "echo", 1, nil); err != nil {
		t.Fatal(err)
	}
	t.Logf("F-34: the control socket runs nothing of what is no request, a browser's among it")
}

func FuzzReadRequest(f *testing.F) {
	f.Add([]byte(`{"method":"ticket.create","params":{"name":"db1"}}`))
	f.Add([]byte(`{"method":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		if q, err := readRequest(bytes.NewReader(b)); err == nil && q.Method == "" {
			t.Fatal("a request without a method")
		}
	})
}

func TestALyingRequestAllocatesLittle(t *testing.T) {
	alloc.Hostile(t, func(b []byte) { readRequest(bytes.NewReader(b)) }, []byte(`{"method":"ticket.create","params":{"name":"db1","attributes":{"a":[1,"b"]}}}`))
}
