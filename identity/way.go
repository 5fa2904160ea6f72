package identity

import (
	"fmt"
	"net"
	"strconv"
	"strings"
)

// Way is a way to an authority: through the relay whose identity is ID, or with
// a zero ID directly, where the authority itself listens. Addr is only where to
// dial; it proves nothing.
type Way struct {
	ID   ID
	Addr string // host:port
}

const (
	MaxWays    = 8 // those of one ticket, within its 1 KiB
	maxAddress = 253 + len(":65535")
)

// ParseWay reads "host:port" or "ID@host:port".
func ParseWay(s string) (Way, error) {
	var w Way
	id, addr, pinned := strings.Cut(s, "@")
	if !pinned {
		addr = s
	} else {
		var err error
		if w.ID, err = ParseID(id); err != nil {
			return Way{}, err
		}
	}
	w.Addr = addr
	return w, w.check()
}

func (w Way) String() string {
	if w.ID.IsZero() {
		return w.Addr
	}
	return w.ID.String() + "@" + w.Addr
}

func (w Way) check() error {
	if len(w.Addr) > maxAddress {
		return fmt.Errorf("an address of %d bytes; at most %d are used", len(w.Addr), maxAddress)
	}
	for _, c := range []byte(w.Addr) {
		if c <= ' ' || c >= 0x7f || c == '@' {
			return fmt.Errorf("the address %q is not host:port", w.Addr)
		}
	}
	host, port, err := net.SplitHostPort(w.Addr)
	if err != nil || host == "" {
		return fmt.Errorf("the address %q is not host:port", w.Addr)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("the address %q has no port from 1 to 65535", w.Addr)
	}
	return nil
}

// wireWay is a Way in a ticket or a file; its ID is empty or 32 bytes.
type wireWay struct {
	_    struct{} `cbor:",toarray"`
	ID   []byte
	Addr string
}

func encodeWays(ways []Way) ([]wireWay, error) {
	if len(ways) > MaxWays {
		return nil, fmt.Errorf("%d ways; at most %d are used", len(ways), MaxWays)
	}
	wire := make([]wireWay, len(ways))
	for i, w := range ways {
		if err := w.check(); err != nil {
			return nil, err
		}
		wire[i].Addr = w.Addr
		if !w.ID.IsZero() {
			wire[i].ID = w.ID[:]
		}
	}
	return wire, nil
}

func decodeWays(wire []wireWay) ([]Way, error) {
	if len(wire) > MaxWays {
		return nil, fmt.Errorf("%d ways; at most %d are used", len(wire), MaxWays)
	}
	ways := make([]Way, len(wire))
	for i, w := range wire {
		ways[i].Addr = w.Addr
		if n := copy(ways[i].ID[:], w.ID); len(w.ID) != 0 && (len(w.ID) != len(ID{}) || ways[i].ID.IsZero()) {
			return nil, fmt.Errorf("an identifier of %d bytes", n)
		}
		if err := ways[i].check(); err != nil {
			return nil, err
		}
	}
	return ways, nil
}
