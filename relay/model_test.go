package relay_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/alloc"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/outlet"
	"github.com/portal-tunnel/portal/relay"
)

// half is one reader of a stream across a relay, and the writer that it reads from.
type half struct {
	name string
	to   net.Conn // that the writer holds
	from net.Conn // that the reader holds
	seed byte

	writing sync.WaitGroup

	mu    sync.Mutex
	free  chan struct{} // closed while the reader reads
	wrote int
	ended bool // the writer has half-closed, and nothing had broken
	read  int
	over  bool
	err   error // how reading ended
	at    time.Time
}

func (h *half) byteAt(i int) byte { return byte(i>>9) ^ byte(i)*7 ^ h.seed }

func (h *half) run(t *testing.T) {
	b := make([]byte, 30<<10)
	for {
		h.mu.Lock()
		free := h.free
		h.mu.Unlock()
		<-free
		n, err := h.from.Read(b)
		h.mu.Lock()
		for i, x := range b[:n] {
			if x != h.byteAt(h.read+i) {
				t.Errorf("%s: byte %d is wrong", h.name, h.read+i)
				break
			}
		}
		if h.read += n; err != nil {
			h.over, h.err, h.at = true, err, time.Now()
		}
		h.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// write writes in the background, one after another: who does not read holds it up.
func (h *half) write(turn chan struct{}, n int) {
	h.writing.Go(func() {
		turn <- struct{}{}
		defer func() { <-turn }()
		h.mu.Lock()
		at := h.wrote
		h.mu.Unlock()
		b := make([]byte, n)
		for i := range b {
			b[i] = h.byteAt(at + i)
		}
		n, _ := h.to.Write(b)
		h.mu.Lock()
		h.wrote += n
		h.mu.Unlock()
	})
}

func (h *half) pause(stop bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	select {
	case <-h.free:
		if stop {
			h.free = make(chan struct{})
		}
	default:
		if !stop {
			close(h.free)
		}
	}
}

// crossed is a stream: what the client reads, and what the service reads.
type crossed struct {
	down, up *half
	turns    [2]chan struct{}
	broken   bool // something happened that may reset it
}

func (c *crossed) halves() []*half { return []*half{c.down, c.up} }

// life is of the credentials of the two ends. Nobody renews them but the sequence.
const life = 3 * time.Minute

// TestModelAcrossARelay drives random sequences of open, write, half-close, reset by client and service,
// stall, cut, silence, renewal, expiry, and of the relay and the outlet gone and back, and compares what
// every reader got with what may be:
//
//   - bytes are those that were written, in their places;
//   - an end comes only behind all of them, and only when the writer had ended;
//   - a reset comes only when something broke the stream;
//   - what broke all streams has reset all within its time: a cut at once, a credential's end in two
//     seconds, silence in half a minute;
//   - what nothing broke comes whole, and then its end; and in the end a new stream works.
//
// PORTAL_MODEL_SEED=N runs one sequence and tells it.
func TestModelAcrossARelay(t *testing.T) {
	first, runs := uint64(0), uint64(1000)
	switch {
	case long() && alloc.Raced:
		runs = 150
	case long():
		runs = 10000
	case alloc.Raced:
		runs = 40
	}
	seed, one := os.LookupEnv("PORTAL_MODEL_SEED")
	if one {
		n, err := strconv.ParseUint(seed, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		first, runs = n, 1
	}
	t.Run("seeds", func(t *testing.T) {
		const apart = 2 // so many at a time, each in a time of its own
		for from := first; from < first+min(apart, runs); from++ {
			t.Run(fmt.Sprint("from ", from), func(t *testing.T) {
				t.Parallel()
				for seed := from; seed < first+runs && !t.Failed(); seed += apart {
					var trace []string
					in(t, func(w *town) { modelled(w, rand.New(rand.NewPCG(seed, 7)), &trace) })
					if t.Failed() || one {
						t.Logf("seed %d:\n%s", seed, strings.Join(trace, "\n"))
					}
				}
			})
		}
	})
	if !t.Failed() {
		t.Logf("F-36: %d sequences across a relay: model and system agree", runs)
	}
}

func modelled(w *town, rng *rand.Rand, trace *[]string) {
	t := w.T
	begin := time.Now()
	note := func(format string, a ...any) {
		*trace = append(*trace, fmt.Sprintf("%8.3f ", time.Since(begin).Seconds())+fmt.Sprintf(format, a...))
	}
	forLong := func(s *relay.Server) { w.issue(s.Self, identity.Attributes{"relay": true}, 24*time.Hour) }
	_, stopRelay := w.relay(forLong)
	came := make(chan net.Conn, 1)
	target := func(context.Context, *outlet.Request) (net.Conn, error) {
		a, b := memnet.Pipe(memnet.Link{})
		came <- b
		return a, nil
	}
	db1, bot := w.stranger(), w.stranger()
	issue := func(self *identity.Self, attrs identity.Attributes, life time.Duration) {
		// One that would end before the one that is there is refused.
		if has := self.Credential(); has == nil || time.Until(has.Expires) < life-time.Second {
			w.issue(self, attrs, life)
		}
	}
	renew := func() {
		issue(db1, serves("db"), life)
		issue(bot, agent, life)
	}
	renew()
	_, stopOutlet := w.outlet("db", db1, target, nil)
	s := w.inlet("db", bot, w.client(bot, nil))

	var streams []*crossed
	var readers sync.WaitGroup
	open := func() *crossed {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		client, err := s.Dial(ctx)
		if err != nil {
			t.Errorf("%v after the beginning: opening a stream: %v", time.Since(begin), err)
			return nil
		}
		service := <-came
		n := len(streams)
		c := &crossed{turns: [2]chan struct{}{make(chan struct{}, 1), make(chan struct{}, 1)}}
		free := make(chan struct{})
		close(free)
		c.down = &half{name: fmt.Sprintf("download %d", n), to: service, from: client, seed: byte(2 * n), free: free}
		c.up = &half{name: fmt.Sprintf("upload %d", n), to: client, from: service, seed: byte(2*n + 1), free: free}
		streams = append(streams, c)
		for _, h := range c.halves() {
			readers.Go(func() { h.run(t) })
		}
		return c
	}
	// breaks marks all streams: they may be reset from now on. done waits, and wants them to be over.
	breaks := func() {
		for _, c := range streams {
			c.broken = true
		}
	}
	done := func(within time.Duration) {
		for _, c := range streams {
			c.down.pause(false)
			c.up.pause(false)
		}
		w.sleep(within)
		for _, c := range streams {
			for _, h := range c.halves() {
				h.mu.Lock()
				if !h.over {
					t.Errorf("%s goes on %v after it was broken", h.name, within)
				}
				h.mu.Unlock()
			}
		}
		for _, c := range streams {
			c.down.to.Close()
			c.up.to.Close()
		}
	}

	// each does something to every connection that has been dialled.
	each := func(do func(*memnet.Conn)) []*memnet.Conn {
		w.mu.Lock()
		all := w.dialled
		w.dialled = nil
		w.mu.Unlock()
		for _, conn := range all {
			do(conn)
		}
		return all
	}

	open()
	for range 30 {
		if t.Failed() {
			return
		}
		if len(streams) == 0 {
			return
		}
		i := rng.IntN(len(streams))
		c := streams[i]
		k := rng.IntN(2)
		h := c.halves()[k]
		switch op := rng.IntN(40); {
		case op < 4 && len(streams) < 14:
			note("open %d", len(streams))
			if open() == nil {
				return
			}
		case op < 16:
			n := 1 + rng.IntN(150<<10)
			note("%s: %d bytes are written", h.name, n)
			h.write(c.turns[k], n)
		case op < 21:
			note("%s: ends", h.name)
			h.writing.Go(func() {
				c.turns[k] <- struct{}{} // behind what is being written
				defer func() { <-c.turns[k] }()
				err := h.to.(interface{ CloseWrite() error }).CloseWrite()
				h.mu.Lock()
				h.ended = h.ended || err == nil
				h.mu.Unlock()
			})
		case op < 24:
			note("%s: its reader stalls", h.name)
			h.pause(true)
		case op < 27:
			note("%s: its reader goes on", h.name)
			h.pause(false)
		case op < 29:
			note("stream %d: a reset by the client", i)
			c.broken = true
			c.up.to.(*inlet.Conn).Reset(stream.CodeLocal, "")
		case op < 31:
			note("stream %d: a reset by the service", i)
			c.broken = true
			c.down.to.(*memnet.Conn).SetLinger(0)
			c.down.to.Close()
		case op < 33:
			note("both credentials are renewed")
			renew()
		case op < 34:
			who, self, other, attrs := "bot's", bot, db1, serves("db")
			if rng.IntN(2) == 0 {
				who, self, other, attrs = "db1's", db1, bot, agent
			}
			note("%s credential ends", who)
			issue(other, attrs, time.Until(self.Credential().Expires)+life)
			time.Sleep(time.Until(self.Credential().Expires))
			breaks()
			done(2 * time.Second)
			streams = nil
			renew()
			w.sleep(time.Minute) // whoever was refused asks again each 30 s
			if open() == nil {
				return
			}
		case op < 35:
			note("every connection is cut")
			breaks()
			each((*memnet.Conn).Cut)
			done(time.Second)
			streams = nil
			if open() == nil {
				return
			}
		case op < 36:
			note("every connection is silent")
			breaks()
			all := each((*memnet.Conn).Stall)
			done(35 * time.Second)
			for _, conn := range all {
				conn.Cut()
			}
			streams = nil
			renew()
			if open() == nil {
				return
			}
		case op < 37:
			note("the outlet is gone and back")
			breaks()
			stopOutlet()
			done(time.Second)
			streams = nil
			_, stopOutlet = w.outlet("db", db1, target, nil)
			if open() == nil {
				return
			}
		case op < 38:
			note("the relay is gone and back")
			breaks()
			stopRelay()
			done(time.Second)
			streams = nil
			_, stopRelay = w.relay(forLong)
			if open() == nil {
				return
			}
		default:
			d := time.Duration(rng.IntN(int(10 * time.Second)))
			note("%v go by", d.Round(time.Millisecond))
			time.Sleep(d)
			if time.Until(bot.Credential().Expires) < 30*time.Second || time.Until(db1.Credential().Expires) < 30*time.Second {
				renew() // its end is an event of its own
			}
		}
		if rng.IntN(2) == 0 {
			synctest.Wait()
		}
	}

	note("everybody reads, and what is not broken ends")
	renew()
	for _, c := range streams {
		c.down.pause(false)
		c.up.pause(false)
	}
	w.sleep(5 * time.Second)
	for _, c := range streams {
		for _, h := range c.halves() {
			h.writing.Wait()
			if err := h.to.(interface{ CloseWrite() error }).CloseWrite(); err == nil {
				h.mu.Lock()
				h.ended = true
				h.mu.Unlock()
			}
		}
	}
	w.sleep(5 * time.Second)
	for _, c := range streams {
		for _, h := range c.halves() {
			h.mu.Lock()
			judge(t, c, h)
			h.mu.Unlock()
		}
		c.down.to.Close()
		c.up.to.Close()
	}
	readers.Wait()
	if t.Failed() {
		return
	}
	last := open() // after all of that
	if last == nil {
		return
	}
	last.up.write(last.turns[1], 5)
	last.up.writing.Wait()
	w.sleep(time.Second)
	if last.up.read != 5 {
		t.Errorf("the last stream: %d of 5 bytes", last.up.read)
	}
	last.down.to.Close()
	last.up.to.Close()
	readers.Wait()
}

// judge compares a reader's end with the model; the half's lock is held.
func judge(t *testing.T, c *crossed, h *half) {
	switch {
	case !h.over:
		t.Errorf("%s is not over; %d of %d bytes were read", h.name, h.read, h.wrote)
	case h.err == io.EOF && (!h.ended || h.read != h.wrote):
		t.Errorf("%s: a clean end after %d of %d bytes; its writer ended: %v", h.name, h.read, h.wrote, h.ended)
	case h.err != io.EOF && !errors.Is(h.err, syscall.ECONNRESET) && !errors.Is(h.err, net.ErrClosed):
		t.Errorf("%s ended with %v", h.name, h.err)
	case h.err != io.EOF && !c.broken:
		t.Errorf("%s: %v, and nothing broke it", h.name, h.err)
	}
}
