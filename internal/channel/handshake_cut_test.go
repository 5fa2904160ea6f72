package channel

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/memnet"
)

// opened is what came of one attempt to open a channel on a lane that somebody
// meddled with. Times are from its beginning.
type opened struct {
	a, b           *side
	errA, errB     error
	tookA, tookB   time.Duration
	judgeA, judgeB bool // the judge of a decided about b, and the other way round
}

// attempt lets meddle have the lane first. An initiator that has its channel,
// because it sent the last byte, has it until that ends: its error and its time
// are then that.
func attempt(t testing.TB, a, b *side, meddle func(x, y *memnet.Conn)) *opened {
	t.Helper()
	o := &opened{a: a, b: b}
	a.config.Judge = func(*identity.Peer) error { o.judgeA = true; return nil }
	b.config.Judge = func(*identity.Peer) error { o.judgeB = true; return nil }
	a.got, b.got = new(frames), new(frames)
	x, y := memnet.Pipe(memnet.Link{})
	meddle(x, y)
	start := time.Now()
	var both sync.WaitGroup
	both.Go(func() {
		if a.end, o.errA = Initiate(context.Background(), x, a.config); a.end != nil {
			o.errA = a.end.Run(a.got)
		}
		o.tookA = time.Since(start)
	})
	both.Go(func() {
		if b.end, o.errB = Respond(context.Background(), y, b.config); b.end != nil {
			o.errB = b.end.Run(b.got)
		}
		o.tookB = time.Since(start)
	})
	both.Wait()
	synctest.Wait() // the actors of an end that is over
	return o
}

// failed says in what the attempt did not come to nothing, which it must when
// fewer than all bytes arrived unchanged. The initiator may have accepted the
// responder when confirmed, that is when only its own confirmation was hit.
func (o *opened) failed(confirmed bool) error {
	switch {
	case o.errA == nil || o.errB == nil || o.errA == ErrClosed || o.errB == ErrClosed:
		return fmt.Errorf("the ends say %v and %v", o.errA, o.errB)
	case o.b.end != nil || o.judgeB:
		return fmt.Errorf("the responder judged: %v, has a channel: %v", o.judgeB, o.b.end != nil)
	case (o.a.end != nil || o.judgeA) && !confirmed:
		return fmt.Errorf("the initiator judged: %v, has a channel: %v", o.judgeA, o.a.end != nil)
	case len(o.a.got.all())+len(o.b.got.all()) != 0:
		return fmt.Errorf("frames arrived: %d and %d", len(o.a.got.all()), len(o.b.got.all()))
	case o.a.config.Node.Len()+o.b.config.Node.Len() != 0:
		return fmt.Errorf("%d and %d actors are left", o.a.config.Node.Len(), o.b.config.Node.Len())
	}
	return nil
}

// writes are the offsets at which the writes of either end begin, in each
// direction, and where the last one ends: preface and message 1, message 3,
// confirmation; message 2, confirmation.
func writes(t testing.TB) (w [2][]int64) {
	t.Helper()
	synctest.Test(t.(*testing.T), func(t *testing.T) {
		a, b := newSides(t)
		x, y := memnet.Pipe(memnet.Link{})
		for i, c := range []*memnet.Conn{x, y} {
			c.OnWrite(func(off int64, b []byte) []byte {
				w[i] = append(w[i], off)
				if i+len(w[i]) == 3 { // its last write of an opening
					w[i] = append(w[i], off+int64(len(b)))
					c.OnWrite(nil)
				}
				return b
			})
		}
		reopen(t, a, b, x, y)
		a.end.Close()
		<-a.ran
		<-b.ran
	})
	return w
}

// Each direction of an opening is cut at each of its bytes, in each way in which
// a lane can be.
func TestAHandshakeThatIsCutAnywhereComesToNothing(t *testing.T) {
	w := writes(t)
	step := int64(every())
	cut := map[string]func(from *memnet.Conn, at int64){
		"FIN":   (*memnet.Conn).FinAt,
		"reset": (*memnet.Conn).CutAt,
		"stall": func(from *memnet.Conn, at int64) {
			from.OnWrite(func(off int64, b []byte) []byte { return b[:min(max(at-off, 0), int64(len(b)))] })
		},
	}
	for direction, starts := range w {
		size := starts[len(starts)-1]
		var places []int64
		for at := int64(0); at < size; at += step {
			places = append(places, at)
		}
		for _, at := range starts { // around each length and each end in any case
			places = append(places, at-1, at, at+1, at+2, at+3)
		}
		places = append(places, PrefaceSize, PrefaceSize+1, PrefaceSize+2)
		slices.Sort(places)
		places = slices.DeleteFunc(slices.Compact(places), func(at int64) bool { return at < 0 || at >= size })
		for kind, cut := range cut {
			t.Run(fmt.Sprintf("%s, direction %d", kind, direction), func(t *testing.T) {
				t.Parallel()
				t.Logf("%d places", len(places))
				for some := range slices.Chunk(places, 300) { // 10 s each: within the life of the credentials
					synctest.Test(t, func(t *testing.T) {
						a, b := newSides(t)
						for _, at := range some {
							o := attempt(t, a, b, func(x, y *memnet.Conn) { cut([]*memnet.Conn{x, y}[direction], at) })
							if err := o.failed(direction == 0 && at >= starts[2]); err != nil {
								t.Errorf("byte %d: %v", at, err)
							}
							want := time.Duration(0)
							if kind == "stall" {
								want = handshakeTime
							}
							if o.tookA != want || o.tookB != want {
								t.Errorf("byte %d: the ends took %s and %s, want %s", at, o.tookA, o.tookB, want)
							}
						}
					})
				}
			})
		}
	}
}

// The bytes of the messages themselves are flipped where they are read; here the
// lengths before them, bit by bit, and both confirmations.
func TestAFlippedLengthOrConfirmationComesToNothing(t *testing.T) {
	type flip struct {
		direction int
		at        int64
		bit       byte
	}
	var flips []flip
	w := writes(t)
	for direction, starts := range w {
		for i, at := range starts[:len(starts)-1] {
			if direction == 0 && i == 0 {
				at += PrefaceSize
			}
			for bit := range byte(16) {
				flips = append(flips, flip{direction, at + int64(bit/8), bit % 8})
			}
		}
		last := starts[len(starts)-2]
		for at := last + 2; at < starts[len(starts)-1]; at += int64(every()) {
			flips = append(flips, flip{direction, at, byte(at % 8)})
		}
	}
	t.Logf("%d flips", len(flips))
	for some := range slices.Chunk(flips, 300) {
		synctest.Test(t, func(t *testing.T) {
			a, b := newSides(t)
			for _, f := range some {
				shown := int64(0)
				o := attempt(t, a, b, func(x, y *memnet.Conn) {
					for i, c := range []*memnet.Conn{x, y} {
						c.OnWrite(func(off int64, b []byte) []byte {
							if i == 0 {
								shown = max(shown, off+int64(len(b)))
							}
							if i == f.direction && f.at >= off && f.at < off+int64(len(b)) {
								b[f.at-off] ^= 1 << f.bit
							}
							return b
						})
					}
				})
				own := f.direction == 0 && f.at >= w[0][2]
				if err := o.failed(own); err != nil {
					t.Errorf("%+v: %v", f, err)
				}
				if !own && shown > w[0][2] {
					t.Errorf("%+v: the initiator showed its credential", f)
				}
				if took := max(o.tookA, o.tookB); took > handshakeTime {
					t.Errorf("%+v: it took %s", f, took)
				}
			}
		})
	}
}
