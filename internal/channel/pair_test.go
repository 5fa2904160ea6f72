package channel

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/routing"
)

// side is who takes part in a channel at one end: a member of an authority.
type side struct {
	authority *identity.Self
	self      *identity.Self
	config    *Config
	end       *End
	got       *frames
	ran       chan error // Run's result
}

func yes(*identity.Peer) error { return nil }

// newSide makes a member whose credential lasts an hour and who accepts
// everybody with a credential of the same authority.
func newSide(t testing.TB, authority *identity.Self) *side {
	t.Helper()
	s := &side{
		authority: authority, self: newSelf(t), got: new(frames), ran: make(chan error, 1),
	}
	node := new(routing.Node)
	t.Cleanup(func() { node.Close() })
	s.renew(t, time.Hour)
	s.config = &Config{
		Node: node, Self: s.self, Trust: identity.NewTrust(authority.ID()), Kind: Service, Judge: yes,
	}
	return s
}

// renew gives the side a credential that lasts for d from now.
func (s *side) renew(t testing.TB, d time.Duration) {
	t.Helper()
	check(t, s.self.Renew(s.credential(t, d), s.authority.History()))
}

func (s *side) credential(t testing.TB, d time.Duration) *identity.Credential {
	t.Helper()
	now := time.Now()
	c, err := s.authority.Issue(s.self.ID(), s.self.Latest(), identity.Attributes{"name": "n"}, now.Add(-time.Minute), now.Add(d))
	check(t, err)
	return c
}

func newSides(t testing.TB) (a, b *side) {
	t.Helper()
	authority := newSelf(t)
	return newSide(t, authority), newSide(t, authority)
}

// meet begins a channel at both ends of a lane and gives both errors.
func meet(a, b *side, x, y net.Conn) (errA, errB error) {
	var both sync.WaitGroup
	both.Go(func() { a.end, errA = Initiate(context.Background(), x, a.config) })
	both.Go(func() { b.end, errB = Respond(context.Background(), y, b.config) })
	both.Wait()
	return errA, errB
}

// open makes a confirmed channel with both readers running.
func open(t testing.TB, l memnet.Link) (a, b *side, x, y *memnet.Conn) {
	t.Helper()
	a, b = newSides(t)
	x, y = memnet.Pipe(l)
	reopen(t, a, b, x, y)
	return a, b, x, y
}

func reopen(t testing.TB, a, b *side, x, y net.Conn) {
	t.Helper()
	errA, errB := meet(a, b, x, y)
	check(t, errors.Join(errA, errB))
	a.run()
	b.run()
}

func (s *side) run() { go func() { s.ran <- s.end.Run(s.got) }() }

// send sends one data frame of stream 1 in a buffer, and a record, of its own.
func (s *side) send(q *buffer.Queue, body []byte) error {
	return s.end.Send(q, frameOf(body))
}

func frameOf(body []byte) *buffer.Buffer {
	b := buffer.ForPayload(len(body))
	n := copy(b.Next(), append(AppendHeader(nil, 0x13, 1, len(body)), body...))
	b.Commit(n)
	return b
}

// frames is a Handler that keeps what it is given.
type frames struct {
	mu      sync.Mutex
	bodies  [][]byte
	flushes int
	fail    error             // what Frame returns, when set
	hook    func(body []byte) // called by Frame
}

func (f *frames) Frame(kind uint8, stream uint32, body []byte) error {
	if f.hook != nil {
		f.hook(body)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.bodies = append(f.bodies, slices.Clone(body))
	return f.fail
}

func (f *frames) Flush() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.flushes++
	return nil
}

func (f *frames) all() [][]byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.bodies)
}
