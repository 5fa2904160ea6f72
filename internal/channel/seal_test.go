package channel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/internal/alloc"
	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/socket"
)

// blocked is an open channel whose end a is in a write that the lane does not
// take before x.Resume.
func blocked(t *testing.T) (a, b *side, x *memnet.Conn) {
	t.Helper()
	a, b, x, _ = open(t, memnet.Link{Buffer: 1 << 10})
	x.Stall()
	go a.send(new(buffer.Queue), make([]byte, 50000))
	synctest.Wait()
	return a, b, x
}

func (s *side) leave() {
	s.end.Close()
	<-s.ran
}

func TestQueueHoldsTwoBuffersAndTheThirdSenderWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, x := blocked(t)
		q := new(buffer.Queue)
		for range maxQueued {
			check(t, a.send(q, []byte("queued"))) // behind the write, at once
		}
		var sent atomic.Int32
		for range 3 {
			go func() {
				check(t, a.send(q, []byte("waited")))
				sent.Add(1)
			}()
			synctest.Wait()
		}
		if sent.Load() != 0 || q.Waiting != maxQueued {
			t.Errorf("%d more were taken, %d wait", sent.Load(), q.Waiting)
		}
		// Another stream has its own two.
		check(t, a.send(new(buffer.Queue), []byte("other")))
		x.Resume()
		synctest.Wait()
		if sent.Load() != 3 || q.Waiting != 0 || len(b.got.all()) != 1+maxQueued+1+3 {
			t.Errorf("afterwards: %d sent, %d wait, %d arrived", sent.Load(), q.Waiting, len(b.got.all()))
		}
		a.leave()
	})
}

// TestControlFramesWaitForOneBatchOfData, however many streams have queued more; and so do a
// stream that has nothing in that batch and is discarded, and the senders of those that have.
func TestControlFramesWaitForOneBatchOfData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, _ := open(t, memnet.Link{Rate: 1 << 20, Buffer: 1 << 10})
		const streams, size = 12, 50000
		queues := make([]buffer.Queue, streams)
		for i := range queues {
			check(t, a.end.Post(&queues[i], frameOf(make([]byte, size))))
			check(t, a.end.Post(&queues[i], frameOf(make([]byte, size))))
		}
		go a.end.Flush()
		synctest.Wait() // in the write of the first batch
		sent := make(chan time.Time, 1)
		go func() {
			check(t, a.send(&queues[0], []byte("more")))
			sent <- time.Now()
		}()
		check(t, a.end.Control(1, AppendHeader(nil, 0x14, 1, 0)))
		if a.end.Discard(&queues[streams-1], net.ErrClosed) {
			t.Error("a stream behind the first batch is said to be sealed")
		}
		begin := time.Now()
		if took := (<-sent).Sub(begin); took > 300*time.Millisecond { // a batch takes 234 ms
			t.Errorf("a sender waits %v for its own two buffers", took)
		}
		a.leave() // behind all that is queued
		synctest.Wait()
		if n := len(b.got.all()); n != 2*(streams-1)+2 {
			t.Errorf("%d frames arrived", n)
		}
		if i := slices.IndexFunc(b.got.all(), func(f []byte) bool { return len(f) == 0 }); i < 1 || i > buffer.Batch/size {
			t.Errorf("%d buffers went before a control frame", i)
		}
	})
}

func TestStopReleasesAWaitingSenderAndIsTakenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, x := blocked(t)
		q := new(buffer.Queue)
		check(t, a.send(q, []byte("1")))
		check(t, a.send(q, []byte("2")))
		result := make(chan error, 1)
		go func() { result <- a.send(q, []byte("3")) }()
		synctest.Wait()
		a.end.Stop(q, os.ErrDeadlineExceeded)
		if err := <-result; err != os.ErrDeadlineExceeded {
			t.Errorf("the waiting sender: %v", err)
		}
		if err := a.end.Post(q, frameOf([]byte("4"))); err != os.ErrDeadlineExceeded {
			t.Errorf("a stopped queue takes a buffer: %v", err)
		}
		a.end.Stop(q, nil)
		check(t, a.end.Post(q, frameOf([]byte("5"))))
		x.Resume()
		synctest.Wait()
		var got []string
		for _, f := range b.got.all()[1:] {
			got = append(got, string(f))
		}
		if !slices.Equal(got, []string{"1", "2", "5"}) {
			t.Errorf("what was queued arrived as %q", got)
		}
		a.leave()
	})
}

