package relay_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/relay"
)

var carriers = []relay.Carrier{relay.DialBack, relay.Yamux}

func by(carrier relay.Carrier) func(*relay.Client) {
	return func(c *relay.Client) { c.Carrier = carrier }
}

func TestAStreamComesOutBehindTheRelay(t *testing.T) {
	for _, carrier := range carriers {
		t.Run(carrier.String(), func(t *testing.T) {
			with(t, carrier, func(w *town) {
				s, _ := w.relay(nil)
				w.outlet("db", w.member(serves("db")), echoing, by(carrier))
				bot := w.member(agent)
				in := w.inlet("db", bot, w.client(bot, nil))
				for range 3 {
					c := w.dial(in)
					w.echoes(c)
					c.Close()
				}
				if n := s.Lanes(); n != 1 {
					t.Errorf("%d lanes for one channel of three streams", n)
				}
			})
		})
	}
}

func TestAnyNumberOfStreamsIsNothingToTheRelay(t *testing.T) {
	in(t, func(w *town) {
		s, _ := w.relay(nil)
		w.outlet("db", w.member(serves("db")), echoing, nil)
		bot := w.member(agent)
		in := w.inlet("db", bot, w.client(bot, nil))
		w.dial(in).Close()
		synctest.Wait()
		lanes, actors := s.Lanes(), s.Node.Len()
		var conns []net.Conn
		for range 50 {
			conns = append(conns, w.dial(in))
		}
		if s.Lanes() != lanes || s.Node.Len() != actors {
			t.Errorf("with 50 streams %d lanes and %d actors, before %d and %d", s.Lanes(), s.Node.Len(), lanes, actors)
		}
		for _, c := range conns {
			c.Close()
		}
	})
}

// lane asks for a lane for at most 5 s.
func (w *town) lane(c *relay.Client, name string, want identity.ID) error {
	w.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	l, err := c.Lane(ctx, name, want)
	if err == nil {
		stream.Abort(l)
	}
	return err
}

func TestOnlyWhoseCredentialSaysSoServesAName(t *testing.T) {
	in(t, func(w *town) {
		w.relay(nil)
		for _, c := range []struct {
			name string
			self *identity.Self
			ok   bool
		}{
			{"db", w.member(serves("db")), true},
			{"a/b/c", w.member(serves("a/*")), true},
			{"a", w.member(serves("a/*")), false},
			{"db", w.member(serves("other")), false},
			{"db", w.member(agent), false},
			{"db", w.stranger(), false},
			{relay.AuthorityName, w.member(serves("db")), false},
			{relay.AuthorityName, w.stranger(), false},
			{relay.AuthorityName, w.authority, true},
		} {
			var states []link.StateKind
			client := &relay.Client{Addr: relayAddr, Dial: w.net.Dial, Node: w.node(), Self: c.self, Trust: w.trust()}
			client.Listen(c.name, func(s link.State) { states = append(states, s.Kind) })
			stop := w.run(client.Run)
			w.sleep(time.Second)
			want := link.Refused
			if c.ok {
				want = link.Ready
			}
			if !slices.Equal(states, []link.StateKind{want}) {
				t.Errorf("%s as %v: %v, want %v", c.name, c.self.Credential(), states, want)
			}
			stop()
		}
	})
}

func TestPoliciesNarrowWhoServesAndWhoConnects(t *testing.T) {
	in(t, func(w *town) {
		short := func(action, expr string) *abac.Policy {
			p, err := abac.ShortAny(action, expr)
			if err != nil {
				t.Fatal(err)
			}
			return p
		}
		s, _ := w.relay(func(s *relay.Server) {
			s.AllowServe = short("serve", `principal has region && principal.region == "eu"`)
			s.AllowConnect = short("connect", `principal has role && principal.role == "agent"`)
		})
		var states []link.StateKind
		us := &relay.Client{Addr: relayAddr, Dial: w.net.Dial, Node: w.node(), Self: w.member(serves("db")), Trust: w.trust()}
		us.Listen("db", func(s link.State) { states = append(states, s.Kind) })
		stop := w.run(us.Run)
		w.sleep(time.Second)
		if !slices.Equal(states, []link.StateKind{link.Refused}) {
			t.Errorf("an outlet without the region: %v", states)
		}
		stop()
		w.outlet("db", w.member(identity.Attributes{"serve": []string{"db"}, "region": "eu"}), echoing, nil)

		guest := w.client(w.member(identity.Attributes{"role": "guest"}), nil)
		begin := time.Now()
		known, unknown := w.lane(guest, "db", identity.ID{}), w.lane(guest, "nothing", identity.ID{})
		if code(known) != stream.CodeRefused || code(unknown) != stream.CodeRefused || time.Since(begin) != 0 {
			t.Errorf("a guest: %v and %v, after %v", known, unknown, time.Since(begin))
		}
		bot := w.member(agent)
		in := w.inlet("db", bot, w.client(bot, nil))
		c := w.dial(in)
		s.SetPolicies(nil, short("connect", "false"), nil)
		w.isReset(c)
	})
}

