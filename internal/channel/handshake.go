package channel

import (
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/mlkem"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"time"

	"github.com/flynn/noise"

	"github.com/portal-tunnel/portal/identity"
)

// Sizes of the handshake's messages (SPEC.md, "Handshake").
const (
	maxProof = 4 << 10 // history and attestation, with their two lengths

	message1 = 32 + mlkem.EncapsulationKeySize768 + 16
	// e, then the sealed static key, then the sealed payload.
	message2Least = 32 + 32 + 16 + mlkem.CiphertextSize768 + 4 + 16
	message2Most  = message2Least - 4 + maxProof
	message3Least = 32 + 16 + 4 + 16
	message3Most  = message3Least - 4 + maxProof
)

// ErrHandshake is all that is ever said about a handshake that failed: not
// where, so that an attacker learns nothing from it.
var ErrHandshake = errors.New("handshake failed: the other end is not a portal that proves its identity, or the bytes were changed on the way")

// A handshake is Noise XXpsk3 (Noise rev. 34, §7.5 and §9) with an ML-KEM-768
// exchange (FIPS 203) in the payloads of messages 1 and 2, whose secret is the
// pre-shared key of message 3. It does no I/O: each step takes or gives one
// whole message. Any error is final; the state is of no use afterwards.
type handshake struct {
	state *noise.HandshakeState
	suite Suite
	now   time.Time
	proof []byte // ours: history and attestation

	kem  *mlkem.DecapsulationKey768 // initiator, between messages 1 and 2
	ek   []byte                     // the encapsulation key as it travelled
	dead bool

	peer     *identity.Peer // after message 2 or 3
	binding  [32]byte       // h, after the last message
	toR, toI [32]byte       // record keys by direction, after the last message
}

// newHandshake binds the prologue: everything that both ends must agree on
// and that travels in clear, and the key of the lane.
func newHandshake(self *identity.Self, initiator bool, p Preface, lane [32]byte, now time.Time, random io.Reader) (*handshake, error) {
	static, attestation, err := self.Static(now)
	if err != nil {
		return nil, err
	}
	proof, err := encodeProof(self.History(), attestation)
	if err != nil {
		return nil, err
	}
	state, err := noise.NewHandshakeState(noise.Config{
		CipherSuite:           cipherSuite(p.Suite, newX25519(static)),
		Random:                random,
		Pattern:               noise.HandshakeXX,
		Initiator:             initiator,
		Prologue:              prologue(p, lane),
		PresharedKeyPlacement: 3, // the key itself is set when the KEM has given it
		StaticKeypair:         keypair(static),
	})
	if err != nil {
		return nil, err
	}
	return &handshake{state: state, suite: p.Suite, now: now, proof: proof}, nil
}

func cipherSuite(s Suite, dh noise.DHFunc) noise.CipherSuite {
	if s == ChaChaPoly {
		return noise.NewCipherSuite(dh, noise.CipherChaChaPoly, noise.HashBLAKE2s)
	}
	return noise.NewCipherSuite(dh, noise.CipherAESGCM, noise.HashSHA256)
}

func prologue(p Preface, lane [32]byte) []byte {
	b := append([]byte("portal/channel/v1"), p.Append(nil)...)
	return append(b, lane[:]...)
}

func keypair(k *ecdh.PrivateKey) noise.DHKey {
	return noise.DHKey{Private: k.Bytes(), Public: k.PublicKey().Bytes()}
}

// fail ends the handshake: flynn/noise does not take back what a bad message
// mixed in, so nothing may be tried again on the same state.
func (h *handshake) fail() error {
	h.dead, h.state, h.kem = true, nil, nil
	return ErrHandshake
}

// write1 gives message 1: e, and the encapsulation key.
func (h *handshake) write1() ([]byte, error) {
	kem, err := mlkem.GenerateKey768()
	if err != nil {
		return nil, h.fail()
	}
	h.kem, h.ek = kem, kem.EncapsulationKey().Bytes()
	m, _, _, err := h.state.WriteMessage(nil, h.ek)
	if err != nil {
		return nil, h.fail()
	}
	return m, nil
}

// read1 takes message 1 and write2 answers it: e, ee, s, es, the KEM's
// ciphertext and the responder's proof.
func (h *handshake) read1(m []byte) error {
	if h.dead || len(m) != message1 {
		return h.fail()
	}
	payload, _, _, err := h.state.ReadMessage(nil, m)
	if err != nil || len(payload) != mlkem.EncapsulationKeySize768 {
		return h.fail()
	}
	h.ek = payload
	return nil
}

