package link

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/stream"
)

// Limits of a Server. The zero value has the defaults.
type Limits struct {
	// HalfOpen is how many lanes may be on their way to a confirmed channel;
	// default 1,024. Each holds at most 16 KiB and lives at most 10 s, so all of
	// them hold 16 MiB.
	HalfOpen int
	// Channels is how many confirmed channels are kept; default 16,384.
	Channels int
	// Stream limits each channel's streams.
	Stream stream.Limits
}

const (
	defaultHalfOpen = 1024
	defaultChannels = 16384
	proveTime       = 10 * time.Second // from accept to confirmation, absolute
)

// Service is what one kind of channel is for.
type Service struct {
	Config channel.Config
	// Accept takes each stream that a peer opens. It must not wait.
	Accept func(*Live, *stream.Incoming)
	// Opened is told each confirmed channel before its first stream; it must
	// neither wait nor close it. Nil does nothing.
	Opened func(*Live)
	// Closed is told each of them when it has ended. Nil does nothing.
	Closed func(*Live)
}

// Server accepts lanes and serves each channel's kind.
type Server struct {
	Services map[channel.Kind]Service
	// Lane takes connections that are no channels of this node but parts of a
	// relay's (kinds lane and carrier), on the connection's own goroutine. It owns
	// the connection, which it ends with ctx at the latest. Nil closes them.
	Lane   func(ctx context.Context, p channel.Preface, c net.Conn)
	Limits Limits
	// Many reports whether an address is one that many strangers come from, as a
	// relay's is: each connection then counts as a source of its own. Nil: none is.
	Many   func(net.Addr) bool
	Logger *slog.Logger // nil: discard

	mu    sync.Mutex
	half  map[net.Conn]string // lanes that have not proved themselves, by source
	lives map[*Live]struct{}
	lns   map[net.Listener]struct{}
	away  bool
}

// Serve accepts lanes from ln until ctx ends, then closes every channel of them
// in good order and returns when all of them are gone. It owns ln. Several
// listeners may be served at once.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	log := s.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if !s.listen(ln) {
		ln.Close()
	}
	defer s.unlisten(ln)
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	lanes, end := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer func() {
		end()
		all.Wait()
	}()
	err := Accept(ctx, ln, log, func(c net.Conn) {
		s.enter(c)
		all.Go(func() { s.lane(lanes, c, log) })
	})
	if err == nil && ctx.Err() == nil && s.draining() { // what was accepted goes on
		<-ctx.Done()
	}
	return err
}

// Accept gives each connection of ln to f until ln is closed, which the end of
// ctx does too and is no error. A process that is out of descriptors waits for
// some to come back.
func Accept(ctx context.Context, ln net.Listener, log *slog.Logger, f func(net.Conn)) error {
	for pause := time.Duration(0); ; {
		c, err := ln.Accept()
		if err == nil {
			pause = 0
			f(c)
			continue
		}
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return nil
		}
		var temporary interface{ Temporary() bool }
		if !errors.As(err, &temporary) || !temporary.Temporary() {
			return fmt.Errorf("accepting connections on %v: %w", ln.Addr(), err)
		}
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		log.Warn("accepting connections", "on", ln.Addr(), "err", err, "again in", pause)
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

// listen notes ln for Drain; false when this end is going away already.
func (s *Server) listen(ln net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.half == nil {
		s.half, s.lives = make(map[net.Conn]string), make(map[*Live]struct{})
		s.lns = make(map[net.Listener]struct{})
	}
	s.lns[ln] = struct{}{}
	return !s.away
}

func (s *Server) unlisten(ln net.Listener) {
	ln.Close()
	s.mu.Lock()
	delete(s.lns, ln)
	s.mu.Unlock()
}

func (s *Server) draining() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.away
}

// lane takes one accepted connection to a confirmed channel and serves it until
// that ends, or ends it with ctx.
func (s *Server) lane(ctx context.Context, c net.Conn, log *slog.Logger) {
	limited, cancel := context.WithTimeout(ctx, proveTime)
	p, err := s.preface(limited, c)
	if err == nil && s.Lane != nil && (p.Kind == channel.KindLane || p.Kind == channel.Carrier) {
		cancel()
		s.leave(c)
		s.Lane(ctx, p, c)
		return
	}
	var l *Live
	if err == nil {
		l, err = s.prove(limited, p, c)
	}
	cancel()
	if err != nil {
		s.leave(c)
		// A stranger's failure is worth a line for whoever looks for it only.
		log.Debug("a lane did not become a channel", "from", c.RemoteAddr(), "err", err)
		return
	}
	select {
	case <-l.Done():
	case <-ctx.Done():
		l.Close(nil)
	}
	s.mu.Lock()
	_, opened := s.lives[l]
	delete(s.lives, l)
	s.mu.Unlock()
	if f := s.Services[p.Kind].Closed; f != nil && opened {
		f(l)
	}
	log.Debug("a channel ended", "peer", l.Peer().ID(), "from", c.RemoteAddr(), "err", l.Err())
}

