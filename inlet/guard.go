package inlet

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// A web page that a browser of this host shows can have the browser speak to an
// inlet: a name that its owner points to 127.0.0.1 (DNS rebinding) makes the page
// even a reader of the answers, with the inlet's credential. What gives it away is in
// the requests' heads: a Host that is no name of this host, an Origin of another site.

// A guard reads what an HTTP client sends, in order and without holding it back,
// and objects before the line that ends a head is out. It changes nothing.
// RFC 9112; what two readers may understand differently (§6.3, §11.2) it refuses.
type guard struct {
	hosts []string // names besides those of this host

	state   func(*guard, []byte) (n int, err error)
	line    []byte // of the head so far, without its end
	size    int    // of the head so far
	heads   int    // that were read to their end
	request head
	left    uint64 // of the body or the chunk
}

// head is what is kept of one request's.
type head struct {
	hosts   []string // from the target and from Host
	origin  string
	foreign bool // the browser says that the page is of another site
	lengths int  // how many there were
	length  uint64
	chunked bool
	upgrade bool // what follows may be no HTTP
}

// foreignError is a request that came for another host or from another site.
type foreignError struct{ text string }

func (e *foreignError) Error() string { return e.text }

var (
	errHead     = fmt.Errorf("the head of a request is longer than %d bytes", maxHead)
	errRequest  = errors.New("what was sent is no HTTP/1 request")
	errHeader   = errors.New("a header field of a request is malformed")
	errFraming  = errors.New("the length of a request can be understood in more than one way")
	errChunk    = errors.New("a chunk of a request's body is malformed")
	prefaceHTTP = []byte("PRI * HTTP/2.0") // of HTTP/2, which no browser begins in clear
)

func isMalformed(err error) bool {
	return slices.ContainsFunc([]error{errHead, errRequest, errHeader, errFraming, errChunk}, func(e error) bool { return errors.Is(err, e) })
}

func newGuard(hosts []string) *guard { return &guard{hosts: hosts, state: (*guard).requestLine} }

