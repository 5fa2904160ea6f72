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

// drain has n accepted streams over a path of the given round trip, the first of which takes
// the given number of first windows, each in the given time. It gives that one's window at the
// end and how many credits it has given.
func drain(t *testing.T, rtt time.Duration, n, windows int, each time.Duration) (window, credits int) {
	t.Helper()
	const piece = 1 << 10
	synctest.Test(t, func(t *testing.T) {
		over := &far{&sink{control: make(map[uint64]bool)}, rtt, make(map[uint64]int)}
		var node routing.Node
		var c *Conn
		m := NewMux(&node, over, false, Limits{}, func(in *Incoming) {
			if one := in.Accept(); c == nil {
				c = one
			}
		})
		for i := range n {
			if err := m.Frame(frameOpen, uint32(1+2*i), openFrame(t, uint32(1+2*i))); err != nil {
				t.Fatal(err)
			}
		}
		b := make([]byte, piece)
		for range windows * firstWindow / piece {
			if err := m.Frame(frameData, 1, b); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c, b); err != nil {
				t.Fatal(err)
			}
			time.Sleep(each * piece / firstWindow)
		}
		window, credits = c.Window(), over.credits[key(frameCredit, 1)]
		m.Fail(errEnding)
		node.Close()
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

// A window of 256 KiB comes in two halves. What lies between them is the line's time for the
// second only if the reader took the first before there was a second.
func TestTheOnlyStreamTakesThePaceOfBytesThatItsReaderWaitedFor(t *testing.T) {
	const rtt = 100 * time.Millisecond
	for _, c := range []struct {
		name   string
		n      int // streams
		rtt    time.Duration
		first  int           // bytes that are there before any is read
		second time.Duration // until the rest is read
		want   int
	}{
		{"a fast line", 1, rtt, trainWindow / 2, time.Millisecond, 8 * trainWindow},
		{"a slow line", 1, rtt, trainWindow / 2, 40 * time.Millisecond, trainWindow / 2 * 5},
		{"a line that is full", 1, rtt, trainWindow / 2, rtt, trainWindow},
		{"all of it held", 1, rtt, trainWindow, time.Millisecond, 4 * trainWindow},
		{"no time between", 1, rtt, trainWindow / 2, 0, 4 * trainWindow},
		{"a short path", 1, leastRTT, trainWindow / 2, time.Millisecond / 2, 4 * trainWindow},
		{"one of two", 2, rtt, trainWindow / 2, time.Millisecond, 4 * trainWindow},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var node routing.Node
				var conn *Conn
				m := NewMux(&node, &far{&sink{control: make(map[uint64]bool)}, c.rtt, make(map[uint64]int)}, false, Limits{}, func(in *Incoming) {
					if one := in.Accept(); conn == nil {
						conn = one
					}
				})
				for i := range c.n {
					if err := m.Frame(frameOpen, uint32(1+2*i), openFrame(t, uint32(1+2*i))); err != nil {
						t.Fatal(err)
					}
				}
				b := make([]byte, 16<<10)
				arrive := func(n int) {
					for ; n > 0; n -= len(b) {
						if err := m.Frame(frameData, 1, b); err != nil {
							t.Fatal(err)
						}
					}
				}
				read := func(n int) {
					for ; n > 0; n -= len(b) {
						if _, err := io.ReadFull(conn, b); err != nil {
							t.Fatal(err)
						}
					}
				}
				arrive(firstWindow)
				read(firstWindow)
				if conn.Window() != trainWindow {
					t.Fatalf("the window is %d KiB", conn.Window()>>10)
				}
				arrive(c.first)
				read(trainWindow / 2)
				time.Sleep(c.second)
				arrive(trainWindow - c.first)
				read(trainWindow / 2)
				if got := conn.Window(); got < c.want-1 || got > c.want {
					t.Errorf("the window is %d KiB, want %d", got>>10, c.want>>10)
				}
				m.Fail(errEnding)
				node.Close()
			})
		})
	}
}
