package journeys_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
)

func TestTheServiceAnswersAClientThatHasEnded(t *testing.T) {
	t.Parallel()
	s := newService(t)
	w := newWay(t, s.addr())
	c := dial(t, w.addr, []byte("S"))
	if _, err := c.Write(pattern()); err != nil {
		t.Fatal(err)
	}
	if err := c.(halfCloser).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if want := sha256.Sum256(pattern()); err != nil || !bytes.Equal(got, want[:]) {
		t.Fatalf("%d bytes of an answer, %v", len(got), err)
	}
}

func TestTheClientSendsToAServiceThatHasEnded(t *testing.T) {
	t.Parallel()
	s := newService(t)
	w := newWay(t, s.addr())
	number, first := s.numbered('H')
	c := dial(t, w.addr, first)
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, pattern()) {
		t.Fatalf("%d bytes from the service, %v", len(got), err)
	}
	if _, err := c.Write(pattern()); err != nil {
		t.Fatal(err)
	}
	if err := c.(halfCloser).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, ok := s.result(number, patience); !ok || got.err != nil || !bytes.Equal(got.bytes, pattern()) {
		t.Fatalf("the service read %d bytes, %v", len(got.bytes), got.err)
	}
}

func TestAResetOfTheClientReachesTheService(t *testing.T) {
	t.Parallel()
	s := newService(t)
	w := newWay(t, s.addr())
	arrived := make(chan struct{})
	s.marks <- mark{transfer, func() { close(arrived) }}
	number, first := s.numbered('U')
	c := dial(t, w.addr, first)
	if _, err := c.Write(pattern()); err != nil {
		t.Fatal(err)
	}
	<-arrived
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
	got, ok := s.result(number, patience)
	if !ok {
		t.Fatal("the service was not told")
	}
	if err := check(got); err != nil {
		t.Fatalf("the service read %v", err)
	}
}

func TestAResetOfTheServiceReachesTheClient(t *testing.T) {
	t.Parallel()
	s := newService(t)
	w := newWay(t, s.addr())
	c := dial(t, w.addr, []byte("R"))
	got := make([]byte, transfer)
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, pattern()) {
		t.Fatalf("before the reset: %v", err)
	}
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(got); n != 0 || !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("%d bytes and %v, not a reset", n, err)
	}
}
