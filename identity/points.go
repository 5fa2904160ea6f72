package identity

import (
	"crypto/ecdh"
	"fmt"
)

// Both curves are over the field of p = 2²⁵⁵ − 19 and write a coordinate as 32
// bytes, little endian.

// canonical reports whether u, without its top bit, is below p.
func canonical(u [32]byte) bool {
	if u[31]&0x7f != 0x7f {
		return true
	}
	for _, b := range u[1:31] {
		if b != 0xff {
			return true
		}
	}
	return u[0] < 0xed
}

// weakY holds the y-coordinates of the eight points of small order of
// edwards25519. A key among them verifies signatures that anybody can make.
var weakY = map[[32]byte]bool{
	{}:  true, // y = 0, order 4
	{1}: true, // the neutral element
	{0xec, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
		0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}: true, // y = −1, order 2
	{0x26, 0xe8, 0x95, 0x8f, 0xc2, 0xb2, 0x27, 0xb0, 0x45, 0xc3, 0xf4, 0x89, 0xf2, 0xef, 0x98, 0xf0,
		0xd5, 0xdf, 0xac, 0x05, 0xd3, 0xc6, 0x33, 0x39, 0xb1, 0x38, 0x02, 0x88, 0x6d, 0x53, 0xfc, 0x05}: true, // order 8
	{0xc7, 0x17, 0x6a, 0x70, 0x3d, 0x4d, 0xd8, 0x4f, 0xba, 0x3c, 0x0b, 0x76, 0x0d, 0x10, 0x67, 0x0f,
		0x2a, 0x20, 0x53, 0xfa, 0x2c, 0x39, 0xcc, 0xc6, 0x4e, 0xc7, 0xfd, 0x77, 0x92, 0xac, 0x03, 0x7a}: true, // order 8
}

// weakEd25519 reports whether key is of small order or not the one encoding of
// its point.
func weakEd25519(key [32]byte) bool {
	y := key
	y[31] &= 0x7f
	return !canonical(y) || weakY[y]
}

var one = must(func() (*ecdh.PrivateKey, error) {
	return ecdh.X25519().NewPrivateKey(append([]byte{1}, make([]byte, 31)...))
})

// checkX25519 refuses a key that is not the one encoding of its point, and each
// point of small order: any scalar, being a multiple of 8 (RFC 7748, section 5),
// takes those to zero, which crypto/ecdh refuses.
func checkX25519(key []byte) error {
	if len(key) != 32 {
		return fmt.Errorf("%w: an X25519 key of %d bytes", ErrMalformed, len(key))
	}
	if key[31]&0x80 != 0 || !canonical([32]byte(key)) {
		return ErrKey
	}
	public, err := ecdh.X25519().NewPublicKey(key)
	if err != nil {
		return ErrKey
	}
	if _, err := one.ECDH(public); err != nil {
		return ErrKey
	}
	return nil
}
