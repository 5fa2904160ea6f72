package relay_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/relay"
)

// A puppet is a control channel in the hands of a test.
type puppet struct {
	*link.Live
	w *town
}

func (w *town) puppet(self *identity.Self) *puppet {
	w.Helper()
	lane, err := w.net.Dial(context.Background(), "mem", relayAddr)
	if err != nil {
		w.Fatal(err)
	}
	l, err := link.Dial(context.Background(), lane, &channel.Config{
		Node: w.node(), Self: self, Trust: w.trust(), Kind: channel.Relay, Proofless: true,
		Judge: func(*identity.Peer) error { return nil },
	}, nil)
	if err != nil {
		w.Fatal(err)
	}
	w.stops = append(w.stops, func() { l.Close(nil) })
	return &puppet{l, w}
}

// ask opens a stream and gives its answer.
func (p *puppet) ask(h stream.Header) (*stream.Conn, error) {
	p.w.Helper()
	c, err := p.Mux.Open(h)
	if err != nil {
		p.w.Fatal(err)
	}
	return c, c.Wait(context.Background())
}

// offered asks for a lane to db and returns the id in the answer.
func (p *puppet) offered() (id [16]byte) {
	p.w.Helper()
	c, err := p.ask(stream.Header{Kind: stream.Connect, Name: "db"})
	if err != nil {
		p.w.Fatal(err)
	}
	return p.w.offer(c)
}

func (w *town) offer(c io.Reader) (id [16]byte) {
	w.Helper()
	b := make([]byte, 49)
	if _, err := io.ReadFull(c, b); err != nil || b[0] != 1 {
		w.Fatalf("offered %x, %v", b, err)
	}
	copy(id[:], b[1:])
	return id
}

func (w *town) show(kind channel.Kind, id [16]byte) net.Conn {
	w.Helper()
	c, err := w.net.Dial(context.Background(), "mem", relayAddr)
	if err != nil {
		w.Fatal(err)
	}
	if _, err := c.Write(channel.Preface{Kind: kind, ID: id}.Append(nil)); err != nil {
		w.Fatal(err)
	}
	return c
}

// registered is an outlet whose offers the test reads.
func (p *puppet) registered(name string) *stream.Conn {
	p.w.Helper()
	c, err := p.ask(stream.Header{Kind: stream.Register, Name: name, Body: make([]byte, 17)})
	if err != nil {
		p.w.Fatal(err)
	}
	return c
}

// carrying is an outlet with a carrier, which the test is to show the id of.
func (p *puppet) carrying(name string) (offers *stream.Conn, id [16]byte) {
	p.w.Helper()
	c, err := p.ask(stream.Header{Kind: stream.Register, Name: name, Body: append(make([]byte, 16), byte(relay.Yamux))})
	if err != nil {
		p.w.Fatal(err)
	}
	b := make([]byte, 49)
	if _, err := io.ReadFull(c, b); err != nil || b[0] != 2 {
		p.w.Fatalf("offered %x, %v", b, err)
	}
	return c, [16]byte(b[1:17])
}

// carries begins a carrier on a connection that has shown its id.
func (w *town) carries(conn net.Conn) *yamux.Session {
	w.Helper()
	config := yamux.DefaultConfig()
	config.LogOutput = io.Discard
	session, err := yamux.Client(conn, config)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { session.Close() })
	return session
}

