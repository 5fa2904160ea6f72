package identity

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

var (
	// ErrMalformed: the bytes are not what they are said to be.
	ErrMalformed = errors.New("malformed")
	// ErrSignature: a signature does not verify.
	ErrSignature = errors.New("the signature does not verify")
	// ErrKey: a public key that nobody can own alone, such as a point of small order.
	ErrKey = errors.New("the public key is not usable")
	// ErrSubject: it is about another identity, another key, or a change that is
	// not the identity's latest.
	ErrSubject = errors.New("it was made for another identity or key")
	// ErrIssuer: a newer credential is of another authority than the one before.
	ErrIssuer = errors.New("it is of another authority than the credential before it")
	// ErrOlder: a credential does not last longer than the one it is to replace.
	ErrOlder = errors.New("it does not last longer than the credential before it")
	// ErrFork: a history contradicts the one already seen for the same identity.
	ErrFork = errors.New("the history contradicts the one seen before")
	// ErrChanges: an identity that has MaxChanges changes cannot rotate again.
	ErrChanges = fmt.Errorf("the identity already has %d changes", MaxChanges)
)

// ExpiredError says that something is used after its expiry, or more than a
// minute before its beginning.
type ExpiredError struct {
	What               string // "credential", "attestation"
	NotBefore, Expires time.Time
	Now                time.Time // by this node's clock
}

// Early reports whether the beginning is still to come, which is nearly always
// a clock that is wrong on one of the two hosts.
func (e *ExpiredError) Early() bool { return e.Now.Before(e.NotBefore) }

func (e *ExpiredError) Error() string {
	const layout = "2006-01-02T15:04:05Z"
	if e.Early() {
		return fmt.Sprintf("the %s is valid from %s, and this host's clock says %s: check both clocks",
			e.What, e.NotBefore.UTC().Format(layout), e.Now.UTC().Format(layout))
	}
	return fmt.Sprintf("the %s expired at %s, %s ago by this host's clock",
		e.What, e.Expires.UTC().Format(layout), e.Now.Sub(e.Expires).Round(time.Second))
}

// UntrustedError says that a credential is of an authority that is not pinned.
type UntrustedError struct {
	Issuer  ID
	Trusted []ID
}

func (e *UntrustedError) Error() string {
	if len(e.Trusted) == 0 {
		return fmt.Sprintf("the credential is of authority %s, and no authority is trusted here", e.Issuer)
	}
	names := make([]string, len(e.Trusted))
	for i, id := range e.Trusted {
		names[i] = id.Short()
	}
	return fmt.Sprintf("the credential is of authority %s; trusted here: %s", e.Issuer, strings.Join(names, ", "))
}
