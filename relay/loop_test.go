package relay_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/relay"
)

// loopCost bounds what one step in a loop of relays may cost, on all connections
// together: WireGuard's bar for its own.
const loopCost = 70_000

// meter has every connection from now on counted: all bytes that are written to it,
// by whomever.
func (w *town) meter() *atomic.Int64 {
	var n atomic.Int64
	count := func(_ int64, b []byte) []byte {
		n.Add(int64(len(b)))
		return b
	}
	w.tap = func(dialer, listener *memnet.Conn) {
		dialer.OnWrite(count)
		listener.OnWrite(count)
	}
	return &n
}

// ring starts relays at the addresses, each of which has the one behind it as its
// next, and the last the first.
func (w *town) ring(addrs ...string) (relays []*relay.Server) {
	w.Helper()
	next, err := abac.ShortAny("next", `true`)
	if err != nil {
		w.Fatal(err)
	}
	for i, addr := range addrs {
		s, _ := w.relayAt(addr, func(s *relay.Server) {
			s.Next, s.AllowNext = map[string]relay.Hop{"on": {Addr: addrs[(i+1)%len(addrs)]}}, next
		})
		relays = append(relays, s)
	}
	return relays
}

// goOn has a control channel with the relay behind last's, and says what became of it.
func (w *town) goOn(last *relay.Client) (c *relay.Client, s link.State, stop func()) {
	w.Helper()
	told := make(chan link.State, 8)
	c = &relay.Client{
		Addr: "on", Dial: last.Hop("on"), Node: w.node(), Self: last.Self, Trust: w.trust(),
		OnState: func(s link.State) {
			select {
			case told <- s:
			default:
			}
		},
	}
	stop = w.run(c.Run)
	s = <-told
	synctest.Wait()
	return c, s, stop
}

func TestALoopOfRelaysEndsBehindEightHops(t *testing.T) {
	for name, addrs := range map[string][]string{
		"two, each the next of the other": {relayAddr, nextAddr},
		"one that is its own next":        {relayAddr},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(w *town) {
				all := w.meter()
				relays := w.ring(addrs...)
				at := w.client(w.member(agent), nil)
				cost := func(f func()) int64 {
					synctest.Wait()
					before := all.Load()
					f()
					synctest.Wait()
					return all.Load() - before
				}
				ask := func() {
					if _, err := at.Names(context.Background()); err != nil {
						t.Error(err)
					}
				}
				ask() // waits until the first is there
				near := cost(ask)
				var stops []func()
				var most int64
				hops := 0
				for ; hops < 20; hops++ {
					var state link.State
					step := cost(func() {
						var next *relay.Client
						var stop func()
						if next, state, stop = w.goOn(at); state.Kind == link.Ready {
							at = next
						}
						stops = append(stops, stop)
					})
					if most = max(most, step); step >= loopCost {
						t.Errorf("hop %d costs %d bytes", hops+1, step)
					}
					if state.Kind != link.Ready {
						if state.Kind != link.Refused || code(state.Err) != stream.CodeRefused {
							t.Errorf("behind %d hops: %v, %s", hops, state.Kind, state.Reason)
						}
						break
					}
				}
				if hops != channel.MaxHops {
					t.Errorf("the way ends behind %d hops", hops)
				}
				far := cost(ask)
				// Twice that: whether a credit goes with an answer or by itself is chance.
				if far > 2*near*(channel.MaxHops+1) {
					t.Errorf("a question costs %d bytes at the first and %d at the last", near, far)
				}
				t.Logf("F-25: a loop: at most %d bytes a hop; a question costs %d bytes, and %d behind %d hops", most, near, far, hops)
				for i := len(stops) - 1; i >= 0; i-- {
					stops[i]()
				}
				for i, s := range relays {
					w.until(fmt.Sprintf("no lane is left at relay %d", i), func() bool { return s.Lanes() == 0 })
				}
			})
		})
	}
}

