package relay_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/outlet"
	"github.com/portal-tunnel/portal/relay"
	"github.com/portal-tunnel/portal/routing"
)

// hostile is a relay in the hands of a test. It proves what a relay proves, speaks
// the wire of SPEC.md, "Relay", takes every registration, and does with a question
// whatever the test says.
type hostile struct {
	*town
	self *identity.Self
	node *routing.Node
	all  sync.WaitGroup
	stop context.Context

	took atomic.Int32 // channels in which somebody took this relay for an outlet

	mu         sync.Mutex
	asked      func(*hostile, *link.Live, *stream.Incoming) // on a goroutine of its own
	registered map[string][]*stream.Conn
	expected   map[[16]byte]chan net.Conn
	controls   []*link.Live
	conns      []net.Conn // ended with the test at the latest
}

func (w *town) hostileAt(addr string, asked func(*hostile, *link.Live, *stream.Incoming)) *hostile {
	w.Helper()
	stop, cancel := context.WithCancel(context.Background())
	h := &hostile{
		town: w, self: w.member(identity.Attributes{"relay": true, "name": "relay"}), node: w.node(), stop: stop, asked: asked,
		registered: make(map[string][]*stream.Conn), expected: make(map[[16]byte]chan net.Conn),
	}
	server := &link.Server{
		Services: map[channel.Kind]link.Service{channel.Relay: {
			Config: channel.Config{Node: h.node, Self: h.self, Trust: w.trust(), Proofless: true, Judge: anybody},
			Accept: h.question,
			Opened: func(l *link.Live) { h.mu.Lock(); h.controls = append(h.controls, l); h.mu.Unlock() },
		}},
		Lane: func(_ context.Context, p channel.Preface, _ int, c net.Conn) (known bool) {
			h.mu.Lock()
			h.conns = append(h.conns, c)
			shown := h.expected[p.ID]
			h.mu.Unlock()
			if shown == nil {
				stream.Abort(c)
				return false
			}
			select {
			case shown <- c:
			case <-stop.Done():
			}
			return false
		},
	}
	ln := w.listen(addr)
	w.run(func(ctx context.Context) error {
		err := server.Serve(ctx, ln)
		cancel()
		h.mu.Lock()
		for _, c := range h.conns {
			stream.Abort(c)
		}
		h.mu.Unlock()
		h.all.Wait()
		return err
	})
	return h
}

func anybody(*identity.Peer) error { return nil }

// does has it do something else with questions from now on.
func (h *hostile) does(asked func(*hostile, *link.Live, *stream.Incoming)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.asked = asked
}

func (h *hostile) question(l *link.Live, in *stream.Incoming) {
	h.mu.Lock()
	asked := h.asked
	h.mu.Unlock()
	if in.Header.Kind == stream.Register {
		c := in.Accept()
		h.mu.Lock()
		h.registered[in.Header.Name] = append(h.registered[in.Header.Name], c)
		h.mu.Unlock()
		return
	}
	h.all.Go(func() { asked(h, l, in) })
}

// offer is the 49 bytes of SPEC.md.
func makeOffer(kind byte, id [16]byte, key [32]byte) []byte {
	return append(append([]byte{kind}, id[:]...), key[:]...)
}

func random16() (b [16]byte) { rand.Read(b[:]); return b }
func random32() (b [32]byte) { rand.Read(b[:]); return b }

// expect is where the connection comes that shows an id, each time.
func (h *hostile) expect() (id [16]byte, shown chan net.Conn) {
	id, shown = random16(), make(chan net.Conn, 1)
	h.mu.Lock()
	h.expected[id] = shown
	h.mu.Unlock()
	return id, shown
}

// await is the connection that shows an id, nil when none comes.
func (h *hostile) await(shown chan net.Conn) net.Conn {
	t := time.NewTimer(15 * time.Second)
	defer t.Stop()
	select {
	case c := <-shown:
		return c
	case <-t.C:
	case <-h.stop.Done():
	}
	return nil
}

// invite answers a question with an id and a key, and is the caller's side.
func (h *hostile) invite(in *stream.Incoming, key [32]byte) net.Conn {
	id, shown := h.expect()
	c := in.Accept()
	c.Write(makeOffer(1, id, key))
	c.Close()
	return h.await(shown)
}

// summon offers a lane to one of those who serve the name, and is its side.
func (h *hostile) summon(name string, i int, key [32]byte) net.Conn {
	h.mu.Lock()
	c := h.registered[name][i]
	h.mu.Unlock()
	id, shown := h.expect()
	c.Write(makeOffer(1, id, key))
	return h.await(shown)
}

// join copies both ways until either side ends, or ends both if one is not there.
func (h *hostile) join(a, b net.Conn) {
	if a == nil || b == nil {
		h.cut(a, b)
		return
	}
	h.pass(a, b)
	h.pass(b, a)
}

// pass copies one way.
func (h *hostile) pass(to, from net.Conn) {
	h.all.Go(func() {
		_, err := io.Copy(to, from)
		if w, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
			err = w.CloseWrite()
		}
		if err != nil {
			h.cut(to, from)
		}
	})
}

func (h *hostile) cut(conns ...net.Conn) {
	for _, c := range conns {
		if c != nil {
			stream.Abort(c)
		}
	}
}

