package authority

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/routing"
)

// wayTime is how long one way is tried before the next one.
const wayTime = 10 * time.Second

// Client is a member's, or a member-to-be's, end: one a process. Its fields are set before use and not changed; its
// methods may be called at once.
type Client struct {
	Node  *routing.Node // where the actors of its channels live
	Self  *identity.Self
	Trust *identity.Trust                                             // gets the ticket's authority when enrolled
	Home  *identity.Home                                              // what Self belongs to; nil: in memory only
	Dial  func(ctx context.Context, w identity.Way) (net.Conn, error) // nil: TCP, direct ways only

	Ways      []identity.Way // in place of the ticket's and the membership's
	Authority identity.ID    // zero: the membership's, else the credential's issuer

	Now    func() time.Time // nil: time.Now
	Logger *slog.Logger     // nil: discard

	question func(ctx context.Context, w identity.Way, authority identity.ID, name string, ask func(halfCloser, [32]byte) error) error // nil: overChannel; for tests

	mu     sync.Mutex
	turn   chan struct{}        // one token: whoever enrolls or renews, one at a time in a process
	joined *identity.Membership // without a Home
}

// Enrolled is what a redeemed ticket gave.
type Enrolled struct {
	Membership *identity.Membership
	Credential *identity.Credential
	Already    bool                 // the ticket had been redeemed by this identity before: nothing is new
	Before     *identity.Credential // the one before; nil when there was none
}

// Change is one attribute that a fresh ticket changed. Before is nil for one that came, After for one that went.
type Change struct {
	Name          string
	Before, After any
}

// Changes lists what differs between the attributes before and now, by name.
func (e *Enrolled) Changes() []Change {
	var before, after identity.Attributes
	if e.Before != nil {
		before = e.Before.Attributes
	}
	if e.Credential != nil {
		after = e.Credential.Attributes
	}
	names := maps.Clone(before)
	if names == nil {
		names = identity.Attributes{}
	}
	maps.Copy(names, after)
	var list []Change
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if b, a := before[name], after[name]; !reflect.DeepEqual(b, a) {
			list = append(list, Change{Name: name, Before: b, After: a})
		}
	}
	return list
}

func (c *Client) now() time.Time {
	if c.Now != nil {
		return c.Now()
	}
	return time.Now()
}

func (c *Client) logger() *slog.Logger { return loggerOr(c.Logger) }

