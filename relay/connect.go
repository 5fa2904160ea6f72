package relay

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/lease"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
)

const (
	// holdTime is how long a connect waits for a name that nobody serves: one whose
	// outlet restarts is back within it.
	holdTime = 2 * time.Second
	// meetTime is how long the outlet has to come for a lane before another of its
	// pool is asked: three round trips of the longest paths there are.
	meetTime = 4 * time.Second
	meetings = 3 // outlets that are asked for one lane
	dialTime = 10 * time.Second
	// An authority answers in a moment, and whoever asks it need not be anybody.
	authorityTime = time.Minute
)

// A passage is one lane from the question for it to its end: who asked, and how
// the other side is reached.
type passage struct {
	server *Server
	asker  *link.Live
	member *member
	in     *stream.Incoming
	name   string
	lease  *lease.Lease // nil: towards an authority

	ctx    context.Context // ended by the lease, or by the server's end
	cancel context.CancelCauseFunc
}

// begin counts a lane that is asked for and decides on it; nil when it was
// refused. proof says whether the caller must have a credential.
func (s *Server) begin(l *link.Live, in *stream.Incoming, action string, proof bool) *passage {
	m, peer := s.member(l)
	p := &passage{server: s, asker: l, member: m, in: in, name: in.Header.Name}
	if !s.mayAsk(m) {
		in.Refuse(stream.CodeBusy, "asked too often")
		return nil
	}
	if code, reason := s.enter(m); code != 0 {
		in.Refuse(code, reason)
		return nil
	}
	p.ctx, p.cancel = context.WithCancelCause(s.stop)
	if !proof {
		return p
	}
	held, _, err := s.book.Admit(nil, peer, request(action, p.name), func(err error) { p.cancel(err) })
	if err != nil {
		code, reason := refusal(err)
		s.log.Warn("a "+action+" is refused", "name", p.name, "peer", l.Peer(), "stream", in.Stream(), "reason", reason)
		in.Refuse(code, reason)
		p.met()
		p.end()
		return nil
	}
	p.lease = held
	return p
}

// enter takes a place for a lane, among all and among the identity's.
func (s *Server) enter(m *member) (stream.Code, string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.draining:
		return stream.CodeAway, "the relay is shutting down"
	case m.outstanding >= s.Limits.Outstanding:
		return stream.CodeBusy, fmt.Sprintf("%d lanes were asked for and not taken", m.outstanding)
	case m.lanes >= s.Limits.LanesEach:
		return stream.CodeBusy, fmt.Sprintf("this identity has its %d lanes", m.lanes)
	case m.foreign() && s.foreign >= max(s.Limits.Lanes/foreignShare, 1):
		return stream.CodeBusy, "too many who show no credential ask for lanes"
	case s.lanes >= s.Limits.Lanes:
		return stream.CodeBusy, fmt.Sprintf("the relay has its %d lanes", s.lanes)
	}
	s.lanes++
	if m.foreign() {
		s.foreign++
	}
	m.lanes++
	m.outstanding++
	m.refs++
	return 0, ""
}

// met is told when a lane's two sides are there, or never will be.
func (p *passage) met() {
	p.server.mu.Lock()
	p.member.outstanding--
	p.server.mu.Unlock()
}

// end gives everything back.
func (p *passage) end() {
	p.lease.Release()
	p.cancel(nil)
	s := p.server
	s.mu.Lock()
	defer s.mu.Unlock()
	p.member.lanes--
	if p.member.foreign() {
		s.foreign--
	}
	s.dropLocked(p.member)
	if s.lanes--; s.lanes == 0 && s.idle != nil {
		close(s.idle)
		s.idle = nil
	}
}

// connect is asked for a lane to whoever serves a name.
func (s *Server) connect(l *link.Live, in *stream.Incoming) {
	want, err := parseConnect(in.Header.Body)
	if err != nil {
		in.Refuse(stream.CodeRefused, err.Error())
		return
	}
	toAuthority := in.Header.Name == AuthorityName
	if toAuthority && !s.trusts(want) {
		in.Refuse(stream.CodeRefused, "this relay knows no such authority")
		return
	}
	p := s.begin(l, in, "connect", !toAuthority)
	if p == nil {
		return
	}
	key := poolKey{p.member.key.authority, p.name}
	if toAuthority {
		key.authority = want
	}
	s.all.Go(func() {
		defer p.end()
		if local := s.Local[want]; toAuthority && local != nil {
			p.local(local)
			return
		}
		p.remote(key, want, toAuthority)
	})
}

