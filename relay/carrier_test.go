package relay

import (
	"bytes"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/portal-tunnel/portal/identity"
)

// What a close has to say waits for the session, which may be stuck. Others hold locks when they close.
func TestCloseOfALaneInAStuckCarrierDoesNotWait(t *testing.T) {
	a, b := net.Pipe() // whoever writes to it waits for a reader
	defer b.Close()
	go io.ReadFull(b, make([]byte, 12)) // the stream's beginning, and no more
	session, err := yamux.Client(a, carrierConfig(slog.New(slog.DiscardHandler), DefaultCarriedWindow))
	if err != nil {
		t.Fatal(err)
	}
	y, err := session.OpenStream()
	if err != nil {
		t.Fatal(err)
	}
	over, free := make(chan struct{}), make(chan struct{})
	c := &carried{Stream: y, over: func() { close(over) }}
	go func() {
		var reader sync.WaitGroup
		reader.Go(func() { io.ReadAll(c) })
		c.Close()
		reader.Wait()
		close(free)
	}()
	select {
	case <-free:
	case <-time.After(5 * time.Second): // a third of what a session is given to write
		t.Error("Close or a reader waits for what the close has to say")
	}
	select {
	case <-over:
		t.Error("the lane is given back before it has said that it is over")
	default:
	}
	session.Close()
	<-over
}

// pipedSession is a carrier's session at the relay, and the other end of its pipe, which takes nothing
// that is not read. Both are closed with the test.
func pipedSession(t *testing.T) (*yamux.Session, net.Conn) {
	t.Helper()
	a, b := net.Pipe()
	session, err := yamux.Server(a, carrierConfig(slog.New(slog.DiscardHandler), DefaultCarriedWindow))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		session.Close()
		b.Close()
	})
	return session, b
}

// Each offer is good for a stream, which may come late: one that is not answered counts as one for a minute.
func TestOffersThatAreNotAnsweredTakeRoomInACarrier(t *testing.T) {
	session, _ := pipedSession(t)
	c := &carrier{server: &Server{Limits: Limits{Carried: DefaultCarried}}, member: new(member), session: session}
	offer := func() (n int) {
		for c.reserve() == nil {
			n++
		}
		return n
	}
	giveUp := func(n int) {
		for range n {
			c.give()
		}
	}
	if n := offer(); n != carrierLanes {
		t.Errorf("%d lanes at once", n)
	}
	giveUp(carrierLanes)
	if n := offer(); n != carrierLanes {
		t.Errorf("%d more, with as many offers not answered", n)
	}
	giveUp(carrierLanes)
	if n := offer(); n != 0 {
		t.Errorf("%d beyond %d offers", n, carrierStreams)
	}
	if !c.owes() || offer() != 1 {
		t.Error("a stream that has come makes no room")
	}
	c.give()
	c.owed = slices.Repeat([]time.Time{time.Now().Add(-owedTime - time.Second)}, carrierStreams)
	if n := offer(); n != carrierLanes || len(c.owed) != carrierLanes {
		t.Errorf("%d lanes after a minute, %d offers", n, len(c.owed))
	}
	for c.owes() {
	}
	if c.lanes != carrierLanes {
		t.Errorf("%d lanes when each has come", c.lanes)
	}
}

// yamux holds its own lock while it waits to say something, for up to 15 s. The relay asks it for the number
// of its streams, and nobody else may wait for that.
func TestAStuckCarrierThatIsAskedForRoomHoldsNobodyElseUp(t *testing.T) {
	session, b := pipedSession(t)
	// Streams beyond its backlog, whose refusals nobody reads.
	go func() {
		for i := range uint32(4 * carrierLanes) {
			frame := []byte{0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0} // a window update that begins a stream
			binary.BigEndian.PutUint32(frame[4:], 2*i+1)
			if _, err := b.Write(frame); err != nil {
				return
			}
		}
	}()
	waits(t, "select", "yamux.(*Session).sendNoWait(")
	c := &carrier{server: &Server{Limits: Limits{Carried: DefaultCarried}}, member: new(member), session: session}
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		c.reserve()
	}()
	waits(t, "sync.Mutex.Lock", "yamux.(*Session).NumStreams(")
	if !c.server.mu.TryLock() {
		t.Error("the relay's lock is held meanwhile")
	} else {
		c.server.mu.Unlock()
	}
	select {
	case <-asked:
		t.Error("yamux answers at once: nothing is proved")
	default:
	}
	session.Close()
	<-asked
}

// waits returns when a goroutine waits in a function, for what a trace calls so.
func waits(t *testing.T, what, function string) {
	t.Helper()
	all := make([]byte, 1<<20)
	for end := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
		for g := range bytes.SplitSeq(all[:runtime.Stack(all, true)], []byte("\n\n")) {
			if head, calls, _ := bytes.Cut(g, []byte("\n")); bytes.Contains(head, []byte("["+what)) && bytes.Contains(calls, []byte(function)) {
				return
			}
		}
		if time.Now().After(end) {
			t.Fatalf("nobody waits for a %s in %s", what, function)
		}
	}
}