func TestANameThatNobodyServesIsAbsentAfterTwoSecondsAndNoRefusal(t *testing.T) {
	in(t, func(w *town) {
		w.relay(nil)
		bot := w.client(w.member(agent), nil)
		w.sleep(time.Second)
		begin := time.Now()
		if err := w.lane(bot, "db", identity.ID{}); code(err) != stream.CodeAbsent || time.Since(begin) != 2*time.Second {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		// One that comes back in time is waited for.
		got := make(chan error, 1)
		go func() { got <- w.lane(bot, "db", identity.ID{}) }()
		w.sleep(time.Second)
		w.outlet("db", w.member(serves("db")), echoing, nil)
		begin = time.Now()
		if err := <-got; err != nil || time.Since(begin) > 100*time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
	})
}

func TestAPoolGoesOnWithoutOneOfItsOutlets(t *testing.T) {
	for _, carrier := range carriers {
		t.Run(carrier.String(), func(t *testing.T) {
			with(t, carrier, func(w *town) {
				w.relay(nil)
				_, stopA := w.outlet("db", w.member(serves("db")), echoing, by(carrier))
				b, _ := w.outlet("db", w.member(serves("db")), echoing, by(carrier))
				bot := w.member(agent)
				client := w.client(bot, nil)
				seen := make(map[identity.ID]bool)
				for range 20 {
					in := &inlet.Server{Node: w.node(), Name: "db", Self: bot, Trust: w.trust(), Paths: []inlet.Path{{Name: "via", Dial: func(ctx context.Context) (net.Conn, error) {
						return client.Lane(ctx, "db", identity.ID{})
					}}}}
					stop := w.run(in.Run)
					w.dial(in).Close()
					seen[in.State().Peer.ID()] = true
					stop()
				}
				if len(seen) != 2 {
					t.Errorf("20 channels came to %d of two outlets", len(seen))
				}
				stopA()
				in := w.inlet("db", bot, client)
				w.dial(in).Close()
				if in.State().Peer.ID() != b.Self.ID() {
					t.Error("the one that is left is not the one that answers")
				}
			})
		})
	}
}

func TestAPinnedPeerIsFoundInItsPool(t *testing.T) {
	in(t, func(w *town) {
		w.relay(nil)
		for range 4 {
			w.outlet("db", w.member(serves("db")), echoing, nil)
		}
		wanted := w.member(serves("db"))
		w.outlet("db", wanted, echoing, nil)
		bot := w.member(agent)
		in := &inlet.Server{Node: w.node(), Name: "db", Self: bot, Trust: w.trust(), Pin: wanted.ID()}
		client := w.client(bot, nil)
		in.Paths = []inlet.Path{{Name: "via", Dial: func(ctx context.Context) (net.Conn, error) { return client.Lane(ctx, "db", in.Pin) }}}
		w.run(in.Run)
		w.dial(in).Close()
		if got := in.State().Peer.ID(); got != wanted.ID() {
			t.Errorf("reached %v", got)
		}
		if err := w.lane(client, "db", w.member(serves("db")).ID()); code(err) != stream.CodeAbsent {
			t.Errorf("one that is not here: %v", err)
		}
	})
}

func TestMembersOfAnotherAuthorityMeetUnderNamesOfTheirOwn(t *testing.T) {
	in(t, func(w *town) {
		other, err := identity.NewSelf()
		if err != nil {
			t.Fatal(err)
		}
		w.relay(func(s *relay.Server) { s.Trust = identity.NewTrust(w.authority.ID(), other.ID()) })
		w.outlet("db", w.member(serves("db")), echoing, nil)
		foreign := w.stranger()
		now := time.Now()
		cred, err := other.Issue(foreign.ID(), foreign.Latest(), agent, now, now.Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		if err := foreign.Renew(cred, other.History()); err != nil {
			t.Fatal(err)
		}
		client := w.client(foreign, nil)
		if err := w.lane(client, "db", identity.ID{}); code(err) != stream.CodeAbsent {
			t.Errorf("a member of another authority: %v", err)
		}
		if names, err := client.Names(context.Background()); len(names) != 0 || err != nil {
			t.Errorf("it is told of %v, %v", names, err)
		}
		if names, err := w.client(w.member(agent), nil).Names(context.Background()); !slices.Equal(names, []string{"db"}) || err != nil {
			t.Errorf("a member is told of %v, %v", names, err)
		}
	})
}

func TestWithoutACredentialOnlyAnAuthorityIsReached(t *testing.T) {
	in(t, func(w *town) {
		w.relay(nil)
		w.outlet("db", w.member(serves("db")), echoing, nil)
		at := &relay.Client{Addr: relayAddr, Dial: w.net.Dial, Node: w.node(), Self: w.authority, Trust: w.trust()}
		ln := at.Listen(relay.AuthorityName, nil)
		w.run(at.Run)
		synctest.Wait()
		stranger := w.client(w.stranger(), nil)
		if err := w.lane(stranger, "db", identity.ID{}); code(err) != stream.CodeRefused {
			t.Errorf("a name: %v", err)
		}
		if err := w.lane(stranger, relay.AuthorityName, identity.ID{}); code(err) != stream.CodeRefused {
			t.Errorf("an authority without its identifier: %v", err)
		}
		if err := w.lane(stranger, relay.AuthorityName, w.stranger().ID()); code(err) != stream.CodeRefused {
			t.Errorf("an authority that the relay does not trust: %v", err)
		}
		if _, err := stranger.Names(context.Background()); code(err) != stream.CodeRefused {
			t.Errorf("names: %v", err)
		}
		got := make(chan net.Conn, 1)
		go func() {
			c, err := ln.Accept()
			if err != nil {
				t.Error(err)
			}
			got <- c
		}()
		lane, err := stranger.Lane(context.Background(), relay.AuthorityName, w.authority.ID())
		if err != nil {
			t.Fatal(err)
		}
		far := <-got
		if lane.(*channel.Lane).Key != far.(*channel.Lane).Key || lane.(*channel.Lane).Key == [32]byte{} {
			t.Error("the two ends do not have one key")
		}
		begin := time.Now()
		w.isReset(far) // an identity that need not be anybody does not stay
		if d := time.Since(begin); d != time.Minute {
			t.Errorf("the lane lasted %v", d)
		}
		stream.Abort(lane)
		stream.Abort(far)
	})
}

func TestAnAuthorityOfTheRelaysProcessTakesItsLanes(t *testing.T) {
	in(t, func(w *town) {
		took := make(chan *channel.Lane, 1)
		w.relay(func(s *relay.Server) {
			s.Local = map[identity.ID]func(context.Context, net.Conn){w.authority.ID(): func(_ context.Context, c net.Conn) {
				took <- c.(*channel.Lane)
				c.Close()
			}}
		})
		lane, err := w.client(w.stranger(), nil).Lane(context.Background(), relay.AuthorityName, w.authority.ID())
		if err != nil {
			t.Fatal(err)
		}
		if l := <-took; l.Key != lane.(*channel.Lane).Key {
			t.Error("the two ends do not have one key")
		}
		stream.Abort(lane)
	})
}

// Whoever asks an authority need not be anybody: such lanes count, end, and are waited for like others.
func TestALaneToAnAuthorityOfTheRelaysProcessCountsUntilItIsOver(t *testing.T) {
	in(t, func(w *town) {
		took := make(chan net.Conn, 2)
		s, _ := w.relay(func(s *relay.Server) {
			s.Local = map[identity.ID]func(context.Context, net.Conn){w.authority.ID(): func(_ context.Context, c net.Conn) { took <- c }}
		})
		client := w.client(w.stranger(), nil)
		ask := func() (near, far net.Conn) {
			near, err := client.Lane(context.Background(), relay.AuthorityName, w.authority.ID())
			if err != nil {
				t.Fatal(err)
			}
			return near, <-took
		}
		near, far := ask()
		synctest.Wait()
		if n := s.Lanes(); n != 1 {
			t.Errorf("%d lanes while the authority has one", n)
		}
		begin := time.Now()
		near.SetReadDeadline(begin.Add(2 * time.Minute))
		w.isReset(near)
		if d := time.Since(begin); d != time.Minute {
			t.Errorf("the lane lasted %v", d)
		}
		if _, err := far.Write(make([]byte, 1)); err == nil {
			t.Error("the authority writes to it")
		}
		synctest.Wait()
		if n := s.Lanes(); n != 0 {
			t.Errorf("%d lanes behind it", n)
		}
		near, far = ask()
		left := make(chan int)
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			left <- s.Drain(ctx)
		}()
		w.sleep(time.Second)
		select {
		case n := <-left:
			t.Fatalf("the relay leaves %d lanes and goes", n)
		default:
		}
		far.Close()
		if n := <-left; n != 0 {
			t.Errorf("%d lanes are left", n)
		}
		stream.Abort(near)
	})
}

func TestEveryDrainReturnsWhenTheLastLaneIsOver(t *testing.T) {
	in(t, func(w *town) {
		s, _ := w.relay(nil)
		_, ends := lanePair(w, w.member(agent), w.member(serves("db")), relay.DialBack)
		left := make(chan int)
		for range 2 {
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				left <- s.Drain(ctx)
			}()
			w.sleep(time.Second)
		}
		for _, c := range ends {
			stream.Abort(c)
		}
		w.sleep(time.Second)
		for range 2 {
			select {
			case n := <-left:
				if n != 0 {
					t.Errorf("%d lanes are left", n)
				}
			default:
				t.Error("one waits for what is over")
			}
		}
	})
}

