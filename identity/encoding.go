package identity

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/fxamacker/cbor/v2"
)

// Limits of what a peer or a file can make this package decode, in bytes.
const (
	MaxHistory     = 4 << 10 // 16 changes take 3.4 KiB
	MaxChanges     = 16
	MaxAttestation = 256 // always 193 or a few bytes less
	MaxCredential  = 4 << 10
)

// skew is how far ahead of this clock a not-before may lie.
const skew = 60 * time.Second

// latestTime is the last millisecond of the year 9999, which RFC 3339 can still
// print.
const latestTime = 253_402_300_799_999

var (
	encoder = must(func() (cbor.EncMode, error) {
		o := cbor.CoreDetEncOptions()
		// A nil slice is written as an empty one, so null is never what we would
		// have written and is refused on the way in.
		o.NilContainers = cbor.NilContainerAsEmpty
		return o.EncMode()
	})
	decoder = must(cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		IntDec:            cbor.IntDecConvertSignedOrFail,
		MaxNestedLevels:   8,
		MaxArrayElements:  1024,
		MaxMapPairs:       256,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		UTF8:              cbor.UTF8RejectInvalid,
	}.DecMode)
)

func must[T any](f func() (T, error)) T {
	v, err := f()
	if err != nil {
		panic(err)
	}
	return v
}

var errEncoding = errors.New("not in deterministic encoding")

// decode reads b, all of it, into v, and refuses every encoding but the one
// that encode gives.
func decode(b []byte, v any) error {
	if err := decoder.Unmarshal(b, v); err != nil {
		return err
	}
	again, err := encoder.Marshal(v)
	if err != nil {
		return err
	}
	if !bytes.Equal(b, again) {
		return errEncoding
	}
	return nil
}

// encode is for values of this package's own types, which always encode.
func encode(v any) []byte {
	b, err := encoder.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("identity: encoding %T: %v", v, err))
	}
	return b
}

// The labels of this package's own signatures. Self.Sign does not give them.
const (
	labelChange      = "change"
	labelRotation    = "rotation"
	labelAttestation = "attestation"
	labelCredential  = "credential"
)

// typeLabel returns "portal/<label>/v1".
func typeLabel(label string) string { return "portal/" + label + "/v1" }

// signed returns the bytes a signature covers. They begin with the high byte of
// a length below 2²⁴, a zero; what COSE signs begins with 0x84.
func signed(label string, parts ...[]byte) []byte {
	full := typeLabel(label)
	n := 4 + len(full)
	for _, p := range parts {
		n += 4 + len(p)
	}
	b := make([]byte, 0, n)
	b = binary.BigEndian.AppendUint32(b, uint32(len(full)))
	b = append(b, full...)
	for _, p := range parts {
		b = binary.BigEndian.AppendUint32(b, uint32(len(p)))
		b = append(b, p...)
	}
	return b
}

func sign(key ed25519.PrivateKey, label string, parts ...[]byte) []byte {
	return ed25519.Sign(key, signed(label, parts...))
}

// verify reports whether sig is key's signature. Signatures have one encoding:
// crypto/ed25519 refuses an S that is not reduced and compares R as bytes.
func verify(key ed25519.PublicKey, sig []byte, label string, parts ...[]byte) bool {
	return len(sig) == ed25519.SignatureSize && ed25519.Verify(key, signed(label, parts...), sig)
}

// checkLabel admits the labels that callers may sign under.
func checkLabel(label string) error {
	switch label {
	case labelChange, labelRotation, labelAttestation, labelCredential:
		return fmt.Errorf("identity: the signature label %q is kept for package identity", label)
	}
	ok := len(label) >= 1 && len(label) <= 32
	for _, c := range []byte(label) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-')
	}
	if !ok {
		return fmt.Errorf("identity: the signature label %q is not 1 to 32 of a-z, 0-9 and -", label)
	}
	return nil
}

// span is a time of validity as it stands on the wire, in milliseconds.
type span struct{ notBefore, expires int64 }

func (s span) wellFormed() bool {
	return s.notBefore >= 0 && s.notBefore < s.expires && s.expires <= latestTime
}

// check returns nil or an *ExpiredError about what.
func (s span) check(what string, now time.Time) error {
	from, to := time.UnixMilli(s.notBefore).UTC(), time.UnixMilli(s.expires).UTC()
	if now.Add(skew).Before(from) || !now.Before(to) {
		return &ExpiredError{What: what, NotBefore: from, Expires: to, Now: now}
	}
	return nil
}
