package relay_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/outlet"
	"github.com/portal-tunnel/portal/relay"
	"github.com/portal-tunnel/portal/tests/pace"
)

// What the first byte of a flow says of its far end.
const (
	echoes = 'e'
	writes = 'w' // and reads nothing
	mute   = 'm' // reads nothing, and writes nothing
)

// maxStuck bounds what a flow takes that is not read: the largest window of a stream,
// and the buffers on its way.
const maxStuck = 24 << 20

// flows are lanes, or streams, whose far ends do as they are told. One at a time may be
// stuck.
type flows struct {
	open   func() (net.Conn, error) // set before a flow begins; the far ends do not read it
	pushed atomic.Int64             // bytes that the stuck one took
	muted  chan net.Conn
	all    sync.WaitGroup
}

func newFlows(open func() (net.Conn, error)) *flows {
	return &flows{open: open, muted: make(chan net.Conn, 1)}
}

// far is a flow's far end.
func (f *flows) far(c net.Conn) {
	var how [1]byte
	if _, err := io.ReadFull(c, how[:]); err != nil {
		c.Close()
		return
	}
	switch how[0] {
	case echoes:
		io.Copy(c, c)
	case writes:
		f.press(c)
	case mute:
		f.muted <- c
		return
	}
	c.Close()
}

// press writes until the flow ends.
func (f *flows) press(c net.Conn) {
	for b := make([]byte, 32<<10); ; {
		n, err := c.Write(b)
		f.pushed.Add(int64(n))
		if err != nil {
			return
		}
	}
}

// begin opens one.
func (f *flows) begin(t *testing.T, how byte) net.Conn {
	t.Helper()
	c, err := f.open()
	if err == nil {
		_, err = c.Write([]byte{how})
	}
	if err == nil && how == echoes {
		err = through(c, 1) // its far end is there: few may be on their way at once
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// stick has one that takes no more, because its far end, or its near one, does not
// read; it returns when nothing moves there.
func (f *flows) stick(t *testing.T, how byte) (end func()) {
	t.Helper()
	f.pushed.Store(0)
	c := f.begin(t, how)
	var pressing sync.WaitGroup
	if how == mute {
		pressing.Go(func() { f.press(c) })
	}
	for before := int64(0); ; {
		time.Sleep(100 * time.Millisecond)
		now := f.pushed.Load()
		if now > 0 && now == before {
			break
		}
		before = now
	}
	return func() {
		stream.Abort(c)
		if how == mute {
			stream.Abort(<-f.muted)
		}
		pressing.Wait()
	}
}

// through sends size bytes and wants them back.
func through(c net.Conn, size int) error {
	said := make([]byte, size)
	rand.Read(said)
	c.SetDeadline(time.Now().Add(time.Minute))
	wrote := make(chan error, 1)
	go func() {
		_, err := c.Write(said)
		wrote <- err
	}()
	got := make([]byte, size)
	_, err := io.ReadFull(c, got)
	if err != nil {
		stream.Abort(c)
	}
	if werr := <-wrote; err == nil {
		err = werr
	}
	if err == nil && !bytes.Equal(got, said) {
		err = errWrong
	}
	return err
}

// goOn has all of them send size bytes and get them back, at once.
func goOn(t *testing.T, conns []net.Conn, size int) {
	t.Helper()
	var all sync.WaitGroup
	for i, c := range conns {
		all.Go(func() {
			if err := through(c, size); err != nil {
				t.Errorf("flow %d: %v", i, err)
			}
		})
	}
	all.Wait()
}

// stall has many go on beside one that is stuck, which stays so.
func (f *flows) stall(t *testing.T, many, size int) {
	t.Helper()
	conns := make([]net.Conn, many)
	for i := range conns {
		conns[i] = f.begin(t, echoes)
	}
	for _, how := range []byte{mute, writes} {
		end := f.stick(t, how)
		goOn(t, conns, size)
		if n := f.pushed.Load(); n > maxStuck {
			t.Errorf("%c: the one that is not read took %d bytes", how, n)
		}
		end()
	}
	goOn(t, conns, 100) // neither does its end harm
	for _, c := range conns {
		stream.Abort(c)
	}
}

// lanes are those of one name at a relay, whose outlets come by a carrier; on says
// where the relay is.
func (w *town) lanes(s *relay.Server, outlets int, carrier relay.Carrier, on func(*relay.Client)) *flows {
	w.Helper()
	bot := w.client(w.member(agent), on)
	f := newFlows(func() (net.Conn, error) { return bot.Lane(context.Background(), "db", identity.ID{}) })
	w.stops = append(w.stops, f.all.Wait)
	for range outlets {
		db := &relay.Client{Addr: relayAddr, Dial: w.net.Dial, Node: w.node(), Self: w.member(serves("db")), Trust: w.trust(), Carrier: carrier}
		if on != nil {
			on(db)
		}
		ln := db.Listen("db", nil)
		f.all.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				f.all.Go(func() { f.far(c) })
			}
		})
		w.stops = append(w.stops, func() { ln.Close() })
		w.run(db.Run)
	}
	w.until("all serve it", func() bool { return s.Registrations("db") == outlets })
	return f
}

