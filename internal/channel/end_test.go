package channel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/alloc"
	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/routing"
)

func TestWhoeverClosesDeliversWhatWasQueued(t *testing.T) {
	const streams, size = 8, 60 << 10
	for name, l := range map[string]memnet.Link{
		"fast":               {},
		"far":                {Latency: 300 * time.Millisecond},
		"slow":               {Rate: 1 << 20, Latency: 10 * time.Millisecond},
		"slower than 2 s":    {Rate: 64 << 10, Buffer: 8 << 10},
		"with a full buffer": {Buffer: 1 << 10, Latency: 50 * time.Millisecond},
	} {
		for _, both := range []bool{false, true} {
			if both && name == "slower than 2 s" {
				continue // what the other end has to say is awaited no longer than that
			}
			t.Run(fmt.Sprintf("%s, both %v", name, both), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					a, b, _, _ := open(t, l)
					senders := []*side{a}
					if both {
						senders = append(senders, b)
					}
					for _, s := range senders {
						for i := range streams {
							check(t, s.end.Post(new(buffer.Queue), frameOf(bytes.Repeat([]byte{byte(i)}, size))))
						}
					}
					check(t, a.end.Close())
					if err := <-a.ran; err != ErrClosed {
						t.Errorf("who closed: %v", err)
					}
					if err := <-b.ran; err != ErrClosed {
						t.Errorf("the other end: %v", err)
					}
					if n := len(b.got.all()); n != streams {
						t.Errorf("%d of %d frames arrived", n, streams)
					}
					if n := len(a.got.all()); both && n != streams {
						t.Errorf("%d of %d frames of the other end arrived", n, streams)
					}
				})
			})
		}
	}
}

func TestBothEndsMayCloseAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, _ := open(t, memnet.Link{Latency: 20 * time.Millisecond})
		begin := time.Now()
		var both sync.WaitGroup
		for range 3 {
			both.Go(func() { a.end.Close() })
			both.Go(func() { b.end.Close() })
		}
		both.Wait()
		if errA, errB := <-a.ran, <-b.ran; errA != ErrClosed || errB != ErrClosed {
			t.Errorf("%v, %v", errA, errB)
		}
		if d := time.Since(begin); d >= closeTime {
			t.Errorf("took %v", d)
		}
	})
}

// What the other end asks or sends behind our close does not disturb it.
func TestPingsDuringACloseChangeNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, _ := open(t, memnet.Link{Latency: 100 * time.Millisecond})
		for range 20 {
			check(t, b.end.Post(new(buffer.Queue), frameOf(make([]byte, 1000))))
		}
		a.end.leave(CloseDone, ErrClosed, "")
		b.end.Ping() // arrives when nothing may be answered any more
		if errA, errB := <-a.ran, <-b.ran; errA != ErrClosed || errB != ErrClosed {
			t.Errorf("%v, %v", errA, errB)
		}
		if n := len(a.got.all()); n != 20 {
			t.Errorf("%d frames arrived", n)
		}
	})
}

func TestNothingIsTakenBehindAClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, x, _ := open(t, memnet.Link{})
		x.Stall()
		a.end.leave(CloseDone, ErrClosed, "")
		if err := a.send(new(buffer.Queue), []byte("late")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Send: %v", err)
		}
		if err := a.end.Control(1<<32, AppendHeader(nil, 0x16, 1, 0)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Control: %v", err)
		}
		x.Resume()
		<-a.ran
		<-b.ran
		if err := a.send(new(buffer.Queue), []byte("too late")); err != ErrClosed {
			t.Errorf("Send after the end: %v", err)
		}
		if err := a.end.Control(1, nil); err != ErrClosed {
			t.Errorf("Control after the end: %v", err)
		}
		if a.end.Err() != ErrClosed {
			t.Errorf("Err: %v", a.end.Err())
		}
	})
}

func TestCloseGivesUpALaneThatTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, x, _ := open(t, memnet.Link{Buffer: 1 << 10})
		x.Stall()
		sent := make(chan error)
		go func() { sent <- a.send(new(buffer.Queue), make([]byte, 60000)) }()
		synctest.Wait() // it is in its write
		begin := time.Now()
		check(t, a.end.Close())
		if d := time.Since(begin); d != closeTime {
			t.Errorf("Close took %v", d)
		}
		<-sent
		if err := <-a.ran; err != ErrClosed {
			t.Errorf("who closed: %v", err)
		}
		x.Resume()
		if err := <-b.ran; !errors.Is(err, ErrCut) {
			t.Errorf("the other end: %v", err)
		}
	})
}

func TestCloseWaitsTwoSecondsForAnAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, y := open(t, memnet.Link{})
		y.Stall()
		begin := time.Now()
		check(t, a.end.Close())
		if d := time.Since(begin); d != closeTime {
			t.Errorf("Close took %v", d)
		}
		<-a.ran
		<-b.ran
	})
}

func TestCutIsNeverACleanEnd(t *testing.T) {
	const frames, size = 6, 500
	record := size + frameHeader + buffer.Around
	step := 37
	if alloc.Raced {
		step = 211
	}
	for how, cut := range map[string]func(c *memnet.Conn, off int64){
		"fin": (*memnet.Conn).FinAt, "reset": (*memnet.Conn).CutAt,
	} {
		for off := 0; off <= frames*record; off += step {
			synctest.Test(t, func(t *testing.T) {
				a, b, x, _ := open(t, memnet.Link{Latency: time.Millisecond})
				planned := false
				x.OnWrite(func(at int64, rec []byte) []byte {
					if !planned {
						planned = true
						cut(x, at+int64(off))
					}
					return rec
				})
				for i := range frames {
					if a.send(new(buffer.Queue), bytes.Repeat([]byte{byte(i)}, size)) != nil {
						break
					}
				}
				go a.end.Close() // its close comes behind the cut, too
				if err := <-b.ran; !errors.Is(err, ErrCut) || errors.Is(err, ErrClosed) {
					t.Errorf("%s after %d bytes: %v", how, off, err)
				}
				<-a.ran
				got := b.got.all()
				if len(got) > off/record || how == "fin" && len(got) != off/record {
					t.Errorf("%s after %d bytes: %d frames", how, off, len(got))
				}
				for i, g := range got {
					if !bytes.Equal(g, bytes.Repeat([]byte{byte(i)}, size)) {
						t.Errorf("%s after %d bytes: frame %d is wrong", how, off, i)
					}
				}
			})
		}
	}
}

// An end of the lane without the other end's close is a cut, also for who has
// already sent a close of its own.
func TestCutBehindOurOwnCloseIsACut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, y := open(t, memnet.Link{})
		y.OnWrite(func(int64, []byte) []byte { return nil }) // b's close is lost
		a.end.leave(CloseDone, ErrClosed, "")
		if err := <-a.ran; !errors.Is(err, ErrCut) {
			t.Errorf("%v", err)
		}
		<-b.ran
	})
}

// deaf fails writes and leaves reads alone.
type deaf struct {
	net.Conn
	now chan struct{}
}

func (d *deaf) Write(b []byte) (int, error) {
	select {
	case <-d.now:
		return 0, errors.New("broken pipe")
	default:
		return d.Conn.Write(b)
	}
}

func TestFailedWriteIsACutAndDoesNotHideWhatTheOtherEndSaid(t *testing.T) {
	for name, said := range map[string]bool{"it said nothing": false, "it refused us": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := newSides(t)
				x, y := memnet.Pipe(memnet.Link{Latency: 100 * time.Millisecond})
				lane := &deaf{x, make(chan struct{})}
				reopen(t, a, b, lane, y)
				if said {
					b.end.Abort(CloseRefused, errors.New("revoked"))
				}
				close(lane.now)
				check(t, a.send(new(buffer.Queue), []byte("lost")))
				if err := a.send(new(buffer.Queue), []byte("more")); !errors.Is(err, ErrCut) {
					t.Errorf("the next Send: %v", err)
				}
				err := <-a.ran
				if closed := (*Closed)(nil); errors.As(err, &closed) != said || errors.Is(err, ErrCut) == said {
					t.Errorf("the channel ended with: %v", err)
				}
				<-b.ran
			})
		})
	}
}

func TestAbortTellsWhyAndEndsBothEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, _ := open(t, memnet.Link{Latency: 10 * time.Millisecond})
		reason := errors.New("too many\x1b[31m channels\u202e " + strings.Repeat("x", 300))
		begin := time.Now()
		a.end.Abort(CloseAbuse, reason)
		b.send(new(buffer.Queue), []byte("not wanted any more"))
		closed := (*Closed)(nil)
		if err := <-b.ran; !errors.As(err, &closed) || closed.Code != CloseAbuse {
			t.Fatalf("the other end: %v", err)
		}
		if !strings.HasPrefix(closed.Reason, "too many?[31m channels? xxx") || len(closed.Reason) > maxReason {
			t.Errorf("it reads %q", closed.Reason)
		}
		if err := <-a.ran; err != reason {
			t.Errorf("this end: %v", err)
		}
		if d := time.Since(begin); d > 100*time.Millisecond {
			t.Errorf("took %v", d)
		}
		if len(a.got.all()) != 0 {
			t.Error("a frame arrived behind the abort")
		}
	})
	synctest.Test(t, func(t *testing.T) { // and when the other end neither hears nor says anything
		a, b, x, y := open(t, memnet.Link{})
		x.Stall()
		y.Stall()
		begin := time.Now()
		reason := errors.New("enough")
		a.end.Abort(CloseInternal, reason)
		if err := <-a.ran; err != reason || time.Since(begin) != closeTime {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		x.Resume()
		<-b.ran
	})
}

type abuse struct{ error }

func (abuse) Abuse() bool { return true }

func TestHandlersErrorEndsTheChannelAndTheOtherEndIsTold(t *testing.T) {
	for name, tt := range map[string]struct {
		err  error
		code CloseCode
	}{
		"protocol": {errors.New("an unknown frame"), CloseProtocol},
		"abuse":    {abuse{errors.New("too much")}, CloseAbuse},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b, _, _ := open(t, memnet.Link{})
				b.got.fail = tt.err
				check(t, a.send(new(buffer.Queue), []byte("wrong")))
				if err := <-b.ran; err != tt.err {
					t.Errorf("the reader: %v", err)
				}
				closed := (*Closed)(nil)
				if err := <-a.ran; !errors.As(err, &closed) || closed.Code != tt.code || closed.Reason != "" {
					t.Errorf("the sender: %v", err)
				}
			})
		})
	}
}

func TestMalformedFramesEndTheChannel(t *testing.T) {
	header := func(kind uint8, stream uint32, length int, body ...byte) []byte {
		return append(AppendHeader(nil, kind, stream, length), body...)
	}
	for name, plain := range map[string][]byte{
		"half a header":            {kindPing, 0, 0},
		"a body that is not there": header(0x13, 1, 5, 1, 2),
		"a short ping":             header(kindPing, 0, 1, 1),
		"a long pong":              header(kindPong, 0, 9, make([]byte, 9)...),
		"an empty close":           header(kindClose, 0, 0),
		"a close with a novel":     header(kindClose, 0, 300, make([]byte, 300)...),
		"half a credential":        header(kindCredential, 0, 1, 0),
		"a second confirmation":    header(kindConfirm, 0, 4, 0, 0, 0, 0),
		"kind 0":                   header(0, 0, 0),
		"a frame of epochs":        header(kindEpochFirst, 0, 0),
		"the last of epochs":       header(kindEpochLast, 0, 0),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b, _, _ := open(t, memnet.Link{})
				good := header(0x13, 1, 4, []byte("good")...)
				buf := buffer.Get(1000)
				buf.Commit(copy(buf.Next(), append(good, plain...)))
				check(t, a.end.Send(new(buffer.Queue), buf))
				if err := <-b.ran; err != errFrame {
					t.Errorf("the reader: %v", err)
				}
				closed := (*Closed)(nil)
				if err := <-a.ran; !errors.As(err, &closed) || closed.Code != CloseProtocol {
					t.Errorf("the sender: %v", err)
				}
				if got := b.got.all(); len(got) != 1 || string(got[0]) != "good" {
					t.Errorf("in front of it came %q", got)
				}
			})
		})
	}
}

