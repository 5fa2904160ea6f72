package authority

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/store"
)

// maxMembers bounds the records of members, at up to 4 KiB each: 400 MiB of store, and with the default TTL some 55
// renewals a second, about what one disk syncs.
const maxMembers = 100_000

// MemberInfo describes a member, or one that was removed.
type MemberInfo struct {
	ID         identity.ID         `json:"id"`
	Name       string              `json:"name,omitempty"`
	Attributes identity.Attributes `json:"attributes,omitempty"`
	Serve      []string            `json:"serve,omitempty"`
	Relay      bool                `json:"relay,omitempty"`
	Ticket     string              `json:"ticket"` // reference of the ticket that gave it all this
	Joined     time.Time           `json:"joined"`
	Granted    time.Time           `json:"granted"`          // when that ticket was redeemed
	Until      time.Time           `json:"until,omitzero"`   // expiry of its latest credential
	Removed    time.Time           `json:"removed,omitzero"` // no credential is issued since
}

// Members lists the members by name, then by the time they joined, those that were removed included.
func (s *Server) Members(ctx context.Context) ([]MemberInfo, error) {
	var list []MemberInfo
	err := s.Store.Scan(bucketMembers, func(key, value []byte) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		m, err := decodeMemberRecord(value)
		if err != nil {
			return err
		}
		i := MemberInfo{
			ID: identity.ID(key), Name: m.Grant.Name, Attributes: m.Grant.Attributes, Serve: m.Grant.Serve, Relay: m.Grant.Relay,
			Ticket: Ref([32]byte(m.Ticket)), Joined: instant(m.Joined), Granted: instant(m.Granted), Removed: instant(m.Removed),
		}
		if n := len(m.Issued); n != 0 {
			i.Until = instant(m.Issued[n-1].Expires)
		}
		list = append(list, i)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing members: %w", err)
	}
	slices.SortStableFunc(list, func(a, b MemberInfo) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), a.Joined.Compare(b.Joined))
	})
	return list, nil
}

// RemoveMember lets a member renew no more; what it holds lasts until it expires. Only a ticket made later makes it a
// member again. To remove one again does nothing. ErrNoSuchMember.
func (s *Server) RemoveMember(ctx context.Context, id identity.ID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	now := s.now()
	err := s.Store.Update(func(tx *store.Tx) error {
		m, err := getMember(tx, id)
		switch {
		case err != nil:
			return err
		case m == nil:
			return ErrNoSuchMember
		case m.Removed != 0:
			return nil
		}
		m.Removed = millis(now)
		return put(tx, bucketMembers, id[:], m)
	})
	if err != nil {
		return fmt.Errorf("removing member %s: %w", id, err)
	}
	s.logger().Info("member removed", "member", id)
	return nil
}

// Issue makes a credential for a member outside a channel: for a process that is authority and member in one.
func (s *Server) Issue(ctx context.Context, who *identity.Self) (*identity.Credential, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return s.renew(who, s.now())
}