func TestARelayMustProveThatItIsOne(t *testing.T) {
	for name, c := range map[string]struct {
		self func(w *town) *identity.Self
		pin  func(*relay.Server) identity.ID
		ok   bool
	}{
		"by its credential":     {func(w *town) *identity.Self { return w.member(identity.Attributes{"relay": true}) }, nil, true},
		"a member that is none": {func(w *town) *identity.Self { return w.member(serves("db")) }, nil, false},
		"a stranger":            {func(w *town) *identity.Self { return w.stranger() }, nil, false},
		"a pinned stranger":     {func(w *town) *identity.Self { return w.stranger() }, func(s *relay.Server) identity.ID { return s.Self.ID() }, true},
		"another than the pinned": {func(w *town) *identity.Self { return w.member(identity.Attributes{"relay": true}) },
			func(*relay.Server) identity.ID { return identity.ID{1} }, false},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(w *town) {
				s, _ := w.relay(func(s *relay.Server) { s.Self = c.self(w) })
				seen := false
				client := w.client(w.member(agent), func(cl *relay.Client) {
					if c.pin != nil {
						cl.ID = c.pin(s)
					}
					cl.OnState = func(s link.State) { seen = s.Kind == link.Ready }
				})
				w.sleep(time.Second)
				if seen != c.ok {
					t.Errorf("ready: %v; %v", seen, client.State().Reason)
				}
			})
		})
	}
}