// check reads on.
func (g *guard) check(b []byte) error {
	for len(b) > 0 {
		n, err := g.state(g, b)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// next takes bytes up to the end of a line, which it gives once it is whole.
func (g *guard) next(b []byte) (n int, line []byte, err error) {
	end := bytes.IndexByte(b, '\n')
	n = end + 1
	if end < 0 {
		n = len(b)
	}
	if g.size += n; g.size > maxHead {
		return n, nil, errHead
	}
	if end < 0 {
		g.line = append(g.line, b...)
		return n, nil, nil
	}
	line = b[:end]
	if len(g.line) > 0 {
		line = append(g.line, line...)
		g.line = g.line[:0]
	}
	line = bytes.TrimSuffix(line, []byte("\r"))
	if bytes.ContainsAny(line, "\r\x00") {
		return n, nil, errHeader
	}
	return n, line, nil
}

func (g *guard) requestLine(b []byte) (int, error) {
	n, line, err := g.next(b)
	switch {
	case err != nil || line == nil:
		return n, err
	case len(line) == 0: // RFC 9112, 2.2: before a request line it means nothing
		return n, nil
	case bytes.Equal(line, prefaceHTTP):
		g.heads++
		g.state = (*guard).anything
		return n, nil
	}
	method, rest, _ := strings.Cut(string(line), " ")
	target, version, _ := strings.Cut(rest, " ")
	if method == "" || strings.ContainsFunc(method, func(r rune) bool { return r < '!' || r > '~' }) ||
		target == "" || !slices.Contains([]string{"HTTP/1.0", "HTTP/1.1"}, version) {
		return n, errRequest
	}
	g.request = head{upgrade: method == "CONNECT"}
	// The target may name the host itself (RFC 9112, 3.2.2 and 3.2.3). One that begins
	// with a slash does not, whatever stands in its path and query.
	if _, authority, ok := strings.Cut(target, "://"); ok && target[0] != '/' {
		authority, _, _ = strings.Cut(authority, "/")
		authority, _, _ = strings.Cut(authority, "?")
		g.request.hosts = append(g.request.hosts, authority)
	} else if method == "CONNECT" {
		g.request.hosts = append(g.request.hosts, target)
	}
	g.state = (*guard).field
	return n, nil
}

func (g *guard) field(b []byte) (int, error) {
	n, line, err := g.next(b)
	switch {
	case err != nil || line == nil:
		return n, err
	case len(line) == 0:
		return n, g.begin()
	}
	name, value, ok := strings.Cut(string(line), ":")
	if !ok || name == "" || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return n, errHeader // also a folded line, and a space before the colon
	}
	value = strings.Trim(value, " \t")
	h := &g.request
	switch strings.ToLower(name) {
	case "host":
		if len(h.hosts) == maxHosts {
			return n, errHeader
		}
		h.hosts = append(h.hosts, value)
	case "origin":
		if h.origin != "" {
			return n, errHeader
		}
		h.origin = value
	case "sec-fetch-site":
		h.foreign = h.foreign || strings.EqualFold(value, "cross-site")
	case "content-length":
		length, bad := strconv.ParseUint(value, 10, 63)
		if h.lengths++; bad != nil || strings.HasPrefix(value, "+") || h.lengths > 1 {
			return n, errFraming
		}
		h.length = length
	case "transfer-encoding":
		if h.chunked || !strings.EqualFold(value, "chunked") {
			return n, errFraming
		}
		h.chunked = true
	case "upgrade":
		h.upgrade = true
	}
	return n, err
}

// begin is behind a head's last line.
func (g *guard) begin() error {
	g.line, g.size = nil, 0
	g.heads++
	h := &g.request
	if err := g.judge(h); err != nil {
		return err
	}
	switch {
	case h.chunked && h.lengths > 0:
		return errFraming
	case h.upgrade: // a browser's is a WebSocket, whose head had an Origin
		g.state = (*guard).anything
	case h.chunked:
		g.state = (*guard).chunk
	case h.length > 0:
		g.left, g.state = h.length, (*guard).body
	default:
		g.state = (*guard).requestLine
	}
	return nil
}

func (g *guard) anything(b []byte) (int, error) { return len(b), nil }

func (g *guard) body(b []byte) (int, error) {
	n := min(uint64(len(b)), g.left)
	if g.left -= n; g.left == 0 {
		g.state = (*guard).requestLine
	}
	return int(n), nil
}

// chunk reads the line with a chunk's length (RFC 9112, 7.1).
func (g *guard) chunk(b []byte) (int, error) {
	n, line, err := g.next(b)
	if err != nil || line == nil {
		return n, err
	}
	g.line, g.size = nil, 0
	digits, _, _ := strings.Cut(string(line), ";")
	length, err := strconv.ParseUint(strings.TrimRight(digits, " \t"), 16, 63)
	switch {
	case err != nil || digits[0] == '+':
		return n, errChunk
	case length == 0:
		g.state = (*guard).trailer
	default:
		g.left, g.state = length, (*guard).chunkData
	}
	return n, nil
}

func (g *guard) chunkData(b []byte) (int, error) {
	n := min(uint64(len(b)), g.left)
	if g.left -= n; g.left == 0 {
		g.state = (*guard).chunkEnd
	}
	return int(n), nil
}

func (g *guard) chunkEnd(b []byte) (int, error) {
	n, line, err := g.next(b)
	switch {
	case err != nil || line == nil:
		return n, err
	case len(line) > 0:
		return n, errChunk
	}
	g.line, g.size, g.state = nil, 0, (*guard).chunk
	return n, nil
}

func (g *guard) trailer(b []byte) (int, error) {
	n, line, err := g.next(b)
	if err == nil && line != nil && len(line) == 0 {
		g.line, g.size, g.state = nil, 0, (*guard).requestLine
	}
	return n, err
}

// judge objects to a head that a page of another site has sent. A host that is an
// address is nobody's name that was pointed here; as an origin it may be anybody's.
func (g *guard) judge(h *head) error {
	for _, host := range h.hosts {
		name := hostName(host)
		if _, err := netip.ParseAddr(name); host != "" && err != nil && !g.ours(name) {
			return &foreignError{fmt.Sprintf("the request is for the host %q", host)}
		}
	}
	if h.foreign {
		return &foreignError{"the request comes from a page of another site"}
	}
	if h.origin == "" {
		return nil // no browser's, or one that only reads
	}
	// "null" is a page that hides where it is from.
	if _, from, ok := strings.Cut(h.origin, "://"); ok && (g.ours(hostName(from)) || slices.Contains(h.hosts, from)) {
		return nil
	}
	return &foreignError{fmt.Sprintf("the request comes from a page of %q", h.origin)}
}

// hostName is the host of HOST[:PORT], without the brackets of IPv6.
func hostName(text string) string {
	if h, _, err := net.SplitHostPort(text); err == nil {
		text = h
	}
	return strings.TrimSuffix(strings.ToLower(strings.Trim(text, "[]")), ".")
}

func (g *guard) ours(name string) bool {
	if ip, err := netip.ParseAddr(name); err == nil && ip.Unmap().IsLoopback() {
		return true
	}
	return name == "localhost" || strings.HasSuffix(name, ".localhost") || slices.Contains(g.hosts, name)
}
