package channel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/alloc"
	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/memnet"
)

// A bubble of synctest fails a test that leaves a goroutine behind: every test
// here that uses one also checks that nothing is left of a channel.

func TestChannelCarriesFramesBothWays(t *testing.T) {
	for name, suite := range suites {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := newSides(t)
				a.config.Suite, a.config.Pin = suite, b.self.ID()
				x, y := memnet.Pipe(memnet.Link{Latency: 20 * time.Millisecond})
				reopen(t, a, b, x, y)
				if a.end.Binding() != b.end.Binding() || a.end.Peer().ID() != b.self.ID() || b.end.Peer().ID() != a.self.ID() {
					t.Error("the ends do not agree on who they are")
				}
				if rtt := a.end.RTT(); rtt < 40*time.Millisecond || rtt > 60*time.Millisecond {
					t.Errorf("the handshake's round trip is %v", rtt)
				}
				check(t, a.send(new(buffer.Queue), []byte("there")))
				check(t, b.send(new(buffer.Queue), []byte("and back")))
				synctest.Wait()
				time.Sleep(time.Second)
				if got := b.got.all(); len(got) != 1 || string(got[0]) != "there" {
					t.Errorf("%q arrived there", got)
				}
				if got := a.got.all(); len(got) != 1 || string(got[0]) != "and back" {
					t.Errorf("%q came back", got)
				}
				check(t, a.end.Close())
				if err := <-a.ran; err != ErrClosed {
					t.Errorf("the closing end: %v", err)
				}
				if err := <-b.ran; err != ErrClosed {
					t.Errorf("the other end: %v", err)
				}
				if a.config.Logger != nil {
					t.Error("the caller's Config was changed")
				}
			})
		})
	}
}

func TestPinnedIdentityIsCheckedBeforeMessage3Leaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newSides(t)
		a.config.Pin = newSelf(t).ID()
		x, y := memnet.Pipe(memnet.Link{})
		sent := 0
		x.OnWrite(func(off int64, b []byte) []byte { sent += len(b); return b })
		errA, errB := meet(a, b, x, y)
		if r := (*Refused)(nil); !errors.As(errA, &r) || !errors.Is(errA, ErrPin) {
			t.Errorf("the initiator: %v", errA)
		}
		if errB == nil {
			t.Error("the responder has a channel")
		}
		if sent != PrefaceSize+2+message1 {
			t.Errorf("%d bytes left the initiator, message 1 has %d", sent, PrefaceSize+2+message1)
		}
	})
}

// stranger drives one end of a lane by hand.
type stranger struct {
	*opening
	t testing.TB
}

// initiates runs the handshake as an initiator, without a confirmation.
func initiates(t testing.TB, s *side, lane net.Conn) *stranger {
	t.Helper()
	p := Preface{Kind: s.config.Kind, Suite: AESGCM}
	o := &opening{lane: lane, config: s.config}
	h := begun(t, s.self, true, p, [32]byte{})
	must(lane.Write(appendField(p.Append(nil), must(h.write1())(t))))(t)
	check(t, h.read2(must(o.readMessage(message2Least, message2Most))(t)))
	must(lane.Write(appendField(nil, must(h.write3())(t))))(t)
	check(t, o.keys(h, h.toR, h.toI))
	return &stranger{o, t}
}

// responds runs the handshake as a responder, without a confirmation.
func responds(t testing.TB, s *side, lane net.Conn) *stranger {
	t.Helper()
	p := must(ReadPreface(lane))(t)
	o := &opening{lane: lane, config: s.config}
	h := begun(t, s.self, false, p, [32]byte{})
	check(t, h.read1(must(o.readMessage(message1, message1))(t)))
	must(lane.Write(appendField(nil, must(h.write2())(t))))(t)
	check(t, h.read3(must(o.readMessage(message3Least, message3Most))(t)))
	check(t, o.keys(h, h.toI, h.toR))
	return &stranger{o, t}
}