func TestDiscardDropsAQueueForGoodAndSaysWhetherAnythingWasSealed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, x := blocked(t)
		fresh, other, why := new(buffer.Queue), new(buffer.Queue), errors.New("reset")
		check(t, a.send(fresh, []byte("dropped")))
		check(t, a.send(other, []byte("kept 1")))
		check(t, a.send(fresh, []byte("dropped too")))
		check(t, a.send(other, []byte("kept 2")))
		result := make(chan error, 1)
		go func() { result <- a.send(fresh, []byte("waiting")) }()
		synctest.Wait()
		if a.end.Discard(fresh, why) {
			t.Error("something of it is said to be sealed")
		}
		if err := <-result; err != why {
			t.Errorf("the waiting sender: %v", err)
		}
		a.end.Stop(fresh, nil)
		if err := a.send(fresh, []byte("late")); err != why || fresh.Waiting != 0 {
			t.Errorf("a discarded queue lives again: %v, %d wait", err, fresh.Waiting)
		}
		x.Resume()
		synctest.Wait()
		got := b.got.all()[1:]
		if len(got) != 2 || string(got[0]) != "kept 1" || string(got[1]) != "kept 2" {
			t.Errorf("%q arrived", got)
		}
		if !a.end.Discard(other, why) {
			t.Error("what has arrived was not sealed")
		}
		a.leave()
	})
}

func TestDiscardLeavesAloneWhatIsBeingWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, x, _ := open(t, memnet.Link{Buffer: 1 << 10})
		x.Stall()
		q, body := new(buffer.Queue), bytes.Repeat([]byte("data"), 10000)
		go a.send(q, body)
		synctest.Wait()
		check(t, a.send(q, []byte("dropped")))
		if !a.end.Discard(q, net.ErrClosed) {
			t.Error("a buffer in a write counts as not sealed")
		}
		x.Resume()
		synctest.Wait()
		if got := b.got.all(); len(got) != 1 || !bytes.Equal(got[0], body) || q.Waiting != 0 {
			t.Errorf("%d frames arrived, %d wait", len(got), q.Waiting)
		}
		a.leave()
	})
}

func TestControlFramesOfAKeyReplaceOneAnotherAndGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, x := blocked(t)
		check(t, a.send(new(buffer.Queue), []byte("data")))
		credit := func(stream uint32, n int) []byte {
			return binary.BigEndian.AppendUint64(AppendHeader(nil, 0x16, stream, 8), uint64(n))
		}
		for n := range 1000 {
			for stream := range uint32(3) {
				check(t, a.end.Control(uint64(stream), credit(stream+1, n)))
			}
		}
		if n := len(a.end.control); n != 3 {
			t.Errorf("%d control frames wait", n)
		}
		x.Resume()
		synctest.Wait()
		got := b.got.all()[1:] // behind what was in the write
		if len(got) != 4 || string(got[3]) != "data" {
			t.Fatalf("%d frames arrived, the last is %q", len(got), got[len(got)-1])
		}
		for _, f := range got[:3] {
			if binary.BigEndian.Uint64(f) != 999 {
				t.Errorf("an old frame arrived: %x", f)
			}
		}
		a.leave()
	})
}

func TestControlFramesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, x := blocked(t)
		for key := range uint64(maxControl) {
			check(t, a.end.Control(key, AppendHeader(nil, 0x16, 1, 0)))
		}
		check(t, a.end.Control(7, AppendHeader(nil, 0x16, 1, 0))) // a known key is no more
		if err := a.end.Control(maxControl, AppendHeader(nil, 0x16, 1, 0)); err != errControl {
			t.Errorf("one more: %v", err)
		}
		if err := <-a.ran; err != errControl {
			t.Errorf("the channel: %v", err)
		}
		x.Resume()
		<-b.ran
	})
}

