package journeys_test

import (
	"context"
	"encoding/binary"
	"net"
	"testing"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/routing"
)

// A peer is an authenticated end of a channel that sends whatever frames it likes. What it is sent it
// counts and forgets.
type peer struct {
	*channel.End
	node routing.Node
	got  map[uint8]int // frames by kind; the lane reader's until ran
	on   func(kind uint8, stream uint32, body []byte)
	ran  chan error
}

// Frame kinds as SPEC.md has them.
const (
	framePing       = 0x03
	framePong       = 0x04
	frameCredential = 0x05
	frameAway       = 0x06
	frameOpen       = 0x10
	frameOpened     = 0x11
	frameRefused    = 0x12
	frameData       = 0x13
	frameEnd        = 0x14
	frameReset      = 0x15
	frameCredit     = 0x16
)

func (p *peer) Frame(kind uint8, stream uint32, body []byte) error {
	p.got[kind]++
	if p.on != nil {
		p.on(kind, stream, body)
	}
	return nil
}

func (p *peer) Flush() error { return nil }

// nobody is an identity that none of them knows.
func nobody(t testing.TB) (*identity.Self, *identity.Trust) {
	t.Helper()
	self, err := identity.NewSelf()
	if err != nil {
		t.Fatal(err)
	}
	return self, identity.NewTrust()
}

// as is the member whose home a host has.
func (h *house) as(host string) (*identity.Self, *identity.Trust) {
	h.t.Helper()
	home, err := identity.Open(h.home(host))
	if err != nil {
		h.t.Fatal(err)
	}
	self, err := home.Self()
	if err != nil {
		h.t.Fatal(err)
	}
	trust, err := home.Trust()
	if err != nil {
		h.t.Fatal(err)
	}
	return self, trust
}

// raw opens a channel from a source address of loopback.
func raw(ctx context.Context, source, addr string, kind channel.Kind, self *identity.Self, trust *identity.Trust, on func(kind uint8, stream uint32, body []byte)) (*peer, error) {
	c, err := knock(ctx, source, addr)
	if err != nil {
		return nil, err
	}
	p := &peer{got: make(map[uint8]int), on: on, ran: make(chan error, 1)}
	p.End, err = channel.Initiate(ctx, c, &channel.Config{
		Node: &p.node, Self: self, Trust: trust, Kind: kind, Proofless: true,
		Judge: everybody,
	})
	if err != nil {
		return nil, err
	}
	return p, nil
}

func everybody(*identity.Peer) error { return nil }

// read takes what comes, until the channel ends. A peer that does not is deaf.
func (p *peer) read() *peer {
	go func() { p.ran <- p.Run(p) }()
	return p
}

// knock connects from a source address.
func knock(ctx context.Context, source, addr string) (net.Conn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}, Timeout: patience}
	return d.DialContext(ctx, "tcp", addr)
}

// frame appends a frame as it goes on the wire.
func frame(b []byte, kind uint8, stream uint32, body []byte) []byte {
	return append(channel.AppendHeader(b, kind, stream, len(body)), body...)
}

// send sends whole frames, packed into as few records as they fit; each is at most a record long.
func (p *peer) send(q *buffer.Queue, frames ...[]byte) error {
	var b *buffer.Buffer
	filled := 0
	flush := func() error {
		if b == nil {
			return nil
		}
		if filled > 0 {
			b.Commit(filled)
			filled = 0
		}
		err := p.Send(q, b)
		b = nil
		return err
	}
	for _, f := range frames {
		if b == nil {
			b = buffer.Get(buffer.Record)
		}
		if len(b.Next()) < filled+len(f) {
			if err := flush(); err != nil {
				return err
			}
			b = buffer.Get(buffer.Record)
		}
		filled += copy(b.Next()[filled:], f)
	}
	return flush()
}

// opens is the body of an open.
func opens(kind stream.HeaderKind, credit uint64, name string) []byte {
	b := binary.BigEndian.AppendUint64([]byte{byte(kind)}, credit)
	return append(append(b, byte(len(name))), name...)
}

func u64(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