func TestSilenceFor25SecondsIsDeath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, x, y := open(t, memnet.Link{Latency: time.Millisecond})
		time.Sleep(time.Hour) // with nothing but pings
		if a.end.Err() != nil || b.end.Err() != nil {
			t.Fatalf("an idle channel ends: %v, %v", a.end.Err(), b.end.Err())
		}
		x.Stall()
		y.Stall()
		begin := time.Now()
		if err := <-b.ran; err != ErrDead {
			t.Errorf("ended with %v", err)
		}
		// Something was heard up to a ping before the silence, and a look comes every 5 s.
		if d := time.Since(begin); d < deadAfter-pingEvery || d > deadAfter+lookEvery {
			t.Errorf("dead after %v", d)
		}
		if err := <-a.ran; err != ErrDead {
			t.Errorf("the other end ended with %v", err)
		}
	})
}

// A length that is put between two records takes what follows for one that never ends. What comes then is
// no sign of life, though the lane is never silent.
func TestBytesThatMakeNoRecordAreNoSignOfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, x, _ := open(t, memnet.Link{Latency: time.Millisecond})
		first := true
		x.OnWrite(func(_ int64, rec []byte) []byte {
			if first {
				first = false
				return append([]byte{0xff, 0xff}, rec...)
			}
			return rec
		})
		begin := time.Now()
		check(t, a.send(new(buffer.Queue), []byte{1}))
		if err := <-b.ran; err != ErrDead {
			t.Errorf("ended with %v", err)
		}
		if d := time.Since(begin); d > deadAfter+lookEvery {
			t.Errorf("dead after %v", d)
		}
		if n := len(b.got.all()); n > 0 {
			t.Errorf("%d frames arrived", n)
		}
		if err := <-a.ran; err == nil {
			t.Error("the other end ended without an error")
		}
	})
}

func TestAnythingHeardKeepsAChannelAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, y := open(t, memnet.Link{})
		a.end.tick.Stop() // neither pings nor looks
		y.Stall()         // nor is it asked, so that it would answer
		for range 30 {
			time.Sleep(20 * time.Second)
			check(t, a.send(new(buffer.Queue), []byte{1}))
		}
		if err := b.end.Err(); err != nil {
			t.Fatalf("dead with a frame every 20 s: %v", err)
		}
		begin := time.Now()
		if err := <-b.ran; err != ErrDead || time.Since(begin) < deadAfter || time.Since(begin) > deadAfter+lookEvery {
			t.Errorf("then silence: %v after %v", err, time.Since(begin))
		}
		y.Resume()
		<-a.ran
	})
}

func TestPingMeasuresTheRoundTrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newSides(t)
		x, y := memnet.Pipe(memnet.Link{Latency: 35 * time.Millisecond})
		reopen(t, a, b, x, y)
		a.end.rtt.Store(0)
		a.end.Ping()
		time.Sleep(time.Second)
		if a.end.RTT() != 70*time.Millisecond {
			t.Errorf("round trip %v", a.end.RTT())
		}
		a.end.Close()
	})
}

func TestMeasureWaitsForTheAnswerAndEndsWithTheChannel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newSides(t)
		x, y := memnet.Pipe(memnet.Link{Latency: 35 * time.Millisecond})
		reopen(t, a, b, x, y)
		a.end.rtt.Store(0)
		var all sync.WaitGroup
		for range 3 { // one question serves those who ask at the same time
			all.Go(func() {
				if d, err := a.end.Measure(t.Context()); d != 70*time.Millisecond || err != nil {
					t.Errorf("measured %v, %v", d, err)
				}
			})
		}
		all.Wait()
		x.Stall()
		y.Stall()
		limited, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := a.end.Measure(limited); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with no answer: %v", err)
		}
		if _, err := a.end.Measure(t.Context()); err != ErrDead {
			t.Errorf("on a dead channel: %v", err)
		}
		<-b.ran
	})
}

func TestRenewedCredentialTravelsIntoTheOpenChannel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, _ := open(t, memnet.Link{})
		for n, s := range []*side{a, b} {
			other := []*side{b, a}[n]
			told := 0
			defer other.end.Peer().OnChange(func() { told++ })()
			for i := range 3 {
				s.renew(t, time.Duration(2+i)*time.Hour)
				synctest.Wait()
				if until := other.end.Peer().Until(); told != i+1 || !until.Equal(s.self.Credential().Expires) {
					t.Errorf("renewal %d: told %d times, valid until %v", i, told, until)
				}
			}
		}
		a.end.Close()
	})
}