func TestALaneThatIsNotReadStallsOnlyItself(t *testing.T) {
	for _, carrier := range carriers {
		t.Run(carrier.String(), func(t *testing.T) {
			with(t, carrier, func(w *town) {
				s, _ := w.relay(nil)
				// A carrier takes 64 lanes.
				w.lanes(s, 2, carrier, nil).stall(t, 100, 128<<10)
			})
			if !long() {
				return
			}
			many := 100
			if carrier == relay.Yamux {
				many = 63 // with the stuck one, all that a carrier takes
			}
			onSockets(t, func(w *town, s *relay.Server, on func(*relay.Client)) {
				w.lanes(s, 1, carrier, on).measure(t, carrier.String()+", lanes", many)
			})
		})
	}
}

// streams are those of one channel through a relay.
func (w *town) streams(carrier relay.Carrier, on func(*relay.Client)) *flows {
	w.Helper()
	w.limits.Streams = max(w.limits.Streams, 200)
	bot := w.member(agent)
	f := newFlows(nil)
	w.outlet("db", w.member(serves("db")), func(context.Context, *outlet.Request) (net.Conn, error) {
		a, b := memnet.Pipe(memnet.Link{})
		f.all.Go(func() { f.far(b) })
		return a, nil
	}, func(c *relay.Client) {
		c.Carrier = carrier
		if on != nil {
			on(c)
		}
	})
	in := w.inlet("db", bot, w.client(bot, on))
	f.open = func() (net.Conn, error) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		return in.Dial(ctx)
	}
	return f
}

func TestAStreamThatIsNotReadStallsOnlyItselfBehindARelay(t *testing.T) {
	for _, carrier := range carriers {
		t.Run(carrier.String(), func(t *testing.T) {
			with(t, carrier, func(w *town) {
				w.relay(nil)
				w.streams(carrier, nil).stall(t, 100, 128<<10)
			})
			if !long() {
				return
			}
			onSockets(t, func(w *town, _ *relay.Server, on func(*relay.Client)) {
				w.streams(carrier, on).measure(t, carrier.String()+", streams of a channel", 100)
			})
		})
	}
}

// onSockets runs f in a town whose relay is reached by TCP.
func onSockets(t *testing.T, f func(w *town, s *relay.Server, on func(*relay.Client))) {
	t.Helper()
	runTown(&town{T: t}, func(w *town) {
		s := &relay.Server{Node: w.node(), Self: w.member(identity.Attributes{"relay": true}), Trust: w.trust()}
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		w.run(func(ctx context.Context) error { return s.Serve(ctx, ln) })
		f(w, s, func(c *relay.Client) { c.Addr, c.Dial = ln.Addr().String(), new(net.Dialer).DialContext })
	})
}

// measure compares many flows beside a stuck one with the same without it, in turns,
// and prints the median of both figures and their quartiles.
func (f *flows) measure(t *testing.T, what string, many int) {
	t.Helper()
	conns := make([]net.Conn, many)
	for i := range conns {
		conns[i] = f.begin(t, echoes)
	}
	for _, how := range []byte{mute, writes} {
		c, err := pace.Compare(25, conns, time.Second/2, func() func() { return f.stick(t, how) })
		if err != nil {
			t.Error(err)
			break
		}
		side := map[byte]string{mute: "far", writes: "near"}[how]
		t.Logf("F-11: %s: %d beside one whose %s end does not read: %v", what, many, side, c)
		if !c.Keeps() {
			t.Error("nine tenths of the throughput are wanted, and twice the time at most")
		}
	}
	for _, c := range conns {
		stream.Abort(c)
	}
}