// take waits for this process's turn.
func (c *Client) take(ctx context.Context) (give func(), err error) {
	c.mu.Lock()
	if c.turn == nil {
		c.turn = make(chan struct{}, 1)
	}
	turn := c.turn
	c.mu.Unlock()
	select {
	case turn <- struct{}{}:
		return func() { <-turn }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (c *Client) membership() (*identity.Membership, error) {
	if c.Home != nil {
		return c.Home.Membership()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.joined, nil
}

// reload takes over what another process of the home wrote.
func (c *Client) reload() error {
	if err := c.Home.Reload(c.Self); err != nil {
		return err
	}
	c.learn()
	return nil
}

// learn has Trust know the authority's history that our credential came with, also when another process got it.
func (c *Client) learn() {
	if _, history := c.Self.Show(); history != nil {
		if err := c.Trust.Learn(history); err != nil {
			c.logger().Warn("the authority's history that this home keeps", "error", err)
		}
	}
}

// authority is what this process belongs to; zero when to nothing yet.
func (c *Client) authority(m *identity.Membership) identity.ID {
	switch credential := c.Self.Credential(); {
	case m != nil:
		return m.Authority
	case credential != nil:
		return credential.Issuer
	}
	return c.Authority
}

// Enroll redeems the ticket: the authority makes this identity a member, or gives the member it is the ticket's
// attributes. Membership and credential are in the home, Self shows the credential, and Trust pins the authority, when
// it returns; after an error nothing of that has changed. A repeat of a ticket that this identity redeemed is free.
//
// Errors: *OtherAuthorityError, *TicketError, *SkewError, *RefusedError (all final), *UnreachableError and
// ErrUnavailable (the ticket is unspent or its repeat free: try again), or one of the home.
func (c *Client) Enroll(ctx context.Context, t *identity.Ticket) (*Enrolled, error) {
	give, err := c.take(ctx)
	if err != nil {
		return nil, fmt.Errorf("enrolling: %w", err)
	}
	defer give()
	e, err := c.enroll(ctx, t)
	if err != nil {
		return nil, fmt.Errorf("enrolling: %w", err)
	}
	return e, nil
}

func (c *Client) enroll(ctx context.Context, t *identity.Ticket) (*Enrolled, error) {
	m, err := c.membership()
	if err != nil {
		return nil, err
	}
	if have := c.authority(m); !have.IsZero() && have != t.Authority {
		return nil, &OtherAuthorityError{Have: have, Want: t.Authority}
	}
	before, hash := c.Self.Credential(), t.Hash()
	if m != nil && m.TicketHash == hash && before != nil {
		c.Trust.Pin(t.Authority)
		return &Enrolled{Membership: m, Credential: before, Already: true, Before: before}, nil
	}

	ways := c.Ways
	if len(ways) == 0 {
		ways = t.Ways
	}
	a, err := c.answer(ctx, ways, t.Authority, nameEnroll, func(q *question, binding [32]byte) (err error) {
		q.Secret = t.Secret[:]
		q.Proof, err = c.Self.Sign(proofLabel, proofParts(hash, binding, t.Authority)...)
		return err
	}, Ref(hash))
	var unreachable *UnreachableError
	if errors.As(err, &unreachable) && !c.now().Before(t.Expires) {
		// Nobody there to say so, but by this clock it cannot be redeemed any more.
		return nil, errors.Join(&TicketError{Reason: ErrTicketExpired, When: t.Expires, Ref: Ref(hash)}, err)
	}
	if err != nil {
		return nil, err
	}
	trust := c.Trust // with what it has seen of the authority
	if !slices.Contains(trust.Authorities(), t.Authority) {
		trust = identity.NewTrust(t.Authority)
	}
	credential, err := c.verify(trust, a)
	if err != nil {
		return nil, err
	}

	next := &identity.Membership{Authority: t.Authority, Name: credential.Name(), Ways: slices.Clone(ways), TicketHash: hash}
	if c.Home != nil {
		if err := c.Home.Join(next, credential, a.History); err != nil {
			return nil, err
		}
	}
	if err := c.Self.Renew(credential, a.History); err != nil {
		return nil, err
	}
	c.Trust.Pin(t.Authority)
	c.mu.Lock()
	c.joined = next
	c.mu.Unlock()
	c.logger().Info("enrolled", "authority", t.Authority, "name", next.Name, "ticket", Ref(hash), "until", credential.Expires)
	return &Enrolled{Membership: next, Credential: credential, Already: a.Repeat && m != nil, Before: before}, nil
}

// verify checks the credential of an answer for this identity's latest change.
func (c *Client) verify(trust *identity.Trust, a *answer) (*identity.Credential, error) {
	now := c.now()
	credential, err := trust.Verify(a.Credential, a.History, c.Self.ID(), c.Self.Latest(), now)
	if theirs := instant(a.Now); err != nil && theirs.Sub(now).Abs() > maxSkew {
		return nil, &SkewError{Ours: now, Theirs: theirs}
	}
	if err != nil {
		return nil, fmt.Errorf("the authority's answer: %w", err)
	}
	return credential, nil
}

// answer asks the authority by one way after another until it answers, and returns what it granted; ref names the ticket
// shown. Each way gets its share of the time that ctx leaves.
func (c *Client) answer(ctx context.Context, ways []identity.Way, authority identity.ID, name string, fill func(q *question, binding [32]byte) error, ref string) (*answer, error) {
	unreachable := &UnreachableError{Authority: authority}
	for i, w := range ways {
		limit := wayTime
		if end, ok := ctx.Deadline(); ok {
			limit = min(limit, time.Until(end)/time.Duration(len(ways)-i))
		}
		var a *answer
		one, cancel := context.WithTimeout(ctx, limit)
		err := c.over(one, w, authority, name, func(stream halfCloser, binding [32]byte) error {
			q := &question{Now: millis(c.now())}
			err := fill(q, binding)
			if err == nil {
				a, err = ask(stream, q)
			}
			return err
		})
		cancel()
		if err == nil {
			if err := a.err(authority, c.now(), ref); err != nil {
				return nil, err
			}
			return a, nil
		}
		unreachable.Errors = append(unreachable.Errors, fmt.Errorf("by %s: %w", w, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, unreachable
}

func (c *Client) over(ctx context.Context, w identity.Way, authority identity.ID, name string, ask func(halfCloser, [32]byte) error) error {
	if c.question != nil {
		return c.question(ctx, w, authority, name, ask)
	}
	return c.overChannel(ctx, w, authority, name, ask)
}