func TestARelayIsLeftWithTheCredentialThatMadeItOne(t *testing.T) {
	isRelay := identity.Attributes{"relay": true}
	for name, c := range map[string]struct {
		renew identity.Attributes // after half a minute of one; nil: not
		pin   bool
		stays bool
	}{
		"it expires":             {nil, false, false},
		"it expires, pinned":     {nil, true, true},
		"it is renewed":          {isRelay, false, true},
		"the next is no relay's": {agent, false, false},
		"no relay's, but pinned": {agent, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(w *town) {
				self := w.stranger()
				w.issue(self, isRelay, time.Minute)
				w.relay(func(s *relay.Server) { s.Self = self })
				client := w.client(w.member(agent), func(cl *relay.Client) {
					if c.pin {
						cl.ID = self.ID()
					}
				})
				w.sleep(30 * time.Second)
				if client.State().Kind != link.Ready {
					t.Fatalf("at first %v", client.State().Kind)
				}
				if c.renew != nil {
					w.issue(self, c.renew, time.Hour)
				}
				w.sleep(32 * time.Second)
				if stays := client.State().Kind == link.Ready; stays != c.stays {
					t.Errorf("it is %v: %s", client.State().Kind, client.State().Reason)
				}
				if err := w.lane(client, "db", identity.ID{}); (code(err) == stream.CodeAbsent) != c.stays {
					t.Errorf("asked for a lane: %v", err)
				}
			})
		})
	}
}

