package link_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
)

// knock opens a lane from host that says nothing.
func (w *town) knock(host, addr string) net.Conn {
	w.Helper()
	c, err := w.net.From(host)(context.Background(), "mem", addr)
	if err != nil {
		w.Fatal(err)
	}
	synctest.Wait()
	return c
}

// closed reports whether c has been closed by the other end, without a byte.
func closed(t testing.TB, c net.Conn) bool {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(time.Millisecond))
	n, err := c.Read(make([]byte, 1))
	if n > 0 {
		t.Error("it was answered")
	}
	return !errors.Is(err, os.ErrDeadlineExceeded)
}

func TestTheHalfOpenCapEvictsTheSourceWithMostAndNeverTheNewcomer(t *testing.T) {
	for _, c := range []struct{ name, most, same, one, newcomer string }{
		{"by IPv4 address", "10.0.0.2", "10.0.0.2", "10.0.0.3", "10.0.0.4"},
		{"by IPv6 prefix", "2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8:0:2::1", "2001:db8:0:3::1"},
		{"a newcomer of the greedy source", "10.0.0.2", "10.0.0.2", "10.0.0.3", "10.0.0.2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			in(t, func(w *town) {
				s := w.server()
				s.Limits.HalfOpen = 4
				stop := w.serve(s, "10.0.0.1:1")
				greedy := []net.Conn{w.knock(c.most, "10.0.0.1:1"), w.knock(c.same, "10.0.0.1:1"), w.knock(c.same, "10.0.0.1:1")}
				honest := w.knock(c.one, "10.0.0.1:1")
				newcomer := w.knock(c.newcomer, "10.0.0.1:1")
				evicted := 0
				for _, g := range greedy {
					if closed(w, g) {
						evicted++
					}
				}
				if evicted != 1 || closed(w, honest) || closed(w, newcomer) {
					t.Errorf("evicted %d of the greedy source; honest %v, newcomer %v", evicted, closed(w, honest), closed(w, newcomer))
				}
				stop()
			})
		})
	}
}

// In a crowd each source has a few lanes, so that what is refused costs an accept and a close; somebody
// who has proved himself before has more, and of many behind one address each has his own.
func TestInACrowdASourceHasEightLanesAndOneThatIsKnownHasMore(t *testing.T) {
	const greedy = "10.0.0.66"
	for _, c := range []struct {
		name        string
		crowd       int
		many        bool
		known       bool
		least, most int
	}{
		{"in no crowd", 0, false, false, 60, 60},
		{"in a crowd", 100, false, false, 8, 16}, // by chance one in 128 of those beyond; more than eight of 52 come once in 10^8 times
		{"in a crowd, known", 100, false, true, 60, 60},
		{"in a crowd, from where many come", 100, true, false, 60, 60},
	} {
		t.Run(c.name, func(t *testing.T) {
			in(t, func(w *town) {
				s := w.server()
				s.Limits.HalfOpen = 200
				s.Many = func(a net.Addr) bool { return c.many && strings.HasPrefix(a.String(), greedy+":") }
				stop := w.serve(s, "10.0.0.1:1")
				if c.known {
					k := &link.Keeper{Config: w.config(), Paths: []link.Path{{Name: "direct", Dial: func(ctx context.Context) (net.Conn, error) {
						return w.net.From(greedy)(ctx, "mem", "10.0.0.1:1")
					}}}}
					stopKeeper := w.run(k.Run)
					w.echoes(w.open(w.get(k)))
					stopKeeper()
				}
				for i := range c.crowd {
					w.knock(fmt.Sprintf("10.1.0.%d", 1+i), "10.0.0.1:1")
				}
				var lanes []net.Conn
				for range 60 {
					lanes = append(lanes, w.knock(greedy, "10.0.0.1:1"))
				}
				open := 0
				for _, lane := range lanes {
					if !closed(w, lane) {
						open++
					}
				}
				if open < c.least || open > c.most {
					t.Errorf("%d lanes of 60, want %d to %d", open, c.least, c.most)
				}
				if c := w.knock("10.0.0.7", "10.0.0.1:1"); closed(w, c) {
					t.Error("a source that comes for the first time is not let in")
				}
				stop()
			})
		})
	}
}

// What becomes a channel is not counted, with a credential or without: an authority is shown none.
func TestInACrowdWhatBecomesAChannelIsNotCounted(t *testing.T) {
	in(t, func(w *town) {
		s := w.server()
		s.Limits.HalfOpen = 200
		proofless(s, 0)
		stop := w.serve(s, "10.0.0.1:1")
		for i := range 100 {
			w.knock(fmt.Sprintf("10.1.0.%d", 1+i), "10.0.0.1:1")
		}
		for range 40 {
			w.called(w.stranger(), "10.0.0.1:1").Close(nil)
		}
		// Which makes nobody known: anybody can make identities.
		open := 0
		for range 60 {
			if c := w.knock("10.0.0.1", "10.0.0.1:1"); !closed(w, c) {
				open++
			}
		}
		if open > 16 {
			t.Errorf("a source that has shown no credential has %d lanes in a crowd", open)
		}
		stop()
	})
}

