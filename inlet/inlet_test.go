package inlet_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/outlet"
)

// echo is a target that answers everything and ends when its client does.
func echo(t testing.TB) string {
	ln := listen(t)
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(c, c)
				c.(*net.TCPConn).CloseWrite()
				c.Close()
			}()
		}
	}()
	return ln.Addr().String()
}

func TestBytesComeOutAtTheTargetAndBack(t *testing.T) {
	before := runtime.NumGoroutine()
	h := build(t, outlet.TCP(echo(t)), "agent", nil)
	c, err := net.Dial("tcp", h.addr)
	if err != nil {
		t.Fatal(err)
	}
	sent := make([]byte, 32<<20)
	rand.Read(sent)
	go func() {
		c.Write(sent)
		c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("%d of %d bytes came back: %v", len(got), len(sent), err)
	}
	c.Close()
	h.stop()
	for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before+2; { // echo's two
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines before, %d after:\n%s", before, runtime.NumGoroutine(), buf[:runtime.Stack(buf, true)])
		}
		runtime.Gosched()
	}
}

func TestAPeerWithoutTheAttributeIsRefusedAndReset(t *testing.T) {
	h := build(t, outlet.TCP(echo(t)), "guest", nil)
	for s := range h.states {
		if s.Kind == link.Refused {
			break
		}
	}
	wantReset(t, h.addr)
}

// wantReset connects to an inlet that resets the connection before a byte of an
// answer.
func wantReset(t testing.TB, addr string) {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if errors.Is(err, syscall.ECONNRESET) { // as soon as it was accepted
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte("hello"))
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read %d bytes, %v; want a reset", n, err)
	}
}

func TestDialGivesAStreamToAGoProgram(t *testing.T) {
	var served *outlet.Server
	h := build(t, nil, "agent", func(o *outlet.Server, _ *inlet.Server) { served = o })
	ln := served.Listen()
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		io.Copy(c, c)
		c.Close()
	}()
	c, err := h.inlet.Dial(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	c.Write([]byte("ask"))
	c.(interface{ CloseWrite() error }).CloseWrite()
	if got, err := io.ReadAll(c); string(got) != "ask" || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
	c.Close()
}
