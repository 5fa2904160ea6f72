package outlet_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/outlet"
)

// code is the code in an error of a stream, 0 for any other.
func code(err error) stream.Code {
	var refused *stream.RefusedError
	var reset *stream.ResetError
	switch {
	case errors.As(err, &refused):
		return refused.Code
	case errors.As(err, &reset):
		return reset.Code
	}
	return 0
}

func TestThePolicyDecidesEachOpenBeforeTheTargetIsDialled(t *testing.T) {
	db := echoing()
	virtual(t, db.dial, nil, func(y *yard) {
		may, not := y.call(agent), y.call(guest)
		y.echoes(y.stream(may))
		for _, kind := range []stream.HeaderKind{stream.Bytes, stream.Probe, stream.PingTarget} {
			if _, err := ask(not, kind, "db"); code(err) != stream.CodeRefused {
				t.Errorf("kind %d for a guest: %v", kind, err)
			}
			if _, err := ask(may, kind, "other"); code(err) != stream.CodeRefused {
				t.Errorf("kind %d for another name: %v", kind, err)
			}
		}
		if _, err := ask(may, stream.Request, "db"); code(err) != stream.CodeRefused {
			t.Errorf("a stream of a kind that is not an outlet's: %v", err)
		}
		if n := db.count(); n != 1 {
			t.Errorf("the target was dialled %d times, want once", n)
		}
		y.echoes(y.stream(may)) // the channel lives on
	})
}

func TestTheNodeListsTheOutletItsChannelsAndItsStreams(t *testing.T) {
	virtual(t, echoing().dial, nil, func(y *yard) {
		synctest.Wait()
		count := func(what string, want int) {
			t.Helper()
			synctest.Wait()
			n := 0
			for range y.nodes[0].List() {
				n++
			}
			if n != want {
				t.Errorf("%s: %d actors, want %d", what, n, want)
			}
		}
		count("the outlet", 1)
		l := y.call(agent)
		count("with a channel", 3)
		c := y.stream(l)
		count("with a stream", 4)
		c.CloseWrite()
		io.Copy(io.Discard, c)
		count("when it has ended", 3)
	})
}

// failing is a log that panics at a warning.
type failing struct{ slog.Handler }

func (failing) Handle(_ context.Context, r slog.Record) error {
	if r.Level == slog.LevelWarn {
		panic("the log is broken")
	}
	return nil
}

func TestADecisionThatPanicsIsARefusalAndTheNextStreamIsDecided(t *testing.T) {
	virtual(t, echoing().dial, func(o *outlet.Server) {
		o.Logger = slog.New(failing{slog.NewTextHandler(io.Discard, nil)})
	}, func(y *yard) {
		l, not := y.call(agent), y.call(guest)
		for range 3 {
			if _, err := ask(not, stream.Bytes, "db"); code(err) != stream.CodeInternal {
				t.Errorf("the one that fails: %v", err)
			}
			y.echoes(y.stream(l))
		}
	})
}

func TestAHeaderWithABodyIsRefused(t *testing.T) {
	db := echoing()
	virtual(t, db.dial, nil, func(y *yard) {
		c, err := y.call(agent).Mux.Open(stream.Header{Kind: stream.Bytes, Name: "db", Body: []byte{0}})
		if err == nil {
			err = c.Wait(context.Background())
		}
		if code(err) != stream.CodeRefused || db.count() != 0 {
			t.Errorf("%v, %d dials", err, db.count())
		}
	})
}

