package stream_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/routing"
	"github.com/portal-tunnel/portal/tests/serving"
)

// side is one end of a channel with its streams.
type side struct {
	node   *routing.Node
	end    *channel.End
	mux    *stream.Mux
	budget *stream.Budget
	ran    chan error
}

// ends makes a confirmed channel over two ends of a lane.
func ends(t testing.TB, a, b net.Conn) (e [2]*channel.End, nodes [2]*routing.Node) {
	t.Helper()
	var errs [2]error
	var all sync.WaitGroup
	for i := range 2 {
		self, err := identity.NewSelf()
		if err != nil {
			t.Fatal(err)
		}
		nodes[i] = new(routing.Node)
		config := &channel.Config{
			Node: nodes[i], Self: self, Trust: identity.NewTrust(), Kind: channel.Service,
			Judge: func(*identity.Peer) error { return nil }, Proofless: true,
		}
		all.Go(func() {
			if i == 0 {
				e[i], errs[i] = channel.Initiate(context.Background(), a, config)
			} else {
				e[i], errs[i] = channel.Respond(context.Background(), b, config)
			}
		})
	}
	all.Wait()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
	return e, nodes
}

// streams puts streams over one end and reads its lane.
func streams(n *routing.Node, e *channel.End, initiator bool, l stream.Limits, accept func(*stream.Incoming)) *side {
	if l.Budget == nil {
		l.Budget = new(stream.Budget)
	}
	s := &side{node: n, end: e, budget: l.Budget, ran: make(chan error, 1)}
	s.mux = stream.NewMux(n, e, initiator, l, accept)
	go func() {
		err := s.end.Run(s.mux)
		s.mux.Fail(err)
		s.ran <- err
	}()
	return s
}

// pair makes two ends of streams over a lane. Streams opened at a come out of
// the returned channel, which takes more than a channel may have open.
func pair(t testing.TB, a, b net.Conn, limits stream.Limits) (x, y *side, incoming chan *stream.Incoming) {
	t.Helper()
	incoming = make(chan *stream.Incoming, 20000)
	e, nodes := ends(t, a, b)
	x = streams(nodes[0], e[0], true, limits, nil)
	y = streams(nodes[1], e[1], false, limits, func(in *stream.Incoming) { incoming <- in })
	return x, y, incoming
}

// stop closes both ends and waits for everything.
func stop(t testing.TB, x, y *side) {
	t.Helper()
	x.end.Close()
	y.end.Close()
	for _, s := range []*side{x, y} {
		select {
		case <-s.ran:
		case <-time.After(10 * time.Second):
			t.Error("the lane reader did not end")
		}
		if err := s.node.Close(); err != nil {
			t.Error(err)
		}
	}
}

// open gives both ends of one accepted stream.
func open(t testing.TB, x *side, incoming chan *stream.Incoming) (*stream.Conn, *stream.Conn) {
	t.Helper()
	a, err := x.mux.Open(stream.Header{Kind: stream.Bytes, Name: "db"})
	if err != nil {
		t.Fatal(err)
	}
	in := <-incoming
	return a, in.Accept()
}

func pipe(l memnet.Link) (net.Conn, net.Conn) {
	a, b := memnet.Pipe(l)
	return a, b
}

// world is a channel in virtual time.
type world struct {
	*testing.T
	x, y     *side
	incoming chan *stream.Incoming
	a, b     *memnet.Conn // the lane
	base     [2]int64     // lane bytes that a and b wrote before the first stream
}

// virtual runs f over a new channel, and then ends it. Nothing may be left: no
// goroutine (the bubble sees to it), stream, actor or held byte.
func virtual(t *testing.T, link memnet.Link, limits stream.Limits, f func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{T: t}
		w.a, w.b = memnet.Pipe(link)
		for i, c := range []*memnet.Conn{w.a, w.b} {
			c.OnWrite(func(off int64, b []byte) []byte { w.base[i] = off + int64(len(b)); return b })
		}
		w.x, w.y, w.incoming = pair(t, w.a, w.b, limits)
		w.a.OnWrite(nil)
		w.b.OnWrite(nil)
		f(w)
		stop(t, w.x, w.y)
		synctest.Wait()
		w.clean()
	})
}