func TestAllControlFramesOfABurstArrive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, x := blocked(t)
		var want [][]byte
		for key := range 2000 {
			body := bytes.Repeat([]byte{byte(key)}, key%40)
			want = append(want, body)
			check(t, a.end.Control(uint64(key), append(AppendHeader(nil, 0x15, 1, len(body)), body...)))
		}
		long := bytes.Repeat([]byte{9}, 8200) // as long as a credential
		want = append(want, long)
		check(t, a.end.Control(1<<40, append(AppendHeader(nil, 0x15, 1, len(long)), long...)))
		for i := range 50 { // small data next to them, and some that is not
			body := bytes.Repeat([]byte{byte(i)}, 1+i*90)
			want = append(want, body)
			check(t, a.send(new(buffer.Queue), body))
		}
		x.Resume()
		synctest.Wait()
		got := b.got.all()[1:]
		if !slices.EqualFunc(got, want, bytes.Equal) {
			t.Errorf("%d frames arrived, or in another order; sent were %d", len(got), len(want))
		}
		a.leave()
	})
}

func TestSmallFramesShareAWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, x := blocked(t)
		for range 100 {
			check(t, a.send(new(buffer.Queue), []byte("keystroke")))
		}
		before := a.end.writes.Load()
		x.Resume()
		synctest.Wait()
		if n := a.end.writes.Load() - before; n != 2 {
			t.Errorf("%d writes: one was under way, and 100 small frames need one", n)
		}
		if n := len(b.got.all()); n != 101 {
			t.Errorf("%d frames arrived", n)
		}
		a.leave()
	})
}

// Each of many that have little to send would find the lane free.
func TestWhatManyHaveToSendAtOnceGoesOutTogether(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // nobody sends while another writes
	synctest.Test(t, func(t *testing.T) {
		a, b, _, _ := open(t, memnet.Link{})
		const streams = 40
		ready := make(chan struct{})
		for range streams {
			go func() {
				<-ready
				check(t, a.send(new(buffer.Queue), []byte("keystroke")))
			}()
		}
		check(t, a.send(new(buffer.Queue), []byte("before them")))
		synctest.Wait()
		before := a.end.writes.Load()
		close(ready)
		synctest.Wait()
		if n := a.end.writes.Load() - before; n > streams/4 {
			t.Errorf("%d writes for %d streams", n, streams)
		}
		if n := len(b.got.all()); n != streams+1 {
			t.Errorf("%d frames arrived", n)
		}
		a.leave()
	})
}

func TestSealedBuffersGoOutTogetherAsFarAsTheLaneIsQuick(t *testing.T) {
	for _, of := range []struct {
		name                string
		quick, count, bytes int
		writes              int64
	}{
		{"all of them", buffer.Batch, 8, 8 << 10, 1},
		{"each on its own", 0, 8, 8 << 10, 8},
		{"half a batch at most", together, 9, 30 << 10, 3},
		{"two records", together, 8, buffer.Bulk, 4},
		{"each of half a batch", together, 4, buffer.Batch / 2, 4},
	} {
		t.Run(of.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b, _, _ := open(t, memnet.Link{})
				synctest.Wait()
				for range of.count {
					check(t, a.end.Post(new(buffer.Queue), filled(of.bytes)))
				}
				a.end.quick = of.quick
				before := a.end.writes.Load()
				a.end.Flush()
				synctest.Wait()
				if n := a.end.writes.Load() - before; n != of.writes {
					t.Errorf("%d writes of %d buffers, not %d", n, of.count, of.writes)
				}
				if n := len(b.got.all()); n != of.count*((of.bytes+buffer.Bulk-1)/buffer.Bulk) {
					t.Errorf("%d frames of %d buffers arrived", n, of.count)
				}
				a.leave()
			})
		})
	}
}

func TestAsyncSenderNeverSitsInAWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _, x, _ := open(t, memnet.Link{Buffer: 1 << 10})
		x.Stall()
		q := new(buffer.Queue)
		q.Async.Store(true)
		check(t, a.send(q, make([]byte, 50000))) // returns
		synctest.Wait()
		if q.Waiting != 1 || !q.Sealed {
			t.Errorf("%d wait, sealed %v", q.Waiting, q.Sealed)
		}
		x.Resume()
		a.leave()
	})
}

// filled is a buffer of n bytes of payload in frames as long as they may be.
func filled(n int) *buffer.Buffer {
	b := buffer.ForPayload(n)
	for n > 0 {
		k := min(n, buffer.Bulk)
		copy(b.Next(), AppendHeader(nil, 0x13, 1, k))
		b.Commit(frameHeader + k)
		n -= k
	}
	return b
}