func (s *Server) trusts(id identity.ID) bool {
	if id.IsZero() {
		return false
	}
	for _, a := range s.Trust.Authorities() {
		if a == id {
			return true
		}
	}
	return false
}

// invite answers with an id and returns the connection that shows it, and how many
// other relays have passed that on.
func (p *passage) invite(key [32]byte) (shown net.Conn, hops int, err error) {
	e := p.server.expect(channel.KindLane, !p.member.foreign())
	c := p.in.Accept()
	c.SetDeadline(time.Now().Add(showTime))
	_, err = c.Write(offer{offerLane, e.id, key}.append(nil))
	c.Close()
	if err != nil {
		e.forget()
		return nil, 0, err
	}
	shown, err = e.wait(p.ctx, showTime, p.asker.Done())
	return shown, e.hops, err
}

// local hands the lane to an authority of this process, and counts it until that has closed it.
func (p *passage) local(take func(context.Context, net.Conn)) {
	key := newKey()
	c, _, err := p.invite(key)
	p.met()
	if err != nil {
		p.failed("the caller", err)
		return
	}
	ctx, cancel := context.WithTimeout(p.ctx, authorityTime)
	defer cancel()
	h := &handed{Conn: c, over: make(chan struct{})}
	take(ctx, &channel.Lane{Conn: h, Key: key})
	select {
	case <-h.over:
	case <-ctx.Done():
		stream.Abort(h)
	}
}

// handed is a connection whose new owner closes it.
type handed struct {
	net.Conn
	once sync.Once
	over chan struct{} // closed with it
}

func (h *handed) Close() error {
	h.once.Do(func() { close(h.over) })
	return h.Conn.Close()
}

// SetLinger is Abort's, of connections that have it.
func (h *handed) SetLinger(sec int) error {
	if t, ok := h.Conn.(interface{ SetLinger(int) error }); ok {
		return t.SetLinger(sec)
	}
	return nil
}

// remote joins the caller's side to one that an outlet opens.
func (p *passage) remote(key poolKey, want identity.ID, brief bool) {
	s := p.server
	if err := s.await(p.ctx, key, want, p.in); err != nil {
		p.met()
		switch err {
		case errNobody:
			p.in.Refuse(stream.CodeAbsent, "")
		case errCarrierFull:
			p.in.Refuse(stream.CodeBusy, err.Error())
		default:
			p.in.Refuse(endCode(err))
		}
		return
	}
	secret := newKey()
	caller, _, err := p.invite(secret)
	if err != nil {
		p.met()
		p.failed("the caller", err)
		return
	}
	other, far, err := s.reach(p.ctx, key, want, secret, p.cancel)
	p.met()
	if err != nil {
		stream.Abort(caller)
		p.failed("the outlet", err)
		return
	}
	defer far.release()
	ctx := p.ctx
	if brief {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, authorityTime)
		defer cancel()
	}
	s.log.Info("a lane is joined", "name", p.name, "caller", p.asker.Peer(), "outlet", far.member.key.id)
	err = join(ctx, caller, other)
	s.log.Info("a lane has ended", "name", p.name, "caller", p.asker.Peer(), "reason", orderly(err))
}

// orderly is why something ended, for a log: of an error of sockets the system's word, since the
// copying wraps it once for each of the two connections, with addresses that say nothing.
func orderly(err error) any {
	for {
		switch e := err.(type) {
		case nil:
			return "in good order"
		case *net.OpError:
			err = e.Err
		case *os.SyscallError:
			err = e.Err
		default:
			return err
		}
	}
}

func (p *passage) failed(side string, err error) {
	p.server.log.Info("a lane came to nothing", "name", p.name, "caller", p.asker.Peer(), "side", side, "reason", err)
}

