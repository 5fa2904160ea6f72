package link

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/stream"
)

// Limits of a Server. The zero value has the defaults.
type Limits struct {
	// HalfOpen is how many lanes may be on their way to a confirmed channel;
	// default 384. Each holds at most 16 KiB and lives at most 10 s, so all of
	// them hold 6 MiB, and a process grows by no more than 16 in a flood of them.
	HalfOpen int
	// Channels is how many confirmed channels are kept; default 16,384. At the cap
	// one of a peer that has shown no credential goes, chosen by chance: anybody can
	// make identities. Where all have, the newcomer goes.
	Channels int
	// ChannelsEach is how many of them one identity may have; default 256, for as
	// many processes that share a home.
	ChannelsEach int
	// Stream limits each channel's streams.
	Stream stream.Limits
}

// The defaults of Limits.
const (
	DefaultHalfOpen = 384 // a flood costs some 12 MiB: 512 cost 16
	DefaultChannels = 16384
	defaultEach     = 256
)

const proveTime = 10 * time.Second // from accept to confirmation, absolute

// Service is what one kind of channel is for.
type Service struct {
	Config channel.Config
	// Accept takes each stream that a peer opens. It must not wait.
	Accept func(*Live, *stream.Incoming)
	// Idle ends a channel on which there was no stream for as long; 0: never. For
	// services that strangers may ask, and have no reason to stay at.
	Idle time.Duration
	// Resets is set for services whose callers want to know what has arrived: when the
	// server ends, it resets streams that are not over before it closes their channel.
	Resets bool
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
	// the connection, which it ends with ctx at the latest, and is told how many other
	// relays have passed it on. Known says that somebody whose channels count as proof was told
	// to make it: it is not held against its source. Nil closes them, and those that were
	// passed on.
	Lane   func(ctx context.Context, p channel.Preface, hops int, c net.Conn) (known bool)
	Limits Limits
	// Many reports whether an address is one that many strangers come from, as a
	// relay's is: each connection then counts as a source of its own. Nil: none is.
	Many   func(net.Addr) bool
	Logger *slog.Logger // nil: discard

	mu    sync.Mutex
	turns channel.Turns
	half  strangers
	sieve sieve
	lives map[*Live]struct{}
	each  map[identity.ID]int // lives by peer
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
	s.sieve.open(ln, digTCP(ln), log)
	defer s.unlisten(ln)
	stop := context.AfterFunc(ctx, func() { s.close(ln) })
	defer stop()
	lanes, end := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer func() {
		end()
		all.Wait()
	}()
	err := Accept(ctx, ln, log, func(c net.Conn) {
		limited, cancel := context.WithTimeout(lanes, proveTime)
		newcomer := &stranger{Conn: c, from: source(c.RemoteAddr()), cancel: cancel}
		if s.Many != nil && s.Many(c.RemoteAddr()) {
			newcomer.from, newcomer.many = c.RemoteAddr().String(), true
		}
		if _, lane := c.(*channel.Lane); lane { // its address is the relay's
			newcomer.many = true
		}
		known := !newcomer.many && s.turns.Known(newcomer.from)
		s.mu.Lock()
		in, bar := s.half.enter(newcomer, known)
		s.mu.Unlock()
		if bar {
			s.sieve.bar(newcomer.from)
		}
		if !in {
			newcomer.giveUp()
			return
		}
		all.Go(func() { s.lane(lanes, limited, newcomer, log) })
	})
	s.close(ln)                                         // whoever closed it, and whatever goes on
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
	if s.lives == nil {
		s.half.begin(s.Limits.HalfOpen)
		s.lives, s.each = make(map[*Live]struct{}), make(map[identity.ID]int)
		s.lns = make(map[net.Listener]struct{})
	}
	s.lns[ln] = struct{}{}
	return !s.away
}

// close closes ln, and first what is before it: nobody falls where nobody listens.
func (s *Server) close(ln net.Listener) {
	s.sieve.shut(ln)
	ln.Close()
}