// honest is what a relay should do.
func honest(h *hostile, _ *link.Live, in *stream.Incoming) {
	key := random32()
	h.join(h.invite(in, key), h.summon(in.Header.Name, 0, key))
}

// poses ends the caller's channel itself, as somebody else.
func poses(as func(h *hostile) *identity.Self) func(*hostile, *link.Live, *stream.Incoming) {
	return func(h *hostile, _ *link.Live, in *stream.Incoming) {
		key := random32()
		h.respond(h.invite(in, key), key, channel.Service, as(h))
	}
}

// respond answers a channel of the kind as self.
func (h *hostile) respond(lane net.Conn, key [32]byte, kind channel.Kind, self *identity.Self) {
	if lane == nil {
		return
	}
	e, err := channel.Respond(h.stop, &channel.Lane{Conn: lane, Key: key}, &channel.Config{
		Node: h.node, Self: self, Trust: h.trust(), Kind: kind, Proofless: true, Judge: anybody,
	})
	if err != nil {
		return
	}
	// Somebody has shown us its credential, and may speak.
	h.took.Add(1)
	mux := stream.NewMux(h.node, e, false, stream.Limits{}, nil)
	h.all.Go(func() { mux.Fail(e.Run(mux)) })
}

// scene is a town with a hostile relay and outlets that note who comes to them.
type scene struct {
	*hostile
	alice, alan, bob, carol *identity.Self

	mu     sync.Mutex
	visits []string // "name by whom", one for each stream that came to a target
}

const secret = "the salary of row 7. "

// play sets the scene: alice and alan serve a, bob b, carol c and d.
func (w *town) play(asked func(*hostile, *link.Live, *stream.Incoming)) *scene {
	w.Helper()
	w.tap = func(dialer, listener *memnet.Conn) {
		see := func(_ int64, b []byte) []byte {
			if bytes.Contains(b, []byte(secret)) {
				w.Errorf("%d bytes of the payload went by in clear", len(b))
			}
			return b
		}
		dialer.OnWrite(see)
		listener.OnWrite(see)
	}
	s := &scene{hostile: w.hostileAt(relayAddr, asked)}
	s.alice, s.alan = w.member(identity.Attributes{"name": "alice", "serve": []string{"a"}}), w.member(identity.Attributes{"name": "alan", "serve": []string{"a"}})
	s.bob, s.carol = w.member(identity.Attributes{"name": "bob", "serve": []string{"b"}}), w.member(identity.Attributes{"name": "carol", "serve": []string{"c", "d"}})
	for _, o := range []struct {
		name string
		self *identity.Self
	}{{"a", s.alice}, {"a", s.alan}, {"b", s.bob}, {"c", s.carol}, {"d", s.carol}} {
		w.outlet(o.name, o.self, s.target(o.name, o.self), nil)
	}
	return s
}

// target is one that says which name it is of, and whose.
func (s *scene) target(name string, self *identity.Self) outlet.Target {
	return s.named(fmt.Sprintf("%s by %s", name, self.Credential().Attributes["name"]))
}

// named is a target that notes the stream and answers who it is.
func (s *scene) named(me string) outlet.Target {
	return func(context.Context, *outlet.Request) (net.Conn, error) {
		s.mu.Lock()
		s.visits = append(s.visits, me)
		s.mu.Unlock()
		near, far := memnet.Pipe(memnet.Link{})
		go func() {
			io.ReadFull(far, make([]byte, len(secret)))
			far.Write([]byte(me + "\n"))
			io.Copy(io.Discard, far)
			far.CloseWrite()
			far.Close()
		}()
		return near, nil
	}
}

func (s *scene) seen() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.visits)
}

// agentAt is an inlet for a name, which a pin narrows.
func (s *scene) agentAt(name string, pin identity.ID) *inlet.Server {
	s.Helper()
	bot := s.member(agent)
	c := s.client(bot, nil)
	in := &inlet.Server{Node: s.town.node(), Name: name, Self: bot, Trust: s.trust(), Pin: pin}
	in.Paths = []inlet.Path{{Name: "via " + c.Addr, Dial: func(ctx context.Context) (net.Conn, error) { return c.Lane(ctx, name, in.Pin) }}}
	s.run(in.Run)
	return in
}

// ask opens a stream, says the secret, and gives the answer. It does not hang.
func (s *scene) ask(in *inlet.Server, patience time.Duration) (string, error) {
	s.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := in.Dial(ctx)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := c.Write([]byte(secret)); err != nil {
		return "", err
	}
	line := make([]byte, 0, 64)
	for b := make([]byte, 1); ; line = append(line, b...) {
		if _, err := io.ReadFull(c, b); errors.Is(err, os.ErrDeadlineExceeded) {
			s.Errorf("the stream hangs")
			return "", err
		} else if err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
	}
}