func TestALanesIDIsGoodOnceForTenSecondsAndItsControlChannel(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(w *town, p *puppet, id [16]byte)
		kind  channel.Kind
		ok    bool
	}{
		"at once":         {func(*town, *puppet, [16]byte) {}, channel.KindLane, true},
		"in time":         {func(w *town, _ *puppet, _ [16]byte) { w.sleep(9 * time.Second) }, channel.KindLane, true},
		"late":            {func(w *town, _ *puppet, _ [16]byte) { w.sleep(11 * time.Second) }, channel.KindLane, false},
		"as a carrier":    {func(*town, *puppet, [16]byte) {}, channel.Carrier, false},
		"a second time":   {func(w *town, _ *puppet, id [16]byte) { w.show(channel.KindLane, id); synctest.Wait() }, channel.KindLane, false},
		"without asker":   {func(w *town, p *puppet, _ [16]byte) { p.Close(nil); synctest.Wait() }, channel.KindLane, false},
		"by another's":    {func(w *town, p *puppet, id [16]byte) { id[0] ^= 1 }, channel.KindLane, true},
		"after a refusal": {func(w *town, p *puppet, _ [16]byte) { w.s.SetPolicies(nil, never(w, "connect"), nil); synctest.Wait() }, channel.KindLane, false},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(w *town) {
				w.s, _ = w.relay(nil)
				out := w.puppet(w.member(serves("db"))).registered("db")
				p := w.puppet(w.member(agent))
				id := p.offered()
				c.spoil(w, p, id)
				lane := w.show(c.kind, id)
				synctest.Wait()
				lane.SetReadDeadline(time.Now().Add(time.Millisecond))
				_, err := lane.Read(make([]byte, 1))
				if cut := !isTimeout(err); cut == c.ok {
					t.Errorf("reads %v", err)
				}
				stream.Abort(lane)
				out.Reset(stream.CodeLocal, "")
			})
		})
	}
}

func never(w *town, action string) *abac.Policy {
	w.Helper()
	p, err := abac.ShortAny(action, "false")
	if err != nil {
		w.Fatal(err)
	}
	return p
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func TestAnIdentityHasSixteenLanesOutstanding(t *testing.T) {
	in(t, func(w *town) {
		s, _ := w.relay(nil)
		w.puppet(w.member(serves("db"))).registered("db")
		self := w.member(agent)
		p, again := w.puppet(self), w.puppet(self)
		for range 16 {
			p.offered()
		}
		if _, err := again.ask(stream.Header{Kind: stream.Connect, Name: "db"}); code(err) != stream.CodeBusy {
			t.Errorf("the 17th, on another control channel: %v", err)
		}
		w.puppet(w.member(agent)).offered() // somebody else's first
		w.sleep(11 * time.Second)
		if n := s.Lanes(); n != 0 {
			t.Errorf("%d lanes that nobody took", n)
		}
		again.offered()
	})
}

func TestRefusalsTakeNoPlaces(t *testing.T) {
	in(t, func(w *town) {
		s, _ := w.relay(func(s *relay.Server) { s.AllowConnect = never(w, "connect") })
		w.puppet(w.member(serves("db"))).registered("db")
		p := w.puppet(w.member(agent))
		for range 20 {
			if _, err := p.ask(stream.Header{Kind: stream.Connect, Name: "db"}); code(err) != stream.CodeRefused {
				t.Errorf("%v", err)
			}
		}
		s.SetPolicies(nil, nil, nil)
		p.offered()
	})
}

func TestStrangersDoNotTakeTheLanesOfMembers(t *testing.T) {
	in(t, func(w *town) {
		w.relay(func(s *relay.Server) { s.Limits.Lanes = 64 })
		w.puppet(w.authority).registered(relay.AuthorityName)
		w.puppet(w.member(serves("db"))).registered("db")
		id := w.authority.ID()
		busy := 0
		for range 8 {
			stranger := w.puppet(w.stranger())
			for range 8 {
				if _, err := stranger.ask(stream.Header{Kind: stream.Connect, Name: relay.AuthorityName, Body: id[:]}); code(err) == stream.CodeBusy {
					busy++
				}
			}
		}
		if busy != 64-64/8 {
			t.Errorf("%d of 64 strangers' questions were turned away", busy)
		}
		w.puppet(w.member(agent)).offered()
	})
}

// An authority shows no credential. It comes for as many lanes as members ask it for, also when
// strangers crowd the relay; whoever has shown none and asks is a stranger still.
func TestACrowdKeepsNoMemberFromAnAuthorityThatDialsBack(t *testing.T) {
	for name, c := range map[string]struct {
		caller      func(w *town) *identity.Self
		least, most int
	}{
		"a member":   {func(w *town) *identity.Self { return w.member(agent) }, 60, 60},
		"a stranger": {(*town).stranger, 1, 20}, // by chance one in 128 of those beyond
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(w *town) {
				w.relay(func(s *relay.Server) { s.Limits.Link.HalfOpen = 200 })
				at := &relay.Client{Addr: relayAddr, Dial: w.net.From("10.0.0.50"), Node: w.node(), Self: w.authority, Trust: w.trust()}
				ln := at.Listen(relay.AuthorityName, nil)
				w.run(at.Run)
				caller := w.client(c.caller(w), func(c *relay.Client) { c.Dial = w.net.From("10.0.0.51") })
				synctest.Wait()
				for i := range 150 { // silent for 10 s
					conn, err := w.net.From(fmt.Sprintf("10.1.0.%d", 1+i))(context.Background(), "mem", relayAddr)
					if err != nil {
						t.Fatal(err)
					}
					defer stream.Abort(conn)
				}
				synctest.Wait()
				go func() {
					for {
						lane, err := ln.Accept()
						if err != nil {
							return
						}
						io.WriteString(lane, "x")
						stream.Disarm(lane.(*channel.Lane).Conn)
						lane.Close()
					}
				}()
				var reached atomic.Int32
				ask := func() {
					near, err := caller.Lane(context.Background(), relay.AuthorityName, w.authority.ID())
					if err != nil {
						return
					}
					near.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
					if n, _ := near.Read(make([]byte, 1)); n == 1 {
						reached.Add(1)
					}
					stream.Abort(near)
				}
				for range 12 {
					ask()
				}
				for range 4 { // and many at once, of none of which it is known yet what it is for
					var all sync.WaitGroup
					for range 12 {
						all.Go(ask)
					}
					all.Wait()
				}
				if n := int(reached.Load()); n < c.least || n > c.most {
					t.Errorf("the authority was reached %d times of 60", n)
				}
				ln.Close()
			})
		})
	}
}

