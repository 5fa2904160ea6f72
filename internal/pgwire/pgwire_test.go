package pgwire

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/portal-tunnel/portal/internal/alloc"
)

var refusal = Refusal{Code: Refused, Message: "portal: orders-db refused: no policy permits it", Hint: `the attribute "role" is missing`}

func packet(code uint32, body string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(8+len(body)))
	return append(binary.BigEndian.AppendUint32(b, code), body...)
}

var (
	sslRequest = packet(codeSSL, "")
	gssRequest = packet(codeGSS, "")
	cancel     = packet(codeCancel, "\x00\x00\x00\x01\x00\x00\x00\x02")
	startup    = packet(3<<16, "user\x00u\x00database\x00d\x00\x00")
)

// serve refuses each connection to a listener until the test ends, and waits.
func serve(t *testing.T, network, addr string, read int) string {
	t.Helper()
	ln, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			if tcp, ok := conn.(*net.TCPConn); ok {
				tcp.SetLinger(0) // as inlets do
			}
			wg.Go(func() {
				head := make([]byte, read)
				n, _ := io.ReadFull(conn, head)
				Refuse(conn, head[:n], refusal)
			})
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return ln.Addr().String()
}

func TestPsqlShowsTheRefusal(t *testing.T) {
	psql, err := exec.LookPath("psql")
	if err != nil {
		t.Fatal("psql is needed: install it (Debian: postgresql-client), or run make needs")
	}
	dir := t.TempDir()
	host, port, _ := net.SplitHostPort(serve(t, "tcp", "127.0.0.1:0", 0))
	_, read8, _ := net.SplitHostPort(serve(t, "tcp", "127.0.0.1:0", 8))
	serve(t, "unix", filepath.Join(dir, ".s.PGSQL.5432"), 0)
	for name, c := range map[string]struct{ options, want string }{
		"prefer":                 {"sslmode=prefer host=" + host + " port=" + port, refusal.Message},
		"disable":                {"sslmode=disable host=" + host + " port=" + port, refusal.Message},
		"head read, with TLS":    {"sslmode=prefer host=" + host + " port=" + read8, refusal.Message},
		"head read, without TLS": {"sslmode=disable host=" + host + " port=" + read8, refusal.Message},
		"unix":                   {"host=" + dir + " port=5432", refusal.Message},
		"require":                {"sslmode=require host=" + host + " port=" + port, "server does not support SSL"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, stop := context.WithTimeout(t.Context(), 20*time.Second)
			defer stop()
			cmd := exec.CommandContext(ctx, psql, "-X", "-w", "-c", "select 1", c.options+" user=u dbname=d connect_timeout=10")
			cmd.Env = append(os.Environ(), "LC_ALL=C", "PGGSSENCMODE=prefer")
			out, err := cmd.CombinedOutput()
			if err == nil || !strings.Contains(string(out), c.want) {
				t.Fatalf("%v: %s", err, out)
			}
			if c.want == refusal.Message && !(strings.Contains(string(out), "FATAL") && strings.Contains(string(out), refusal.Hint)) {
				t.Errorf("%s", out)
			}
		})
	}
}

func TestPgxGetsCodeMessageAndHint(t *testing.T) {
	addr := serve(t, "tcp", "127.0.0.1:0", 0)
	for _, options := range []string{"sslmode=disable", "sslmode=prefer", "sslmode=disable&max_protocol_version=3.2"} {
		_, err := pgconn.Connect(t.Context(), "postgres://u@"+addr+"/d?"+options)
		var e *pgconn.PgError
		if !errors.As(err, &e) || e.Severity != "FATAL" || e.Code != Refused || e.Message != refusal.Message || e.Hint != refusal.Hint {
			t.Errorf("%s: %v", options, err)
		}
	}
}

// talk runs Refuse against a client that sends each part once the one before has
// been answered, and returns all it was answered.
func talk(t *testing.T, read []byte, parts ...[]byte) (answer []byte, err error) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		done := make(chan error)
		go func() { done <- Refuse(there, read, refusal) }()
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			for _, p := range parts {
				if _, err := here.Write(p); err != nil {
					return
				}
			}
		}()
		answer, _ = io.ReadAll(here)
		here.Close()
		<-sent
		err = <-done
	})
	return answer, err
}

