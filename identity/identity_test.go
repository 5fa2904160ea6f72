package identity

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

var noon = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func newSelf(t testing.TB) *Self {
	t.Helper()
	s, err := NewSelf()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// prove returns what a handshake of s carries at now.
func prove(t testing.TB, s *Self, now time.Time) (history, attestation, static []byte) {
	t.Helper()
	key, attestation, err := s.Static(now)
	if err != nil {
		t.Fatal(err)
	}
	return s.History(), attestation, key.PublicKey().Bytes()
}

func peerOf(t testing.TB, s *Self, now time.Time) *Peer {
	t.Helper()
	h, a, k := prove(t, s, now)
	p, err := VerifyProof(h, a, k, now)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func issueTo(t testing.TB, authority, subject *Self, attrs Attributes, from, to time.Time) *Credential {
	t.Helper()
	c, err := authority.Issue(subject.ID(), subject.Latest(), attrs, from, to)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func rotate(t testing.TB, s *Self) {
	t.Helper()
	if err := s.Rotate(); err != nil {
		t.Fatal(err)
	}
}

func TestIdentifierTextIsOneForOne(t *testing.T) {
	id := newSelf(t).ID()
	text := id.String()
	if len(text) != idText || text[0] != 'P' {
		t.Fatalf("text %q", text)
	}
	back, err := ParseID(text)
	if err != nil || back != id {
		t.Fatalf("ParseID(%q) = %v, %v", text, back, err)
	}
	if got := id.Short(); got != text[:4]+"…" {
		t.Errorf("Short() = %q", got)
	}
	var unmarshalled ID
	if err := unmarshalled.UnmarshalText([]byte(text)); err != nil || unmarshalled != id {
		t.Errorf("UnmarshalText: %v, %v", unmarshalled, err)
	}
	for name, s := range map[string]string{
		"empty":             "",
		"short":             text[:52],
		"long":              text + "A",
		"lower case":        strings.ToLower(text),
		"other prefix":      "I" + text[1:],
		"other alphabet":    text[:20] + "1" + text[21:],
		"new line inside":   text[:20] + "\n" + text[21:],
		"spare bits set":    text[:52] + "B",
		"padded":            text[:51] + "==",
		"unprintable bytes": strings.Repeat("\x00", 53),
	} {
		if got, err := ParseID(s); err == nil {
			t.Errorf("%s: ParseID(%q) = %v", name, s, got)
		}
	}
	if !(ID{}).IsZero() || id.IsZero() {
		t.Error("IsZero")
	}
}

func TestNamesAreCheckedByteForByte(t *testing.T) {
	for _, s := range []string{"a", "0", "orders-db", "payments/orders-db", "a.b_c-d/0", strings.Repeat("a", 63)} {
		if err := ValidName(s); err != nil {
			t.Errorf("ValidName(%q) = %v", s, err)
		}
	}
	for _, s := range []string{"", "/", "a/", "/a", "a//b", "A", "-a", ".a", "_a", "a/-b", "a b", "a*", "a/*", "*", "a\n", "a\x00",
		"é", "a\u2028b", "a,b", "a=b", "a;b", `a"b`, "a\\b", strings.Repeat("a", 64), "\xff"} {
		if err := ValidName(s); err == nil {
			t.Errorf("ValidName(%q) = nil", s)
		}
	}
}

func TestAHistoryContainsItsChangesAndNoOther(t *testing.T) {
	s := newSelf(t)
	changes := [][32]byte{s.Latest()}
	var shorter *Peer
	for range 3 {
		shorter = peerOf(t, s, noon)
		rotate(t, s)
		changes = append(changes, s.Latest())
	}
	whole := peerOf(t, s, noon)
	for i, c := range changes {
		if !whole.Contains(c) || !s.Contains(c) {
			t.Errorf("change %d is missing", i)
		}
		if shorter.Contains(c) != (i < 3) {
			t.Errorf("change %d of a history of 3: %v", i, shorter.Contains(c))
		}
	}
	for _, c := range [][32]byte{{}, newSelf(t).Latest()} {
		if whole.Contains(c) || s.Contains(c) {
			t.Errorf("%x is contained", c)
		}
	}
}

func TestIdentifierOutlivesRotation(t *testing.T) {
	s := newSelf(t)
	id, first := s.ID(), s.Latest()
	if first != id {
		t.Error("the hash of the first change is not the identifier")
	}
	for i := 1; i < MaxChanges; i++ {
		before, history := s.Latest(), s.History()
		rotate(t, s)
		if s.ID() != id {
			t.Fatalf("rotation %d changed the identifier", i)
		}
		if s.Latest() == before {
			t.Fatalf("rotation %d left the latest change", i)
		}
		if bytes.Equal(s.History(), history) {
			t.Fatalf("rotation %d left the history", i)
		}
		peerOf(t, s, noon)
	}
	if n := len(s.History()); n > MaxHistory {
		t.Errorf("a full history takes %d bytes, more than %d", n, MaxHistory)
	}
	if err := s.Rotate(); !errors.Is(err, ErrChanges) {
		t.Errorf("rotation %d: %v", MaxChanges, err)
	}
	peerOf(t, s, noon)
}

// forged builds histories by hand, so that each rule can be broken alone.
type forged struct {
	changes []change
	keys    []ed25519.PrivateKey
}

func (f *forged) add(alter func(d *changeData), resign func(c *change, data []byte)) {
	_, key, _ := ed25519.GenerateKey(rand.Reader)
	d := changeData{Algorithm: coseEdDSA, Key: key.Public().(ed25519.PublicKey)}
	if n := len(f.changes); n > 0 {
		previous := sha256.Sum256(f.changes[n-1].Data)
		d.Previous = previous[:]
	}
	if alter != nil {
		alter(&d)
	}
	c := change{Data: encode(&d)}
	c.Signature = sign(key, labelChange, c.Data)
	if n := len(f.keys); n > 0 {
		c.Old = sign(f.keys[n-1], labelRotation, c.Data)
	}
	if resign != nil {
		resign(&c, c.Data)
	}
	f.changes, f.keys = append(f.changes, c), append(f.keys, key)
}

func TestHistoryThatBreaksARuleIsRefused(t *testing.T) {
	_, stranger, _ := ed25519.GenerateKey(rand.Reader)
	tests := []struct {
		name string
		make func(f *forged)
		want error
	}{
		{"no change", func(f *forged) {}, ErrMalformed},
		{"first change follows another", func(f *forged) {
			f.add(func(d *changeData) { d.Previous = make([]byte, 32) }, nil)
		}, ErrMalformed},
		{"first change has an old signature", func(f *forged) {
			f.add(nil, func(c *change, data []byte) { c.Old = sign(stranger, labelRotation, data) })
		}, ErrMalformed},
		{"first change is not signed", func(f *forged) {
			f.add(nil, func(c *change, data []byte) { c.Signature = nil })
		}, ErrSignature},
		{"first change is signed by another key", func(f *forged) {
			f.add(nil, func(c *change, data []byte) { c.Signature = sign(stranger, labelChange, data) })
		}, ErrSignature},
		{"another algorithm", func(f *forged) {
			f.add(func(d *changeData) { d.Algorithm = -7 }, nil)
		}, ErrMalformed},
		{"key of 31 bytes", func(f *forged) {
			f.add(func(d *changeData) { d.Key = d.Key[:31] }, nil)
		}, ErrMalformed},
		{"second change follows something else", func(f *forged) {
			f.add(nil, nil)
			f.add(func(d *changeData) { d.Previous[0] ^= 1 }, nil)
		}, ErrMalformed},
		{"second change without the old signature", func(f *forged) {
			f.add(nil, nil)
			f.add(nil, func(c *change, data []byte) { c.Old = nil })
		}, ErrSignature},
		{"second change with a stranger as old key", func(f *forged) {
			f.add(nil, nil)
			f.add(nil, func(c *change, data []byte) { c.Old = sign(stranger, labelRotation, data) })
		}, ErrSignature},
		{"old signature of the wrong type", func(f *forged) {
			f.add(nil, nil)
			f.add(nil, func(c *change, data []byte) { c.Old = sign(f.keys[0], labelChange, data) })
		}, ErrSignature},
		{"third change signed by the first key as old", func(f *forged) {
			f.add(nil, nil)
			f.add(nil, nil)
			f.add(nil, func(c *change, data []byte) { c.Old = sign(f.keys[0], labelRotation, data) })
		}, ErrSignature},
		{"a key that returns", func(f *forged) {
			f.add(nil, nil)
			f.add(func(d *changeData) { d.Key = f.keys[0].Public().(ed25519.PublicKey) }, func(c *change, data []byte) {
				c.Signature = sign(f.keys[0], labelChange, data)
			})
		}, ErrMalformed},
		{"17 changes", func(f *forged) {
			for range MaxChanges + 1 {
				f.add(nil, nil)
			}
		}, ErrMalformed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var f forged
			tt.make(&f)
			if _, err := parseHistory(encode(f.changes)); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	var f forged
	f.add(nil, nil)
	f.add(nil, nil)
	if _, err := parseHistory(encode(f.changes)); err != nil {
		t.Errorf("a history that keeps the rules: %v", err)
	}
}

func TestCredentialRoundTripKeepsTypes(t *testing.T) {
	authority, node := newSelf(t), newSelf(t)
	attrs := Attributes{
		"role":   "agent",
		"level":  int64(-7),
		"Level":  "7",
		"on":     true,
		"teams":  []string{"b", "a", "", "a"},
		"none":   []string{},
		"empty":  "",
		"odd":    ",;=\"\\\x00()\t\r\n'.\u2028 e\u0301 é",
		"max":    int64(1<<63 - 1),
		"min":    int64(-1 << 63),
		"name":   "db1",
		"serve":  []string{"orders-db", "payments/*"},
		"relay":  true,
		"_under": false,
	}
	from, to := noon.Add(1500*time.Microsecond), noon.Add(2345*time.Millisecond)
	c := issueTo(t, authority, node, attrs, from, to)
	got, err := NewTrust(authority.ID()).Verify(c.Raw(), authority.History(), node.ID(), node.Latest(), noon)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got.Attributes, attrs) {
		t.Errorf("attributes\n got %#v\nwant %#v", got.Attributes, attrs)
	}
	if !reflect.DeepEqual(got, c) {
		t.Errorf("verified %+v\n  issued %+v", got, c)
	}
	if !got.NotBefore.Equal(noon.Add(time.Millisecond)) || !got.Expires.Equal(to) {
		t.Errorf("valid from %v to %v", got.NotBefore, got.Expires)
	}
	if got.Name() != "db1" || !got.Relay() || !got.MayServe("orders-db") || got.MayServe("other") {
		t.Error("reserved attributes are not read")
	}
	attrs["teams"].([]string)[0] = "changed"
	if c.Attributes["teams"].([]string)[0] != "b" {
		t.Error("the credential shares the caller's list")
	}
}

// What a stranger shows as an authority's history costs no signature before it is that authority's, and none that
// was verified before.
func TestSignaturesOfAHistoryAreVerifiedOnceAndOnlyOfWhomItHasToBe(t *testing.T) {
	s := newSelf(t)
	for range 3 {
		rotate(t, s)
	}
	breaks := func(i int) []byte {
		var changes []change
		if err := decode(s.History(), &changes); err != nil {
			t.Fatal(err)
		}
		changes[i].Signature[0] ^= 1
		return encode(changes)
	}
	known, err := parseHistory(s.History())
	if err != nil {
		t.Fatal(err)
	}
	for i := range known.hashes {
		broken := breaks(i)
		if _, err := parseHistoryOf(newSelf(t).ID(), nil, broken); !errors.Is(err, ErrMalformed) {
			t.Errorf("another's, with change %d broken: %v", i, err)
		}
		for _, seen := range []*history{nil, known} {
			if _, err := parseHistoryOf(s.ID(), seen, broken); !errors.Is(err, ErrSignature) {
				t.Errorf("change %d broken, known before %v: %v", i, seen != nil, err)
			}
		}
		// As if the broken one had been verified.
		var changes []change
		if err := decode(broken, &changes); err != nil {
			t.Fatal(err)
		}
		same := *known
		same.whole = slices.Clone(known.whole)
		same.whole[i] = sha256.Sum256(slices.Concat(changes[i].Data, changes[i].Signature, changes[i].Old))
		h, err := parseHistoryOf(s.ID(), &same, broken)
		if err != nil || h.latest() != s.Latest() {
			t.Errorf("change %d is verified again: %v", i, err)
		}
	}
	shorter := *known
	shorter.hashes, shorter.whole = known.hashes[:2], known.whole[:2]
	if h, err := parseHistoryOf(s.ID(), &shorter, s.History()); err != nil || !h.extends(known) {
		t.Errorf("a longer one: %v", err)
	}
	if _, err := parseHistoryOf(s.ID(), &shorter, breaks(2)); !errors.Is(err, ErrSignature) {
		t.Errorf("a longer one with the new change broken: %v", err)
	}
}
