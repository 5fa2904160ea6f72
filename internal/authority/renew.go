package authority

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/portal-tunnel/portal/identity"
)

const (
	// freshTime is what a dial waits for a new credential.
	freshTime = 2 * time.Second
	// lockedTime is how long a renewal keeps the home locked: less than the 5 s that others wait for the lock.
	lockedTime = 4 * time.Second

	// jitter spreads the renewals of members that joined together over a tenth of a life each way, as a share of
	// half-life.
	jitter = 0.1

	// A failed renewal is tried again after a 64th of the credential's life, within these bounds, then after twice
	// that, up to an eighth; each ±50 %. With an hour of life that is 1 s to a minute.
	firstRetryMin, firstRetryMax = 50 * time.Millisecond, time.Second
	lastRetryMax                 = time.Minute
	// refusedRetry is for what asking again does not change, until somebody else changes it.
	refusedRetry = 30 * time.Second

	// longestWait bounds a timer, whose clock stands still while the machine sleeps.
	longestWait = 30 * time.Second
)

// Renew asks the authority for a credential that lasts longer and shows it from then on. When another goroutine, or
// another process that shares the home, renews meanwhile, its credential does. An expired credential can be renewed.
// That the home could not store it is logged, not returned: the credential is in force.
//
// Errors: *RefusedError (final until somebody else changes it), *UnreachableError, ErrUnavailable, *identity.LockedError.
func (c *Client) Renew(ctx context.Context) error { return c.renew(ctx, c.Self.Credential()) }

// renew replaces seen, unless it has been replaced already.
func (c *Client) renew(ctx context.Context, seen *identity.Credential) error {
	give, err := c.take(ctx)
	if err != nil {
		return fmt.Errorf("renewing the credential: %w", err)
	}
	defer give()
	if c.Self.Credential() != seen {
		return nil
	}
	if err := c.renewShared(ctx, seen); err != nil {
		return fmt.Errorf("renewing the credential: %w", err)
	}
	return nil
}

// renewShared renews under the home's lock, so that of the processes that share it one asks and the others read.
func (c *Client) renewShared(ctx context.Context, seen *identity.Credential) error {
	if c.Home == nil {
		return c.renewAlone(ctx)
	}
	unlock, err := c.Home.Lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := c.reload(); err != nil {
		return err
	}
	if c.Self.Credential() != seen {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lockedTime)
	defer cancel()
	return c.renewAlone(ctx)
}

func (c *Client) renewAlone(ctx context.Context) error {
	m, err := c.membership()
	if err != nil {
		return err
	}
	authority := c.authority(m)
	if authority.IsZero() {
		return identity.ErrNotMember
	}
	ways := c.Ways
	if len(ways) == 0 && m != nil {
		ways = m.Ways
	}
	a, err := c.answer(ctx, ways, authority, nameRenew, func(*question, [32]byte) error { return nil }, "")
	if err != nil {
		return err
	}
	credential, err := c.verify(c.Trust, a)
	if err != nil {
		return err
	}
	if err := c.Self.Renew(credential, a.History); err != nil {
		return err
	}
	if skew := instant(a.Now).Sub(c.now()); skew.Abs() > maxSkew {
		c.logger().Warn("this machine's clock and the authority's differ", "ours", stamp(c.now()), "theirs", stamp(instant(a.Now)))
	}
	if c.Home != nil {
		if err := c.Home.Store(credential, a.History); err != nil {
			c.logger().Warn("the renewed credential could not be stored: other processes of this home do not see it", "error", err)
		}
	}
	c.logger().Debug("credential renewed", "until", credential.Expires)
	return nil
}

// Fresh is for whoever is about to dial: past half-life it renews, for 2 s at most, else it takes over what another
// process of the home stored. It fails only when there is no valid credential afterwards.
func (c *Client) Fresh(ctx context.Context) error {
	seen := c.Self.Credential()
	var err error
	if seen == nil || !c.now().Before(halfLife(seen, 0.5)) {
		ctx, cancel := context.WithTimeout(ctx, freshTime)
		err = c.renew(ctx, seen)
		cancel()
	} else if c.Home != nil {
		err = c.reload()
	}
	if err == nil {
		return nil
	}
	if now := c.Self.Credential(); now != nil && c.now().Before(now.Expires) {
		c.logger().Debug("going on with the credential that is there", "until", now.Expires, "error", err)
		return nil
	}
	return err
}