// A relay does with a question for a what it likes: no stream is opened but at an
// outlet that may serve a and is the one that was asked for, if one was; and when the
// relay behaves again, the next one is.
func TestAHostileRelayOpensNoStreamElsewhere(t *testing.T) {
	pinned := func(s *scene) identity.ID { return s.alan.ID() }
	tried := 0
	for name, c := range map[string]struct {
		ask   string // which name; default a
		pin   func(*scene) identity.ID
		asked func(*hostile, *link.Live, *stream.Incoming)
		found string // who may answer meanwhile; "": nobody
	}{
		"it behaves": {asked: honest, found: "a by alice"},
		"it behaves, for who was asked for": {pin: pinned, found: "a by alan", asked: func(h *hostile, _ *link.Live, in *stream.Incoming) {
			key := random32()
			h.join(h.invite(in, key), h.summon("a", 1, key))
		}},
		"another of the pool": {pin: pinned, asked: honest},

		"it answers itself":                        {asked: poses(func(h *hostile) *identity.Self { return h.self })},
		"it answers without a credential":          {asked: poses(func(h *hostile) *identity.Self { return h.stranger() })},
		"it answers as a member":                   {asked: poses(func(h *hostile) *identity.Self { return h.member(agent) })},
		"it answers as who may serve what's below": {asked: poses(func(h *hostile) *identity.Self { return h.member(serves("a/*")) })},
		"it answers as who might have served": {asked: poses(func(h *hostile) *identity.Self {
			self := h.stranger()
			h.issue(self, serves("a"), time.Second)
			time.Sleep(2 * time.Second)
			return self
		})},
		"it answers as a member of its own authority": {asked: poses(func(h *hostile) *identity.Self { return h.foreign(serves("a")) })},
		"it answers as another who may serve":         {pin: pinned, asked: poses(func(h *hostile) *identity.Self { return h.member(serves("a")) })},

		"another name's outlet":                   {asked: leads("b", func(k [32]byte) [32]byte { return k })},
		"another name's outlet with its own key":  {asked: leads("b", func([32]byte) [32]byte { return random32() })},
		"another name's outlet without a key":     {asked: leads("b", func([32]byte) [32]byte { return [32]byte{} })},
		"another name's outlet of one identity":   {ask: "c", asked: leads("d", func(k [32]byte) [32]byte { return k })},
		"the outlet with another key":             {asked: leads("a", func([32]byte) [32]byte { return random32() })},
		"the outlet without a key":                {asked: leads("a", func([32]byte) [32]byte { return [32]byte{} })},
		"the outlet with the caller's key turned": {asked: leads("a", func(k [32]byte) [32]byte { slices.Reverse(k[:]); return k })},

		"two outlets at once": {found: "a by alice", asked: func(h *hostile, _ *link.Live, in *stream.Incoming) {
			key := random32()
			caller, one, two := h.invite(in, key), h.summon("a", 0, key), h.summon("a", 1, key)
			h.tee(caller, one, two)
		}},
		"two outlets of two names at once": {found: "a by alice", asked: func(h *hostile, _ *link.Live, in *stream.Incoming) {
			key := random32()
			caller, one, two := h.invite(in, key), h.summon("a", 0, key), h.summon("b", 0, key)
			h.tee(caller, one, two)
		}},
		"one lane of the outlet twice": {found: "a by alice", asked: func(h *hostile, _ *link.Live, in *stream.Incoming) {
			// The outlet is offered one id twice, and comes twice.
			key := random32()
			caller := h.invite(in, key)
			h.mu.Lock()
			c := h.registered["a"][0]
			h.mu.Unlock()
			id, shown := h.expect()
			c.Write(makeOffer(1, id, key))
			c.Write(makeOffer(1, id, key))
			h.tee(caller, h.await(shown), h.await(shown))
		}},
		"the caller back to itself": {asked: func(h *hostile, _ *link.Live, in *stream.Incoming) {
			caller := h.invite(in, random32())
			h.pass(caller, caller)
		}},
		"an outlet back to itself": {asked: func(h *hostile, _ *link.Live, in *stream.Incoming) {
			key := random32()
			far := h.summon("a", 0, key)
			h.pass(far, far)
			h.join(h.invite(in, key), nil)
		}},
		"outlets to one another": {asked: func(h *hostile, _ *link.Live, in *stream.Incoming) {
			key := random32()
			h.join(h.summon("a", 0, key), h.summon("a", 1, key))
			h.join(h.invite(in, key), nil)
		}},
		"the outlet, with the caller's preface changed": {asked: func(h *hostile, _ *link.Live, in *stream.Incoming) {
			key := random32()
			caller, far := h.invite(in, key), h.summon("a", 0, key)
			head := make([]byte, 24)
			io.ReadFull(caller, head)
			head[6] = 2 // another suite, which the outlet knows
			far.Write(head)
			h.join(caller, far)
		}},
		"nobody, and it says nothing": {asked: func(h *hostile, _ *link.Live, in *stream.Incoming) {
			h.invite(in, random32())
		}},
		"nobody, and it does not answer": {asked: func(h *hostile, _ *link.Live, in *stream.Incoming) {
			<-in.Done()
		}},
		"nobody: it takes the question and offers nothing": {asked: func(h *hostile, _ *link.Live, in *stream.Incoming) {
			in.Accept()
		}},
	} {
		tried++
		t.Run(name, func(t *testing.T) {
			in(t, func(w *town) {
				s := w.play(c.asked)
				ask, pin := "a", identity.ID{}
				if c.ask != "" {
					ask = c.ask
				}
				if c.pin != nil {
					pin = c.pin(s)
				}
				bot := s.agentAt(ask, pin)
				for range 2 {
					begin := time.Now()
					found, err := s.ask(bot, 20*time.Second)
					if found != c.found || (err == nil) != (c.found != "") {
						t.Errorf("it found %q, %v; want %q", found, err, c.found)
					}
					if d := time.Since(begin); d > 21*time.Second {
						t.Errorf("it was told after %v", d)
					}
				}
				// Whoever answered is the only one that was reached.
				for _, v := range s.seen() {
					if v != c.found {
						t.Errorf("a stream came to %s", v)
					}
				}
				if n := s.took.Load(); n != 0 {
					t.Errorf("%d times the relay was taken for the outlet", n)
				}
				s.does(func(h *hostile, _ *link.Live, in *stream.Incoming) {
					who := 0
					if !pin.IsZero() {
						who = 1
					}
					key := random32()
					h.join(h.invite(in, key), h.summon(in.Header.Name, who, key))
				})
				s.drop()
				want := map[string]string{"a": "a by alice", "c": "c by carol"}[ask]
				if !pin.IsZero() {
					want = "a by alan"
				}
				time.Sleep(time.Minute) // a refusal is tried again every 30 s ± 50 %
				if found, err := s.ask(bot, time.Minute); found != want {
					t.Errorf("when it behaves again: %q, %v", found, err)
				}
			})
		})
	}
	t.Logf("F-42: a relay that behaves in %d ways: no stream anywhere but where the inlet asked", tried)
}

