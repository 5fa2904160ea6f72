package journeys_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/tests/fault"
	"github.com/portal-tunnel/portal/tests/process"
)

const transfer = 1 << 20

// pattern is 1 MiB in which every place tells where it is.
func pattern() []byte {
	b := make([]byte, transfer)
	for i := 0; i < len(b); i += 4 {
		binary.BigEndian.PutUint32(b[i:], uint32(i)*2654435761)
	}
	return b
}

// service sends 1 MiB to whoever sends 'D', and to 'U' it reads until the end
// and tells what it read, and how that ended.
type service struct {
	ln      net.Listener
	uploads chan received
	reached chan func() // called when the next upload has come so far
	after   int
}

type received struct {
	bytes []byte
	err   error // nil: an end of file
}

func newService(t testing.TB) *service {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &service{ln: ln, uploads: make(chan received, 64), reached: make(chan func(), 1)}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go s.serve(c)
		}
	}()
	return s
}

func (s *service) serve(c net.Conn) {
	defer c.Close()
	var kind [1]byte
	if _, err := io.ReadFull(c, kind[:]); err != nil {
		return
	}
	switch kind[0] {
	case 'D':
		// Not closed behind the data: an end of file that a client sees is the
		// tunnel's invention.
		c.Write(pattern())
		io.Copy(io.Discard, c)
	case 'U':
		c.SetReadDeadline(time.Now().Add(30 * time.Second))
		var reached func()
		select {
		case reached = <-s.reached:
		default:
		}
		s.uploads <- readAll(c, s.after, reached)
	case 'E':
		io.Copy(c, c)
		c.(*net.TCPConn).CloseWrite()
	}
}

// check says what is wrong with what an application read.
func check(got received) error {
	want := pattern()
	switch {
	case len(got.bytes) > len(want) || !bytes.Equal(got.bytes, want[:len(got.bytes)]):
		return fmt.Errorf("%d bytes that were never sent", len(got.bytes))
	case got.err == nil:
		return fmt.Errorf("a clean end after %d bytes of a stream that was cut", len(got.bytes))
	case !errors.Is(got.err, syscall.ECONNRESET):
		return fmt.Errorf("%w after %d bytes, not a reset", got.err, len(got.bytes))
	}
	return nil
}

// download reads until the connection ends, and tells progress after n bytes.
func download(t testing.TB, addr string, n int, reached func()) received {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := c.Write([]byte("D")); err != nil {
		return received{nil, err}
	}
	return readAll(c, n, reached)
}

// readAll reads until the connection ends, and tells when n bytes are there.
func readAll(c net.Conn, n int, reached func()) received {
	got := make([]byte, 0, transfer)
	buf := make([]byte, 4096)
	for {
		k, err := c.Read(buf)
		got = append(got, buf[:k]...)
		if reached != nil && len(got) >= n {
			reached()
			reached = nil
		}
		if errors.Is(err, io.EOF) {
			return received{got, nil}
		}
		if err != nil {
			return received{got, err}
		}
	}
}

// upload sends the pattern and never ends its direction; it returns when the
// connection fails.
func upload(t testing.TB, addr string) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := c.Write(append([]byte("U"), pattern()...)); err == nil {
		io.Copy(io.Discard, c)
	}
}

func TestACutOnTheWayIsAnExactPrefixAndThenAReset(t *testing.T) {
	s := newService(t)
	h := newHouse(t)
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	_, lanes := h.outlet("127.0.0.1:0", s.ln.Addr().String())
	p, err := fault.New(lanes)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	in, addr := h.inlet("bot", "0", p.Addr())
	h.line(in, `inlet db ready direct`)

	places := 6
	if long() {
		places = 64
	}
	cuts := 0
	for _, kind := range []fault.Kind{fault.FIN, fault.RST, fault.Flip} {
		for i := range places {
			// The first kilobyte is left to what a connection before may still say.
			at := 1<<10 + int64(i)*transfer/int64(places) + rand.Int64N(1<<10)
			name := fmt.Sprintf("%v at %d", kind, at)

			ready(t, addr) // else the fault meets a handshake, not the transfer
			fired := p.Arm(kind, fault.In, at)
			if err := check(download(t, addr, 0, nil)); err != nil {
				t.Errorf("download, %s: %v", name, err)
			}
			<-fired

			ready(t, addr)
			fired = p.Arm(kind, fault.Out, at)
			upload(t, addr)
			<-fired
			// A cut before the first byte reached the service leaves it nothing to
			// tell; the inlet's client was reset all the same.
			select {
			case got := <-s.uploads:
				if err := check(got); err != nil {
					t.Errorf("upload, %s: %v", name, err)
				}
			case <-time.After(2 * time.Second):
				if at > 64<<10 {
					t.Errorf("upload, %s: the service was not told", name)
				}
			}
			cuts += 2
		}
	}
	t.Logf("%d cuts", cuts)
}

func TestAKilledProcessIsAnExactPrefixAndThenAReset(t *testing.T) {
	s := newService(t)
	h := newHouse(t)
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	kills := 2
	if long() {
		kills = 16
	}
	out, lanes := h.outlet("127.0.0.1:0", s.ln.Addr().String())
	in, addr := h.inlet("bot", "0", lanes)
	h.line(in, `inlet db ready direct`)
	restart := func(which string) {
		if which == "outlet" {
			out, _ = h.outlet(lanes, s.ln.Addr().String())
		} else {
			in, _ = h.inlet("bot", addr, lanes)
			h.line(in, `inlet db ready direct`)
		}
	}
	for _, which := range []string{"outlet", "inlet"} {
		kill := func() {
			p := out
			if which == "inlet" {
				p = in
			}
			kill(t, p)
		}
		for i := range kills {
			at := i*transfer/kills + rand.IntN(transfer/kills/2)
			if err := check(download(t, addr, at, kill)); err != nil {
				t.Errorf("download, %s killed at %d: %v", which, at, err)
			}
			restart(which)
			ready(t, addr)

			s.after = at
			s.reached <- kill
			upload(t, addr)
			if err := check(<-s.uploads); err != nil {
				t.Errorf("upload, %s killed at %d: %v", which, at, err)
			}
			restart(which)
			ready(t, addr)
		}
	}
}

func kill(t testing.TB, p *process.Process) {
	if err := syscall.Kill(-p.Pid(), syscall.SIGKILL); err != nil {
		t.Errorf("killing process %d: %v", p.Pid(), err)
	}
	<-p.Done()
}

// ready tries until an echo comes back: everything is there again by itself.
func ready(t testing.TB, addr string) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; {
		err := func() error {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				return err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(5 * time.Second))
			if _, err := c.Write([]byte("Ex")); err != nil {
				return err
			}
			_, err = io.ReadFull(c, make([]byte, 1))
			return err
		}()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not there again: %v", err)
		}
	}
}