func TestNamesAreForWhoMayAskForThemNow(t *testing.T) {
	in(t, func(w *town) {
		w.relay(nil)
		w.puppet(w.member(serves("db"))).registered("db")
		self := w.stranger()
		w.issue(self, agent, time.Minute)
		client := w.client(self, nil)
		if names, err := client.Names(context.Background()); len(names) != 1 || err != nil {
			t.Errorf("%v, %v", names, err)
		}
		w.sleep(2 * time.Minute)
		if names, _ := client.Names(context.Background()); len(names) != 0 {
			t.Errorf("after its credential it is told of %v", names)
		}
	})
}

func TestWhoRegistersInALoopIsTurnedAway(t *testing.T) {
	in(t, func(w *town) {
		s, _ := w.relay(nil)
		self := w.member(serves("db"))
		p := w.puppet(self)
		register := func() error {
			c, err := p.ask(stream.Header{Kind: stream.Register, Name: "db", Body: make([]byte, 17)})
			if err == nil {
				c.Close()
			}
			return err
		}
		n := 0
		for ; n < 1000 && register() == nil; n++ {
		}
		if n != 512 {
			t.Errorf("%d registrations at once", n)
		}
		if err := register(); code(err) != stream.CodeBusy {
			t.Errorf("one more: %v", err)
		}
		p.Close(nil)
		p = w.puppet(self)
		if err := register(); code(err) != stream.CodeBusy {
			t.Errorf("one more, come back: %v", err)
		}
		w.sleep(time.Second)
		n = 0
		for ; n < 100 && register() == nil; n++ {
		}
		if n < 31 || n > 33 {
			t.Errorf("%d more after a second", n)
		}
		w.until("none is left", func() bool { return s.Registrations("db") == 0 })
	})
}