// A relay says which lanes it wanted.
func TestInACrowdALaneThatWasWantedIsNotCounted(t *testing.T) {
	for wanted, bounds := range map[bool][2]int{true: {60, 60}, false: {8, 16}} {
		in(t, func(w *town) {
			s := w.server()
			s.Limits.HalfOpen = 200
			came := 0
			s.Lane = func(_ context.Context, _ channel.Preface, _ int, c net.Conn) bool {
				came++
				c.Close()
				return wanted
			}
			stop := w.serve(s, "10.0.0.1:1")
			for i := range 100 {
				w.knock(fmt.Sprintf("10.1.0.%d", 1+i), "10.0.0.1:1")
			}
			for range 60 {
				c := w.knock("10.0.0.66", "10.0.0.1:1")
				c.Write(channel.Preface{Kind: channel.KindLane, ID: [16]byte{1}}.Append(nil))
				synctest.Wait()
			}
			if came < bounds[0] || came > bounds[1] {
				t.Errorf("wanted %v: %d of 60 lanes came", wanted, came)
			}
			stop()
		})
	}
}

// An office is one address: when one of it has come in, the others need not wait.
func TestABarredSourceThatShowsACredentialIsLetIn(t *testing.T) {
	in(t, func(w *town) {
		s := w.server()
		stop := w.serve(s, "10.0.0.1:1")
		told, end := s.Bar("10.0.0.66")
		defer end()
		if n := <-told; n != 1 {
			t.Fatalf("%d are kept out", n)
		}
		begin := time.Now()
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{{Name: "direct", Dial: func(ctx context.Context) (net.Conn, error) {
			return w.net.From("10.0.0.66")(ctx, "mem", "10.0.0.1:1")
		}}}}
		stopKeeper := w.run(k.Run)
		w.echoes(w.open(w.get(k)))
		if n, more := <-told; more || time.Since(begin) > time.Second {
			t.Errorf("%d are kept out still, after %v", n, time.Since(begin))
		}
		stopKeeper()
		stop()
	})
}

func TestAnHonestCallerGetsInPastManySilentOnes(t *testing.T) {
	in(t, func(w *town) {
		s := w.server()
		s.Limits.HalfOpen = 2
		stop := w.serve(s, "10.0.0.1:1")
		for range 20 {
			w.knock("10.0.0.66", "10.0.0.1:1")
		}
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.1:1")}}
		stopKeeper := w.run(k.Run)
		c := w.open(w.get(k))
		for range 20 { // a confirmed lane is not half open any more
			w.knock("10.0.0.66", "10.0.0.1:1")
		}
		w.echoes(c)
		stopKeeper()
		stop()
	})
}

func TestALaneThatDoesNotProveItselfIsClosedAfterTenSeconds(t *testing.T) {
	preface := channel.Preface{Kind: channel.Service, Suite: channel.AESGCM}.Append(nil)
	for _, c := range []struct {
		name  string
		first []byte
		then  []byte // one byte a second
	}{
		{"silent", nil, nil},
		{"silent behind its preface", preface, nil},
		{"a byte a second", nil, preface},
		{"a byte a second of message 1", append(preface[:len(preface):len(preface)], 0x04, 0xd0), make([]byte, 24)},
	} {
		t.Run(c.name, func(t *testing.T) {
			in(t, func(w *town) {
				stop := w.serve(w.server(), "10.0.0.1:1")
				begin := time.Now()
				lane := w.knock("10.0.0.2", "10.0.0.1:1")
				lane.Write(c.first)
				wrote := make(chan struct{})
				go func() {
					defer close(wrote)
					for _, b := range c.then {
						time.Sleep(time.Second)
						if _, err := lane.Write([]byte{b}); err != nil {
							return
						}
					}
				}()
				n, _ := io.Copy(io.Discard, lane)
				if n != 0 || time.Since(begin) != 10*time.Second {
					t.Errorf("%d bytes of an answer; closed after %v", n, time.Since(begin))
				}
				lane.Close()
				<-wrote
				stop()
			})
		})
	}
}

