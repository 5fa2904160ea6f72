package routing

import (
	"crypto/rand"
	"encoding/hex"
	"strings"
	"unicode"
	"unicode/utf8"
)

// MaxAddress is the length of the longest address, in bytes: a name (≤ 63 bytes) fits.
const MaxAddress = 64

// An Address names an actor on a node: 1 to 64 bytes of any value. Public ones are names, such as "orders-db"; those of
// internal actors are 16 random bytes.
type Address string

// NewAddress returns 16 bytes of crypto/rand: an address nobody can guess.
func NewAddress() Address {
	var b [16]byte
	rand.Read(b[:]) // never fails: crypto/rand ends the process instead
	return Address(b[:])
}

// hexMark begins the text of an address that is not printed as it is.
const hexMark = "0x"

// String returns the text form: the address itself when it is plain, else 0x and its bytes in hexadecimal.
// No two addresses have the same text.
func (a Address) String() string {
	if a.plain() {
		return string(a)
	}
	return hexMark + hex.EncodeToString([]byte(a))
}

// plain reports whether a can stand in a printed route as it is: visible, and not to be taken for a separator, for
// padding around one, or for hexadecimal.
func (a Address) plain() bool {
	s := string(a)
	if s == "" || !utf8.ValidString(s) || strings.HasPrefix(s, hexMark) || strings.Contains(s, arrow) ||
		s[0] == ' ' || s[len(s)-1] == ' ' {
		return false
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}

// parseAddress reads the text form of one address.
func parseAddress(s string) (Address, error) {
	if digits, ok := strings.CutPrefix(s, hexMark); ok {
		if len(digits) > 2*MaxAddress {
			return "", errAddressLong
		}
		b, err := hex.DecodeString(digits)
		if err != nil {
			return "", errAddressHex
		}
		s = string(b)
	}
	return Address(s), Address(s).check()
}

// check returns an error unless a has 1 to 64 bytes.
func (a Address) check() error {
	switch {
	case a == "":
		return errAddressEmpty
	case len(a) > MaxAddress:
		return errAddressLong
	}
	return nil
}