// renewing renews its side's credential behind the write of the confirmation,
// before anybody listens for renewals.
type renewing struct {
	net.Conn
	writes int
	renew  func()
}

func (r *renewing) Write(b []byte) (int, error) {
	n, err := r.Conn.Write(b)
	if r.writes++; r.writes == 3 {
		r.renew()
	}
	return n, err
}

func TestCredentialRenewedDuringTheConfirmationIsNotMissed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newSides(t)
		x, y := memnet.Pipe(memnet.Link{})
		reopen(t, a, b, &renewing{Conn: x, renew: func() { a.renew(t, 5*time.Hour) }}, y)
		synctest.Wait()
		if got, want := b.end.Peer().Until(), a.self.Credential().Expires; !got.Equal(want) {
			t.Errorf("the other end knows one until %v, shown is one until %v", got, want)
		}
		a.end.Close()
	})
}

func TestRenewalThatDoesNotVerifyChangesNothing(t *testing.T) {
	shown := func(raw, issuer []byte) []byte {
		b := AppendHeader(nil, kindCredential, 0, 4+len(raw)+len(issuer))
		return appendField(appendField(b, raw), issuer)
	}
	for name, frame := range map[string]func(t *testing.T, a *side) []byte{
		"none":    func(t *testing.T, a *side) []byte { return shown(nil, nil) },
		"garbage": func(t *testing.T, a *side) []byte { return shown([]byte("later, honestly"), a.authority.History()) },
		"altered": func(t *testing.T, a *side) []byte {
			raw := bytes.Clone(a.credential(t, 2*time.Hour).Raw())
			raw[len(raw)/2] ^= 1
			return shown(raw, a.authority.History())
		},
		"another's": func(t *testing.T, a *side) []byte {
			return shown(newSide(t, a.authority).credential(t, 2*time.Hour).Raw(), a.authority.History())
		},
		"of a foreign authority": func(t *testing.T, a *side) []byte {
			other := newSelf(t)
			c, err := other.Issue(a.self.ID(), a.self.Latest(), nil, time.Now(), time.Now().Add(2*time.Hour))
			check(t, err)
			return shown(c.Raw(), other.History())
		},
		"expired": func(t *testing.T, a *side) []byte {
			return shown(a.credential(t, -time.Second).Raw(), a.authority.History())
		},
		"earlier than the one before": func(t *testing.T, a *side) []byte {
			return shown(a.credential(t, time.Minute).Raw(), a.authority.History())
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b, _, _ := open(t, memnet.Link{})
				before := b.end.Peer().Credential()
				defer b.end.Peer().OnChange(func() { t.Error("a change is told") })()
				bad := frame(t, a)
				for range maxSpurned - 1 {
					check(t, a.end.Control(kindCredential, bad))
					synctest.Wait()
				}
				if b.end.Peer().Credential() != before || b.end.Err() != nil {
					t.Fatalf("credential %v, channel %v", b.end.Peer().Credential(), b.end.Err())
				}
				check(t, a.end.Control(kindCredential, bad))
				closed := (*Closed)(nil)
				if err := <-a.ran; !errors.As(err, &closed) || closed.Code != CloseAbuse {
					t.Errorf("after %d of them: %v", maxSpurned, err)
				}
				if err := <-b.ran; err != errSpurned {
					t.Errorf("the end that is shown them: %v", err)
				}
			})
		})
	}
}

func TestTheSameCredentialAgainIsFine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, _ := open(t, memnet.Link{})
		for range 3 * maxSpurned {
			a.end.showCredential()
			synctest.Wait()
		}
		if err := b.end.Err(); err != nil {
			t.Error(err)
		}
		a.end.Close()
	})
}

