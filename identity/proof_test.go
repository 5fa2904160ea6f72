package identity

import (
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"
)

// badX25519 holds every encoding of the points of small order of Curve25519 and
// its twist, as published with the curve, and what else is not the one encoding
// of a point.
var badX25519 = map[string]string{
	"0":             "0000000000000000000000000000000000000000000000000000000000000000",
	"1":             "0100000000000000000000000000000000000000000000000000000000000000",
	"order 8, a":    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
	"order 8, b":    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
	"p-1":           "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"p":             "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"p+1":           "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"p + order 8 a": "cdeb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b880",
	"p + order 8 b": "4c9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f11d7",
	"2p-1":          "d9ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
	"2p":            "daffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
	"2p+1":          "dbffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
	"p+2":           "efffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"2^255-1":       "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"9, top bit":    "0900000000000000000000000000000000000000000000000000000000000080",
	"0, top bit":    "0000000000000000000000000000000000000000000000000000000000000080",
	"1, top bit":    "0100000000000000000000000000000000000000000000000000000000000080",
	"a, top bit":    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b880",
	"b, top bit":    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f11d7",
	"p-1, top bit":  "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// attest makes an attestation by s with d, which edit may change.
func attest(s *Self, key []byte, now time.Time, edit func(*attestationData)) []byte {
	id, latest := s.ID(), s.Latest()
	d := attestationData{
		Subject: id[:], Change: latest[:], Role: staticRole, Key: key,
		NotBefore: now.UnixMilli(), Expires: now.Add(attestationLife).UnixMilli(),
	}
	if edit != nil {
		edit(&d)
	}
	data := encode(&d)
	return encode(&attestation{Data: data, Signature: sign(s.state.Load().key, labelAttestation, data)})
}

func TestBadChannelKeyIsRefused(t *testing.T) {
	s := newSelf(t)
	for name, text := range badX25519 {
		key := unhex(t, text)
		_, err := VerifyProof(s.History(), attest(s, key, noon, nil), key, noon)
		if !errors.Is(err, ErrKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, n := range []int{0, 31, 33, 64} {
		key := make([]byte, n)
		if _, err := VerifyProof(s.History(), attest(s, key, noon, nil), key, noon); !errors.Is(err, ErrMalformed) {
			t.Errorf("a key of %d bytes: %v", n, err)
		}
	}
	key := unhex(t, "ebffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f") // p-2, not of small order
	if _, err := VerifyProof(s.History(), attest(s, key, noon, nil), key, noon); err != nil {
		t.Errorf("the largest usable key: %v", err)
	}
}

// TestWeakIdentityKeysVerifyForgeries holds the table of small-order points to
// what makes them dangerous: for each, a signature made without any key.
func TestWeakIdentityKeysVerifyForgeries(t *testing.T) {
	encodings := make([][32]byte, 0, 2*len(weakY))
	for y := range weakY {
		negative := y
		negative[31] |= 0x80
		encodings = append(encodings, y, negative)
	}
	var forgeable int
	for _, key := range encodings {
		if !weakEd25519(key) {
			t.Errorf("%x is not taken for weak", key)
		}
		// With S = 0 a signature holds when R = −kA, which is one of the eight points.
		forged := func() bool {
			for i := range 64 {
				message := fmt.Appendf(nil, "message %d", i)
				for _, r := range encodings {
					if ed25519.Verify(key[:], message, append(r[:], make([]byte, 32)...)) {
						return true
					}
				}
			}
			return false
		}()
		if forged {
			forgeable++
		}
	}
	// Two of the ten encodings, ±0 of x = 0 with the sign bit, are not canonical.
	if forgeable < 8 {
		t.Errorf("%d of %d encodings verify a forgery, want at least 8", forgeable, len(encodings))
	}
	for _, text := range []string{
		"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f", // p, is 0
		"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
		"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f", // p+1, is 1
		"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
		"f0ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	} {
		if !weakEd25519([32]byte(unhex(t, text))) {
			t.Errorf("%s is not refused", text)
		}
	}
}

func TestHistoryWithWeakKeyIsRefused(t *testing.T) {
	neutral := ed25519.PublicKey(append([]byte{1}, make([]byte, 31)...))
	forgery := append(append([]byte{1}, make([]byte, 31)...), make([]byte, 32)...) // R neutral, S = 0
	c := change{Data: encode(&changeData{Algorithm: coseEdDSA, Key: neutral}), Signature: forgery}
	if !verify(neutral, forgery, labelChange, c.Data) {
		t.Fatal("the forgery does not verify, so this test shows nothing")
	}
	if _, err := parseHistory(encode([]change{c})); !errors.Is(err, ErrKey) {
		t.Errorf("got %v", err)
	}
}

func TestAttestationThatBreaksARuleIsRefused(t *testing.T) {
	s, other := newSelf(t), newSelf(t)
	channel, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key := channel.PublicKey().Bytes()
	expired := &ExpiredError{}
	tests := []struct {
		name string
		by   *Self
		edit func(*attestationData)
		want error
	}{
		{"by another identity", other, nil, ErrSignature},
		{"about another identity", s, func(d *attestationData) { id := other.ID(); d.Subject = id[:] }, ErrSubject},
		{"bound to another change", s, func(d *attestationData) { d.Change = make([]byte, 32) }, ErrSubject},
		{"of another key", s, func(d *attestationData) { d.Key = make([]byte, 32) }, ErrSubject},
		{"for another purpose", s, func(d *attestationData) { d.Role = "credential" }, ErrMalformed},
		{"for longer than 30 days", s, func(d *attestationData) { d.Expires++ }, ErrMalformed},
		{"ending before it begins", s, func(d *attestationData) { d.Expires = d.NotBefore }, ErrMalformed},
		{"beginning before 1970", s, func(d *attestationData) { d.NotBefore = -1 }, ErrMalformed},
		{"ending after 9999", s, func(d *attestationData) {
			d.NotBefore, d.Expires = latestTime-1, latestTime+1
		}, ErrMalformed},
		{"expired", s, func(d *attestationData) {
			d.NotBefore, d.Expires = noon.Add(-time.Hour).UnixMilli(), noon.UnixMilli()
		}, expired},
		{"beginning in 61 s", s, func(d *attestationData) {
			d.NotBefore, d.Expires = noon.Add(61*time.Second).UnixMilli(), noon.Add(time.Hour).UnixMilli()
		}, expired},
		{"ending in 1 ms", s, func(d *attestationData) {
			d.NotBefore, d.Expires = noon.Add(-time.Hour).UnixMilli(), noon.UnixMilli()+1
		}, nil},
		{"beginning in 60 s", s, func(d *attestationData) {
			d.NotBefore, d.Expires = noon.Add(60*time.Second).UnixMilli(), noon.Add(time.Hour).UnixMilli()
		}, nil},
		{"for exactly 30 days", s, nil, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := VerifyProof(s.History(), attest(tt.by, key, noon, tt.edit), key, noon)
			if tt.want == error(expired) {
				var e *ExpiredError
				if !errors.As(err, &e) {
					t.Errorf("got %v, want an *ExpiredError", err)
				}
				return
			}
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

func TestAttestationEndsWithTheChangeItIsBoundTo(t *testing.T) {
	s := newSelf(t)
	before, attestation, key := prove(t, s, noon)
	before, attestation = slices.Clone(before), slices.Clone(attestation)
	rotate(t, s)
	if _, err := VerifyProof(before, attestation, key, noon); err != nil {
		t.Errorf("with the history it was made under: %v", err)
	}
	if _, err := VerifyProof(s.History(), attestation, key, noon); err == nil {
		t.Error("it is accepted with a history that has rotated its key away")
	}
	history, attestation2, key2 := prove(t, s, noon)
	if slices.Equal(key, key2) {
		t.Error("the channel key was not made anew")
	}
	if _, err := VerifyProof(history, attestation2, key2, noon); err != nil {
		t.Errorf("the new attestation: %v", err)
	}
	if _, err := VerifyProof(before, attestation2, key2, noon); err == nil {
		t.Error("the new attestation is accepted with the shorter history")
	}
}

func TestProofOfAnotherKeyIsRefused(t *testing.T) {
	s, other := newSelf(t), newSelf(t)
	history, attestation, key := prove(t, s, noon)
	otherHistory, otherAttestation, otherKey := prove(t, other, noon)
	for name, f := range map[string]func() (*Peer, error){
		"key":         func() (*Peer, error) { return VerifyProof(history, attestation, otherKey, noon) },
		"attestation": func() (*Peer, error) { return VerifyProof(history, otherAttestation, key, noon) },
		"history":     func() (*Peer, error) { return VerifyProof(otherHistory, attestation, key, noon) },
		"pair":        func() (*Peer, error) { return VerifyProof(history, otherAttestation, otherKey, noon) },
	} {
		if p, err := f(); err == nil {
			t.Errorf("the other %s: accepted as %v", name, p)
		}
	}
}

func TestAlteredProofIsRefused(t *testing.T) {
	s := newSelf(t)
	rotate(t, s)
	history, attestation, key := prove(t, s, noon)
	for name, b := range map[string][]byte{"history": history, "attestation": attestation, "key": key} {
		for i := range b {
			for _, bit := range []byte{0x01, 0x80} {
				altered := slices.Clone(b)
				altered[i] ^= bit
				h, a, k := history, attestation, key
				switch name {
				case "history":
					h = altered
				case "attestation":
					a = altered
				case "key":
					k = altered
				}
				if _, err := VerifyProof(h, a, k, noon); err == nil {
					t.Errorf("%s with byte %d altered by %#x is accepted", name, i, bit)
				}
			}
		}
		for n := range b {
			h, a, k := history, attestation, key
			switch name {
			case "history":
				h = b[:n]
			case "attestation":
				a = b[:n]
			case "key":
				k = b[:n]
			}
			if _, err := VerifyProof(h, a, k, noon); err == nil {
				t.Errorf("%s cut to %d bytes is accepted", name, n)
			}
		}
	}
}

func TestTrailingAndOversizedProofIsRefused(t *testing.T) {
	s := newSelf(t)
	history, attestation, key := prove(t, s, noon)
	for _, n := range []int{1, MaxAttestation, MaxHistory} {
		if _, err := VerifyProof(append(slices.Clone(history), make([]byte, n)...), attestation, key, noon); !errors.Is(err, ErrMalformed) {
			t.Errorf("history with %d bytes more: %v", n, err)
		}
		if _, err := VerifyProof(history, append(slices.Clone(attestation), make([]byte, n)...), key, noon); !errors.Is(err, ErrMalformed) {
			t.Errorf("attestation with %d bytes more: %v", n, err)
		}
	}
	if len(attestation) > MaxAttestation {
		t.Errorf("an attestation takes %d bytes", len(attestation))
	}
}

// TestOnlyTheDeterministicEncodingIsRead takes histories whose signatures are
// right and whose encoding is another one of the same value.
func TestOnlyTheDeterministicEncodingIsRead(t *testing.T) {
	_, key, _ := ed25519.GenerateKey(rand.Reader)
	public := key.Public().(ed25519.PublicKey)
	data := encode(&changeData{Algorithm: coseEdDSA, Key: public})
	history := func(data []byte) []byte {
		return encode([]change{{Data: data, Signature: sign(key, labelChange, data)}})
	}
	if _, err := parseHistory(history(data)); err != nil {
		t.Fatal(err)
	}
	body := append([]byte{0x58, 32}, public...) // the key
	for name, altered := range map[string][]byte{
		"longer integer":     slices.Concat([]byte{0x83, 0x40, 0x38, 0x07}, body),
		"longer array head":  slices.Concat([]byte{0x98, 0x03, 0x40, 0x27}, body),
		"longer string head": slices.Concat([]byte{0x83, 0x40, 0x27, 0x59, 0, 32}, public),
		"indefinite array":   slices.Concat([]byte{0x9f, 0x40, 0x27}, body, []byte{0xff}),
		"indefinite string":  slices.Concat([]byte{0x83, 0x40, 0x27, 0x5f}, body, []byte{0xff}),
		"null for empty":     slices.Concat([]byte{0x83, 0xf6, 0x27}, body),
		"tagged":             slices.Concat([]byte{0xc1, 0x83, 0x40, 0x27}, body),
		"tagged key":         slices.Concat([]byte{0x83, 0x40, 0x27, 0xc2}, body),
		"one element more":   slices.Concat([]byte{0x84, 0x40, 0x27}, body, []byte{0x00}),
		"one element less":   {0x82, 0x40, 0x27},
		"trailing byte":      slices.Concat(data, []byte{0x00}),
		"map":                slices.Concat([]byte{0xa1, 0x40, 0x27}),
	} {
		if _, err := parseHistory(history(altered)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSignatureOfOneTypeIsNoneOfAnother(t *testing.T) {
	s := newSelf(t)
	p := peerOf(t, s, noon)
	sig, err := s.Sign("redeem", []byte("a"), []byte("bc"))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Verify("redeem", sig, []byte("a"), []byte("bc")); err != nil {
		t.Error(err)
	}
	for name, err := range map[string]error{
		"another label":       p.Verify("renew", sig, []byte("a"), []byte("bc")),
		"parts split anew":    p.Verify("redeem", sig, []byte("ab"), []byte("c")),
		"parts joined":        p.Verify("redeem", sig, []byte("abc")),
		"an empty part more":  p.Verify("redeem", sig, []byte("a"), []byte("bc"), nil),
		"parts exchanged":     p.Verify("redeem", sig, []byte("bc"), []byte("a")),
		"signature cut":       p.Verify("redeem", sig[:63], []byte("a"), []byte("bc")),
		"signature with more": p.Verify("redeem", append(slices.Clone(sig), 0), []byte("a"), []byte("bc")),
		"no signature":        p.Verify("redeem", nil, []byte("a"), []byte("bc")),
	} {
		if !errors.Is(err, ErrSignature) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, label := range []string{labelChange, labelRotation, labelAttestation, labelCredential, "", "A", "a/b", "a b",
		"abcdefghijklmnopqrstuvwxyz0123456"} {
		if _, err := s.Sign(label); err == nil {
			t.Errorf("Sign gives a signature under %q", label)
		}
		if err := p.Verify(label, sig); err == nil {
			t.Errorf("Verify takes a signature under %q", label)
		}
	}
}

func TestStaticKeyIsMadeAnewAtHalfItsLife(t *testing.T) {
	s := newSelf(t)
	key, _, err := s.Static(noon)
	if err != nil {
		t.Fatal(err)
	}
	same := func(now time.Time) bool {
		t.Helper()
		k, attestation, err := s.Static(now)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := VerifyProof(s.History(), attestation, k.PublicKey().Bytes(), now); err != nil {
			t.Errorf("at %v: %v", now, err)
		}
		changed := k != key
		key = k
		return !changed
	}
	if !same(noon.Add(time.Hour)) || !same(noon) {
		t.Error("made anew at once")
	}
	if !same(noon.Add(13 * 24 * time.Hour)) {
		t.Error("made anew before half its life")
	}
	if same(noon.Add(15 * 24 * time.Hour)) {
		t.Error("not made anew after half its life")
	}
	if same(noon) {
		t.Error("not made anew after the clock was set back by 15 days")
	}
}