// preface reads what a connection is for, for as long as ctx.
func (s *Server) preface(ctx context.Context, c net.Conn) (channel.Preface, error) {
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	p, err := channel.ReadPreface(c)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		return p, err
	}
	c.SetDeadline(time.Time{})
	return p, nil
}

// prove lets a stranger show who it is, for as long as ctx.
func (s *Server) prove(ctx context.Context, p channel.Preface, c net.Conn) (*Live, error) {
	service, ok := s.Services[p.Kind]
	if !ok {
		c.Close()
		return nil, fmt.Errorf("%v channels are not served here", p.Kind)
	}
	config := service.Config
	config.Kind = p.Kind
	e, err := channel.RespondAfter(ctx, c, p, &config)
	if err != nil {
		return nil, err
	}
	from := ""
	if a := c.RemoteAddr(); a != nil {
		from = a.String()
	}
	full := errors.New("too many channels")
	l := start(e, &config, false, from, s.Limits.Stream, service.Accept, func(l *Live) {
		if !s.confirmed(c, l) {
			e.Abort(channel.CloseAbuse, full)
			return
		}
		if service.Opened != nil {
			service.Opened(l)
		}
		// Asked once l can be found: a Drain before tells it here, one after there.
		if s.draining() {
			l.Mux.Away()
		}
	})
	return l, nil
}

// confirmed moves a lane from those that are half open to the channels, in one
// step: a confirmed one is never evicted. It reports whether there was room.
func (s *Server) confirmed(c net.Conn, l *Live) bool {
	limit := s.Limits.Channels
	if limit <= 0 {
		limit = defaultChannels
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.half, c)
	if len(s.lives) >= limit {
		return false
	}
	s.lives[l] = struct{}{}
	return true
}

// enter counts c as half open. At the cap one lane of the source that has most
// of them goes, chosen by chance; never the newcomer, who may be honest.
func (s *Server) enter(c net.Conn) {
	from := source(c.RemoteAddr())
	if s.Many != nil && s.Many(c.RemoteAddr()) {
		from = c.RemoteAddr().String()
	}
	limit := s.Limits.HalfOpen
	if limit <= 0 {
		limit = defaultHalfOpen
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.half) >= limit {
		count := make(map[string]int)
		most := ""
		for _, from := range s.half {
			if count[from]++; count[from] > count[most] {
				most = from
			}
		}
		i := rand.IntN(count[most])
		for old, from := range s.half {
			if from != most {
				continue
			}
			if i == 0 {
				delete(s.half, old)
				old.Close()
				break
			}
			i--
		}
	}
	s.half[c] = from
}

// source is whom a lane is counted for: an address, of IPv6 its /64, which one
// host has the whole of.
func source(a net.Addr) string {
	if a == nil {
		return ""
	}
	host, _, err := net.SplitHostPort(a.String())
	if err != nil {
		return a.String()
	}
	if ip, err := netip.ParseAddr(host); err == nil && ip.Is6() && !ip.Is4In6() {
		prefix, _ := ip.WithZone("").Prefix(64)
		return prefix.String()
	}
	return host
}

func (s *Server) leave(c net.Conn) {
	s.mu.Lock()
	delete(s.half, c)
	s.mu.Unlock()
}

// Drain closes the listeners and tells every channel, also those on their way,
// that this end takes no new streams. Open ones go on until Serve's context ends.
func (s *Server) Drain() {
	s.mu.Lock()
	s.away = true
	for ln := range s.lns {
		ln.Close()
	}
	s.mu.Unlock()
	for _, l := range s.Lives() {
		l.Mux.Away()
	}
}

// Lives is a snapshot of the confirmed channels.
func (s *Server) Lives() []*Live {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*Live, 0, len(s.lives))
	for l := range s.lives {
		all = append(all, l)
	}
	return all
}