func TestEncryptionIsDeclinedInEitherOrder(t *testing.T) {
	want, _ := refusal.encode()
	for _, c := range []struct {
		name     string
		parts    [][]byte
		declined int
	}{
		{"none", [][]byte{startup}, 0},
		{"TLS", [][]byte{sslRequest, startup}, 1},
		{"GSS", [][]byte{gssRequest, startup}, 1},
		{"GSS, TLS", [][]byte{gssRequest, sslRequest, startup}, 2},
		{"TLS, GSS", [][]byte{sslRequest, gssRequest, startup}, 2},
		{"3.2", [][]byte{sslRequest, packet(3<<16|2, "user\x00u\x00\x00")}, 1},
		{"3.9999", [][]byte{packet(3<<16|9999, "user\x00u\x00_pq_.test_protocol_negotiation\x00\x00\x00")}, 0},
		{"3.65535", [][]byte{packet(3<<16|0xffff, "")}, 0},
		{"longest", [][]byte{packet(3<<16, strings.Repeat("x", maxStartup-4))}, 0},
		{"no parameters", [][]byte{packet(3<<16, "")}, 0},
	} {
		want := append(bytes.Repeat([]byte{'N'}, c.declined), want...)
		got, err := talk(t, nil, c.parts...)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %q, %v", c.name, got, err)
		}
		// The inlet may have read any part of the first message.
		for n := 1; n <= min(len(c.parts[0]), 32); n++ {
			rest := append([][]byte{c.parts[0][n:]}, c.parts[1:]...)
			if got, err := talk(t, c.parts[0][:n], rest...); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s, %d bytes read: %q, %v", c.name, n, got, err)
			}
		}
	}
}

func TestWhatHasNoAnswerIsClosedWithoutOne(t *testing.T) {
	for _, c := range []struct {
		name  string
		parts [][]byte
		n     int // times 'N'
		err   error
	}{
		{"cancel", [][]byte{cancel}, 0, nil},
		{"cancel behind TLS", [][]byte{sslRequest, cancel}, 1, nil},
		{"cancel with a long key", [][]byte{packet(codeCancel, strings.Repeat("k", 260))}, 0, nil},
		{"direct TLS", [][]byte{{0x16, 3, 1, 2, 0}}, 0, ErrDirectTLS},
		{"direct TLS, one byte", [][]byte{{0x16}}, 0, ErrDirectTLS},
		{"TLS all the same", [][]byte{sslRequest, {0x16, 3, 1}}, 1, ErrDirectTLS},
		{"TLS twice", [][]byte{sslRequest, sslRequest}, 1, ErrProtocol},
		{"GSS twice", [][]byte{gssRequest, sslRequest, gssRequest}, 2, ErrProtocol},
		{"long request", [][]byte{packet(codeSSL, "x")}, 0, ErrProtocol},
		{"too long", [][]byte{packet(3<<16, strings.Repeat("x", maxStartup-3))}, 0, ErrProtocol},
		{"2 GiB", [][]byte{{0x7f, 0xff, 0xff, 0xff, 0, 3, 0, 0}}, 0, ErrProtocol},
		{"4 GiB", [][]byte{{0xff, 0xff, 0xff, 0xff, 0, 3, 0, 0}}, 0, ErrProtocol},
		{"no length", [][]byte{make([]byte, 8)}, 0, ErrProtocol},
		{"length 7", [][]byte{{0, 0, 0, 7, 0, 3, 0, 0}}, 0, ErrProtocol},
		{"version 2", [][]byte{packet(2<<16, "")}, 0, ErrProtocol},
		{"version 4", [][]byte{packet(4<<16, "")}, 0, ErrProtocol},
		{"http", [][]byte{[]byte("GET / HTTP/1.1\r\n\r\n")}, 0, ErrProtocol},
	} {
		got, err := talk(t, nil, c.parts...)
		if !errors.Is(err, c.err) || !bytes.Equal(got, bytes.Repeat([]byte{'N'}, c.n)) {
			t.Errorf("%s: %q, %v", c.name, got, err)
		}
	}
}

func TestBytesSentBeforeTheAnswerAboutEncryptionAreNotTaken(t *testing.T) {
	got, err := talk(t, append(bytes.Clone(sslRequest), startup...))
	if !errors.Is(err, ErrProtocol) || len(got) != 0 {
		t.Errorf("%q, %v", got, err)
	}
}