func TestWhatStandsOnACredentialEndsWithIt(t *testing.T) {
	for _, whose := range []string{"the caller's", "the outlet's"} {
		for _, carrier := range carriers {
			t.Run(whose+" by "+carrier.String(), func(t *testing.T) {
				with(t, carrier, func(w *town) {
					s, _ := w.relay(nil)
					bot, db := w.stranger(), w.stranger()
					short := 3 * time.Second
					life := map[bool]time.Duration{true: short, false: time.Hour}
					began := time.Now().Truncate(time.Millisecond) // as credentials count
					w.issue(bot, agent, life[whose == "the caller's"])
					w.issue(db, serves("db"), life[whose == "the outlet's"])
					_, ends := lanePair(w, bot, db, carrier)
					w.isReset(ends[0])
					if n, err := ends[1].Read(make([]byte, 1)); n != 0 || err == nil {
						t.Errorf("the outlet's end reads %d bytes, %v", n, err)
					}
					for _, c := range ends {
						stream.Abort(c)
					}
					if d := time.Since(began); d < short || w.virtual && d > short+2*time.Second {
						t.Errorf("the lane ended after %v", d)
					}
					w.until("no lane is left", func() bool { return s.Lanes() == 0 })
				})
			})
		}
	}
}

// lanePair is one joined lane, without a channel over it.
func lanePair(w *town, bot, db *identity.Self, carrier relay.Carrier) (clients [2]*relay.Client, ends [2]net.Conn) {
	w.Helper()
	clients[1] = &relay.Client{Addr: relayAddr, Dial: w.net.Dial, Node: w.node(), Self: db, Trust: w.trust(), Carrier: carrier}
	ln := clients[1].Listen("db", nil)
	w.run(clients[1].Run)
	clients[0] = w.client(bot, nil)
	got := make(chan net.Conn, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			w.Error(err)
		}
		got <- c
	}()
	var err error
	if ends[0], err = clients[0].Lane(context.Background(), "db", identity.ID{}); err != nil {
		w.Fatal(err)
	}
	ends[1] = <-got
	// Bytes go both ways: it is joined.
	for i := range ends {
		if _, err := ends[i].Write([]byte("hello")); err != nil {
			w.Fatal(err)
		}
		b := make([]byte, 5)
		if _, err := io.ReadFull(ends[1-i], b); err != nil || string(b) != "hello" {
			w.Fatalf("%q, %v", b, err)
		}
	}
	return clients, ends
}

func TestALaneOutlivesItsControlChannelsAndIsCarriedOnByLaterOnes(t *testing.T) {
	in(t, func(w *town) {
		w.relay(nil)
		bot, db := w.stranger(), w.stranger()
		w.issue(bot, agent, time.Minute)
		w.issue(db, serves("db"), time.Hour)
		_, ends := lanePair(w, bot, db, relay.DialBack)
		// Both control channels are cut; they come back, and the caller's later one
		// shows a newer credential.
		for _, c := range w.controls() {
			c.Cut()
		}
		w.sleep(10 * time.Second)
		w.issue(bot, agent, time.Hour)
		w.sleep(2 * time.Minute)
		w.passes(ends)
		for _, c := range ends {
			stream.Abort(c)
		}
	})
}

// controls are the connections that were dialled first, by each client.
func (w *town) controls() []*memnet.Conn {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.dialled[:2])
}

func (w *town) passes(ends [2]net.Conn) {
	w.Helper()
	if _, err := ends[0].Write([]byte("x")); err != nil {
		w.Fatal(err)
	}
	if n, err := ends[1].Read(make([]byte, 1)); n != 1 || err != nil {
		w.Fatalf("%d bytes, %v", n, err)
	}
}

