package inlet_test

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

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/outlet"
	"github.com/portal-tunnel/portal/routing"
)

// The outlet here holds no leases: what ends the connection is the inlet.
func TestAnExpiredCredentialResetsLocalConnectionsWithinTwoSeconds(t *testing.T) {
	for _, whose := range []string{"the outlet's credential", "our credential"} {
		t.Run(whose, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &street{TB: t}
				authority, err := identity.NewSelf()
				if err != nil {
					t.Fatal(err)
				}
				life := map[bool]time.Duration{true: time.Minute, false: time.Hour}
				theirs := member(t, authority, identity.Attributes{"name": "db1", "serve": []string{"db"}}, life[whose == "the outlet's credential"])
				ours := member(t, authority, identity.Attributes{"name": "bot"}, life[whose == "our credential"])
				trust := identity.NewTrust(authority.ID())
				careless := link.Server{Services: map[channel.Kind]link.Service{channel.Service: {
					Config: channel.Config{Node: new(routing.Node), Self: theirs, Trust: trust, Judge: func(*identity.Peer) error { return nil }},
					Accept: func(_ *link.Live, in *stream.Incoming) {
						c := in.Accept()
						if in.Header.Kind == stream.Probe {
							c.Close()
							return
						}
						go io.Copy(c, c)
					},
				}}}
				in := &inlet.Server{Node: new(routing.Node), Name: "db", Self: ours, Trust: trust, Paths: []inlet.Path{{
					Name: "direct", Dial: func(ctx context.Context) (net.Conn, error) { return s.net.Dial(ctx, "mem", "10.0.0.2:1") },
				}}}
				ctx, cancel := context.WithCancel(t.Context())
				var all sync.WaitGroup
				lanes, local := s.listen("10.0.0.2:1"), s.listen("10.0.0.3:1")
				all.Go(func() { careless.Serve(ctx, lanes) })
				all.Go(func() { in.Run(ctx) })
				all.Go(func() { in.Serve(ctx, local) })

				c, err := s.net.Dial(t.Context(), "mem", "10.0.0.3:1")
				if err != nil {
					t.Fatal(err)
				}
				s.echoes(c)
				begin := time.Now()
				s.isReset(c)
				if d := time.Since(begin); d < 58*time.Second || d > 62*time.Second {
					t.Errorf("reset %v after the beginning; the credential ended after a minute", d)
				}
				cancel()
				all.Wait()
			})
		})
	}
}

func renew(s *street, self *identity.Self, attrs identity.Attributes, life time.Duration) {
	s.Helper()
	issue(s, s.authority, self, attrs, life)
}

func TestAnOutletThatMayNoLongerServeTheNameLosesItsStreams(t *testing.T) {
	virtual(t, "agent", nil, func(s *street) {
		c := s.connect()
		time.Sleep(time.Minute)
		renew(s, s.outlet.Self, identity.Attributes{"name": "db1", "serve": []string{"db"}}, 2*time.Hour)
		synctest.Wait()
		s.echoes(c) // renewed with its right: nothing happens
		time.Sleep(time.Minute)
		renew(s, s.outlet.Self, identity.Attributes{"name": "db1", "serve": []string{"other"}}, 3*time.Hour)
		begin := time.Now()
		s.isReset(c)
		if d := time.Since(begin); d > 2*time.Second {
			t.Errorf("reset after %v", d)
		}
		s.await(t, link.Refused)
	})
}

func TestRequireNarrowsWhoMayServeTheName(t *testing.T) {
	require := func(name string) func(*outlet.Server, *inlet.Server) {
		return func(_ *outlet.Server, in *inlet.Server) {
			p, err := abac.Short("serve", "db", `principal has name && principal.name == "`+name+`"`)
			if err != nil {
				t.Fatal(err)
			}
			in.Require = p
		}
	}
	t.Run("met", func(t *testing.T) {
		virtual(t, "agent", require("db1"), func(s *street) {
			c := s.connect()
			renew(s, s.outlet.Self, identity.Attributes{"name": "db2", "serve": []string{"db"}}, 3*time.Hour)
			begin := time.Now()
			s.isReset(c)
			if d := time.Since(begin); d > 2*time.Second {
				t.Errorf("reset %v after it is met no more", d)
			}
			s.await(t, link.Refused)
		})
	})
	t.Run("not met", func(t *testing.T) {
		virtual(t, "agent", require("db2"), func(s *street) {
			s.await(t, link.Refused)
			c, err := s.net.Dial(s.Context(), "mem", s.addr)
			if err != nil {
				t.Fatal(err)
			}
			s.isReset(c)
		})
	})
}

