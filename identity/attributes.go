package identity

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Attributes are what an authority says about a subject. A value is a string,
// an int64, a bool or a []string. Names and values are compared byte by byte:
// "Role" is not "role", and 1 is not "1".
type Attributes = map[string]any

// Limits of a credential's attributes: they must fit into a confirmation
// record beside everything else in a credential.
const (
	maxAttributes     = 64
	maxAttributeName  = 64
	maxAttributeBytes = 3 << 10 // all of them, encoded
)

// reserved lists the attribute names that have a meaning of their own. An
// authority's operator sets name, serve and relay by flags of their own; id,
// authority and node are what a verifier itself observed, and no credential
// contains them.
var reserved = []string{"id", "name", "authority", "serve", "relay", "node"}

// Reserved reports whether name cannot be used as an attribute freely.
func Reserved(name string) bool { return slices.Contains(reserved, name) }

// ValidAttribute returns nil when name may be given freely: it matches
// [a-zA-Z_][a-zA-Z0-9_-]{0,63} and is not reserved.
func ValidAttribute(name string) error {
	if Reserved(name) {
		return fmt.Errorf("the attribute name %q is reserved", name)
	}
	return checkAttributeName(name)
}

func checkAttributeName(name string) error {
	ok := len(name) >= 1 && len(name) <= maxAttributeName
	for i, c := range []byte(name) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '_' || i > 0 && (c >= '0' && c <= '9' || c == '-'))
	}
	if !ok {
		return fmt.Errorf("the attribute name %s is not a letter or '_' followed by up to 63 of letters, digits, '_' and '-'", abridged(name))
	}
	return nil
}

// checkAttributes holds both an issuer and a verifier to the rules.
func checkAttributes(attrs Attributes) error {
	if len(attrs) > maxAttributes {
		return fmt.Errorf("%d attributes; a credential has at most %d", len(attrs), maxAttributes)
	}
	for name, v := range attrs {
		if err := checkAttributeName(name); err != nil {
			return err
		}
		if err := checkValue(name, v); err != nil {
			return err
		}
	}
	if n := len(encode(attrs)); n > maxAttributeBytes {
		return fmt.Errorf("the attributes take %d bytes; at most %d fit", n, maxAttributeBytes)
	}
	return nil
}

func checkValue(name string, v any) error {
	valid := true
	switch v := v.(type) {
	case string:
		valid = utf8.ValidString(v)
	case []string:
		valid = !slices.ContainsFunc(v, func(s string) bool { return !utf8.ValidString(s) })
	case int64, bool:
	default:
		return fmt.Errorf("the attribute %q is of type %T; it must be string, int64, bool or []string", name, v)
	}
	if !valid {
		return fmt.Errorf("the attribute %q is not UTF-8", name)
	}

	switch name {
	case "id", "authority", "node":
		return fmt.Errorf("the attribute name %q is reserved: no credential contains it", name)
	case "name":
		s, ok := v.(string)
		if !ok {
			return fmt.Errorf("the attribute %q is not a string", name)
		}
		return ValidName(s)
	case "relay":
		if _, ok := v.(bool); !ok {
			return fmt.Errorf("the attribute %q is not a bool", name)
		}
	case "serve":
		list, ok := v.([]string)
		if !ok {
			return fmt.Errorf("the attribute %q is not a list of names", name)
		}
		for _, pattern := range list {
			if err := ValidServe(pattern); err != nil {
				return err
			}
		}
	}
	return nil
}

// authorityName is the service name that belongs to an authority alone.
const authorityName = "authority"

// ValidServe returns nil when pattern may stand in a credential's serve: a name
// or a name followed by "/*", and not "authority".
func ValidServe(pattern string) error {
	name := strings.TrimSuffix(pattern, "/*")
	if name == authorityName {
		return fmt.Errorf("the name %q belongs to the authority and cannot be served by a member", authorityName)
	}
	return ValidName(name)
}

// decodedAttributes turns what CBOR gives into Attributes.
func decodedAttributes(m map[string]any) (Attributes, error) {
	attrs := make(Attributes, len(m))
	for name, v := range m {
		if list, ok := v.([]any); ok {
			texts := make([]string, len(list))
			for i, e := range list {
				if texts[i], ok = e.(string); !ok {
					return nil, fmt.Errorf("the attribute %s is a list of something else than text", abridged(name))
				}
			}
			v = texts
		}
		attrs[name] = v
	}
	return attrs, checkAttributes(attrs)
}

// cloneAttributes copies the map and its lists; nil becomes an empty map.
func cloneAttributes(attrs Attributes) Attributes {
	c := make(Attributes, len(attrs))
	for name, v := range attrs {
		if list, ok := v.([]string); ok {
			v = append([]string{}, list...)
		}
		c[name] = v
	}
	return c
}
