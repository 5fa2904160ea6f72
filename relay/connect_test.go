package relay_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"

	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/relay"
)

// Copying from socket to socket, in the kernel or by a buffer, wraps what the system says.
func TestALogSaysWhyALaneEndedWithoutItsSockets(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	pair := func() (far, near net.Conn) {
		far, err := net.Dial("tcp", ln.Addr().String())
		if err == nil {
			near, err = ln.Accept()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { far.Close(); near.Close() })
		return far, near
	}
	for name, only := range map[string]func(net.Conn) io.Writer{
		"in the kernel": func(c net.Conn) io.Writer { return c },
		"by a buffer":   func(c net.Conn) io.Writer { return struct{ io.Writer }{c} },
	} {
		caller, from := pair()
		_, to := pair()
		stream.Abort(caller)
		_, err := io.Copy(only(to), from)
		if got := fmt.Sprint(relay.Orderly(err)); got != syscall.ECONNRESET.Error() {
			t.Errorf("%s: %q of %q", name, got, err)
		}
	}
	if got := relay.Orderly(nil); got != "in good order" {
		t.Error(got)
	}
	ours := fmt.Errorf("the lane was cut: %w", errors.New("its credential has ended"))
	if got := relay.Orderly(ours); got != any(ours) {
		t.Error(got)
	}
}
