package identity

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/veraison/go-cose"
)

// Credential says what an authority signed about a subject. It is made by
// Self.Issue and Trust.Verify, and immutable.
type Credential struct {
	Subject    ID
	Change     [32]byte // hash of the subject's latest change when it was issued
	Issuer     ID
	Attributes Attributes
	NotBefore  time.Time
	Expires    time.Time
	Serial     [16]byte

	raw []byte
}

const credentialType = "application/portal-credential+cwt"

type claims struct {
	Issuer      string         `cbor:"1,keyasint"`
	Subject     string         `cbor:"2,keyasint"`
	Expires     int64          `cbor:"4,keyasint"`
	NotBefore   int64          `cbor:"5,keyasint"`
	Serial      []byte         `cbor:"7,keyasint"`
	Change      []byte         `cbor:"-65537,keyasint"`
	Attributes  map[string]any `cbor:"-65538,keyasint"`
	ExpiresMs   int64          `cbor:"-65539,keyasint"`
	NotBeforeMs int64          `cbor:"-65540,keyasint"`
}

// seconds gives the registered claims that agree with the ones in milliseconds.
func (s span) seconds() (notBefore, expires int64) {
	return s.notBefore / 1000, (s.expires + 999) / 1000
}

// protectedHeader returns the only header a credential has.
func protectedHeader() cose.ProtectedHeader {
	return cose.ProtectedHeader{
		cose.HeaderLabelAlgorithm: cose.AlgorithmEdDSA,
		cose.HeaderLabelType:      credentialType,
	}
}

var protectedBytes = must(protectedHeader().MarshalCBOR)

func issue(s *selfState, subject ID, change [32]byte, attrs Attributes, notBefore, expires time.Time) (*Credential, error) {
	if err := checkAttributes(attrs); err != nil {
		return nil, err
	}
	life := span{notBefore.UnixMilli(), expires.UnixMilli()}
	if !life.wellFormed() {
		return nil, fmt.Errorf("it would be valid from %s to %s", notBefore.UTC(), expires.UTC())
	}
	c := &Credential{
		Subject:    subject,
		Change:     change,
		Issuer:     s.history.id(),
		Attributes: cloneAttributes(attrs),
		NotBefore:  time.UnixMilli(life.notBefore).UTC(),
		Expires:    time.UnixMilli(life.expires).UTC(),
	}
	rand.Read(c.Serial[:]) // never fails: crypto/rand ends the process instead

	nbf, exp := life.seconds()
	m := cose.UntaggedSign1Message{
		Headers: cose.Headers{Protected: protectedHeader()},
		Payload: encode(&claims{
			Issuer:      c.Issuer.String(),
			Subject:     c.Subject.String(),
			Expires:     exp,
			NotBefore:   nbf,
			Serial:      c.Serial[:],
			Change:      c.Change[:],
			Attributes:  c.Attributes,
			ExpiresMs:   life.expires,
			NotBeforeMs: life.notBefore,
		}),
	}
	signer, err := cose.NewSigner(cose.AlgorithmEdDSA, s.key)
	if err != nil {
		return nil, err
	}
	if err := m.Sign(rand.Reader, []byte(typeLabel(labelCredential)), signer); err != nil {
		return nil, err
	}
	if c.raw, err = m.MarshalCBOR(); err != nil {
		return nil, err
	}
	if len(c.raw) > MaxCredential {
		return nil, fmt.Errorf("it would take %d bytes; at most %d are read", len(c.raw), MaxCredential)
	}
	return c, nil
}

// parseSign1 reads the COSE envelope. go-cose verifies over the protected
// header and payload as received, but tolerates other headers and longer
// encodings of lengths; what is not exactly our form is refused here.
func parseSign1(raw []byte) (*cose.UntaggedSign1Message, error) {
	if len(raw) > MaxCredential {
		return nil, fmt.Errorf("%w: a credential of %d bytes; at most %d are read", ErrMalformed, len(raw), MaxCredential)
	}
	if err := decoder.Wellformed(raw); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	m := new(cose.UntaggedSign1Message)
	if err := m.UnmarshalCBOR(raw); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	if !bytes.Equal(m.Headers.RawProtected, protectedBytes) || len(m.Headers.Unprotected) != 0 {
		return nil, fmt.Errorf("%w: the headers are not a credential's", ErrMalformed)
	}
	again, err := m.MarshalCBOR()
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	if !bytes.Equal(again, raw) {
		return nil, fmt.Errorf("%w: %v", ErrMalformed, errEncoding)
	}
	return m, nil
}