// drop cuts every lane there is.
func (h *hostile) drop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cut(h.conns...)
	h.conns = nil
}

// leads joins the caller to somebody else's outlet, with a key made of the caller's.
func leads(name string, change func([32]byte) [32]byte) func(*hostile, *link.Live, *stream.Incoming) {
	return func(h *hostile, _ *link.Live, in *stream.Incoming) {
		key := random32()
		h.join(h.invite(in, key), h.summon(name, 0, change(key)))
	}
}

// foreign is a member of an authority that nobody here trusts.
func (w *town) foreign(attrs identity.Attributes) *identity.Self {
	w.Helper()
	other, self := w.stranger(), w.stranger()
	now := time.Now()
	c, err := other.Issue(self.ID(), self.Latest(), attrs, now, now.Add(time.Hour))
	if err == nil {
		err = self.Renew(c, other.History())
	}
	if err != nil {
		w.Fatal(err)
	}
	return self
}

// tee gives what one says to two, and what the first of them says back.
func (h *hostile) tee(from, one, two net.Conn) {
	if from == nil || one == nil || two == nil {
		h.cut(from, one, two)
		return
	}
	h.pass(from, one)
	h.all.Go(func() { io.Copy(io.Discard, two) })
	h.all.Go(func() {
		io.Copy(io.MultiWriter(one, forgiving{two}), from)
		h.cut(from, one, two)
	})
}

// forgiving is a writer whose errors do not matter.
type forgiving struct{ io.Writer }

func (f forgiving) Write(b []byte) (int, error) {
	f.Writer.Write(b)
	return len(b), nil
}

// kinds are all that a header can ask for by SPEC.md, and some that nothing can.
var kinds = []stream.HeaderKind{0, stream.Bytes, stream.Probe, stream.Request, stream.PingTarget, stream.Register, stream.Connect, stream.Next, stream.Names, 9, 16, 255}

func TestAHostileRelayOpensNoStreamAtAnOutletItself(t *testing.T) {
	tried := 0
	for name, as := range map[string]func(*scene) *identity.Self{
		"as the relay that it is":             func(s *scene) *identity.Self { return s.self },
		"without a credential":                func(s *scene) *identity.Self { return s.stranger() },
		"as a member of its own authority":    func(s *scene) *identity.Self { return s.foreign(agent) },
		"as a member whom no policy permits":  func(s *scene) *identity.Self { return s.member(identity.Attributes{"role": "guest"}) },
		"as the outlet of another name":       func(s *scene) *identity.Self { return s.bob },
		"as one who was permitted until then": func(s *scene) *identity.Self { self := s.stranger(); s.issue(self, agent, time.Second); return self },
	} {
		tried++
		t.Run(name, func(t *testing.T) {
			in(t, func(w *town) {
				s := w.play(honest)
				self := as(s)
				w.sleep(2 * time.Second)
				for _, kind := range []channel.Kind{channel.Service, channel.Relay, channel.Authority} {
					key := random32()
					lane := s.summon("a", 0, key)
					l, err := link.Dial(context.Background(), &channel.Lane{Conn: lane, Key: key}, &channel.Config{
						Node: s.node, Self: self, Trust: s.trust(), Kind: kind, Proofless: true, Judge: anybody,
					}, nil)
					if err != nil {
						continue
					}
					if kind != channel.Service {
						t.Errorf("an outlet takes a channel of kind %v", kind)
					}
					synctest.Wait() // it may end the channel as soon as it has heard who we are
					for _, kind := range kinds {
						for _, name := range []string{"a", "b", "c", "authority", ""} {
							c, err := l.Mux.Open(stream.Header{Kind: kind, Name: name})
							if err == nil {
								err = c.Wait(context.Background())
							}
							if err == nil {
								t.Errorf("kind %d for %q is admitted", kind, name)
								c.Reset(stream.CodeLocal, "")
							}
						}
					}
					l.Close(nil)
				}
				if seen := s.seen(); len(seen) != 0 {
					t.Errorf("streams came to %v", seen)
				}
			})
		})
	}
	t.Logf("F-42: a relay that asks an outlet as %d others: no stream is opened", tried)
}

