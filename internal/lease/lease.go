// Package lease keeps decisions true: what a policy permitted ends when its
// reasons end. A stream, a flow, a registration or a join holds a lease in a
// [Book]. A lease lasts until the first of
//
//   - the expiry of the peer's credential, and of this node's own,
//   - the moment of admission plus the @max_session of the policy that permitted,
//   - a decision made again that refuses: because a credential was renewed (and
//     perhaps lost an attribute), the policy changed, or the wall clock jumped.
//
// A renewed credential that is still permitted extends the lease.
//
// Time: when a credential is first seen, its expiry is noted twice, as wall time
// and on the monotonic clock. Whichever comes first counts: a wall clock set back
// cannot extend a lease, and one set ahead, or a machine that slept, ends what has
// expired. There is no grace after an expiry.
//
// Nobody owns a goroutine but [Book.Run]: one for the whole book.
package lease

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
)

const (
	tick = time.Second      // an expiry is noticed within one; the promise is 2 s
	jump = 60 * time.Second // wall against monotonic clock, beyond what NTP slews in a day
)

// Denied is why nothing was admitted, or why a lease ended: the policy, or the
// book's rule.
type Denied struct {
	Decision abac.Decision
	Rule     error // what the rule said; nil: the policy decided
}

func (e *Denied) Error() string {
	if e.Rule != nil {
		return e.Rule.Error()
	}
	return e.Decision.Reason()
}

// Whose time was over.
const (
	Peer    = "peer"    // the peer's credential
	Self    = "self"    // this node's credential
	Session = "session" // @max_session
)

// Expired is why nothing was admitted, or why a lease ended: the time.
type Expired struct {
	Who string // Peer, Self or Session
	At  time.Time
}

func (e *Expired) Error() string {
	at := e.At.UTC().Format(time.RFC3339)
	switch e.Who {
	case Session:
		return "the longest session that the policy permits ended at " + at
	case Self:
		return "this node's credential expired at " + at
	}
	return "the peer's credential expired at " + at
}

// Book decides and holds the leases. The zero value denies all; the fields are set
// before its first use. It is safe for concurrent use.
type Book struct {
	Policy func() *abac.Policy // asked for each decision, under the book's lock; nil, or a nil policy: deny
	// Rule is what is built in beside the policy: an error refuses, whatever the
	// policy says. It is asked with each decision, first; nil refuses nothing.
	Rule   func(p *identity.Peer, r *abac.Request) error
	Now    func() time.Time // the wall clock; nil: time.Now
	Logger *slog.Logger     // nil: nothing is logged

	mu    sync.Mutex
	ties  map[ends]*tie
	count int
}

// ends are the two that a lease is between.
type ends struct {
	self *identity.Self // may be nil
	peer *identity.Peer
}

// tie is all that a book holds for two ends: one subscription to each, however many
// leases there are. It lives as long as one of its leases does.
type tie struct {
	ends
	stop []func() // the subscriptions

	principal  map[string]any // made from peerShown, never changed
	peerShown  *identity.Credential
	selfShown  *identity.Credential
	peerUntil  moment
	selfUntil  moment
	questions  map[string]*question
	leaseCount int
}

// question is one request of a peer's, decided once for all leases that asked it.
type question struct {
	tie     *tie
	key     string
	request abac.Request
	session time.Duration // the decision's MaxSession
	leases  []*Lease
}

// Lease is one admitted use.
type Lease struct {
	book     *Book
	question *question // nil: no longer in the book
	index    int       // in question.leases
	admitted moment
	end      func(error)
	over     atomic.Bool // ended or released, whichever came first
}

// moment is one point of time on both clocks. The zero value is never.
type moment struct {
	wall time.Time
	mono time.Duration
}

func (m moment) never() bool { return m.wall.IsZero() }

func (m moment) reached(now moment) bool {
	return !m.never() && (!now.wall.Before(m.wall) || now.mono >= m.mono)
}