func TestStrangersAreClosedWithoutAnAnswer(t *testing.T) {
	relay := channel.Preface{Kind: channel.Relay, Suite: channel.AESGCM}.Append(nil)
	other := channel.Preface{Kind: channel.Service, Suite: 9}.Append(nil)
	newer := channel.Preface{Kind: channel.Service, Suite: channel.AESGCM}.Append(nil)
	newer[4] = 2
	for name, says := range map[string][]byte{
		"a kind that is not served": relay,
		"an unknown suite":          other,
		"another version":           newer,
		"HTTP":                      []byte("GET / HTTP/1.1\r\nHost: example.com\r\n\r\n"),
		"a preface cut short":       relay[:23],
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(w *town) {
				stop := w.serve(w.server(), "10.0.0.1:1")
				begin := time.Now()
				lane := w.knock("10.0.0.2", "10.0.0.1:1")
				lane.Write(says)
				lane.(interface{ CloseWrite() error }).CloseWrite()
				if n, _ := io.Copy(io.Discard, lane); n != 0 || time.Since(begin) != 0 {
					t.Errorf("%d bytes of an answer after %v", n, time.Since(begin))
				}
				stop()
			})
		})
	}
}

// poor is a listener that is out of descriptors for its first Accepts.
type poor struct {
	net.Listener
	left  int
	tries atomic.Int64
}

