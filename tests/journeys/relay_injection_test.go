package journeys_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/relay"
	"github.com/portal-tunnel/portal/routing"
	"github.com/portal-tunnel/portal/tests/fault/proxy"
)

// rough is where attackers come from: an address whose handshakes come to nothing has less than others.
const rough = "127.0.0.9"

// crossroads is a process of each role: an authority that listens and is found at a relay, that relay, an
// outlet behind it, and one that listens.
type crossroads struct {
	*meeting
	issuer identity.ID
	inner  *service // of the outlet db, behind the relay
	outer  *service // of the outlet admin, which is for members whose role is root
	doors  []door
}

func newCrossroads(t *testing.T) *crossroads {
	t.Helper()
	x := &crossroads{meeting: newBlindMeeting(t), inner: newService(t), outer: newService(t)}
	x.keeper = x.start("office", "authority", "--listen", "127.0.0.1:0", "--relay", x.pin+"@"+x.at)
	x.authority = x.line(x.keeper, `authority ready on (\S+) `)
	trust := x.line(x.keeper, `--trust (P[A-Z2-7]{52})$`)
	x.relay = x.start("relay", "relay", "--listen", x.at, "--trust", trust, "--allow-connect", `principal.role == "agent"`, "--next", "b="+free(t))
	x.line(x.keeper, `authority ready .*[^t] via `) // and not "not via"
	var err error
	if x.issuer, err = identity.ParseID(trust); err != nil {
		t.Fatal(err)
	}
	x.enroll("db1", "--serve", "db", "--serve", "admin")
	x.enroll("bot", "--attr", "role=agent")
	x.enroll("eve", "--attr", "role=guest", "--attr", "admin:=true", "--serve", "other", "--serve", "dba")
	x.meeting.outlet("db1", x.inner.addr())
	admin := x.start("db1", "outlet", "admin", "--listen", "127.0.0.1:0", "--to", x.outer.addr(), "--allow", `principal.role == "root"`)
	x.doors = []door{
		{"relay", x.relay, x.at, channel.Relay},
		{"authority", x.keeper, x.authority, channel.Authority},
		{"outlet", admin, x.line(admin, `outlet admin ready on ([^; ]+)`), channel.Service},
	}
	return x
}

// attackers are those whom no policy permits anything.
func (x *crossroads) attackers() map[string]*identity.Self {
	x.t.Helper()
	stranger, _ := nobody(x.t)
	foreign, _ := nobody(x.t)
	other, _ := nobody(x.t)
	now := time.Now()
	c, err := other.Issue(foreign.ID(), foreign.Latest(), identity.Attributes{"role": "root", "serve": []string{"db", "admin"}}, now, now.Add(time.Hour))
	if err == nil {
		err = foreign.Renew(c, other.History())
	}
	if err != nil {
		x.t.Fatal(err)
	}
	guest, _ := x.as("eve")
	return map[string]*identity.Self{"a stranger": stranger, "a member of another authority": foreign, "a guest": guest}
}

// mayAsk is what anybody may, or any member: questions to an authority, and of a relay for one.
func (x *crossroads) mayAsk(kind channel.Kind, self *identity.Self, h stream.Header) bool {
	switch {
	case kind == channel.Authority:
		return h.Kind == stream.Request && h.Body == nil && (h.Name == "enroll" || h.Name == "renew")
	case kind == channel.Relay && h.Kind == stream.Connect:
		return h.Name == relay.AuthorityName && string(h.Body) == string(x.issuer[:])
	case kind == channel.Relay && h.Kind == stream.Names:
		return h.Name == "" && h.Body == nil && self.Credential() != nil
	}
	return false
}

// message is one to an actor, as nodes would write it.
func message(t testing.TB, at routing.Address) []byte {
	t.Helper()
	route, err := routing.NewRoute(at, "db")
	if err != nil {
		t.Fatal(err)
	}
	b, err := (&routing.Message{Onward: route, Return: route, Body: []byte("open")}).AppendBinary(nil)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// attack is one of them at a door.
type attack struct {
	door
	self  *identity.Self
	trust *identity.Trust
	node  routing.Node
	live  *link.Live
	pace  *time.Ticker // of what may be asked
}

// dial has a channel, or nil when the door refuses the caller itself.
func (a *attack) dial(ctx context.Context) (*link.Live, error) {
	var last error
	for {
		select { // a door has room for so many tries of an address
		case <-a.pace.C:
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), last)
		}
		c, err := knock(ctx, rough, a.addr)
		if err != nil {
			return nil, err
		}
		l, err := link.Dial(ctx, c, &channel.Config{
			Node: &a.node, Self: a.self, Trust: a.trust, Kind: a.kind, Proofless: true, Judge: everybody,
		}, nil)
		if closed := (*channel.Closed)(nil); errors.As(err, &closed) && closed.Code == channel.CloseRefused {
			return nil, nil
		}
		if last = err; err != nil {
			continue // turned away, as tries without end are
		}
		if _, err := l.End.Measure(ctx); err != nil {
			l.Close(nil)
			return nil, ctx.Err() // else refused as soon as it said who it is
		}
		return l, nil
	}
}