func TestProbesOfAPeerThatDoesNotReadEndItsChannel(t *testing.T) {
	virtual(t, echoing().dial, nil, func(y *yard) {
		lane, err := y.net.Dial(context.Background(), "mem", "10.0.0.2:1")
		if err != nil {
			t.Fatal(err)
		}
		deaf, err := channel.Initiate(context.Background(), lane, &channel.Config{
			Node: y.node(), Self: y.member(agent), Trust: identity.NewTrust(y.authority.ID()), Kind: channel.Service,
			Judge: func(*identity.Peer) error { return nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		sent := 0
		for id := uint32(1); id < 100000 && y.nodes[0].Len() > 1; id += 2 {
			p := channel.AppendHeader(nil, 0x10, id, 12)
			p = append(binary.BigEndian.AppendUint64(append(p, byte(stream.Probe)), 65536), 2, 'd', 'b')
			p = binary.BigEndian.AppendUint64(channel.AppendHeader(p, 0x14, id, 8), 0)
			b := buffer.Get(len(p) + buffer.Around)
			b.Commit(copy(b.Next(), p))
			if deaf.Send(new(buffer.Queue), b) != nil {
				break
			}
			sent++
			synctest.Wait()
		}
		time.Sleep(10 * time.Second)
		// The pipe takes some 64 KiB of answers before the first one waits.
		if left := y.nodes[0].Len(); left != 1 || sent < 1000 || sent > 5000 {
			t.Errorf("after %d probes the outlet has %d actors, want its own alone", sent, left)
		}
		deaf.Abort(channel.CloseInternal, context.Canceled)
		time.Sleep(10 * time.Second)
	})
}

// Opens that find no place are no abuse, but each leaves an answer: whoever does not read those is not
// read, and after ten seconds cut.
func TestOpensOfAPeerThatDoesNotReadItsAnswersAreNotReadEither(t *testing.T) {
	virtual(t, echoing().dial, func(s *outlet.Server) { s.Limits.Streams = 1 }, func(y *yard) {
		y.stream(y.call(agent)) // has the place
		lane, err := y.net.Dial(context.Background(), "mem", "10.0.0.2:1")
		if err != nil {
			t.Fatal(err)
		}
		deaf, err := channel.Initiate(context.Background(), lane, &channel.Config{
			Node: y.node(), Self: y.member(agent), Trust: identity.NewTrust(y.authority.ID()), Kind: channel.Service,
			Judge: func(*identity.Peer) error { return nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		before := y.nodes[0].Len()
		var sent atomic.Int64
		over := make(chan struct{})
		go func() {
			defer close(over)
			for id := uint32(1); ; id += 2 {
				p := channel.AppendHeader(nil, 0x10, id, 12)
				p = append(binary.BigEndian.AppendUint64(append(p, byte(stream.Bytes)), 65536), 2, 'd', 'b')
				b := buffer.Get(len(p) + buffer.Around)
				b.Commit(copy(b.Next(), p))
				if deaf.Send(new(buffer.Queue), b) != nil {
					return
				}
				sent.Add(1)
			}
		}()
		synctest.Wait()
		// What the pipes take, two lots of answers, and what was read with them.
		if n := sent.Load(); n < 1000 || n > 10000 {
			t.Errorf("%d opens were taken", n)
		}
		time.Sleep(9 * time.Second)
		synctest.Wait()
		if n := y.nodes[0].Len(); n != before {
			t.Errorf("it was cut within 9 s: %d actors, %d before", n, before)
		}
		time.Sleep(20 * time.Second)
		<-over
		if n := y.nodes[0].Len(); n != before-2 {
			t.Errorf("%d actors, %d before: it was not cut", n, before)
		}
	})
}

func TestAnotherNameHasTheSameAnswerAsAPolicyRefusal(t *testing.T) {
	for _, attrs := range []identity.Attributes{guest, {"team": "sales"}} {
		virtual(t, echoing().dial, nil, func(y *yard) {
			l := y.call(attrs)
			_, ours := ask(l, stream.Bytes, "db")
			_, other := ask(l, stream.Bytes, "payroll")
			if code(ours) != stream.CodeRefused || fmt.Sprint(ours) != fmt.Sprint(other) {
				t.Errorf("for %v:\nour name:     %v\nanother name: %v", attrs, ours, other)
			}
			for _, v := range attrs {
				if strings.Contains(ours.Error(), fmt.Sprint(v)) {
					t.Errorf("the answer %q has a value in it", ours)
				}
			}
		})
	}
}

func TestAProbeAnswersWithoutATarget(t *testing.T) {
	db := echoing()
	virtual(t, db.dial, nil, func(y *yard) {
		l := y.call(agent)
		c, err := ask(l, stream.Probe, "db")
		if err != nil || db.count() != 0 {
			t.Errorf("%v, %d dials", err, db.count())
		}
		c.Close()
		c, err = ask(l, stream.PingTarget, "db")
		if err != nil || db.count() != 1 {
			t.Errorf("%v, %d dials", err, db.count())
		}
		c.Close()
		synctest.Wait()
		if n := l.Mux.Streams(); n != 0 || y.outlet.Streams() != 0 {
			t.Errorf("%d and %d streams are left", n, y.outlet.Streams())
		}
	})
}

func TestAReplacedPolicyResetsWhatItDoesNotAllowAndKeepsTheRest(t *testing.T) {
	either := `principal.role == "agent" || principal.role == "guest"`
	virtual(t, echoing().dial, nil, func(y *yard) {
		y.outlet.SetAllow(y.policy(either))
		stays, goes := y.stream(y.call(agent)), y.stream(y.call(guest))
		y.outlet.SetAllow(y.policy(agents))
		if _, err := goes.Read(make([]byte, 1)); code(err) != stream.CodeRevoked || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a stream that is not allowed any more: %v", err)
		}
		y.echoes(stays)
		y.outlet.SetAllow(nil)
		if _, err := stays.Read(make([]byte, 1)); code(err) != stream.CodeRevoked {
			t.Errorf("a stream that nobody allows: %v", err)
		}
	})
}

func TestAnEndedCredentialResetsItsStreamsWithinTwoSeconds(t *testing.T) {
	for _, whose := range []string{"peer", "outlet"} {
		virtual(t, echoing().dial, nil, func(y *yard) {
			life := time.Minute
			if whose == "outlet" {
				life = 2 * time.Hour
			}
			caller, err := identity.NewSelf()
			if err != nil {
				t.Fatal(err)
			}
			y.issue(caller, agent, life)
			l := y.callAs(caller)
			c := y.stream(l)
			until := caller.Credential().Expires
			if whose == "outlet" {
				until = y.outlet.Self.Credential().Expires
			}
			_, err = c.Read(make([]byte, 1))
			if late := time.Since(until); code(err) != stream.CodeExpired || late < 0 || late > 2*time.Second {
				t.Errorf("%s: %v, %v after the expiry", whose, err, late)
			}
			if _, err := ask(l, stream.Bytes, "db"); code(err) != stream.CodeExpired {
				t.Errorf("%s: a new stream: %v", whose, err)
			}
		})
	}
}

func TestARenewedCredentialCarriesAStreamOnUnlessItLostTheAttribute(t *testing.T) {
	virtual(t, echoing().dial, nil, func(y *yard) {
		caller, _ := identity.NewSelf()
		y.issue(caller, agent, time.Minute)
		c := y.stream(y.callAs(caller))
		for range 20 {
			time.Sleep(30 * time.Second)
			y.issue(caller, agent, time.Minute)
			y.echoes(c)
		}
		y.issue(caller, guest, 2*time.Minute)
		begin := time.Now()
		if _, err := c.Read(make([]byte, 1)); code(err) != stream.CodeRevoked || time.Since(begin) > 2*time.Second {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
	})
}

func TestMoreStreamsThanTheLimitAreBusy(t *testing.T) {
	virtual(t, echoing().dial, func(s *outlet.Server) { s.Limits.Streams = 2 }, func(y *yard) {
		l := y.call(agent)
		first, second := y.stream(l), y.stream(l)
		if _, err := ask(l, stream.Bytes, "db"); code(err) != stream.CodeBusy {
			t.Errorf("a third stream: %v", err)
		}
		if _, err := ask(l, stream.Probe, "db"); err != nil {
			t.Errorf("a probe: %v", err)
		}
		first.Close()
		synctest.Wait()
		y.echoes(y.stream(l))
		y.echoes(second)
	})
}

func TestOneIdentityHasItsShareOfAnOutletAndNoMore(t *testing.T) {
	virtual(t, echoing().dial, func(s *outlet.Server) { s.Limits.Streams, s.Limits.StreamsEach = 4, 2 }, func(y *yard) {
		greedy := y.member(agent)
		one, two := y.callAs(greedy), y.callAs(greedy)
		first, second := y.stream(one), y.stream(two)
		for _, l := range []*link.Live{one, two} {
			if _, err := ask(l, stream.Bytes, "db"); code(err) != stream.CodeBusy || !strings.Contains(err.Error(), "this identity has its 2") {
				t.Errorf("a third stream: %v", err)
			}
		}
		other := y.call(agent)
		y.echoes(y.stream(other))
		y.echoes(y.stream(other))
		if _, err := ask(y.call(agent), stream.Bytes, "db"); code(err) != stream.CodeBusy || !strings.Contains(err.Error(), "the outlet has its 4") {
			t.Errorf("a fifth stream: %v", err)
		}
		first.Close()
		synctest.Wait()
		y.echoes(y.stream(two))
		y.echoes(second)
	})
}

// slow is a target that answers when its context ends.
func slow(ended chan<- error) outlet.Target {
	return func(ctx context.Context, _ *outlet.Request) (net.Conn, error) {
		<-ctx.Done()
		ended <- ctx.Err()
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: ctx.Err()}
	}
}

func TestADialWaitsItsTurnWithinItsTime(t *testing.T) {
	virtual(t, nil, func(s *outlet.Server) { s.Target, s.Limits.Dials = slow(make(chan error, 9)), 1 }, func(y *yard) {
		l := y.call(agent)
		first, err := l.Mux.Open(stream.Header{Kind: stream.Bytes, Name: "db"})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		// The first gives up after 4 s; then it is the second's turn, for what is left.
		time.AfterFunc(4*time.Second, func() { first.Reset(stream.CodeLocal, "") })
		begin := time.Now()
		if _, err := ask(l, stream.Bytes, "db"); code(err) != stream.CodeTargetTimeout || time.Since(begin) != 10*time.Second {
			t.Errorf("the second: %v after %v", err, time.Since(begin))
		}
		// One whose turn does not come at all.
		if first, err = l.Mux.Open(stream.Header{Kind: stream.Bytes, Name: "db"}); err != nil {
			t.Fatal(err)
		}
		second, err := l.Mux.Open(stream.Header{Kind: stream.Bytes, Name: "db"})
		if err != nil {
			t.Fatal(err)
		}
		if err := second.Wait(context.Background()); code(err) != stream.CodeBusy && code(err) != stream.CodeTargetTimeout {
			t.Errorf("with no turn: %v", err)
		}
		first.Wait(context.Background())
		synctest.Wait()
		if n := y.outlet.Streams(); n != 0 {
			t.Errorf("%d streams are left", n)
		}
	})
}

// A crowd of clients is not abuse: those who have a connection keep it.
func TestACrowdEndsNobodysStream(t *testing.T) {
	virtual(t, nil, func(s *outlet.Server) { s.Limits.Streams = 2 }, func(y *yard) {
		l := y.call(agent)
		c, err := l.Mux.Open(stream.Header{Kind: stream.Bytes, Name: "db"})
		if err == nil {
			err = c.Wait(context.Background())
		}
		if err != nil {
			t.Fatal(err)
		}
		other, err := l.Mux.Open(stream.Header{Kind: stream.Bytes, Name: "db"})
		if err != nil {
			t.Fatal(err)
		}
		for range 5000 {
			if _, err := ask(l, stream.Bytes, "db"); code(err) != stream.CodeBusy {
				t.Fatalf("one of the crowd: %v", err)
			}
		}
		if l.Err() != nil {
			t.Errorf("the channel ended: %v", l.Err())
		}
		other.Close()
		c.Close()
	})
}

func TestADialEndsSoonAfterItsOpenerGaveUp(t *testing.T) {
	for name, give := range map[string]func(y *yard, c *stream.Conn){
		"by a reset":          func(_ *yard, c *stream.Conn) { c.Reset(stream.CodeLocal, "") },
		"by closing the lane": func(y *yard, _ *stream.Conn) { y.lives[0].Close(nil) },
	} {
		t.Run(name, func(t *testing.T) {
			var ended chan error // of the bubble
			virtual(t, nil, func(s *outlet.Server) { ended = make(chan error, 9); s.Target = slow(ended) }, func(y *yard) {
				c, err := y.call(agent).Mux.Open(stream.Header{Kind: stream.Bytes, Name: "db"})
				if err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if y.outlet.Streams() != 1 {
					t.Error("nothing is dialled")
				}
				begin := time.Now()
				give(y, c)
				if err := <-ended; !errors.Is(err, context.Canceled) || time.Since(begin) > 200*time.Millisecond {
					t.Errorf("the dial ended with %v after %v", err, time.Since(begin))
				}
				synctest.Wait()
				if n := y.outlet.Streams(); n != 0 {
					t.Errorf("%d streams are left", n)
				}
			})
		})
	}
}

func TestALeaseThatEndsDuringTheDialEndsItAndSaysSo(t *testing.T) {
	virtual(t, nil, func(s *outlet.Server) { s.Target = slow(make(chan error, 9)) }, func(y *yard) {
		c, err := y.call(agent).Mux.Open(stream.Header{Kind: stream.Bytes, Name: "db"})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		y.outlet.SetAllow(nil)
		if err := c.Wait(context.Background()); code(err) != stream.CodeRevoked {
			t.Errorf("the opener is told %v", err)
		}
	})
}

func TestAFailedDialHasItsCodeAndNoAddress(t *testing.T) {
	dial := func(err error) error {
		return &net.OpError{Op: "dial", Net: "tcp", Addr: memnet.Addr("10.9.8.7:5432"), Err: err}
	}
	for _, c := range []struct {
		err  error
		code stream.Code
	}{
		{dial(os.NewSyscallError("connect", syscall.ECONNREFUSED)), stream.CodeTargetRefused},
		{dial(os.ErrDeadlineExceeded), stream.CodeTargetTimeout},
		{dial(os.NewSyscallError("connect", syscall.ETIMEDOUT)), stream.CodeTargetTimeout},
		{dial(os.NewSyscallError("connect", syscall.EHOSTUNREACH)), stream.CodeTarget},
		{&net.DNSError{Err: "no such host", Name: "db.internal", IsNotFound: true}, stream.CodeTarget},
	} {
		fails := func(context.Context, *outlet.Request) (net.Conn, error) { return nil, c.err }
		virtual(t, fails, nil, func(y *yard) {
			l := y.call(agent)
			for _, kind := range []stream.HeaderKind{stream.Bytes, stream.PingTarget} {
				_, err := ask(l, kind, "db")
				if code(err) != c.code || strings.Contains(err.Error(), "10.9.8.7") || strings.Contains(err.Error(), "internal") {
					t.Errorf("%v is told as %v", c.err, err)
				}
			}
			if err := y.outlet.CheckTarget(context.Background()); !errors.Is(err, c.err) {
				t.Errorf("CheckTarget: %v", err)
			}
		})
	}
}

func TestDrainWaitsThenResets(t *testing.T) {
	virtual(t, echoing().dial, nil, func(y *yard) {
		l := y.call(agent)
		ends, stays := y.stream(l), y.stream(l)
		go func() {
			time.Sleep(10 * time.Second)
			ends.Close()
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 25*time.Second)
		defer cancel()
		begin := time.Now()
		if left := y.outlet.Drain(ctx); left != 1 || time.Since(begin) != 25*time.Second {
			t.Errorf("%d streams were left after %v", left, time.Since(begin))
		}
		if _, err := stays.Read(make([]byte, 1)); code(err) != stream.CodeAway {
			t.Errorf("the one that was left: %v", err)
		}
		if _, err := ask(l, stream.Bytes, "db"); err == nil {
			t.Error("a new stream was admitted")
		}
	})
}

func TestDrainReturnsAsSoonAsTheLastStreamEnds(t *testing.T) {
	virtual(t, echoing().dial, nil, func(y *yard) {
		c := y.stream(y.call(agent))
		go func() {
			time.Sleep(10 * time.Second)
			c.Close()
		}()
		begin := time.Now()
		if left := y.outlet.Drain(context.Background()); left != 0 || time.Since(begin) != 10*time.Second {
			t.Errorf("%d streams were left after %v", left, time.Since(begin))
		}
	})
}

func TestServeEndsThoughATargetDoesNotRead(t *testing.T) {
	var gone chan error
	const pipe = 16 << 10
	deaf := &targets{link: memnet.Link{Buffer: pipe}, serve: func(c *memnet.Conn) {
		c.CloseWrite()
		time.Sleep(time.Hour)
		_, err := io.Copy(io.Discard, c)
		gone <- err
	}}
	virtual(t, deaf.dial, func(*outlet.Server) { gone = make(chan error, 1) }, func(y *yard) {
		c := y.stream(y.call(agent))
		begin := time.Now()
		// More than the target's pipe takes, and within a new stream's credit: the
		// outlet holds the rest and both directions are over on the wire.
		c.Write(make([]byte, 3*pipe))
		c.CloseWrite()
		synctest.Wait()
		y.end()
		if d := time.Since(begin); d > 5*time.Second {
			t.Errorf("it took %v", d)
		}
		if err := <-gone; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the target that was cut off reads %v, want a reset", err)
		}
	})
}

func TestListenGivesAdmittedStreamsWithTheirPeer(t *testing.T) {
	virtual(t, nil, nil, func(y *yard) {
		ln := y.outlet.Listen()
		if ln != y.outlet.Listen() || ln.Addr().String() != "db" {
			t.Error("Listen does not return the same listener")
		}
		caller := y.member(agent)
		l := y.callAs(caller)
		go func() {
			c, err := ln.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			if r := c.(*outlet.Conn).Request; r.Name != "db" || r.Peer.ID() != caller.ID() {
				t.Errorf("the request is %+v", r)
			}
			io.Copy(c, c)
			c.Close()
		}()
		c := y.stream(l)
		y.echoes(c)
		c.CloseWrite()
		if b, err := io.ReadAll(c); len(b) != 0 || err != nil {
			t.Errorf("it ends with %q, %v", b, err)
		}
		c.Close()
		if _, err := ask(y.call(guest), stream.Bytes, "db"); code(err) != stream.CodeRefused {
			t.Errorf("a guest: %v", err)
		}

		lonely := y.stream(l) // nobody accepts it
		begin := time.Now()
		if _, err := lonely.Read(make([]byte, 1)); code(err) != stream.CodeTargetTimeout || time.Since(begin) != 10*time.Second {
			t.Errorf("a stream that nobody accepts: %v after %v", err, time.Since(begin))
		}
		ln.Close()
		ln.Close()
		if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept behind Close: %v", err)
		}
		late := y.stream(l)
		if _, err := late.Read(make([]byte, 1)); code(err) != stream.CodeTargetRefused {
			t.Errorf("a stream behind Close: %v", err)
		}
	})
}
