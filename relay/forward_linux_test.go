package relay_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/relay"
)

// A leg is one direction through a forwarder, from end to end.
type leg struct {
	from, to net.Conn   // at the ends
	in, out  net.Conn   // the forwarder's
	done     chan error // what forward returned
}

func newLeg(t *testing.T) *leg {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	pair := func() (far, near net.Conn) {
		far, err := net.Dial("tcp", ln.Addr().String())
		if err == nil {
			near, err = ln.Accept()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { far.Close(); near.Close() })
		return far, near
	}
	l := &leg{done: make(chan error, 1)}
	l.from, l.in = pair()
	l.to, l.out = pair()
	go func() {
		err := relay.Forward(l.out, l.in)
		l.out.Close()
		l.done <- err
	}()
	return l
}

// send writes n bytes in pieces of up to longest, ends, and gives their hash.
func (l *leg) send(t *testing.T, n, longest int) (sum [32]byte) {
	source := rand.NewChaCha8([32]byte{byte(n), byte(longest)})
	h, rng := sha256.New(), rand.New(source)
	b := make([]byte, longest)
	for n > 0 {
		piece := b[:min(n, 1+rng.IntN(longest))]
		source.Read(piece)
		h.Write(piece)
		if _, err := l.from.Write(piece); err != nil {
			t.Error(err)
			return sum
		}
		n -= len(piece)
	}
	l.from.(*net.TCPConn).CloseWrite()
	return [32]byte(h.Sum(nil))
}

func TestForwardingChangesNothing(t *testing.T) {
	all := func(t *testing.T) {
		for _, c := range []struct{ n, longest int }{
			{0, 1}, {1, 1}, {10000, 100}, {1 << 20, 20 << 10}, {16 << 10, 16 << 10}, {1 << 20, 16 << 10}, {32 << 20, 1 << 20}, {8 << 20, 8 << 20},
		} {
			l := newLeg(t)
			sum := make(chan [32]byte, 1)
			go func() { sum <- l.send(t, c.n, c.longest) }()
			h := sha256.New()
			n, err := io.Copy(h, struct{ io.Reader }{l.to})
			if want := <-sum; int(n) != c.n || err != nil || [32]byte(h.Sum(nil)) != want {
				t.Errorf("%d bytes in pieces of up to %d: %d came, %v", c.n, c.longest, n, err)
			}
			if err := <-l.done; err != nil {
				t.Error(err)
			}
		}
	}
	t.Run("by pipes", all)
	t.Run("without descriptors for pipes", func(t *testing.T) { relay.WithoutPipes(func() { all(t) }) })
}

// Readers that stop keep the pipes that there are, and everybody else is served without.
func TestReadersThatStopKeepNobodyElseFromForwarding(t *testing.T) {
	const piece = 64 << 10
	var writers, readers sync.WaitGroup
	legs := make([]*leg, relay.MaxPipes+4)
	for i := range legs {
		l := newLeg(t)
		legs[i] = l
		// Small, or that many fill what the kernel has for all sockets of a machine.
		l.to.(*net.TCPConn).SetReadBuffer(piece / 4)
		l.out.(*net.TCPConn).SetWriteBuffer(piece / 4)
		l.in.(*net.TCPConn).SetReadBuffer(2 * piece)
		writers.Go(func() { l.from.Write(make([]byte, 16*piece)) }) // until it is cut
		readers.Go(func() {
			if _, err := io.ReadFull(l.to, make([]byte, 2*piece)); err != nil {
				t.Error(err)
			}
		})
	}
	readers.Wait()
	for end := time.Now().Add(time.Minute); relay.Pipes() < relay.MaxPipes; runtime.Gosched() {
		if time.Now().After(end) {
			t.Errorf("%d of %d streams that nobody reads hold a pipe", relay.Pipes(), len(legs))
			break
		}
	}
	l := newLeg(t)
	sum := make(chan [32]byte, 1)
	go func() { sum <- l.send(t, 4<<20, piece) }()
	h := sha256.New()
	if n, err := io.Copy(h, l.to); n != 4<<20 || err != nil || [32]byte(h.Sum(nil)) != <-sum {
		t.Errorf("%d bytes, %v", n, err)
	}
	if n := relay.Pipes(); n > relay.MaxPipes {
		t.Errorf("%d pipes", n)
	}
	for _, l := range legs {
		stream.Abort(l.to)
		stream.Abort(l.from)
		if err := <-l.done; err == nil {
			t.Error("a stream that was reset has ended in good order")
		}
	}
	writers.Wait()
	noPipes(t)
}

// noPipes waits until the collector has closed those in the pool.
func noPipes(t *testing.T) {
	t.Helper()
	for i := 0; relay.Pipes() > 0; i++ {
		if runtime.GC(); i > 1000 {
			t.Fatalf("%d pipes are left", relay.Pipes())
		}
	}
}

func TestAResetOnEitherSideEndsForwardingByAnError(t *testing.T) {
	for name, bulk := range map[string]bool{"copied": false, "by a pipe": true} {
		for _, writer := range []bool{false, true} {
			l := newLeg(t)
			b := bytes.Repeat([]byte("x"), 100)
			if bulk {
				b = make([]byte, 1<<20)
			}
			go l.from.Write(b)
			if _, err := io.ReadFull(l.to, make([]byte, len(b))); err != nil {
				t.Fatal(err)
			}
			if writer {
				stream.Abort(l.from)
			} else {
				stream.Abort(l.to)
				for err := error(nil); err == nil; {
					_, err = l.from.Write(b)
					select {
					case err := <-l.done:
						l.done <- err
						l.from.Close()
					default:
					}
				}
			}
			if err := <-l.done; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("%s, writer %v: %v", name, writer, err)
			}
		}
	}
	noPipes(t)
}
