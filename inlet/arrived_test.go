package inlet_test

import (
	"context"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/outlet"
)

// A target that ends before anything has come says nothing of what it gets: of a
// stream that ended in good order at this end, only Arrived tells.
func TestArrivedSaysWhetherTheOutletHasAllOfIt(t *testing.T) {
	goes := func(t *testing.T, s *street) {
		go s.outlet.Drain(s.Context())
		s.await(t, link.Waiting)
	}
	gives := func(s *street) { // up what it has not read
		ctx, cancel := context.WithCancel(s.Context())
		cancel()
		s.outlet.Drain(ctx)
		synctest.Wait()
	}
	for name, c := range map[string]struct {
		first func(t *testing.T, s *street)                    // before it is asked
		then  func(t *testing.T, s *street, lane *memnet.Conn) // while it is asked
		want  error
	}{
		"all of it": {nil, func(_ *testing.T, _ *street, lane *memnet.Conn) { lane.Resume() }, nil},
		"a cut":     {nil, func(_ *testing.T, _ *street, lane *memnet.Conn) { lane.Cut() }, channel.ErrCut},
		"silence":   {nil, func(*testing.T, *street, *memnet.Conn) {}, channel.ErrCut}, // by the outlet, which heard nothing
		"a decision that ends": {nil, func(_ *testing.T, s *street, lane *memnet.Conn) {
			s.outlet.SetAllow(nil)
			lane.Resume()
		}, syscall.ECONNREFUSED},
		"an outlet that goes away": {nil, func(t *testing.T, s *street, lane *memnet.Conn) {
			goes(t, s)
			lane.Resume()
		}, nil},
		"one that goes away, and a cut": {nil, func(t *testing.T, s *street, lane *memnet.Conn) {
			goes(t, s)
			lane.Cut()
		}, channel.ErrCut},
		"an outlet that waits no longer": {nil, func(_ *testing.T, s *street, lane *memnet.Conn) {
			gives(s)
			lane.Resume()
		}, syscall.ECONNRESET},
		"one that is stopped": {nil, func(_ *testing.T, s *street, lane *memnet.Conn) {
			go s.stopOutlet()
			synctest.Wait()
			lane.Resume()
		}, syscall.ECONNRESET},
		"one that is stopped before it hears more": {nil, func(_ *testing.T, s *street, lane *memnet.Conn) {
			s.stopOutlet()
			lane.Resume()
		}, syscall.ECONNRESET},
		"one that went away, and waits no longer": {goes, func(_ *testing.T, s *street, lane *memnet.Conn) {
			gives(s)
			lane.Resume()
		}, syscall.ECONNRESET},
		// Which takes no question any more.
		"an outlet that went away":        {goes, func(_ *testing.T, _ *street, lane *memnet.Conn) { lane.Resume() }, nil},
		"one that went away, and a cut":   {goes, func(_ *testing.T, _ *street, lane *memnet.Conn) { lane.Cut() }, channel.ErrCut},
		"one that went away, and silence": {goes, func(*testing.T, *street, *memnet.Conn) {}, channel.ErrClosed}, // by this end alone
	} {
		t.Run(name, func(t *testing.T) {
			var lane *memnet.Conn
			var got chan int // of the bubble: time goes on while it is waited for
			virtual(t, "agent", func(o *outlet.Server, in *inlet.Server) {
				got = make(chan int, 1)
				o.Target = func(context.Context, *outlet.Request) (net.Conn, error) {
					a, b := memnet.Pipe(memnet.Link{})
					go func() {
						b.CloseWrite()
						all, _ := io.ReadAll(b)
						got <- len(all)
						b.Close()
					}()
					return a, nil
				}
				dial := in.Paths[0].Dial
				in.Paths[0].Dial = func(ctx context.Context) (net.Conn, error) {
					c, err := dial(ctx)
					if lane == nil && err == nil {
						lane = c.(*memnet.Conn)
					}
					return c, err
				}
			}, func(s *street) {
				st, err := s.inlet.Open(s.Context())
				if err != nil {
					t.Fatal(err)
				}
				if n, err := st.Read(make([]byte, 1)); err != io.EOF {
					t.Fatalf("%d bytes, %v", n, err)
				}
				lane.Stall()
				st.Write(make([]byte, 1000))
				st.CloseWrite()
				<-st.Done()
				if c.first != nil {
					c.first(t, s)
				}
				answer := make(chan error, 1)
				go func() { answer <- st.Arrived(s.Context()) }()
				synctest.Wait()
				select {
				case err := <-answer:
					t.Fatalf("before a byte has arrived it says %v", err)
				default:
				}
				c.then(t, s, lane)
				if err := <-answer; !errors.Is(err, c.want) {
					t.Errorf("it says %v, want %v", err, c.want)
				}
				n := <-got
				if (n == 1000) != (c.want == nil) {
					t.Errorf("%d bytes came out, and it says %v", n, c.want)
				}
			})
		})
	}
}
