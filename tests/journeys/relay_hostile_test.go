package journeys_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
)

// crook is a relay that speaks its protocol as it should and joins lanes as it likes. Its inlets and
// outlets are processes.
type crook struct {
	*usurper
	all sync.WaitGroup

	mu     sync.Mutex
	serves map[string]*stream.Conn // where offers go, by "name host's ID"
	come   sync.Cond               // L is mu: serves grew
	shown  map[[16]byte]chan net.Conn
	asked  func(*crook, *stream.Incoming) // for db
	conns  []net.Conn
}

// newCrook starts one where the relay was.
func newCrook(t testing.TB, self *identity.Self, at string, authority identity.ID) *crook {
	t.Helper()
	k := &crook{usurper: newUsurper(t, authority, 4*patience), serves: make(map[string]*stream.Conn), shown: make(map[[16]byte]chan net.Conn)}
	k.come.L = &k.mu
	context.AfterFunc(k.ctx, func() {
		k.mu.Lock()
		k.come.Broadcast()
		k.mu.Unlock()
	})
	t.Cleanup(func() { // behind serve's
		k.mu.Lock()
		for _, c := range k.conns {
			c.Close()
		}
		k.mu.Unlock()
		k.all.Wait()
	})
	k.serve(self, at, k.accept, func(_ context.Context, id [16]byte, c net.Conn) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.conns = append(k.conns, c)
		if shown := k.shown[id]; shown != nil {
			shown <- c // has room for two
		}
	})
	return k
}

func (k *crook) accept(l *link.Live, in *stream.Incoming) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case in.Header.Kind == stream.Register:
		k.serves[in.Header.Name+" "+l.Peer().ID().String()] = in.Accept()
		k.come.Broadcast()
	case in.Header.Kind == stream.Connect && in.Header.Name == "db":
		asked := k.asked
		k.all.Go(func() { asked(k, in) })
	default:
		in.Refuse(stream.CodeAbsent, "")
	}
}

// expect is where the connection comes that shows an id.
func (k *crook) expect() (id [16]byte, shown chan net.Conn) {
	rand.Read(id[:])
	shown = make(chan net.Conn, 2)
	k.mu.Lock()
	k.shown[id] = shown
	k.mu.Unlock()
	return id, shown
}

// await is that connection, or a closed one when nobody comes until the end.
func (k *crook) await(shown chan net.Conn) net.Conn {
	select {
	case c := <-shown:
		return c
	case <-k.ctx.Done():
		c, _ := net.Pipe()
		c.Close()
		return c
	}
}

// invite answers who asks, and is its side.
func (k *crook) invite(in *stream.Incoming, key [32]byte) net.Conn {
	id, shown := k.expect()
	c := in.Accept()
	c.Write(offer(id, key))
	c.Close()
	return k.await(shown)
}

// summon has the host that serves a name come n times by one id.
func (k *crook) summon(name string, host identity.ID, key [32]byte, n int) (all []net.Conn) {
	k.mu.Lock()
	for k.serves[name+" "+host.String()] == nil && k.ctx.Err() == nil {
		k.come.Wait()
	}
	c := k.serves[name+" "+host.String()]
	k.mu.Unlock()
	id, shown := k.expect()
	for range n {
		if c != nil { // nil: it is over
			c.Write(offer(id, key))
		}
	}
	for range n {
		all = append(all, k.await(shown))
	}
	return all
}

// pass copies one way and ends both when it ends.
func (k *crook) pass(to io.Writer, from, other net.Conn) {
	k.all.Go(func() {
		io.Copy(to, from)
		from.Close()
		other.Close()
	})
}

func (k *crook) join(a, b net.Conn) {
	k.pass(a, b, a)
	k.pass(b, a, b)
}

// A tape keeps what is written to it. What is careless takes also what its writer no longer does.
type tape struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (p *tape) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.all.Write(b)
}

func (p *tape) bytes() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return bytes.Clone(p.all.Bytes())
}

type careless struct{ io.Writer }

func (d careless) Write(b []byte) (int, error) {
	d.Writer.Write(b)
	return len(b), nil
}

func key32() (key [32]byte) { rand.Read(key[:]); return key }

