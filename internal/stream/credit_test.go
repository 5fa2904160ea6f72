package stream

import (
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/routing"
)

// far is a sink behind a path of the given round trip, and counts credits.
type far struct {
	*sink
	rtt     time.Duration
	credits map[uint64]int
}

func (f *far) RTT() time.Duration { return f.rtt }

func (f *far) Control(key uint64, frame []byte) error {
	f.credits[key]++
	return f.sink.Control(key, frame)
}

// receiver is the first of n accepted streams over a path of the given round trip.
type receiver struct {
	t    *testing.T
	over *far
	node routing.Node
	mux  *Mux
	conn *Conn
}

// receiving calls use with a receiver, in virtual time, and ends it.
func receiving(t *testing.T, rtt time.Duration, n int, use func(*receiver)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{t: t, over: &far{&sink{control: make(map[uint64]bool)}, rtt, make(map[uint64]int)}}
		r.mux = NewMux(&r.node, r.over, false, Limits{}, func(in *Incoming) {
			if one := in.Accept(); r.conn == nil {
				r.conn = one
			}
		})
		for i := range n {
			if err := r.mux.Frame(frameOpen, uint32(1+2*i), openFrame(t, uint32(1+2*i))); err != nil {
				t.Fatal(err)
			}
		}
		use(r)
		r.mux.Fail(errEnding)
		r.node.Close()
	})
}

const piece = 1 << 10

// arrive brings n bytes, whole pieces.
func (r *receiver) arrive(n int) {
	b := make([]byte, piece)
	for ; n > 0; n -= piece {
		if err := r.mux.Frame(frameData, 1, b); err != nil {
			r.t.Fatal(err)
		}
	}
}

// read takes n bytes, whole pieces, and lets each take its time.
func (r *receiver) read(n int, each time.Duration) {
	b := make([]byte, piece)
	for ; n > 0; n -= piece {
		if _, err := io.ReadFull(r.conn, b); err != nil {
			r.t.Fatal(err)
		}
		time.Sleep(each)
	}
}

// drain has n streams over a path of the given round trip, the first of which takes
// the given number of first windows, each in the given time. It gives that one's window at the
// end and how many credits it has given.
func drain(t *testing.T, rtt time.Duration, n, windows int, each time.Duration) (window, credits int) {
	t.Helper()
	receiving(t, rtt, n, func(r *receiver) {
		for range windows * firstWindow / piece {
			r.arrive(piece)
			r.read(piece, each*piece/firstWindow)
		}
		window, credits = r.conn.Window(), r.over.credits[key(frameCredit, 1)]
	})
	return window, credits
}

// Where a credit is soon there, one for each half of a window will do; on a long line, which
// goes idle without, it is given in smaller steps.
func TestCreditComesByHalvesOfTheWindowOnAShortPath(t *testing.T) {
	const windows = 20
	for _, c := range []struct {
		rtt         time.Duration
		least, most int // credits a window
	}{
		{100 * time.Microsecond, 2, 2},
		{leastRTT, 2, 2},
		{leastRTT + 1, firstWindow / leastStep, firstWindow / leastStep},
		{100 * time.Millisecond, firstWindow / leastStep, firstWindow / leastStep},
	} {
		t.Run(c.rtt.String(), func(t *testing.T) {
			window, n := drain(t, c.rtt, 1, windows, 3*max(c.rtt, leastRTT)) // too slow to grow
			if window != firstWindow {
				t.Fatalf("the window is %d bytes", window)
			}
			// The first window tells whether the path is short: until then credit comes as on a long one.
			if n < windows*c.least || n > windows*c.most+firstWindow/leastStep {
				t.Errorf("%d credits for %d windows, want %d to %d a window", n, windows, c.least, c.most)
			}
		})
	}
}

// One of many has its next turn later, and no window of one turn lasts until then.
func TestWindowsOfManyStreamsOnAShortPathLastTwoTurns(t *testing.T) {
	for _, c := range []struct {
		rtt   time.Duration
		n     int
		grows bool
	}{
		{100 * time.Microsecond, aFew, false},
		{100 * time.Microsecond, aFew + 1, true},
		{5 * leastRTT, aFew + 1, false}, // a round trip of many turns
	} {
		t.Run(fmt.Sprintf("%d streams, %v", c.n, c.rtt), func(t *testing.T) {
			each := 3 * max(c.rtt, leastRTT) // three round trips of few streams, one and a half of many
			window, _ := drain(t, c.rtt, c.n, 20, each)
			carried := int(firstWindow * 4 * leastRTT / each) // by two turns of many
			switch {
			case !c.grows && window != firstWindow:
				t.Errorf("the window grew to %d bytes", window)
			case c.grows && (window <= firstWindow || window > carried+carried/10):
				t.Errorf("the window is %d bytes, want what two of its turns carry, %d", window, carried)
			}
		})
	}
}

// A window of 256 KiB comes in two parts. What lies between them is the line's time for the
// second only if the reader took the first before there was a second.
func TestTheOnlyStreamTakesThePaceOfBytesThatItsReaderWaitedFor(t *testing.T) {
	const rtt, half = 100 * time.Millisecond, trainWindow / 2
	for _, c := range []struct {
		name        string
		n           int // streams
		rtt         time.Duration
		there, read int           // bytes of the first part, and how many of them are read before the second
		idle, line  time.Duration // before the first, and between
		want        int
	}{
		{"a fast line", 1, rtt, half, half, 0, time.Millisecond, 8 * trainWindow},
		{"a slow line", 1, rtt, half, half, 0, 40 * time.Millisecond, half * 5},
		{"a slow line behind an idle round trip", 1, rtt, half, half, 130 * time.Millisecond, 40 * time.Millisecond, half * 5},
		{"a wait for credit between", 1, rtt, half, half, 0, rtt, trainWindow * 8 / 5},
		{"a line that is full", 1, rtt, half, half, 0, 3 * rtt / 2, trainWindow * 4 / 3},
		{"all of it held", 1, rtt, trainWindow, half, 0, time.Millisecond, 4 * trainWindow},
		{"too little behind it", 1, rtt, trainWindow * 15 / 16, trainWindow * 15 / 16, 0, time.Millisecond / 4, 4 * trainWindow},
		{"no time between", 1, rtt, half, half, 0, 0, 4 * trainWindow},
		{"a short path", 1, leastRTT, half, half, 0, time.Millisecond / 2, 4 * trainWindow},
		{"one of two", 2, rtt, half, half, 0, time.Millisecond, 4 * trainWindow},
	} {
		t.Run(c.name, func(t *testing.T) {
			receiving(t, c.rtt, c.n, func(r *receiver) {
				pass := func(d time.Duration) { <-time.After(d) }
				r.arrive(firstWindow)
				r.read(firstWindow, 0)
				if got := r.conn.Window(); got != trainWindow {
					t.Fatalf("the window is %d KiB", got>>10)
				}
				pass(c.idle)
				r.arrive(c.there)
				r.read(c.read, 0)
				pass(c.line)
				r.arrive(trainWindow - c.there)
				r.read(trainWindow-c.read, 0)
				if got := r.conn.Window(); got < c.want-1 || got > c.want {
					t.Errorf("the window is %d KiB, want %d", got>>10, c.want>>10)
				}
			})
		})
	}
}