func TestARegistrationIsGoneAtOnceAndAfterTwentyFiveSecondsOfSilence(t *testing.T) {
	for name, c := range map[string]struct {
		harm func(*memnet.Conn)
		gone time.Duration
	}{
		"cut":     {func(c *memnet.Conn) { c.Cut() }, 0},
		"stalled": {func(c *memnet.Conn) { c.Stall() }, 25 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(w *town) {
				w.relay(nil)
				db := &relay.Client{Addr: relayAddr, Node: w.node(), Self: w.member(serves("db")), Trust: w.trust()}
				down := false
				db.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
					if down {
						return nil, errors.New("down")
					}
					return w.net.Dial(ctx, network, addr)
				}
				db.Listen("db", nil)
				w.run(db.Run)
				w.sleep(time.Second) // so that it is the first who dialled
				bot := w.client(w.member(agent), nil)
				w.sleep(time.Second)
				down = true
				c.harm(w.controls()[0])
				w.sleep(c.gone + 5*time.Second)
				names, err := bot.Names(context.Background())
				if len(names) != 0 || err != nil {
					t.Errorf("there are %v, %v", names, err)
				}
			})
		})
	}
}

func TestLanesLiveOnWhenTheNameIsGivenBack(t *testing.T) {
	for _, carrier := range carriers {
		t.Run(carrier.String(), func(t *testing.T) {
			with(t, carrier, func(w *town) {
				s, _ := w.relay(nil)
				db := &relay.Client{Addr: relayAddr, Dial: w.net.Dial, Node: w.node(), Self: w.member(serves("db")), Trust: w.trust(), Carrier: carrier}
				ln := db.Listen("db", nil)
				w.run(db.Run)
				got := make(chan net.Conn, 1)
				go func() {
					c, _ := ln.Accept()
					got <- c
				}()
				near, err := w.client(w.member(agent), nil).Lane(context.Background(), "db", identity.ID{})
				if err != nil {
					t.Fatal(err)
				}
				ends := [2]net.Conn{near, <-got}
				w.passes(ends)
				ln.Close()
				w.until("the name is gone", func() bool { return s.Registrations("db") == 0 })
				w.passes(ends)
				for _, c := range ends {
					stream.Abort(c)
				}
				w.until("no lane is left", func() bool { return s.Lanes() == 0 })
			})
		})
	}
}

// heard is a connection that remembers how its reading ended.
type heard struct {
	*memnet.Conn
	end chan error
}

func (c *heard) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		select {
		case c.end <- err:
		default:
		}
	}
	return n, err
}

func TestACarrierThatIsLeftEmptyEndsInGoodOrder(t *testing.T) {
	for _, lanes := range []int{0, 1} {
		t.Run(fmt.Sprintf("behind %d", lanes), func(t *testing.T) {
			with(t, relay.Yamux, func(w *town) {
				s, _ := w.relay(nil)
				db := &relay.Client{Addr: relayAddr, Node: w.node(), Self: w.member(serves("db")), Trust: w.trust(), Carrier: relay.Yamux}
				dialled := make(chan *heard, 2) // the control channel's, the carrier's
				db.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
					c, err := w.net.Dial(ctx, network, addr)
					if err != nil {
						return nil, err
					}
					h := &heard{c.(*memnet.Conn), make(chan error, 1)}
					dialled <- h
					return h, nil
				}
				ln := db.Listen("db", nil)
				w.run(db.Run)
				w.until("the name is there", func() bool { return s.Registrations("db") == 1 })
				var ends []net.Conn
				if lanes > 0 {
					near, err := w.client(w.member(agent), nil).Lane(context.Background(), "db", identity.ID{})
					if err != nil {
						t.Fatal(err)
					}
					far, err := ln.Accept()
					if err != nil {
						t.Fatal(err)
					}
					ends = []net.Conn{near, far}
					w.passes([2]net.Conn{near, far})
				}
				ln.Close()
				w.until("the name is gone", func() bool { return s.Registrations("db") == 0 })
				if lanes > 0 {
					near, far := ends[0], ends[1]
					last := make([]byte, 100_000)
					go func() {
						near.Write(last)
						closeWrite(near)
					}()
					if b, err := io.ReadAll(far); len(b) != len(last) || err != nil {
						t.Errorf("%d bytes, %v", len(b), err)
					}
					closeWrite(far)
					if _, err := io.ReadAll(near); err != nil {
						t.Error(err)
					}
				}
				<-dialled
				if err := <-(<-dialled).end; err != io.EOF {
					t.Errorf("the carrier ended with %v", err)
				}
				for _, c := range ends {
					stream.Abort(c)
				}
			})
		})
	}
}