// renew is a member's next credential.
func (s *Server) renew(who subject, now time.Time) (c *identity.Credential, err error) {
	id := who.ID()
	err = s.Store.Update(func(tx *store.Tx) error {
		m, err := getMember(tx, id)
		if err != nil {
			return err
		}
		if err := s.standing(m, who); err != nil {
			return err
		}
		if c, err = s.issue(who, m, now); err != nil {
			return err
		}
		return put(tx, bucketMembers, id[:], m)
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// standing is nil for a member that may have a credential. m is who's record.
func (s *Server) standing(m *memberRecord, who subject) error {
	switch {
	case m == nil:
		return &RefusedError{Authority: s.Self.ID(), Reason: ErrNotMember}
	case m.Removed != 0:
		return &RefusedError{Authority: s.Self.ID(), Reason: ErrRemoved, When: instant(m.Removed)}
	}
	return s.current(m, who)
}

// current is nil when who shows the latest change that its record has seen, and perhaps later ones. A stolen key is of
// use until its owner has rotated it away and renewed once, not for ever.
func (s *Server) current(m *memberRecord, who subject) error {
	if len(m.Change) != 0 && !who.Contains([32]byte(m.Change)) {
		return &RefusedError{Authority: s.Self.ID(), Reason: ErrRotatedAway}
	}
	return nil
}

// redeem takes a use of the ticket for the identity, or finds that it has taken one before, and returns its credential.
// All of it is one step of the store: of any number of redeemers at once exactly as many win as there are uses.
func (s *Server) redeem(who subject, hash [32]byte, now time.Time) (c *identity.Credential, repeat bool, err error) {
	id := who.ID()
	err = s.Store.Update(func(tx *store.Tx) error {
		t, err := getTicket(tx, hash)
		if err != nil {
			return err
		}
		if t == nil {
			return &TicketError{Reason: ErrTicketUnknown, Ref: Ref(hash)}
		}
		m, err := getMember(tx, id)
		if err != nil {
			return err
		}
		used, err := tx.Get(bucketUses, useKey(hash, id))
		if err != nil {
			return err
		}
		if repeat = used != nil; repeat {
			// What it was given since by another ticket stays.
			if err := s.standing(m, who); err != nil {
				return err
			}
		} else {
			if when, reason := t.reason(now); reason != nil {
				return &TicketError{Reason: reason, When: when, Ref: Ref(hash)}
			}
			if m, err = s.admit(tx, who, m, t, hash, now); err != nil {
				return err
			}
		}
		if c, err = s.issue(who, m, now); err != nil {
			return err
		}
		return put(tx, bucketMembers, id[:], m)
	})
	if err != nil {
		return nil, false, err
	}
	return c, repeat, nil
}

// admit takes a use of t and gives its grant to the identity, whose record, nil when it has none, is returned anew.
func (s *Server) admit(tx *store.Tx, who subject, m *memberRecord, t *ticketRecord, hash [32]byte, now time.Time) (*memberRecord, error) {
	if m == nil {
		n, err := getCount(tx, bucketMembers)
		if err != nil {
			return nil, err
		}
		if n >= maxMembers {
			if n, err = sweepRemoved(tx, now, max(s.ttl(), MaxTicketTTL), n); err != nil {
				return nil, err
			}
		}
		if n >= maxMembers {
			return nil, &RefusedError{Authority: s.Self.ID(), Reason: ErrFull}
		}
		if err := putCount(tx, bucketMembers, n+1); err != nil {
			return nil, err
		}
		m = &memberRecord{Joined: millis(now)}
	} else if m.Removed != 0 && t.Created <= m.Removed {
		return nil, s.standing(m, who) // a ticket kept back from before the removal
	} else if err := s.current(m, who); err != nil {
		return nil, err
	}
	m.Grant, m.Ticket, m.Granted, m.Removed = t.Grant, hash[:], millis(now), 0

	if t.Left--; t.Left == 0 {
		t.Spent = millis(now)
	}
	if err := put(tx, bucketTickets, hash[:], t); err != nil {
		return nil, err
	}
	return m, tx.Put(bucketUses, useKey(hash, who.ID()), millisKey(now))
}

// sweepRemoved forgets members removed at least kept ago, of n, and returns how many are left. By then neither a
// credential of theirs nor a ticket from before the removal is good any more.
func sweepRemoved(tx *store.Tx, now time.Time, kept time.Duration, n int) (int, error) {
	err := tx.Scan(bucketMembers, func(key, value []byte) error {
		m, err := decodeMemberRecord(value)
		if err != nil {
			return err
		}
		if m.Removed == 0 || now.Sub(instant(m.Removed)) < kept {
			return nil
		}
		n--
		return tx.Delete(bucketMembers, bytes.Clone(key))
	})
	return n, err
}
