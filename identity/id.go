package identity

import (
	"encoding/base32"
	"errors"
	"fmt"
	"strings"
)

// ID is an identifier: the SHA-256 of the first change of an identity. Its text
// is "P" followed by 52 characters of base32 (RFC 4648, upper case, without
// padding).
type ID [32]byte

const idText = 53 // characters

var idEncoding = base32.StdEncoding.WithPadding(base32.NoPadding)

// ParseID reads the text of an identifier. There is one text for each.
func ParseID(s string) (ID, error) {
	var id ID
	if len(s) != idText || s[0] != 'P' {
		return ID{}, fmt.Errorf("%s is not an identifier: one is P and 52 characters of A-Z and 2-7", abridged(s))
	}
	b, err := idEncoding.DecodeString(s[1:])
	if err != nil || copy(id[:], b) != len(id) || id.String() != s {
		return ID{}, fmt.Errorf("%s is not an identifier: it was altered, or is not in capitals", abridged(s))
	}
	return id, nil
}

// abridged quotes s for an error without repeating what may be long or secret.
func abridged(s string) string {
	const most = 8
	if len(s) <= most {
		return fmt.Sprintf("%q", s)
	}
	return fmt.Sprintf("%q", strings.ToValidUTF8(s[:most], "")+"…")
}

func (id ID) IsZero() bool   { return id == ID{} }
func (id ID) String() string { return "P" + idEncoding.EncodeToString(id[:]) }

// Short returns the first four characters and an ellipsis, for people: two
// identities may share it.
func (id ID) Short() string { return id.String()[:4] + "…" }

func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

func (id *ID) UnmarshalText(b []byte) error {
	v, err := ParseID(string(b))
	if err != nil {
		return err
	}
	*id = v
	return nil
}

// maxName is the length of the longest name, in bytes.
const maxName = 63

// ValidName returns nil when s is a name: segments of [a-z0-9][a-z0-9._-]*
// joined by '/', 63 bytes at most.
func ValidName(s string) error {
	if s == "" {
		return errors.New("the name is empty")
	}
	if len(s) > maxName {
		return fmt.Errorf("the name %s is longer than %d bytes", abridged(s), maxName)
	}
	for segment := range strings.SplitSeq(s, "/") {
		if segment == "" {
			return fmt.Errorf("the name %q has an empty segment", s)
		}
		for i, c := range []byte(segment) {
			switch {
			case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
			case i > 0 && (c == '.' || c == '_' || c == '-'):
			default:
				return fmt.Errorf("the name %q has %q where only %s may stand", s, c, allowed(i))
			}
		}
	}
	return nil
}

func allowed(i int) string {
	if i == 0 {
		return "a-z and 0-9"
	}
	return "a-z, 0-9, '.', '_' and '-'"
}
