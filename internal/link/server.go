package link

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
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
	// Opened is told each confirmed channel before its first stream; it must not
	// wait. Nil does nothing.
	Opened func(*Live)
}

// Server accepts lanes and serves each channel's kind.
type Server struct {
	Services map[channel.Kind]Service
	Limits   Limits
	Logger   *slog.Logger // nil: discard

	mu    sync.Mutex
	half  map[net.Conn]string // lanes that have not proved themselves, by source
	lives map[*Live]struct{}
	away  bool
	all   sync.WaitGroup
}

// Serve accepts lanes from ln until ctx ends, then closes every channel in good
// order and returns when all of them are gone. It owns ln. Several listeners
// may be served at once.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	log := s.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s.mu.Lock()
	if s.half == nil {
		s.half, s.lives = make(map[net.Conn]string), make(map[*Live]struct{})
	}
	s.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	var failed error
	for pause := time.Duration(0); ; {
		c, err := ln.Accept()
		if err == nil {
			pause = 0
			s.all.Go(func() { s.lane(ctx, c, log) })
			continue
		}
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			break
		}
		var temporary interface{ Temporary() bool }
		if !errors.As(err, &temporary) || !temporary.Temporary() {
			failed = fmt.Errorf("accepting lanes on %v: %w", ln.Addr(), err)
			break
		}
		// Out of descriptors: wait for some to come back.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		log.Warn("accepting lanes", "err", err, "again in", pause)
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
	ln.Close()
	s.close()
	s.all.Wait()
	return failed
}

// close ends what is half open and closes every channel.
func (s *Server) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.half {
		c.Close()
	}
	for l := range s.lives {
		s.all.Go(func() { l.Close(nil) })
	}
}

// lane takes one accepted connection to a confirmed channel and serves it.
func (s *Server) lane(ctx context.Context, c net.Conn, log *slog.Logger) {
	s.enter(c)
	limited, cancel := context.WithTimeout(ctx, proveTime)
	l, err := s.prove(limited, c)
	cancel()
	s.leave(c)
	if err != nil {
		// A stranger's failure is worth a line for whoever looks for it only.
		log.Debug("a lane did not become a channel", "from", c.RemoteAddr(), "err", err)
		return
	}
	<-l.Done()
	s.mu.Lock()
	delete(s.lives, l)
	s.mu.Unlock()
	log.Debug("a channel ended", "peer", l.Peer().ID(), "from", c.RemoteAddr(), "err", l.Err())
}

func (s *Server) prove(ctx context.Context, c net.Conn) (*Live, error) {
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	p, err := channel.ReadPreface(c)
	if err != nil {
		c.Close()
		return nil, err
	}
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
	s.mu.Lock()
	full := len(s.lives) >= s.channels()
	if full {
		s.mu.Unlock()
		e.Abort(channel.CloseAbuse, errors.New("too many channels"))
		return nil, errors.New("too many channels")
	}
	l := start(e, &config, false, from, s.Limits.Stream, service.Accept)
	s.lives[l] = struct{}{}
	away := s.away
	s.mu.Unlock()
	if service.Opened != nil {
		service.Opened(l)
	}
	if away {
		l.Mux.Away()
	}
	if ctx.Err() != nil { // closing down since
		s.all.Go(func() { l.Close(nil) })
	}
	return l, nil
}

func (s *Server) channels() int {
	if s.Limits.Channels > 0 {
		return s.Limits.Channels
	}
	return defaultChannels
}

// enter counts c as half open. At the cap one lane of the source that has most
// of them goes, chosen by chance; never the newcomer, who may be honest.
func (s *Server) enter(c net.Conn) {
	source := ""
	if a := c.RemoteAddr(); a != nil {
		source = a.String()
		if host, _, err := net.SplitHostPort(source); err == nil {
			source = host
		}
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
	s.half[c] = source
}

func (s *Server) leave(c net.Conn) {
	s.mu.Lock()
	delete(s.half, c)
	s.mu.Unlock()
}

// Drain tells every channel, also those to come, that this end takes no new
// streams.
func (s *Server) Drain() {
	s.mu.Lock()
	s.away = true
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
