package journeys_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/tests/pace"
	"github.com/portal-tunnel/portal/tests/process"
)

// goOn has connections whose far ends echo go on beside what begin has begun.
func goOn(t *testing.T, what string, conns []net.Conn, begin func() (end func())) {
	t.Helper()
	turns, d := 1, time.Second/10
	if long() {
		turns, d = 15, time.Second/2
	}
	c, err := pace.Compare(turns, conns, d, begin)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	t.Logf("F-11: between processes: %d %s: %v", len(conns), what, c)
	bar(t, c.Keeps(), "nine tenths of the throughput are wanted, and twice the time at most")
}

// unmeasured lets other tests run beside the short form.
func unmeasured(t *testing.T) {
	if !long() {
		t.Parallel()
	}
}

// press writes to a stream until that ends. stuck is closed when nothing was taken for a fifth of a second.
func press(c net.Conn, all *sync.WaitGroup) (stuck <-chan struct{}) {
	told := make(chan struct{})
	all.Go(func() {
		tell := sync.OnceFunc(func() { close(told) })
		for b := make([]byte, 32<<10); ; {
			c.SetWriteDeadline(time.Now().Add(time.Second / 5))
			n, err := c.Write(b)
			switch {
			case err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
				return
			case n == 0:
				tell()
			}
		}
	})
	return told
}

// within waits for what somebody tells.
func within(t testing.TB, what string, told <-chan struct{}) {
	t.Helper()
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-told:
	case <-late.C:
		t.Fatalf("waited %v until %s", patience, what)
	}
}

func TestAStreamBetweenProcessesThatIsNotReadStallsOnlyItself(t *testing.T) {
	unmeasured(t)
	many := 20
	if long() {
		many = 100
	}
	for _, carrier := range carriers {
		t.Run(carrier, func(t *testing.T) {
			s := newService(t)
			w := newRow(t, rowOptions{to: s.addr(), outlet: []string{"--carrier", carrier, "--max-streams", "200"}})
			var conns []net.Conn
			for range many {
				conns = append(conns, dial(t, w.addr, []byte("E")))
			}
			goOn(t, "streams ("+carrier+") beside one whose client does not read", conns, func() func() {
				select {
				case <-s.stuck: // the one before
				default:
				}
				number, first := s.numbered('B')
				c := dial(t, w.addr, first)
				within(t, "the service is stuck", s.stuck)
				return func() {
					stream.Abort(c)
					if _, told := s.result(number, patience); !told {
						t.Error("the service is not told of the reset")
					}
				}
			})
			goOn(t, "streams ("+carrier+") beside one whose service does not read", conns, func() func() {
				var all sync.WaitGroup
				c := dial(t, w.addr, []byte("M"))
				within(t, "the client is stuck", press(c, &all))
				return func() {
					stream.Abort(c)
					all.Wait()
				}
			})
		})
	}
}

// The lanes are those of inlets of the test's own; relay and outlet are processes, and so are who stands
// still: an inlet of the same outlet, which is sent to, and another outlet, which is too.
func TestALaneBetweenProcessesThatStandsStillStallsOnlyItself(t *testing.T) {
	unmeasured(t)
	for _, carrier := range carriers {
		t.Run(carrier, func(t *testing.T) {
			many := 20
			if long() {
				// One more is all that a carrier takes.
				many = map[string]int{"dial-back": 100, "yamux": 63}[carrier]
			}
			s := newService(t)
			m := newMeeting(t)
			m.enroll("db1", "--serve", "db")
			m.enroll("files1", "--serve", "files")
			m.enroll("bot", "--attr", "role=agent")
			m.outlet("db1", s.addr(), "--max-streams", "300", "--carrier", carrier)
			files := m.start("files1", "outlet", "files", "--to", s.addr(), "--allow", `principal.role == "agent"`, "--max-streams", "300", "--carrier", carrier)
			m.line(files, `outlet files ready via`)
			down, addr := m.inlet("bot", "0")
			m.line(down, `inlet db ready via`)
			up := m.start("bot", "inlet", "files", "--from", "0")
			to := m.line(up, `inlet files listening on (\S+)`)
			m.line(up, `inlet files ready via`)
			c := newCrowd(m, "bot")
			c.join(many)
			conns := dialAll(t, c.until(t, many, 0))
			defer func() {
				for _, c := range conns {
					c.Close()
				}
			}()
			// still has a process stand still with streams, which are then pushed until nobody takes more. Each has
			// 64 KiB of credit; how much of it the kernel takes for a socket that is not read is its own affair.
			const streams = 128
			var held []string
			still := func(p *process.Process, addr string, first func() []byte, push func([]net.Conn)) (end func()) {
				t.Helper()
				all := make([]net.Conn, streams)
				for i := range all {
					all[i] = dial(t, addr, first())
					if _, err := io.ReadFull(all[i], make([]byte, 1)); err != nil {
						t.Fatal(err)
					}
				}
				sendSignal(t, p, syscall.SIGSTOP)
				push(all)
				own, others := m.unsent()
				held = append(held, fmt.Sprintf("%d+%d", own>>10, others>>10))
				return func() {
					sendSignal(t, p, syscall.SIGCONT)
					for _, c := range all {
						stream.Abort(c)
					}
					m.untilTaken()
				}
			}
			goOn(t, "lanes ("+carrier+") beside one whose inlet stands still", conns, func() func() {
				first := func() []byte { _, b := s.numbered('G'); return b }
				end := still(down, addr, first, func(all []net.Conn) {
					for range all {
						s.gate <- struct{}{}
					}
					for range all {
						within(t, "each stream of the service is stuck", s.full)
					}
				})
				return func() {
					end()
					late := time.NewTimer(patience)
					defer late.Stop()
					for range streams {
						select {
						case <-s.results:
						case <-late.C:
							t.Fatal("the service is not told of all resets")
						}
					}
				}
			})
			goOn(t, "lanes ("+carrier+") beside one whose outlet stands still", conns, func() func() {
				var all sync.WaitGroup
				end := still(files, to, func() []byte { return []byte("M") }, func(conns []net.Conn) {
					var stuck []<-chan struct{}
					for _, c := range conns {
						stuck = append(stuck, press(c, &all))
					}
					for _, told := range stuck {
						within(t, "each client is stuck", told)
					}
				})
				return func() {
					end()
					all.Wait()
				}
			})
			t.Logf("KiB on their way from the relay and to it, in each turn: %s", strings.Join(held, " "))
		})
	}
}

// unsent is how many bytes the relay has sent that are not taken, and others to it.
func (m *meeting) unsent() (own, others int) {
	m.t.Helper()
	for _, s := range sockets(m.t, m.relay) {
		switch m.at {
		case s.local.String():
			own += s.unsent
		case s.remote.String():
			others += s.unsent
		}
	}
	return own, others
}

// untilTaken waits until there are none.
func (m *meeting) untilTaken() {
	m.t.Helper()
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	own, others := m.unsent()
	for end := time.Now().Add(patience); own+others > 0; own, others = m.unsent() {
		if time.Now().After(end) {
			m.t.Fatalf("after %v the relay has sent %d bytes that are not taken, others %d to it", patience, own, others)
		}
		<-look.C
	}
}
