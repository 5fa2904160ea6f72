package channel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"testing"

	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/tests/serving"
)

// chunked is a lane that gives its bytes in pieces, over and over of the given
// sizes, and then an error. Nothing else of a lane is there.
type chunked struct {
	net.Conn
	bytes []byte
	sizes []byte // up to 127 in bytes, from 128 on in steps of 2 KiB: to 256 KiB
	err   error
	at    int
	last  bool // the error comes with the last bytes
}

func (c *chunked) Read(b []byte) (int, error) {
	if len(c.bytes) == 0 {
		return 0, c.err
	}
	size := 1 << 20
	if len(c.sizes) > 0 {
		if size = 1 + int(c.sizes[c.at%len(c.sizes)]); size > 128 {
			size = (size - 128) << 11
		}
		c.at++
	}
	n := copy(b, c.bytes[:min(size, len(c.bytes))])
	c.bytes = c.bytes[n:]
	if c.last && len(c.bytes) == 0 {
		return n, c.err
	}
	return n, nil
}

// take reads whole records until an error, and checks what it is given against
// what the same bytes say.
func take(t testing.TB, l *laneReader) (records [][]byte, err error) {
	t.Helper()
	for {
		if err := l.fill(); err != nil {
			return records, err
		}
		for {
			rec, err := l.record()
			if err != nil {
				return records, err
			}
			if rec == nil {
				break
			}
			records = append(records, slices.Clone(rec))
			clear(rec) // as opening in place does; nobody else's bytes may suffer
		}
	}
}

// split is what a lane's bytes say, without a reader.
func split(b []byte) (records [][]byte, err error) {
	for len(b) >= buffer.Prefix {
		n, err := length(b)
		if err != nil {
			return records, err
		}
		if len(b) < n {
			break
		}
		records = append(records, b[:n])
		b = b[n:]
	}
	return records, io.EOF
}

func TestLaneReaderGivesEveryRecordWhateverTheReads(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var lane []byte
	sizes := []int{17, 18, 100, 2048, 16 << 10, 16407, 65535, 65535, 65534, 17, 17, 65535, 60 << 10, 1000}
	for range 40 {
		sizes = append(sizes, 17+r.IntN(65535-16))
	}
	for i, n := range sizes {
		lane = binary.BigEndian.AppendUint16(lane, uint16(n))
		lane = append(lane, bytes.Repeat([]byte{byte(i + 1)}, n)...)
	}
	want, _ := split(lane)
	for name, pieces := range map[string][]byte{
		"all at once": nil, "one byte": {0}, "100 bytes": {99}, "mixed": {1, 127, 3, 140, 0, 17},
		// A full read, then little: the rest of a record is longer than a small buffer.
		"busy, then not": {255, 255, 255, 155, 255, 255, 143, 1}, "2 KiB": {128}, "64 KiB": {159},
	} {
		for _, last := range []bool{false, true} {
			c := &chunked{bytes: slices.Clone(lane), sizes: pieces, err: io.EOF, last: last}
			l := newLaneReader(c)
			got, err := take(t, l)
			l.release()
			if err != io.EOF || !slices.EqualFunc(got, want, bytes.Equal) {
				t.Errorf("%s: %d of %d records, %v", name, len(got), len(want), err)
			}
		}
	}
}

func TestLaneReaderRefusesALengthAtOnce(t *testing.T) {
	for n := range buffer.Suffix + 1 {
		l := newLaneReader(&chunked{bytes: []byte{0, byte(n)}, err: errors.New("it asks for more")})
		if _, err := take(t, l); err != errLength {
			t.Errorf("length %d: %v", n, err)
		}
		l.release()
	}
}

// A lane that whispers is read in small pieces, one that is full in large ones.
func TestLaneReaderGrowsWithTheLane(t *testing.T) {
	l := newLaneReader(&chunked{bytes: make([]byte, 4<<20), err: io.EOF})
	most := 0
	for l.fill() == nil {
		most = max(most, l.w-l.r)
		l.r = l.w
	}
	if most < buffer.Batch {
		t.Errorf("at most %d bytes a read", most)
	}
	l.release()
	l = newLaneReader(&chunked{bytes: make([]byte, 1<<20), sizes: []byte{99}, err: io.EOF})
	for l.fill() == nil {
		if n := len(l.buf.Raw()); n > 2*buffer.Shared {
			t.Fatalf("a buffer of %d bytes for reads of 100", n)
		}
		l.r = l.w
	}
	l.release()
}

func TestLaneReaderOnASocketHoldsNoBufferWhileItWaits(t *testing.T) {
	c, s := serving.Pair(t)
	l := newLaneReader(s)
	if l.raw == nil {
		t.Fatal("a TCP connection is not read by its descriptor")
	}
	l.raw.Control(func(fd uintptr) {
		if l.attempt(fd) || l.buf != nil || l.err != nil {
			t.Errorf("with nothing to read it has a buffer (%v)", l.err)
		}
	})
	rec := append(binary.BigEndian.AppendUint16(nil, 65535), make([]byte, 65535)...)
	whole := func() {
		for got := []byte(nil); got == nil; {
			check(t, l.fill())
			got = must(l.record())(t)
		}
	}
	must(c.Write(rec[:10]))(t)
	check(t, l.fill())
	l.raw.Control(func(fd uintptr) {
		if part := l.w; l.attempt(fd) || l.buf == nil || l.w != part || l.err != nil {
			t.Errorf("with nothing behind a part of a record it has %d bytes of it (%v)", l.w, l.err)
		}
		other := buffer.Get(len(l.buf.Raw()))
		if other == l.buf {
			t.Error("the buffer that holds a part of a record was given back")
		}
		other.Release()
	})
	go c.Write(rec[10:])
	whole()
	for range 20 { // whole records, and reads that end in the middle of one
		go c.Write(rec)
		whole()
		if l.r != l.w {
			t.Fatalf("%d bytes too many", l.w-l.r)
		}
	}
	waits := make(chan error)
	go func() { waits <- l.fill() }()
	c.CloseWrite()
	if err := <-waits; err != io.EOF {
		t.Errorf("the end of the lane: %v", err)
	}
	go func() { waits <- l.fill() }()
	s.Close()
	if err := <-waits; err == nil {
		t.Error("a closed lane is read")
	}
	l.release()
	if l.buf != nil {
		t.Error("a buffer is left")
	}
}