func TestRefusedResponderNeverSeesTheInitiatorsCredential(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newSides(t)
		a.config.Judge = func(p *identity.Peer) error {
			if p.Credential() == nil {
				t.Error("the initiator judges before it knows the credential")
			}
			return errors.New("it may not serve orders-db")
		}
		x, y := memnet.Pipe(memnet.Link{})
		result := make(chan error)
		go func() {
			_, err := Initiate(context.Background(), x, a.config)
			result <- err
		}()
		s := responds(t, b, y)
		check(t, s.writeConfirm())
		plain, err := s.readRecord()
		check(t, err)
		kind, _, body, rest, err := cutFrame(plain)
		check(t, err)
		if kind != kindClose || len(rest) != 0 || body[0] != byte(CloseRefused) || string(body[1:]) != "it may not serve orders-db" {
			t.Errorf("the responder is told %q in a frame of kind %d", body, kind)
		}
		if rest, err := io.ReadAll(y); len(rest) != 0 || err != nil {
			t.Errorf("%d bytes follow (%v)", len(rest), err)
		}
		y.Close()
		if r := (*Refused)(nil); !errors.As(<-result, &r) {
			t.Error("the initiator does not say that it refused")
		}
	})
}

func TestConfirmationRules(t *testing.T) {
	no := func(*identity.Peer) error { return errors.New("not today") }
	naked := func(s *side) { s.self = mustSelf(); s.config.Self = s.self }
	foreign := func(s *side) {
		other := mustSelf()
		s.self = mustSelf()
		c, err := other.Issue(s.self.ID(), s.self.Latest(), nil, time.Now(), time.Now().Add(2*time.Hour))
		if err == nil {
			err = s.self.Renew(c, other.History())
		}
		if err != nil {
			panic(err)
		}
		s.config.Self = s.self
	}
	late := func(d time.Duration) func(*side) {
		return func(s *side) { s.config.Now = func() time.Time { return time.Now().Add(d) } }
	}
	for name, tt := range map[string]struct {
		a, b    func(*side) // changes to the sides, initiator and responder
		refuses string      // "a" or "b"; "": nobody
		text    string      // in the refusal
	}{
		"both show one":                                      {},
		"initiator shows none":                               {a: naked, refuses: "b", text: "no credential"},
		"responder shows none":                               {b: naked, refuses: "a", text: "no credential"},
		"initiator shows none, taken":                        {a: naked, b: func(s *side) { s.config.Proofless = true }},
		"responder shows none, taken":                        {a: func(s *side) { s.config.Proofless = true }, b: naked},
		"initiator's is of a foreign authority":              {a: foreign, b: func(s *side) {}, refuses: "b", text: "authority"},
		"responder's is of a foreign authority":              {b: foreign, refuses: "a", text: "authority"},
		"a foreign one is refused also where none is needed": {a: foreign, b: func(s *side) { s.config.Proofless = true }, refuses: "b", text: "authority"},
		"initiator's has expired by the responder's clock":   {b: late(61 * time.Minute), refuses: "b", text: "expired"},
		"responder's has expired by the initiator's clock":   {a: late(61 * time.Minute), refuses: "a", text: "expired"},
		"initiator's is for later":                           {b: late(-3 * time.Minute), refuses: "b", text: "valid from"},
		"the responder's judge says no":                      {b: func(s *side) { s.config.Judge = no }, refuses: "b", text: "not today"},
		"the initiator's judge says no":                      {a: func(s *side) { s.config.Judge = no }, refuses: "a", text: "not today"},
		"without a judge everybody is refused":               {b: func(s *side) { s.config.Judge = nil }, refuses: "b", text: "nobody"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := newSides(t)
				for _, f := range []struct {
					s *side
					f func(*side)
				}{{a, tt.a}, {b, tt.b}} {
					if f.f != nil {
						f.f(f.s)
					}
				}
				x, y := memnet.Pipe(memnet.Link{Latency: time.Millisecond})
				errA, errB := meet(a, b, x, y)
				if tt.refuses == "" {
					check(t, errors.Join(errA, errB))
					a.run()
					b.run()
					a.end.Close()
					return
				}
				here, there := errA, errB
				if tt.refuses == "b" {
					// The initiator has its channel, and hears of the refusal there.
					check(t, errA)
					a.run()
					here, there = errB, <-a.ran
				}
				if r := (*Refused)(nil); !errors.As(here, &r) || !strings.Contains(here.Error(), tt.text) {
					t.Errorf("who refuses says: %v", here)
				}
				closed := (*Closed)(nil)
				if !errors.As(there, &closed) || closed.Code != CloseRefused || !strings.Contains(closed.Reason, tt.text) {
					t.Errorf("who is refused is told: %v", there)
				}
			})
		})
	}
}

