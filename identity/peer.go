package identity

import (
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// Peer is what the other end of a channel proved: an identity, and later a
// credential. It is live and safe for concurrent use.
type Peer struct {
	history *history

	mu         sync.Mutex // held by whoever replaces credential
	credential atomic.Pointer[Credential]

	changed listeners
}

// VerifyProof checks what a handshake carries: the history, and the attestation
// of static, the X25519 public key that the handshake itself proved. The error
// wraps ErrMalformed, ErrSignature, ErrKey, ErrSubject or an *ExpiredError.
func VerifyProof(history, attestation, static []byte, now time.Time) (*Peer, error) {
	if err := checkX25519(static); err != nil {
		return nil, fmt.Errorf("identity: verifying the peer's channel key: %w", err)
	}
	h, err := parseHistory(history)
	if err != nil {
		return nil, fmt.Errorf("identity: verifying the peer's history: %w", err)
	}
	if err := verifyAttestation(attestation, h, static, now); err != nil {
		return nil, fmt.Errorf("identity: verifying the peer's attestation: %w", err)
	}
	return &Peer{history: h}, nil
}

// PeerOf returns the peer behind a routing.Message's Origin: a *Peer, or
// anything that has a method Peer() *Peer.
func PeerOf(origin any) (*Peer, bool) {
	switch o := origin.(type) {
	case *Peer:
		return o, o != nil
	case interface{ Peer() *Peer }:
		p := o.Peer()
		return p, p != nil
	}
	return nil, false
}

func (p *Peer) ID() ID { return p.history.id() }

// Latest returns the hash of the latest change the peer showed.
func (p *Peer) Latest() [32]byte { return p.history.latest() }

// Contains reports whether the history that the peer showed has the change with
// that hash. One that was shortened, or forked before it, has not.
func (p *Peer) Contains(change [32]byte) bool { return p.history.contains(change) }

func (p *Peer) String() string       { return p.ID().String() }
func (p *Peer) LogValue() slog.Value { return slog.StringValue(p.String()) }

// Verify checks a signature of the peer's Self.Sign: ErrSignature.
func (p *Peer) Verify(label string, sig []byte, parts ...[]byte) error {
	if err := checkLabel(label); err != nil {
		return err
	}
	if !verify(p.history.key, sig, label, parts...) {
		return ErrSignature
	}
	return nil
}

// Credential returns the newest credential the peer showed; nil when none.
func (p *Peer) Credential() *Credential { return p.credential.Load() }

// Attributes returns the attributes of that credential, never nil. The map is
// shared: the caller must not modify it.
func (p *Peer) Attributes() Attributes {
	if c := p.credential.Load(); c != nil {
		return c.Attributes
	}
	return Attributes{}
}

// Until returns when that credential expires; zero when the peer showed none.
func (p *Peer) Until() time.Time {
	if c := p.credential.Load(); c != nil {
		return c.Expires
	}
	return time.Time{}
}

// Accept takes a credential that a Trust verified: the first, or a newer one
// about the same change, of the same issuer, that lasts longer; the same again
// does nothing. ErrSubject, ErrIssuer, ErrOlder; after an error the peer is as
// it was.
func (p *Peer) Accept(c *Credential) error {
	accepted, err := p.accept(c)
	if err != nil {
		return fmt.Errorf("identity: accepting the peer's credential: %w", err)
	}
	if accepted {
		p.changed.call()
	}
	return nil
}

func (p *Peer) accept(c *Credential) (bool, error) {
	if c == nil || len(c.raw) == 0 {
		return false, fmt.Errorf("%w: it was not verified", ErrMalformed)
	}
	if c.Subject != p.ID() || c.Change != p.Latest() {
		return false, ErrSubject
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if newer, err := c.follows(p.credential.Load()); !newer {
		return false, err
	}
	p.credential.Store(c)
	return true, nil
}

// OnChange registers f to be called after each Accept that changed something,
// on that caller's goroutine: f must not block, and may be called concurrently.
// Who registers first and reads afterwards misses no change. After stop f is
// not called again, except for a call that has begun.
func (p *Peer) OnChange(f func()) (stop func()) { return p.changed.add(f) }
