package journeys_test

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

// path is an outlet in front of a service and an inlet that is ready.
func path(t *testing.T, to string) (h *house, addr string, outPid, inPid int) {
	t.Helper()
	h = newHouse(t)
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	out, lanes := h.outlet("127.0.0.1:0", to, "--max-streams", "20000")
	in, addr := h.inlet("bot", "0", lanes)
	h.line(in, `inlet db ready direct`)
	return h, addr, out.Pid(), in.Pid()
}

// Both directions at once, half-closed at the end, compared by hash.
func TestBulkArrivesUnchangedBothWays(t *testing.T) {
	size := int64(1 << 30)
	if long() {
		size = 5 << 30 // beyond what 32 bits count
	}
	s := newService(t)
	_, addr, _, _ := path(t, s.ln.Addr().String())
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Minute))
	if _, err := c.Write([]byte("E")); err != nil {
		t.Fatal(err)
	}
	var sent, got hash.Hash = sha256.New(), sha256.New()
	var all sync.WaitGroup
	all.Go(func() {
		source := rand.NewChaCha8([32]byte{1})
		if _, err := io.CopyN(io.MultiWriter(c, sent), source, size); err != nil {
			t.Errorf("sending: %v", err)
		}
		c.(*net.TCPConn).CloseWrite()
	})
	n, err := io.Copy(got, c)
	all.Wait()
	if err != nil || n != size {
		t.Fatalf("%d of %d bytes came back: %v", n, size, err)
	}
	if a, b := hex.EncodeToString(sent.Sum(nil)), hex.EncodeToString(got.Sum(nil)); a != b {
		t.Fatalf("sent %s, got %s", a, b)
	}
}

func TestAResetOfTheClientReachesTheService(t *testing.T) {
	s := newService(t)
	_, addr, _, _ := path(t, s.ln.Addr().String())
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	s.after = 1
	arrived := make(chan struct{})
	s.reached <- func() { close(arrived) }
	c.Write([]byte("Uhello"))
	<-arrived
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
	if got := <-s.uploads; !errors.Is(got.err, syscall.ECONNRESET) {
		t.Fatalf("the service saw %v", got.err)
	}
}

// Idle streams are held, cost little, and leave nothing behind.
func TestIdleStreamsAreHeldAndLeaveNothingBehind(t *testing.T) {
	n := 1000
	if long() {
		n = 5000 // four descriptors each on this host, two of them the test's own
	}
	s := newService(t)
	_, addr, outPid, inPid := path(t, s.ln.Addr().String())
	ready(t, addr)
	before := [2]int{settled(t, outPid, 0), settled(t, inPid, 0)}
	memory := [2]int{rss(t, outPid), rss(t, inPid)}
	conns := make([]net.Conn, n)
	ask := func(c net.Conn) error {
		c.SetDeadline(time.Now().Add(30 * time.Second))
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err
	}
	for i := range conns {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			_, err = c.Write([]byte("E"))
		}
		if err == nil {
			err = ask(c)
		}
		if err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		conns[i] = c
	}
	t.Logf("%d idle streams: outlet %d B, inlet %d B of resident memory each", n,
		(rss(t, outPid)-memory[0])/n, (rss(t, inPid)-memory[1])/n)
	for i, c := range conns {
		if err := ask(c); err != nil {
			t.Fatalf("stream %d after a while: %v", i, err)
		}
		c.Close()
	}
	settled(t, outPid, before[0])
	settled(t, inPid, before[1])
}

// settled waits until a process has at most want descriptors; with 0 it says
// how many there are.
func settled(t *testing.T, pid, want int) int {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; {
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			t.Fatal(err)
		}
		if want == 0 || len(fds) <= want {
			return len(fds)
		}
		if time.Now().After(end) {
			t.Fatalf("process %d has %d descriptors, %d before", pid, len(fds), want)
		}
	}
}

func rss(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	var size, resident int
	if err == nil {
		_, err = fmt.Sscan(string(b), &size, &resident)
	}
	if err != nil {
		t.Fatal(err)
	}
	return resident * os.Getpagesize()
}
