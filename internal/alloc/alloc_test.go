package alloc

import (
	"bytes"
	"fmt"
	"testing"
)

var sink []byte

// reported is a testing.TB that keeps what it is told.
type reported struct {
	testing.TB
	said string
}

func (r *reported) Errorf(format string, a ...any) { r.said = fmt.Sprintf(format, a...) }

func TestMoreThanTheLimitIsReportedForSmallInputsOnly(t *testing.T) {
	for _, c := range []struct {
		input, size int
		want        bool
	}{{10, 2 * Limit, true}, {10, Limit / 4, false}, {Input, 2 * Limit, false}} {
		r := &reported{TB: t}
		done := Bound(r, c.input)
		sink = make([]byte, c.size)
		done()
		if got := r.said != ""; got != c.want {
			t.Errorf("%d bytes for %d: %q", c.size, c.input, r.said)
		}
	}
}

func TestHostileReachesADecoderThatBelievesALength(t *testing.T) {
	if Raced {
		t.Skip("make plain runs it")
	}
	for name, decode := range map[string]func([]byte){
		"two bytes behind a head, a count": func(b []byte) {
			if len(b) > 6 && string(b[:4]) == "head" {
				sink = make([]byte, 64*(int(b[4])<<8|int(b[5])))
			}
		},
		"one of many equal parts": func(b []byte) {
			for range bytes.Count(b, []byte("part")) {
				sink = make([]byte, 256)
			}
		},
		"depth": func(b []byte) {
			for range len(b) - len(bytes.TrimLeft(b, "[")) {
				sink = make([]byte, 64)
			}
		},
	} {
		most := uint64(0)
		inputs([][]byte{[]byte("head\x00\x01x part")}, func(b []byte) {
			if len(b) >= Input {
				t.Fatalf("an input of %d bytes", len(b))
			}
			before := allocated()
			decode(b)
			most = max(most, allocated()-before)
		})
		if most <= Limit {
			t.Errorf("%s: at most %d bytes were allocated", name, most)
		}
	}
}