func (p *poor) Accept() (net.Conn, error) {
	if p.tries.Add(1); p.left > 0 {
		p.left--
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	return p.Listener.Accept()
}

func TestOutOfDescriptorsAcceptBacksOffAndRecovers(t *testing.T) {
	in(t, func(w *town) {
		ln, err := w.net.Listen("10.0.0.1:1")
		if err != nil {
			t.Fatal(err)
		}
		p := &poor{Listener: ln, left: 20}
		s := w.server()
		begin := time.Now()
		stop := w.run(func(ctx context.Context) error { return s.Serve(ctx, p) })
		w.sleep(time.Second)
		if n := p.tries.Load(); n > 10 {
			t.Errorf("%d tries in the first second", n)
		}
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.1:1")}}
		stopKeeper := w.run(k.Run)
		w.echoes(w.open(w.get(k)))
		if d := time.Since(begin); d > 20*time.Second {
			t.Errorf("it recovered after %v", d)
		}
		stopKeeper()
		stop()
	})
}

func TestAListenerThatFailsEndsItsServeAndNoOther(t *testing.T) {
	in(t, func(w *town) {
		s := w.server()
		stop := w.serve(s, "10.0.0.1:1")
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.1:1")}}
		stopKeeper := w.run(k.Run)
		c := w.open(w.get(k))
		if err := s.Serve(context.Background(), broken{}); !errors.Is(err, errDown) {
			t.Errorf("Serve returned %v", err)
		}
		w.echoes(c)
		stopKeeper()
		stop()
	})
}

type broken struct{}

func (broken) Accept() (net.Conn, error) { return nil, errDown }
func (broken) Close() error              { return nil }
func (broken) Addr() net.Addr            { return &net.TCPAddr{} }

func TestServeReturnsWhenEveryLaneIsGone(t *testing.T) {
	in(t, func(w *town) {
		s := w.server()
		stop := w.serve(s, "10.0.0.1:1")
		lanes := []net.Conn{w.knock("10.0.0.2", "10.0.0.1:1"), w.knock("10.0.0.3", "10.0.0.1:1")}
		lanes[1].Write(channel.Preface{Kind: channel.Service, Suite: channel.AESGCM}.Append(nil))
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.1:1")}}
		stopKeeper := w.run(k.Run)
		c := w.open(w.get(k))
		w.echoes(c)
		begin := time.Now()
		stop()
		if d := time.Since(begin); d > 2*time.Second {
			t.Errorf("it took %v", d)
		}
		for _, l := range lanes {
			if !closed(w, l) {
				t.Error("a half-open lane is left")
			}
		}
		if n := len(s.Lives()); n != 0 {
			t.Errorf("%d channels are left", n)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a stream of the closed channel reads %v, want a reset", err)
		}
		stopKeeper()
	})
}

func TestOpenedComesBeforeTheFirstStream(t *testing.T) {
	in(t, func(w *town) {
		var order []string
		s := w.server()
		service := s.Services[channel.Service]
		service.Opened = func(*link.Live) { order = append(order, "opened") }
		service.Accept = func(_ *link.Live, in *stream.Incoming) {
			order = append(order, "stream")
			in.Refuse(stream.CodeRefused, "")
		}
		s.Services[channel.Service] = service
		stop := w.serve(s, "10.0.0.1:1")
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.1:1")}}
		stopKeeper := w.run(k.Run)
		l := w.get(k)
		if _, err := l.Mux.Open(stream.Header{Kind: stream.Bytes, Name: "db"}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if fmt.Sprint(order) != "[opened stream]" {
			t.Error(order)
		}
		stopKeeper()
		stop()
	})
}

func TestADrainingServerTakesNoLaneAndNoStream(t *testing.T) {
	in(t, func(w *town) {
		s := w.server()
		stop := w.serve(s, "10.0.0.1:1")
		k := &link.Keeper{Config: w.config(), Paths: []link.Path{w.to("10.0.0.1:1")}}
		stopKeeper := w.run(k.Run)
		l := w.get(k)
		c := w.open(l)
		s.Drain()
		synctest.Wait()
		if _, err := l.Mux.Open(stream.Header{Kind: stream.Bytes, Name: "db"}); err == nil {
			t.Error("a new stream was opened")
		}
		if _, err := w.net.Dial(context.Background(), "mem", "10.0.0.1:1"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a new lane: %v", err)
		}
		w.echoes(c)
		stopKeeper()
		stop()
	})
}

// called is a channel to addr as a member, or as somebody without a credential.
func (w *town) called(self *identity.Self, addr string) *link.Live {
	w.Helper()
	lane, err := w.net.Dial(context.Background(), "mem", addr)
	if err != nil {
		w.Fatal(err)
	}
	c := w.config()
	if self != nil {
		c.Self = self
	}
	l, err := link.Dial(context.Background(), lane, &c, nil)
	if err != nil {
		w.Fatal(err)
	}
	synctest.Wait()
	return l
}

func (w *town) stranger() *identity.Self {
	w.Helper()
	self, err := identity.NewSelf()
	if err != nil {
		w.Fatal(err)
	}
	return self
}

func proofless(s *link.Server, idle time.Duration) {
	service := s.Services[channel.Service]
	service.Config.Proofless, service.Idle = true, idle
	s.Services[channel.Service] = service
}

func TestOneIdentityDoesNotTakeEveryChannel(t *testing.T) {
	in(t, func(w *town) {
		s := w.server()
		s.Limits.ChannelsEach = 3
		stop := w.serve(s, "10.0.0.2:1")
		greedy := w.member()
		var lives []*link.Live
		for range 5 {
			lives = append(lives, w.called(greedy, "10.0.0.2:1"))
		}
		other := w.called(nil, "10.0.0.2:1")
		for i, l := range lives {
			var closed *channel.Closed
			if over := errors.As(l.Err(), &closed) && closed.Code == channel.CloseAbuse; over != (i >= 3) {
				t.Errorf("channel %d of 3 that one identity may have: %v", i+1, l.Err())
			}
		}
		w.echoes(w.open(other))
		lives[0].Close(nil) // and a place is free again
		again := w.called(greedy, "10.0.0.2:1")
		w.echoes(w.open(again))
		for _, l := range append(lives, other, again) {
			l.Close(nil)
		}
		stop()
	})
}

func TestAFullServerGivesUpStrangersForNewcomersAndNeverMembers(t *testing.T) {
	in(t, func(w *town) {
		s := w.server()
		s.Limits.Channels = 4
		proofless(s, 0)
		stop := w.serve(s, "10.0.0.2:1")
		member := w.called(nil, "10.0.0.2:1")
		lives := []*link.Live{member}
		for range 20 {
			lives = append(lives, w.called(w.stranger(), "10.0.0.2:1"))
			w.sleep(3 * time.Second)
		}
		if n := len(s.Lives()); n != 4 || member.Err() != nil || lives[20].Err() != nil {
			t.Errorf("%d channels; the member's: %v, the newcomer's: %v", n, member.Err(), lives[20].Err())
		}
		for range 4 { // members only: there is nobody to give up
			lives = append(lives, w.called(nil, "10.0.0.2:1"))
			w.sleep(3 * time.Second)
		}
		if last := lives[len(lives)-1]; last.Err() == nil || member.Err() != nil {
			t.Errorf("among members the newcomer's: %v, the first one's: %v", last.Err(), member.Err())
		}
		for _, l := range lives {
			l.Close(nil)
		}
		stop()
	})
}

func TestAnIdleChannelOfAServiceForStrangersEnds(t *testing.T) {
	in(t, func(w *town) {
		s := w.server()
		proofless(s, 30*time.Second)
		stop := w.serve(s, "10.0.0.2:1")
		idle, busy := w.called(w.stranger(), "10.0.0.2:1"), w.called(w.stranger(), "10.0.0.2:1")
		c := w.open(busy)
		w.sleep(time.Minute)
		if idle.Err() == nil || busy.Err() != nil {
			t.Errorf("after a minute the idle one: %v, the busy one: %v", idle.Err(), busy.Err())
		}
		c.Close()
		w.sleep(time.Minute)
		if busy.Err() == nil {
			t.Error("a minute after its last stream it is still there")
		}
		stop()
	})
}
