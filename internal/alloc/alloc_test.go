package alloc

import (
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