// Only so many outlets are asked for a lane, since each may take its time. One without room takes none.
func TestOutletsWithoutRoomAreNotCountedAsAsked(t *testing.T) {
	session, _ := pipedSession(t)
	key := poolKey{name: AuthorityName}
	s := &Server{Limits: Limits{LanesEach: 1, Carried: DefaultCarried}, pools: map[poolKey]*pool{key: {members: map[*registration]struct{}{}}}}
	for range 3 * meetings {
		c := &carrier{server: s, member: new(member), session: session}
		// One that is forgotten by whoever looks, and as many as leave no room.
		c.owed = append([]time.Time{time.Now().Add(-owedTime - time.Second)}, slices.Repeat([]time.Time{time.Now()}, carrierStreams)...)
		s.pools[key].members[&registration{server: s, key: key, member: new(member), carrier: c}] = struct{}{}
	}
	if _, _, err := s.reach(t.Context(), key, identity.ID{}, [32]byte{}, nil); err != errCarrierFull {
		t.Errorf("it says %v", err)
	}
	for r := range s.pools[key].members {
		if len(r.carrier.owed) != carrierStreams {
			t.Error("one is not looked at")
		}
		if r.member.lanes != 0 {
			t.Errorf("one has %d lanes", r.member.lanes)
		}
	}
}

// What lanes in carriers may hold is bounded over all of them; half of it is one identity's.
func TestLanesInCarriersAreBoundedOverAllCarriers(t *testing.T) {
	s := &Server{Limits: Limits{Carried: 5 * carrierLanes}}
	var all []*carrier
	take := func(m *member, carriers int) (n int) {
		for range carriers {
			session, _ := pipedSession(t)
			c := &carrier{server: s, member: m, session: session}
			for c.reserve() == nil {
				n++
			}
			if full := (&registration{carrier: c}).full(); !full {
				t.Error("one that takes no more is not full")
			}
			all = append(all, c)
		}
		return n
	}
	one, other := new(member), new(member)
	if n := take(one, 4); n != 5*carrierLanes/2 {
		t.Errorf("one identity has %d lanes in carriers", n)
	}
	if n := take(other, 4); n != 5*carrierLanes/2 {
		t.Errorf("another has %d", n)
	}
	if n := take(new(member), 1); n != 0 {
		t.Errorf("a third has %d beyond all", n)
	}
	for _, c := range all {
		c.die()
		if err := c.reserve(); err == nil {
			t.Error("a carrier that has ended takes a lane")
		}
	}
	if s.carried != 0 || one.carried != 0 || other.carried != 0 {
		t.Errorf("%d, %d and %d are left", s.carried, one.carried, other.carried)
	}
}

// What a lane holds counts among the lanes of all carriers until yamux has nothing of it any more, whether or not
// the lane came about.
func TestAStreamCountsInAllCarriersUntilItIsGone(t *testing.T) {
	near, far := net.Pipe()
	config := carrierConfig(slog.New(slog.DiscardHandler), DefaultCarriedWindow)
	session, err := yamux.Server(near, config)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	outlet, err := yamux.Client(far, config)
	if err != nil {
		t.Fatal(err)
	}
	defer outlet.Close()
	s := &Server{Limits: Limits{Carried: DefaultCarried}, stop: t.Context()}
	c := &carrier{server: s, member: new(member), session: session}
	check := func(what string, lanes, carried int) {
		t.Helper()
		s.mu.Lock()
		defer s.mu.Unlock()
		if c.lanes != lanes || s.carried != carried || c.member.carried != carried {
			t.Errorf("%s: %d lanes, %d in all carriers, %d of its owner; want %d, %d, %d", what, c.lanes, s.carried, c.member.carried, lanes, carried, carried)
		}
	}
	comes := func() (here *carried, there *yamux.Stream) {
		t.Helper()
		there, err := outlet.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		y, err := session.AcceptStream()
		if err != nil {
			t.Fatal(err)
		}
		if !c.owes() {
			t.Fatal("it was not offered")
		}
		return &carried{Stream: y, of: c}, there
	}
	gone := func(n int) {
		t.Helper()
		for end := time.Now().Add(lingerTime); ; runtime.Gosched() { // before yamux gives it up
			s.mu.Lock()
			left := s.carried
			s.mu.Unlock()
			if left == n {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%d count, want %d", left, n)
			}
		}
	}
	for range 3 {
		if err := c.reserve(); err != nil {
			t.Fatal(err)
		}
	}
	lane, its := comes()
	lane.over = c.give
	c.give() // two that did not come about, of which one comes late
	c.give()
	check("one that came and two that did not", 1, 3)
	late, lates := comes()
	late.Close()
	lates.Write(make([]byte, 1000))
	check("one that is closed here and not there", 1, 3)
	lates.Close()
	gone(2)
	lane.Close()
	its.Close()
	gone(1)
	check("one that never came", 0, 1)
	c.owed[0] = c.owed[0].Add(-owedTime)
	c.forget()
	check("a minute later", 0, 0)

	// A stream takes the place of the oldest offer: of two, one that failed and one that came 5 s later, the
	// later one is left, for its own minute.
	for range 2 {
		if err := c.reserve(); err != nil {
			t.Fatal(err)
		}
	}
	c.owed[0] = c.owed[0].Add(-owedTime)
	lane, its = comes()
	lane.over = c.give
	c.give()
	c.forget() // the failed one's minute is over
	check("one whose place a stream took", 1, 2)
	c.owed[0] = c.owed[0].Add(-owedTime)
	c.forget()
	check("a minute behind the stream's own", 1, 1)
	lane.Close()
	its.Close()
	gone(0)

	if err := c.reserve(); err != nil {
		t.Fatal(err)
	}
	lane, _ = comes()
	lane.over = c.give
	lane.Close()
	waits(t, "select", "relay.(*carrier).bury(")
	check("one that its outlet does not end", 0, 1)
	session.Close()
	gone(0)
}
