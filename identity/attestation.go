package identity

import (
	"crypto/ecdh"
	"crypto/rand"
	"fmt"
	"time"
)

const (
	// staticRole says what an attested key is for; a key for one purpose is
	// never one for another.
	staticRole = "noise-static"

	attestationLife = 30 * 24 * time.Hour

	// An attestation begins a day before it is made. It speaks only of a key
	// that its own maker holds, so this admits nothing; but a host whose clock is
	// off by less finishes its handshake, and is then told both clocks.
	attestationBackdate = 24 * time.Hour
)

type attestation struct {
	_         struct{} `cbor:",toarray"`
	Data      []byte
	Signature []byte
}

type attestationData struct {
	_         struct{} `cbor:",toarray"`
	Subject   []byte
	Change    []byte
	Role      string
	Key       []byte
	NotBefore int64
	Expires   int64
}

// static is an X25519 key with its attestation; immutable.
type static struct {
	key    *ecdh.PrivateKey
	raw    []byte
	change [32]byte
	from   time.Time // before it, or from half on, a new one is made
	half   time.Time
}

func newStatic(s *selfState, now time.Time) (*static, error) {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("identity: making a channel key: %w", err)
	}
	id, latest := s.history.id(), s.history.latest()
	begin := now.Add(-attestationBackdate)
	if begin.Before(time.UnixMilli(0)) {
		begin = time.UnixMilli(0)
	}
	data := encode(&attestationData{
		Subject:   id[:],
		Change:    latest[:],
		Role:      staticRole,
		Key:       key.PublicKey().Bytes(),
		NotBefore: begin.UnixMilli(),
		Expires:   begin.Add(attestationLife).UnixMilli(),
	})
	return &static{
		key:    key,
		raw:    encode(&attestation{Data: data, Signature: sign(s.key, labelAttestation, data)}),
		change: latest,
		from:   begin.Add(attestationBackdate / 2),
		half:   begin.Add(attestationLife / 2),
	}, nil
}

// fresh reports whether st still serves s at now. A clock that was set back by
// half a day makes it as stale as one that ran on.
func (st *static) fresh(s *selfState, now time.Time) bool {
	return st != nil && st.change == s.history.latest() && !now.Before(st.from) && now.Before(st.half)
}

// verifyAttestation checks that h's latest key attests static at now.
func verifyAttestation(raw []byte, h *history, static []byte, now time.Time) error {
	if len(raw) > MaxAttestation {
		return fmt.Errorf("%w: an attestation of %d bytes; at most %d are read", ErrMalformed, len(raw), MaxAttestation)
	}
	var a attestation
	if err := decode(raw, &a); err != nil {
		return fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	if !verify(h.key, a.Signature, labelAttestation, a.Data) {
		return ErrSignature
	}
	var d attestationData
	if err := decode(a.Data, &d); err != nil {
		return fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	id, latest := h.id(), h.latest()
	if string(d.Subject) != string(id[:]) || string(d.Change) != string(latest[:]) || string(d.Key) != string(static) {
		return ErrSubject
	}
	if d.Role != staticRole {
		return fmt.Errorf("%w: a key for %q", ErrMalformed, d.Role)
	}
	life := span{d.NotBefore, d.Expires}
	if !life.wellFormed() || d.Expires-d.NotBefore > attestationLife.Milliseconds() {
		return fmt.Errorf("%w: a time of validity that no attestation has", ErrMalformed)
	}
	return life.check("attestation", now)
}