// open says whether a header was admitted. A door may end a channel on which nothing comes of anything.
func (a *attack) open(ctx context.Context, h stream.Header) (admitted bool, err error) {
	for ctx.Err() == nil {
		select {
		case <-a.pace.C:
		case <-ctx.Done():
			return false, ctx.Err()
		}
		c, err := a.live.Mux.Open(h)
		if err == nil {
			err = c.Wait(ctx)
			c.Reset(stream.CodeLocal, "")
		}
		if err == nil {
			return true, nil
		}
		if refused := (*stream.RefusedError)(nil); errors.As(err, &refused) && refused.Code != stream.CodeBusy {
			return false, nil
		}
		if a.live.Err() != nil {
			a.live.Close(nil)
			if a.live, err = a.dial(ctx); err != nil {
				return false, err
			}
			if a.live == nil {
				return false, errors.New("it does not become a channel again")
			}
		}
	}
	return false, ctx.Err()
}

// Every kind of header with everything that might be taken for a name, at every role, by whoever is not
// permitted.
func TestNothingOfAnyProcessIsReachedByAHeaderThatNoPolicyPermits(t *testing.T) {
	t.Parallel()
	x := newCrossroads(t)
	names := []string{"db", "admin", "authority", "b", "", "canary", "*"}
	bodies := [][]byte{nil, x.issuer[:], make([]byte, 17)}
	if long() {
		names = append(names, "enroll", "renew", "nothing", "nothing/else", "DB", "../db", "db/", "/db", "db\x00", "db*", "admin/*", "db\n", "db admin")
		bodies = append(bodies, message(t, "canary"))
	}
	kinds := []stream.HeaderKind{0, stream.Bytes, stream.Probe, stream.Request, stream.PingTarget, stream.Register, stream.Connect, stream.Next, stream.Names, 9, 16, 255}
	trust := identity.NewTrust(x.issuer)
	var tried atomic.Int64
	var mu sync.Mutex
	var open []string
	var all sync.WaitGroup
	for who, self := range x.attackers() {
		for _, d := range x.doors {
			all.Go(func() {
				a := &attack{door: d, self: self, trust: trust, pace: time.NewTicker(50 * time.Millisecond)}
				defer a.pace.Stop()
				defer a.node.Close()
				var err error
				if a.live, err = a.dial(x.ctx); err != nil {
					t.Errorf("%s at the %s: %v", who, d.name, err)
				}
				if a.live == nil {
					return
				}
				defer func() { a.live.Close(nil) }()
				mu.Lock()
				open = append(open, who+" at the "+d.name)
				mu.Unlock()
				for _, kind := range kinds {
					for _, body := range bodies {
						for _, name := range names {
							h := stream.Header{Kind: kind, Name: name, Body: body}
							admitted, err := a.open(x.ctx, h)
							if err != nil {
								t.Errorf("%s at the %s: %v: %v", who, d.name, h, err)
								return
							}
							tried.Add(1)
							if admitted && !x.mayAsk(d.kind, self, h) {
								t.Errorf("%s at the %s: %v is admitted", who, d.name, h)
							}
						}
					}
				}
			})
		}
	}
	all.Wait()
	// The others are refused before they may ask. At an authority anybody may have come to enroll.
	slices.Sort(open)
	if want := []string{"a guest at the authority", "a guest at the outlet", "a guest at the relay", "a member of another authority at the authority", "a stranger at the authority", "a stranger at the relay"}; !slices.Equal(open, want) {
		t.Errorf("channels of %q, want %q", open, want)
	}
	x.untouched()
	t.Logf("F-25: between processes: %d headers on %d channels, nothing reached that no policy permits", tried.Load(), len(open))
}

