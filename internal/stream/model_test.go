package stream_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/internal/alloc"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
)

// at is byte off of direction dir of stream id: every byte of a test is known.
func at(id uint32, dir int, off int) byte { return byte(off>>8+off) ^ byte(id)<<3 ^ byte(dir)<<7 }

// party is one end of a stream in the model, with the goroutine that reads it.
type party struct {
	s     *stream.Conn
	id    uint32
	dir   int // of what it writes
	other *party

	writes chan struct{} // one Write at a time; a channel, because a wait for a mutex is not durable

	mu      sync.Mutex
	stalled bool
	changed chan struct{} // closed when stalled ends
	wrote   int           // counted by Write
	read    int
	err     error // how reading ended; nil: not yet

	// The model.
	ended bool
	reset bool  // either end was
	over  error // how reading must end; nil: in good order
}

func (p *party) reader(t *testing.T) {
	b := make([]byte, 40<<10)
	for {
		p.mu.Lock()
		stalled, changed := p.stalled, p.changed
		p.mu.Unlock()
		if stalled {
			<-changed
			continue
		}
		n, err := p.s.Read(b)
		p.mu.Lock()
		for i, x := range b[:n] {
			if x != at(p.id, p.other.dir, p.read+i) {
				t.Errorf("stream %d: byte %d is wrong", p.id, p.read+i)
				break
			}
		}
		p.read += n
		p.err = err
		p.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (p *party) write(n int) error {
	p.writes <- struct{}{}
	defer func() { <-p.writes }()
	p.mu.Lock()
	off := p.wrote
	p.mu.Unlock()
	b := make([]byte, n)
	for i := range b {
		b[i] = at(p.id, p.dir, off+i)
	}
	n, err := p.s.Write(b)
	p.mu.Lock()
	p.wrote += n
	p.mu.Unlock()
	return err
}

func (p *party) resume() {
	p.mu.Lock()
	if p.stalled {
		p.stalled = false
		close(p.changed)
	}
	p.mu.Unlock()
}

// TestModel drives random sequences of open, write, half-close, reset,
// stall and cut, and compares what every reader got with a model of ten lines:
//
//   - a reader that the other end's end has not reached is reset by a reset of
//     either end and by a cut of the lane;
//   - one whose stream is over on the wire, both ends having been sent, is reset
//     only by its own end, and that only while bytes are unread;
//   - everybody else reads exactly what was written, and then io.EOF.
//
// Every second run has a link with latency and a rate, where an event overtakes
// others on the way; there only the last and the bytes are known.
func TestModel(t *testing.T) {
	runs := uint64(1000)
	if os.Getenv("PORTAL_LONG") != "" {
		runs = 100000
	}
	if alloc.Raced {
		runs /= 20
	}
	for seed := range runs {
		sequence(t, seed)
	}
	t.Logf("F-36: %d sequences of one channel: model and system agree", runs)
}

// sequence runs the one that a seed makes.
func sequence(t *testing.T, seed uint64) {
	t.Helper()
	link := memnet.Link{}
	exact := seed%2 == 0
	if !exact {
		link = memnet.Link{Latency: 20 * time.Millisecond, Rate: 10_000_000}
	}
	var trace []string
	virtual(t, link, stream.Limits{}, func(w *world) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var parties []*party
		var all sync.WaitGroup
		cut := false
		note := func(format string, a ...any) { trace = append(trace, fmt.Sprintf(format, a...)) }
		settle := func() {
			if exact {
				synctest.Wait()
			} else if rng.IntN(3) == 0 {
				time.Sleep(time.Duration(rng.IntN(60)) * time.Millisecond)
			}
		}
		// broken marks what a reset of p, or of the lane when p is nil, does.
		broken := func(q *party, own bool) {
			q.other.mu.Lock()
			wrote := q.other.wrote
			q.other.mu.Unlock()
			q.mu.Lock()
			defer q.mu.Unlock()
			over := q.ended && q.other.ended && !(own && q.read < wrote)
			if q.over == nil && q.err == nil && !over {
				q.over = syscall.ECONNRESET
			}
		}
		for range 40 {
			if cut {
				break
			}
			op := rng.IntN(20)
			if len(parties) == 0 || op == 0 && len(parties) < 12 {
				c, d := w.open()
				note("open %d", c.ID())
				p := &party{s: c, id: c.ID(), dir: 0, writes: make(chan struct{}, 1)}
				q := &party{s: d, id: d.ID(), dir: 1, writes: make(chan struct{}, 1)}
				p.other, q.other = q, p
				parties = append(parties, p, q)
				for _, p := range []*party{p, q} {
					all.Go(func() { p.reader(t) })
				}
				settle()
				continue
			}
			p := parties[rng.IntN(len(parties))]
			who := fmt.Sprintf("%d.%d", p.id, p.dir)
			switch {
			case op < 9:
				n := 1 + rng.IntN(100<<10)
				note("%s writes %d", who, n)
				all.Go(func() {
					err := p.write(n)
					if err != nil && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, net.ErrClosed) {
						t.Errorf("%s: Write: %v", who, err)
					}
				})
			case op < 12:
				note("%s half-closes", who)
				err := p.s.CloseWrite()
				if err == nil {
					p.ended = true
				} else if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%s: CloseWrite: %v", who, err)
				}
			case op < 15:
				note("%s stalls", who)
				p.mu.Lock()
				if !p.stalled {
					p.stalled, p.changed = true, make(chan struct{})
				}
				p.mu.Unlock()
			case op < 18:
				note("%s resumes", who)
				p.resume()
			case op < 19:
				note("%s resets", who)
				settle()
				broken(p, true)
				broken(p.other, false)
				p.reset, p.other.reset = true, true
				p.s.Reset(stream.CodeLocal, "")
			case rng.IntN(4) == 0:
				note("cut")
				settle()
				for _, p := range parties {
					broken(p, false)
				}
				w.b.Cut()
				cut = true
			}
			settle()
		}
		// The end: everybody reads, and what is not reset ends in good order.
		synctest.Wait()
		for _, p := range parties {
			p.resume()
		}
		time.Sleep(time.Minute) // for a link with a rate
		synctest.Wait()
		for _, p := range parties {
			p.s.CloseWrite()
		}
		all.Wait()
		for _, p := range parties {
			p.mu.Lock()
			who := fmt.Sprintf("reader %d.%d", p.id, p.dir)
			wrote := p.other.wrote
			reset := p.reset || cut
			switch {
			case p.read > wrote && p.err == io.EOF:
				t.Errorf("%s: read %d of %d bytes", who, p.read, wrote)
			case p.err == io.EOF && p.read != wrote:
				t.Errorf("%s: a clean end after %d of %d bytes", who, p.read, wrote)
			case p.err != io.EOF && !errors.Is(p.err, syscall.ECONNRESET):
				t.Errorf("%s ended with %v", who, p.err)
			case p.err != io.EOF && !reset:
				t.Errorf("%s: %v, and nobody reset it", who, p.err)
			case exact && (p.over != nil) != (p.err != io.EOF):
				t.Errorf("%s ended with %v, the model with %v", who, p.err, p.over)
			}
			p.mu.Unlock()
		}
		w.y.mux.WaitIdle()
		w.x.mux.WaitIdle()
	})
	if t.Failed() {
		t.Fatalf("seed %d:\n%s", seed, strings.Join(trace, "\n"))
	}
}