func mustSelf() *identity.Self {
	s, err := identity.NewSelf()
	if err != nil {
		panic(err)
	}
	return s
}

// What arrives before the confirmation, in whatever order, has no effect: no
// channel begins, nobody is judged, and no frame reaches anything.
func TestNothingBeforeTheConfirmationHasAnEffect(t *testing.T) {
	data := append(AppendHeader(nil, 0x10, 1, 4), "open"...)
	junk := append([]byte{0, byte(len(data) + 16)}, append(data, make([]byte, 16)...)...)
	sealed := func(s *stranger) []byte {
		rec := append(append([]byte{0, 0}, data...), make([]byte, 16)...)
		check(s.t, s.out.seal(rec))
		return rec
	}
	for name, act := range map[string]func(t *testing.T, a *side, lane net.Conn){
		"a frame in clear instead of the preface": func(t *testing.T, a *side, lane net.Conn) {
			lane.Write(junk)
			lane.Write(junk)
		},
		"behind the preface": func(t *testing.T, a *side, lane net.Conn) {
			lane.Write(append(Preface{Kind: Service, Suite: AESGCM}.Append(nil), junk...))
		},
		"behind message 1": func(t *testing.T, a *side, lane net.Conn) {
			p := Preface{Kind: Service, Suite: AESGCM}
			h := begun(t, a.self, true, p, [32]byte{})
			lane.Write(append(appendField(p.Append(nil), must(h.write1())(t)), junk...))
		},
		"behind message 3, in clear": func(t *testing.T, a *side, lane net.Conn) {
			initiates(t, a, lane)
			lane.Write(junk)
		},
		"behind message 3, sealed": func(t *testing.T, a *side, lane net.Conn) {
			lane.Write(sealed(initiates(t, a, lane)))
		},
		"in the confirmation's record, behind it": func(t *testing.T, a *side, lane net.Conn) {
			s := initiates(t, a, lane)
			frame, _ := appendConfirm(nil, kindConfirm, &Config{Kind: Service, Self: a.self})
			s.writeRecord(append(frame, data...))
		},
		"in the confirmation's record, before it": func(t *testing.T, a *side, lane net.Conn) {
			s := initiates(t, a, lane)
			frame, _ := appendConfirm(nil, kindConfirm, &Config{Kind: Service, Self: a.self})
			s.writeRecord(append(bytes.Clone(data), frame...))
		},
		"a renewal instead of a confirmation": func(t *testing.T, a *side, lane net.Conn) {
			s := initiates(t, a, lane)
			frame, _ := appendConfirm(nil, kindCredential, &Config{Kind: Service, Self: a.self})
			s.writeRecord(frame)
		},
		"a confirmation of a stream": func(t *testing.T, a *side, lane net.Conn) {
			s := initiates(t, a, lane)
			frame, _ := appendConfirm(nil, kindConfirm, &Config{Kind: Service, Self: a.self})
			frame[4] = 1
			s.writeRecord(frame)
		},
	} {
		t.Run("initiator, "+name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := newSides(t)
				b.config.Judge = func(*identity.Peer) error {
					t.Error("the responder judges")
					return nil
				}
				x, y := memnet.Pipe(memnet.Link{})
				result := make(chan error, 1)
				go func() {
					e, err := Respond(context.Background(), y, b.config)
					if e != nil {
						t.Error("there is a channel")
					}
					result <- err
				}()
				act(t, a, x)
				err := <-result
				if !errors.Is(err, ErrHandshake) && !errors.Is(err, ErrPreface) {
					t.Errorf("the responder: %v", err)
				}
				x.Close()
			})
		})
	}
	t.Run("responder, a frame instead of the confirmation", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			a, b := newSides(t)
			a.config.Judge = func(*identity.Peer) error {
				t.Error("the initiator judges")
				return nil
			}
			x, y := memnet.Pipe(memnet.Link{})
			result := make(chan error, 1)
			go func() {
				_, err := Initiate(context.Background(), x, a.config)
				result <- err
			}()
			s := responds(t, b, y)
			y.Write(sealed(s))
			if err := <-result; err != ErrHandshake {
				t.Errorf("the initiator: %v", err)
			}
			y.Close()
		})
	})
}