func TestClosedNodeEndsTheChannel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, x, _ := open(t, memnet.Link{Buffer: 1 << 10})
		x.Stall()
		q := new(buffer.Queue)
		results := make(chan error, 3)
		for range cap(results) { // one writes, one is queued, one waits
			go func() { results <- a.send(q, make([]byte, 50000)) }()
		}
		synctest.Wait()
		closed := make(chan struct{})
		go func() { a.config.Node.Close(); close(closed) }()
		x.Resume() // a turn that has begun is waited for
		<-closed
		<-a.ran
		for range cap(results) {
			<-results
		}
		if err := a.send(q, []byte{1}); err == nil {
			t.Error("Send still takes buffers")
		}
		<-b.ran
	})
}

// panics is a lane whose writes panic from some time on.
type panics struct {
	net.Conn
	now chan struct{}
}

func (p *panics) Write(b []byte) (int, error) {
	select {
	case <-p.now:
		panic("in a write")
	default:
		return p.Conn.Write(b)
	}
}

// A node is closed between the first and the second of a channel's actors, too.
func TestANodeThatIsClosedWhileAChannelBeginsEndsIt(t *testing.T) {
	var log bytes.Buffer
	for range 3000 {
		node := &routing.Node{Logger: slog.New(slog.NewTextHandler(&log, nil))}
		x, y := memnet.Pipe(memnet.Link{})
		closed := make(chan struct{})
		go func() { node.Close(); close(closed) }()
		e, err := newEnd(&opening{lane: x, config: &Config{Node: node, Kind: Authority}})
		select {
		case <-closed: // behind its actors
		case <-time.After(10 * time.Second):
			t.Fatalf("the node does not end\n%.2000s", &log)
		}
		if err == nil && e.Err() == nil {
			t.Fatal("the channel has not ended")
		}
		if n := node.Len(); n != 0 {
			t.Fatalf("%d actors are left", n)
		}
		x.Close()
		y.Close()
	}
	if log.Len() != 0 {
		t.Errorf("%.2000s", &log)
	}
}

func TestPanicInAWriteEndsTheChannel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newSides(t)
		x, y := memnet.Pipe(memnet.Link{})
		lane := &panics{x, make(chan struct{})}
		reopen(t, a, b, lane, y)
		close(lane.now)
		check(t, a.send(new(buffer.Queue), []byte{1}))
		if err := <-a.ran; err == nil || errors.Is(err, ErrClosed) {
			t.Errorf("the channel ended with %v", err)
		}
		if err := <-b.ran; !errors.Is(err, ErrCut) {
			t.Errorf("the other end: %v", err)
		}
	})
}

// Everything at once, for the race detector and for deadlocks; the bubble fails
// the test when a goroutine is left.
func TestEverythingAtOnceEnds(t *testing.T) {
	ends := map[string]func(t testing.TB, a, b *side, x *memnet.Conn){
		"close":      func(t testing.TB, a, b *side, x *memnet.Conn) { a.end.Close() },
		"close both": func(t testing.TB, a, b *side, x *memnet.Conn) { go b.end.Close(); a.end.Close() },
		"abort":      func(t testing.TB, a, b *side, x *memnet.Conn) { a.end.Abort(CloseInternal, errors.New("stop")) },
		"abort both": func(t testing.TB, a, b *side, x *memnet.Conn) {
			a.end.Abort(CloseInternal, errors.New("a"))
			b.end.Abort(CloseInternal, errors.New("b"))
		},
		"cut":             func(t testing.TB, a, b *side, x *memnet.Conn) { x.Cut() },
		"stall":           func(t testing.TB, a, b *side, x *memnet.Conn) { x.Stall() },
		"close and cut":   func(t testing.TB, a, b *side, x *memnet.Conn) { go a.end.Close(); x.Cut() },
		"close and abort": func(t testing.TB, a, b *side, x *memnet.Conn) { go a.end.Close(); a.end.Abort(CloseDead, ErrDead) },
		"node":            func(t testing.TB, a, b *side, x *memnet.Conn) { a.config.Node.Close() },
		"lane":            func(t testing.TB, a, b *side, x *memnet.Conn) { x.Close() },
		"handler": func(t testing.TB, a, b *side, x *memnet.Conn) {
			a.got.mu.Lock()
			a.got.fail = errFrame
			a.got.mu.Unlock()
		},
		"tampering": func(t testing.TB, a, b *side, x *memnet.Conn) {
			x.OnWrite(func(_ int64, b []byte) []byte { b[9] ^= 1; return b })
		},
		"fail, twice": func(t testing.TB, a, b *side, x *memnet.Conn) {
			go a.end.fail(errors.New("one"))
			a.end.fail(errors.New("two"))
		},
		"renewal and close": func(t testing.TB, a, b *side, x *memnet.Conn) {
			go a.self.Renew(a.credential(t, 9*time.Hour), a.authority.History())
			a.end.Close()
		},
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b, x, _ := open(t, memnet.Link{Latency: time.Millisecond, Rate: 10 << 20, Buffer: 16 << 10})
				var all sync.WaitGroup
				for _, s := range []*side{a, b} {
					for i := range 4 {
						q := new(buffer.Queue)
						q.Async.Store(i%2 == 0)
						all.Go(func() {
							for s.send(q, make([]byte, 1000*(i*i+1))) == nil {
							}
						})
						all.Go(func() {
							for s.end.Control(uint64(i)<<32, AppendHeader(nil, 0x16, 1, 0)) == nil {
								time.Sleep(time.Millisecond)
								s.end.Ping()
								s.end.Budget()
								s.end.RTT()
							}
						})
						all.Go(func() {
							for s.end.Err() == nil {
								time.Sleep(3 * time.Millisecond)
								s.end.Stop(q, context.DeadlineExceeded)
								s.end.Discard(new(buffer.Queue), net.ErrClosed)
							}
						})
					}
				}
				time.Sleep(50 * time.Millisecond)
				go end(t, a, b, x)
				<-a.ran
				<-b.ran
				if a.end.Err() == nil || b.end.Err() == nil {
					t.Error("Run returned and the channel has not ended")
				}
				all.Wait()
			})
		})
	}
}

