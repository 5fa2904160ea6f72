package authority

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/portal-tunnel/portal/identity"
)

const (
	nameEnroll = "enroll"
	nameRenew  = "renew"

	// maxQuestion is many times the largest question of today (about 120 bytes).
	maxQuestion = 8 << 10
	// maxAnswer holds a credential and a change history, 4 KiB each, and what is around them.
	maxAnswer = identity.MaxCredential + identity.MaxHistory + 1<<10

	secretSize = 32
	proofSize  = 64 // Ed25519
)

// question is what a subject asks. The stream's header says which question it is; who asks is the channel's business.
type question struct {
	Now    int64  `cbor:"1,keyasint"`           // the subject's clock, Unix milliseconds
	Secret []byte `cbor:"2,keyasint,omitempty"` // enroll only: the ticket's secret, 32 bytes
	Proof  []byte `cbor:"3,keyasint,omitempty"` // enroll only: 64 bytes, see proofParts
}

// String, GoString and LogValue keep the secret out of whatever prints a question.
func (q *question) String() string       { return "question(redacted)" }
func (q *question) GoString() string     { return q.String() }
func (q *question) LogValue() slog.Value { return slog.StringValue(q.String()) }

// answer is what comes back: a credential with its issuer's history, or a code that says why not.
type answer struct {
	Code       code   `cbor:"1,keyasint"`
	Now        int64  `cbor:"2,keyasint"`           // the authority's clock, Unix milliseconds
	When       int64  `cbor:"3,keyasint,omitempty"` // refusals: since when it is so, Unix milliseconds
	Credential []byte `cbor:"4,keyasint,omitempty"` // granted only
	History    []byte `cbor:"5,keyasint,omitempty"` // granted only
	Repeat     bool   `cbor:"6,keyasint,omitempty"` // granted only: this identity redeemed this ticket before
}

// code is the outcome of a question. Codes are never reused; an unknown one is a refusal.
type code uint8

const (
	codeGranted       code = 0
	codeMalformed     code = 1  // the question is not one, or is not the one its name says
	codeProof         code = 2  // the signature does not bind ticket, channel and authority
	codeTicketUnknown code = 3  // no such ticket, or none any more
	codeTicketExpired code = 4  // When: its expiry
	codeTicketUsed    code = 5  // When: its last use
	codeTicketRevoked code = 6  // When: its revocation
	codeSkew          code = 7  // the two clocks are too far apart; Now is the other one
	codeNotMember     code = 8  // this identity never redeemed a ticket here
	codeRemoved       code = 9  // When: its removal
	codeFull          code = 10 // no room for another member
	codeUnavailable   code = 11 // nothing was done; ask again
	codeRotatedAway   code = 12 // the history shown lacks a change that was seen
)

var (
	encMode = func() cbor.EncMode {
		o := cbor.CoreDetEncOptions()
		o.NilContainers = cbor.NilContainerAsEmpty
		m, err := o.EncMode()
		if err != nil {
			panic(err)
		}
		return m
	}()
	decMode = func() cbor.DecMode {
		m, err := cbor.DecOptions{
			DupMapKey:         cbor.DupMapKeyEnforcedAPF,
			IndefLength:       cbor.IndefLengthForbidden,
			TagsMd:            cbor.TagsForbidden,
			IntDec:            cbor.IntDecConvertSignedOrFail,
			ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
			UTF8:              cbor.UTF8RejectInvalid,
			MaxNestedLevels:   4,    // record, grant, attributes, list
			MaxArrayElements:  1024, // the names of one list, in ≤ 4 KiB of attributes
			MaxMapPairs:       64,   // attributes of one credential
		}.DecMode()
		if err != nil {
			panic(err)
		}
		return m
	}()
)

// encode is the deterministic encoding of RFC 8949 section 4.2.1.
func encode(v any) ([]byte, error) { return encMode.Marshal(v) }

// decode accepts exactly what encode makes: no unknown or repeated key, no longer form of a number, nothing behind it.
func decode(b []byte, v any) error {
	if err := decMode.Unmarshal(b, v); err != nil {
		return err
	}
	again, err := encode(v)
	if err != nil {
		return err
	}
	if !bytes.Equal(again, b) {
		return errors.New("not the deterministic encoding")
	}
	return nil
}

func decodeQuestion(name string, b []byte) (*question, error) {
	q := new(question)
	if err := decode(b, q); err != nil {
		return nil, err
	}
	secret, proof := 0, 0
	if name == nameEnroll {
		secret, proof = secretSize, proofSize
	}
	if len(q.Secret) != secret || len(q.Proof) != proof {
		return nil, fmt.Errorf("%q takes a secret of %d bytes and a proof of %d, got %d and %d", name, secret, proof, len(q.Secret), len(q.Proof))
	}
	return q, nil
}

func decodeAnswer(b []byte) (*answer, error) {
	a := new(answer)
	if err := decode(b, a); err != nil {
		return nil, err
	}
	if a.Code == codeGranted {
		if a.When != 0 || len(a.Credential) == 0 || len(a.History) == 0 || len(a.History) > identity.MaxHistory || len(a.Credential) > identity.MaxCredential {
			return nil, errors.New("granted without exactly a credential and a history")
		}
	} else if len(a.Credential) != 0 || len(a.History) != 0 || a.Repeat {
		return nil, errors.New("refused with what only a grant has")
	}
	return a, nil
}

// readAll reads to the end of r, at most limit bytes.
func readAll(r io.Reader, limit int) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, int64(limit)+1))
	if err != nil {
		return nil, err
	}
	if len(b) > limit {
		return nil, fmt.Errorf("longer than %d bytes", limit)
	}
	return b, nil
}

// millis and instant convert to and from the wire's clock; zero is "not so" in both.
func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func instant(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}
