package channel

import (
	"context"
	"net"
	"runtime"
	"sync"
	"testing"

	"github.com/portal-tunnel/portal/internal/alloc"
	"github.com/portal-tunnel/portal/internal/memnet"
)

// What a stranger who does not go on has a responder hold, message 3 awaited: everything but its socket.
func TestAStrangerThatIsAnsweredHoldsLittle(t *testing.T) {
	if alloc.Raced {
		t.Log("NOT RUN: the race detector's own memory is more")
		return
	}
	const n = 500
	_, b := newSides(t)
	b.config.Turns = nil
	ctx, cancel := context.WithCancel(t.Context())
	measure := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	var lanes []net.Conn
	var all sync.WaitGroup
	start := func() {
		x, y := memnet.Pipe(memnet.Link{})
		lanes = append(lanes, x)
		all.Go(func() { Respond(ctx, y, b.config) })
	}
	for range n {
		start()
	}
	quiet := measure()
	for _, x := range lanes {
		h, err := newHandshake(b.config.Self, true, Preface{Kind: b.config.Kind, Suite: AESGCM}, [32]byte{}, b.config.now(), nil)
		if err != nil {
			t.Fatal(err)
		}
		m, err := h.write1()
		if err != nil {
			t.Fatal(err)
		}
		x.Write(appendField(Preface{Kind: b.config.Kind, Suite: AESGCM}.Append(nil), m))
		read := make([]byte, 2+message2Most)
		for got := 0; got < 2+message2Least; {
			k, err := x.Read(read[got:])
			if err != nil {
				t.Fatal(err)
			}
			got += k
		}
	}
	each := int64(measure()-quiet) / n
	t.Logf("%d bytes of heap and stack for each", each)
	if each > 3500 { // with the two messages and our proof it was 4,714
		t.Errorf("%d bytes for each", each)
	}
	cancel()
	for _, x := range lanes {
		x.Close()
	}
	all.Wait()
}
