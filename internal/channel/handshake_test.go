package channel

import (
	"bytes"
	"crypto/mlkem"
	"crypto/rand"
	"encoding/hex"
	"io"
	"os"
	"testing"
	"time"

	"github.com/flynn/noise"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/alloc"
)

var suites = map[string]Suite{"AESGCM": AESGCM, "ChaChaPoly": ChaChaPoly}

func newSelf(t testing.TB) *identity.Self {
	t.Helper()
	s, err := identity.NewSelf()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func begun(t testing.TB, self *identity.Self, initiator bool, p Preface, lane [32]byte) *handshake {
	t.Helper()
	h, err := newHandshake(self, initiator, p, lane, time.Now(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// shaking makes the ends of handshakes between the same two identities.
type shaking struct {
	i, r    *identity.Self
	preface Preface
	lane    [32]byte
}

func newShaking(t testing.TB, s Suite) *shaking {
	return &shaking{i: newSelf(t), r: newSelf(t), preface: Preface{Kind: Service, Suite: s}}
}

func (s *shaking) ends(t testing.TB) (i, r *handshake) {
	t.Helper()
	return begun(t, s.i, true, s.preface, s.lane), begun(t, s.r, false, s.preface, s.lane)
}

// message gives message n of a handshake and who reads it, in the state to do so.
func (s *shaking) message(t testing.TB, n int) (m []byte, read func([]byte) error, reader *handshake) {
	t.Helper()
	i, r := s.ends(t)
	m = must(i.write1())(t)
	if n == 1 {
		return m, r.read1, r
	}
	check(t, r.read1(m))
	m = must(r.write2())(t)
	if n == 2 {
		return m, i.read2, i
	}
	check(t, i.read2(m))
	return must(i.write3())(t), r.read3, r
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		check(t, err)
		return v
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// refused checks that a handshake is over, says nothing, and has no keys.
func refused(t testing.TB, h *handshake, err error) {
	t.Helper()
	if err != ErrHandshake {
		t.Fatalf("the error is %v", err)
	}
	if h.toR != [32]byte{} || h.toI != [32]byte{} || h.binding != [32]byte{} {
		t.Fatal("there are keys after a failed handshake")
	}
}

func TestBothEndsOfAHandshakeAgree(t *testing.T) {
	for name, suite := range suites {
		t.Run(name, func(t *testing.T) {
			s := newShaking(t, suite)
			i, r := s.ends(t)
			check(t, r.read1(must(i.write1())(t)))
			check(t, i.read2(must(r.write2())(t)))
			check(t, r.read3(must(i.write3())(t)))
			if i.toR != r.toR || i.toI != r.toI || i.binding != r.binding {
				t.Error("the ends have different keys or bindings")
			}
			if i.toR == i.toI || i.toR == [32]byte{} || i.toI == [32]byte{} {
				t.Error("the directions do not have a key each")
			}
			if i.peer.ID() != s.r.ID() || r.peer.ID() != s.i.ID() {
				t.Errorf("the initiator sees %v, the responder %v", i.peer.ID(), r.peer.ID())
			}
			j, _ := s.ends(t)
			if bytes.Equal(must(j.write1())(t)[:32], i.ek) || j.binding == i.binding {
				t.Error("two handshakes are the same")
			}
		})
	}
}

// every is the step through the bytes of a message. There is no concurrency to
// look for here, and with the race detector each handshake takes ten times as long.
func every() int {
	if alloc.Raced && os.Getenv("PORTAL_LONG") == "" {
		return 13
	}
	return 1
}

func TestEveryFlippedByteOfAMessageEndsTheHandshake(t *testing.T) {
	for name, suite := range suites {
		t.Run(name, func(t *testing.T) {
			s := newShaking(t, suite)
			step := every()
			if suite == ChaChaPoly {
				step *= 7 // the same code but for the cipher
			}
			for n := 1; n <= 3; n++ {
				first, _, _ := s.message(t, n)
				for at := 0; at < len(first); at += step {
					m, read, h := s.message(t, n)
					m[at] ^= 1 << (at % 8)
					err := read(m)
					if n == 1 && err == nil {
						t.Fatalf("byte %d of message 1 was not missed before message 2", at)
					}
					refused(t, h, err)
				}
			}
		})
	}
}

func TestAMessageOfAnyOtherLengthEndsTheHandshake(t *testing.T) {
	s := newShaking(t, AESGCM)
	for n := 1; n <= 3; n++ {
		first, _, _ := s.message(t, n)
		for size := 0; size < len(first); size += every() {
			// Refused by length alone or by its tag; either way the state is dead.
			m, read, h := s.message(t, n)
			refused(t, h, read(m[:size]))
		}
		m, read, h := s.message(t, n)
		refused(t, h, read(append(m, 0)))
	}
}

func TestAHandshakeIsDeadAfterAnError(t *testing.T) {
	s := newShaking(t, AESGCM)
	for n := 1; n <= 3; n++ {
		for name, bad := range map[string]func([]byte) []byte{
			"altered":   func(m []byte) []byte { m = bytes.Clone(m); m[len(m)-1] ^= 1; return m },
			"empty":     func([]byte) []byte { return nil },
			"too long":  func(m []byte) []byte { return make([]byte, 65535) },
			"cut short": func(m []byte) []byte { return m[:len(m)-1] },
		} {
			m, read, h := s.message(t, n)
			refused(t, h, read(bad(m)))
			refused(t, h, read(m)) // the genuine one comes too late
			if n == 1 {
				_, err := h.write2()
				refused(t, h, err)
			}
			if n == 2 {
				_, err := h.write3()
				refused(t, h, err)
			}
			if h.state != nil || h.kem != nil {
				t.Errorf("message %d, %s: secrets are kept", n, name)
			}
		}
	}
}

func TestEverythingInThePrologueMustAgree(t *testing.T) {
	s := newShaking(t, AESGCM)
	for name, r := range map[string]*handshake{
		"kind":     begun(t, s.r, false, Preface{Kind: Authority, Suite: AESGCM}, s.lane),
		"suite":    begun(t, s.r, false, Preface{Kind: Service, Suite: ChaChaPoly}, s.lane),
		"id":       begun(t, s.r, false, Preface{Kind: Service, Suite: AESGCM, ID: [16]byte{1}}, s.lane),
		"lane key": begun(t, s.r, false, s.preface, [32]byte{31: 1}),
	} {
		t.Run(name, func(t *testing.T) {
			i, _ := s.ends(t)
			refused(t, r, r.read1(must(i.write1())(t)))
		})
	}
}

func TestMessagesOfAnotherHandshakeAreRefused(t *testing.T) {
	s := newShaking(t, AESGCM)
	for n := 2; n <= 3; n++ {
		replayed, _, _ := s.message(t, n)
		_, read, h := s.message(t, n)
		refused(t, h, read(replayed))
	}
	// A reflected message: an initiator that is answered by itself.
	i, j := s.ends(t)
	m := must(i.write1())(t)
	refused(t, i, i.read2(m))
	refused(t, j, j.read1(m[:len(m)-1]))
}

// lowOrder are the u-coordinates that any scalar of X25519 takes to zero, each
// also with the top bit set, which X25519 does not look at (RFC 7748, §5).
var lowOrder = []string{
	"0000000000000000000000000000000000000000000000000000000000000000",
	"0100000000000000000000000000000000000000000000000000000000000000",
	"e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
	"5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
	"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
}

// weakDH is X25519 of an attacker whose key pairs marked weak have a public
// point of low order: whatever it is multiplied by, the secret is zero.
type weakDH struct {
	noise.DHFunc
	point []byte // of ephemeral keys; nil: honest ones
}

var weakPrivate = bytes.Repeat([]byte{0xee}, 32)

func (d weakDH) GenerateKeypair(r io.Reader) (noise.DHKey, error) {
	if d.point == nil {
		return d.DHFunc.GenerateKeypair(r)
	}
	return noise.DHKey{Private: weakPrivate, Public: d.point}, nil
}

func (d weakDH) DH(private, public []byte) ([]byte, error) {
	if bytes.Equal(private, weakPrivate) {
		return make([]byte, 32), nil
	}
	return d.DHFunc.DH(private, public)
}

// attacker replaces the state of h by one that it controls.
func (s *shaking) attacker(t testing.TB, h *handshake, initiator bool, ephemeral []byte, static noise.DHKey) {
	t.Helper()
	dh := weakDH{noise.DH25519, ephemeral}
	state, err := noise.NewHandshakeState(noise.Config{
		CipherSuite: noise.NewCipherSuite(dh, noise.CipherAESGCM, noise.HashSHA256),
		Pattern:     noise.HandshakeXX, Initiator: initiator, Prologue: prologue(s.preface, s.lane),
		PresharedKeyPlacement: 3, StaticKeypair: static,
	})
	check(t, err)
	h.state = state
}

func TestPointsOfLowOrderAreRefused(t *testing.T) {
	s := newShaking(t, AESGCM)
	for _, text := range lowOrder {
		for _, top := range []byte{0, 0x80} {
			point := must(hex.DecodeString(text))(t)
			point[31] |= top
			key := func(self *identity.Self) noise.DHKey {
				k, _, err := self.Static(time.Now())
				check(t, err)
				return keypair(k)
			}
			weakKey := noise.DHKey{Private: weakPrivate, Public: point}

			// Ephemeral of the initiator: no message 2 comes.
			i, r := s.ends(t)
			s.attacker(t, i, true, point, key(s.i))
			check(t, r.read1(must(i.write1())(t)))
			_, err := r.write2()
			refused(t, r, err)

			// Ephemeral of the responder.
			i, r = s.ends(t)
			s.attacker(t, r, false, point, key(s.r))
			check(t, r.read1(must(i.write1())(t)))
			refused(t, i, i.read2(must(r.write2())(t)))

			// Static of the responder.
			i, r = s.ends(t)
			s.attacker(t, r, false, nil, weakKey)
			check(t, r.read1(must(i.write1())(t)))
			refused(t, i, i.read2(must(r.write2())(t)))

			// Static of the initiator.
			i, r = s.ends(t)
			s.attacker(t, i, true, nil, weakKey)
			check(t, r.read1(must(i.write1())(t)))
			check(t, i.read2(must(r.write2())(t)))
			refused(t, r, r.read3(must(i.write3())(t)))
		}
	}
}

// With one end's keys in hand an attacker can be that end, but nobody else to
// it: key compromise impersonation.
func TestStolenKeysOfOneEndDoNotImpersonateTheOther(t *testing.T) {
	s := newShaking(t, AESGCM)
	public := func(self *identity.Self) noise.DHKey {
		k, _, err := self.Static(time.Now())
		check(t, err)
		private := make([]byte, 32)
		rand.Read(private)
		return noise.DHKey{Private: private, Public: k.PublicKey().Bytes()} // the private key is what is missing
	}
	// The attacker knows all of s.r and has seen s.i's proof and public key.
	i, r := s.ends(t)
	s.attacker(t, i, true, nil, public(s.i))
	check(t, r.read1(must(i.write1())(t)))
	check(t, i.read2(must(r.write2())(t)))
	refused(t, r, r.read3(must(i.write3())(t)))

	// The attacker knows all of s.i and has seen s.r's proof and public key.
	i, r = s.ends(t)
	s.attacker(t, r, false, nil, public(s.r))
	check(t, r.read1(must(i.write1())(t)))
	refused(t, i, i.read2(must(r.write2())(t)))
}

func TestAProofIsWorthNothingWithAnotherKey(t *testing.T) {
	s := newShaking(t, AESGCM)
	mallory := newSelf(t)
	key, _, err := mallory.Static(time.Now())
	check(t, err)

	i, r := s.ends(t) // i and r show the proofs of s.i and s.r
	s.attacker(t, i, true, nil, keypair(key))
	check(t, r.read1(must(i.write1())(t)))
	check(t, i.read2(must(r.write2())(t)))
	refused(t, r, r.read3(must(i.write3())(t)))
	if r.peer != nil {
		t.Error("the responder knows a peer that proved nothing")
	}

	i, r = s.ends(t)
	s.attacker(t, r, false, nil, keypair(key))
	check(t, r.read1(must(i.write1())(t)))
	refused(t, i, i.read2(must(r.write2())(t)))
	if i.peer != nil {
		t.Error("the initiator knows a peer that proved nothing")
	}
}

// ML-KEM rejects implicitly: an altered ciphertext gives another secret and no
// error, so it is message 3 that does not verify.
func TestAnotherKEMSecretEndsTheHandshakeAtMessage3(t *testing.T) {
	s := newShaking(t, AESGCM)
	i, r := s.ends(t)
	check(t, r.read1(must(i.write1())(t)))
	other, err := mlkem.GenerateKey768()
	check(t, err)
	i.kem = other
	check(t, i.read2(must(r.write2())(t)))
	refused(t, r, r.read3(must(i.write3())(t)))
}

func TestAnEncapsulationKeyOutOfRangeIsRefused(t *testing.T) {
	s := newShaking(t, AESGCM)
	i, r := s.ends(t)
	m, _, _, err := i.state.WriteMessage(nil, bytes.Repeat([]byte{0xff}, mlkem.EncapsulationKeySize768))
	check(t, err)
	check(t, r.read1(m))
	_, err = r.write2()
	refused(t, r, err)
}

func TestAPayloadThatIsNoProofIsRefused(t *testing.T) {
	s := newShaking(t, AESGCM)
	for name, proof := range map[string][]byte{
		"empty fields":     {0, 0, 0, 0},
		"lying length":     append([]byte{0xff, 0xff}, make([]byte, 100)...),
		"one byte behind":  append(must(encodeProof(s.i.History(), nil))(t), 1),
		"no attestation":   must(encodeProof(s.i.History(), nil))(t),
		"another identity": begun(t, newSelf(t), true, s.preface, s.lane).proof,
	} {
		t.Run(name, func(t *testing.T) {
			i, r := s.ends(t)
			i.proof = proof
			check(t, r.read1(must(i.write1())(t)))
			check(t, i.read2(must(r.write2())(t)))
			refused(t, r, r.read3(must(i.write3())(t)))

			i, r = s.ends(t)
			r.proof = proof
			check(t, r.read1(must(i.write1())(t)))
			refused(t, i, i.read2(must(r.write2())(t)))
		})
	}
	if _, err := encodeProof(make([]byte, maxProof), nil); err == nil {
		t.Error("a proof that is too long is encoded")
	}
}

func TestAnAttestationMustBeValidNow(t *testing.T) {
	s := newShaking(t, AESGCM)
	for _, off := range []time.Duration{-60 * 24 * time.Hour, 60 * 24 * time.Hour} {
		i, r := s.ends(t)
		r.now = r.now.Add(off)
		check(t, r.read1(must(i.write1())(t)))
		check(t, i.read2(must(r.write2())(t)))
		refused(t, r, r.read3(must(i.write3())(t)))
	}
}
