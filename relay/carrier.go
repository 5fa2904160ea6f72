package relay

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/stream"
)

// Carrier is how lanes come to an outlet.
type Carrier uint8

const (
	// DialBack opens a connection for each lane. Both sides of it are sockets, which
	// the kernel joins. The default.
	DialBack Carrier = iota
	// Yamux has one connection more than the control channel's, and lanes as streams
	// in it: for networks that allow few.
	Yamux
)

func (c Carrier) String() string { return [...]string{"dial-back", "yamux"}[c] }

// ParseCarrier reads "dial-back" or "yamux".
func ParseCarrier(s string) (Carrier, error) {
	for _, c := range []Carrier{DialBack, Yamux} {
		if s == c.String() {
			return c, nil
		}
	}
	return 0, fmt.Errorf("there is no carrier %q: it is dial-back or yamux", s)
}

const (
	// carrierLanes bounds the lanes of one carrier, and DefaultCarriedWindow what each may
	// have on its way: together 64 MiB at each end.
	carrierLanes = 64
	// At so many streams nothing is offered: those that are over here and not at the other end hold
	// their windows for as long as twice lingerTime. Each offer of the last minute that was not
	// answered counts as one: it is good for a stream, which may come late.
	carrierStreams = 2 * carrierLanes
	owedTime       = time.Minute
	buryEvery      = 100 * time.Millisecond
)

// carrierConfig settles what yamux's defaults get wrong here: an open that is not
// acknowledged at once would end the session (StreamOpenTimeout), and a lane that
// has ended one way has lingerTime for the other.
func carrierConfig(log *slog.Logger, window int) *yamux.Config {
	c := yamux.DefaultConfig()
	c.AcceptBacklog = carrierLanes
	c.KeepAliveInterval = 10 * time.Second
	c.ConnectionWriteTimeout = 15 * time.Second
	c.MaxStreamWindowSize = uint32(window)
	c.StreamOpenTimeout = 0
	c.StreamCloseTimeout = 2 * lingerTime
	c.LogOutput, c.Logger = nil, slog.NewLogLogger(log.Handler(), slog.LevelDebug)
	return c
}

const (
	// yamux answers each ping on a goroutine of its own, which stays for 15 s while
	// nothing can be written. An honest end pings once in 10 s.
	pingBurst     = 16
	pingPerSecond = 1
)

var errPings = errors.New("the carrier pings without end")

// wary is a carrier's connection that fails when the other end pings without end. It
// follows yamux's frames: version (1) | type (1) | flags (2) | stream (4) | length (4),
// and behind that, for data alone, as many bytes.
type wary struct {
	net.Conn
	head  [12]byte // of the frame that is being read
	has   int      // bytes of it
	body  uint32   // bytes of the frame still to come
	pings float64  // the bucket's level
	at    time.Time
}

func (c *wary) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	for rest := b[:n]; len(rest) > 0; {
		if c.body > 0 {
			k := min(int64(c.body), int64(len(rest)))
			c.body -= uint32(k)
			rest = rest[k:]
			continue
		}
		k := copy(c.head[c.has:], rest)
		rest = rest[k:]
		if c.has += k; c.has < len(c.head) {
			break
		}
		c.has = 0
		const data, ping, asks = 0, 2, 1
		switch kind, flags := c.head[1], binary.BigEndian.Uint16(c.head[2:]); {
		case kind == data:
			c.body = binary.BigEndian.Uint32(c.head[8:])
		case kind == ping && flags&asks != 0 && !c.pinged():
			return 0, errPings
		}
	}
	return n, err
}

// pinged counts a ping, and is false when that is one too many.
func (c *wary) pinged() bool {
	now := time.Now()
	c.pings = max(0, c.pings-now.Sub(c.at).Seconds()*pingPerSecond) + 1
	c.at = now
	return c.pings <= pingBurst
}

// carried is a lane in a carrier. yamux's Close is a half-close: reading goes on
// until the other end closes too.
type carried struct {
	*yamux.Stream
	once sync.Once
	of   *carrier // at the relay: where it counts until it is gone
	over func()   // told when it is closed
}

// CloseWrite ends this direction.
func (c *carried) CloseWrite() error { return c.Stream.Close() }

// Close ends both and frees whoever reads or writes. What it has to say may wait for the session,
// up to ConnectionWriteTimeout: a goroutine does, which ends with the session at the latest.
func (c *carried) Close() error {
	c.once.Do(func() {
		c.Stream.SetDeadline(time.Unix(1, 0))
		go func() {
			c.Stream.Close()
			if c.over != nil {
				c.over()
			}
			if c.of != nil {
				c.of.bury(c.Stream)
			}
		}()
	})
	return nil
}

// carrier is the relay's end of an outlet's second connection. It outlives its
// registration, as lanes do, until the last of them is over.
type carrier struct {
	server  *Server
	conn    net.Conn // under session
	session *yamux.Session
	member  *member     // whose it is
	hops    int         // relays that have passed conn on, and so every lane in it
	lanes   int         // offered or there; under the server's lock, as what follows
	owed    []time.Time // when what has not come as a stream was offered, the oldest first
	retired bool        // no more will come
	dead    bool        // the session has ended
}