// Over TCP a reset would take the answer with it; inlets make every close a reset
// until a connection has ended well.
func TestClientReadsToTheEndWithoutAReset(t *testing.T) {
	want, _ := refusal.encode()
	for _, c := range []struct {
		name string
		send []byte
		want []byte
	}{
		{"refused", startup, want},
		{"refused, with more behind the startup", append(bytes.Clone(startup), make([]byte, 1000)...), want},
		{"cancel", cancel, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn, err := net.Dial("tcp", serve(t, "tcp", "127.0.0.1:0", 0))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.Write(c.send)
			if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, c.want) {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

// counting is a connection that counts what is read from it.
type counting struct {
	net.Conn
	n int
}

func (c *counting) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.n += n
	return n, err
}

func TestNothingIsReadBeyondTheStartup(t *testing.T) {
	here, there := net.Pipe()
	defer here.Close()
	conn := &counting{Conn: there}
	done := make(chan error)
	go func() { done <- Refuse(conn, nil, refusal) }()
	go here.Write(append(bytes.Clone(startup), "more"...))
	io.ReadAll(here)
	if err := <-done; err != nil || conn.n != len(startup) {
		t.Errorf("read %d of %d, %v", conn.n, len(startup), err)
	}
}

func TestSlowClientsEndAtTheAbsoluteDeadline(t *testing.T) {
	for name, sends := range map[string]func(conn net.Conn, i int) []byte{
		"silent":  func(net.Conn, int) []byte { return nil },
		"drips":   func(_ net.Conn, i int) []byte { return startup[i%len(startup) : i%len(startup)+1] },
		"unread":  func(_ net.Conn, i int) []byte { return append(bytes.Clone(startup), 1)[min(i, 1)*len(startup):] },
		"nothing": func(net.Conn, int) []byte { return []byte{} },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				here, there := net.Pipe()
				begin := time.Now()
				done := make(chan error, 1)
				go func() { done <- Refuse(there, nil, refusal) }()
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					for i := 0; ; i++ {
						time.Sleep(time.Second)
						if b := sends(here, i); b != nil {
							if _, err := here.Write(b); err != nil {
								return
							}
						} else if i > 10 {
							return
						}
					}
				}()
				if err := <-done; err == nil {
					t.Error("told, though it did not read")
				}
				if took := time.Since(begin); took != patience {
					t.Errorf("took %v", took)
				}
				here.Close()
				<-ended
			})
		})
	}
}

func TestFieldsCannotBreakTheMessage(t *testing.T) {
	for _, r := range []Refusal{
		{},
		{Code: "28000\x00", Message: "a\x00b", Hint: "c\x1b[31m\x07d\ne"},
		{Code: "x", Message: strings.Repeat("ü", 4000), Hint: "\xff\xfe"},
		{Code: TargetDown, Message: "portal: the target does not answer"},
	} {
		b, err := r.encode()
		if err != nil || b[0] != 'E' || int(binary.BigEndian.Uint32(b[1:])) != len(b)-1 || len(b) > 3000 {
			t.Fatalf("%q: %q, %v", r, b, err)
		}
		var m pgproto3.ErrorResponse
		if err := m.Decode(b[5:]); err != nil || m.Severity != "FATAL" || m.SeverityUnlocalized != "FATAL" || len(m.Code) != 5 || m.Message == "" ||
			strings.ContainsAny(m.Message+m.Hint, "\x00\x1b\x07\n") {
			t.Errorf("%q: %+v, %v", r, m, err)
		}
		if r.Code == TargetDown && m.Code != TargetDown {
			t.Errorf("%q", m.Code)
		}
	}
}

func TestHeadLetsEitherTheAnswerOrTheRefusalThrough(t *testing.T) {
	// Answered first: the connection is not touched.
	var h Head
	h.Said(startup)
	for range 2 {
		if !h.Answer() {
			t.Error("an answer was held back")
		}
	}
	if err := h.Refuse(nil, refusal); !errors.Is(err, ErrAnswered) {
		t.Errorf("%v", err)
	}
	if h.Said(startup); h.said != nil {
		t.Error("it still records")
	}

	// Refused first: what was said is taken up, and no answer follows.
	h = Head{}
	h.Said(startup[:5])
	h.Said(startup[5:9])
	here, there := net.Pipe()
	done := make(chan error)
	go func() { done <- h.Refuse(there, refusal) }()
	go here.Write(startup[9:])
	got, _ := io.ReadAll(here)
	if want, _ := refusal.encode(); !bytes.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if h.Answer() {
		t.Error("an answer behind the refusal")
	}
	if err := h.Refuse(nil, refusal); !errors.Is(err, ErrAnswered) {
		t.Errorf("%v", err)
	}
	h = Head{}
	for range 100 {
		h.Said(make([]byte, 1000))
	}
	if len(h.said) != 4+maxStartup {
		t.Errorf("holds %d bytes", len(h.said))
	}
}