// next is asked for a lane to another relay. What is said over it is between the
// caller and that relay, which judges the caller itself.
func (s *Server) next(l *link.Live, in *stream.Incoming) {
	if len(in.Header.Body) != 0 {
		in.Refuse(stream.CodeRefused, "a next has no body")
		return
	}
	p := s.begin(l, in, "next", true)
	if p == nil {
		return
	}
	hop, known := s.Next[p.name]
	s.all.Go(func() {
		defer p.end()
		if !known { // whoever may not go on has been refused before
			p.met()
			in.Refuse(stream.CodeAbsent, "this relay knows no next one of that name")
			return
		}
		if l.Hops >= channel.MaxHops { // and so would the lane be
			p.met()
			in.Refuse(stream.CodeRefused, errHops.Error())
			return
		}
		ctx, cancel := context.WithTimeout(p.ctx, dialTime)
		other, err := s.Dial(ctx, "tcp", hop.Addr)
		cancel()
		if err != nil {
			p.met()
			in.Refuse(stream.CodeTarget, "the next relay cannot be reached")
			p.failed("the next relay", err)
			return
		}
		stream.Arm(other)
		caller, hops, err := p.invite(hop.ID)
		p.met()
		if err != nil {
			stream.Abort(other)
			p.failed("the caller", err)
			return
		}
		// Counted on the connection itself: one that was asked for by another way must
		// not begin anew.
		if err := passOn(other, hops+1); err != nil {
			stream.Abort(caller)
			stream.Abort(other)
			p.failed("the next relay", err)
			return
		}
		join(p.ctx, caller, other)
	})
}

var errHops = fmt.Errorf("%d relays have passed this on: it goes round in a loop", channel.MaxHops)

// passOn tells the next relay how many have passed a connection on.
func passOn(next net.Conn, hops int) error {
	if hops > channel.MaxHops {
		return errHops
	}
	next.SetWriteDeadline(time.Now().Add(dialTime))
	_, err := next.Write(channel.HopPreface(hops).Append(nil))
	next.SetWriteDeadline(time.Time{})
	return err
}

// reach has one of those who serve a name come for the lane. Whoever does not is
// passed over.
func (s *Server) reach(ctx context.Context, key poolKey, want identity.ID, secret [32]byte, end context.CancelCauseFunc) (net.Conn, *far, error) {
	err := error(errNobody)
	tried := make(map[*registration]bool)
	for left := meetings; left > 0; {
		r := s.choose(key, want, tried)
		if r == nil {
			return nil, nil, err
		}
		tried[r] = true
		var f *far
		if f, err = s.oblige(r, end); err != nil {
			left--
			continue
		}
		var c net.Conn
		if c, err = r.summon(ctx, secret); err == nil {
			return c, f, nil
		}
		f.release()
		if ctx.Err() != nil {
			break
		}
		if err != errCarrierFull { // nobody was asked
			left--
		}
	}
	return nil, nil, err
}

// far is the outlet's end of a lane: the decision that it may serve the name holds
// for as long as the lane does, also when its control channel is gone.
type far struct {
	*registration
	lease *lease.Lease
}

func (s *Server) oblige(r *registration, end context.CancelCauseFunc) (*far, error) {
	f := &far{registration: r}
	if !s.hold(r.member, &r.member.lanes, s.Limits.LanesEach) {
		return nil, fmt.Errorf("%s has its %d lanes", r.member.key.id.Short(), s.Limits.LanesEach)
	}
	if r.key.name == AuthorityName {
		return f, nil
	}
	held, _, err := s.book.Admit(nil, r.peer, request("serve", r.key.name), func(err error) { end(err) })
	if err != nil {
		s.release(r.member, &r.member.lanes)
		return nil, err
	}
	f.lease = held
	return f, nil
}

func (f *far) release() {
	f.lease.Release()
	f.server.release(f.member, &f.member.lanes)
}

var (
	errNobody      = errors.New("nobody serves it here now")
	errGaveUp      = errors.New("the caller gave up")
	errCarrierFull = fmt.Errorf("nobody who serves it has room in its carrier, which takes %d lanes, or fewer where this relay has many or little memory", carrierLanes)
)

// await returns when somebody serves the name, or after a while why nobody does.
func (s *Server) await(ctx context.Context, key poolKey, want identity.ID, in *stream.Incoming) error {
	p := s.visit(key)
	defer s.leave(key, p)
	t := time.NewTimer(holdTime)
	defer t.Stop()
	for {
		s.mu.Lock()
		err := p.ableLocked(want)
		changed := p.changedLocked()
		s.mu.Unlock()
		if err != errNobody {
			return err
		}
		select {
		case <-changed:
		case <-t.C:
			return err
		case <-in.Done():
			return errGaveUp
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// choose takes one of those who serve the name, by chance, that was not tried.
func (s *Server) choose(key poolKey, want identity.ID, tried map[*registration]bool) *registration {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pools[key]
	if p == nil {
		return nil
	}
	var all []*registration
	for r := range p.members {
		if !tried[r] && !r.full() && (want.IsZero() || r.member.key.id == want) {
			all = append(all, r)
		}
	}
	if len(all) == 0 {
		return nil
	}
	return all[rand.IntN(len(all))]
}
