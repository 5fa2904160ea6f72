package authority

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base32"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/store"
)

const (
	// DefaultTicketTTL and MaxTicketTTL bound how long a ticket that went astray is worth something.
	DefaultTicketTTL = 10 * time.Minute
	MaxTicketTTL     = 24 * time.Hour
	minTicketTTL     = time.Second

	// MaxUses is a fleet that is rolled out at once; a ticket of more uses is a password.
	MaxUses = 1_000

	// maxTickets bounds the records of tickets, at up to 4 KiB each: 40 MiB of store, and a listing that is still read
	// in a moment. Ten thousand outstanding invitations are a mistake in a script.
	maxTickets = 10_000

	// A ticket's end is remembered for a while so that a late bearer is told what became of it.
	// When there is no more room, only as long as a lost answer is asked for again.
	endedKept     = 7 * 24 * time.Hour
	endedKeptFull = DefaultTicketTTL
	sweepEvery    = time.Hour
)

// Grant is what a ticket gives to whoever redeems it.
type Grant struct {
	Name       string              // what policies and listings call the member; several members may have one name
	Attributes identity.Attributes // no reserved names
	Serve      []string            // names it may serve; a trailing "/*" is the only wildcard
	Relay      bool                // it may be used as a relay
	TTL        time.Duration       // of the ticket, 1 s to MaxTicketTTL; 0: DefaultTicketTTL
	Uses       int                 // identities that may redeem it, up to MaxUses; 0: 1
	Ways       []identity.Way      // ways to the authority, 1 to 8
}

// CreateTicket makes a ticket and stores its hash, never its secret: the returned value is the only copy. A *GrantError
// says what cannot be granted, a *LimitError that 10,000 tickets are outstanding.
func (s *Server) CreateTicket(ctx context.Context, g Grant) (*identity.Ticket, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	now := s.now()
	t, record, err := s.prepare(g, now)
	if err != nil {
		return nil, err
	}
	sweep := s.sweepDue(now)
	hash := t.Hash()
	err = s.Store.Update(func(tx *store.Tx) error {
		n, err := getCount(tx, bucketTickets)
		if err != nil {
			return err
		}
		if n >= maxTickets || sweep {
			kept := endedKept
			if n >= maxTickets {
				kept = endedKeptFull
			}
			if n, err = sweepTickets(tx, now, kept, n); err != nil {
				return err
			}
		}
		if n >= maxTickets {
			return &LimitError{What: "tickets", Limit: maxTickets, Remedy: "revoke some, or let them expire, and wait ten minutes"}
		}
		if err := put(tx, bucketTickets, hash[:], record); err != nil {
			return err
		}
		return putCount(tx, bucketTickets, n+1)
	})
	if err != nil {
		return nil, fmt.Errorf("creating a ticket: %w", err)
	}
	s.logger().Info("ticket created", "ticket", Ref(hash), "name", g.Name, "uses", record.Uses, "expires", t.Expires)
	return t, nil
}

// prepare checks g by making the ticket's text and a credential of it, so that what can be created can be redeemed.
func (s *Server) prepare(g Grant, now time.Time) (*identity.Ticket, *ticketRecord, error) {
	if g.TTL == 0 {
		g.TTL = DefaultTicketTTL
	}
	if g.Uses == 0 {
		g.Uses = 1
	}
	if g.TTL < minTicketTTL || g.TTL > MaxTicketTTL {
		return nil, nil, &GrantError{"ttl", fmt.Sprintf("%s; a ticket lives from %s to %s", g.TTL, minTicketTTL, MaxTicketTTL)}
	}
	if g.Uses < 1 || g.Uses > MaxUses {
		return nil, nil, &GrantError{"uses", fmt.Sprintf("%d; a ticket has 1 to %d", g.Uses, MaxUses)}
	}
	if g.Name != "" {
		if err := identity.ValidName(g.Name); err != nil {
			return nil, nil, &GrantError{"name", err.Error()}
		}
	}
	for name := range g.Attributes {
		if err := identity.ValidAttribute(name); err != nil {
			return nil, nil, &GrantError{"attribute " + name, err.Error()}
		}
	}
	for _, name := range g.Serve {
		if err := identity.ValidServe(name); err != nil {
			return nil, nil, &GrantError{"serve " + name, err.Error()}
		}
	}

	t := &identity.Ticket{Authority: s.Self.ID(), Ways: slices.Clone(g.Ways), Secret: identity.NewSecret(), Expires: instant(millis(now.Add(g.TTL)))}
	if _, err := t.Text(); err != nil {
		return nil, nil, &GrantError{"ways", err.Error()}
	}
	r := &ticketRecord{
		Grant:   grantRecord{Name: g.Name, Attributes: g.Attributes, Serve: g.Serve, Relay: g.Relay},
		Created: millis(now),
		Expires: millis(t.Expires),
		Uses:    int64(g.Uses),
		Left:    int64(g.Uses),
	}
	id, change := s.Self.ID(), s.Self.Latest()
	c, err := s.Self.Issue(id, change, r.Grant.credentialAttributes(), now, now.Add(s.ttl()))
	if err == nil {
		_, err = identity.NewTrust(id).Verify(c.Raw(), s.Self.History(), id, change, now)
	}
	if err != nil {
		return nil, nil, &GrantError{"attributes", err.Error()}
	}
	return t, r, nil
}

