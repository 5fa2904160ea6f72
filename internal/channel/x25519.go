package channel

import (
	"crypto/ecdh"
	"crypto/subtle"
	"errors"
	"io"

	"github.com/flynn/noise"
)

// x25519 is the Diffie-Hellman function of one handshake (Noise §12.1, RFC 7748). It
// keeps the private keys that it is called with again and again: making one of its bytes
// computes the public key too, as much work as the exchange itself. An all-zero result,
// of a point of low order, is an error.
type x25519 struct {
	keys [2]*ecdh.PrivateKey // the static one, the ephemeral one
	raw  [2][]byte
}

func newX25519(static *ecdh.PrivateKey) *x25519 {
	d := new(x25519)
	d.keep(0, static)
	return d
}

func (d *x25519) keep(i int, k *ecdh.PrivateKey) { d.keys[i], d.raw[i] = k, k.Bytes() }

// GenerateKeypair takes 32 bytes of random for the ephemeral key.
func (d *x25519) GenerateKeypair(random io.Reader) (noise.DHKey, error) {
	seed := make([]byte, 32)
	if _, err := io.ReadFull(random, seed); err != nil {
		return noise.DHKey{}, err
	}
	k, err := ecdh.X25519().NewPrivateKey(seed)
	if err != nil {
		return noise.DHKey{}, err
	}
	d.keep(1, k)
	return keypair(k), nil
}

func (d *x25519) DH(private, public []byte) ([]byte, error) {
	p, err := ecdh.X25519().NewPublicKey(public)
	if err != nil {
		return nil, err
	}
	for i, raw := range d.raw {
		if raw != nil && subtle.ConstantTimeCompare(raw, private) == 1 {
			return d.keys[i].ECDH(p)
		}
	}
	return nil, errors.New("channel: a private key that is not of this handshake")
}

func (d *x25519) DHLen() int     { return 32 }
func (d *x25519) DHName() string { return noise.DH25519.DHName() }
