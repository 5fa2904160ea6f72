package journeys_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"
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

// A client that does not read stops what it is sent, and nothing else: not what it sends by the same
// stream, and no other stream.
func TestADownloadThatIsNotReadStallsOnlyItself(t *testing.T) {
	t.Parallel()
	s := newService(t)
	w := newWay(t, s.addr())
	other := dial(t, w.addr, []byte("E"))
	if err := echo(other); err != nil {
		t.Fatal(err)
	}
	number, first := s.numbered('B')
	c := dial(t, w.addr, first)
	select {
	case <-s.stuck:
	case <-time.After(patience):
		t.Fatal("the service's writes never wait for the client")
	}

	if err := echo(other); err != nil {
		t.Errorf("a stream from before: %v", err)
	}
	ready(t, w.addr)
	up := dial(t, w.addr, []byte("S"))
	if _, err := up.Write(pattern()); err != nil {
		t.Fatal(err)
	}
	up.(halfCloser).CloseWrite()
	sum := sha256.Sum256(pattern())
	if got, err := io.ReadAll(up); err != nil || !bytes.Equal(got, sum[:]) {
		t.Errorf("%d bytes of another stream's answer, %v", len(got), err)
	}
	down, first := s.numbered('H')
	h := dial(t, w.addr, first)
	if got, err := io.ReadAll(h); err != nil || !bytes.Equal(got, pattern()) {
		t.Errorf("%d bytes of another stream's download, %v", len(got), err)
	}
	h.(halfCloser).CloseWrite()
	if got, ok := s.result(down, patience); !ok || got.err != nil {
		t.Errorf("another stream's end: %v", got.err)
	}

	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write(pattern()); err != nil {
		t.Fatalf("the upload of the same stream: %v", err)
	}
	c.(halfCloser).CloseWrite()
	if got, ok := s.result(number, patience); !ok || got.err != nil || !bytes.Equal(got.bytes, pattern()) {
		t.Fatalf("%d bytes of the upload came, %v", len(got.bytes), got.err)
	}
	// And what was not read is all there.
	for n, got := 0, make([]byte, transfer); ; n++ {
		k, err := io.ReadFull(c, got)
		if err == io.EOF && n > 0 {
			break
		}
		if err != nil || !bytes.Equal(got, pattern()) {
			t.Fatalf("%d bytes of MiB %d, %v", k, n+1, err)
		}
	}
}
