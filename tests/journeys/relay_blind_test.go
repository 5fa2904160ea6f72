package journeys_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
)

// liar is a relay in the hands of whoever took its host: it has the identity and the address, makes
// lanes that nobody asked for, and takes those that are for others.
type liar struct {
	*usurper
	names chan *stream.Conn // registrations of db
	lanes map[byte]chan net.Conn
}

// The ids of a liar's lanes.
const (
	toOutlet byte = 1 + iota
	toInlet
	toAuthority
)

// takeOver starts a liar where the relay was.
func takeOver(t testing.TB, self *identity.Self, at string, authority identity.ID) *liar {
	t.Helper()
	w := &liar{
		usurper: newUsurper(t, authority, 2*patience), names: make(chan *stream.Conn, 16),
		lanes: map[byte]chan net.Conn{toOutlet: make(chan net.Conn), toInlet: make(chan net.Conn), toAuthority: make(chan net.Conn)},
	}
	w.serve(self, at, func(_ *link.Live, in *stream.Incoming) {
		c, id := in.Accept(), toInlet
		if in.Header.Kind == stream.Register {
			if in.Header.Name == "db" { // the authority's holds, and nothing is offered on it
				w.names <- c
			}
			return
		}
		if in.Header.Name == "authority" {
			id = toAuthority
		}
		go func() {
			c.Write(lie(id))
			c.Close()
		}()
	}, func(ctx context.Context, id [16]byte, c net.Conn) {
		select {
		case w.lanes[id[0]] <- c:
		case <-ctx.Done():
			c.Close()
		}
	})
	return w
}

func lie(id byte) []byte { return offer([16]byte{id}, [32]byte{}) }

// open is who's attempt to open a stream of the outlet by a lane of the liar's making.
func (w *liar) open(registered *stream.Conn, who *identity.Self) error {
	w.t.Helper()
	if _, err := registered.Write(lie(toOutlet)); err != nil {
		w.t.Fatal(err)
	}
	var lane net.Conn
	select {
	case lane = <-w.lanes[toOutlet]:
	case <-w.ctx.Done():
		w.t.Fatal("the outlet does not come by the lane")
	}
	l, err := link.Dial(w.ctx, &channel.Lane{Conn: lane}, &channel.Config{Node: w.node, Self: who, Trust: w.trust, Kind: channel.Service, Judge: everybody}, nil)
	if err != nil {
		return err
	}
	defer l.Close(nil)
	c, err := l.Mux.Open(stream.Header{Kind: stream.Bytes, Name: "db"})
	if err == nil {
		err = c.Wait(w.ctx)
	}
	if err == nil {
		_, err = c.Write([]byte("E"))
	}
	if err == nil {
		err = echo(c)
	}
	if err != nil {
		select {
		case <-l.Done():
			return l.Err()
		case <-w.ctx.Done():
		}
	}
	return err
}

// pose has who answer everybody who asks for one kind of lane, until stop is called. Whoever takes who
// for the one that was asked for, and shows itself, is in came.
func (w *liar) pose(id byte, kind channel.Kind, who *identity.Self) (came chan *identity.Peer, stop func()) {
	came = make(chan *identity.Peer, 64)
	ctx, cancel := context.WithCancel(w.ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case c := <-w.lanes[id]:
				channel.Respond(ctx, &channel.Lane{Conn: c}, &channel.Config{Node: w.node, Self: who, Trust: w.trust, Kind: kind, Proofless: true, Judge: func(p *identity.Peer) error {
					came <- p
					return errors.New("that is enough")
				}})
			case <-ctx.Done():
				return
			}
		}
	}()
	return came, func() {
		cancel()
		<-ended
	}
}