// clean fails the test when something is left of streams.
func (w *world) clean() {
	w.Helper()
	synctest.Wait() // a reset shows at the stream before it has left the channel
	for i, s := range []*side{w.x, w.y} {
		if n := s.mux.Streams(); n != 0 {
			w.Errorf("end %d: %d streams are left", i, n)
		}
		if n := s.budget.Held(); n != 0 {
			w.Errorf("end %d: %d bytes are held", i, n)
		}
		if s.end.Err() != nil && s.node.Len() != 0 {
			w.Errorf("end %d: %d actors are left", i, s.node.Len())
		}
	}
}

// alive fails the test when the channel has ended.
func (w *world) alive() {
	w.Helper()
	synctest.Wait()
	for i, s := range []*side{w.x, w.y} {
		if err := s.end.Err(); err != nil {
			w.Fatalf("end %d of the channel: %v", i, err)
		}
	}
}

// open gives both ends of one accepted stream.
func (w *world) open() (*stream.Conn, *stream.Conn) {
	w.Helper()
	return open(w.T, w.x, w.incoming)
}

// flow is a stream that is joined at both ends to connections of applications.
type flow struct {
	near, far    duplex // the applications' ends; near is at the opener
	sx, sy       *stream.Conn
	joinX, joinY chan error
	localX       net.Conn // the joined sockets
	localY       net.Conn
}

// duplex is what an application has: a connection that half-closes and resets.
type duplex interface {
	net.Conn
	CloseWrite() error
	SetLinger(int) error
}

// socket makes two ends of a connection.
type socket func(t testing.TB) (app duplex, local net.Conn)

func inMemory(testing.TB) (duplex, net.Conn) {
	a, b := memnet.Pipe(memnet.Link{})
	return a, b
}

// overTCP makes two ends of a TCP connection on the loopback interface.
func overTCP(t testing.TB) (duplex, net.Conn) {
	t.Helper()
	return serving.Pair(t)
}

// unixEnd is a Unix socket as a duplex; it cannot reset.
type unixEnd struct{ *net.UnixConn }

func (unixEnd) SetLinger(int) error { return nil }

func overUnix(t testing.TB) (duplex, net.Conn) {
	t.Helper()
	a, b := serving.UnixPair(t)
	return unixEnd{a}, b
}

// join opens a stream and joins both of its ends to sockets.
func join(t testing.TB, x *side, incoming chan *stream.Incoming, s socket) *flow {
	t.Helper()
	f := &flow{joinX: make(chan error, 1), joinY: make(chan error, 1)}
	f.near, f.localX = s(t)
	f.far, f.localY = s(t)
	stream.Arm(f.localX)
	stream.Arm(f.localY)
	f.sx, f.sy = open(t, x, incoming)
	go func() { f.joinX <- f.sx.Join(f.localX) }()
	go func() { f.joinY <- f.sy.Join(f.localY) }()
	return f
}

// joined waits for both joins.
func (f *flow) joined() (x, y error) { return <-f.joinX, <-f.joinY }

// random is n bytes that are the same in every run.
func random(n int, seed byte) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// prefixThenReset reads c to its end and wants a prefix of want and then a reset.
func prefixThenReset(t testing.TB, who string, c io.Reader, want []byte) int {
	t.Helper()
	got, err := io.ReadAll(c)
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%s: %d bytes and then %v, want a reset", who, len(got), err)
	}
	if !bytes.HasPrefix(want, got) {
		t.Errorf("%s: the %d bytes read are no prefix of what was sent", who, len(got))
	}
	return len(got)
}

// wholeThenEnd reads c to its end and wants exactly want.
func wholeThenEnd(t testing.TB, who string, c io.Reader, want []byte) {
	t.Helper()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s: read %d bytes of %d, equal %v: %v", who, len(got), len(want), bytes.Equal(got, want), err)
	}
}