// at is the moment of a wall time, seen from now.
func (now moment) at(wall time.Time) moment {
	return moment{wall, later(now.mono, wall.Sub(now.wall))}
}

func (m moment) after(d time.Duration) moment {
	return moment{m.wall.Add(d), later(m.mono, d)}
}

// later adds without overflow: a wall clock may be centuries away.
func later(a, d time.Duration) time.Duration {
	if d > 0 && a > math.MaxInt64-d {
		return math.MaxInt64
	}
	return a + d
}

var start = time.Now() // of the monotonic clock

func (b *Book) now() moment {
	now := b.Now
	if now == nil {
		now = time.Now
	}
	return moment{now().Round(0), time.Since(start)} // Round: the wall clock alone
}

// Admit decides r and, if the policy permits it and nothing has expired, holds a
// lease on the decision. The principal is always what p has proved: its
// attributes and id, name, authority, serve; r.Principal and r.PrincipalID are
// replaced. The maps of r are kept and must not change afterwards. self is this node's end, whose
// credential limits the lease too; nil when it has none.
//
// Errors are of type *Denied or *Expired; end is then never called. A peer that has
// shown no credential is decided by its id alone and does not expire.
//
// Otherwise end is called at most once, with a *Denied or an *Expired, and not
// under the book's lock: by whoever renews a credential or calls Again, or by Run. It
// must not wait. It may call Release and Admit. It may be called before Admit
// returns. Every lease has to be released, also one that ended.
func (b *Book) Admit(self *identity.Self, p *identity.Peer, r abac.Request, end func(error)) (*Lease, abac.Decision, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	t := b.tie(ends{self, p})
	defer b.drop(t) // unless a lease holds it
	now := b.now()
	t.refresh(now)
	if err := t.expired(now); err != nil {
		return nil, abac.Decision{}, err
	}
	d, denied := b.decide(t, b.policy(), r)
	if denied != nil {
		return nil, d, denied
	}
	key := keyOf(&r)
	q := t.questions[key]
	if q == nil {
		q = &question{tie: t, key: key, request: r}
		t.questions[key] = q
	}
	q.session = d.MaxSession
	l := &Lease{book: b, question: q, index: len(q.leases), admitted: now, end: end}
	q.leases = append(q.leases, l)
	t.leaseCount++
	b.count++
	return l, d, nil
}

// Release gives the lease back. When it returns, either end has been or is being
// called, or it never will be; Release does not wait for a call under way, so that
// end may call Release. A second time, and on a nil Lease, it does nothing.
func (l *Lease) Release() {
	if l == nil {
		return
	}
	l.over.Store(true)
	l.book.mu.Lock()
	defer l.book.mu.Unlock()
	l.book.remove(l)
}

// Until returns when the lease will end if nothing changes; zero when it will not,
// or is over.
func (l *Lease) Until() time.Time {
	l.book.mu.Lock()
	defer l.book.mu.Unlock()
	var until time.Time
	if q := l.question; q != nil {
		for _, m := range []moment{q.tie.peerUntil, q.tie.selfUntil, l.sessionUntil()} {
			if !m.never() && (until.IsZero() || m.wall.Before(until)) {
				until = m.wall
			}
		}
	}
	return until
}

func (l *Lease) sessionUntil() moment {
	if l.question.session <= 0 {
		return moment{}
	}
	return l.admitted.after(l.question.session)
}

// Len returns how many leases are held.
func (b *Book) Len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.count
}

// Again decides everything once more, since the policy or a revocation changed.
// All is decided before the first lease is ended, by one policy and with what the
// peers show at that moment. When it returns, every lease that is no longer
// permitted has been ended.
func (b *Book) Again(reason string) {
	b.mu.Lock()
	policy, now := b.policy(), b.now()
	held := b.count
	var out []ending
	for _, t := range b.ties {
		out = b.again(out, t, policy, now)
	}
	b.mu.Unlock()
	if b.Logger != nil {
		b.Logger.Info("decided again", "reason", reason, "leases", held, "ended", len(out))
	}
	finish(out)
}

