package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/authority"
	"github.com/portal-tunnel/portal/routing"
	"github.com/urfave/cli/v2"
)

// memberOptions say as whom a command acts.
type memberOptions struct {
	home      string
	ticket    string // a file
	ephemeral bool
}

func memberFlags(c *cli.Context) memberOptions {
	return memberOptions{home: c.String("home"), ticket: c.String("ticket"), ephemeral: c.Bool("ephemeral")}
}

// A member is this process acting for one identity: what it proves, whom it
// trusts, and the one client that asks the authority.
type member struct {
	home   *identity.Home // nil: --ephemeral
	self   *identity.Self
	trust  *identity.Trust
	node   *routing.Node
	client *authority.Client
	relays *relays          // the ways through relays, to the authority too
	ways   []identity.Way   // of the membership or the ticket
	ticket *identity.Ticket // to be redeemed; nil: is a member already
}

// close ends what the member keeps up. What uses it has ended.
func (m *member) close() {
	m.relays.close()
	m.node.Close()
}

// member opens the home and finds out whether it is a member's, or is given a
// ticket to become one. It reaches for nobody.
func (s *session) member(ctx context.Context, o memberOptions) (*member, error) {
	m := &member{node: &routing.Node{Logger: s.log}}
	var joined *identity.Membership
	var dir string
	var err error
	if o.ephemeral {
		m.self, err = identity.NewSelf()
	} else if m.home, dir, err = s.existingHome(o.home); err == nil && m.home != nil {
		joined, err = m.home.Membership()
	}
	if err != nil {
		return nil, err
	}
	if joined == nil {
		if m.ticket, err = s.givenTicket(ctx, o.ticket); err != nil {
			return nil, err
		}
		switch {
		case m.ticket == nil && o.ephemeral:
			return nil, fail(codeNoMember, "--ticket FILE, PORTAL_TICKET or PORTAL_TICKET_FILE", "--ephemeral: there is no ticket to become a member by")
		case m.ticket == nil:
			return nil, notMember(dir)
		}
		m.trust, m.ways = identity.NewTrust(m.ticket.Authority), m.ticket.Ways
	} else if m.trust, err = m.home.Trust(); err != nil {
		return nil, err
	}
	if !o.ephemeral {
		if m.home == nil {
			if m.home, err = s.openHome(o.home); err != nil {
				return nil, err
			}
		}
		if m.self, err = m.home.Self(); err != nil {
			return nil, err
		}
	}
	if joined != nil {
		m.ways = joined.Ways
	}
	m.relays = newRelays(m.node, m.self, m.trust, s.log)
	m.client = &authority.Client{
		Node: m.node, Self: m.self, Trust: m.trust, Home: m.home, Logger: s.log,
		Dial: m.relays.toAuthority(m.trust.Authorities()[0]),
	}
	return m, nil
}

// identityOnly is a process that acts for its identity alone: it belongs to no
// authority that it would ask.
func (s *session) identityOnly(home string, trusts []identity.ID) (*member, error) {
	h, err := s.openHome(home)
	if err != nil {
		return nil, err
	}
	m := &member{home: h, node: &routing.Node{Logger: s.log}, trust: identity.NewTrust(trusts...)}
	if m.self, err = h.Self(); err != nil {
		return nil, err
	}
	m.relays = newRelays(m.node, m.self, m.trust, s.log)
	return m, nil
}

// relayWays are the membership's ways that lead through relays.
func (m *member) relayWays() (ways []identity.Way) {
	for _, w := range m.ways {
		if !w.ID.IsZero() {
			ways = append(ways, w)
		}
	}
	return ways
}

// pinned gives a way without a pin the one that the ticket had for its address.
func (m *member) pinned(w identity.Way) identity.Way {
	for _, known := range m.relayWays() {
		if w.ID.IsZero() && known.Addr == w.Addr {
			return known
		}
	}
	return w
}

// notMember names the user too: it may be another one's home that is.
func notMember(home string) error {
	return fail(codeNoMember, causes[codeNoMember][1], "the home %s (of user %d) is not a member of any authority", plain(home), os.Geteuid())
}