// Whatever was altered, each end has one thing to say: that it did not verify,
// or that the other end hung up.
func TestNoErrorTellsWhereAHandshakeFailed(t *testing.T) {
	hungUp := lost(io.EOF).Error()
	step := int64(61)
	if alloc.Raced {
		step = 307
	}
	for direction := range 2 {
		for off, hit := int64(0), true; hit; off += step {
			synctest.Test(t, func(t *testing.T) {
				a, b := newSides(t)
				x, y := memnet.Pipe(memnet.Link{})
				tapped, length := x, false
				if direction == 1 {
					tapped = y
				}
				hit = false
				altered := false
				tapped.OnWrite(func(start int64, b []byte) []byte {
					i := off - start
					if start == 0 && direction == 0 && i < PrefaceSize {
						hit = true
						return b // not part of the handshake: it says ErrPreface
					}
					if i >= 0 && i < int64(len(b)) {
						b[i] ^= 0x20
						hit, altered = true, true
						// Of a length that is longer now the rest is waited for.
						head := int64(0)
						if start == 0 && direction == 0 {
							head = PrefaceSize
						}
						length = i < head+2 && i >= head
					}
					return b
				})
				errA, errB := meet(a, b, x, y)
				if !altered {
					check(t, errors.Join(errA, errB))
					a.run()
					b.run()
					a.end.Close()
					return
				}
				if errA == nil { // it was in the initiator's confirmation
					a.run()
					<-a.ran
				}
				if errB == nil {
					t.Fatalf("direction %d, byte %d: the responder has a channel", direction, off)
				}
				for _, err := range []error{errA, errB} {
					if err == nil || length {
						continue
					}
					if text := err.Error(); text != ErrHandshake.Error() && text != hungUp {
						t.Errorf("direction %d, byte %d: %q", direction, off, text)
					}
				}
			})
			if t.Failed() {
				return
			}
			if !hit && off < message2Least {
				t.Errorf("direction %d ends at byte %d", direction, off)
			}
		}
	}
}

// lies is a lane that gives some bytes and then says how long the next message is.
type lies struct {
	net.Conn
	t      testing.TB
	bytes  []byte
	misled bool
}

func (l *lies) Read(b []byte) (int, error) {
	if len(l.bytes) == 0 {
		l.misled = true
		return 0, io.ErrUnexpectedEOF
	}
	n := copy(b, l.bytes)
	l.bytes = l.bytes[n:]
	return n, nil
}

