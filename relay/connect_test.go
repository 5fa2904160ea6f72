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
	"github.com/portal-tunnel/portal/tests/serving"
)

// Copying from socket to socket, in the kernel or by a buffer, wraps what the system says.
func TestALogSaysWhyALaneEndedWithoutItsSockets(t *testing.T) {
	for name, only := range map[string]func(net.Conn) io.Writer{
		"in the kernel": func(c net.Conn) io.Writer { return c },
		"by a buffer":   func(c net.Conn) io.Writer { return struct{ io.Writer }{c} },
	} {
		caller, from := serving.Pair(t)
		_, to := serving.Pair(t)
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