// taped is honest, and keeps what went by: of the caller, of the outlet.
func taped(key [32]byte, tapes *[2]bytes.Buffer) func(*hostile, *link.Live, *stream.Incoming) {
	return func(h *hostile, _ *link.Live, in *stream.Incoming) {
		caller, far := h.invite(in, key), h.summon(in.Header.Name, 0, key)
		h.pass(recording{far, &tapes[0]}, caller)
		h.pass(recording{caller, &tapes[1]}, far)
	}
}

type recording struct {
	net.Conn
	tape *bytes.Buffer
}

func (r recording) Write(b []byte) (int, error) {
	r.tape.Write(b)
	return r.Conn.Write(b)
}

func (r recording) CloseWrite() error {
	return r.Conn.(interface{ CloseWrite() error }).CloseWrite()
}

func TestARecordedLaneIsWorthNothing(t *testing.T) {
	in(t, func(w *town) {
		key := random32()
		var tapes [2]bytes.Buffer
		s := w.play(taped(key, &tapes))
		bot := s.agentAt("a", identity.ID{})
		if found, err := s.ask(bot, 20*time.Second); found != "a by alice" {
			t.Fatalf("%q, %v", found, err)
		}
		w.sleep(time.Second)
		s.does(func(_ *hostile, _ *link.Live, in *stream.Incoming) { in.Refuse(stream.CodeAbsent, "") })
		s.drop()
		w.sleep(time.Second)
		said, answered := tapes[0].Bytes(), tapes[1].Bytes()
		if len(said) < 2000 || len(answered) < 2000 {
			t.Fatalf("%d and %d bytes were recorded", len(said), len(answered))
		}
		// What the caller said, to the same outlet and to others: at once, and message by
		// message.
		for _, to := range []struct {
			name string
			i    int
		}{{"a", 0}, {"a", 1}, {"b", 0}} {
			for _, pause := range []time.Duration{0, 100 * time.Millisecond} {
				far := s.summon(to.name, to.i, key)
				for _, part := range [][]byte{said[:24+2+1232], said[24+2+1232:]} {
					far.Write(part)
					w.sleep(pause)
				}
				begin := time.Now()
				io.Copy(io.Discard, far) // ends
				if d := time.Since(begin); d > 11*time.Second {
					t.Errorf("%s hangs up after %v", to.name, d)
				}
			}
		}
		// What the outlet said, to a caller that asks again.
		s.does(func(h *hostile, _ *link.Live, in *stream.Incoming) {
			caller := h.invite(in, key)
			if caller == nil {
				return
			}
			h.all.Go(func() { caller.Write(answered) })
			io.Copy(io.Discard, caller)
		})
		if found, err := s.ask(bot, 20*time.Second); err == nil {
			t.Errorf("a recording answered %q", found)
		}
		if seen := s.seen(); len(seen) != 1 {
			t.Errorf("streams came to %v", seen)
		}
	})
}

// served is an authority that registers at the relay; it counts what it is asked.
func (s *scene) authorityServes() (questions *atomic.Int32) {
	s.Helper()
	questions = new(atomic.Int32)
	node := s.town.node()
	at := &relay.Client{Addr: relayAddr, Dial: s.net.Dial, Node: node, Self: s.authority, Trust: s.trust()}
	ready := make(chan struct{})
	once := sync.OnceFunc(func() { close(ready) })
	ln := at.Listen(relay.AuthorityName, func(l link.State) {
		if l.Kind == link.Ready {
			once()
		}
	})
	server := &link.Server{Services: map[channel.Kind]link.Service{channel.Authority: {
		Config: channel.Config{Node: node, Self: s.authority, Trust: s.trust(), Proofless: true, Judge: anybody},
		Accept: func(_ *link.Live, in *stream.Incoming) {
			questions.Add(1)
			in.Refuse(stream.CodeRefused, "")
		},
	}}}
	s.run(func(ctx context.Context) error { return server.Serve(ctx, ln) })
	s.run(at.Run)
	<-ready
	return questions
}

