package alloc

import (
	"bytes"
	"encoding/binary"
	"math"
	"testing"
)

// places is how many offsets of a genuine input are tampered with, from its first to its last: more only
// cost time.
const places = 24

// sizes are how long inputs are: what decoders take at most lies between, since most refuse one of the
// last length for its length alone.
var sizes = []int{250, 1000, 4000, 8000, 16000, Input - 1}

// Hostile gives decode inputs smaller than Input that lie about lengths and counts, nest, repeat and stop
// short: some made of nothing, the others of each genuine one. It fails t when one of them, or a genuine
// one, costs more than Limit. decode must not keep what it is given.
//
// Fuzzing prefers short inputs; many of these are as long as the bound is for. Under the race detector it
// tries the genuine ones alone.
func Hostile(t *testing.T, decode func([]byte), genuine ...[]byte) {
	t.Helper()
	var most, worst uint64
	var count, at int
	var start []byte
	bad := 0
	try := func(b []byte) {
		before := allocated()
		decode(b)
		n := allocated() - before
		if n > Limit { // the cheap count also has what others allocated before and was counted late
			n = min(n, Spent(func() { decode(b) }))
		}
		count++
		if n > most {
			most, at, start = n, len(b), append(start[:0], b[:min(len(b), 60)]...)
		}
		if n > Limit && n > 2*worst && bad < 5 { // of many alike, one
			bad, worst = bad+1, n
			t.Errorf("%d bytes were allocated for an input of %d: %q…", n, len(b), b[:min(len(b), 200)])
		}
	}
	for _, g := range genuine {
		try(bytes.Clone(g))
	}
	if Raced {
		t.Logf("%d genuine inputs", count)
		return
	}
	inputs(genuine, try)
	t.Logf("F-23, F-35: %d inputs that lie; at most %d bytes allocated, for an input of %d: %q…", count, most, at, start)
}

// inputs makes them, each in the same memory as the one before.
func inputs(genuine [][]byte, try func([]byte)) {
	room := make([]byte, Input-1)
	// fill gives head followed by as many of unit as there is room for, and ends with tail.
	fill := func(head, unit, tail []byte) {
		if len(unit) == 0 {
			return
		}
		for _, size := range sizes {
			b := append(room[:0], head...)
			if len(head)+len(tail) > size {
				continue
			}
			for len(b)+len(unit)+len(tail) <= size {
				b = append(b, unit...)
			}
			try(append(b, tail...))
		}
	}
	for c := range 256 {
		fill(nil, []byte{byte(c)}, nil)
	}
	for _, unit := range units {
		fill(nil, []byte(unit), nil)
	}
	var heads [][]byte
	for _, n := range []uint64{1 << 12, 1<<16 - 1, 1 << 20, 1<<31 - 1, 1<<32 - 1, 1 << 40, math.MaxInt64, math.MaxUint64} {
		heads = append(heads, binary.BigEndian.AppendUint64(nil, n), binary.LittleEndian.AppendUint64(nil, n), binary.AppendUvarint(nil, n))
		if n <= math.MaxUint32 {
			heads = append(heads, binary.BigEndian.AppendUint32(nil, uint32(n)))
		}
		if n <= math.MaxUint16 {
			heads = append(heads, binary.BigEndian.AppendUint16(nil, uint16(n)))
		}
		// CBOR: byte string, text, array, map and tag of that length, count or number.
		for _, major := range []byte{0x5b, 0x7b, 0x9b, 0xbb, 0xdb} {
			heads = append(heads, binary.BigEndian.AppendUint64([]byte{major}, n))
		}
	}
	heads = append(heads, []byte{0x5f}, []byte{0x7f}, []byte{0x9f}, []byte{0xbf})
	for _, h := range heads {
		for _, unit := range []string{"", "\x00", "a", "\x40", "\xa0", "\xf6", "\xff"} {
			if unit == "" {
				try(append(room[:0], h...))
			}
			fill(h, []byte(unit), nil)
		}
		fill(nil, h, nil)
	}
	for _, g := range genuine {
		fill(nil, g, nil)
		fill(g, []byte{0}, nil)
		step := 1 + len(g)/places
		for i := 0; i < len(g); i += step {
			head, tail := g[:i], g[i:]
			try(append(room[:0], head...))
			for _, lie := range heads {
				b := append(append(room[:0], head...), lie...)
				if len(lie) < len(tail) {
					b = append(b, tail[len(lie):]...)
				}
				if len(b) <= len(room) {
					try(b)
				}
			}
			for _, lie := range []string{"\xff\xff", "\xff\xff\xff\xff", "\xff\xff\xff\xff\xff\xff\xff\xff"} {
				fill(append(bytes.Clone(head), lie...), []byte{0}, nil)
			}
			for _, n := range []int{1, 2, 3, 5, 8, 13, 21, 34} {
				if n <= len(tail) {
					fill(head, tail[:n], tail)
				}
			}
		}
	}
}

// units are what texts are made of that nest or list.
var units = []string{
	"()", "[]", "{}", "((", `""`, `"a",`, `"a":`, `{"a":`, `[1,`, "1,", "a,", "a.", ".a", "a=", "=>", "a=>", "a => ", "0#", "a:1,", "[::1]:1,",
	"\r\n", "\n", "a:b\r\n", "a: b\r\nc: ", "GET / HTTP/1.1\r\n\r\n", "1\r\na\r\n", "0\r\n\r\n", "!(", "-(", "&&", "||", "a && ", "a || ", "a == ", "a in ",
	"if a then ", "else ", `["a"]`, "::a", "/*", "*/", "//\n", `\u0000`, `\u{0}`, "\u202e", "\xc3", "{addr}", "{{", "}}", "@id(\"a\")", " -", " --", " a=b",
	"permit(principal,action,resource);", "-----BEGIN PORTAL IDENTITY KEY-----\n",
}