func TestExactlyOneWinsBetweenAnswerAndRefusal(t *testing.T) {
	for range 200 {
		var h Head
		h.Said(cancel)
		here, there := net.Pipe()
		var answered bool
		var err error
		var wg sync.WaitGroup
		wg.Go(func() { answered = h.Answer() })
		wg.Go(func() { err = h.Refuse(there, refusal) })
		wg.Wait()
		here.Close()
		if answered != errors.Is(err, ErrAnswered) {
			t.Fatalf("answered %v, refused %v", answered, err)
		}
	}
}

// scripted is a client that has sent everything, and records its answers.
type scripted struct {
	net.Conn
	in     *bytes.Reader
	out    bytes.Buffer
	closed bool
}

func (s *scripted) Read(b []byte) (int, error)  { return s.in.Read(b) }
func (s *scripted) Write(b []byte) (int, error) { return s.out.Write(b) }
func (s *scripted) SetDeadline(time.Time) error { return nil }
func (s *scripted) Close() error                { s.closed = true; return nil }

// orderly is a scripted client on a socket.
type orderly struct {
	scripted
	calls []string
}

func (o *orderly) SetLinger(sec int) error {
	o.calls = append(o.calls, fmt.Sprint("linger ", sec))
	return nil
}
func (o *orderly) CloseWrite() error {
	o.calls = append(o.calls, "close write")
	return nil
}
func (o *orderly) Close() error {
	o.calls = append(o.calls, fmt.Sprint("close, unread ", o.in.Len()))
	return nil
}

func TestSocketIsReadToItsEndBeforeItIsClosed(t *testing.T) {
	for _, sent := range [][]byte{startup, append(bytes.Clone(startup), "more"...), cancel} {
		o := &orderly{scripted: scripted{in: bytes.NewReader(sent)}}
		if err := Refuse(o, nil, refusal); err != nil {
			t.Error(err)
		}
		if got, want := strings.Join(o.calls, "; "), "linger -1; close write; close, unread 0"; got != want {
			t.Errorf("%q: %s", sent, got)
		}
	}
}

func TestSocketThatCannotBeToldIsReset(t *testing.T) {
	for name, sent := range map[string][]byte{
		"nothing":           nil,
		"half a startup":    startup[:9],
		"only the question": sslRequest,
		"direct TLS":        {0x16, 3, 1, 2, 0},
		"http":              []byte("GET / HTTP/1.1\r\n\r\n"),
	} {
		o := &orderly{scripted: scripted{in: bytes.NewReader(sent)}}
		if err := Refuse(o, nil, refusal); err == nil {
			t.Errorf("%s: told", name)
		}
		if len(o.calls) != 2 || o.calls[0] != "linger 0" || !strings.HasPrefix(o.calls[1], "close, ") {
			t.Errorf("%s: %s", name, strings.Join(o.calls, "; "))
		}
	}
}

func FuzzRefuse(f *testing.F) {
	f.Add([]byte{}, startup)
	f.Add(sslRequest, startup)
	f.Add(sslRequest[:3], append(bytes.Clone(sslRequest[3:]), append(bytes.Clone(gssRequest), startup...)...))
	f.Add(cancel, []byte{})
	f.Add([]byte{0x16, 3, 1}, []byte{})
	f.Add(packet(3<<16|9999, ""), []byte{})
	want, _ := refusal.encode()
	f.Fuzz(func(t *testing.T, read, rest []byte) {
		defer alloc.Bound(t, len(read)+len(rest))()
		s := &scripted{in: bytes.NewReader(rest)}
		err := Refuse(s, read, refusal)
		out, declined := s.out.Bytes(), 0
		for declined < len(out) && out[declined] == 'N' {
			declined++
		}
		out = out[declined:]
		if declined > 2 || len(out) > 0 && !bytes.Equal(out, want) || err != nil && len(out) > 0 || !s.closed {
			t.Fatalf("%q: %v", s.out.Bytes(), err)
		}
	})
}

func Example() {
	here, there := net.Pipe()
	go Refuse(there, nil, Refusal{Code: TargetDown, Message: "portal: 127.0.0.1:5432 does not answer"})
	go here.Write(startup)
	msg, _ := pgproto3.NewFrontend(here, here).Receive()
	e := msg.(*pgproto3.ErrorResponse)
	fmt.Println(e.Severity, e.Code, e.Message)
	// Output: FATAL 57P03 portal: 127.0.0.1:5432 does not answer
}

func TestALyingClientAllocatesLittle(t *testing.T) {
	alloc.Hostile(t, func(b []byte) {
		Refuse(&scripted{in: bytes.NewReader(b)}, nil, refusal)
	}, startup, cancel, append(bytes.Clone(sslRequest), startup...), append(bytes.Clone(gssRequest), startup...))
}