// attach invites the outlet's carrier and starts taking its lanes.
func (r *registration) attach(ctx context.Context) error {
	s := r.server
	e := s.expect(channel.Carrier, true)
	if err := r.tell(offer{kind: offerCarrier, id: e.id}); err != nil {
		e.forget()
		return err
	}
	conn, err := e.wait(ctx, showTime, r.conn.Done())
	if err != nil {
		return err
	}
	session, err := yamux.Server(&wary{Conn: conn}, carrierConfig(s.log, s.Limits.CarriedWindow))
	if err != nil {
		stream.Abort(conn)
		return err
	}
	r.carrier = &carrier{server: s, conn: conn, session: session, member: r.member, hops: e.hops}
	s.all.Go(func() {
		defer context.AfterFunc(s.stop, func() { session.Close() })()
		for {
			lane, err := session.AcceptStream()
			if err != nil {
				r.conn.Reset(stream.CodeTarget, "the carrier is gone")
				session.Close() // also when it is only slow: a stream that nobody accepts counts nowhere
				r.carrier.die()
				return
			}
			s.all.Go(func() { r.lane(lane) })
		}
	})
	return nil
}

func (c *carrier) retire() {
	c.server.mu.Lock()
	c.retired = true
	empty := c.lanes == 0
	c.server.mu.Unlock()
	if empty {
		c.close()
	}
}

// reserve takes a place for a lane that is about to be offered; give gives it back. Among the lanes of all
// carriers the offer counts until a minute is over, or the stream that came for it is gone.
func (c *carrier) reserve() error {
	streams := c.session.NumStreams() // not under the lock: yamux may hold its own while it writes
	now := time.Now()
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	c.forgetLocked(now.Add(-owedTime))
	if c.dead || c.fullLocked() || streams+len(c.owed) >= carrierStreams {
		return errCarrierFull
	}
	c.owed = append(c.owed, now)
	c.lanes++
	c.countLocked(1)
	return nil
}

// countLocked counts n more among the lanes of all carriers.
func (c *carrier) countLocked(n int) {
	c.member.carried += n
	c.server.carried += n
}

// forgetLocked forgets the offers until then that have not come as a stream.
func (c *carrier) forgetLocked(until time.Time) {
	n := 0
	for n < len(c.owed) && !c.owed[n].After(until) {
		n++
	}
	c.owed = c.owed[n:]
	c.countLocked(-n)
}

// forget is forgetLocked of what was offered a minute ago.
func (c *carrier) forget() {
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	c.forgetLocked(time.Now().Add(-owedTime))
}

// die is told that no stream will come any more.
func (c *carrier) die() {
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	c.dead = true
	c.forgetLocked(time.Now())
}

// fullLocked reports whether it takes no more lanes.
func (c *carrier) fullLocked() bool {
	most := c.server.Limits.Carried
	return c.lanes >= carrierLanes || c.server.carried >= most || c.member.carried >= max(most/2, 1)
}

// owes counts a stream that has come, and is false when none was offered. The stream has the offer's
// place among the lanes of all carriers.
func (c *carrier) owes() bool {
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	if len(c.owed) == 0 {
		return false
	}
	c.owed = c.owed[1:]
	return true
}

// bury waits until a stream that is closed here is gone, and gives back what it counted for. yamux keeps
// what comes for it until the outlet has closed it too, or for StreamCloseTimeout.
func (c *carrier) bury(y *yamux.Stream) {
	t := time.NewTicker(buryEvery)
	defer t.Stop()
	b := make([]byte, 4<<10)
	for end := time.Now().Add(2 * lingerTime); time.Now().Before(end); {
		// Its deadline is over: a read takes what is there, and never waits.
		_, err := y.Read(b)
		if err == nil {
			continue
		}
		if err != yamux.ErrTimeout {
			break
		}
		select {
		case <-t.C:
			continue
		case <-c.session.CloseChan():
		case <-c.server.stop.Done():
		}
		break
	}
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	c.countLocked(-1)
}

// give gives back the place in the carrier.
func (c *carrier) give() {
	c.server.mu.Lock()
	c.lanes--
	last := c.retired && c.lanes == 0
	c.server.mu.Unlock()
	if last {
		c.close()
	}
}

// close ends a carrier without lanes as TCP ends: what its last lane wrote is
// delivered.
func (c *carrier) close() {
	stream.Disarm(c.conn)
	c.session.Close()
}

// lane takes one stream of the carrier, which shows the id of a lane. One that nothing was offered for is
// none of an honest outlet's, and holds a window: the carrier ends. One that ends before it has shown an
// id is given up alone: its outlet may have had no more time for it, and the others' lanes are whole.
func (r *registration) lane(y *yamux.Stream) {
	if !r.carrier.owes() {
		r.carrier.session.Close()
		return
	}
	c := &carried{Stream: y, of: r.carrier}
	c.SetReadDeadline(time.Now().Add(showTime))
	p, err := channel.ReadPreface(c)
	if err != nil || p.Kind != channel.KindLane {
		c.Close()
		if err == nil || errors.Is(err, channel.ErrPreface) { // no outlet says that
			r.carrier.session.Close()
		}
		return
	}
	c.SetReadDeadline(time.Time{})
	r.server.show(r.server.stop, p, r.carrier.hops, c)
}
