package channel

import (
	"net"
	"runtime"
	"testing"
	"testing/synctest"

	"github.com/portal-tunnel/portal/internal/alloc"
	"github.com/portal-tunnel/portal/internal/memnet"
)

// What a stranger who does not go on has a responder hold, message 3 awaited, beside what it held while
// message 1 was.
func TestAStrangerThatIsAnsweredHoldsLittle(t *testing.T) {
	if alloc.Raced {
		t.Log("NOT RUN: the race detector's own memory is more")
		return
	}
	synctest.Test(t, func(t *testing.T) {
		const n = 500
		a, b := newSides(t)
		memory := func() uint64 {
			synctest.Wait() // for every responder to wait
			runtime.GC()
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return m.HeapAlloc + m.StackInuse
		}
		var lanes []net.Conn
		for range n {
			x, y := memnet.Pipe(memnet.Link{})
			lanes = append(lanes, x)
			go Respond(t.Context(), y, b.config)
		}
		quiet := memory()
		p := Preface{Kind: a.config.Kind, Suite: AESGCM}
		for _, x := range lanes {
			o := &opening{lane: x, config: a.config}
			m := must(begun(t, a.self, true, p, [32]byte{}).write1())(t)
			must(x.Write(appendField(p.Append(nil), m)))(t)
			must(o.readMessage(message2Least, message2Most))(t)
		}
		each := int64(memory()-quiet) / n
		t.Logf("%d bytes of heap and stack for each", each)
		if each > 3500 { // with the two messages and our proof it was 4,909
			t.Errorf("%d bytes for each", each)
		}
		for _, x := range lanes {
			x.Close()
		}
	})
}
