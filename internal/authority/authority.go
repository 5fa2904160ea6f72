// Package authority lets a subject become a member of an authority and stay one: it enrolls by a ticket, and renews its
// credential by its identity key alone.
//
// # Wire
//
// The subject opens a secure channel of kind authority to the identity that its ticket or its membership names, and pins
// it; it needs no credential. Each question is one stream of that channel with a header of kind request, whose name is
// "enroll" or "renew". The subject writes one question (at most 8 KiB) and ends its direction; the authority reads to the
// end, writes one answer (at most 9 KiB) and ends its own. Both are maps in deterministic CBOR (RFC 8949 section 4.2.1)
// with integer keys; any other form, an unknown key included, is refused. A later protocol takes other names.
//
//	question                                        answer
//	1  the subject's clock, Unix milliseconds       1  code, see below
//	2  enroll: the ticket's secret, 32 bytes        2  the authority's clock, Unix milliseconds
//	3  enroll: the proof, 64 bytes                  3  refused: since when it is so, Unix milliseconds
//	                                                4  granted: the credential (COSE_Sign1, at most 4 KiB)
//	                                                5  granted: the issuer's change history (at most 4 KiB)
//	                                                6  granted: true when this identity redeemed this ticket before
//
//	0 granted                  4 ticket expired      8 not a member
//	1 malformed                5 ticket used         9 removed
//	2 proof does not fit       6 ticket revoked     10 no room for another member
//	3 ticket unknown           7 clocks differ      11 unavailable: nothing was done, ask again
//	                                                12 a key that was rotated away
//
// The proof is the subject's signature with the label "ticket" over the ticket's hash, the channel's handshake hash and
// the authority's identifier (32 bytes each), so that it is worth nothing in another channel.
//
// # Redeeming
//
// A redeemed ticket, the use it cost, and the member it made are one fsynced step of the store, and the answer follows
// it. Each use is bound to one identity, whose repeats are free: an answer that got lost is asked for again. What a
// credential says comes from the ticket alone; of the secret the store has only a hash.
package authority

import (
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/store"
	"github.com/portal-tunnel/portal/routing"
)

const (
	// DefaultTTL is the life of a credential: a removed member is one for at most this long.
	DefaultTTL = time.Hour
	// MinTTL leaves a second to renew at half-life.
	MinTTL = 2 * time.Second

	// maxOverrun bounds how far a credential may outlive the TTL in order to last longer than the one before it, as
	// verifiers demand; it matters only after the TTL was shortened or the authority's clock set back.
	maxOverrun = 24 * time.Hour

	// maxSkew is what verifiers bear of a not-before ahead of their clock.
	maxSkew = 60 * time.Second
)

// Server issues credentials to the members that its tickets make. Its fields are set before use and not changed.
type Server struct {
	Self  *identity.Self // the authority's own identity, not the node's
	Store *store.Store
	TTL   time.Duration // life of a credential; 0: DefaultTTL; less than MinTTL: MinTTL
	Node  *routing.Node // where the actors of its channels live

	Now    func() time.Time // nil: time.Now
	Logger *slog.Logger     // nil: discard

	questions questions
	swept     sweep
}

// sweep says when tickets that came to an end were last looked for.
type sweep struct {
	mu sync.Mutex
	at time.Time
}

func (s *Server) now() time.Time {
	if s.Now != nil {
		return s.Now()
	}
	return time.Now()
}

func (s *Server) ttl() time.Duration {
	if s.TTL == 0 {
		return DefaultTTL
	}
	return max(s.TTL, MinTTL)
}

func (s *Server) logger() *slog.Logger { return loggerOr(s.Logger) }

func loggerOr(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	return l
}

// hash is what the store knows a ticket by.
func (s *Server) hash(secret identity.Secret) [32]byte {
	return (&identity.Ticket{Authority: s.Self.ID(), Secret: secret}).Hash()
}

// subject is whose credential it is, with the history of its keys: an *identity.Peer or an *identity.Self.
type subject interface {
	ID() identity.ID
	Latest() [32]byte
	Contains(change [32]byte) bool
}

// issue signs a credential for m and notes it in its record, which the caller then stores. The credential outlasts the
// ones before it, or the subject would have to refuse it.
func (s *Server) issue(who subject, m *memberRecord, now time.Time) (*identity.Credential, error) {
	change := who.Latest()
	expires := now.Add(s.ttl())
	if n := len(m.Issued); n != 0 {
		after := instant(m.Issued[n-1].Expires + 1)
		if expires.Before(after) && after.Before(now.Add(maxOverrun)) {
			expires = after
		}
	}
	c, err := s.Self.Issue(who.ID(), change, m.Grant.credentialAttributes(), now, expires)
	if err != nil {
		return nil, fmt.Errorf("issuing: %w", err)
	}
	kept := m.Issued[:0]
	for _, i := range m.Issued {
		if now.Before(instant(i.Expires)) {
			kept = append(kept, i)
		}
	}
	kept = append(kept, issuedRecord{Serial: c.Serial[:], Expires: millis(c.Expires)})
	m.Issued = kept[max(0, len(kept)-keptSerials):]
	m.Change = change[:]
	return c, nil
}
