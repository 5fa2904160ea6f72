package identity

import (
	"bytes"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Trust holds the authorities whose credentials count, each with the longest
// history it has shown. The zero value trusts nobody. It is safe for concurrent
// use.
type Trust struct {
	mu     sync.Mutex
	pinned []ID
	seen   map[ID]*history
}

// NewTrust returns a Trust that pins the authorities.
func NewTrust(authorities ...ID) *Trust {
	t := new(Trust)
	for _, id := range authorities {
		t.Pin(id)
	}
	return t
}

// Pin adds an authority.
func (t *Trust) Pin(id ID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !slices.Contains(t.pinned, id) {
		t.pinned = append(t.pinned, id)
	}
}

// Authorities returns the pinned authorities in the order they were pinned.
func (t *Trust) Authorities() []ID {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.pinned)
}

// Verify decides whether raw is a credential of a pinned authority about
// subject and its latest change, valid at now: accepted up to a minute before
// its beginning, never from its expiry on. issuerHistory is what raw was shown
// with. The signature must be by the authority's latest key in the longest
// history seen here, so that credentials of a key that was rotated away end at
// each verifier that has seen the rotation.
//
// The error wraps ErrMalformed, *UntrustedError, ErrSignature, ErrFork,
// ErrSubject or *ExpiredError, checked in this order.
func (t *Trust) Verify(raw, issuerHistory []byte, subject ID, change [32]byte, now time.Time) (*Credential, error) {
	c, err := t.verify(raw, issuerHistory, subject, change, now)
	if err != nil {
		return nil, fmt.Errorf("identity: verifying a credential: %w", err)
	}
	return c, nil
}

func (t *Trust) verify(raw, issuerHistory []byte, subject ID, change [32]byte, now time.Time) (*Credential, error) {
	c, err := parseCredential(raw)
	if err != nil {
		return nil, err
	}
	if trusted := t.Authorities(); !slices.Contains(trusted, c.Issuer) {
		return nil, &UntrustedError{Issuer: c.Issuer, Trusted: trusted}
	}
	issuer, err := t.learn(c.Issuer, issuerHistory)
	if err != nil {
		return nil, fmt.Errorf("the issuer's history: %w", err)
	}
	if err := c.verify(issuer); err != nil {
		return nil, err
	}
	if c.Subject != subject || c.Change != change {
		return nil, ErrSubject
	}
	if err := c.span().check("credential", now); err != nil {
		return nil, err
	}
	return c, nil
}

// Learn takes a history of a pinned authority from where it was kept, so that a
// longer one that was seen before is not forgotten. The error wraps ErrMalformed,
// ErrSignature, *UntrustedError or ErrFork.
func (t *Trust) Learn(issuerHistory []byte) error {
	h, err := parseHistory(issuerHistory)
	if err == nil {
		if trusted := t.Authorities(); !slices.Contains(trusted, h.id()) {
			err = &UntrustedError{Issuer: h.id(), Trusted: trusted}
		} else {
			_, err = t.learn(h.id(), issuerHistory)
		}
	}
	if err != nil {
		return fmt.Errorf("identity: learning an authority's history: %w", err)
	}
	return nil
}

// learn verifies a history of id, which is pinned, and returns the longest one
// seen. Only the authority itself can lengthen it.
func (t *Trust) learn(id ID, raw []byte) (*history, error) {
	t.mu.Lock()
	known := t.seen[id]
	t.mu.Unlock()
	if known != nil && bytes.Equal(known.raw, raw) {
		return known, nil
	}
	h, err := parseHistoryOf(id, known, raw)
	if err != nil {
		return nil, err
	}

	t.mu.Lock()
	defer t.mu.Unlock()
	known = t.seen[id]
	switch {
	case known == nil || h.extends(known):
		if t.seen == nil {
			t.seen = make(map[ID]*history)
		}
		t.seen[id] = h
		return h, nil
	case known.extends(h):
		return known, nil
	}
	return nil, ErrFork
}