// join becomes a member when the home is not one yet. An authority that cannot
// be reached is waited for, until ctx ends.
func (m *member) join(ctx context.Context, t *teller) error {
	if m.ticket == nil {
		return nil
	}
	var last error // of the tries that ctx did not cut short
	for try := 0; ; try++ {
		e, err := m.client.Enroll(ctx, m.ticket)
		switch {
		case err == nil:
			t.s.say("enrolled as %s", standing(m.self.ID(), e.Membership, e.Credential))
			return nil
		case !temporary(err):
			return err
		case ctx.Err() == nil:
			last = err
			next := backoff(try)
			t.waiting(err, next)
			pause(ctx, next)
		case last == nil:
			last = err
		}
		switch {
		case late(ctx):
			return unspent(last)
		case ctx.Err() != nil:
			return context.Cause(ctx)
		}
	}
}

// unspent is why a ticket was not redeemed in time.
func unspent(last error) error {
	return fail(codeUnreachable, "the ticket is not spent: try again when the authority can be reached, or say where with `portal enroll --direct HOST:PORT`", "%w", last)
}

// temporary reports whether asking the authority again can help.
func temporary(err error) bool {
	var ticket *authority.TicketError
	var away *authority.UnreachableError
	return !errors.As(err, &ticket) && (errors.As(err, &away) || errors.Is(err, authority.ErrUnavailable))
}

// backoff is the pause after failure n, counted from 0: half a second, doubled
// to half a minute, ± 50 % so that a fleet does not ask at once.
func backoff(n int) time.Duration {
	d := 500 * time.Millisecond << min(n, 6)
	return min(d, 30*time.Second)/2 + rand.N(min(d, 30*time.Second))
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// followEvery is how soon a process sees what `portal enroll` did to its home.
const followEvery = 10 * time.Second

// follow takes over credentials that other processes put into the home.
func (m *member) follow(ctx context.Context) error {
	t := time.NewTicker(followEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			if err := m.reload(); err != nil {
				m.client.Logger.Warn("reading the home again", "error", err)
			}
		case <-ctx.Done():
			return nil
		}
	}
}

func (m *member) reload() error {
	if m.home == nil || m.self.Credential() == nil {
		return nil
	}
	return m.home.Reload(m.self)
}

// watch tells whether the credential is good for what this process does, at
// once and whenever that changes, until ctx ends. The client renews it
// meanwhile; watch only looks.
func (m *member) watch(ctx context.Context, good func(*identity.Credential) error, tell func(error)) {
	changed := make(chan struct{}, 1)
	stop := m.self.OnChange(func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	defer stop()
	err := m.client.Fresh(ctx) // asks once, for the reason
	for ctx.Err() == nil {
		left, why := m.valid(good)
		if why == nil || err == nil {
			err = why
		}
		tell(err)
		wait := 30 * time.Second // a timer stands still while the machine sleeps
		if why == nil {
			wait = min(wait, left)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-changed:
		case <-ctx.Done():
		}
		t.Stop()
		err = nil
	}
}

// valid looks at the credential, and says for how long it is good.
func (m *member) valid(good func(*identity.Credential) error) (left time.Duration, err error) {
	c, now := m.self.Credential(), time.Now().Round(0)
	if c == nil {
		return 0, errors.New("there is no credential")
	}
	if left = c.Expires.Sub(now); left <= 0 {
		return 0, fail(codeExpired, "", "the credential expired at %s and has not been renewed", when(c.Expires))
	}
	return left, good(c)
}

// standing is who a member is and what it may, as enrollment says it.
func standing(id identity.ID, m *identity.Membership, c *identity.Credential) string {
	text := fmt.Sprintf("%s (%s)", memberName(m.Name), id.Short())
	if serve := c.Serve(); len(serve) > 0 {
		text += "; may serve " + fromPeer(list(serve))
	}
	if c.Relay() {
		text += "; may be a relay"
	}
	if attrs := free(c.Attributes); len(attrs) > 0 {
		text += "; " + attributeText(attrs, fromPeer)
	}
	return text
}

// together runs the parts of a process until ctx ends or the first of them
// fails, and waits for all.
func together(ctx context.Context, parts ...func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var all sync.WaitGroup
	var mu sync.Mutex
	var failed error
	for _, part := range parts {
		all.Go(func() {
			err := part(ctx)
			if err == nil || errors.Is(err, context.Canceled) {
				return
			}
			mu.Lock()
			if failed == nil {
				failed = err
			}
			mu.Unlock()
			cancel()
		})
	}
	all.Wait()
	return failed
}
