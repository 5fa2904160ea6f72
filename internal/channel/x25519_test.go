package channel

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"testing"

	"github.com/flynn/noise"
)

func TestTheExchangeIsThatOfTheLibrary(t *testing.T) {
	static := must(ecdh.X25519().GenerateKey(rand.Reader))(t)
	d := newX25519(static)
	ephemeral, err := d.GenerateKeypair(bytes.NewReader(bytes.Repeat([]byte{7}, 32)))
	check(t, err)
	theirs := must(noise.DH25519.GenerateKeypair(bytes.NewReader(bytes.Repeat([]byte{7}, 32))))(t)
	if !bytes.Equal(ephemeral.Private, theirs.Private) || !bytes.Equal(ephemeral.Public, theirs.Public) {
		t.Error("the keys are others")
	}
	peer := must(ecdh.X25519().GenerateKey(rand.Reader))(t).PublicKey().Bytes()
	for _, private := range [][]byte{static.Bytes(), ephemeral.Private} {
		got, want := must(d.DH(private, peer))(t), must(noise.DH25519.DH(private, peer))(t)
		if !bytes.Equal(got, want) {
			t.Errorf("%x, not %x", got, want)
		}
	}
	if _, err := d.DH(bytes.Repeat([]byte{1}, 32), peer); err == nil {
		t.Error("a key that it does not have is taken")
	}
	if _, err := d.DH(static.Bytes(), make([]byte, 32)); err == nil {
		t.Error("a point of low order is taken")
	}
	if _, err := d.DH(static.Bytes(), peer[:31]); err == nil {
		t.Error("a short point is taken")
	}
	if _, err := d.GenerateKeypair(bytes.NewReader(make([]byte, 31))); err == nil {
		t.Error("a key is made of 31 bytes")
	}
}

// What a stranger's first message costs.
func BenchmarkAnswerToMessage1(b *testing.B) {
	s := newShaking(b, AESGCM)
	i, _ := s.ends(b)
	m, err := i.write1()
	check(b, err)
	for b.Loop() {
		_, r := s.ends(b)
		check(b, r.read1(m))
		if _, err := r.write2(); err != nil {
			b.Fatal(err)
		}
	}
}