func TestLengthThatLiesIsRefusedBeforeAllocation(t *testing.T) {
	tried := 0
	for _, tt := range []struct {
		name        string
		least, most int
	}{
		{"message 1", message1, message1},
		{"message 2", message2Least, message2Most},
		{"message 3", message3Least, message3Most},
	} {
		for _, n := range []int{0, 1, tt.least - 1, tt.most + 1, 32768, 65535} {
			tried++
			prefix := binary.BigEndian.AppendUint16(nil, uint16(n))
			lane := &lies{t: t}
			o := &opening{lane: lane}
			cost := allocated(100, func() {
				lane.bytes = prefix
				if _, err := o.readMessage(tt.least, tt.most); err != ErrHandshake {
					t.Fatalf("%s of length %d: %v", tt.name, n, err)
				}
			})
			if lane.misled || cost > 64 {
				t.Errorf("%s of length %d: asked for the rest: %v, allocated %d bytes", tt.name, n, lane.misled, cost)
			}
		}
	}
	for _, n := range []int{0, 1, 16, maxConfirm + 17, 65535} {
		tried++
		prefix := binary.BigEndian.AppendUint16(nil, uint16(n))
		lane := &lies{t: t}
		o := &opening{lane: lane}
		cost := allocated(100, func() {
			lane.bytes = prefix
			if _, err := o.readRecord(); err != ErrHandshake {
				t.Fatalf("confirmation of length %d: %v", n, err)
			}
		})
		if lane.misled || cost > 64 {
			t.Errorf("confirmation of length %d: asked for the rest: %v, allocated %d bytes", n, lane.misled, cost)
		}
	}
	t.Logf("F-23: %d lengths that lie are refused before anything is allocated", tried)
}

// allocated is how many bytes a call of f allocates.
func allocated(n uint64, f func()) uint64 {
	f()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range n {
		f()
	}
	runtime.ReadMemStats(&after)
	return (after.TotalAlloc - before.TotalAlloc) / n
}

// counted counts what is read from a lane.
type counted struct {
	net.Conn
	read int
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.read += n
	return n, err
}

func TestStrangerCostsAtMost16KiB(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newSides(t)
		x, y := memnet.Pipe(memnet.Link{})
		lane := &counted{Conn: y}
		result := make(chan error, 1)
		go func() {
			_, err := Respond(context.Background(), lane, b.config)
			result <- err
		}()
		s := initiates(t, a, x)
		// The longest confirmation, and as much behind it as the lane takes.
		rec := append(binary.BigEndian.AppendUint16(nil, maxConfirm+16), make([]byte, 1<<15)...)
		s.lane.Write(rec)
		if err := <-result; err != ErrHandshake {
			t.Errorf("the responder: %v", err)
		}
		longest := lane.read + message3Most - message3Least // as if message 3 had been the longest too
		if longest > 16<<10 {
			t.Errorf("the responder read up to %d bytes", longest)
		}
		x.Close()
	})
}

// slow writes its first bytes at once and then one a second.
type slow struct {
	net.Conn
	quick int
}

func (s *slow) Write(b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		size := min(max(s.quick, 1), len(b)-n)
		if s.quick == 0 {
			time.Sleep(time.Second)
		}
		_, err = s.Conn.Write(b[n : n+size])
		s.quick = max(s.quick-size, 0)
		n += size
	}
	return n, err
}

func TestRespondEndsAfter10SecondsHoweverSlowlyItIsFed(t *testing.T) {
	first := PrefaceSize + 2 + message1
	for name, quick := range map[string]int{
		"from the preface":      0,
		"from message 1":        PrefaceSize + 2,
		"from message 3":        first + 2,
		"from the confirmation": first + 400,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := newSides(t)
				x, y := memnet.Pipe(memnet.Link{})
				begin := time.Now()
				go func() {
					Initiate(context.Background(), &slow{x, quick}, a.config)
					x.Close()
				}()
				_, err := Respond(context.Background(), y, b.config)
				if d := time.Since(begin); err == nil || d != handshakeTime {
					t.Errorf("ended after %v with %v", d, err)
				}
			})
		})
	}
}

func TestInitiateEndsWhenItsContextDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := newSides(t)
		x, _ := memnet.Pipe(memnet.Link{})
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(3*time.Second, cancel)
		begin := time.Now()
		_, err := Initiate(ctx, x, a.config)
		if d := time.Since(begin); d != 3*time.Second || !errors.Is(err, context.Canceled) {
			t.Errorf("ended after %v with %v", d, err)
		}
		if _, err := x.Write(nil); err == nil {
			t.Error("the lane is open after Initiate failed")
		}
	})
}

