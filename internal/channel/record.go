package channel

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/portal-tunnel/portal/internal/buffer"
)

// What one key may seal, per direction. AES-GCM's confidentiality bound for
// 2^32 records of 64 KiB keeps an attacker's advantage below 2^-32 (RFC 8446
// §5.5 and draft-irtf-cfrg-aead-limits); the soft limits leave time to move to
// a successor.
const (
	softBytes, hardBytes     = 1 << 36, 1 << 38
	softRecords, hardRecords = 1 << 30, 1 << 32
)

var (
	errRecord = errors.New("a record did not verify: bytes were changed, lost or repeated on the way")
	errLength = errors.New("a record's length is out of bounds")
	errSpent  = errors.New("the channel's key has sealed as much as it may")
)

// records is one direction of the record layer: an AEAD and the strict counter
// that is its nonce. Its owner is the sealer or the lane reader, never both.
//
//	length of what follows (2, associated data) | plaintext, sealed | tag (16)
type records struct {
	aead  cipher.AEAD
	suite Suite
	nonce [12]byte // a field, so that no record allocates one
	count uint64
	bytes uint64
	dead  bool
}

func newRecords(s Suite, key [32]byte) (*records, error) {
	r := &records{suite: s}
	var err error
	switch s {
	case AESGCM:
		block, e := aes.NewCipher(key[:])
		if e != nil {
			return nil, e
		}
		r.aead, err = cipher.NewGCM(block)
	case ChaChaPoly:
		r.aead, err = chacha20poly1305.New(key[:])
	default:
		err = fmt.Errorf("no suite %d", s)
	}
	return r, err
}

// next is the nonce of the next record: 4 zero bytes and the counter, in the
// byte order that Noise gives each cipher (Noise rev. 34, §12.3 and §12.4).
func (r *records) next(plain int) ([]byte, error) {
	if r.dead {
		return nil, errRecord
	}
	if r.count >= hardRecords || r.bytes+uint64(plain) > hardBytes {
		r.dead = true
		return nil, errSpent
	}
	if r.suite == AESGCM {
		binary.BigEndian.PutUint64(r.nonce[4:], r.count)
	} else {
		binary.LittleEndian.PutUint64(r.nonce[4:], r.count)
	}
	r.count++
	r.bytes += uint64(plain)
	return r.nonce[:], nil
}

// aged says that the soft limit is behind.
func (r *records) aged() bool { return r.count >= softRecords || r.bytes >= softBytes }

// seal seals a record in place: rec is prefix, plaintext and room for the tag.
func (r *records) seal(rec []byte) error {
	plain := len(rec) - buffer.Around
	if plain < 1 || plain > buffer.Plain {
		return errLength
	}
	nonce, err := r.next(plain)
	if err != nil {
		return err
	}
	binary.BigEndian.PutUint16(rec, uint16(plain+buffer.Suffix))
	r.aead.Seal(rec[buffer.Prefix:buffer.Prefix], nonce, rec[buffer.Prefix:buffer.Prefix+plain], rec[:buffer.Prefix])
	return nil
}

// length reads a record's prefix and says how long the whole record is. It is
// asked before anything is read or allocated for the rest.
func length(prefix []byte) (int, error) {
	n := int(binary.BigEndian.Uint16(prefix))
	if n <= buffer.Suffix {
		return 0, errLength
	}
	return buffer.Prefix + n, nil
}

// open opens a whole record in place and returns its plaintext. A record that
// does not verify ends this direction for good.
func (r *records) open(rec []byte) ([]byte, error) {
	nonce, err := r.next(len(rec) - buffer.Around)
	if err != nil {
		return nil, err
	}
	body := rec[buffer.Prefix:]
	plain, err := r.aead.Open(body[:0], nonce, body, rec[:buffer.Prefix])
	if err != nil {
		r.dead = true
		return nil, errRecord
	}
	return plain, nil
}
