package stream_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/portal-tunnel/portal/internal/alloc"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
)

// overLoopback is a channel over a TCP connection, in real time.
func overLoopback(t testing.TB, l stream.Limits) (x, y *side, incoming chan *stream.Incoming) {
	t.Helper()
	a, b := overTCP(t)
	return pair(t, a, b, l)
}

var sockets = map[string]socket{"TCP": overTCP, "Unix": overUnix, "memory": inMemory}

// TestHalfCloseGoesBothWays: an application ends what it sends and goes on
// reading, whichever does so first, on every kind of local connection.
func TestHalfCloseGoesBothWays(t *testing.T) {
	for name, s := range sockets {
		t.Run(name, func(t *testing.T) {
			x, y, incoming := overLoopback(t, stream.Limits{})
			for _, opener := range []bool{true, false} {
				f := join(t, x, incoming, s)
				first, second := f.near, f.far
				if !opener {
					first, second = second, first
				}
				ask, answer := random(200<<10, 5), random(300<<10, 6)
				go func() {
					first.Write(ask)
					first.CloseWrite()
				}()
				wholeThenEnd(t, "second", second, ask)
				go func() {
					second.Write(answer)
					second.CloseWrite()
				}()
				wholeThenEnd(t, "first", first, answer)
				if ex, ey := f.joined(); ex != nil || ey != nil {
					t.Errorf("Join returned %v and %v", ex, ey)
				}
				first.Close()
				second.Close()
			}
			x.mux.WaitIdle()
			y.mux.WaitIdle()
			stop(t, x, y)
		})
	}
}

// TestLargeEchoAfterHalfClose sends 64 MiB, ends, and only then gets them back.
func TestLargeEchoAfterHalfClose(t *testing.T) {
	size := 64 << 20
	if alloc.Raced {
		size = 16 << 20
	}
	data := random(size, 7)
	x, y, incoming := overLoopback(t, stream.Limits{})
	f := join(t, x, incoming, overTCP)
	go func() {
		f.near.Write(data)
		f.near.CloseWrite()
	}()
	got, err := io.ReadAll(f.far)
	if err != nil || sha256.Sum256(got) != sha256.Sum256(data) {
		t.Fatalf("%d bytes and %v arrived, want %d", len(got), err, len(data))
	}
	go func() {
		f.far.Write(got)
		f.far.CloseWrite()
	}()
	back, err := io.ReadAll(f.near)
	if err != nil || sha256.Sum256(back) != sha256.Sum256(data) {
		t.Fatalf("%d bytes and %v came back, want %d", len(back), err, len(data))
	}
	if ex, ey := f.joined(); ex != nil || ey != nil {
		t.Errorf("Join returned %v and %v", ex, ey)
	}
	stop(t, x, y)
	if n := x.budget.Held() + y.budget.Held(); n != 0 {
		t.Errorf("%d bytes are held at the end", n)
	}
}

// TestHalfCloseLastsAsLongAsTheApplicationLikes: hours of silence in between.
func TestHalfCloseLastsAsLongAsTheApplicationLikes(t *testing.T) {
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		f := join(w, w.x, w.incoming, inMemory)
		f.near.CloseWrite()
		wholeThenEnd(t, "far", f.far, nil)
		time.Sleep(2 * time.Hour)
		f.far.Write([]byte("late"))
		f.far.CloseWrite()
		wholeThenEnd(t, "near", f.near, []byte("late"))
		if ex, ey := f.joined(); ex != nil || ey != nil {
			t.Errorf("Join returned %v and %v", ex, ey)
		}
	})
}

// TestResetOfASocketIsAResetOfTheOther, whoever does it and whenever.
func TestResetOfASocketIsAResetOfTheOther(t *testing.T) {
	moments := map[string]func(from, to duplex){
		"idle":            func(from, to duplex) {},
		"after its data":  func(from, to duplex) { from.Write([]byte("x")); to.Read(make([]byte, 1)) },
		"after its end":   func(from, to duplex) { from.CloseWrite(); io.Copy(io.Discard, to) },
		"after the other": func(from, to duplex) { to.CloseWrite(); io.Copy(io.Discard, from) },
		"out of credit": func(from, to duplex) {
			for err := error(nil); err == nil; {
				from.SetWriteDeadline(time.Now().Add(stream.StarvedFor + 100*time.Millisecond))
				_, err = from.Write(make([]byte, 1<<20))
			}
		},
		"with much unread": func(from, to duplex) { go to.Write(make([]byte, 8<<20)); from.Read(make([]byte, 1<<20)) },
	}
	if runtime.GOOS != "linux" { // elsewhere nobody looks
		delete(moments, "out of credit")
	}
	x, y, incoming := overLoopback(t, stream.Limits{})
	for moment, prepare := range moments {
		for _, opener := range []bool{true, false} {
			t.Run(moment, func(t *testing.T) {
				f := join(t, x, incoming, overTCP)
				from, to := f.near, f.far
				if !opener {
					from, to = to, from
				}
				prepare(from, to)
				from.SetLinger(0)
				from.Close()
				ex, ey := f.joined()
				if !errors.Is(ex, syscall.ECONNRESET) || !errors.Is(ey, syscall.ECONNRESET) {
					t.Errorf("Join returned %v and %v", ex, ey)
				}
				// Behind its own end or a write that failed, the kernel has said it already.
				if moment == "idle" || moment == "after its data" {
					if _, err := to.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("the other application reads %v", err)
					}
				}
				if _, err := to.Write([]byte("x")); err == nil {
					if _, err = to.Write([]byte("x")); err == nil {
						t.Error("the other application still writes")
					}
				}
				to.Close()
			})
		}
	}
	x.mux.WaitIdle()
	y.mux.WaitIdle()
	stop(t, x, y)
}

