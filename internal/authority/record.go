package authority

import (
	"encoding/binary"
	"fmt"
	"maps"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/store"
)

// What the store holds. Values are the deterministic CBOR of the records below.
const (
	bucketTickets = "tickets" // hash of the ticket, 32 → ticketRecord
	bucketUses    = "uses"    // hash of the ticket, 32 ‖ identifier, 32 → when, Unix milliseconds, 8
	bucketMembers = "members" // identifier, 32 → memberRecord
	bucketCounts  = "counts"  // name of one of the buckets above → number of its keys, 8
)

// keptSerials bounds the list of a member's credentials that have not expired: two in good order, one more for each
// answer that got lost. Beyond it the oldest is forgotten, which costs a line in a listing and locks nobody out.
const keptSerials = 16

type grantRecord struct {
	Name       string              `cbor:"1,keyasint,omitempty"`
	Attributes identity.Attributes `cbor:"2,keyasint,omitempty"`
	Serve      []string            `cbor:"3,keyasint,omitempty"`
	Relay      bool                `cbor:"4,keyasint,omitempty"`
}

type ticketRecord struct {
	Grant   grantRecord `cbor:"1,keyasint"`
	Created int64       `cbor:"2,keyasint"`
	Expires int64       `cbor:"3,keyasint"`
	Uses    int64       `cbor:"4,keyasint"`
	Left    int64       `cbor:"5,keyasint"`
	Spent   int64       `cbor:"6,keyasint,omitempty"` // when the last use was taken
	Revoked int64       `cbor:"7,keyasint,omitempty"`
}

type memberRecord struct {
	Grant   grantRecord    `cbor:"1,keyasint"`
	Ticket  []byte         `cbor:"2,keyasint"` // hash of the ticket that gave the grant
	Joined  int64          `cbor:"3,keyasint"`
	Granted int64          `cbor:"4,keyasint"` // when the grant was given
	Removed int64          `cbor:"5,keyasint,omitempty"`
	Issued  []issuedRecord `cbor:"6,keyasint,omitempty"` // by time of issue
	Change  []byte         `cbor:"7,keyasint,omitempty"` // hash of the latest change of its keys that was seen; none in records of before
}

type issuedRecord struct {
	Serial  []byte `cbor:"1,keyasint"`
	Expires int64  `cbor:"2,keyasint"`
}

// credentialAttributes is the grant as it stands in a credential.
func (g *grantRecord) credentialAttributes() identity.Attributes {
	attrs := make(identity.Attributes, len(g.Attributes)+3)
	maps.Copy(attrs, g.Attributes)
	if g.Name != "" {
		attrs["name"] = g.Name
	}
	if len(g.Serve) != 0 {
		attrs["serve"] = g.Serve
	}
	if g.Relay {
		attrs["relay"] = true
	}
	return attrs
}

func decodeTicketRecord(b []byte) (*ticketRecord, error) {
	t := new(ticketRecord)
	if err := decode(b, t); err != nil {
		return nil, fmt.Errorf("reading a ticket's record: %w", err)
	}
	return t, settle(t.Grant.Attributes)
}

func decodeMemberRecord(b []byte) (*memberRecord, error) {
	m := new(memberRecord)
	if err := decode(b, m); err != nil {
		return nil, fmt.Errorf("reading a member's record: %w", err)
	}
	if n := len(m.Change); n != 0 && n != 32 {
		return nil, fmt.Errorf("reading a member's record: the hash of its latest change has %d bytes", n)
	}
	return m, settle(m.Grant.Attributes)
}

// reason is why the ticket cannot be redeemed by somebody new, and since when; nil while it can.
func (t *ticketRecord) reason(now time.Time) (since time.Time, reason error) {
	switch {
	case t.Revoked != 0:
		return instant(t.Revoked), ErrTicketRevoked
	case t.Left <= 0:
		return instant(t.Spent), ErrTicketUsed
	case !now.Before(instant(t.Expires)):
		return instant(t.Expires), ErrTicketExpired
	}
	return time.Time{}, nil
}

// getTicket and getMember return nil and nil when there is none.
func getTicket(tx *store.Tx, hash [32]byte) (*ticketRecord, error) {
	b, err := tx.Get(bucketTickets, hash[:])
	if b == nil || err != nil {
		return nil, err
	}
	return decodeTicketRecord(b)
}

func getMember(tx *store.Tx, id identity.ID) (*memberRecord, error) {
	b, err := tx.Get(bucketMembers, id[:])
	if b == nil || err != nil {
		return nil, err
	}
	return decodeMemberRecord(b)
}

func put(tx *store.Tx, bucket string, key []byte, record any) error {
	b, err := encode(record)
	if err != nil {
		return err
	}
	return tx.Put(bucket, key, b)
}

func useKey(hash [32]byte, id identity.ID) []byte { return append(hash[:], id[:]...) }

func getCount(tx *store.Tx, bucket string) (int, error) {
	b, err := tx.Get(bucketCounts, []byte(bucket))
	if b == nil || err != nil {
		return 0, err
	}
	if len(b) != 8 {
		return 0, fmt.Errorf("reading the number of %s: %d bytes", bucket, len(b))
	}
	return int(binary.BigEndian.Uint64(b)), nil
}

func putCount(tx *store.Tx, bucket string, n int) error {
	return tx.Put(bucketCounts, []byte(bucket), binary.BigEndian.AppendUint64(nil, uint64(n)))
}

func millisKey(t time.Time) []byte {
	return binary.BigEndian.AppendUint64(nil, uint64(millis(t)))
}