func TestACarrierWithStreamsThatWereNotOfferedEnds(t *testing.T) {
	with(t, relay.Yamux, func(w *town) {
		w.relay(nil)
		p := w.puppet(w.member(serves("db")))
		c, id := p.carrying("db")
		session := w.carries(w.show(channel.Carrier, id))
		if y, err := session.OpenStream(); err == nil {
			y.Write(make([]byte, 1000))
		}
		select {
		case <-session.CloseChan():
		case <-time.After(10 * time.Second):
			t.Error("it goes on")
		}
		session.Close()
		c.Reset(stream.CodeLocal, "")
	})
}

// What is over at the relay stays for a while in yamux, with all that came of it, when the outlet does
// not end it.
func TestACarrierWhoseLanesAreNotEndedIsOfferedNoMore(t *testing.T) {
	with(t, relay.Yamux, func(w *town) {
		w.relay(nil)
		out, at := w.puppet(w.member(serves("db"))), []*puppet{w.puppet(w.member(agent)), w.puppet(w.member(agent))}
		offers, id := out.carrying("db")
		session := w.carries(w.show(channel.Carrier, id))
		offered := make(chan [16]byte)
		go func() {
			defer close(offered)
			b := make([]byte, 49)
			for {
				if _, err := io.ReadFull(offers, b); err != nil {
					return
				}
				offered <- [16]byte(b[1:])
			}
		}()
		var fars []*yamux.Stream
		// lane is false when the relay gives the caller up in place of offering.
		lane := func(at *puppet) bool {
			near, over := w.show(channel.KindLane, at.offered()), make(chan error, 1)
			go func() {
				_, err := near.Read(make([]byte, 1))
				over <- err
			}()
			select {
			case id := <-offered:
				far, err := session.OpenStream()
				if err != nil {
					t.Fatal(err)
				}
				far.Write(channel.Preface{Kind: channel.KindLane, ID: id}.Append([]byte(nil)))
				stream.Abort(near)
				<-over
				io.Copy(io.Discard, far) // until the relay has ended its side
				fars = append(fars, far)
				return true
			case <-over:
				return false
			}
		}
		begin := time.Now()
		for len(fars) < 200 && lane(at[len(fars)/100]) {
		}
		if n := len(fars); n != 128 && time.Since(begin) < 10*time.Second { // then yamux lets go of the first
			t.Errorf("%d lanes were offered and never ended", len(fars))
		}
		for _, far := range fars {
			far.Close()
		}
		w.until("there is room again", func() bool { return lane(at[1]) })
		offers.Reset(stream.CodeLocal, "")
		<-offered
	})
}

// An outlet that ends, or has no more time, may have begun a lane and not said which.
func TestALaneThatDoesNotSayWhichItIsEndsAlone(t *testing.T) {
	with(t, relay.Yamux, func(w *town) {
		w.relay(nil)
		out, at := w.puppet(w.member(serves("db"))), w.puppet(w.member(agent))
		offers, id := out.carrying("db")
		session := w.carries(w.show(channel.Carrier, id))
		begin := func() (near net.Conn, far *yamux.Stream, id [16]byte) {
			near = w.show(channel.KindLane, at.offered())
			id = w.offer(offers)
			far, err := session.OpenStream()
			if err != nil {
				t.Fatal(err)
			}
			return near, far, id
		}
		near, far, id := begin()
		far.Write(channel.Preface{Kind: channel.KindLane, ID: id}.Append(nil))
		w.passes([2]net.Conn{near, far})
		gone, silent, _ := begin()
		silent.Write([]byte("prtl"))
		silent.Close()
		if _, err := io.ReadAll(silent); err != nil {
			t.Errorf("the one without an id: %v", err)
		}
		w.passes([2]net.Conn{near, far})
		stream.Abort(gone)
		wrong, last, _ := begin()
		last.Write(make([]byte, channel.PrefaceSize))
		<-session.CloseChan()
		stream.Abort(wrong)
		stream.Abort(near)
		offers.Reset(stream.CodeLocal, "")
	})
}