// The kernel says once that a connection was reset. Whoever reads after a writer was told sees an end,
// which must not go on as one.
func TestAResetThatAWriterWasToldIsNoEnd(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Log("NOT RUN: no other system says that somebody was told")
		return
	}
	x, y, incoming := overLoopback(t, stream.Limits{})
	c, d := open(t, x, incoming)
	far, near := overTCP(t)
	far.Write([]byte("a part"))
	got := make([]byte, 6)
	if _, err := io.ReadFull(near, got); err != nil {
		t.Fatal(err)
	}
	far.SetLinger(0)
	far.Close()
	raw, err := near.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for told := 0; told == 0; { // as a write does, SO_ERROR takes it
		raw.Control(func(fd uintptr) { told, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR) })
		if err != nil || told != 0 && told != int(syscall.ECONNRESET) {
			t.Fatal(told, err)
		}
	}
	joined := make(chan error, 1)
	go func() { joined <- c.Join(near) }()
	if _, err := d.Read(got); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the other end reads %v", err)
	}
	d.Close()
	if err := <-joined; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Join returned %v", err)
	}
	stop(t, x, y)
}

// linger reads SO_LINGER.
func linger(t *testing.T, fd int) (on, seconds int32) {
	t.Helper()
	l, err := unix.GetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER)
	if err != nil {
		t.Fatal(err)
	}
	return l.Onoff, l.Linger
}

// TestKilledProcessResetsItsSockets: what the kernel does to the sockets of a
// killed process is said by SO_LINGER. It must be on with zero seconds until
// both directions have ended, and off then.
func TestKilledProcessResetsItsSockets(t *testing.T) {
	x, y, incoming := overLoopback(t, stream.Limits{})
	f := join(t, x, incoming, overTCP)
	fds := map[string]int{} // duplicates: they show the socket also after Join has closed its own
	for name, c := range map[string]net.Conn{"opener's": f.localX, "acceptor's": f.localY} {
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) { fds[name], err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fds[name])
	}
	armed := func(when string) {
		t.Helper()
		for name, fd := range fds {
			if on, s := linger(t, fd); on != 1 || s != 0 {
				t.Errorf("%s, the %s socket lingers %d, %d s", when, name, on, s)
			}
		}
	}
	armed("open")
	f.near.Write([]byte("x"))
	f.far.Read(make([]byte, 1))
	armed("in use")
	f.near.CloseWrite()
	wholeThenEnd(t, "far", f.far, nil)
	armed("half closed")
	f.far.CloseWrite()
	if ex, ey := f.joined(); ex != nil || ey != nil {
		t.Errorf("Join returned %v and %v", ex, ey)
	}
	for name, fd := range fds {
		if on, _ := linger(t, fd); on != 0 {
			t.Errorf("after both ends, the %s socket still lingers", name)
		}
	}
	f.near.Close()
	f.far.Close()

	f = join(t, x, incoming, overTCP)
	raw, _ := f.localY.(*net.TCPConn).SyscallConn()
	var fd int
	raw.Control(func(from uintptr) { fd, _ = unix.FcntlInt(from, unix.F_DUPFD_CLOEXEC, 0) })
	defer unix.Close(fd)
	f.far.CloseWrite()
	wholeThenEnd(t, "near", f.near, nil)
	f.sx.Reset(stream.CodeRevoked, "")
	f.joined()
	if on, s := linger(t, fd); on != 1 || s != 0 {
		t.Errorf("after a reset, the socket lingers %d, %d s", on, s)
	}
	stop(t, x, y)
}

// TestJoinTakesAnyConnection: one that cannot half-close hears of the other
// end's end when everything is over.
func TestJoinTakesAnyConnection(t *testing.T) {
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		c, d := w.open()
		app, local := net.Pipe()
		joined := make(chan error, 1)
		go func() { joined <- c.Join(local) }()
		data := random(200<<10, 8)
		go app.Write(data)
		got := make([]byte, len(data))
		if _, err := io.ReadFull(d, got); err != nil || !bytes.Equal(got, data) {
			t.Errorf("read %v", err)
		}
		go d.Write(data)
		if _, err := io.ReadFull(app, got); err != nil || !bytes.Equal(got, data) {
			t.Errorf("read back %v", err)
		}
		d.CloseWrite()
		app.Close()
		wholeThenEnd(t, "other end", d, nil)
		if err := <-joined; err != nil {
			t.Errorf("Join returned %v", err)
		}
	})
}