// parseCredential reads a credential without verifying its signature.
func parseCredential(raw []byte) (*Credential, error) {
	m, err := parseSign1(raw)
	if err != nil {
		return nil, err
	}
	var d claims
	if err := decode(m.Payload, &d); err != nil {
		return nil, fmt.Errorf("%w: the claims: %v", ErrMalformed, err)
	}
	c := &Credential{raw: append([]byte(nil), raw...)}
	if c.Issuer, err = ParseID(d.Issuer); err != nil {
		return nil, fmt.Errorf("%w: the issuer: %v", ErrMalformed, err)
	}
	if c.Subject, err = ParseID(d.Subject); err != nil {
		return nil, fmt.Errorf("%w: the subject: %v", ErrMalformed, err)
	}
	if copy(c.Serial[:], d.Serial) != len(d.Serial) || len(d.Serial) != len(c.Serial) ||
		copy(c.Change[:], d.Change) != len(d.Change) || len(d.Change) != len(c.Change) {
		return nil, fmt.Errorf("%w: a serial or hash of the wrong length", ErrMalformed)
	}
	life := span{d.NotBeforeMs, d.ExpiresMs}
	if !life.wellFormed() {
		return nil, fmt.Errorf("%w: a time of validity that no credential has", ErrMalformed)
	}
	if nbf, exp := life.seconds(); nbf != d.NotBefore || exp != d.Expires {
		return nil, fmt.Errorf("%w: times that contradict each other", ErrMalformed)
	}
	c.NotBefore, c.Expires = time.UnixMilli(d.NotBeforeMs).UTC(), time.UnixMilli(d.ExpiresMs).UTC()
	if c.Attributes, err = decodedAttributes(d.Attributes); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	return c, nil
}

// verify checks that the latest key of issuer signed c as it was received.
func (c *Credential) verify(issuer *history) error {
	if c.Issuer != issuer.id() {
		return ErrSignature
	}
	m, err := parseSign1(c.raw)
	if err != nil {
		return err
	}
	verifier, err := cose.NewVerifier(cose.AlgorithmEdDSA, issuer.key)
	if err != nil {
		return ErrSignature
	}
	if err := m.Verify([]byte(typeLabel(labelCredential)), verifier); err != nil {
		return ErrSignature
	}
	return nil
}

// follows reports whether c may replace before: false and nil when it is the
// same. Of a change that was rotated away the expiry no longer counts.
func (c *Credential) follows(before *Credential) (bool, error) {
	switch {
	case before == nil:
		return true, nil
	case bytes.Equal(c.raw, before.raw):
		return false, nil
	case c.Issuer != before.Issuer:
		return false, ErrIssuer
	case c.Change == before.Change && !c.Expires.After(before.Expires):
		return false, ErrOlder
	}
	return true, nil
}

// span returns the time of validity.
func (c *Credential) span() span { return span{c.NotBefore.UnixMilli(), c.Expires.UnixMilli()} }

// Raw returns the COSE_Sign1 as it was issued or received. The caller must not
// modify it.
func (c *Credential) Raw() []byte {
	if c == nil {
		return nil
	}
	return c.raw
}

// Name returns the attribute name; "" when there is none.
func (c *Credential) Name() string {
	if c == nil {
		return ""
	}
	s, _ := c.Attributes["name"].(string)
	return s
}

// Serve returns the attribute serve: the names, some of them ending in "/*",
// that the subject may serve. The caller must not modify it.
func (c *Credential) Serve() []string {
	if c == nil {
		return nil
	}
	list, _ := c.Attributes["serve"].([]string)
	return list
}

// MayServe reports whether serve contains name, itself or below a trailing
// "/*", the only wildcard. "a/*" contains "a/b" and "a/b/c", not "a". Nobody's
// serve contains "authority".
func (c *Credential) MayServe(name string) bool {
	if name == authorityName || ValidName(name) != nil {
		return false
	}
	for _, pattern := range c.Serve() {
		below, wild := strings.CutSuffix(pattern, "*")
		if name == pattern || wild && strings.HasPrefix(name, below) {
			return true
		}
	}
	return false
}

// Relay reports the attribute relay: the subject may be used as a relay.
func (c *Credential) Relay() bool {
	if c == nil {
		return false
	}
	b, _ := c.Attributes["relay"].(bool)
	return b
}

// LogValue shows whom the credential is about and until when.
func (c *Credential) LogValue() slog.Value {
	if c == nil {
		return slog.StringValue("none")
	}
	return slog.GroupValue(slog.String("subject", c.Subject.String()), slog.String("issuer", c.Issuer.String()),
		slog.Time("expires", c.Expires))
}