// untouched wants that no service was reached, and that who may reach one still does.
func (x *crossroads) untouched() {
	x.t.Helper()
	// Each outlet asks its own target once, when it starts.
	for name, s := range map[string]*service{"db": x.inner, "admin": x.outer} {
		if n := s.accepted.Load() - 1; n != 0 {
			x.t.Errorf("%d connections came to %s", n, name)
		}
	}
	in, addr := x.inlet("bot", "0")
	ready(x.t, addr)
	in.Stop(patience)
}

// A raw connection reaches the handshake of its own, whatever it begins with; so does one that a relay
// joins to an outlet.
func TestARawConnectionToAnyProcessIsAnsweredByNothing(t *testing.T) {
	t.Parallel()
	x := newCrossroads(t)
	type way struct {
		name string
		dial func() (net.Conn, error)
	}
	var ways []way
	for _, d := range x.doors {
		ways = append(ways, way{d.name, func() (net.Conn, error) { return knock(x.ctx, rough, d.addr) }})
	}
	pace := time.NewTicker(50 * time.Millisecond)
	defer pace.Stop()
	bot := newCrowd(x.meeting, "bot").client
	ways = append(ways, way{"outlet behind the relay", func() (net.Conn, error) {
		for {
			c, err := bot.Lane(x.ctx, "db", identity.ID{})
			if err == nil {
				return c.(*channel.Lane).Conn, nil
			}
			// So many may wait for the outlet at once.
			if busy := (*stream.RefusedError)(nil); !errors.As(err, &busy) || busy.Code != stream.CodeBusy {
				return nil, err
			}
			<-pace.C
		}
	}})
	m := message(t, "db")
	record := append(binary.BigEndian.AppendUint16(nil, uint16(7+len(m))), 0x17, 0, 0, 0, 0)
	record = append(binary.BigEndian.AppendUint16(record, uint16(len(m))), m...)
	open := frame(nil, frameOpen, 1, opens(stream.Bytes, 1<<16, "db"))
	said := [][]byte{
		nil, []byte("GET / HTTP/1.1\r\nHost: db\r\n\r\n"), {0xff, 0xff}, make([]byte, 2+1232), m, record,
		append(binary.BigEndian.AppendUint16(nil, uint16(len(open))), open...),
	}
	var tried atomic.Int64
	var all sync.WaitGroup
	for _, kind := range []channel.Kind{0, channel.Relay, channel.Service, channel.Authority, 4, channel.KindLane, channel.Carrier, channel.Hop, 19, 255} {
		for _, text := range said {
			<-pace.C // within what an address may try
			for _, w := range ways {
				preface := channel.Preface{Kind: kind, ID: [16]byte{1}}
				if kind < channel.KindLane {
					preface = channel.Preface{Kind: kind, Suite: channel.AESGCM}
				}
				c, err := w.dial()
				if err != nil {
					t.Fatalf("%s: %v", w.name, err)
				}
				tried.Add(1)
				all.Go(func() {
					defer c.Close()
					c.SetDeadline(time.Now().Add(patience))
					c.Write(append(preface.Append(nil), text...))
					b, err := io.ReadAll(c)
					if late := (net.Error)(nil); errors.As(err, &late) && late.Timeout() {
						t.Errorf("%s: a connection of kind %v that goes on with %d bytes is there after %v", w.name, kind, len(text), patience)
					}
					if len(b) != 0 {
						t.Errorf("%s: a connection of kind %v that goes on with %d bytes is answered by %d", w.name, kind, len(text), len(b))
					}
				})
			}
		}
	}
	all.Wait()
	x.untouched()
	t.Logf("F-25: between processes: %d raw connections, nothing reached", tried.Load())
}

