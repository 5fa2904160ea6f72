package stream_test

import (
	"net"
	"testing"

	"golang.org/x/net/nettest"

	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
)

func TestConnIsANetConn(t *testing.T) {
	nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
		a, b := pipe(memnet.Link{})
		x, y, incoming := pair(t, a, b, stream.Limits{})
		c, d := open(t, x, incoming)
		return c, d, func() {
			c.Close()
			d.Close()
			stop(t, x, y)
		}, nil
	})
}
