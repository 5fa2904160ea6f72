package relay_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/relay"
	"github.com/portal-tunnel/portal/tests/serving"
)

// A leg is one direction through a forwarder, from end to end.
type leg struct {
	from, to *net.TCPConn // at the ends
	in, out  *net.TCPConn // the forwarder's
	done     chan error   // what forward returned
}

func newLeg(t *testing.T) *leg {
	t.Helper()
	l := &leg{done: make(chan error, 1)}
	l.from, l.in = serving.Pair(t)
	l.to, l.out = serving.Pair(t)
	go func() {
		err := relay.Forward(l.out, l.in)
		l.out.Close()
		l.in.Close()
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
	l.from.CloseWrite()
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
		l.to.SetReadBuffer(piece / 4)
		l.out.SetWriteBuffer(piece / 4)
		l.in.SetReadBuffer(2 * piece)
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

// noPipes waits until none has an owner, and closes those that have none.
func noPipes(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(time.Minute); relay.SweepPipes() > 0; runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatalf("%d pipes are left", relay.Pipes())
		}
	}
}

func TestForwardingKeepsPipesThatAreNeeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var pool relay.PipePool
		pool.Use(5)
		for i := range 10 { // two are needed again and again
			time.Sleep(700 * time.Millisecond)
			if n := pool.Count(); i > 3 && n != 2 {
				t.Errorf("%d pipes where two are needed", n)
			}
			pool.Use(2)
		}
		time.Sleep(3 * time.Second)
		if n := pool.Count(); n != 0 {
			t.Errorf("%d pipes that nobody needs", n)
		}
		pool.Use(relay.MaxPipes)
		if n := pool.Count(); n != relay.MaxPipes {
			t.Errorf("%d pipes where %d are needed", n, relay.MaxPipes)
		}
		time.Sleep(3 * time.Second)
		if n := pool.Count(); n != 0 {
			t.Errorf("%d pipes that nobody needs", n)
		}
	})
}

// What a lane held while it was busy it does not hold when it is idle.
func TestForwardingHoldsNoPipeForAnIdleLane(t *testing.T) {
	l := newLeg(t)
	l.to.SetReadBuffer(16 << 10) // what is not read stays in a pipe
	l.out.SetWriteBuffer(16 << 10)
	for _, n := range []int{4 << 20, 100} {
		sent := make(chan error, 1)
		go func() {
			_, err := l.from.Write(make([]byte, n))
			sent <- err
		}()
		for end := time.Now().Add(time.Minute); n > 100 && relay.Pipes() == 0; runtime.Gosched() {
			if time.Now().After(end) {
				t.Fatal("bulk that nobody reads is in no pipe")
			}
		}
		if _, err := io.ReadFull(l.to, make([]byte, n)); err != nil {
			t.Fatal(err)
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		noPipes(t)
	}
	l.from.CloseWrite()
	if err := <-l.done; err != nil {
		t.Error(err)
	}
}

// A splice stops before an urgent byte, which TCP takes out of the stream, as where there is nothing
// yet or nothing more.
func TestForwardingLosesNothingAtAnUrgentByte(t *testing.T) {
	const before, after = 8 << 20, 100_000
	l := newLeg(t)
	raw, err := l.from.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() {
		_, err := l.from.Write(bytes.Repeat([]byte("b"), before))
		if e := raw.Write(func(fd uintptr) bool {
			e := unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil)
			if e != unix.EAGAIN {
				err = errors.Join(err, e)
			}
			return e != unix.EAGAIN
		}); e != nil {
			err = e
		}
		_, e := l.from.Write(bytes.Repeat([]byte("a"), after))
		sent <- errors.Join(err, e)
	}()
	// All of it comes before there is an end that would wake who waits in vain.
	got := make([]byte, before+after)
	l.to.SetReadDeadline(time.Now().Add(time.Minute))
	if n, err := io.ReadFull(l.to, got); err != nil {
		t.Fatalf("%d bytes of %d: %v", n, len(got), err)
	}
	if b, a := bytes.Count(got[:before], []byte("b")), bytes.Count(got[before:], []byte("a")); b != before || a != after {
		t.Errorf("%d bytes before the urgent one and %d behind it", b, a)
	}
	if err := errors.Join(<-sent, l.from.CloseWrite()); err != nil {
		t.Error(err)
	}
	if n, err := l.to.Read(got); n != 0 || err != io.EOF {
		t.Errorf("behind all of it: %d, %v", n, err)
	}
	if err := <-l.done; err != nil {
		t.Error(err)
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
				for err := error(nil); err == nil; { // until it is passed on
					_, err = l.from.Write(b)
				}
			}
			if err := <-l.done; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("%s, writer %v: %v", name, writer, err)
			}
		}
	}
	noPipes(t)
}

// A cut may come before the goroutine of one direction has begun.
func TestForwardingWhatIsClosedMakesNoPipe(t *testing.T) {
	noPipes(t)
	before := pipesOpen(t)
	for _, c := range []struct{ from, to bool }{{true, false}, {false, true}, {true, true}} {
		l := &leg{}
		l.from, l.in = serving.Pair(t)
		l.to, l.out = serving.Pair(t)
		if c.from {
			l.in.Close()
		}
		if c.to {
			l.out.Close()
			l.from.Write([]byte("x"))
		}
		if err := relay.Forward(l.out, l.in); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed %+v: %v", c, err)
		}
	}
	if n := pipesOpen(t); n > before {
		t.Errorf("%d descriptors of pipes, %d before", n, before)
	}
}

// pipesOpen is how many of this process's descriptors are of pipes, whoever made them.
func pipesOpen(t *testing.T) (n int) {
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range all {
		if to, _ := os.Readlink("/proc/self/fd/" + fd.Name()); strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
}
