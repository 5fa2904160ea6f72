package routing

import (
	"errors"
	"fmt"
	"strings"
)

const (
	MaxRoute     = 16   // addresses in a route: twice what eight hops need
	MaxRouteSize = 1024 // bytes of an encoded route: what a stranger can make this node keep for each
)

const (
	arrow     = "=>"
	separator = " " + arrow + " " // names contain '/', ':' and '.'
)

// A Route is the addresses a message has still to visit, the next one first. The zero value is the empty route.
// Routes are immutable and comparable with ==.
type Route struct {
	wire string // its encoding without the count: ( u8 length ‖ address ) …
}

// What a route is refused for. Made once: refusing hostile input costs no memory.
var (
	ErrRoute        = errors.New("invalid route")
	errRouteCount   = fmt.Errorf("%w: more than %d addresses", ErrRoute, MaxRoute)
	errRouteSize    = fmt.Errorf("%w: more than %d bytes", ErrRoute, MaxRouteSize)
	errRouteShort   = fmt.Errorf("%w: cut short", ErrRoute)
	errRouteEmpty   = fmt.Errorf("%w: empty; write one or more addresses, as in first%ssecond", ErrRoute, separator)
	errAddressEmpty = fmt.Errorf("%w: empty address", ErrRoute)
	errAddressLong  = fmt.Errorf("%w: address of more than %d bytes", ErrRoute, MaxAddress)
	errAddressHex   = fmt.Errorf("%w: address that begins with %s is not hexadecimal", ErrRoute, hexMark)
)

// NewRoute returns the route over a, first one first. Its errors are ErrRoute.
func NewRoute(a ...Address) (Route, error) {
	if len(a) > MaxRoute {
		return Route{}, errRouteCount
	}
	size := 0
	for _, at := range a {
		if err := at.check(); err != nil {
			return Route{}, err
		}
		size += 1 + len(at)
	}
	if 1+size > MaxRouteSize {
		return Route{}, errRouteSize
	}
	var w strings.Builder
	w.Grow(size)
	for _, at := range a {
		w.WriteByte(byte(len(at)))
		w.WriteString(string(at))
	}
	return Route{w.String()}, nil
}

// ParseRoute reads the text form, addresses joined by " => " (the spaces may be missing or more), each as
// [Address.String] writes it. It is the inverse of String for every route but the empty one, which it refuses.
// Its errors are ErrRoute.
func ParseRoute(s string) (Route, error) {
	count := 1 + strings.Count(s, arrow)
	if count > MaxRoute {
		return Route{}, errRouteCount
	}
	if strings.Trim(s, " ") == "" {
		return Route{}, errRouteEmpty
	}
	var hops [MaxRoute]Address
	for i := range count {
		text, rest, _ := strings.Cut(s, arrow)
		at, err := parseAddress(strings.Trim(text, " "))
		if err != nil {
			return Route{}, fmt.Errorf("%w (address %d of %d)", err, i+1, count)
		}
		hops[i], s = at, rest
	}
	return NewRoute(hops[:count]...)
}

// DecodeRoute reads a route from the front of b and returns what follows it. Everything is checked before anything is
// allocated; the route keeps no part of b. Its errors are ErrRoute.
func DecodeRoute(b []byte) (Route, []byte, error) {
	if len(b) == 0 {
		return Route{}, nil, errRouteShort
	}
	count, b := int(b[0]), b[1:]
	if count > MaxRoute {
		return Route{}, nil, errRouteCount
	}
	size := 0
	for range count {
		if size >= len(b) {
			return Route{}, nil, errRouteShort
		}
		n := int(b[size])
		switch {
		case n == 0:
			return Route{}, nil, errAddressEmpty
		case n > MaxAddress:
			return Route{}, nil, errAddressLong
		}
		size += 1 + n
	}
	switch {
	case size > len(b):
		return Route{}, nil, errRouteShort
	case 1+size > MaxRouteSize:
		return Route{}, nil, errRouteSize
	}
	return Route{string(b[:size])}, b[size:], nil
}

// Append appends the encoding of r, at most MaxRouteSize bytes, and returns the extended buffer.
func (r Route) Append(b []byte) []byte {
	return append(append(b, byte(r.Len())), r.wire...)
}

// Pop returns the first address and the route behind it; false for the empty route. It allocates nothing: both share
// the memory of r.
func (r Route) Pop() (Address, Route, bool) {
	if r.wire == "" {
		return "", Route{}, false
	}
	end := 1 + int(r.wire[0])
	return Address(r.wire[1:end]), Route{r.wire[end:]}, true
}

// Push returns the route that visits a and then r. Its errors are ErrRoute.
func (r Route) Push(a Address) (Route, error) {
	if err := a.check(); err != nil {
		return Route{}, err
	}
	switch {
	case r.Len() == MaxRoute:
		return Route{}, errRouteCount
	case 1+1+len(a)+len(r.wire) > MaxRouteSize:
		return Route{}, errRouteSize
	}
	return Route{string(rune(len(a))) + string(a) + r.wire}, nil // a length is ≤ 64: one byte as a rune, too
}

// Len returns the number of addresses.
func (r Route) Len() int {
	n := 0
	for i := 0; i < len(r.wire); i += 1 + int(r.wire[i]) {
		n++
	}
	return n
}

// String returns the text form that ParseRoute reads; "" for the empty route.
func (r Route) String() string {
	var w strings.Builder
	for at, rest, ok := r.Pop(); ok; at, rest, ok = rest.Pop() {
		if w.Len() > 0 {
			w.WriteString(separator)
		}
		w.WriteString(at.String())
	}
	return w.String()
}
