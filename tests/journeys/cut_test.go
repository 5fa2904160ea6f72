package journeys_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/tests/fault/proxy"
	"github.com/portal-tunnel/portal/tests/process"
)

// check says what is wrong with what an application read of a transfer that was cut.
func check(got received) error {
	want := pattern()
	if len(got.bytes) > len(want) || !bytes.Equal(got.bytes, want[:len(got.bytes)]) {
		return fmt.Errorf("%d bytes that are no prefix of what was sent", len(got.bytes))
	}
	if got.err == nil {
		return fmt.Errorf("a clean end after %d bytes", len(got.bytes))
	}
	if !errors.Is(got.err, syscall.ECONNRESET) {
		return fmt.Errorf("%w after %d bytes, not a reset", got.err, len(got.bytes))
	}
	return nil
}

// download reads the pattern until the connection ends, here and at the service.
func download(t testing.TB, s *service, addr string, m mark) error {
	t.Helper()
	number, first := s.numbered('D')
	c, err := connect(addr, first)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := check(readAll(c, m)); err != nil {
		return fmt.Errorf("the client read %w", err)
	}
	r, ok := s.result(number, patience)
	if !ok {
		return errors.New("the service was not told")
	}
	if err := check(r); err != nil {
		return fmt.Errorf("the service read %w", err)
	}
	return nil
}

// upload sends the pattern without an end, until the connection fails, here and at the service,
// which need not have seen the stream when it was cut before sure bytes.
func upload(t testing.TB, s *service, addr string, sure bool) error {
	t.Helper()
	number, first := s.numbered('U')
	c, err := connect(addr, first)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write(pattern())
	if err == nil {
		_, err = io.Copy(io.Discard, c)
	}
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		return fmt.Errorf("the client was told %v, not a reset", err)
	}
	within := patience
	if !sure {
		within = time.Second
	}
	r, ok := s.result(number, within)
	if !ok {
		if sure {
			return errors.New("the service was not told")
		}
		return nil
	}
	if err := check(r); err != nil {
		return fmt.Errorf("the service read %w", err)
	}
	return nil
}

// Without a tunnel a cut by FIN is a clean end: were that not noticed, no other test here would mean
// anything.
func TestACutThatLooksLikeAnEndIsNoticed(t *testing.T) {
	t.Parallel()
	s := newService(t)
	p, err := proxy.Listen("", s.addr())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	p.Arm(proxy.Fault{Kind: proxy.FIN, Direction: proxy.In, At: transfer / 2})
	if err := download(t, s, p.Addr(), mark{}); err == nil || !strings.Contains(err.Error(), "clean end after 524288 bytes") {
		t.Errorf("the check says %v", err)
	}
	b := pattern()
	b[transfer/2] ^= 1
	for _, wrong := range []received{{b, syscall.ECONNRESET}, {append(pattern(), 0), syscall.ECONNRESET}, {nil, nil}, {nil, os.ErrDeadlineExceeded}} {
		if check(wrong) == nil {
			t.Errorf("%d bytes and %v pass the check", len(wrong.bytes), wrong.err)
		}
	}
}

func TestACutOnTheWayIsAnExactPrefixAndThenAReset(t *testing.T) {
	t.Parallel()
	s := newService(t)
	h := newHouse(t)
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	_, lanes := h.outlet("127.0.0.1:0", s.addr())
	p, err := proxy.Listen("", lanes)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	in, addr := h.inlet("bot", "0", p.Addr())
	h.line(in, `inlet db ready direct`)

	places := 8
	if long() {
		places = 64
	}
	cuts := 0
	for _, kind := range []proxy.Kind{proxy.FIN, proxy.RST, proxy.Flip} {
		for i := range places {
			// The first kilobyte is left to what a connection before may still say.
			at := 1<<10 + int64(i)*transfer/int64(places) + rand.Int64N(1<<10)

			ready(t, addr) // else the fault meets a handshake, not the transfer
			d := p.Arm(proxy.Fault{Kind: kind, Direction: proxy.In, At: at})
			if err := download(t, s, addr, mark{}); err != nil {
				t.Errorf("download, %v: %v", d, err)
			}
			<-d.Done

			ready(t, addr)
			d = p.Arm(proxy.Fault{Kind: kind, Direction: proxy.Out, At: at})
			if err := upload(t, s, addr, at > 128<<10); err != nil {
				t.Errorf("upload, %v: %v", d, err)
			}
			<-d.Done
			cuts += 2
		}
	}
	t.Logf("F-01: %d cuts on the direct way, 0 clean ends", cuts)
}

func TestAKilledProcessIsAnExactPrefixAndThenAReset(t *testing.T) {
	t.Parallel()
	s := newService(t)
	h := newHouse(t)
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	kills := 12
	if long() {
		kills = 64
	}
	out, lanes := h.outlet("127.0.0.1:0", s.addr())
	in, addr := h.inlet("bot", "0", lanes)
	for _, victim := range []struct {
		name    string
		process **process.Process
		restart func()
	}{
		// The inlet is not touched: it is ready again by itself.
		{"outlet", &out, func() { out, _ = h.outlet(lanes, s.addr()) }},
		{"inlet", &in, func() { in, _ = h.inlet("bot", addr, lanes) }},
	} {
		for i := range kills {
			m := mark{i*transfer/kills + rand.IntN(transfer/kills/2), func() { kill(t, *victim.process) }}
			ready(t, addr)
			if err := download(t, s, addr, m); err != nil {
				t.Errorf("download, %s killed at %d: %v", victim.name, m.n, err)
			}
			victim.restart()

			ready(t, addr)
			s.marks <- m
			if err := upload(t, s, addr, true); err != nil {
				t.Errorf("upload, %s killed at %d: %v", victim.name, m.n, err)
			}
			victim.restart()
		}
	}
	ready(t, addr)
}

// sendSignal has a process get one: SIGSTOP has it stand still, SIGCONT go on.
func sendSignal(t testing.TB, p *process.Process, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(p.Pid(), s); err != nil {
		t.Fatalf("%v for process %d: %v", s, p.Pid(), err)
	}
}

func kill(t testing.TB, p *process.Process) {
	if err := syscall.Kill(-p.Pid(), syscall.SIGKILL); err != nil {
		t.Errorf("killing process %d: %v", p.Pid(), err)
	}
	<-p.Done()
}
