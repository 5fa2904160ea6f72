package identity

import (
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"slices"
)

// coseEdDSA is the algorithm number of Ed25519 in COSE (RFC 9053, section 2.2).
const coseEdDSA = -8

type change struct {
	_         struct{} `cbor:",toarray"`
	Data      []byte
	Signature []byte
	Old       []byte
}

type changeData struct {
	_         struct{} `cbor:",toarray"`
	Previous  []byte
	Algorithm int64
	Key       []byte
}

// history is a change history that was verified. It is immutable.
type history struct {
	raw    []byte
	hashes [][32]byte // of the data of each change, first to last
	whole  [][32]byte // of each change with its signatures
	key    ed25519.PublicKey
}

func (h *history) id() ID           { return h.hashes[0] }
func (h *history) latest() [32]byte { return h.hashes[len(h.hashes)-1] }

func (h *history) contains(change [32]byte) bool { return slices.Contains(h.hashes, change) }

// extends reports whether h is o, or o with more changes.
func (h *history) extends(o *history) bool {
	if len(h.hashes) < len(o.hashes) {
		return false
	}
	for i := range o.hashes {
		if h.hashes[i] != o.hashes[i] {
			return false
		}
	}
	return true
}

// parseHistory decodes and verifies a history; it keeps a copy of raw.
func parseHistory(raw []byte) (*history, error) { return parseHistoryOf(ID{}, nil, raw) }

// parseHistoryOf is parseHistory of what has to be id's history, unless that is zero: another's costs no
// signature. Changes that known has were verified before, and are not again.
func parseHistoryOf(id ID, known *history, raw []byte) (*history, error) {
	if len(raw) > MaxHistory {
		return nil, fmt.Errorf("%w: a history of %d bytes; at most %d are read", ErrMalformed, len(raw), MaxHistory)
	}
	var changes []change
	if err := decode(raw, &changes); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	if len(changes) == 0 || len(changes) > MaxChanges {
		return nil, fmt.Errorf("%w: %d changes; a history has 1 to %d", ErrMalformed, len(changes), MaxChanges)
	}
	h := &history{raw: append([]byte(nil), raw...)}
	keys := make(map[[32]byte]bool, len(changes))
	for i, c := range changes {
		var d changeData
		if err := decode(c.Data, &d); err != nil {
			return nil, fmt.Errorf("%w: change %d: %v", ErrMalformed, i, err)
		}
		if d.Algorithm != coseEdDSA || len(d.Key) != ed25519.PublicKeySize {
			return nil, fmt.Errorf("%w: change %d: not an Ed25519 key", ErrMalformed, i)
		}
		if weakEd25519([32]byte(d.Key)) {
			return nil, fmt.Errorf("change %d: %w", i, ErrKey)
		}
		if keys[[32]byte(d.Key)] {
			return nil, fmt.Errorf("%w: change %d: a key that was used before", ErrMalformed, i)
		}
		keys[[32]byte(d.Key)] = true

		hash := sha256.Sum256(c.Data)
		whole := sha256.Sum256(slices.Concat(c.Data, c.Signature, c.Old))
		before := known != nil && i < len(known.hashes) && known.hashes[i] == hash && known.whole[i] == whole && len(c.Signature) == ed25519.SignatureSize
		if i == 0 {
			if !id.IsZero() && hash != id {
				return nil, fmt.Errorf("%w: it is of %s", ErrMalformed, ID(hash).Short())
			}
			if len(d.Previous) != 0 || len(c.Old) != 0 {
				return nil, fmt.Errorf("%w: the first change follows another", ErrMalformed)
			}
		} else {
			if latest := h.latest(); string(d.Previous) != string(latest[:]) {
				return nil, fmt.Errorf("%w: change %d does not follow the one before", ErrMalformed, i)
			}
			if !before && !verify(h.key, c.Old, labelRotation, c.Data) {
				return nil, fmt.Errorf("change %d: %w", i, ErrSignature)
			}
		}
		if !before && !verify(d.Key, c.Signature, labelChange, c.Data) {
			return nil, fmt.Errorf("change %d: %w", i, ErrSignature)
		}
		h.key = d.Key
		h.hashes, h.whole = append(h.hashes, hash), append(h.whole, whole)
	}
	return h, nil
}

// appendChange returns h with one more change to key, signed by key and by old.
// A nil h begins a history, and old is not used.
func appendChange(h *history, old, key ed25519.PrivateKey) (*history, error) {
	var changes []change
	data := changeData{Algorithm: coseEdDSA, Key: key.Public().(ed25519.PublicKey)}
	if h != nil {
		if len(h.hashes) >= MaxChanges {
			return nil, ErrChanges
		}
		if err := decode(h.raw, &changes); err != nil {
			return nil, err
		}
		latest := h.latest()
		data.Previous = latest[:]
	}
	c := change{Data: encode(&data)}
	c.Signature = sign(key, labelChange, c.Data)
	if h != nil {
		c.Old = sign(old, labelRotation, c.Data)
	}
	return parseHistory(encode(append(changes, c)))
}