func TestChannelOverTCPLeavesNoGoroutine(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer ln.Close()
	before := runtime.NumGoroutine()
	for name, end := range map[string]func(a, b *side){
		"close": func(a, b *side) { a.end.Close() },
		"cut":   func(a, b *side) { a.end.lane.(*net.TCPConn).SetLinger(0); a.end.lane.Close() },
		"abort": func(a, b *side) { a.end.Abort(CloseRefused, errors.New("no")) },
	} {
		t.Run(name, func(t *testing.T) {
			a, b := newSides(t)
			dialled := make(chan net.Conn)
			go func() {
				c, err := net.Dial("tcp", ln.Addr().String())
				if err != nil {
					t.Error(err)
				}
				dialled <- c
			}()
			y := must(ln.Accept())(t)
			reopen(t, a, b, <-dialled, y)
			const each = 200
			var all sync.WaitGroup
			for _, s := range []*side{a, b} {
				all.Go(func() {
					q := new(buffer.Queue)
					for i := range each {
						if err := s.send(q, bytes.Repeat([]byte{byte(i)}, 1+i*300)); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			all.Wait()
			if name == "close" {
				check(t, a.end.Close())
			} else {
				end(a, b)
			}
			errA, errB := <-a.ran, <-b.ran
			switch name {
			case "close":
				if errA != ErrClosed || errB != ErrClosed {
					t.Errorf("%v, %v", errA, errB)
				}
				for _, s := range []*side{a, b} {
					got := s.got.all()
					if len(got) != each {
						t.Errorf("%d frames arrived", len(got))
					}
					for i, g := range got {
						if !bytes.Equal(g, bytes.Repeat([]byte{byte(i)}, 1+i*300)) {
							t.Errorf("frame %d is wrong", i)
						}
					}
				}
			case "cut":
				if !errors.Is(errB, ErrCut) {
					t.Errorf("the other end: %v", errB)
				}
			case "abort":
				if c := (*Closed)(nil); !errors.As(errB, &c) || c.Code != CloseRefused {
					t.Errorf("the other end: %v", errB)
				}
			}
			check(t, a.config.Node.Close())
			check(t, b.config.Node.Close())
		})
	}
	// The runtime takes a goroutine off the count some time after its last line.
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); runtime.Gosched() {
		if runtime.NumGoroutine() <= before {
			return
		}
	}
	stacks := make([]byte, 1<<16)
	t.Errorf("%d goroutines, before there were %d:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
}

func TestNothingHoldsAChannelThatHasEnded(t *testing.T) {
	a, b, _, _ := open(t, memnet.Link{})
	check(t, a.end.Close())
	<-a.ran
	<-b.ran
	gone := make(chan struct{}, 2)
	for _, e := range []*End{a.end, b.end} {
		runtime.AddCleanup(e, func(struct{}) { gone <- struct{}{} }, struct{}{})
	}
	a.end, b.end = nil, nil
	// Their actors end on goroutines of their own, and the runtime forgets a timer that was stopped
	// when it comes upon it, at the latest when it would have fired: a look is five seconds away.
	again, late := time.NewTicker(10*time.Millisecond), time.After(time.Minute)
	defer again.Stop()
	for left := 2; left > 0; {
		runtime.GC()
		select {
		case <-gone:
			left--
		case <-again.C:
		case <-late:
			t.Fatalf("%d ends are still there", left)
		}
	}
	runtime.KeepAlive(a) // with its identity, its node and its Config
	runtime.KeepAlive(b)
}

func TestEndSaysWhatItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, _, _ := open(t, memnet.Link{})
		if a.end.Err() != nil {
			t.Errorf("Err of an open channel: %v", a.end.Err())
		}
		if p, ok := identity.PeerOf(a.end); !ok || p.ID() != b.self.ID() {
			t.Errorf("the peer behind an end is %v", p)
		}
		a.end.Close()
		<-a.end.Done()
		<-b.end.Done()
	})
}

func TestAPeerThatTakesNothingIsGivenUpThoughItIsHeard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newSides(t)
		x, y := memnet.Pipe(memnet.Link{})
		errA, errB := meet(a, b, x, y)
		check(t, errors.Join(errA, errB))
		b.run() // a never reads
		queued := make(chan error, 1)
		go func() {
			q := new(buffer.Queue)
			for {
				if err := b.send(q, make([]byte, 60000)); err != nil {
					queued <- err
					return
				}
			}
		}()
		begin := time.Now()
		for b.end.Err() == nil && time.Since(begin) < time.Hour {
			a.end.heard.Store(int64(time.Since(a.end.begin))) // it does not mind
			time.Sleep(time.Second)
		}
		if d := time.Since(begin); !errors.Is(b.end.Err(), ErrDeaf) || d > 70*time.Second {
			t.Errorf("after %v: %v", d, b.end.Err())
		}
		if err := <-queued; !errors.Is(err, ErrDeaf) {
			t.Errorf("whoever waited to send got %v", err)
		}
		a.end.fail(ErrClosed)
		<-b.ran
	})
}

