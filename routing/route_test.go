package routing

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/portal-tunnel/portal/internal/alloc"
)

func route(t testing.TB, a ...Address) Route {
	t.Helper()
	r, err := NewRoute(a...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func many(a Address, n int) []Address { return slices.Repeat([]Address{a}, n) }

var routes = []struct {
	name  string
	addrs []Address
	wire  string
	text  string
}{
	{"empty", nil, "\x00", ""},
	{"one name", []Address{"db"}, "\x01\x02db", "db"},
	{"names with slashes", []Address{"a/b", "c"}, "\x02\x03a/b\x01c", "a/b => c"},
	{"random address", []Address{"\x00\xff\x01"}, "\x01\x03\x00\xff\x01", "0x00ff01"},
	{"looks like hexadecimal", []Address{"0xab"}, "\x01\x040xab", "0x30786162"},
	{"looks like a route", []Address{"a => b"}, "\x01\x06a => b", "0x61203d3e2062"},
	{"padded", []Address{" a", "a "}, "\x02\x02 a\x02a ", "0x2061 => 0x6120"},
	{"direction override", []Address{"a\u202eb"}, "\x01\x05a\u202eb", "0x61e280ae62"},
	{"near the separator", []Address{"a=", ">b"}, "\x02\x02a=\x02>b", "a= => >b"},
	{"inner space and letters", []Address{"é è"}, "\x01\x05é è", "é è"},
	{"sixteen", many("x", 16), "\x10" + strings.Repeat("\x01x", 16), "x" + strings.Repeat(" => x", 15)},
	{"longest address", []Address{Address(strings.Repeat("y", 64))}, "\x01\x40" + strings.Repeat("y", 64), strings.Repeat("y", 64)},
}

func TestRouteHasOneWireFormAndOneText(t *testing.T) {
	for _, tt := range routes {
		t.Run(tt.name, func(t *testing.T) {
			r := route(t, tt.addrs...)
			if got := string(r.Append(nil)); got != tt.wire {
				t.Errorf("wire %q, want %q", got, tt.wire)
			}
			if got := r.String(); got != tt.text {
				t.Errorf("text %q, want %q", got, tt.text)
			}
			if r.Len() != len(tt.addrs) {
				t.Errorf("length %d, want %d", r.Len(), len(tt.addrs))
			}
			back, rest, err := DecodeRoute([]byte(tt.wire + "rest"))
			if err != nil || back != r || string(rest) != "rest" {
				t.Errorf("decoded %v, rest %q, error %v", back, rest, err)
			}
			parsed, err := ParseRoute(tt.text)
			if tt.text == "" {
				if !errors.Is(err, ErrRoute) {
					t.Errorf("parsing the empty text: %v", err)
				}
			} else if err != nil || parsed != r {
				t.Errorf("parsed %v, error %v", parsed, err)
			}
		})
	}
}

func TestParseRouteForgivesSpaces(t *testing.T) {
	for _, s := range []string{"a=>b", "a  =>   b", " a => b "} {
		if r, err := ParseRoute(s); err != nil || r != route(t, "a", "b") {
			t.Errorf("%q: %v, %v", s, r, err)
		}
	}
}

func TestRouteBeyondItsLimitsIsRefused(t *testing.T) {
	long := strings.Repeat("z", 65)
	for name, b := range map[string]string{
		"nothing":             "",
		"count without bytes": "\x01",
		"address cut short":   "\x01\x05abc",
		"second missing":      "\x02\x01a",
		"seventeen":           "\x11" + strings.Repeat("\x01x", 17),
		"empty address":       "\x02\x01a\x00",
		"address of 65":       "\x01\x41" + long,
		"1,041 bytes":         "\x10" + strings.Repeat("\x40"+long[:64], 16),
	} {
		if r, _, err := DecodeRoute([]byte(b)); !errors.Is(err, ErrRoute) || r != (Route{}) {
			t.Errorf("decoding %s: %v, %v", name, r, err)
		}
	}
	for _, s := range []string{"", "  ", "=>", "a =>", "=> a", "0x", "0xa", "0xzz", long, "0x" + strings.Repeat("00", 65), "a" + strings.Repeat("=>a", 16)} {
		if r, err := ParseRoute(s); !errors.Is(err, ErrRoute) || r != (Route{}) {
			t.Errorf("parsing %q: %v, %v", s, r, err)
		}
	}
	for name, a := range map[string][]Address{
		"empty address": {""},
		"address of 65": {Address(long)},
		"seventeen":     many("x", 17),
		"1,041 bytes":   many(Address(long[:64]), 16),
	} {
		if _, err := NewRoute(a...); !errors.Is(err, ErrRoute) {
			t.Errorf("making %s: %v", name, err)
		}
	}
}

func TestThousandAddressesAreRefusedBeforeAllocation(t *testing.T) {
	wire := append([]byte{255}, bytes.Repeat([]byte("\x01x"), 1000)...)
	text := "x" + strings.Repeat(" => x", 999)
	list := many("x", 1000)
	message := append([]byte{0, 0}, wire...)
	for name, f := range map[string]func() error{
		"DecodeRoute":   func() error { _, _, err := DecodeRoute(wire); return err },
		"ParseRoute":    func() error { _, err := ParseRoute(text); return err },
		"NewRoute":      func() error { _, err := NewRoute(list...); return err },
		"DecodeMessage": func() error { _, err := DecodeMessage(message); return err },
	} {
		if err := f(); !errors.Is(err, ErrRoute) {
			t.Errorf("%s: %v", name, err)
		}
		if n := testing.AllocsPerRun(100, func() { f() }); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}

func TestPopAndPushAreInverse(t *testing.T) {
	r := route(t, "a", "b", "c")
	at, rest, ok := r.Pop()
	if at != "a" || rest != route(t, "b", "c") || !ok {
		t.Fatalf("popped %v, %v, %v", at, rest, ok)
	}
	if back, err := rest.Push(at); err != nil || back != r {
		t.Errorf("pushed back: %v, %v", back, err)
	}
	if _, _, ok := (Route{}).Pop(); ok {
		t.Error("something popped off the empty route")
	}
	if n := testing.AllocsPerRun(100, func() { at, rest, ok = r.Pop() }); n != 0 {
		t.Errorf("Pop allocates %v times", n)
	}
	for name, f := range map[string]func() error{
		"seventeenth": func() error { _, err := route(t, many("x", 16)...).Push("x"); return err },
		"1,025 bytes": func() error {
			_, err := route(t, many(Address(strings.Repeat("x", 64)), 15)...).Push(Address(strings.Repeat("x", 48)))
			return err
		},
		"empty address": func() error { _, err := r.Push(""); return err },
		"address of 65": func() error { _, err := r.Push(Address(strings.Repeat("x", 65))); return err },
	} {
		if err := f(); !errors.Is(err, ErrRoute) {
			t.Errorf("pushing %s: %v", name, err)
		}
	}
	if _, err := route(t, many(Address(strings.Repeat("x", 64)), 15)...).Push(Address(strings.Repeat("x", 47))); err != nil {
		t.Errorf("pushing up to 1,024 bytes: %v", err)
	}
}

func TestNewAddressesDiffer(t *testing.T) {
	seen := map[Address]bool{}
	for range 1000 {
		a := NewAddress()
		if len(a) != 16 || seen[a] {
			t.Fatalf("address %v", a)
		}
		seen[a] = true
	}
}

func FuzzDecodeRoute(f *testing.F) {
	for _, tt := range routes {
		f.Add([]byte(tt.wire))
	}
	f.Add([]byte("\x01\x00"))
	f.Add(append([]byte{255}, bytes.Repeat([]byte("\x01x"), 1000)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		r, rest, err := DecodeRoute(b)
		if err != nil {
			if !errors.Is(err, ErrRoute) || r != (Route{}) || rest != nil {
				t.Fatalf("%v, rest %q, error %v", r, rest, err)
			}
			return
		}
		if got := append(r.Append(nil), rest...); !bytes.Equal(got, b) {
			t.Fatalf("encoded again %q, was %q", got, b)
		}
		if r.Len() > MaxRoute || len(b)-len(rest) > MaxRouteSize {
			t.Fatalf("%d addresses, %d bytes", r.Len(), len(b)-len(rest))
		}
		var all []Address
		for at, next, ok := r.Pop(); ok; at, next, ok = next.Pop() {
			all = append(all, at)
		}
		if again, err := NewRoute(all...); err != nil || again != r {
			t.Fatalf("made again: %v, %v", again, err)
		}
		if r.Len() > 0 {
			if again, err := ParseRoute(r.String()); err != nil || again != r {
				t.Fatalf("%q parsed: %v, %v", r.String(), again, err)
			}
		}
	})
}

func FuzzParseRoute(f *testing.F) {
	for _, tt := range routes {
		f.Add(tt.text)
	}
	f.Add("a=>b =>  c")
	f.Add("0x41 => A")
	f.Fuzz(func(t *testing.T, s string) {
		defer alloc.Bound(t, len(s))()
		r, err := ParseRoute(s)
		if err != nil {
			if !errors.Is(err, ErrRoute) {
				t.Fatal(err)
			}
			return
		}
		if again, err := ParseRoute(r.String()); err != nil || again != r {
			t.Fatalf("%q parsed: %v, %v", r.String(), again, err)
		}
		if back, rest, err := DecodeRoute(r.Append(nil)); err != nil || back != r || len(rest) != 0 {
			t.Fatalf("decoded: %v, %q, %v", back, rest, err)
		}
	})
}