// Whoever has gone round asks for the next hop by a way of its own, on which nothing
// is counted, and shows the id on the connection that has gone round.
func TestHopsAreCountedOnTheConnectionThatIsPassedOn(t *testing.T) {
	in(t, func(w *town) {
		relays := w.ring(relayAddr)
		self := w.member(agent)
		at := w.client(self, nil)
		for range channel.MaxHops - 1 {
			at, _, _ = w.goOn(at)
		}
		c, err := at.Hop("on")(context.Background(), "tcp", "")
		if err != nil {
			t.Fatal(err)
		}
		lane := c.(*channel.Lane).Conn // has passed eight relays
		st, err := w.puppet(self).ask(stream.Header{Kind: stream.Next, Name: "on"})
		if err != nil {
			t.Fatal(err)
		}
		id := w.offer(st)
		before := relays[0].Lanes()
		lane.Write(channel.Preface{Kind: channel.KindLane, ID: id}.Append(nil))
		w.isReset(lane)
		synctest.Wait()
		if n := relays[0].Lanes(); n >= before {
			t.Errorf("%d lanes, before %d", n, before)
		}
		stream.Abort(lane)
	})
}

// A carrier that has gone round has brought its lanes with it.
func TestTheLanesOfACarrierHavePassedAsManyRelaysAsIt(t *testing.T) {
	with(t, relay.Yamux, func(w *town) {
		w.ring(relayAddr)
		self := w.member(serves("db"))
		p := w.puppet(self)
		offers, id := p.carrying("db")
		conn, err := w.net.Dial(context.Background(), "mem", relayAddr)
		if err != nil {
			t.Fatal(err)
		}
		conn.Write(channel.Preface{Kind: channel.Carrier, ID: id}.Append(channel.HopPreface(channel.MaxHops).Append(nil)))
		session := w.carries(conn)
		caller := w.show(channel.KindLane, w.puppet(w.member(agent)).offered())
		w.offer(offers) // and a stream is expected
		next, err := p.ask(stream.Header{Kind: stream.Next, Name: "on"})
		if err != nil {
			t.Fatal(err)
		}
		lane, err := session.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		lane.Write(channel.Preface{Kind: channel.KindLane, ID: w.offer(next)}.Append(nil))
		lane.SetReadDeadline(time.Now().Add(5 * time.Second)) // the next relay would wait for longer
		if _, err := lane.Read(make([]byte, 1)); err == nil || isTimeout(err) {
			t.Errorf("it goes on behind %d relays: %v", channel.MaxHops+1, err)
		}
		stream.Abort(caller)
		offers.Reset(stream.CodeLocal, "")
	})
}

// A count that is no count, or stands where nobody passes anything on, ends the
// connection at once.
func TestACountOfHopsIsTakenOnlyAsARelayWritesIt(t *testing.T) {
	in(t, func(w *town) {
		w.relay(nil)
		w.direct("db", w.member(serves("db")), echoing)
		hop := func(b ...byte) []byte {
			return append(append([]byte("prtl\x01\x12\x00\x00"), b...), make([]byte, 16-len(b))...)
		}
		for name, c := range map[string]struct {
			addr  string
			begin []byte
			ok    bool
		}{
			"of one":                 {relayAddr, hop(1), true},
			"of eight":               {relayAddr, hop(8), true},
			"of none":                {relayAddr, hop(0), false},
			"of nine":                {relayAddr, hop(9), false},
			"with more behind it":    {relayAddr, hop(1, 1), false},
			"twice":                  {relayAddr, append(hop(1), hop(1)...), false},
			"at an outlet's address": {outletAddr, hop(1), false},
		} {
			conn, err := w.net.Dial(context.Background(), "mem", c.addr)
			if err != nil {
				t.Fatal(err)
			}
			conn.Write(c.begin)
			conn.SetReadDeadline(time.Now().Add(time.Millisecond))
			_, err = conn.Read(make([]byte, 1))
			if open := isTimeout(err); open != c.ok {
				t.Errorf("%s: it reads %v", name, err)
			}
			conn.Close()
		}
	})
}
