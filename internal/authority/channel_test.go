package authority

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/routing"
)

// listening serves s on the network at aWay until stop, which counts what is left on its node.
func listening(t *testing.T, n *memnet.Network, s *Server) (stop func()) {
	t.Helper()
	s.Node = new(routing.Node)
	ln, err := n.Listen(aWay[0].Addr)
	if err != nil {
		t.Fatal(err)
	}
	server := &link.Server{Services: map[channel.Kind]link.Service{channel.Authority: s.Service()}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, ln) }()
	return sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		s.Close()
		synctest.Wait()
		if n := s.Node.Len(); n != 0 {
			t.Errorf("%d actors are left at the authority", n)
		}
	})
}

// dialing returns a client whose channels go over the network.
func dialing(t *testing.T, n *memnet.Network, s *Server, home *identity.Home) *Client {
	t.Helper()
	c := newClient(t, &network{server: s}, home)
	c.question = nil
	c.Node = new(routing.Node)
	c.Dial = func(ctx context.Context, w identity.Way) (net.Conn, error) { return n.Dial(ctx, "tcp", w.Addr) }
	t.Cleanup(func() {
		synctest.Wait()
		if n := c.Node.Len(); n != 0 {
			t.Errorf("%d actors are left at the member", n)
		}
	})
	return c
}

func TestEnrolmentAndRenewalOverAChannel(t *testing.T) {
	counted(t)
	synctest.Test(t, func(t *testing.T) {
		n := new(memnet.Network)
		s := newServer(t, time.Now)
		defer listening(t, n, s)()
		c := dialing(t, n, s, newHome(t, homeDir(t)))
		ticket := newTicket(t, s, Grant{Name: "db1", Attributes: identity.Attributes{"role": "db"}})
		if e := enroll(t, c, ticket); e.Credential.Attributes["role"] != "db" {
			t.Errorf("%v", e.Credential.Attributes)
		}
		var used *TicketError
		if _, err := dialing(t, n, s, nil).Enroll(t.Context(), ticket); !errors.As(err, &used) || used.Reason != ErrTicketUsed {
			t.Errorf("another with the same ticket: %v", err)
		}
		stop := running(t, c)
		defer stop()
		for range 10 * 60 {
			time.Sleep(time.Minute)
			if !time.Now().Before(c.Self.Credential().Expires) {
				t.Fatalf("expired at %s", c.Self.Credential().Expires)
			}
		}
	})
}

func TestAnExpiredCredentialIsRenewedOverAChannel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := new(memnet.Network)
		s := newServer(t, time.Now)
		defer listening(t, n, s)()
		c := dialing(t, n, s, newHome(t, homeDir(t)))
		enroll(t, c, newTicket(t, s, Grant{}))
		time.Sleep(48 * time.Hour)
		if err := c.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := c.Self.Credential(); !time.Now().Before(got.Expires) {
			t.Errorf("until %s", got.Expires)
		}
	})
}

func TestARotatedIdentityRenewsOverAChannel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := new(memnet.Network)
		s := newServer(t, time.Now)
		defer listening(t, n, s)()
		c := dialing(t, n, s, nil)
		enroll(t, c, newTicket(t, s, Grant{}))
		if err := c.Self.Rotate(); err != nil {
			t.Fatal(err)
		}
		if err := c.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		if c.Self.Credential().Change != c.Self.Latest() {
			t.Error("the credential is of the change before")
		}
	})
}

func TestAKeyThatWasRotatedAwayIsToldSoOverAChannel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := new(memnet.Network)
		s := newServer(t, time.Now)
		defer listening(t, n, s)()
		home := newHome(t, homeDir(t))
		c := dialing(t, n, s, home)
		enroll(t, c, newTicket(t, s, Grant{}))
		thief := dialing(t, n, s, newHome(t, home.Dir())) // its Self is of before the rotation
		if err := c.Self.Rotate(); err != nil {
			t.Fatal(err)
		}
		if err := c.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		thief.Home, thief.Authority, thief.Ways = nil, s.Self.ID(), aWay
		var refused *RefusedError
		if err := thief.Renew(t.Context()); !errors.As(err, &refused) || refused.Reason != ErrRotatedAway {
			t.Errorf("%v", err)
		}
	})
}

func TestAnotherIdentityAtTheAuthoritysAddressLearnsNoSecret(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := new(memnet.Network)
		s, impostor := newServer(t, time.Now), newServer(t, time.Now)
		var log logBuffer
		impostor.Logger = newLogger(&log)
		defer listening(t, n, impostor)()
		c := dialing(t, n, s, nil)
		_, err := c.Enroll(t.Context(), newTicket(t, s, Grant{}))
		var unreachable *UnreachableError
		if !errors.As(err, &unreachable) || !errors.Is(err, channel.ErrPin) {
			t.Errorf("%v", err)
		}
		if strings.Contains(log.String(), "question") {
			t.Errorf("it was asked: %s", log.String())
		}
	})
}