// TestABudgetThatFellRisesAgainWhileManySend: their buffers are of a quarter of it, and four go out
// in one write.
func TestABudgetThatFellRisesAgainWhileManySend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _, x := blocked(t)
		a.end.budget.Store(buffer.Batch / 2)
		a.end.quick = together
		for range 16 {
			check(t, a.end.Post(new(buffer.Queue), filled(buffer.Batch/8)))
		}
		a.end.Wake()
		x.Resume()
		synctest.Wait()
		if n := a.end.budget.Load(); n != buffer.Batch {
			t.Errorf("the budget is %d", n)
		}
		a.leave()
	})
}

func TestBudgetFollowsTheLane(t *testing.T) {
	fill := func(t *testing.T, a *side) {
		check(t, a.end.Send(new(buffer.Queue), filled(a.end.Budget())))
	}
	synctest.Test(t, func(t *testing.T) {
		a, _, _, _ := open(t, memnet.Link{Rate: 1 << 20, Buffer: 16 << 10})
		if n := a.end.Budget(); n != buffer.Batch {
			t.Errorf("a new lane has a budget of %d", n)
		}
		for range 10 {
			fill(t, a)
		}
		if n := a.end.Budget(); n != buffer.Shared {
			t.Errorf("on a slow lane the budget is %d", n)
		}
		// And up again when it is fast.
		for range 10 {
			a.end.pace(a.end.Budget()+frameHeader, 0)
		}
		if n := a.end.Budget(); n != buffer.Batch {
			t.Errorf("on a fast lane the budget is %d", n)
		}
		if a.end.quick != together {
			t.Errorf("a fast lane takes %d of several streams in one write", a.end.quick)
		}
		// A buffer that was not full says nothing.
		a.end.budget.Store(buffer.Shared)
		a.end.pace(buffer.Shared-1, 0)
		if n := a.end.Budget(); n != buffer.Shared {
			t.Errorf("after a short write the budget is %d", n)
		}
		a.leave()
	})
	synctest.Test(t, func(t *testing.T) {
		a, _, x := blocked(t)
		check(t, a.send(new(buffer.Queue), []byte("somebody else")))
		for waiting := 1; waiting <= few; waiting++ {
			if n := a.end.Budget(); n != buffer.Batch/2 {
				t.Errorf("while %d wait the budget of a fast lane is %d", waiting, n)
			}
			check(t, a.end.Post(new(buffer.Queue), frameOf([]byte("one more"))))
		}
		if n := a.end.Budget(); n != buffer.Bulk {
			t.Errorf("while many wait the budget of a fast lane is %d", n)
		}
		for slow := buffer.Batch / 2; slow >= buffer.Shared; slow /= 2 {
			a.end.budget.Store(int32(slow))
			if n := a.end.Budget(); n != max(slow/4, buffer.Shared) {
				t.Errorf("while others wait the budget of a lane that takes %d is %d", slow, n)
			}
		}
		x.Resume()
		synctest.Wait()
		if n := a.end.Budget(); n < buffer.Shared {
			t.Errorf("then it is %d", n)
		}
		a.leave()
	})
}

// sink is a lane that takes everything.
type sink struct{ net.Conn }

func (sink) Write(b []byte) (int, error)     { return len(b), nil }
func (sink) Close() error                    { return nil }
func (sink) SetDeadline(time.Time) error     { return nil }
func (sink) SetReadDeadline(time.Time) error { return nil }

func TestSendingAllocatesNothing(t *testing.T) {
	if alloc.Raced {
		t.Log("NOT RUN: with the race detector sync.Pool drops buffers at random")
		return
	}
	synctest.Test(t, func(t *testing.T) {
		a, b, _, _ := open(t, memnet.Link{})
		a.end.sealer.lane = socket.NewWriter(sink{})
		q := new(buffer.Queue)
		for name, n := range map[string]int{"a keystroke": 1, "a frame": 16 << 10, "a full frame": 60 << 10} {
			send := func() {
				buf := buffer.ForPayload(n)
				binary.BigEndian.PutUint16(buf.Next()[5:], uint16(n))
				buf.Commit(frameHeader + n)
				if err := a.end.Send(q, buf); err != nil {
					t.Fatal(err)
				}
			}
			send()
			if got := testing.AllocsPerRun(100, send); got != 0 {
				t.Errorf("%s: %v allocations", name, got)
			}
		}
		b.end.lane.Close()
		<-a.ran
		<-b.ran
	})
}
