package identity

import (
	"bytes"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/internal/alloc"
)

// Each target holds a decoder to two claims: it does not panic, and what it
// takes has no other encoding.

func FuzzHistory(f *testing.F) {
	s := newSelf(f)
	f.Add(s.History())
	rotate(f, s)
	f.Add(s.History())
	f.Add([]byte{0x80})
	f.Add([]byte{0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		h, err := parseHistory(b)
		if err != nil {
			return
		}
		var changes []change
		if err := decode(h.raw, &changes); err != nil || !bytes.Equal(encode(changes), b) {
			t.Errorf("%x is read and written as %x (%v)", b, encode(changes), err)
		}
		if len(changes) != len(h.hashes) || len(h.hashes) > MaxChanges || len(b) > MaxHistory {
			t.Errorf("%d changes, %d hashes", len(changes), len(h.hashes))
		}
	})
}

func FuzzAttestation(f *testing.F) {
	s := newSelf(f)
	_, raw, key := prove(f, s, noon)
	h, err := parseHistory(s.History())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw, key)
	f.Add(attest(s, key, noon, func(d *attestationData) { d.Role = "" }), key)
	f.Add([]byte{0x82, 0x40, 0x40}, []byte{})
	f.Fuzz(func(t *testing.T, b, static []byte) {
		defer alloc.Bound(t, len(b)+len(static))()
		if verifyAttestation(b, h, static, noon) == nil && !bytes.Equal(b, raw) {
			t.Errorf("%x is an attestation that nobody made", b)
		}
	})
}

func FuzzCredential(f *testing.F) {
	authority, node := newSelf(f), newSelf(f)
	c := issueTo(f, authority, node, Attributes{"role": "agent", "n": int64(1), "b": true, "l": []string{"a"}}, noon, noon.Add(time.Hour))
	f.Add(c.Raw())
	good := goodClaims(authority, node)
	good.Attributes["x"] = 1.5
	f.Add(sealed(f, authority, encode(&good), credentialAAD, nil))
	f.Add([]byte{0x84, 0x40, 0xa0, 0x40, 0x40})
	f.Add([]byte{0x84, 0x40, 0xa0, 0xf6, 0x40})
	trust := NewTrust(authority.ID())
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		if got, err := parseCredential(b); err == nil {
			if err := checkAttributes(got.Attributes); err != nil {
				t.Errorf("read with attributes that break the rules: %v", err)
			}
			if !bytes.Equal(got.Raw(), b) {
				t.Error("Raw is not what was received")
			}
		}
		_, err := trust.Verify(b, authority.History(), node.ID(), node.Latest(), noon)
		if err == nil && !bytes.Equal(b, c.Raw()) {
			t.Errorf("%x is a credential that nobody issued", b)
		}
	})
}

func FuzzTicket(f *testing.F) {
	f.Add(ticketText(f, newTicket(f, 1)))
	f.Add(ticketText(f, newTicket(f, 8)))
	f.Add(handmade([]byte{1, 0, 0}))
	f.Add(handmade([]byte{2, 0, 0}))
	f.Add("portal1")
	f.Add("portal1\xff")
	f.Add("/run/secrets/ticket")
	f.Fuzz(func(t *testing.T, s string) {
		defer alloc.Bound(t, len(s))()
		ticket, err := ParseTicket(s)
		if err != nil {
			return
		}
		text := ticketText(t, ticket)
		if again, err := ParseTicket(text); err != nil || again.Hash() != ticket.Hash() || len(text) > len(s) {
			t.Errorf("%q is written as %q: %v", s, text, err)
		}
	})
}

// FuzzTicketBody gets past the checksum.
func FuzzTicketBody(f *testing.F) {
	f.Add(encode(&ticketBody{Authority: bytes.Repeat([]byte{1}, 32), Secret: bytes.Repeat([]byte{1}, 32), Expires: 1, Ways: []wireWay{{Addr: "a:1"}}}))
	f.Add([]byte{0x84, 0x40, 0x40, 0x00, 0x80})
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		ticket, err := parseTicketBody(b)
		if err != nil {
			return
		}
		text := ticketText(t, ticket)
		if want := handmade(append([]byte{1, byte(len(b) >> 8), byte(len(b))}, b...)); text != want {
			t.Errorf("%x has another encoding, %s", b, text)
		}
	})
}