// Run ends leases in time until ctx is done, and returns its error. It looks once
// a second, and decides again when the wall clock and the monotonic one differ by
// more than 60 s from what they did. A book whose Run has returned ends nothing
// by itself.
func (b *Book) Run(ctx context.Context) error {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	last := b.now()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		b.sweep()
		now := b.now()
		if off := now.wall.Sub(last.wall) - (now.mono - last.mono); off > jump || off < -jump {
			if b.Logger != nil {
				b.Logger.Warn("the wall clock jumped", "by", off.Round(time.Second))
			}
			b.Again("the wall clock jumped")
			last = now
		}
	}
}

// sweep ends what has expired.
func (b *Book) sweep() {
	b.mu.Lock()
	now := b.now()
	var out []ending
	for _, t := range b.ties {
		out = b.expire(out, t, now)
	}
	b.mu.Unlock()
	finish(out)
}

// changed is called when one of the ends has a new credential.
func (b *Book) changed(t *tie) {
	b.mu.Lock()
	var out []ending
	if b.ties[t.ends] == t {
		out = b.again(nil, t, b.policy(), b.now())
	}
	b.mu.Unlock()
	finish(out)
}

// ending is a lease that has left the book and is to be told why.
type ending struct {
	lease *Lease
	why   error
}

// finish runs without the lock: it calls foreign code.
func finish(out []ending) {
	for _, e := range out {
		if !e.lease.over.Swap(true) && e.lease.end != nil {
			e.lease.end(e.why)
		}
	}
}

// What follows is called under the book's lock.

func (b *Book) policy() *abac.Policy {
	if b.Policy == nil {
		return nil
	}
	return b.Policy()
}

// tie returns the tie of the two ends. It subscribes before anything is read, so no
// renewal falls between.
func (b *Book) tie(e ends) *tie {
	if t := b.ties[e]; t != nil {
		return t
	}
	t := &tie{ends: e, questions: make(map[string]*question)}
	changed := func() { b.changed(t) }
	t.stop = append(t.stop, e.peer.OnChange(changed))
	if e.self != nil {
		t.stop = append(t.stop, e.self.OnChange(changed))
	}
	if b.ties == nil {
		b.ties = make(map[ends]*tie)
	}
	b.ties[e] = t
	return t
}

// drop forgets a tie that no lease holds.
func (b *Book) drop(t *tie) {
	if t.leaseCount > 0 || b.ties[t.ends] != t {
		return
	}
	delete(b.ties, t.ends)
	for _, stop := range t.stop {
		stop()
	}
}

func (b *Book) remove(l *Lease) {
	q := l.question
	if q == nil {
		return
	}
	last := len(q.leases) - 1
	q.leases[l.index] = q.leases[last]
	q.leases[l.index].index = l.index
	q.leases[last] = nil
	q.leases = q.leases[:last]
	l.question = nil
	if last == 0 {
		delete(q.tie.questions, q.key)
	}
	b.count--
	q.tie.leaseCount--
	b.drop(q.tie)
}

// again decides all questions of a tie, each once, and moves out what ends.
func (b *Book) again(out []ending, t *tie, policy *abac.Policy, now moment) []ending {
	t.refresh(now)
	for _, q := range t.questions {
		d, denied := b.decide(t, policy, q.request)
		if denied == nil {
			q.session = d.MaxSession
			continue
		}
		out = b.moveOut(out, q, denied)
	}
	return b.expire(out, t, now)
}

// expire moves out what has expired.
func (b *Book) expire(out []ending, t *tie, now moment) []ending {
	err := t.expired(now)
	for _, q := range t.questions {
		if err != nil {
			out = b.moveOut(out, q, err)
			continue
		}
		if q.session <= 0 {
			continue
		}
		for i := len(q.leases) - 1; i >= 0; i-- { // backwards: removing moves the last
			l := q.leases[i]
			if until := l.sessionUntil(); until.reached(now) {
				out = append(out, ending{l, &Expired{Session, until.wall}})
				b.remove(l)
			}
		}
	}
	return out
}

