package identity

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ed25519"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// Self is what this node proves: an identity with its keys, and the credential
// it shows. It is live and safe for concurrent use; it prints as its identifier.
type Self struct {
	state atomic.Pointer[selfState]

	mu     sync.Mutex // held by whoever replaces state, static or save
	static *static
	save   func(*selfState) error // writes a rotated key before it is used; nil: in memory only

	changed listeners
}

// selfState is one immutable snapshot.
type selfState struct {
	key        ed25519.PrivateKey
	history    *history
	credential *Credential
	issuer     []byte
}

// NewSelf returns a new identity that lives in memory only.
func NewSelf() (*Self, error) {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, fmt.Errorf("identity: making a key: %w", err)
	}
	h, err := appendChange(nil, nil, key)
	if err != nil {
		return nil, fmt.Errorf("identity: making an identity: %w", err)
	}
	s := new(Self)
	s.state.Store(&selfState{key: key, history: h})
	return s, nil
}

func (s *Self) ID() ID { return s.state.Load().history.id() }

// History returns the encoded change history. The caller must not modify it.
func (s *Self) History() []byte { return s.state.Load().history.raw }

// Latest returns the hash of the latest change.
func (s *Self) Latest() [32]byte { return s.state.Load().history.latest() }

// Contains reports whether the history has the change with that hash.
func (s *Self) Contains(change [32]byte) bool { return s.state.Load().history.contains(change) }

func (s *Self) String() string               { return s.ID().String() }
func (s *Self) GoString() string             { return "identity.Self(" + s.String() + ")" }
func (s *Self) LogValue() slog.Value         { return slog.StringValue(s.String()) }
func (s *Self) MarshalText() ([]byte, error) { return s.ID().MarshalText() }

// Rotate replaces the key by a new one: the history grows by a change that the
// old and the new key sign. The identifier stays. The credential, which names
// the change before, has to be renewed. ErrChanges when the history is full.
func (s *Self) Rotate() error {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return fmt.Errorf("identity: making a key: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.state.Load()
	h, err := appendChange(now.history, now.key, key)
	if err != nil {
		return fmt.Errorf("identity: rotating the key: %w", err)
	}
	next := &selfState{key: key, history: h, credential: now.credential, issuer: now.issuer}
	if s.save != nil {
		if err := s.save(next); err != nil {
			return fmt.Errorf("identity: rotating the key: %w", err)
		}
	}
	s.state.Store(next)
	return nil
}

// Static returns the X25519 key of this node's channels and its attestation,
// which is valid for at most 30 days. Both are made in memory when first asked
// for, and anew after half that time, after a rotation, and when the clock was
// set back by half a day.
func (s *Self) Static(now time.Time) (*ecdh.PrivateKey, []byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	state := s.state.Load()
	if !s.static.fresh(state, now) {
		st, err := newStatic(state, now)
		if err != nil {
			return nil, nil, err
		}
		s.static = st
	}
	return s.static.key, s.static.raw, nil
}

// Sign signs parts with the identity's latest key under the label, 1 to 32 of
// a-z, 0-9 and '-'. Labels that this package signs under itself are an error.
func (s *Self) Sign(label string, parts ...[]byte) ([]byte, error) {
	if err := checkLabel(label); err != nil {
		return nil, err
	}
	return sign(s.state.Load().key, label, parts...), nil
}

// Credential returns the credential this node shows; nil before enrolment.
func (s *Self) Credential() *Credential { return s.state.Load().credential }

// Issuer returns the history of the credential's issuer; nil before enrolment.
func (s *Self) Issuer() []byte { return s.state.Load().issuer }

// Show returns the credential and its issuer's history as they belong together,
// which two calls, of Credential and of Issuer, might not around a renewal.
func (s *Self) Show() (c *Credential, issuerHistory []byte) {
	state := s.state.Load()
	return state.credential, state.issuer
}

// Renew replaces the credential: c is about this identity's latest change, of
// the same authority as before, and lasts longer than the one before; to renew
// with the same credential again does nothing. ErrSubject, ErrIssuer, ErrOlder,
// ErrSignature. It does not look at the clock: an expired credential is still
// where renewal begins.
func (s *Self) Renew(c *Credential, issuerHistory []byte) error {
	if c == nil {
		return fmt.Errorf("identity: renewing the credential: %w: there is none", ErrMalformed)
	}
	h, err := parseHistory(issuerHistory)
	if err != nil {
		return fmt.Errorf("identity: renewing the credential: the issuer's history: %w", err)
	}
	if err := c.verify(h); err != nil {
		return fmt.Errorf("identity: renewing the credential: %w", err)
	}
	renewed, err := s.renew(c, h)
	if err != nil {
		return fmt.Errorf("identity: renewing the credential: %w", err)
	}
	if renewed {
		s.changed.call()
	}
	return nil
}

func (s *Self) renew(c *Credential, issuer *history) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.state.Load()
	if c.Subject != now.history.id() || c.Change != now.history.latest() {
		return false, ErrSubject
	}
	if newer, err := c.follows(now.credential); !newer {
		return false, err
	}
	next := *now
	next.credential, next.issuer = c, issuer.raw
	s.state.Store(&next)
	return true, nil
}

// OnChange registers f to be called after each Renew that changed something,
// on that caller's goroutine: f must not block, and may be called concurrently.
// Who registers first and reads afterwards misses no change. After stop f is
// not called again, except for a call that has begun.
func (s *Self) OnChange(f func()) (stop func()) { return s.changed.add(f) }

// Issue signs a credential as an authority: about subject, whose latest change
// has the hash change, with the attributes and times given (to the
// millisecond). Of the reserved attributes it takes name, serve and relay.
func (s *Self) Issue(subject ID, change [32]byte, attrs Attributes, notBefore, expires time.Time) (*Credential, error) {
	state := s.state.Load()
	c, err := issue(state, subject, change, attrs, notBefore, expires)
	if err != nil {
		return nil, fmt.Errorf("identity: issuing a credential to %s: %w", subject.Short(), err)
	}
	return c, nil
}

// adopt takes over a later state of the same identity, written by another
// process.
func (s *Self) adopt(o *selfState) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.state.Load()
	if bytes.Equal(now.history.raw, o.history.raw) || now.history.extends(o.history) {
		return nil
	}
	if !o.history.extends(now.history) {
		return ErrFork
	}
	s.state.Store(&selfState{key: o.key, history: o.history, credential: now.credential, issuer: now.issuer})
	return nil
}