func TestLanesOfAnAuthorityAndOfAnOutletAreNotExchanged(t *testing.T) {
	// As it is, and with the kind in the caller's preface changed to what the other end
	// serves.
	for _, kind := range []channel.Kind{0, channel.Authority, channel.Service} {
		t.Run(kind.String(), func(t *testing.T) {
			in(t, func(w *town) {
				crossed := func(h *hostile, _ *link.Live, in *stream.Incoming) {
					to := relay.AuthorityName
					if in.Header.Name == to {
						to = "a"
					}
					key := random32()
					caller, far := h.invite(in, key), h.summon(to, 0, key)
					head := make([]byte, 24)
					io.ReadFull(caller, head)
					if kind != 0 {
						head[5] = byte(kind)
					}
					far.Write(head)
					h.join(caller, far)
				}
				s := w.play(crossed)
				questions := s.authorityServes()
				if found, err := s.ask(s.agentAt("a", identity.ID{}), 20*time.Second); err == nil {
					t.Errorf("the authority answered as %q", found)
				}
				stranger := s.stranger()
				lane, err := s.client(stranger, nil).Lane(context.Background(), relay.AuthorityName, s.authority.ID())
				if err != nil {
					t.Fatal(err)
				}
				begin := time.Now()
				if _, err := channel.Initiate(context.Background(), lane, &channel.Config{
					Node: s.node, Self: stranger, Trust: s.trust(), Kind: channel.Authority, Pin: s.authority.ID(), Proofless: true, Judge: anybody,
				}); err == nil {
					t.Error("an outlet passes for the authority")
				}
				if d := time.Since(begin); d > 10*time.Second {
					t.Errorf("it took %v", d)
				}
				if n, seen := questions.Load(), s.seen(); n != 0 || len(seen) != 0 {
					t.Errorf("%d questions came to the authority, streams to %v", n, seen)
				}
			})
		})
	}
}

func TestOffersThatNobodyAskedForLeadNowhere(t *testing.T) {
	id, key := random16(), random32()
	for name, c := range map[string]struct {
		b   []byte
		end bool
	}{
		"nothing":             {nil, true},
		"of no kind":          {makeOffer(0, id, key), false},
		"of a carrier":        {makeOffer(2, id, [32]byte{}), false},
		"of an unknown kind":  {makeOffer(3, id, key), false},
		"cut off":             {makeOffer(1, id, key)[:48], true},
		"of a lane for no id": {makeOffer(1, id, key), true},
		"of two lanes":        {append(makeOffer(1, id, key), makeOffer(1, random16(), key)...), false},
		"in 100,000 bytes":    {bytes.Repeat([]byte{1}, 100_000), false},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(w *town) {
				s := w.play(func(h *hostile, _ *link.Live, in *stream.Incoming) {
					conn := in.Accept()
					conn.Write(c.b)
					if c.end {
						conn.Close()
					}
				})
				if found, err := s.ask(s.agentAt("a", identity.ID{}), 20*time.Second); err == nil {
					t.Errorf("%q answered", found)
				}
				if seen := s.seen(); len(seen) != 0 {
					t.Errorf("streams came to %v", seen)
				}
			})
		})
	}
}

// An outlet that is offered what is no lane gives the registration up, and is not led
// in a loop.
func TestARegistrationIsOfferedLanesOnly(t *testing.T) {
	for name, b := range map[string][]byte{
		"a carrier":  makeOffer(2, random16(), [32]byte{}),
		"no kind":    makeOffer(0, random16(), random32()),
		"an unknown": makeOffer(255, random16(), random32()),
		"nonsense":   bytes.Repeat([]byte("nonsense"), 100),
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(w *town) {
				s := w.play(honest)
				registrations := func() int {
					s.hostile.mu.Lock()
					defer s.hostile.mu.Unlock()
					return len(s.registered["b"])
				}
				for end := time.Now().Add(time.Minute); time.Now().Before(end); {
					n := registrations()
					s.hostile.mu.Lock()
					c := s.registered["b"][n-1]
					s.hostile.mu.Unlock()
					c.Write(b)
					for registrations() == n && time.Now().Before(end) {
						w.sleep(10 * time.Millisecond)
					}
				}
				// 50 ms doubled to 5 s, ± 50 %.
				if n := registrations(); n < 8 || n > 40 {
					t.Errorf("it registered %d times in a minute", n)
				}
				if seen := s.seen(); len(seen) != 0 {
					t.Errorf("streams came to %v", seen)
				}
			})
		})
	}
}

// However many lanes an outlet is offered, it opens few at once, and what it holds of
// those that say nothing is bounded.
func TestAFloodOfOffersIsBounded(t *testing.T) {
	in(t, func(w *town) {
		s := w.play(honest)
		s.hostile.mu.Lock()
		c := s.registered["b"][0]
		s.hostile.mu.Unlock()
		id, shown := s.expect() // nobody takes them but the test
		var open, most atomic.Int32
		s.all.Go(func() {
			for {
				select {
				case c := <-shown:
					most.Store(max(most.Load(), open.Add(1)))
					s.all.Go(func() {
						io.Copy(io.Discard, c) // until the outlet gives it up
						c.Close()
						open.Add(-1)
					})
				case <-s.stop.Done():
					return
				}
			}
		})
		for range 5000 {
			c.Write(makeOffer(1, id, random32()))
		}
		w.sleep(time.Minute)
		if seen := s.seen(); len(seen) != 0 {
			t.Errorf("streams came to %v", seen)
		}
		// 384 that are half open and 64 that are being opened, and those on their way.
		if n := most.Load(); n < 300 || n > 600 {
			t.Errorf("%d lanes were open at once", n)
		}
		if n := open.Load(); n != 0 {
			t.Errorf("%d are left", n)
		}
		if found, err := s.ask(s.agentAt("b", identity.ID{}), 20*time.Second); found != "b by bob" {
			t.Errorf("afterwards %q, %v", found, err)
		}
	})
}