// stuck is a connection whose Close waits until it is let go, as a command's
// does for its exit.
type stuck struct {
	net.Conn
	free chan struct{}
}

func (s *stuck) Close() error { <-s.free; return s.Conn.Close() }

// TestSlowCloseOfAConnectionHoldsNobodyUp: not the lane reader, which brings
// the reset, and so no other stream; Join alone waits for it.
func TestSlowCloseOfAConnectionHoldsNobodyUp(t *testing.T) {
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		c, d := w.open()
		app, pipe := net.Pipe()
		local := &stuck{pipe, make(chan struct{})}
		joined := make(chan error, 1)
		go func() { joined <- c.Join(local) }()
		e, g := w.open()
		synctest.Wait()
		d.Reset(stream.CodeRevoked, "over")
		synctest.Wait()
		go g.Write([]byte("x"))
		if _, err := e.Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
		select {
		case <-joined:
			t.Error("Join returned before its connection was closed")
		default:
		}
		close(local.free)
		var reset *stream.ResetError
		if err := <-joined; !errors.As(err, &reset) || reset.Code != stream.CodeRevoked || reset.Reason != "over" {
			t.Errorf("Join returned %v", err)
		}
		app.Close()
		e.Close()
		g.Close()
	})
}

// TestJoinOfADeadStreamClosesTheConnection.
func TestJoinOfADeadStreamClosesTheConnection(t *testing.T) {
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		for name, kill := range map[string]func(c, d *stream.Conn){
			"reset by the other end": func(c, d *stream.Conn) { d.Reset(stream.CodeLocal, "") },
			"closed":                 func(c, d *stream.Conn) { c.Close(); d.Close() },
		} {
			c, d := w.open()
			kill(c, d)
			synctest.Wait()
			app, local := memnet.Pipe(memnet.Link{})
			if err := c.Join(local); err == nil {
				t.Errorf("%s: Join returned nil", name)
			}
			if _, err := app.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s: the application reads %v", name, err)
			}
		}
	})
}

func TestASecondJoinResetsItsConnectionAndTheFirstGoesOn(t *testing.T) {
	virtual(t, memnet.Link{}, stream.Limits{}, func(w *world) {
		c, d := w.open()
		app, local := memnet.Pipe(memnet.Link{})
		joined := make(chan error, 1)
		go func() { joined <- c.Join(local) }()
		synctest.Wait()
		other, second := memnet.Pipe(memnet.Link{})
		if err := c.Join(second); err == nil {
			t.Error("a second Join returned nil")
		}
		if _, err := other.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the second application reads %v", err)
		}
		data := random(100, 10)
		app.Write(data)
		app.CloseWrite()
		wholeThenEnd(t, "the other end", d, data)
		d.CloseWrite()
		if err := <-joined; err != nil {
			t.Errorf("the first Join returned %v", err)
		}
	})
}

// TestDataBeforeJoinIsDelivered: what came before the socket was there.
func TestDataBeforeJoinIsDelivered(t *testing.T) {
	x, y, incoming := overLoopback(t, stream.Limits{})
	data := random(60<<10, 9)
	c, d := open(t, x, incoming)
	d.Write(data)
	d.CloseWrite()
	for y.mux.Streams() == 0 || x.budget.Held() < int64(len(data)) {
		runtime.Gosched()
	}
	app, local := overTCP(t)
	go c.Join(local)
	wholeThenEnd(t, "application", app, data)
	app.Close()
	if _, err := d.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the other end reads %v", err)
	}
	stop(t, x, y)
}

// TestUnixSocketsKeepEveryByte through the fast path, slowly read.
func TestSlowReaderOfASocketGetsEveryByte(t *testing.T) {
	for _, name := range []string{"TCP", "Unix"} {
		t.Run(name, func(t *testing.T) {
			x, y, incoming := overLoopback(t, stream.Limits{})
			f := join(t, x, incoming, sockets[name])
			data := random(6<<20, 10)
			go func() {
				for b := data; len(b) > 0; { // in odd pieces
					n := min(len(b), 1+len(b)%70000)
					f.near.Write(b[:n])
					b = b[n:]
				}
				f.near.CloseWrite()
			}()
			var got bytes.Buffer
			b := make([]byte, 5000)
			for {
				n, err := f.far.Read(b)
				got.Write(b[:n])
				if err == io.EOF {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				if got.Len()%7 == 0 {
					runtime.Gosched()
				}
			}
			if !bytes.Equal(got.Bytes(), data) {
				t.Error("other bytes arrived than were sent")
			}
			f.far.Close()
			f.near.Close()
			f.joined()
			stop(t, x, y)
		})
	}
}

// goroutines counts those that run code of this module.
func goroutines() int {
	b := make([]byte, 64<<20)
	b = b[:runtime.Stack(b, true)]
	n := 0
	for _, g := range strings.Split(string(b), "\n\n") {
		if strings.Contains(g, "portal/internal/stream") || strings.Contains(g, "portal/routing") || strings.Contains(g, "portal/internal/channel") {
			n++
		}
	}
	return n
}