// yamux answers each ping on a goroutine of its own, which stays while nothing can be
// written.
func TestACarrierThatPingsWithoutEndEnds(t *testing.T) {
	with(t, relay.Yamux, func(w *town) {
		w.relay(nil)
		p := w.puppet(w.member(serves("db")))
		c, id := p.carrying("db")
		conn := w.show(channel.Carrier, id) // and it reads nothing
		before := runtime.NumGoroutine()
		pings := bytes.Repeat([]byte{0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0}, 1000)
		most := 0
		var err error
		conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
		for i := 0; i < 50 && err == nil; i++ {
			_, err = conn.Write(pings)
			most = max(most, runtime.NumGoroutine()-before)
		}
		if err == nil || isTimeout(err) {
			t.Errorf("50,000 pings are taken: %v", err)
		}
		if most > 200 {
			t.Errorf("%d goroutines came of them", most)
		}
		stream.Abort(conn)
		c.Reset(stream.CodeLocal, "")
	})
}

func TestALaneInACarrierCarriesWhatLooksLikePings(t *testing.T) {
	with(t, relay.Yamux, func(w *town) {
		w.relay(nil)
		_, ends := lanePair(w, w.member(agent), w.member(serves("db")), relay.Yamux)
		said := bytes.Repeat([]byte{0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0}, 100_000) // 11 bytes: it begins anywhere in a read
		for i := range ends {
			go func() {
				ends[i].Write(said)
				closeWrite(ends[i])
			}()
		}
		for i := range ends {
			if b, err := io.ReadAll(ends[i]); !bytes.Equal(b, said) || err != nil {
				t.Errorf("end %d reads %d bytes, %v", i, len(b), err)
			}
		}
		for _, c := range ends {
			stream.Abort(c)
		}
	})
}

func TestAProcessThatComesBackReplacesItself(t *testing.T) {
	in(t, func(w *town) {
		s, _ := w.relay(nil)
		w.outlet("db", w.member(serves("db")), echoing, nil)
		w.outlet("db", w.member(serves("db")), echoing, nil)
		w.sleep(time.Second)
		// The relay is not told that the connection is gone.
		w.controls()[0].Stall()
		w.controls()[0].Close()
		w.sleep(2 * time.Second)
		if n := s.Registrations("db"); n != 2 {
			t.Errorf("%d registrations of two processes", n)
		}
	})
}

// An identity's keys were rotated while those before are still about, with a credential that lasts for
// minutes. Each is judged by its own, whichever came first.
func TestKeysThatWereRotatedAwayDecideNothingForTheNewOnes(t *testing.T) {
	for _, first := range []int{0, 1} {
		in(t, func(w *town) {
			s, _ := w.relay(nil)
			w.outlet("db", w.member(serves("db")), echoing, nil)
			keys := w.rotated()
			w.issue(keys[0], identity.Attributes{"name": "bot", "serve": []string{"old"}}, 10*time.Minute)
			w.issue(keys[1], identity.Attributes{"name": "bot", "serve": []string{"new"}}, time.Hour)
			var clients [2]*relay.Client
			ask := func(i int) error {
				lane, err := clients[i].Lane(context.Background(), "db", identity.ID{})
				if err == nil {
					stream.Abort(lane)
				}
				return err
			}
			for _, i := range []int{first, 1 - first} {
				clients[i] = w.client(keys[i], nil)
				clients[i].Listen([]string{"old", "new"}[i], nil)
				w.sleep(time.Second)
			}
			for i := range clients {
				if err := ask(i); err != nil {
					t.Errorf("while both last, the %d: %v", i, err)
				}
			}
			if o, n := s.Registrations("old"), s.Registrations("new"); o != 1 || n != 1 {
				t.Errorf("while both last there are %d and %d registrations", o, n)
			}
			w.sleep(15 * time.Minute)
			if err := ask(0); err == nil {
				t.Error("the old keys' credential has ended, and they go on")
			}
			if err := ask(1); err != nil {
				t.Errorf("the new keys: %v", err)
			}
			if o, n := s.Registrations("old"), s.Registrations("new"); o != 0 || n != 1 {
				t.Errorf("then there are %d and %d registrations", o, n)
			}
		})
	}
}