func TestAPeerThatTakesLittleAtATimeIsNotDeaf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newSides(t)
		x, y := memnet.Pipe(memnet.Link{})
		errA, errB := meet(a, b, x, y)
		check(t, errors.Join(errA, errB))
		b.run() // a's lane is read here, slowly
		go func() {
			q := new(buffer.Queue)
			for b.send(q, make([]byte, 60000)) == nil {
			}
		}()
		for range 300 {
			a.end.heard.Store(int64(time.Since(a.end.begin)))
			time.Sleep(time.Second)
			_, err := io.CopyN(io.Discard, x, 5<<10)
			check(t, err)
		}
		if err := b.end.Err(); err != nil {
			t.Errorf("it takes 5 KiB/s and is given up: %v", err)
		}
		a.end.fail(ErrClosed)
		b.end.fail(ErrClosed)
		<-b.ran
	})
}

func TestAWatcherOfTheOpenerIsToldWhyTheChannelEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, x, _ := open(t, memnet.Link{})
		told := make(chan error, 1)
		a.config.Node.Watch(a.end.opener.Address(), func(err error) { told <- err })
		x.Cut()
		if err := <-told; !errors.Is(err, ErrCut) {
			t.Errorf("told %v", err)
		}
		<-a.ran
		<-b.ran

		a, b, _, _ = open(t, memnet.Link{})
		a.end.opener.Stop(errors.New("enough")) // by whomever
		<-a.ran
		<-b.ran
		if err := a.end.Err(); err == nil || err.Error() != "enough" {
			t.Errorf("the channel ended with %v", err)
		}
	})
}
