package buffer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
)

// fill commits records of the given plaintext lengths, each of its number's bytes.
func fill(t *testing.T, b *Buffer, sizes ...int) {
	t.Helper()
	for i, n := range sizes {
		next := b.Next()
		if len(next) < n {
			t.Fatalf("record %d: room for %d bytes of %d", i, len(next), n)
		}
		for j := range n {
			next[j] = byte(i + 1)
		}
		b.Commit(n)
	}
}

func TestRecordsLieOneBehindAnotherAsOnTheWire(t *testing.T) {
	b := Get(classes[len(classes)-1])
	defer b.Release()
	sizes := []int{1, Frame + Bulk, 100, Frame + Bulk}
	fill(t, b, sizes...)
	if b.Count() != 4 || b.Payload() != 1+100+2*(Frame+Bulk) || len(b.Bytes()) != b.Payload()+4*Around {
		t.Fatalf("%d records, payload %d, %d bytes", b.Count(), b.Payload(), len(b.Bytes()))
	}
	if b.Next() != nil {
		t.Error("there is room for a fifth record")
	}
	i := 0
	err := b.Records(func(rec []byte) error {
		if len(rec) != sizes[i]+Around || cap(rec) != len(rec) {
			t.Errorf("record %d has %d bytes and a capacity of %d", i, len(rec), cap(rec))
		}
		if !bytes.Equal(rec[Prefix:len(rec)-Suffix], bytes.Repeat([]byte{byte(i + 1)}, sizes[i])) {
			t.Errorf("record %d has other bytes", i)
		}
		binary.BigEndian.PutUint16(rec, uint16(len(rec)-Prefix))
		for j := range Suffix { // sealing in place does not reach into the next one
			rec[len(rec)-1-j] = 0xff
		}
		i++
		return nil
	})
	if err != nil || i != 4 {
		t.Fatalf("%d records, %v", i, err)
	}
	wire := b.Bytes()
	for j, n := range sizes {
		if got := int(binary.BigEndian.Uint16(wire)); got != n+Suffix || wire[Prefix] != byte(j+1) {
			t.Fatalf("on the wire record %d has length %d", j, got)
		}
		wire = wire[n+Around:]
	}
	if len(wire) != 0 {
		t.Errorf("%d bytes follow", len(wire))
	}
}

func TestRecordsStopAtTheFirstError(t *testing.T) {
	b := Get(1000)
	defer b.Release()
	fill(t, b, 1, 2, 3)
	calls, bad := 0, errors.New("bad")
	if err := b.Records(func([]byte) error { calls++; return bad }); err != bad || calls != 1 {
		t.Errorf("%d calls, %v", calls, err)
	}
}

func TestGetGivesRoomForWhatIsAskedAndNoMoreThanAClass(t *testing.T) {
	last := classes[len(classes)-1]
	for _, n := range []int{0, 1, 2 << 10, classes[0], classes[0] + 1, Shared, classes[1], classes[1] + 1, Record, Record + 1, last} {
		b := Get(n)
		want := last
		for _, c := range classes {
			if n <= c {
				want = c
				break
			}
		}
		if len(b.Raw()) != want || b.Count() != 0 || b.Payload() != 0 || len(b.Bytes()) != 0 {
			t.Errorf("Get(%d): %d bytes, %d records", n, len(b.Raw()), b.Count())
		}
		b.Release()
	}
	if b := Get(last + 1); len(b.Raw()) != last {
		t.Errorf("more than the largest: %d bytes", len(b.Raw()))
	}
}

func TestForPayloadTakesItInFramesOfBulk(t *testing.T) {
	for _, n := range []int{1, 2 << 10, 2<<10 + 1, Shared, Shared + 1, Bulk, Bulk + 1, 2 * Bulk, 3*Bulk + 1, Batch} {
		b := ForPayload(n)
		for left := n; left > 0; {
			k := min(left, Bulk)
			if len(b.Next()) < Frame+k {
				t.Fatalf("%d bytes: record %d has room for %d, not for %d", n, b.Count(), len(b.Next()), Frame+k)
			}
			b.Commit(Frame + k)
			left -= k
		}
		b.Release()
	}
}

