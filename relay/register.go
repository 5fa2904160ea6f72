package relay

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"slices"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/lease"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
)

func newKey() (k [32]byte) {
	rand.Read(k[:])
	return k
}

// poolKey is a name within an authority: members of another meet under names of
// their own.
type poolKey struct {
	authority identity.ID
	name      string
}

// pool is everybody who serves a name, and whoever waits for somebody to.
type pool struct {
	members map[*registration]struct{}
	changed chan struct{} // closed when somebody comes
	waiting int
}

// registration is somebody who serves a name, for as long as its stream is open.
type registration struct {
	server   *Server
	key      poolKey
	member   *member
	peer     *identity.Peer // what it has proved, live
	instance [16]byte
	conn     *stream.Conn // where offers go
	carrier  *carrier     // nil: it dials back for each lane
}

// full reports whether its carrier takes no more lanes. Under the server's lock.
func (r *registration) full() bool { return r.carrier != nil && r.carrier.fullLocked() }

// register is asked to take somebody up who serves a name.
func (s *Server) register(l *link.Live, in *stream.Incoming) {
	name := in.Header.Name
	body, err := parseRegister(in.Header.Body)
	if err != nil {
		in.Refuse(stream.CodeRefused, err.Error())
		return
	}
	m, peer := s.member(l)
	if !s.mayRegister(m) {
		in.Refuse(stream.CodeBusy, "registered too often")
		return
	}
	r := &registration{server: s, key: poolKey{m.key.authority, name}, member: m, peer: peer, instance: body.instance}
	ctx, cancel := context.WithCancelCause(s.stop)
	var held *lease.Lease
	switch {
	case s.isDraining():
		err = errors.New("the relay is shutting down")
		in.Refuse(stream.CodeAway, err.Error())
	case name == AuthorityName:
		// Its key is all that an authority needs to show, and nobody else has it.
		if r.key.authority = l.Peer().ID(); !s.trusts(r.key.authority) {
			err = errors.New("this relay does not trust that authority")
			in.Refuse(stream.CodeRefused, err.Error())
		}
	default:
		held, _, err = s.book.Admit(nil, peer, request("serve", name), func(err error) { cancel(err) })
		if err != nil {
			code, reason := refusal(err)
			in.Refuse(code, reason)
		}
	}
	if err == nil && !s.hold(m, &m.registrations, s.Limits.Registrations) {
		err = errors.New("this identity serves as many names as it may")
		in.Refuse(stream.CodeBusy, err.Error())
		held.Release()
	}
	if err != nil {
		cancel(err)
		s.log.Warn("a registration is refused", "name", name, "peer", l.Peer(), "stream", in.Stream(), "reason", err)
		return
	}
	s.all.Go(func() {
		err := r.serve(ctx, in, body.carrier)
		s.log.Info("a registration ended", "name", name, "peer", l.Peer(), "reason", orderly(err))
		held.Release()
		cancel(nil)
		s.release(m, &m.registrations)
	})
}

func (s *Server) isDraining() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.draining
}

// serve keeps the registration until its stream ends, or ctx does.
func (r *registration) serve(ctx context.Context, in *stream.Incoming, how Carrier) error {
	s := r.server
	r.conn = in.Accept()
	stop := context.AfterFunc(ctx, func() {
		code, reason := endCode(context.Cause(ctx))
		r.conn.Reset(code, reason)
	})
	defer stop()
	defer r.conn.Close()
	if how == Yamux {
		if err := r.attach(ctx); err != nil {
			r.conn.Reset(stream.CodeTarget, "the carrier did not come")
			return err
		}
		defer r.carrier.retire()
	}
	s.enlist(r)
	defer s.strike(r)
	s.log.Info("a name is served", "name", r.key.name, "peer", r.member.key.id)
	// Nothing is said on this stream but its end.
	n, err := r.conn.Read(make([]byte, 1))
	if n > 0 {
		r.conn.Reset(stream.CodeProtocol, "a registration says nothing")
		err = errors.New("it spoke")
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	} else if errors.Is(err, io.EOF) {
		err = nil
	}
	return err
}