func (h *handshake) write2() ([]byte, error) {
	if h.dead {
		return nil, ErrHandshake
	}
	ek, err := mlkem.NewEncapsulationKey768(h.ek) // checks the key's modulus
	if err != nil {
		return nil, h.fail()
	}
	shared, ct := ek.Encapsulate()
	m, _, _, err := h.state.WriteMessage(nil, append(ct, h.proof...))
	if err != nil || h.mix(shared, ct) != nil {
		return nil, h.fail()
	}
	h.ek, h.proof = nil, nil // nothing needs them while message 3 is awaited
	return m, nil
}

// read2 takes message 2 and verifies the responder's proof. The caller checks
// a pinned identity before it goes on to write3.
func (h *handshake) read2(m []byte) error {
	if h.dead || len(m) < message2Least || len(m) > message2Most {
		return h.fail()
	}
	payload, _, _, err := h.state.ReadMessage(nil, m)
	if err != nil {
		return h.fail()
	}
	ct, proof := payload[:mlkem.CiphertextSize768], payload[mlkem.CiphertextSize768:]
	shared, err := h.kem.Decapsulate(ct)
	if err != nil || h.verify(proof) != nil || h.mix(shared, ct) != nil {
		return h.fail()
	}
	h.kem = nil
	return nil
}

// write3 gives message 3: s, se, psk and the initiator's proof.
func (h *handshake) write3() ([]byte, error) {
	if h.dead {
		return nil, ErrHandshake
	}
	m, toR, toI, err := h.state.WriteMessage(nil, h.proof)
	if err != nil {
		return nil, h.fail()
	}
	h.split(toR, toI)
	return m, nil
}

// read3 takes message 3. An altered KEM ciphertext shows here at the latest:
// ML-KEM rejects implicitly, so the two pre-shared keys differ.
func (h *handshake) read3(m []byte) error {
	if h.dead || len(m) < message3Least || len(m) > message3Most {
		return h.fail()
	}
	payload, toR, toI, err := h.state.ReadMessage(nil, m)
	if err != nil || toR == nil || h.verify(payload) != nil {
		return h.fail()
	}
	h.split(toR, toI)
	return nil
}

// mix sets psk = HKDF-SHA256(shared, salt = SHA-256(ek ‖ ct), info = label ‖ version).
func (h *handshake) mix(shared, ct []byte) error {
	t := sha256.New()
	t.Write(h.ek)
	t.Write(ct)
	psk, err := hkdf.Key(sha256.New, shared, t.Sum(nil), "portal xxpsk3 mlkem768 v1", 32)
	if err != nil {
		return err
	}
	h.ek = nil
	return h.state.SetPresharedKey(psk)
}

// verify checks that the static key of the Noise session is attested by the
// identity whose history came with it.
func (h *handshake) verify(proof []byte) error {
	history, attestation, err := decodeProof(proof)
	if err != nil {
		return err
	}
	h.peer, err = identity.VerifyProof(history, attestation, h.state.PeerStatic(), h.now)
	return err
}

// split keeps what outlives the handshake. flynn/noise returns the initiator's
// sending key first, at both ends.
func (h *handshake) split(toR, toI *noise.CipherState) {
	h.toR, h.toI = toR.UnsafeKey(), toI.UnsafeKey()
	copy(h.binding[:], h.state.ChannelBinding())
	h.state = nil
}

// A proof is: history length (2) | history | attestation length (2) | attestation.
func encodeProof(history, attestation []byte) ([]byte, error) {
	b := appendField(appendField(nil, history), attestation)
	if len(b) > maxProof {
		return nil, errors.New("the identity's history is too long to be shown in a handshake")
	}
	return b, nil
}

func decodeProof(b []byte) (history, attestation []byte, err error) {
	if len(b) > maxProof {
		return nil, nil, ErrHandshake
	}
	return decodeTwo(b)
}

func appendField(b, field []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(field)))
	return append(b, field...)
}

// decodeTwo splits b into exactly two fields with nothing behind them.
func decodeTwo(b []byte) (first, second []byte, err error) {
	first, rest, ok := cutField(b)
	second, rest, ok2 := cutField(rest)
	if !ok || !ok2 || len(rest) != 0 {
		return nil, nil, ErrHandshake
	}
	return first, second, nil
}

func cutField(b []byte) (field, rest []byte, ok bool) {
	if len(b) < 2 {
		return nil, nil, false
	}
	n := int(binary.BigEndian.Uint16(b))
	if len(b)-2 < n {
		return nil, nil, false
	}
	return b[2 : 2+n], b[2+n:], true
}