// A relay opens streams on the control channels that members keep with it.
func TestAMemberTakesNoStreamFromARelay(t *testing.T) {
	in(t, func(w *town) {
		s := w.play(honest)
		bot := s.agentAt("a", identity.ID{})
		if _, err := s.ask(bot, 20*time.Second); err != nil {
			t.Fatal(err)
		}
		s.hostile.mu.Lock()
		controls := slices.Clone(s.controls)
		s.hostile.mu.Unlock()
		answers := make(map[string]int)
		for _, l := range controls {
			for _, kind := range kinds {
				for _, name := range []string{"a", "b", "d", "authority", "", "../a"} {
					for _, body := range [][]byte{nil, make([]byte, 17), make([]byte, 32)} {
						c, err := l.Mux.Open(stream.Header{Kind: kind, Name: name, Body: body})
						if err != nil {
							t.Fatal(err)
						}
						err = c.Wait(context.Background())
						if err == nil {
							c.Reset(stream.CodeLocal, "")
						}
						answers[fmt.Sprint(err)]++
					}
				}
			}
		}
		if len(answers) != 1 || answers["<nil>"] != 0 {
			t.Errorf("the answers were %v", answers)
		}
		if seen := s.seen(); len(seen) != 1 {
			t.Errorf("streams came to %v", seen)
		}
	})
}

// A relay that says it is going away behind every lane that it joins makes its members
// look for another way, and not in a tight loop.
func TestARelayThatIsForeverGoingAwayIsNotAskedInALoop(t *testing.T) {
	in(t, func(w *town) {
		var asked atomic.Int32
		s := w.play(func(h *hostile, l *link.Live, in *stream.Incoming) {
			asked.Add(1)
			honest(h, l, in)
			time.Sleep(time.Millisecond)
			l.Mux.Away()
		})
		bot := s.agentAt("a", identity.ID{})
		if found, err := s.ask(bot, 20*time.Second); found != "a by alice" {
			t.Errorf("%q, %v", found, err)
		}
		asked.Store(0)
		w.sleep(20 * time.Second)
		if n := asked.Load(); n == 0 || n > 4*20 {
			t.Errorf("it was asked %d times in 20 s", n)
		}
	})
}

const thirdAddr = "10.0.0.10:4000"

// A hostile first relay leads a caller that goes on by it to somebody else.
func TestAHopLeadsToWhoeverIsPinnedOrProvesToBeARelay(t *testing.T) {
	dials := func(addr string) func(*scene, *stream.Incoming) {
		return func(s *scene, in *stream.Incoming) {
			caller := s.invite(in, [32]byte{})
			far, err := s.net.Dial(s.stop, "mem", addr)
			if err != nil {
				s.Error(err)
				return
			}
			s.join(caller, far)
		}
	}
	plays := func(as func(*scene) *identity.Self) func(*scene, *stream.Incoming) {
		return func(s *scene, in *stream.Incoming) {
			s.respond(s.invite(in, [32]byte{}), [32]byte{}, channel.Relay, as(s))
		}
	}
	for name, c := range map[string]struct {
		leads  func(*scene, *stream.Incoming)
		pinned string // who may answer a caller that pins the second
		open   string // and one that takes any relay
		took   int32  // times that a caller takes the first for any relay
	}{
		"to the second":      {leads: dials(nextAddr), pinned: "a by second's", open: "a by second's"},
		"to a third":         {leads: dials(thirdAddr), open: "a by third's"},
		"to an outlet":       {leads: dials(outletAddr)},
		"to itself":          {leads: plays(func(s *scene) *identity.Self { return s.self }), took: 1},
		"to somebody":        {leads: plays(func(s *scene) *identity.Self { return s.bob })},
		"to a foreign relay": {leads: plays(func(s *scene) *identity.Self { return s.foreign(identity.Attributes{"relay": true}) })},
		"back to the caller": {leads: func(s *scene, in *stream.Incoming) { caller := s.invite(in, [32]byte{}); s.pass(caller, caller) }},
		"nowhere":            {leads: func(s *scene, in *stream.Incoming) { s.invite(in, [32]byte{}) }},
	} {
		for _, pin := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, pinned %t", name, pin), func(t *testing.T) {
				in(t, func(w *town) {
					s := w.play(honest)
					s.does(func(h *hostile, l *link.Live, in *stream.Incoming) {
						if in.Header.Kind == stream.Next {
							c.leads(s, in)
							return
						}
						in.Refuse(stream.CodeAbsent, "")
					})
					second, _ := w.relayAt(nextAddr, nil)
					w.relayAt(thirdAddr, nil)
					for addr, who := range map[string]string{nextAddr: "second's", thirdAddr: "third's"} {
						w.outlet("a", w.member(serves("a")), s.named("a by "+who), func(c *relay.Client) { c.Addr = addr })
					}
					w.direct("a", w.member(serves("a")), s.named("a directly"))
					bot := w.member(agent)
					first := w.client(bot, nil)
					next := w.client(bot, func(c *relay.Client) {
						c.Addr, c.Dial = "b", first.Hop("b")
						if pin {
							c.ID = second.Self.ID()
						}
					})
					want := c.open
					if pin {
						want = c.pinned
					}
					if found, err := s.ask(w.inlet("a", bot, next), 20*time.Second); found != want || (err == nil) != (want != "") {
						t.Errorf("it found %q, %v; want %q", found, err, want)
					}
					for _, v := range s.seen() {
						if v != want {
							t.Errorf("a stream came to %s", v)
						}
					}
					if n := s.took.Load(); pin && n != 0 || !pin && min(n, 1) != c.took {
						t.Errorf("%d times the first passed for the second", n)
					}
				})
			})
		}
	}
}