func (s *Server) sweepDue(now time.Time) bool {
	s.swept.mu.Lock()
	defer s.swept.mu.Unlock()
	if !s.swept.at.IsZero() && now.Sub(s.swept.at).Abs() < sweepEvery {
		return false
	}
	s.swept.at = now
	return true
}

// sweepTickets forgets the tickets, of n, whose end is at least kept ago, and returns how many are left.
func sweepTickets(tx *store.Tx, now time.Time, kept time.Duration, n int) (int, error) {
	err := tx.Scan(bucketTickets, func(key, value []byte) error {
		t, err := decodeTicketRecord(value)
		if err != nil {
			return err
		}
		if when, reason := t.reason(now); reason == nil || now.Sub(when) < kept {
			return nil
		}
		n--
		return forgetTicket(tx, bytes.Clone(key))
	})
	return n, err
}

func forgetTicket(tx *store.Tx, hash []byte) error {
	err := tx.ScanPrefix(bucketUses, hash, func(use, _ []byte) error {
		return tx.Delete(bucketUses, bytes.Clone(use))
	})
	if err != nil {
		return err
	}
	return tx.Delete(bucketTickets, hash)
}

var refEncoding = base32.StdEncoding.WithPadding(base32.NoPadding)

// Ref is what logs and listings call the ticket with this hash: 10 characters, which say nothing about its secret.
func Ref(hash [32]byte) string { return strings.ToLower(refEncoding.EncodeToString(hash[:])[:10]) }

// TicketInfo describes a ticket that the authority remembers.
type TicketInfo struct {
	Ref        string              `json:"ref"`
	State      string              `json:"state"` // "outstanding", "used", "expired" or "revoked"
	Name       string              `json:"name,omitempty"`
	Attributes identity.Attributes `json:"attributes,omitempty"`
	Serve      []string            `json:"serve,omitempty"`
	Relay      bool                `json:"relay,omitempty"`
	Uses       int                 `json:"uses"`
	Left       int                 `json:"left"`
	Created    time.Time           `json:"created"`
	Expires    time.Time           `json:"expires"`
	Ended      time.Time           `json:"ended,omitzero"`
}

// Tickets lists the tickets, newest first: the outstanding ones, and others for a week after their end.
func (s *Server) Tickets(ctx context.Context) ([]TicketInfo, error) {
	now := s.now()
	var list []TicketInfo
	err := s.Store.Scan(bucketTickets, func(key, value []byte) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		t, err := decodeTicketRecord(value)
		if err != nil {
			return err
		}
		i := TicketInfo{
			Ref: Ref([32]byte(key)), State: "outstanding",
			Name: t.Grant.Name, Attributes: t.Grant.Attributes, Serve: t.Grant.Serve, Relay: t.Grant.Relay,
			Uses: int(t.Uses), Left: int(t.Left), Created: instant(t.Created), Expires: instant(t.Expires),
		}
		when, reason := t.reason(now)
		switch reason {
		case ErrTicketRevoked:
			i.State = "revoked"
		case ErrTicketUsed:
			i.State = "used"
		case ErrTicketExpired:
			i.State = "expired"
		}
		i.Ended = when
		list = append(list, i)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing tickets: %w", err)
	}
	slices.SortFunc(list, func(a, b TicketInfo) int { return a.order(b.Created, b.Ref) })
	return list, nil
}

// Behind reports whether the ticket stands in Tickets behind the one that was created then and is called ref,
// whether that is still there or not; each does behind the zero time.
func (t TicketInfo) Behind(created time.Time, ref string) bool {
	return created.IsZero() || t.order(created, ref) > 0
}

// order is that of listings: the newest first, then by name.
func (t TicketInfo) order(created time.Time, ref string) int {
	return cmp.Or(created.Compare(t.Created), strings.Compare(t.Ref, ref))
}

// RevokeTicket takes what is left of the ticket that listings call ref; members that it made stay members. To revoke one
// again does nothing. ErrNoSuchTicket.
func (s *Server) RevokeTicket(ctx context.Context, ref string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	now := s.now()
	err := s.Store.Update(func(tx *store.Tx) error {
		var hash []byte
		var t *ticketRecord
		err := tx.Scan(bucketTickets, func(key, value []byte) (err error) {
			if Ref([32]byte(key)) == ref {
				hash = slices.Clone(key)
				t, err = decodeTicketRecord(value)
			}
			return err
		})
		if err != nil {
			return err
		}
		if t == nil {
			return ErrNoSuchTicket
		}
		if t.Revoked != 0 {
			return nil
		}
		t.Revoked = millis(now)
		return put(tx, bucketTickets, hash, t)
	})
	if err != nil {
		return fmt.Errorf("revoking ticket %q: %w", ref, err)
	}
	s.logger().Info("ticket revoked", "ticket", ref)
	return nil
}
