package stream

import (
	"sync/atomic"
	"testing"

	"github.com/portal-tunnel/portal/routing"
)

// told is a sink that says what it is told.
type told struct {
	*sink
	control func(key uint64)
	flushed atomic.Bool
	woken   atomic.Bool
}

func (o *told) Flush() { o.flushed.Store(true) }
func (o *told) Wake()  { o.woken.Store(true) }
func (o *told) Control(key uint64, frame []byte) error {
	if o.control != nil {
		o.control(key)
	}
	return o.sink.Control(key, frame)
}

func openFrame(t *testing.T, id uint32) []byte {
	t.Helper()
	b, err := appendOpen(nil, id, Header{Kind: Probe, Name: "db"}, firstWindow)
	if err != nil {
		t.Fatal(err)
	}
	return b[headerSize:]
}

// Who answers is often the lane reader, or decides on the streams of everybody.
func TestAnAnswerIsWrittenBySomebodyElse(t *testing.T) {
	var n routing.Node
	over := &told{sink: &sink{control: make(map[uint64]bool)}}
	m := NewMux(&n, over, false, Limits{}, func(in *Incoming) { in.Answer() })
	if err := m.Frame(frameOpen, 1, openFrame(t, 1)); err != nil {
		t.Fatal(err)
	}
	if over.flushed.Load() || !over.woken.Load() {
		t.Errorf("written by who answers: %v; by another: %v", over.flushed.Load(), over.woken.Load())
	}
	m.Fail(errEnding)
}

// Whoever asks behind its data whether that has arrived must hear of the reset before the answer.
func TestTheOtherEndIsToldOfAResetBeforeItsBytesAreDropped(t *testing.T) {
	var n routing.Node
	var c *Conn
	asked := false
	over := &told{sink: &sink{control: make(map[uint64]bool)}}
	over.control = func(k uint64) {
		if k == key(frameReset, 1) {
			asked = true
			free := c.recv.TryLock()
			if free {
				c.recv.Unlock()
			}
			if free || c.doneRecv.Load() {
				t.Error("the lane reader may have dropped some")
			}
		}
	}
	m := NewMux(&n, over, false, Limits{}, func(in *Incoming) { c = in.Accept() })
	if err := m.Frame(frameOpen, 1, openFrame(t, 1)); err != nil {
		t.Fatal(err)
	}
	c.Reset(CodeAway, "")
	if !asked {
		t.Error("it is not told")
	}
	m.Fail(errEnding)
}

// It may come while this end's own is on its way out.
func TestAResetThatFindsItsStreamJustOverIsRemembered(t *testing.T) {
	var n routing.Node
	over := &told{sink: &sink{control: make(map[uint64]bool)}}
	m := NewMux(&n, over, true, Limits{}, nil)
	c, err := m.Open(Header{Kind: Bytes, Name: "db"})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []struct {
		kind uint8
		body []byte
	}{{frameOpened, appendOffset(nil, frameOpened, c.id, firstWindow)}, {frameEnd, appendOffset(nil, frameEnd, c.id, 0)}} {
		if err := m.Frame(f.kind, c.id, f.body[headerSize:]); err != nil {
			t.Fatal(err)
		}
	}
	c.CloseWrite()
	<-c.Done()
	// As if it had been found before.
	if err := c.frame(frameReset, appendCode(nil, frameReset, c.id, CodeAway, "")[headerSize:]); err != nil {
		t.Fatal(err)
	}
	if c.Dropped() == nil {
		t.Error("it says that nothing was dropped")
	}
	m.Fail(errEnding)
}

func TestLateResetsAreRememberedAndBounded(t *testing.T) {
	var n routing.Node
	m := NewMux(&n, &sink{control: make(map[uint64]bool)}, false, Limits{}, nil)
	m.highest = 99999
	reset := appendCode(nil, frameReset, 1, CodeAway, "")[headerSize:]
	for id := uint32(1); id < 9999; id += 2 {
		if err := m.Frame(frameReset, id, reset); err != nil {
			t.Fatal(err)
		}
	}
	if len(m.late) != maxLate || cap(m.late) > 2*maxLate {
		t.Errorf("%d are kept, in room for %d", len(m.late), cap(m.late))
	}
	for id, dropped := range map[uint32]bool{9997: true, 9001: true, 3: true /* forgotten: not known */, 10001: false} {
		if err := (&Conn{mux: m, id: id}).Dropped(); (err != nil) != dropped {
			t.Errorf("stream %d: %v", id, err)
		}
	}
	m.Fail(errEnding)
}
