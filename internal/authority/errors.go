package authority

import (
	"errors"
	"fmt"
	"time"

	"github.com/portal-tunnel/portal/identity"
)

// What a ticket can be that it is not good; a [TicketError] is one of these for errors.Is.
var (
	ErrTicketUnknown = errors.New("the authority does not know this ticket")
	ErrTicketExpired = errors.New("the ticket has expired")
	ErrTicketUsed    = errors.New("the ticket has been used")
	ErrTicketRevoked = errors.New("the ticket has been revoked")
)

// What a subject can be that it gets no credential; a [RefusedError] is one of these for errors.Is.
var (
	ErrNotMember   = errors.New("this identity is not a member")
	ErrRemoved     = errors.New("this member has been removed")
	ErrFull        = errors.New("the authority has no room for another member")
	ErrProof       = errors.New("the proof does not fit the ticket and the channel")
	ErrMalformed   = errors.New("the authority and this program do not understand each other")
	ErrRotatedAway = errors.New("the key shown is not this identity's latest: the authority has seen it replaced by another")
)

// ErrUnavailable is an authority that was reached and could not do it now, e.g. because its disk is full. Nothing was
// done: no ticket is spent; ask again.
var ErrUnavailable = errors.New("the authority could not do it now; nothing was changed")

// A TicketError says why a ticket was refused and since when that is so. It is final for this ticket.
type TicketError struct {
	Reason error     // ErrTicketUnknown, ErrTicketExpired, ErrTicketUsed or ErrTicketRevoked
	When   time.Time // expiry, last use, revocation; zero for an unknown ticket
	Ref    string    // what ticket lists call it
}

func (e *TicketError) Error() string {
	s := "ticket " + e.Ref + ": " + e.Reason.Error()
	if !e.When.IsZero() {
		s += " at " + stamp(e.When)
	}
	if e.Reason != ErrTicketUnknown {
		s += "; ask for a fresh one"
	}
	return s
}

func (e *TicketError) Unwrap() error { return e.Reason }

// A RefusedError is an authority's answer that asking again does not change.
type RefusedError struct {
	Authority identity.ID
	Reason    error
	When      time.Time // since when; zero where there is no such time
}

func (e *RefusedError) Error() string {
	s := "refused by authority " + e.Authority.Short() + ": " + e.Reason.Error()
	if !e.When.IsZero() {
		s += " at " + stamp(e.When)
	}
	switch e.Reason {
	case ErrNotMember, ErrRemoved:
		s += "; a fresh ticket makes it one"
	case ErrRotatedAway:
		s += "; use the home that has the other, or enroll a new one"
	}
	return s
}

func (e *RefusedError) Unwrap() error { return e.Reason }

// A SkewError is two clocks further apart than credentials can bear (60 s). Nothing was done, no ticket is spent.
type SkewError struct{ Ours, Theirs time.Time }

func (e *SkewError) Error() string {
	return fmt.Sprintf("this machine's clock says %s, the authority's says %s: set the wrong one right and try again",
		stamp(e.Ours), stamp(e.Theirs))
}

// An OtherAuthorityError is a ticket of another authority than the one this home belongs to. A home has one authority.
type OtherAuthorityError struct{ Have, Want identity.ID }

func (e *OtherAuthorityError) Error() string {
	return fmt.Sprintf("this home belongs to authority %s, the ticket is of authority %s: use another home (--home)", e.Have, e.Want)
}

// An UnreachableError is no way that led to the authority; Errors has one entry for each that was tried.
type UnreachableError struct {
	Authority identity.ID
	Errors    []error
}

func (e *UnreachableError) Error() string {
	if len(e.Errors) == 0 {
		return "authority " + e.Authority.Short() + " cannot be reached: no way to it is known"
	}
	return "authority " + e.Authority.Short() + " cannot be reached: " + errors.Join(e.Errors...).Error()
}

func (e *UnreachableError) Unwrap() []error { return e.Errors }

// A GrantError is a ticket that cannot be made as asked.
type GrantError struct {
	Field  string // "name", "attribute role", "ttl", …
	Reason string
}

func (e *GrantError) Error() string { return "ticket: " + e.Field + ": " + e.Reason }

// A LimitError is a collection that is full.
type LimitError struct {
	What   string
	Limit  int
	Remedy string
}

func (e *LimitError) Error() string {
	return fmt.Sprintf("there are %d %s already, the limit; %s", e.Limit, e.What, e.Remedy)
}

// ErrNoSuchTicket and ErrNoSuchMember answer an operator who names one that does not exist.
var (
	ErrNoSuchTicket = errors.New("no such ticket")
	ErrNoSuchMember = errors.New("no such member")
)

// codes pairs what is said on the wire with the errors of both ends.
var codes = []struct {
	code   code
	reason error
}{
	{codeMalformed, ErrMalformed},
	{codeProof, ErrProof},
	{codeTicketUnknown, ErrTicketUnknown},
	{codeTicketExpired, ErrTicketExpired},
	{codeTicketUsed, ErrTicketUsed},
	{codeTicketRevoked, ErrTicketRevoked},
	{codeNotMember, ErrNotMember},
	{codeRemoved, ErrRemoved},
	{codeFull, ErrFull},
	{codeUnavailable, ErrUnavailable},
	{codeRotatedAway, ErrRotatedAway},
}

// refusal is the answer that says err. What is not in the table is the authority's own trouble: its words stay in its log.
func refusal(err error) *answer {
	a := &answer{Code: codeUnavailable}
	var skew *SkewError
	if errors.As(err, &skew) {
		return &answer{Code: codeSkew}
	}
	for _, c := range codes {
		if errors.Is(err, c.reason) {
			a.Code = c.code
			break
		}
	}
	var ticket *TicketError
	var refused *RefusedError
	switch {
	case errors.As(err, &ticket):
		a.When = millis(ticket.When)
	case errors.As(err, &refused):
		a.When = millis(refused.When)
	}
	return a
}

// err is what the answer says, for the subject that asked at the time ours; ref names the ticket it showed. nil: granted.
func (a *answer) err(authority identity.ID, ours time.Time, ref string) error {
	switch a.Code {
	case codeGranted:
		return nil
	case codeSkew:
		return &SkewError{Ours: ours, Theirs: instant(a.Now)}
	case codeUnavailable:
		return fmt.Errorf("authority %s: %w", authority.Short(), ErrUnavailable)
	}
	for _, c := range codes {
		if c.code != a.Code {
			continue
		}
		if a.Code >= codeTicketUnknown && a.Code <= codeTicketRevoked {
			return &TicketError{Reason: c.reason, When: instant(a.When), Ref: ref}
		}
		return &RefusedError{Authority: authority, Reason: c.reason, When: instant(a.When)}
	}
	return &RefusedError{Authority: authority, Reason: fmt.Errorf("code %d, which this version does not know", a.Code)}
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
