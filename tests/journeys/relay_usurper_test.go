package journeys_test

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/routing"
)

// A usurper has the host of a relay: its identity and its address. Who comes there are processes.
type usurper struct {
	t     testing.TB
	ctx   context.Context // ends with the test, or after limit
	end   context.CancelFunc
	node  *routing.Node
	trust *identity.Trust // it knows who the authority is
}

func newUsurper(t testing.TB, authority identity.ID, limit time.Duration) *usurper {
	ctx, end := context.WithTimeout(context.Background(), limit)
	return &usurper{t, ctx, end, new(routing.Node), identity.NewTrust(authority)}
}

// serve takes control channels and lanes in the relay's place until the test's end.
func (u *usurper) serve(self *identity.Self, at string, accept func(*link.Live, *stream.Incoming), lane func(ctx context.Context, id [16]byte, c net.Conn)) {
	u.t.Helper()
	ln, err := net.Listen("tcp", at)
	if err != nil {
		u.t.Fatal(err)
	}
	server := &link.Server{
		Services: map[channel.Kind]link.Service{channel.Relay: {
			Config: channel.Config{Node: u.node, Self: self, Trust: u.trust, Proofless: true, Judge: everybody},
			Accept: accept,
		}},
		Lane: func(ctx context.Context, p channel.Preface, _ int, c net.Conn) (known bool) {
			lane(ctx, p.ID, c)
			return false
		},
	}
	ended := make(chan struct{})
	go func() {
		server.Serve(u.ctx, ln)
		close(ended)
	}()
	u.t.Cleanup(func() {
		u.end()
		<-ended
		u.node.Close()
	})
}

// offer is that of a lane: id and key are a relay's to choose.
func offer(id [16]byte, key [32]byte) []byte { return append(append([]byte{1}, id[:]...), key[:]...) }