func TestAClockThatIsOffIsToldSoOverAChannel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := new(memnet.Network)
		s := newServer(t, time.Now)
		defer listening(t, n, s)()
		for _, off := range []time.Duration{5 * time.Minute, -5 * time.Minute, -10 * time.Hour} {
			c := dialing(t, n, s, nil)
			c.Now = func() time.Time { return time.Now().Add(off) }
			var skew *SkewError
			if _, err := c.Enroll(t.Context(), newTicket(t, s, Grant{TTL: MaxTicketTTL})); !errors.As(err, &skew) {
				t.Errorf("%s: %v", off, err)
			}
		}
	})
}

func TestEachWayIsTriedAndGetsItsShareOfTheTime(t *testing.T) {
	counted(t)
	synctest.Test(t, func(t *testing.T) {
		n := new(memnet.Network)
		s := newServer(t, time.Now)
		defer listening(t, n, s)()
		silent, err := n.Listen("127.0.0.1:4200") // accepts and says nothing
		if err != nil {
			t.Fatal(err)
		}
		var accepted sync.WaitGroup
		accepted.Go(func() {
			for {
				c, err := silent.Accept()
				if err != nil {
					return
				}
				accepted.Go(func() {
					io.Copy(io.Discard, c)
					c.Close()
				})
			}
		})
		defer accepted.Wait()
		defer silent.Close()

		ways := []identity.Way{{Addr: "127.0.0.1:4200"}, {Addr: "127.0.0.1:4300"}, aWay[0]}
		c := dialing(t, n, s, nil)
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if _, err := c.Enroll(ctx, newTicket(t, s, Grant{Ways: ways})); err != nil {
			t.Errorf("by the third way: %v", err)
		}

		_, err = dialing(t, n, s, nil).Enroll(t.Context(), newTicket(t, s, Grant{Ways: ways[:2]}))
		var unreachable *UnreachableError
		if !errors.As(err, &unreachable) || len(unreachable.Errors) != 2 {
			t.Fatalf("by no way: %v", err)
		}
		for i, w := range ways[:2] {
			if !strings.Contains(unreachable.Errors[i].Error(), w.Addr) {
				t.Errorf("%v does not name %s", unreachable.Errors[i], w.Addr)
			}
		}
	})
}

func TestAnAuthorityAnswersNothingElseAndNotTooMuch(t *testing.T) {
	counted(t)
	synctest.Test(t, func(t *testing.T) {
		n := new(memnet.Network)
		s := newServer(t, time.Now)
		defer listening(t, n, s)()
		c := dialing(t, n, s, nil)
		lane, err := c.Dial(t.Context(), aWay[0])
		if err != nil {
			t.Fatal(err)
		}
		live, err := link.Dial(t.Context(), lane, &channel.Config{
			Node: c.Node, Self: c.Self, Trust: c.Trust, Kind: channel.Authority, Judge: anyone, Proofless: true,
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer live.Close(nil)
		open := func(h stream.Header) *stream.Conn {
			conn, err := live.Mux.Open(h)
			if err != nil {
				t.Fatal(err)
			}
			return conn
		}
		for _, h := range []stream.Header{
			{Kind: stream.Bytes, Name: nameEnroll},
			{Kind: stream.Request, Name: "issue"},
			{Kind: stream.Request, Name: nameRenew, Body: []byte("x")},
		} {
			var refused *stream.RefusedError
			if err := open(h).Wait(t.Context()); !errors.As(err, &refused) || refused.Code != stream.CodeRefused {
				t.Errorf("%+v: %v", h, err)
			}
		}

		long := open(stream.Header{Kind: stream.Request, Name: nameRenew})
		long.Write(make([]byte, maxQuestion+1))
		var reset *stream.ResetError
		if _, err := io.ReadAll(long); !errors.As(err, &reset) {
			t.Errorf("a question that is too long: %v", err)
		}

		// Questions that are begun and not ended hold their places for ten seconds.
		var begun []*stream.Conn
		for range maxAskedEach {
			conn := open(stream.Header{Kind: stream.Request, Name: nameRenew})
			if err := conn.Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			begun = append(begun, conn)
		}
		var refused *stream.RefusedError
		if err := open(stream.Header{Kind: stream.Request, Name: nameRenew}).Wait(t.Context()); !errors.As(err, &refused) || refused.Code != stream.CodeBusy {
			t.Errorf("one question more: %v", err)
		}
		enroll(t, dialing(t, n, s, nil), newTicket(t, s, Grant{})) // somebody else's
		time.Sleep(questionTime + time.Second)
		for _, conn := range begun {
			if _, err := io.ReadAll(conn); !errors.As(err, &reset) {
				t.Errorf("a question that does not end: %v", err)
			}
		}
		again := open(stream.Header{Kind: stream.Request, Name: nameRenew})
		a, err := ask(again, &question{})
		if err != nil || a.Code != codeNotMember {
			t.Errorf("after that: %+v, %v", a, err)
		}
		again.Close()
	})
}