// Whoever takes the host of a blind relay has its identity, its address, and everybody who comes to it.
func TestWhoTakesABlindRelayIssuesNothingAndOpensNothing(t *testing.T) {
	t.Parallel()
	s := newService(t)
	m := newBlindMeeting(t)
	authority, err := identity.ParseID(m.openBlind(m.at))
	if err != nil {
		t.Fatal(err)
	}
	m.enroll("db1", "--serve", "db")
	m.enroll("bot", "--attr", "role=agent")
	m.outlet("db1", s.addr())
	in, addr := m.inlet("bot", "0")
	ready(t, addr)
	in.Stop(patience)
	late := m.ticket("late", "--attr", "role=agent")

	grant := []string{"ticket", "create", "--name", "eve", "--attr", "role=agent", "--serve", "db"}
	issues := func() {
		t.Helper()
		if said := m.fails("relay", 2, grant...); !strings.Contains(said, "PORTAL-E0212") {
			t.Errorf("a ticket on the relay's host: %s", said)
		}
	}
	issues()
	kill(t, m.relay)
	issues() // nor when nobody has the home
	if _, err := os.Stat(filepath.Join(m.home("relay"), "authority")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an authority in the relay's home: %v", err)
	}

	self := func(host string) *identity.Self {
		home, err := identity.Open(m.home(host))
		if err != nil {
			t.Fatal(err)
		}
		self, err := home.Self()
		if err != nil {
			t.Fatal(err)
		}
		return self
	}
	forged := func(who *identity.Self) *identity.Self {
		issuer, now := self("relay"), time.Now()
		c, err := issuer.Issue(who.ID(), who.Latest(), identity.Attributes{"name": "bot", "role": "agent", "serve": []string{"db"}}, now, now.Add(time.Hour))
		if err == nil {
			err = who.Renew(c, issuer.History())
		}
		if err != nil {
			t.Fatal(err)
		}
		return who
	}
	madeUp, err := identity.NewSelf()
	if err != nil {
		t.Fatal(err)
	}
	liars := map[string]*identity.Self{
		"the relay's identity":                                 self("relay"),
		"the relay's identity with a credential by its key":    forged(self("relay")),
		"an identity made up with a credential by relay's key": forged(madeUp),
	}
	w := takeOver(t, self("relay"), m.at, authority)
	m.trustsNoLiar(w, late, liars, self("db1"))

	registered := <-w.names
	before := s.accepted.Load()
	for name, who := range liars {
		err := w.open(registered, who)
		if closed := (*channel.Closed)(nil); !errors.As(err, &closed) || closed.Code != channel.CloseRefused {
			t.Errorf("%s at the outlet: %v, not refused", name, err)
		}
	}
	if n := s.accepted.Load(); n != before {
		t.Errorf("%d connections came to the service", n-before)
	}
	if err := w.open(registered, self("bot")); err != nil {
		t.Errorf("whoever may open it cannot, nothing is proved: %v", err)
	}
}

// trustsNoLiar: neither an inlet nor a host that enrolls takes one for whom it asked for. Nor are they
// told anything of the caller.
func (m *meeting) trustsNoLiar(w *liar, ticket string, liars map[string]*identity.Self, honest *identity.Self) {
	m.t.Helper()
	for name, who := range liars {
		came, stop := w.pose(toInlet, channel.Service, who)
		in, addr := m.inlet("bot", "0")
		m.line(in, `inlet db refused: `)
		wantReset(m.t, addr)
		in.Stop(patience)
		stop()
		if len(came) > 0 {
			m.t.Errorf("%s as the outlet: %v shows itself", name, <-came)
		}
	}
	came, stop := w.pose(toInlet, channel.Service, honest)
	m.inlet("bot", "0")
	select {
	case caller := <-came:
		if caller.Credential() == nil {
			m.t.Error("to the one that serves it the caller shows no credential: nothing is proved")
		}
	case <-w.ctx.Done():
		m.t.Error("to the one that serves it nobody shows itself: nothing is proved")
	}
	stop()

	came, stop = w.pose(toAuthority, channel.Authority, liars["the relay's identity"])
	said := m.fails("late", 4, "enroll", "--timeout", "1s", ticket)
	stop()
	if len(came) > 0 {
		m.t.Errorf("as the authority: %v asks it", <-came)
	}
	if !strings.Contains(said, "the other end is another identity than the one asked for") || !strings.Contains(said, "the ticket is not spent") {
		m.t.Errorf("enroll says %s", said)
	}
}