// halfLife is when share of c's life is over.
func halfLife(c *identity.Credential, share float64) time.Time {
	return c.NotBefore.Add(time.Duration(share * float64(c.Expires.Sub(c.NotBefore))))
}

// Run renews the credential at half-life ± 10 %, again and again until ctx ends, whose error it returns. What fails is
// tried again with growing, jittered pauses, also after the credential has expired; a refusal every 30 s. It asks only
// when no other process of the home did.
func (c *Client) Run(ctx context.Context) error {
	changed := make(chan struct{}, 1)
	stop := c.Self.OnChange(func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	defer stop()

	var seen *identity.Credential
	var due schedule
	failures := 0
	for first := true; ; first = false {
		if credential := c.Self.Credential(); first || credential != seen {
			seen, failures = credential, 0
			c.learn()
			if due = c.schedule(seen); !first && seen != nil && due.wait(c.now()) <= 0 {
				due = c.late(seen)
			}
		}
		if wait := due.wait(c.now()); wait > 0 {
			timer := time.NewTimer(min(wait, longestWait))
			select {
			case <-timer.C:
			case <-changed:
				timer.Stop()
			case <-ctx.Done():
				timer.Stop()
				return ctx.Err()
			}
			continue
		}
		err := c.renew(ctx, seen)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if c.Self.Credential() != seen {
			continue
		}
		failures++
		pause := retryPause(seen, failures, err)
		due = schedule{at: c.now().Add(pause)}
		c.logger().Warn("the credential was not renewed", "error", err, "next", pause.Round(time.Millisecond))
	}
}

// schedule is when to act, by both clocks: the wall clock, on which credentials expire and which goes on while the
// machine sleeps, and the time since it was made, which goes on when the wall clock is set back.
type schedule struct {
	wall time.Time // zero: only at
	at   time.Time // with a monotonic reading
}

func (s schedule) wait(now time.Time) time.Duration {
	wait := s.at.Sub(now)
	if !s.wall.IsZero() {
		wait = min(wait, s.wall.Sub(now))
	}
	return wait
}

// schedule puts the renewal at half-life ± 10 %; at once when there is nothing to renew but a home that may have it.
func (c *Client) schedule(seen *identity.Credential) schedule {
	now := c.now()
	if seen == nil {
		return schedule{at: now}
	}
	share := 0.5 * (1 + jitter*(2*rand.Float64()-1))
	wall := halfLife(seen, share)
	most := time.Duration(share * float64(seen.Expires.Sub(seen.NotBefore)))
	return schedule{wall: wall, at: now.Add(min(max(0, wall.Sub(now)), most))}
}

// late is the schedule of a credential that has just come and is past half-life on our clock: the authority's is behind,
// and the next one will be as late. It waits for half of what is left of it here, and never less than a retry does.
func (c *Client) late(seen *identity.Credential) schedule {
	now := c.now()
	at := now.Add(max(seen.Expires.Sub(now)/2, retryPause(seen, 1, nil)))
	return schedule{wall: at.Round(0), at: at}
}

// retryPause is how long to wait after so many failures, the last of which was err.
func retryPause(seen *identity.Credential, failures int, err error) time.Duration {
	pause := refusedRetry
	var refused *RefusedError
	if !errors.As(err, &refused) && !errors.Is(err, identity.ErrNotMember) {
		life := DefaultTTL
		if seen != nil {
			life = seen.Expires.Sub(seen.NotBefore)
		}
		pause = min(max(life/64, firstRetryMin), firstRetryMax)
		last := max(pause, min(life/8, lastRetryMax))
		for ; failures > 1 && pause < last; failures-- {
			pause *= 2
		}
		pause = min(pause, last)
	}
	return time.Duration((0.5 + rand.Float64()) * float64(pause))
}