// While the outlet of a name is killed and comes back, another that may not serve it asks the relay for it
// again and again.
func TestNobodyTakesANameWhoseOutletIsKilled(t *testing.T) {
	t.Parallel()
	kills := 3
	if long() {
		kills = 25
	}
	s := newService(t)
	m := newMeeting(t)
	m.enroll("db1", "--serve", "db")
	m.enroll("eve", "--serve", "dba", "--serve", "db/*")
	m.enroll("bot", "--attr", "role=agent")
	out := m.outlet("db1", s.addr())
	_, addr := m.inlet("bot", "0")
	ready(t, addr)

	// register asks for the name as a host, and lets it go at once when it has it.
	register := func(host string) error {
		self, trust := m.as(host)
		a := &attack{door: door{"relay", m.relay, m.at, channel.Relay}, self: self, trust: trust, pace: time.NewTicker(50 * time.Millisecond)}
		defer a.pace.Stop()
		defer a.node.Close()
		l, err := a.dial(m.ctx)
		if err != nil || l == nil {
			t.Fatalf("%s has no channel: %v", host, err)
		}
		defer l.Close(nil)
		c, err := l.Mux.Open(stream.Header{Kind: stream.Register, Name: "db", Body: make([]byte, 17)})
		if err == nil {
			err = c.Wait(m.ctx)
		}
		return err
	}
	tries := 0
	thief := func(when string) {
		t.Helper()
		tries++
		if err := register("eve"); !isRefused(err) {
			t.Errorf("try %d, %s: %v", tries, when, err)
		}
	}
	for range kills {
		thief("beside its outlet")
		kill(t, out)
		thief("when its outlet was killed")
		m.fails("bot", 4, "wait", "db", "--timeout", "1s") // nobody serves it
		thief("when nobody serves it")
		out = m.outlet("db1", s.addr())
		thief("when its outlet is back")
		ready(t, addr)
	}
	if err := register("db1"); err != nil {
		t.Errorf("who may serve it cannot, nothing is proved: %v", err)
	}
	t.Logf("F-25: between processes: %d tries at a name whose outlet was killed %d times: none had it", tries, kills)
}

// isRefused says whether a policy said no.
func isRefused(err error) bool {
	refused := (*stream.RefusedError)(nil)
	return errors.As(err, &refused) && refused.Code == stream.CodeRefused
}

// Two relays are each the next of the other; what goes from one to the other is counted.
func TestALoopOfTwoRelayProcessesEndsBehindEightHops(t *testing.T) {
	t.Parallel()
	m := newHomes(t, "one")
	at := map[string]string{"one": free(t), "two": free(t)}
	var between []*proxy.Server
	to := map[string]string{}
	for host, next := range map[string]string{"one": "two", "two": "one"} {
		p, err := proxy.Listen("", at[next])
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		p.Record()
		between, to[host] = append(between, p), p.Addr()
	}
	one := m.start("one", "relay", "--listen", at["one"], "--authority", "--next", "on="+to["one"], "--allow-next", "true")
	m.line(one, `relay ready on`)
	m.enroll("bot", "--attr", "role=agent")
	m.line(m.start("two", "relay", "--listen", at["two"], "--trust", m.member("bot").String(), "--next", "on="+to["two"], "--allow-next", "true"), `relay ready on`)
	ids := map[string]identity.ID{}
	for host := range at {
		ids[host] = m.id(host)
	}
	size := func() (n int) {
		for _, p := range between {
			for _, tape := range p.Recorded() {
				n += len(tape)
			}
		}
		return n
	}

	self, trust := m.as("bot")
	node := new(routing.Node)
	ctx, cancel := context.WithCancel(m.ctx)
	var all sync.WaitGroup
	defer func() {
		cancel()
		all.Wait()
		node.Close()
	}()
	// comes has a control channel with a relay, and says what became of it.
	comes := func(host, addr string, dial func(ctx context.Context, network, addr string) (net.Conn, error)) (*relay.Client, link.State) {
		told := make(chan link.State, 1)
		c := &relay.Client{ID: ids[host], Addr: addr, Dial: dial, Node: node, Self: self, Trust: trust, OnState: func(s link.State) {
			select {
			case told <- s:
			default:
			}
		}}
		all.Go(func() { c.Run(ctx) })
		select {
		case s := <-told:
			return c, s
		case <-ctx.Done():
			t.Fatal("nothing became of a channel")
			return nil, link.State{}
		}
	}
	last, state := comes("one", at["one"], nil)
	if state.Kind != link.Ready {
		t.Fatalf("the first relay: %v, %s", state.Kind, state.Reason)
	}
	hops, most := 0, 0
	for {
		before := size()
		next, s := comes([]string{"two", "one"}[hops%2], "on", last.Hop("on"))
		most = max(most, size()-before)
		if state = s; state.Kind != link.Ready || hops == 20 {
			break
		}
		last = next
		hops++
	}
	if hops != channel.MaxHops || state.Kind != link.Refused || !isRefused(state.Err) {
		t.Errorf("the way ends behind %d hops: %v, %s", hops, state.Kind, state.Reason)
	}
	if most >= 70_000 { // WireGuard's bar for its own
		t.Errorf("a hop costs %d bytes", most)
	}
	t.Logf("F-25: between processes: a loop of two relays ends behind %d hops; at most %d bytes a hop", hops, most)
}