// What a member has asked for is remembered for a while, what it has shown is not.
func TestAMemberThatComesBackIsJudgedByWhatItShowsThen(t *testing.T) {
	in(t, func(w *town) {
		w.relay(nil)
		self := w.member(serves("db", "files"))
		p := w.puppet(self)
		for range 64 { // two seconds' worth
			p.registered("files").Close()
		}
		p.Close(nil)
		synctest.Wait()
		w.issue(self, serves("db", "mail"), 2*time.Hour)
		p = w.puppet(self)
		for name, granted := range map[string]bool{"db": true, "mail": true, "files": false} {
			_, err := p.ask(stream.Header{Kind: stream.Register, Name: name, Body: make([]byte, 17)})
			if (err == nil) != granted {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

func TestWhoAsksInALoopIsTurnedAway(t *testing.T) {
	in(t, func(w *town) {
		w.relay(nil)
		p := w.puppet(w.member(agent))
		busy := 0
		for range 200 {
			if _, err := p.ask(stream.Header{Kind: stream.Names}); code(err) == stream.CodeBusy {
				busy++
			}
		}
		if busy < 50 {
			t.Errorf("%d of 200 questions at once were turned away", busy)
		}
		w.sleep(10 * time.Second)
		if _, err := p.ask(stream.Header{Kind: stream.Names}); err != nil {
			t.Errorf("after a while: %v", err)
		}
	})
}

func TestAnOutletThatDoesNotComeIsPassedOverForAnother(t *testing.T) {
	in(t, func(w *town) {
		w.relay(nil)
		for range 2 {
			w.puppet(w.member(serves("db"))).registered("db") // takes offers, and does nothing
		}
		w.outlet("db", w.member(serves("db")), echoing, nil)
		bot := w.member(agent)
		in := w.inlet("db", bot, w.client(bot, nil))
		begin := time.Now()
		w.dial(in).Close()
		if d := time.Since(begin); d > 9*time.Second {
			t.Errorf("it took %v", d)
		}
	})
}

func TestMalformedQuestionsAreRefused(t *testing.T) {
	in(t, func(w *town) {
		w.relay(nil)
		p := w.puppet(w.member(serves("db")))
		for _, h := range []stream.Header{
			{Kind: stream.Bytes, Name: "db"},
			{Kind: stream.Connect, Name: "DB"},
			{Kind: stream.Connect, Name: ""},
			{Kind: stream.Connect, Name: "db", Body: make([]byte, 31)},
			{Kind: stream.Register, Name: "db"},
			{Kind: stream.Register, Name: "db", Body: make([]byte, 18)},
			{Kind: stream.Register, Name: "db", Body: append(make([]byte, 16), 2)},
			{Kind: stream.Register, Name: "../db", Body: make([]byte, 17)},
			{Kind: stream.Next, Name: "b", Body: []byte{1}},
			{Kind: 99, Name: "db"},
		} {
			if _, err := p.ask(h); code(err) != stream.CodeRefused {
				t.Errorf("%+v: %v", h, err)
			}
		}
		c := p.registered("db")
		c.Write([]byte("x"))
		if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("a registration that speaks reads %v", err)
		}
	})
}

// closeWrite ends one direction of a lane.
func closeWrite(lane net.Conn) {
	lane.(*channel.Lane).Conn.(interface{ CloseWrite() error }).CloseWrite()
}

func TestALaneHalfClosesAndAResetGoesThrough(t *testing.T) {
	for name, f := range map[string]func(w *town, near, far net.Conn){
		"half-close": func(w *town, near, far net.Conn) {
			closeWrite(near)
			if n, err := far.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				w.Errorf("behind the end: %d bytes, %v", n, err)
			}
			far.Write([]byte("last words"))
			closeWrite(far)
			if b, err := io.ReadAll(near); string(b) != "last words" || err != nil {
				w.Errorf("%q, %v", b, err)
			}
		},
		"reset": func(w *town, near, far net.Conn) {
			stream.Abort(far)
			w.isReset(near)
		},
		"one way only": func(w *town, near, far net.Conn) {
			begin := time.Now()
			closeWrite(near)
			io.ReadAll(far)
			if _, err := io.ReadAll(near); err == nil || time.Since(begin) != 5*time.Second {
				w.Errorf("it ends with %v after %v", err, time.Since(begin))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(w *town) {
				s, _ := w.relay(nil)
				_, ends := lanePair(w, w.member(agent), w.member(serves("db")), relay.DialBack)
				f(w, ends[0], ends[1])
				w.until("no lane is left", func() bool { return s.Lanes() == 0 })
				for _, c := range ends {
					stream.Abort(c)
				}
			})
		})
	}
}

func TestTheSixtyFifthLaneOfACarrierIsBusy(t *testing.T) {
	with(t, relay.Yamux, func(w *town) {
		s, _ := w.relay(func(s *relay.Server) { s.Limits.Outstanding = 100 })
		db := w.member(serves("db"))
		at := &relay.Client{Addr: relayAddr, Dial: w.net.Dial, Node: w.node(), Self: db, Trust: w.trust(), Carrier: relay.Yamux}
		ln := at.Listen("db", nil)
		w.run(at.Run)
		w.until("the name is there", func() bool { return s.Registrations("db") == 1 })
		var mu sync.Mutex
		var far []net.Conn
		over := make(chan struct{})
		go func() {
			defer close(over)
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				mu.Lock()
				far = append(far, c)
				mu.Unlock()
			}
		}()
		bot := w.client(w.member(agent), nil)
		var near []net.Conn
		for i := range 64 {
			c, err := bot.Lane(context.Background(), "db", identity.ID{})
			if err != nil {
				t.Fatalf("lane %d: %v", i, err)
			}
			near = append(near, c)
			w.until("it has come", func() bool { mu.Lock(); defer mu.Unlock(); return len(far) == i+1 })
		}
		if err := w.lane(bot, "db", identity.ID{}); code(err) != stream.CodeBusy {
			t.Errorf("the 65th: %v", err)
		}
		stream.Abort(near[0])
		w.until("a place is free", func() bool { return s.Lanes() == 63 })
		if err := w.lane(bot, "db", identity.ID{}); err != nil {
			t.Errorf("when one has gone: %v", err)
		}
		ln.Close()
		<-over
		for _, c := range append(near, far...) {
			stream.Abort(c)
		}
	})
}

const nextAddr = "10.0.0.9:4000"

// twoHops is a relay that knows another, behind which db is served.
func (w *town) twoHops(allow string) (first, second *relay.Server) {
	w.Helper()
	next, err := abac.ShortAny("next", allow)
	if err != nil {
		w.Fatal(err)
	}
	first, _ = w.relay(func(s *relay.Server) {
		s.Next, s.AllowNext = map[string]relay.Hop{"b": {Addr: nextAddr}}, next
	})
	second, _ = w.relayAt(nextAddr, nil)
	w.outlet("db", w.member(serves("db")), echoing, func(c *relay.Client) { c.Addr = nextAddr })
	return first, second
}

func TestAStreamGoesThroughTwoRelaysAndTheFirstLearnsOnlyTheNext(t *testing.T) {
	in(t, func(w *town) {
		first, second := w.twoHops(`principal.role == "agent"`)
		bot := w.member(agent)
		a := w.client(bot, nil)
		b := w.client(bot, func(c *relay.Client) { c.Addr, c.Dial = "b", a.Hop("b") })
		in := w.inlet("db", bot, b)
		c := w.dial(in)
		w.echoes(c)
		if first.Registrations("db") != 0 || second.Registrations("db") != 1 {
			t.Error("the name is at the wrong relay")
		}
		// One for b's control channel, one for the lane; to the second it is one lane.
		if first.Lanes() != 2 || second.Lanes() != 1 {
			t.Errorf("%d and %d lanes", first.Lanes(), second.Lanes())
		}
		c.Close()
	})
}

func TestARelayGoesOnToNobodyUnlessItsPolicySaysSo(t *testing.T) {
	in(t, func(w *town) {
		w.twoHops(`principal.role == "admin"`)
		a := w.client(w.member(agent), nil)
		for _, name := range []string{"b", "c"} {
			if _, err := a.Hop(name)(context.Background(), "tcp", ""); code(err) != stream.CodeRefused {
				t.Errorf("to %s: %v", name, err)
			}
		}
		admin := w.client(w.member(identity.Attributes{"role": "admin"}), nil)
		if _, err := admin.Hop("c")(context.Background(), "tcp", ""); code(err) != stream.CodeAbsent {
			t.Errorf("to one that it does not know: %v", err)
		}
		if _, err := w.client(w.stranger(), nil).Hop("b")(context.Background(), "tcp", ""); code(err) != stream.CodeRefused {
			t.Errorf("without a credential: %v", err)
		}
	})
}

// What the first relay says of the second is demanded besides, and is no proof.
func TestTheSecondRelayIsWhoTheFirstSaysAndProvesItselfToo(t *testing.T) {
	in(t, func(w *town) {
		first, second := w.twoHops(`true`)
		const plainAddr = "10.0.0.10:4000"
		bare, _ := w.relayAt(plainAddr, func(s *relay.Server) { s.Self = w.stranger() })
		w.outlet("db", w.member(serves("db")), echoing, func(c *relay.Client) { c.ID, c.Addr = bare.Self.ID(), plainAddr })
		bot := w.member(agent)
		a := w.client(bot, nil)
		fine := func(err error) bool { return err == nil }
		for _, test := range []struct {
			what      string
			addr      string
			said, pin identity.ID
			ok        func(error) bool
		}{
			{"it has a credential, nothing is said", nextAddr, identity.ID{}, identity.ID{}, fine},
			{"it has a credential, and is said", nextAddr, second.Self.ID(), identity.ID{}, fine},
			{"it has a credential, another is said", nextAddr, bare.Self.ID(), identity.ID{}, func(err error) bool { return errors.Is(err, channel.ErrPin) }},
			{"it is only said", plainAddr, bare.Self.ID(), identity.ID{}, refusedHere},
			{"it is pinned, another is said", plainAddr, second.Self.ID(), bare.Self.ID(), fine},
		} {
			first.Next["b"] = relay.Hop{Addr: test.addr, ID: test.said}
			b := w.client(bot, func(c *relay.Client) { c.ID, c.Addr, c.Dial = test.pin, "b", a.Hop("b") })
			if err := w.lane(b, "db", identity.ID{}); !test.ok(err) {
				t.Errorf("%s: %v", test.what, err)
			}
		}
	})
}

func refusedHere(err error) bool {
	var r *channel.Refused
	return errors.As(err, &r)
}

func TestANameIsNotRegisteredAgainOverAWayThatIsGoingAway(t *testing.T) {
	in(t, func(w *town) {
		first, second := w.twoHops(`true`)
		db := w.member(serves("way"))
		a := w.client(db, nil)
		b := &relay.Client{Addr: "b", Dial: a.Hop("b"), Node: w.node(), Self: db, Trust: w.trust()}
		var states []link.StateKind
		b.Listen("way", func(s link.State) { states = append(states, s.Kind) })
		w.run(b.Run)
		w.sleep(time.Second)
		if !slices.Equal(states, []link.StateKind{link.Ready}) || second.Registrations("way") != 1 {
			t.Fatalf("at first %v", states)
		}
		drained := make(chan int, 1)
		go func() { drained <- first.Drain(context.Background()) }()
		// There is no other way: the name is given back, and the lane let go of.
		w.sleep(time.Minute)
		if slices.Contains(states[1:], link.Ready) || second.Registrations("way") != 0 {
			t.Errorf("the states were %v", states)
		}
		select {
		case left := <-drained:
			if left != 0 {
				t.Errorf("%d lanes were cut", left)
			}
		default:
			t.Error("the first relay is held up")
		}
	})
}

func TestEachRelayJudgesTheCallerItself(t *testing.T) {
	in(t, func(w *town) {
		_, second := w.twoHops(`true`)
		second.SetPolicies(nil, never(w, "connect"), nil)
		bot := w.member(agent)
		a := w.client(bot, nil)
		b := w.client(bot, func(c *relay.Client) { c.Addr, c.Dial = "b", a.Hop("b") })
		if err := w.lane(b, "db", identity.ID{}); code(err) != stream.CodeRefused {
			t.Errorf("%v", err)
		}
	})
}

func TestARelayThatGoesAwayIsLeftBeforeItEnds(t *testing.T) {
	in(t, func(w *town) {
		first, stopFirst := w.relay(nil)
		w.relayAt(nextAddr, nil)
		db, bot := w.member(serves("db")), w.member(agent)
		w.outlet("db", db, echoing, nil)
		w.outlet("db", db, echoing, func(c *relay.Client) { c.Addr = nextAddr })
		var states []link.StateKind
		in := &inlet.Server{Node: w.node(), Name: "db", Self: bot, Trust: w.trust(), OnState: func(s link.State) { states = append(states, s.Kind) }}
		for _, addr := range []string{relayAddr, nextAddr} {
			c := w.client(bot, func(c *relay.Client) { c.Addr = addr })
			in.Paths = append(in.Paths, inlet.Path{Name: "via " + addr, Dial: func(ctx context.Context) (net.Conn, error) {
				return c.Lane(ctx, "db", identity.ID{})
			}})
		}
		w.run(in.Run)
		old := w.dial(in)
		if p := in.State().Path; p != "via "+relayAddr {
			t.Fatalf("reached %s", p)
		}
		drained := make(chan int, 1)
		go func() { drained <- first.Drain(context.Background()) }()
		w.sleep(100 * time.Millisecond)
		w.echoes(old) // goes on where it is
		w.dial(in).Close()
		if p := in.State().Path; p != "via "+nextAddr {
			t.Errorf("new streams still come by %s", p)
		}
		for _, s := range states {
			if s != link.Ready {
				t.Errorf("the states were %v, want no pause", states)
			}
		}
		old.Close()
		if left := <-drained; left != 0 {
			t.Errorf("%d lanes were cut", left)
		}
		stopFirst()
	})
}

func TestDrainCutsWhatIsLeft(t *testing.T) {
	in(t, func(w *town) {
		s, stop := w.relay(nil)
		w.outlet("db", w.member(serves("db")), echoing, nil)
		bot := w.member(agent)
		in := w.inlet("db", bot, w.client(bot, nil))
		c := w.dial(in)
		ctx, cancel := context.WithTimeout(context.Background(), 25*time.Second)
		defer cancel()
		begin := time.Now()
		if left := s.Drain(ctx); left != 1 || time.Since(begin) != 25*time.Second {
			t.Errorf("%d were cut after %v", left, time.Since(begin))
		}
		w.isReset(c)
		stop()
	})
}

// One that is not there costs a try, not the time that a dial may take.
func TestARelayThatIsDownDoesNotHoldTheOtherUp(t *testing.T) {
	in(t, func(w *town) {
		const other = "10.0.0.9:1"
		w.relayAt(other, nil)
		w.outlet("db", w.member(serves("db")), echoing, func(c *relay.Client) { c.Addr = other })
		bot := w.member(agent)
		in := w.inlet("db", bot, w.client(bot, nil), w.client(bot, func(c *relay.Client) { c.Addr = other }))
		begin := time.Now()
		w.dial(in).Close()
		if d := time.Since(begin); d > 2*time.Second {
			t.Errorf("it took %v", d)
		}
	})
}

// An inlet that has nothing to do is ready as soon as its way is.
func TestAWayThatIsThereAgainIsTakenAtOnce(t *testing.T) {
	in(t, func(w *town) {
		bot := w.member(agent)
		c := w.client(bot, nil)
		in := w.inlet("db", bot, c)
		w.sleep(10 * time.Minute) // by now the pauses are half a minute
		reached := make(chan time.Time, 1)
		defer c.OnReady(func() { reached <- time.Now() })()
		w.relay(nil)
		w.outlet("db", w.member(serves("db")), echoing, nil)
		if _, err := c.Names(context.Background()); err != nil { // somebody else has it reached
			t.Fatal(err)
		}
		begin := <-reached
		w.until("the inlet ready", func() bool { return in.State().Kind == link.Ready })
		if d := time.Since(begin); d > time.Second {
			t.Errorf("it took %v from when the relay was reached", d)
		}
	})
}

func TestAfterARelaysRestartEverythingIsThereAgainWithinASecond(t *testing.T) {
	in(t, func(w *town) {
		_, stop := w.relay(nil)
		w.outlet("db", w.member(serves("db")), echoing, nil)
		bot := w.member(agent)
		in := w.inlet("db", bot, w.client(bot, nil))
		c := w.dial(in)
		stop()
		w.isReset(c)
		w.sleep(30 * time.Second)
		w.relay(nil)
		begin := time.Now()
		w.dial(in).Close()
		if d := time.Since(begin); d > time.Second {
			t.Errorf("it took %v", d)
		}
	})
}