func (b *Book) moveOut(out []ending, q *question, why error) []ending {
	for len(q.leases) > 0 {
		l := q.leases[len(q.leases)-1]
		out = append(out, ending{l, why})
		b.remove(l)
	}
	return out
}

// refresh notes what the ends show now. The moments of a credential that was noted
// before stay: the wall clock may have been set since.
func (t *tie) refresh(now moment) {
	if c := t.peer.Credential(); c != t.peerShown || t.principal == nil {
		t.peerShown, t.peerUntil = c, moment{}
		if c != nil {
			t.peerUntil = now.at(c.Expires)
		}
		t.principal = principal(t.peer.ID(), c)
	}
	if t.self == nil {
		return
	}
	if c := t.self.Credential(); c != t.selfShown {
		t.selfShown, t.selfUntil = c, moment{}
		if c != nil {
			t.selfUntil = now.at(c.Expires)
		}
	}
}

func (t *tie) expired(now moment) error {
	if t.peerUntil.reached(now) {
		return &Expired{Peer, t.peerUntil.wall}
	}
	if t.selfUntil.reached(now) {
		return &Expired{Self, t.selfUntil.wall}
	}
	return nil
}

func (b *Book) decide(t *tie, policy *abac.Policy, r abac.Request) (abac.Decision, error) {
	r.Principal, r.PrincipalID = t.principal, t.peer.ID().String()
	if b.Rule != nil {
		if err := b.Rule(t.peer, &r); err != nil {
			return abac.Decision{}, &Denied{Rule: err}
		}
	}
	d := policy.Decide(r)
	if !d.Allow {
		return d, &Denied{Decision: d}
	}
	return d, nil
}

// Principal is what p has proved, as policies see it: for decisions that need no
// lease. An absent credential, name or list of names to serve is an absent attribute.
func Principal(p *identity.Peer) map[string]any { return principal(p.ID(), p.Credential()) }

// principal is one snapshot of a peer for policies. What the names below
// mean is never left to an issuer's attributes.
func principal(id identity.ID, c *identity.Credential) map[string]any {
	m := make(map[string]any)
	if c != nil {
		maps.Copy(m, c.Attributes)
	}
	for _, name := range []string{"id", "name", "authority", "serve", "node"} {
		delete(m, name)
	}
	m["id"] = id.String()
	if c == nil {
		return m
	}
	m["authority"] = c.Issuer.String()
	if name := c.Name(); name != "" {
		m["name"] = name
	}
	if serve := c.Serve(); len(serve) > 0 {
		m["serve"] = serve
	}
	return m
}

// keyOf is equal for requests that are decided alike for one principal.
func keyOf(r *abac.Request) string {
	b := strconv.AppendQuote(nil, r.Action)
	b = strconv.AppendQuote(b, r.ResourceID)
	b = appendValue(b, r.Resource)
	b = appendValue(b, r.Context)
	return string(b)
}

// appendValue writes a value of a request that was decided, so of a type that
// policies know.
func appendValue(b []byte, v any) []byte {
	switch v := v.(type) {
	case string:
		return strconv.AppendQuote(b, v)
	case int64:
		return strconv.AppendInt(append(b, 'i'), v, 10)
	case bool:
		return strconv.AppendBool(b, v)
	case []string:
		b = append(b, '[')
		for _, s := range v {
			b = strconv.AppendQuote(b, s)
		}
		return append(b, ']')
	case map[string]any:
		b = append(b, '{')
		for _, name := range slices.Sorted(maps.Keys(v)) {
			b = strconv.AppendQuote(b, name)
			b = appendValue(b, v[name])
		}
		return append(b, '}')
	}
	panic(fmt.Sprintf("lease: a request with a %T was permitted", v))
}