// tell sends an offer. Whoever does not read what it is offered is no longer here.
func (r *registration) tell(o offer) error {
	r.conn.SetWriteDeadline(time.Now().Add(meetTime))
	_, err := r.conn.Write(o.append(nil))
	if err != nil {
		r.conn.Reset(stream.CodeProtocol, "offers are not read")
	}
	return err
}

// summon has the outlet open its side of a lane, by its carrier if there is room in it.
func (r *registration) summon(ctx context.Context, key [32]byte) (net.Conn, error) {
	if r.carrier == nil {
		return r.meet(ctx, key)
	}
	if err := r.carrier.reserve(); err != nil {
		return nil, err
	}
	// For each: a stream takes the place of the oldest offer, not of its own.
	time.AfterFunc(owedTime, r.carrier.forget)
	c, err := r.meet(ctx, key)
	if lane, ok := c.(*carried); ok {
		lane.over = r.carrier.give
	} else { // none, or by a connection of its own
		r.carrier.give()
	}
	return c, err
}

func (r *registration) meet(ctx context.Context, key [32]byte) (net.Conn, error) {
	e := r.server.expect(channel.KindLane, true)
	if err := r.tell(offer{offerLane, e.id, key}); err != nil {
		e.forget()
		return nil, err
	}
	return e.wait(ctx, meetTime, nil)
}

// enlist puts a registration into its pool; one of the same process that was there
// before is replaced.
func (s *Server) enlist(r *registration) {
	s.mu.Lock()
	p := s.poolLocked(r.key)
	var old *registration
	for other := range p.members {
		if other.member.key.id == r.member.key.id && other.instance == r.instance {
			old = other
			delete(p.members, other)
		}
	}
	p.members[r] = struct{}{}
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
	s.mu.Unlock()
	if old != nil {
		old.conn.Reset(stream.CodeAway, "replaced by a newer registration")
	}
}

func (s *Server) strike(r *registration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.pools[r.key]; p != nil {
		delete(p.members, r)
		s.dropPoolLocked(r.key, p)
	}
}

func (s *Server) poolLocked(key poolKey) *pool {
	p := s.pools[key]
	if p == nil {
		p = &pool{members: make(map[*registration]struct{})}
		s.pools[key] = p
	}
	return p
}

func (s *Server) dropPoolLocked(key poolKey, p *pool) {
	if len(p.members) == 0 && p.waiting == 0 {
		delete(s.pools, key)
	}
}

// visit counts somebody who waits at a pool, which stays until they leave.
func (s *Server) visit(key poolKey) *pool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.poolLocked(key)
	p.waiting++
	return p
}

func (s *Server) leave(key poolKey, p *pool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.waiting--
	s.dropPoolLocked(key, p)
}

// ableLocked is nil when somebody, or the one that is wanted, can take a lane.
func (p *pool) ableLocked(want identity.ID) error {
	err := errNobody
	for r := range p.members {
		switch {
		case !want.IsZero() && r.member.key.id != want:
		case r.full():
			err = errCarrierFull
		default:
			return nil
		}
	}
	return err
}

// changedLocked is closed when somebody comes.
func (p *pool) changedLocked() <-chan struct{} {
	if p.changed == nil {
		p.changed = make(chan struct{})
	}
	return p.changed
}

// names answers which names there are that the member may ask for.
func (s *Server) names(l *link.Live, in *stream.Incoming) {
	m, peer := s.member(l)
	if !s.mayAsk(m) {
		in.Refuse(stream.CodeBusy, "asked too often")
		return
	}
	if l.Peer().Credential() == nil {
		in.Refuse(stream.CodeRefused, "names are for members")
		return
	}
	s.mu.Lock()
	var names []string
	for key, p := range s.pools {
		if key.authority == m.key.authority && key.name != AuthorityName && len(p.members) > 0 {
			names = append(names, key.name)
		}
	}
	s.mu.Unlock()
	names = slices.DeleteFunc(names, func(name string) bool {
		held, _, err := s.book.Admit(nil, peer, request("connect", name), nil)
		held.Release()
		return err != nil
	})
	slices.Sort(names)
	names = names[:min(len(names), maxNames)]
	s.all.Go(func() {
		c := in.Accept()
		c.SetDeadline(time.Now().Add(showTime))
		c.Write(appendNames(names))
		c.Close()
	})
}
