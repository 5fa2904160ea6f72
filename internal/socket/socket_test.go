//go:build linux

package socket_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"syscall"
	"testing"

	"github.com/portal-tunnel/portal/internal/alloc"
	"github.com/portal-tunnel/portal/internal/socket"
	"github.com/portal-tunnel/portal/tests/serving"
)

// pieces are n buffers of which some are empty, and all of them in one.
func pieces(n, longest int) (all []byte, bufs net.Buffers) {
	source := rand.NewChaCha8([32]byte{byte(n)})
	rng := rand.New(source)
	for range n {
		b := make([]byte, rng.IntN(longest+1))
		source.Read(b)
		bufs, all = append(bufs, b), append(all, b...)
	}
	return all, bufs
}

func TestAWriterWritesAllInOrder(t *testing.T) {
	for _, kind := range []string{"a socket", "any connection"} {
		for _, c := range []struct{ n, longest int }{{0, 0}, {1, 0}, {1, 100}, {1, 20 << 20}, {3, 100}, {3, 4 << 20}, {64, 1000}, {65, 1000}, {1000, 8 << 10}} {
			var near, far net.Conn = serving.Pair(t)
			if kind == "any connection" {
				near, far = net.Pipe()
			}
			all, bufs := pieces(c.n, c.longest)
			wrote := make(chan error, 1)
			go func() {
				wrote <- socket.NewWriter(near).Write(bufs)
				near.Close()
			}()
			got, err := io.ReadAll(far)
			if err != nil || !bytes.Equal(got, all) {
				t.Errorf("%s: %d buffers of up to %d: %d bytes of %d, %v", kind, c.n, c.longest, len(got), len(all), err)
			}
			if err := <-wrote; err != nil {
				t.Errorf("%s: %v", kind, err)
			}
			far.Close()
		}
	}
}

func TestAWriterSaysWhyItFails(t *testing.T) {
	near, far := serving.Pair(t)
	far.SetLinger(0)
	far.Close()
	w := socket.NewWriter(near)
	var err error
	for err == nil { // the first may be there before the reset
		err = w.Write(net.Buffers{[]byte("a"), []byte("b")})
	}
	if !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("to a connection that was reset: %v", err)
	}
	near.Close()
	if err := w.Write(net.Buffers{[]byte("a")}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("to one that is closed: %v", err)
	}
}

// Who waits for a connection that takes no more is told when that is closed.
func TestAWriterWaitsUntilTheConnectionIsClosed(t *testing.T) {
	near, _ := serving.Pair(t)
	raw := socket.Raw(near)
	full := make([]byte, 1<<20)
	if err := raw.Write(func(fd uintptr) bool {
		for {
			if _, err := socket.Write(fd, full); err != nil {
				if err != syscall.EAGAIN {
					t.Error(err)
				}
				return true
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, 1)
	go func() { failed <- socket.NewWriter(near).Write(net.Buffers{full, full}) }()
	near.Close()
	if err := <-failed; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

func TestReadTellsNothingYetFromTheEnd(t *testing.T) {
	near, far := serving.Pair(t)
	raw := socket.Raw(near)
	read := func(bufs ...[]byte) (n int, err error) {
		raw.Control(func(fd uintptr) { n, err = socket.Read(fd, bufs...) })
		return n, err
	}
	one, two := make([]byte, 3), make([]byte, 3)
	if n, err := read(one); n != 0 || err != syscall.EAGAIN {
		t.Errorf("nothing yet: %d, %v", n, err)
	}
	if n, err := read(one, two); n != 0 || err != syscall.EAGAIN {
		t.Errorf("nothing yet, into two: %d, %v", n, err)
	}
	// await tries first and waits then, as everybody must: what came before is not said again.
	await := func(bufs ...[]byte) (n int, err error) {
		if err := raw.Read(func(fd uintptr) bool {
			n, err = socket.Read(fd, bufs...)
			return err != syscall.EAGAIN
		}); err != nil {
			t.Fatal(err)
		}
		return n, err
	}
	far.Write([]byte("abcde"))
	if n, err := await(one, two); n != 5 || err != nil || string(one)+string(two[:2]) != "abcde" {
		t.Errorf("%d, %v, %q %q", n, err, one, two)
	}
	far.CloseWrite()
	if n, err := await(one); n != 0 || err != nil {
		t.Errorf("the end: %d, %v", n, err)
	}
}

func TestOnlySocketsAreRaw(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	if socket.Raw(near) != nil {
		t.Error("a pipe in memory is none")
	}
	waiting, _ := serving.Pair(t)
	f, err := waiting.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if socket.Raw(waiting) == nil {
		t.Error("a socket is one")
	}
	f.Fd() // sets both to wait
	if socket.Raw(waiting) != nil {
		t.Error("one that was set to wait is none")
	}
}

// Whoever took a closed one for no socket would go on to io.Copy, which makes a pipe before it looks.
func TestCallsOfAClosedSocketSayThatItIsClosed(t *testing.T) {
	near, _ := serving.Pair(t)
	near.Close()
	raw := socket.Raw(near)
	if raw == nil {
		t.Fatal("it is one")
	}
	never := func(uintptr) bool { t.Error("it has no descriptor"); return true }
	for _, call := range []func(func(uintptr) bool) error{raw.Read, raw.Write} {
		if err := call(never); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	}
}

func TestCallsAllocateNothing(t *testing.T) {
	if alloc.Raced {
		t.Log("NOT RUN: with the race detector other calls are made")
		return
	}
	near, far := serving.Pair(t)
	in, out := socket.Raw(far), socket.NewWriter(near)
	b := make([]byte, 100)
	bufs := net.Buffers{b, b, b}
	work := make(net.Buffers, len(bufs))
	got := [][]byte{make([]byte, 200), make([]byte, 200)}
	left := 0
	take := func(fd uintptr) bool {
		n, err := socket.Read(fd, got...)
		left -= n
		return err != syscall.EAGAIN
	}
	if n := testing.AllocsPerRun(100, func() {
		copy(work, bufs)
		if err := out.Write(work); err != nil {
			t.Fatal(err)
		}
		for left = 300; left > 0; {
			if err := in.Read(take); err != nil {
				t.Fatal(err)
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if !slices.EqualFunc(bufs, net.Buffers{b, b, b}, bytes.Equal) {
		t.Error("what was copied has changed")
	}
}