func FuzzID(f *testing.F) {
	f.Add(newSelf(f).ID().String())
	f.Add(ID{}.String())
	f.Add("P")
	f.Fuzz(func(t *testing.T, s string) {
		defer alloc.Bound(t, len(s))()
		if id, err := ParseID(s); err == nil && id.String() != s {
			t.Errorf("%q is written as %q", s, id)
		}
		if w, err := ParseWay(s); err == nil && w.String() != s {
			t.Errorf("%q is written as %q", s, w)
		}
	})
}

func FuzzMembership(f *testing.F) {
	authority, node := newSelf(f), newSelf(f)
	m := &stored{
		Membership: Membership{Authority: authority.ID(), Name: "db1", Ways: []Way{{Addr: "a:1"}, {ID: node.ID(), Addr: "b:2"}}},
		credential: issueTo(f, authority, node, nil, noon, noon.Add(time.Hour)),
		issuer:     authority.History(),
	}
	b, err := encodeMembership(m)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)-1])
	f.Add([]byte{0x87})
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		m, err := parseMembership(b)
		if err != nil {
			return
		}
		if again, err := encodeMembership(m); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%x is written as %x (%v)", b, again, err)
		}
	})
}

func FuzzKeyFile(f *testing.F) {
	f.Add(encodeKey(newSelf(f).state.Load()))
	f.Add([]byte("-----BEGIN PORTAL IDENTITY KEY-----\n-----END PORTAL IDENTITY KEY-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		if s, err := parseKey(b); err == nil && !bytes.Equal(encodeKey(s), b) {
			t.Errorf("%q has another encoding", b)
		}
	})
}

func TestDecodersOfLyingInputAllocateLittle(t *testing.T) {
	authority, node := newSelf(t), newSelf(t)
	first := authority.History()
	rotate(t, authority)
	h, err := parseHistory(authority.History())
	if err != nil {
		t.Fatal(err)
	}
	_, attestation, key := prove(t, authority, noon)
	c := issueTo(t, authority, node, Attributes{"role": "agent", "n": int64(1), "b": true, "l": []string{"a"}}, noon, noon.Add(time.Hour))
	good := goodClaims(authority, node)
	trust := NewTrust(authority.ID())
	membership, err := encodeMembership(&stored{
		Membership: Membership{Authority: authority.ID(), Name: "db1", Ways: []Way{{Addr: "a:1"}, {ID: node.ID(), Addr: "b:2"}}},
		credential: c,
		issuer:     authority.History(),
	})
	if err != nil {
		t.Fatal(err)
	}
	body := encode(&ticketBody{Authority: bytes.Repeat([]byte{1}, 32), Secret: bytes.Repeat([]byte{1}, 32), Expires: 1, Ways: []wireWay{{Addr: "a:1"}}})
	for _, d := range []struct {
		name    string
		decode  func([]byte)
		genuine [][]byte
	}{
		{"history", func(b []byte) { parseHistory(b) }, [][]byte{first, authority.History()}},
		{"attestation", func(b []byte) { verifyAttestation(b, h, key, noon) }, [][]byte{attestation}},
		{"credential", func(b []byte) { trust.Verify(b, authority.History(), node.ID(), node.Latest(), noon) }, [][]byte{c.Raw()}},
		{"the issuer of a credential", func(b []byte) { trust.Verify(c.Raw(), b, node.ID(), node.Latest(), noon) }, [][]byte{authority.History()}},
		// Behind a signature: what an authority that turned hostile can issue.
		{"claims", func(b []byte) { decode(b, new(claims)) }, [][]byte{encode(&good)}},
		{"ticket", func(b []byte) { ParseTicket(string(b)) }, [][]byte{[]byte(ticketText(t, newTicket(t, 1))), []byte(ticketText(t, newTicket(t, 8)))}},
		{"body of a ticket", func(b []byte) { parseTicketBody(b) }, [][]byte{body}},
		{"identifier", func(b []byte) { ParseID(string(b)) }, [][]byte{[]byte(node.ID().String())}},
		{"way", func(b []byte) { ParseWay(string(b)) }, [][]byte{[]byte(Way{ID: node.ID(), Addr: "b:2"}.String())}},
		{"membership", func(b []byte) { parseMembership(b) }, [][]byte{membership}},
		{"key file", func(b []byte) { parseKey(b) }, [][]byte{encodeKey(node.state.Load())}},
	} {
		t.Run(d.name, func(t *testing.T) { alloc.Hostile(t, d.decode, d.genuine...) })
	}
}