func TestAReplacedRequireIsInForceAtOnce(t *testing.T) {
	require := func(name string) *abac.Policy {
		p, err := abac.Short("serve", "db", `principal has name && principal.name == "`+name+`"`)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	virtual(t, "agent", func(_ *outlet.Server, in *inlet.Server) { in.Require = require("db1") }, func(s *street) {
		c := s.connect()
		time.Sleep(time.Minute)
		s.inlet.SetRequire(nil)
		synctest.Wait()
		s.echoes(c) // it may still: nothing happens
		begin := time.Now()
		s.inlet.SetRequire(require("db2"))
		s.isReset(c)
		if d := time.Since(begin); d != 0 {
			t.Errorf("reset %v after the outlet was no longer wanted", d)
		}
		s.await(t, link.Refused)
		if _, err := s.inlet.Dial(s.Context()); err == nil {
			t.Error("a stream was opened")
		}
		synctest.Wait()
		begin = time.Now()
		s.inlet.SetRequire(require("db1"))
		s.await(t, link.Ready)
		if d := time.Since(begin); d != 0 {
			t.Errorf("there again %v after the outlet was wanted again", d)
		}
		s.connect().Close()
	})
}

func TestAReplacedRequireIsInForceForStreamsThatOnlyFinish(t *testing.T) {
	p, err := abac.Short("serve", "db", `principal has name && principal.name == "db2"`)
	if err != nil {
		t.Fatal(err)
	}
	virtual(t, "agent", nil, func(s *street) {
		c := s.connect()
		go s.outlet.Drain(s.Context()) // its channel takes nothing new
		s.await(t, link.Waiting)
		s.echoes(c)
		begin := time.Now()
		s.inlet.SetRequire(p)
		s.isReset(c)
		if d := time.Since(begin); d != 0 {
			t.Errorf("reset %v after the outlet was no longer wanted", d)
		}
	})
}

func TestAnOutletThatIsRefusedNeverSeesOurCredential(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s street
		s.TB = t
		authority, err := identity.NewSelf()
		if err != nil {
			t.Fatal(err)
		}
		in := &inlet.Server{
			Node: new(routing.Node), Name: "db", Self: member(t, authority, identity.Attributes{"name": "bot", "role": "agent"}, time.Hour),
			Trust: identity.NewTrust(authority.ID()),
		}
		lanes := s.listen("10.0.0.2:1")
		in.Paths = []inlet.Path{{Name: "direct", Dial: func(ctx context.Context) (net.Conn, error) { return s.net.Dial(ctx, "mem", "10.0.0.2:1") }}}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- in.Run(ctx) }()

		lane, err := lanes.Accept()
		if err != nil {
			t.Fatal(err)
		}
		asked := false
		_, err = channel.Respond(ctx, lane, &channel.Config{
			Node: new(routing.Node), Self: member(t, authority, identity.Attributes{"name": "rogue", "serve": []string{"other"}}, time.Hour),
			Trust: identity.NewTrust(authority.ID()), Kind: channel.Service,
			Judge: func(p *identity.Peer) error { asked = true; return nil },
		})
		var closed *channel.Closed
		if !errors.As(err, &closed) || closed.Code != channel.CloseRefused || asked {
			t.Errorf("the rogue outlet got %v, and a peer to judge: %v; want a refusal in place of a credential", err, asked)
		}
		if err != nil && strings.Contains(err.Error(), "agent") {
			t.Errorf("the refusal %q tells a value", err)
		}
		cancel()
		<-done
		lanes.Close()
	})
}