// carries has the one that registered a name as the i-th bring its carrier.
func (h *hostile) carries(name string, i int) (registration *stream.Conn, session *yamux.Session) {
	h.Helper()
	h.until("it is registered", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		if len(h.registered[name]) > i {
			registration = h.registered[name][i]
		}
		return registration != nil
	})
	id, shown := h.expect()
	registration.Write(makeOffer(2, id, [32]byte{}))
	config := yamux.DefaultConfig()
	config.LogOutput = io.Discard
	session, err := yamux.Server(h.await(shown), config)
	if err != nil {
		h.Fatal(err)
	}
	return registration, session
}

// A relay that ends registrations and keeps their carriers would have an outlet hold one more for each.
func TestAnOutletEndsACarrierThatItsRelayKeepsForNothing(t *testing.T) {
	idle := *relay.CarrierIdle
	*relay.CarrierIdle = 50 * time.Millisecond
	defer func() { *relay.CarrierIdle = idle }()
	with(t, relay.Yamux, func(w *town) {
		h := w.hostileAt(relayAddr, honest)
		ln := w.client(w.member(serves("db")), by(relay.Yamux)).Listen("db", nil)
		var sessions []*yamux.Session
		for i := range 3 {
			registration, session := h.carries("db", i)
			sessions = append(sessions, session)
			if i == 2 { // and one that is in use
				id, _ := h.expect()
				registration.Write(makeOffer(1, id, random32()))
				y, err := session.AcceptStream()
				if err != nil {
					t.Fatal(err)
				}
				lane, err := ln.Accept()
				if err != nil {
					t.Fatal(err)
				}
				registration.Reset(stream.CodeAway, "")
				w.until("the others end", func() bool { return sessions[0].IsClosed() && sessions[1].IsClosed() })
				w.passes([2]net.Conn{lane, y})
				y.Close()
				stream.Abort(lane)
				w.until("it ends behind its lane", session.IsClosed)
				return
			}
			registration.Reset(stream.CodeAway, "")
		}
	})
}

// counting counts the lines of a log that say what.
type counting struct {
	n    *atomic.Int32
	what string
}

func (c counting) Enabled(context.Context, slog.Level) bool { return true }
func (c counting) WithAttrs([]slog.Attr) slog.Handler       { return c }
func (c counting) WithGroup(string) slog.Handler            { return c }
func (c counting) Handle(_ context.Context, r slog.Record) error {
	if r.Message == c.what {
		c.n.Add(1)
	}
	return nil
}

// A lane that fails at once holds what the relay has sent for it until the relay ends it.
func TestARelayThatKeepsStreamsOfACarrierIsGivenNoMore(t *testing.T) {
	const offers = 1000
	with(t, relay.Yamux, func(w *town) {
		h := w.hostileAt(relayAddr, honest)
		var refused, kept atomic.Int32
		ln := w.client(w.member(serves("db")), func(c *relay.Client) {
			c.Carrier = relay.Yamux
			c.Logger = slog.New(counting{&refused, "a lane could not be opened"})
		}).Listen("db", nil)
		w.run(func(ctx context.Context) error {
			for {
				lane, err := ln.Accept()
				if err != nil {
					return nil
				}
				go func() {
					lane.Read(make([]byte, 1)) // what is no handshake
					lane.Close()
				}()
			}
		})
		registration, session := h.carries("db", 0)
		go func() {
			for {
				y, err := session.AcceptStream()
				if err != nil {
					return
				}
				y.Write([]byte{0})
				kept.Add(1)
			}
		}()
		id, _ := h.expect()
		for range offers {
			registration.Write(makeOffer(1, id, random32()))
		}
		w.until("each offer is answered", func() bool { return kept.Load()+refused.Load() >= offers })
		if n := kept.Load(); n < relay.CarrierStreams || n > relay.CarrierStreams+64 { // 64 are opened at once
			t.Errorf("it has %d streams", n)
		}
		session.Close()
		ln.Close()
	})
}

func TestARelayOpensNoStreamInACarrier(t *testing.T) {
	with(t, relay.Yamux, func(w *town) {
		h := w.hostileAt(relayAddr, honest)
		at := w.client(w.member(serves("db")), by(relay.Yamux))
		ln := at.Listen("db", nil)
		_, session := h.carries("db", 0)
		if y, err := session.OpenStream(); err == nil {
			y.Write(append(channel.Preface{Kind: channel.KindLane, ID: random16()}.Append(nil), make([]byte, 1000)...))
		}
		select {
		case <-session.CloseChan():
		case <-time.After(10 * time.Second):
			t.Error("it goes on")
		}
		session.Close()
		ln.Close()
	})
}