func TestNextIsNoLongerThanARecordMayBe(t *testing.T) {
	for _, n := range classes {
		b := Get(n)
		for b.Next() != nil {
			if len(b.Next()) > Plain {
				t.Fatalf("room for %d bytes", len(b.Next()))
			}
			before := len(b.Bytes())
			b.Commit(len(b.Next()))
			if len(b.Bytes()) <= before || len(b.Bytes()) > len(b.Raw()) {
				t.Fatalf("class %d: %d bytes of %d", n, len(b.Bytes()), len(b.Raw()))
			}
		}
		b.Release()
	}
}

// A scattered read puts the payloads where Next and Commit will find them.
func TestSlotsAreWherePayloadsOfFramesLie(t *testing.T) {
	for _, n := range []int{1, 1000, Shared, Bulk, Bulk + 1, 2*Bulk + 5, Batch, Batch + 1} {
		for _, front := range []bool{false, true} {
			b := ForPayload(min(n, Batch))
			want := min(n, Batch)
			if front {
				b.Release()
				b = Get(classes[len(classes)-1])
				fill(t, b, 300) // a small frame in front
				want = min(n, 3*Bulk)
			}
			slots := b.Slots(nil, n)
			total := 0
			for i, s := range slots {
				for j := range s {
					s[j] = byte(total + j)
				}
				if len(s) > Bulk || i < len(slots)-1 && len(s) != Bulk {
					t.Errorf("%d: slot %d has %d bytes", n, i, len(s))
				}
				total += len(s)
			}
			if total < want {
				t.Errorf("%d (front %v): slots for %d bytes", n, front, total)
			}
			at := 0
			for range slots {
				k := min(total-at, Bulk)
				next := b.Next()
				if len(next) < Frame+k {
					t.Fatalf("%d: no room for a frame of %d", n, k)
				}
				for j, x := range next[Frame : Frame+k] {
					if x != byte(at+j) {
						t.Fatalf("%d: byte %d is not where it was read to", n, at+j)
					}
				}
				b.Commit(Frame + k)
				at += k
			}
			b.Release()
		}
	}
}

func TestSlotsOfAFullBufferAreNone(t *testing.T) {
	b := Get(1)
	defer b.Release()
	b.Commit(len(b.Next()))
	if s := b.Slots(nil, 100); len(s) != 0 {
		t.Errorf("%d slots", len(s))
	}
	c := Get(classes[len(classes)-1])
	defer c.Release()
	fill(t, c, 1, 1, 1, 1)
	if s := c.Slots(nil, 100); len(s) != 0 {
		t.Errorf("%d slots behind the fourth record", len(s))
	}
}

func TestReleasedBufferComesBackEmpty(t *testing.T) {
	for range 1000 {
		b := Get(rand.IntN(classes[len(classes)-1]))
		if b.Count() != 0 || len(b.Bytes()) != 0 || b.Payload() != 0 {
			t.Fatal("a buffer comes with what was in it")
		}
		fill(t, b, 1+rand.IntN(len(b.Next())))
		b.Release()
	}
}

func TestResetKeepsTheMemory(t *testing.T) {
	b := Get(1)
	defer b.Release()
	raw := &b.Raw()[0]
	fill(t, b, 10)
	b.Reset()
	if b.Count() != 0 || b.Payload() != 0 || &b.Raw()[0] != raw || len(b.Next()) != len(b.Raw())-Around {
		t.Error("a reset buffer is not as new")
	}
}

// The sizes that SPEC.md gives.
func TestSizesAreThoseOfTheWire(t *testing.T) {
	if Record != 65537 || Plain != 65519 || Around != 18 || Batch != 240<<10 || Frame+Bulk > Plain {
		t.Errorf("record %d, plaintext %d, around it %d, batch %d", Record, Plain, Around, Batch)
	}
}