func TestLaneKeyBindsTheChannelToItsLane(t *testing.T) {
	key := [32]byte{1}
	for name, tt := range map[string]struct {
		wrap func(x, y net.Conn) (net.Conn, net.Conn)
		ok   bool
	}{
		"the same":           {func(x, y net.Conn) (net.Conn, net.Conn) { return &Lane{Conn: x, Key: key}, &Lane{Conn: y, Key: key} }, true},
		"the same, by value": {func(x, y net.Conn) (net.Conn, net.Conn) { return Lane{Conn: x, Key: key}, &Lane{Conn: y, Key: key} }, true},
		"another": {func(x, y net.Conn) (net.Conn, net.Conn) {
			return &Lane{Conn: x, Key: key}, &Lane{Conn: y, Key: [32]byte{2}}
		}, false},
		"none at one end":     {func(x, y net.Conn) (net.Conn, net.Conn) { return x, &Lane{Conn: y, Key: key} }, false},
		"none, by value, too": {func(x, y net.Conn) (net.Conn, net.Conn) { return x, Lane{Conn: y, Key: key} }, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := newSides(t)
				x, y := memnet.Pipe(memnet.Link{})
				l, m := tt.wrap(x, y)
				errA, errB := meet(a, b, l, m)
				if (errA == nil) != tt.ok || (errB == nil) != tt.ok {
					t.Fatalf("%v, %v", errA, errB)
				}
				if tt.ok {
					a.run()
					b.run()
					a.end.Close()
				}
			})
		})
	}
}

func TestPrefaceThatIsRewrittenEndsTheChannel(t *testing.T) {
	for at := range PrefaceSize {
		synctest.Test(t, func(t *testing.T) {
			a, b := newSides(t)
			x, y := memnet.Pipe(memnet.Link{})
			x.OnWrite(func(off int64, b []byte) []byte {
				if off == 0 {
					b[at] ^= 3 // of suite 1 it makes suite 2, which is known
				}
				return b
			})
			errA, errB := meet(a, b, x, y)
			if errA == nil || errB == nil {
				t.Errorf("byte %d: %v, %v", at, errA, errB)
			}
		})
	}
}

func TestOneConfigServesManyChannelsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newSides(t)
		type pair struct{ a, b *side }
		pairs := make(chan pair, 8)
		for range cap(pairs) {
			go func() {
				x, y := memnet.Pipe(memnet.Link{})
				p := pair{
					&side{config: a.config, got: new(frames), ran: make(chan error, 1)},
					&side{config: b.config, got: new(frames), ran: make(chan error, 1)},
				}
				reopen(t, p.a, p.b, x, y)
				pairs <- p
			}()
		}
		for range cap(pairs) {
			p := <-pairs
			p.a.end.Close()
			if err := <-p.b.ran; err != ErrClosed {
				t.Error(err)
			}
		}
	})
}

func TestChannelNeedsANode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newSides(t)
		b.config.Node = nil
		x, y := memnet.Pipe(memnet.Link{})
		_, errB := meet(a, b, x, y)
		if errB == nil {
			t.Error("there is a channel without actors")
		}
		if a.end != nil {
			a.run()
			if err := <-a.ran; !errors.Is(err, ErrCut) {
				t.Error(err)
			}
		}
	})
}

func ExampleClosed() {
	fmt.Println(&Closed{CloseRefused, "its credential expired"})
	// Output: the other end refused us: its credential expired
}

func TestALaneShowsItsKeyNowhere(t *testing.T) {
	l := Lane{Key: [32]byte{0xab, 0xcd, 0xef, 0x12}}
	var log bytes.Buffer
	for _, h := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
		slog.New(h).Info("a lane", "value", l, "pointer", &l)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d"} {
		fmt.Fprintf(&log, verb+" "+verb+"\n", l, &l)
	}
	if text := strings.ToLower(log.String()); strings.Contains(text, "abcdef") || strings.Contains(text, "171 205") || strings.Contains(text, "171, 205") || strings.Contains(text, "171,205") || strings.Contains(text, "0xab") {
		t.Errorf("the key is in\n%s", text)
	}
}