// A relay that has everything that a relay has joins inlets and outlets as nobody asked it to.
func TestAHostileRelayOpensNoStreamBetweenOtherProcesses(t *testing.T) {
	t.Parallel()
	m := newBlindMeeting(t)
	authority, err := identity.ParseID(m.openBlind(m.at))
	if err != nil {
		t.Fatal(err)
	}
	services, hosts := map[string]*service{}, map[string]identity.ID{}
	for host, name := range map[string]string{"db1": "db", "db2": "db", "files1": "files"} {
		m.enroll(host, "--serve", name)
		services[host] = newService(t)
		hosts[host] = m.id(host)
		m.line(m.start(host, "outlet", name, "--to", services[host].addr(), "--allow", `principal.role == "agent"`), `outlet \S+ ready via`)
	}
	m.enroll("bot", "--attr", "role=agent")
	accepted := func() (n int64) {
		for _, s := range services {
			n += s.accepted.Load()
		}
		return n
	}
	home, err := identity.Open(m.home("relay"))
	if err != nil {
		t.Fatal(err)
	}
	self, err := home.Self()
	if err != nil {
		t.Fatal(err)
	}
	kill(t, m.relay)
	k := newCrook(t, self, m.at, authority)
	db1 := hosts["db1"]

	var recorded tape               // what an inlet said on a lane
	key := key32()                  // of that
	replayed := make(chan bool, 64) // each time the outlet has given a replay up
	ways := []struct {
		name  string
		flags []string
		asked func(*crook, *stream.Incoming)
		state string // of the inlet; "": it works
	}{
		{"as it should, for one of two", []string{"--peer", db1.String()}, func(k *crook, in *stream.Incoming) {
			key := key32()
			k.join(k.invite(in, key), k.summon("db", db1, key, 1)[0])
		}, ""},
		{"another name's outlet", nil, func(k *crook, in *stream.Incoming) {
			key := key32()
			k.join(k.invite(in, key), k.summon("files", hosts["files1"], key, 1)[0])
		}, "refused"},
		{"another outlet of the name than the one asked for", []string{"--peer", db1.String()}, func(k *crook, in *stream.Incoming) {
			key := key32()
			k.join(k.invite(in, key), k.summon("db", hosts["db2"], key, 1)[0])
		}, "refused"},
		{"an outlet with another key", nil, func(k *crook, in *stream.Incoming) {
			k.join(k.invite(in, key32()), k.summon("db", db1, key32(), 1)[0])
		}, "waiting"},
		{"the caller to itself", nil, func(k *crook, in *stream.Incoming) {
			c := k.invite(in, key32())
			k.pass(c, c, c)
		}, "waiting"},
		{"an outlet to another, and the caller to nobody", nil, func(k *crook, in *stream.Incoming) {
			key := key32()
			k.join(k.summon("db", db1, key, 1)[0], k.summon("db", hosts["db2"], key, 1)[0])
			k.invite(in, key).Close()
		}, "waiting"},
		{"itself as the outlet", nil, func(k *crook, in *stream.Incoming) {
			key := key32()
			e, err := channel.Respond(k.ctx, &channel.Lane{Conn: k.invite(in, key), Key: key}, &channel.Config{
				Node: k.node, Self: self, Trust: k.trust, Kind: channel.Service, Proofless: true, Judge: everybody,
			})
			if err == nil {
				e.Abort(channel.CloseInternal, io.ErrUnexpectedEOF)
				k.t.Error("an inlet takes the relay for its outlet")
			}
		}, "refused"},
		{"an outlet that comes twice by one id", nil, func(k *crook, in *stream.Incoming) {
			key := key32()
			caller, both := k.invite(in, key), k.summon("db", db1, key, 2)
			k.pass(caller, both[0], caller)
			k.pass(io.MultiWriter(both[0], careless{both[1]}), caller, both[0])
			k.pass(io.Discard, both[1], both[1])
		}, ""},
		{"as it should, recorded", nil, func(k *crook, in *stream.Incoming) {
			caller, out := k.invite(in, key), k.summon("db", db1, key, 1)[0]
			k.pass(caller, out, caller)
			k.pass(io.MultiWriter(out, &recorded), caller, out)
		}, ""},
		{"the recording, with the key that it had", nil, func(k *crook, in *stream.Incoming) {
			out := k.summon("db", db1, key, 1)[0]
			out.Write(recorded.bytes())
			k.invite(in, key32()).Close()
			io.Copy(io.Discard, out)
			select {
			case replayed <- true:
			default:
			}
		}, "waiting"},
	}
	for _, c := range ways {
		k.mu.Lock()
		k.asked = c.asked
		k.mu.Unlock()
		before, at1 := accepted(), services["db1"].accepted.Load()
		in, addr := m.inlet("bot", "0", c.flags...)
		if c.state == "" {
			ready(t, addr)
			if n, all := services["db1"].accepted.Load()-at1, accepted()-before; n == 0 || all != n {
				t.Errorf("%s: %d connections came to db1, %d to all", c.name, n, all)
			}
		} else {
			m.line(in, `inlet db `+c.state+`: `)
			wantReset(t, addr)
		}
		if c.name == "the recording, with the key that it had" {
			select {
			case <-replayed:
			case <-k.ctx.Done():
				t.Error("the outlet holds on to a recording")
			}
		}
		in.Stop(patience)
		if n := accepted() - before; c.state != "" && n != 0 {
			t.Errorf("%s: %d connections came to a service", c.name, n)
		}
	}
	t.Logf("F-42: a relay between processes that behaves in %d ways: no stream anywhere but where the inlet asked", len(ways))
}
