package relay

import (
	"bytes"
	"testing"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/alloc"
)

func FuzzOffer(f *testing.F) {
	f.Add(offer{offerLane, laneID{1}, [32]byte{2}}.append(nil))
	f.Add(offer{kind: offerCarrier, id: laneID{3}}.append(nil))
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		o, err := readOffer(bytes.NewReader(b))
		if err != nil {
			return
		}
		if got := o.append(nil); !bytes.Equal(got, b[:offerSize]) {
			t.Errorf("%x was read from %x", got, b)
		}
	})
}

func FuzzNames(f *testing.F) {
	f.Add(appendNames([]string{"db", "a/b"}))
	f.Add(appendNames(nil))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		names, err := readNames(bytes.NewReader(b))
		if err != nil {
			return
		}
		for _, name := range names {
			if identity.ValidName(name) != nil {
				t.Errorf("%q was taken for a name", name)
			}
		}
		if got := appendNames(names); !bytes.HasPrefix(b, got) {
			t.Errorf("%x was read from %x", got, b)
		}
	})
}

func FuzzHeaderBodies(f *testing.F) {
	f.Add(registerBody{[16]byte{1}, Yamux}.bytes())
	f.Add(connectBody(identity.ID{1}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		if r, err := parseRegister(b); err == nil && !bytes.Equal(r.bytes(), b) {
			t.Errorf("the registration %x was read from %x", r.bytes(), b)
		}
		// An identifier of zeros is none: whoever wants nobody says nothing.
		if want, err := parseConnect(b); err == nil && !want.IsZero() && !bytes.Equal(connectBody(want), b) {
			t.Errorf("the connect %x was read from %x", connectBody(want), b)
		}
	})
}

func TestDecodersOfLyingInputAllocateLittle(t *testing.T) {
	for _, d := range []struct {
		name    string
		decode  func([]byte)
		genuine [][]byte
	}{
		{"offer", func(b []byte) { readOffer(bytes.NewReader(b)) }, [][]byte{offer{offerLane, laneID{1}, [32]byte{2}}.append(nil)}},
		{"names", func(b []byte) { readNames(bytes.NewReader(b)) }, [][]byte{appendNames(nil), appendNames([]string{"db", "a/b"})}},
		{"registration", func(b []byte) { parseRegister(b) }, [][]byte{registerBody{[16]byte{1}, Yamux}.bytes()}},
		{"connect", func(b []byte) { parseConnect(b) }, [][]byte{connectBody(identity.ID{1})}},
	} {
		t.Run(d.name, func(t *testing.T) { alloc.Hostile(t, d.decode, d.genuine...) })
	}
}
