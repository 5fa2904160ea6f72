package relay

import (
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/link"
)

const (
	// An identity may ask this often: each question costs a decision and a
	// goroutine. An inlet asks once for each channel, not for each stream.
	askBurst     = 128
	askPerSecond = 32
	// registerBurst is every name that an identity may have by default, twice: a process that
	// lost its relay registers all of them again.
	registerBurst = 2 * defaultRegistrations
)

// memberKey tells the members of one authority from those of another; the zero
// authority is for whoever has shown no credential.
type memberKey struct{ id, authority identity.ID }

// member is an identity as this relay sees it, over all of its control channels:
// what it has proved last, and what it holds here.
type member struct {
	key  memberKey
	peer *identity.Peer // live: what any control channel learns, it learns; under the server's lock
	refs int            // control channels, lanes, registrations: kept while there are any, and see forget

	outstanding, lanes, registrations int
	carried                           int // as the server's, in its carriers
	asks, registers                   bucket
	forget                            *time.Timer // of one with refs 0: it is remembered until then
}

// foreign says that it has shown no credential.
func (m *member) foreign() bool { return m.key.authority.IsZero() }

// control is one control channel's tie to its member.
type control struct {
	member *member
	stop   func() // of the subscription; nil: the channel's peer is the member's
}

func keyOf(p *identity.Peer) memberKey {
	k := memberKey{id: p.ID()}
	if c := p.Credential(); c != nil {
		k.authority = c.Issuer
	}
	return k
}

// opened is told each confirmed control channel before its first stream.
func (s *Server) opened(l *link.Live) {
	s.log.Info("a member is here", "peer", l.Peer(), "from", l.Path)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tieLocked(l)
}

// closed is told when it has ended.
func (s *Server) closed(l *link.Live) {
	s.mu.Lock()
	t := s.controls[l]
	delete(s.controls, l)
	if t != nil {
		s.dropLocked(t.member)
	}
	s.mu.Unlock()
	if t != nil && t.stop != nil {
		t.stop()
	}
	s.log.Info("a member's control channel ended", "peer", l.Peer(), "reason", l.Err())
}

// tieLocked finds the member behind a control channel. What the channel learns
// later, the member's peer learns, and so every lease that stands on it; one that
// enrolled meanwhile is another member from then on.
func (s *Server) tieLocked(l *link.Live) *member {
	key := keyOf(l.Peer())
	t := s.controls[l]
	if t != nil && t.member.key == key {
		return t.member
	}
	if t != nil {
		s.dropLocked(t.member)
		if t.stop != nil {
			t.stop()
		}
	}
	m := s.members[key]
	switch {
	case m == nil:
		m = &member{key: key, peer: l.Peer()}
		s.members[key] = m
	case m.refs == 0, m.peer.Latest() != l.Peer().Latest() && l.Peer().Contains(m.peer.Latest()):
		// Its keys were rotated: what it proves now is about the new ones. Leases
		// on the old peer live as long as its last credential. One that is only
		// remembered has none. Whoever comes by keys that were rotated away changes nothing.
		m.peer = l.Peer()
	}
	m.refs++
	t = &control{member: m}
	if mine, theirs := m.peer, l.Peer(); mine != theirs {
		learn := func() {
			if c := theirs.Credential(); c != nil {
				mine.Accept(c) // an older one is refused, which is right
			}
		}
		t.stop = theirs.OnChange(learn)
		// Outside the lock: leases that this ends take it.
		s.all.Go(learn)
	}
	s.controls[l] = t
	return m
}

// member is who asks on l, and what it has proved: by its own keys, when they are not the latest.
func (s *Server) member(l *link.Live) (*member, *identity.Peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.tieLocked(l)
	if p := l.Peer(); p.Latest() != m.peer.Latest() {
		return m, p
	}
	return m, m.peer
}

// dropLocked forgets a member of whom nothing is left, but not what it has asked for lately. A stranger's
// identity costs nothing, and is forgotten.
func (s *Server) dropLocked(m *member) {
	if m.refs--; m.refs > 0 || s.members[m.key] != m {
		return
	}
	d := max(m.asks.drains(), m.registers.drains())
	if m.foreign() || d <= 0 || s.stop.Err() != nil {
		delete(s.members, m.key)
		return
	}
	if m.forget != nil {
		m.forget.Stop()
	}
	m.forget = time.AfterFunc(d, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if m.refs == 0 && s.members[m.key] == m {
			delete(s.members, m.key)
		}
	})
}

// forgetAll forgets, at the end, whoever was remembered for what it had asked for.
func (s *Server) forgetAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, m := range s.members {
		if m.refs == 0 {
			m.forget.Stop()
			delete(s.members, key)
		}
	}
}

// hold counts one more of what n counts, at most limit; release gives it back.
func (s *Server) hold(m *member, n *int, limit int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if *n >= limit {
		return false
	}
	*n++
	m.refs++
	return true
}

func (s *Server) release(m *member, n *int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*n--
	s.dropLocked(m)
}

// mayAsk counts one question, and is false when that is one too many; mayRegister the same of a
// registration.
func (s *Server) mayAsk(m *member) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return m.asks.take(askBurst)
}

func (s *Server) mayRegister(m *member) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return m.registers.take(registerBurst)
}

// bucket loses askPerSecond of its level.
type bucket struct {
	level float64
	at    time.Time
}

// drains is how long it takes until nothing is left that was taken lately.
func (b *bucket) drains() time.Duration {
	return time.Duration(b.level/askPerSecond*float64(time.Second)) - time.Since(b.at)
}

func (b *bucket) take(burst float64) bool {
	now := time.Now()
	b.level = max(0, b.level-now.Sub(b.at).Seconds()*askPerSecond)
	b.at = now
	if b.level >= burst {
		return false
	}
	b.level++
	return true
}