func TestDrainWaitsForConnectionsAndResetsThoseThatAreLeft(t *testing.T) {
	virtual(t, "agent", nil, func(s *street) {
		ends, stays := s.connect(), s.connect()
		time.AfterFunc(10*time.Second, func() { ends.Close() })
		ctx, cancel := context.WithTimeout(s.Context(), 25*time.Second)
		defer cancel()
		begin := time.Now()
		left := s.inlet.Drain(ctx)
		if d := time.Since(begin); left != 1 || d != 25*time.Second {
			t.Errorf("%d were left after %v", left, d)
		}
		s.isReset(stays)
		if _, err := s.net.Dial(s.Context(), "mem", s.addr); err == nil {
			t.Error("a new connection was accepted")
		}
		if _, err := s.inlet.Dial(s.Context()); err == nil {
			t.Error("a new stream was opened")
		}
	})
}

// slowListener gives connections that stay in the hands of whoever accepts them.
type slowListener struct {
	net.Listener
	inHand, letGo chan struct{}
}

type slowConn struct {
	net.Conn
	ln *slowListener
}

func (l *slowListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return slowConn{c, l}, nil
}

// SetLinger is the first that happens to an accepted connection.
func (c slowConn) SetLinger(sec int) error {
	if sec == 0 {
		c.ln.inHand <- struct{}{}
		<-c.ln.letGo
	}
	return c.Conn.(*memnet.Conn).SetLinger(sec)
}

func (c slowConn) CloseWrite() error { return c.Conn.(*memnet.Conn).CloseWrite() }

// A client that has connected, written and gone when the drain begins has been accepted, and nothing
// of it has been seen yet.
func TestDrainWaitsForAConnectionThatIsBeingAccepted(t *testing.T) {
	virtual(t, "agent", nil, func(s *street) {
		ln := &slowListener{s.listen("10.0.0.4:1"), make(chan struct{}), make(chan struct{})}
		served := make(chan error, 1)
		go func() { served <- s.inlet.Serve(s.Context(), ln) }()
		c, err := s.net.Dial(s.Context(), "mem", "10.0.0.4:1")
		if err != nil {
			t.Fatal(err)
		}
		<-ln.inHand
		drained := make(chan int, 1)
		go func() { drained <- s.inlet.Drain(s.Context()) }()
		synctest.Wait()
		select {
		case <-drained:
			t.Error("it is drained with a connection in hand")
		default:
		}
		close(ln.letGo)
		s.echoes(c)
		c.Close()
		if left := <-drained; left != 0 {
			t.Errorf("%d were left", left)
		}
		<-served
	})
}

func TestDrainReturnsAsSoonAsTheLastConnectionEnds(t *testing.T) {
	virtual(t, "agent", nil, func(s *street) {
		c := s.connect()
		time.AfterFunc(10*time.Second, func() { c.Close() })
		begin := time.Now()
		left := s.inlet.Drain(s.Context())
		if d := time.Since(begin); left != 0 || d != 10*time.Second {
			t.Errorf("%d were left after %v", left, d)
		}
	})
}

func TestConnectionsBeyondTheLimitWaitForAPlace(t *testing.T) {
	virtual(t, "agent", func(_ *outlet.Server, in *inlet.Server) { in.MaxStreams = 2 }, func(s *street) {
		first, second := s.connect(), s.connect()
		third, err := s.net.Dial(s.Context(), "mem", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		third.Write([]byte("hello"))
		synctest.Wait()
		if n := s.inlet.Streams(); n != 2 {
			t.Errorf("%d connections are served, want 2", n)
		}
		time.AfterFunc(time.Minute, func() { first.Close() })
		begin := time.Now()
		if n, err := third.Read(make([]byte, 5)); n != 5 || err != nil || time.Since(begin) != time.Minute {
			t.Errorf("the third was served after %v: %d bytes, %v", time.Since(begin), n, err)
		}
		s.echoes(second)
		second.Close()
		third.Close()
	})
}