func (s *Server) unlisten(ln net.Listener) {
	s.close(ln)
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
// that ends, or ends it with ctx. Until then it has as long as limited.
func (s *Server) lane(ctx, limited context.Context, newcomer *stranger, log *slog.Logger) {
	c, cancel := newcomer.Conn, newcomer.cancel
	p, hops, err := s.preface(limited, c)
	if err == nil && s.Lane != nil && (p.Kind == channel.KindLane || p.Kind == channel.Carrier) {
		cancel()
		s.leave(newcomer)
		if s.Lane(ctx, p, hops, c) {
			s.mu.Lock()
			s.half.proved(newcomer)
			s.mu.Unlock()
			if !newcomer.many {
				s.turns.Vouch(newcomer.from) // others of it may be on their way
				s.sieve.pardon(newcomer.from)
			}
		}
		return
	}
	var l *Live
	var opened bool
	if err == nil {
		l, opened, err = s.prove(limited, p, hops, newcomer)
	}
	cancel()
	if err != nil {
		s.leave(newcomer)
		// A stranger's failure is worth a line for whoever looks for it only.
		log.Debug("a lane did not become a channel", "from", c.RemoteAddr(), "err", err)
		return
	}
	service := s.Services[p.Kind]
	s.await(ctx, l, &service)
	s.mu.Lock()
	s.forgetLocked(l)
	s.mu.Unlock()
	if opened && service.Closed != nil {
		service.Closed(l)
	}
	log.Debug("a channel ended", "peer", l.Peer().ID(), "from", c.RemoteAddr(), "err", l.Err())
}

// await returns when a channel has ended: by itself, with ctx, or after idle
// without a stream.
func (s *Server) await(ctx context.Context, l *Live, service *Service) {
	var tick <-chan time.Time
	if service.Idle > 0 {
		t := time.NewTicker(service.Idle / 2)
		defer t.Stop()
		tick = t.C
	}
	for empty := 0; ; {
		select {
		case <-l.Done():
			return
		case <-ctx.Done():
			if service.Resets {
				l.Mux.Quit(stream.CodeAway, "the server is shutting down")
			}
			l.Close(nil)
			return
		case <-tick:
			if empty++; l.Mux.Streams() > 0 {
				empty = 0
			}
			if empty == 2 {
				l.Close(nil)
				return
			}
		}
	}
}

// preface reads what a connection is for, for as long as ctx, and how many relays
// have passed it on to this one.
func (s *Server) preface(ctx context.Context, c net.Conn) (p channel.Preface, hops int, err error) {
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	p, err = channel.ReadPreface(c)
	if err == nil && p.Kind == channel.Hop && s.Lane != nil {
		hops = p.Hops()
		p, err = channel.ReadPreface(c)
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		return p, 0, err
	}
	c.SetDeadline(time.Time{})
	return p, hops, nil
}

// prove lets a stranger show who it is, for as long as ctx.
func (s *Server) prove(ctx context.Context, p channel.Preface, hops int, who *stranger) (l *Live, opened bool, err error) {
	c := who.Conn
	service, ok := s.Services[p.Kind]
	if !ok {
		c.Close()
		return nil, false, fmt.Errorf("%v channels are not served here", p.Kind)
	}
	config := service.Config
	config.Kind = p.Kind
	config.Turns = &s.turns
	if !who.many {
		config.Source = who.from
	}
	e, err := channel.RespondAfter(ctx, c, p, &config)
	if err != nil {
		return nil, false, err
	}
	from := ""
	if a := c.RemoteAddr(); a != nil {
		from = a.String()
	}
	l = start(e, &config, false, from, s.Limits.Stream, service.Accept, func(l *Live) {
		l.Hops = hops
		if !who.many && l.Peer().Credential() != nil {
			s.sieve.pardon(who.from)
		}
		if err := s.confirmed(who, l); err != nil {
			e.Abort(channel.CloseAbuse, err)
			return
		}
		opened = true
		if service.Opened != nil {
			service.Opened(l)
		}
		// Asked once l can be found: a Drain before tells it here, one after there.
		if s.draining() {
			l.Mux.Away()
		}
	})
	return l, opened, nil
}

var (
	errFull = errors.New("too many channels")
	errEach = errors.New("this identity has too many channels")
)

// confirmed moves a lane from those that are half open to the channels, in one
// step: a confirmed one is never evicted as half open. It returns why there is no
// room.
func (s *Server) confirmed(who *stranger, l *Live) error {
	limit, each := s.Limits.Channels, s.Limits.ChannelsEach
	if limit <= 0 {
		limit = DefaultChannels
	}
	if each <= 0 {
		each = defaultEach
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.half.proved(who)
	id := l.Peer().ID()
	if s.each[id] >= each {
		return errEach
	}
	if len(s.lives) >= limit && !s.evictLocked() {
		return errFull
	}
	s.lives[l] = struct{}{}
	s.each[id]++
	return nil
}

// evictLocked gives up the channel of somebody who has shown no credential. Maps
// are walked from a place chosen by chance.
func (s *Server) evictLocked() bool {
	for l := range s.lives {
		if l.Peer().Credential() == nil {
			s.forgetLocked(l)
			go l.End.Abort(channel.CloseAbuse, errFull) // not under the lock
			return true
		}
	}
	return false
}

// forgetLocked takes a channel off the books, once.
func (s *Server) forgetLocked(l *Live) {
	if _, there := s.lives[l]; !there {
		return
	}
	delete(s.lives, l)
	if s.each[l.Peer().ID()]--; s.each[l.Peer().ID()] == 0 {
		delete(s.each, l.Peer().ID())
	}
}

func (s *Server) leave(who *stranger) {
	s.mu.Lock()
	s.half.leave(who)
	s.mu.Unlock()
}

// Drain closes the listeners and tells every channel, also those on their way,
// that this end takes no new streams. Open ones go on until Serve's context ends.
func (s *Server) Drain() {
	s.mu.Lock()
	s.away = true
	for ln := range s.lns {
		s.close(ln)
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
