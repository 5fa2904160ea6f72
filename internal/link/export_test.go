package link

import (
	"log/slog"
	"net"
	"net/netip"
)

// Bar has s keep a source out at a listener of its own, until end. told is who falls, as often as the
// kernel would be told; it is closed, without a word, when nobody does any more.
func (s *Server) Bar(from string) (told <-chan int, end func()) {
	ln, p := &net.TCPListener{}, make(counts, 16)
	s.sieve.open(ln, func(net.Listener) (pit, error) { return p, nil }, slog.New(slog.DiscardHandler))
	s.sieve.bar(from)
	return p, func() { s.sieve.shut(ln) }
}

type counts chan int

func (p counts) steer(all []netip.Prefix) error { p <- len(all); return nil }
func (p counts) close()                         { close(p) }
