package inlet_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"
	"golang.org/x/net/nettest"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/outlet"
)

// await waits for a state of kind.
func (h *house) await(t *testing.T, kind link.StateKind) {
	t.Helper()
	limit := time.After(30 * time.Second)
	for {
		select {
		case s := <-h.states:
			if s.Kind == kind {
				return
			}
		case <-limit:
			t.Fatalf("not %v", kind)
		}
	}
}

func TestAnHTTPClientIsToldWhyItIsRefused(t *testing.T) {
	h := build(t, outlet.TCP(echo(t)), "guest", func(_ *outlet.Server, in *inlet.Server) { in.Kind = inlet.HTTP })
	h.await(t, link.Refused)
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Post("http://"+h.addr+"/v1/chat", "text/plain", strings.NewReader("hello"))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	var body struct {
		Error struct{ Code, Message string }
	}
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		t.Fatal(err)
	}
	if r.StatusCode != http.StatusForbidden || body.Error.Code != "PORTAL-E0301" || !strings.Contains(body.Error.Message, "no policy permits it") {
		t.Fatalf("%s: %+v", r.Status, body)
	}
}

func TestAnHTTPClientIsToldThatTheTargetIsDown(t *testing.T) {
	dead := listen(t)
	dead.Close()
	h := build(t, outlet.TCP(dead.Addr().String()), "agent", func(_ *outlet.Server, in *inlet.Server) { in.Kind = inlet.HTTP })
	h.await(t, link.Ready)
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Get("http://" + h.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusBadGateway || !strings.Contains(string(body), "PORTAL-E0402") {
		t.Fatalf("%s, %v: %s", r.Status, err, body)
	}
}

func TestAPageOfAnotherSiteIsToldNoAndTheServiceSeesNothing(t *testing.T) {
	var seen atomic.Int32
	service := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen.Add(1)
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n)
	})}
	ln := listen(t)
	go service.Serve(ln)
	defer service.Close()
	h := build(t, outlet.TCP(ln.Addr().String()), "agent", func(_ *outlet.Server, in *inlet.Server) { in.Kind = inlet.HTTP })
	h.await(t, link.Ready)
	ask := func(change func(*http.Request)) (status int, body string) {
		t.Helper()
		r, err := http.NewRequest("POST", "http://"+h.addr, strings.NewReader(strings.Repeat("x", 3<<20)))
		if err != nil {
			t.Fatal(err)
		}
		change(r)
		client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		answer, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		b, err := io.ReadAll(answer.Body)
		if err != nil {
			t.Fatal(err)
		}
		return answer.StatusCode, string(b)
	}
	if status, body := ask(func(*http.Request) {}); status != 200 || body != fmt.Sprint(3<<20) {
		t.Fatalf("%d: %s", status, body)
	}
	if status, body := ask(func(r *http.Request) { r.ContentLength = -1 }); status != 200 || body != fmt.Sprint(3<<20) {
		t.Fatalf("in chunks: %d: %s", status, body)
	}
	for _, change := range []func(*http.Request){
		func(r *http.Request) { r.Host = "evil.example" },
		func(r *http.Request) { r.Header.Set("Origin", "https://evil.example") },
	} {
		if status, body := ask(change); status != 403 || !strings.Contains(body, "PORTAL-E0309") {
			t.Errorf("%d: %s", status, body)
		}
	}
	// On a connection that was fine so far: a reset, before the head is whole over there.
	c, err := net.Dial("tcp", h.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	in := bufio.NewReader(c)
	for range 2 {
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
		r, err := http.ReadResponse(in, nil)
		if err != nil || r.StatusCode != 200 {
			t.Fatal(r, err)
		}
		io.Copy(io.Discard, r.Body)
	}
	before := seen.Load()
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n")
	if _, err := in.ReadByte(); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %v, want a reset", err)
	}
	h.stop()
	if seen.Load() != before {
		t.Error("the service saw the request")
	}
}

func TestAnHTTPClientThatAsksForNothingHoldsNoDrainUp(t *testing.T) {
	virtual(t, "agent", func(_ *outlet.Server, in *inlet.Server) { in.Kind = inlet.HTTP }, func(s *street) {
		silent, err := s.net.Dial(s.Context(), "mem", s.addr)
		if err != nil {
			s.Fatal(err)
		}
		synctest.Wait()
		if n := s.inlet.Streams(); n != 1 {
			s.Errorf("%d local connections", n)
		}
		if n := s.outlet.Streams(); n != 0 {
			s.Errorf("%d streams for nothing", n)
		}
		if left := s.inlet.Drain(s.Context()); left != 0 {
			s.Errorf("%d were cut", left)
		}
		s.isReset(silent)
	})
}

// told is what a client of the kind is told by the inlet at addr: an HTTP status or
// an SQLSTATE, the code, the sentence and the hint.
func (s *street) told(kind inlet.Kind) (status, code, text, hint string) {
	s.Helper()
	c, err := s.net.Dial(s.Context(), "mem", s.addr)
	if err != nil {
		s.Fatal(err)
	}
	defer c.Close()
	if kind == inlet.HTTP {
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
		r, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			s.Fatal(err)
		}
		var body struct {
			Error struct{ Code, Message string }
		}
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			s.Fatal(err)
		}
		return fmt.Sprint(r.StatusCode), body.Error.Code, body.Error.Message, ""
	}
	io.WriteString(c, "\x00\x00\x00\x10\x00\x03\x00\x00user\x00u\x00\x00")
	m, err := pgproto3.NewFrontend(c, c).Receive()
	if err != nil {
		s.Fatal(err)
	}
	e := m.(*pgproto3.ErrorResponse)
	text, code, ok := strings.Cut(e.Message, " (PORTAL-")
	if !ok {
		s.Errorf("no code in %q", e.Message)
	}
	return e.Code, "PORTAL-" + strings.TrimSuffix(code, ")"), text, e.Hint
}

func TestARefusalIsToldWithItsCodeAndByWhom(t *testing.T) {
	require, err := abac.Short("serve", "db", `principal has name && principal.name == "db2"`)
	if err != nil {
		t.Fatal(err)
	}
	target := func(err error) func(*outlet.Server, *inlet.Server) {
		return func(o *outlet.Server, _ *inlet.Server) {
			o.Target = func(ctx context.Context, _ *outlet.Request) (net.Conn, error) {
				if err == nil {
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return nil, err
			}
		}
	}
	const policy = "Ask whoever issues your credential for the attribute that the outlet's policy wants."
	for _, test := range []struct {
		name, role         string
		change             func(*outlet.Server, *inlet.Server)
		state              link.StateKind
		http, pg, code     string
		begins, says, hint string
	}{
		{"by the policy", "guest", nil, link.Refused, "403", "28000", "PORTAL-E0301",
			"portal: refused by outlet db: ", "no policy permits it", policy},
		{"by --require", "agent", func(_ *outlet.Server, in *inlet.Server) { in.Require = require }, link.Refused, "403", "28000", "PORTAL-E0301",
			"portal: the outlet of db is refused here: ", "it does not meet --require", "Compare the inlet's --require with `portal credential list` on the outlet's host."},
		{"by a pin", "agent", func(_ *outlet.Server, in *inlet.Server) { in.Pin = in.Self.ID() }, link.Refused, "403", "28000", "PORTAL-E0307",
			"portal: the outlet of db is refused here: ", "another identity", "Compare the inlet's --peer, or the ID in its --direct, with `portal identity show` on the outlet's host."},
		{"target refuses", "agent", target(syscall.ECONNREFUSED), link.Ready, "502", "57P03", "PORTAL-E0402",
			"portal: db cannot be reached: ", "the target refused the connection", "Start the service behind the outlet."},
		{"target unreachable", "agent", target(syscall.EHOSTUNREACH), link.Ready, "502", "57P03", "PORTAL-E0402",
			"portal: db cannot be reached: ", "the target cannot be reached", "Start the service behind the outlet."},
		{"target silent", "agent", target(nil), link.Ready, "502", "57P03", "PORTAL-E0403",
			"portal: db cannot be reached: ", "the target did not answer in time", "See why the service behind the outlet does not accept."},
		{"outlet away", "agent", func(_ *outlet.Server, in *inlet.Server) {
			in.Paths[0].Dial = func(context.Context) (net.Conn, error) { return nil, errors.New("no route") }
		}, link.Waiting, "502", "57P03", "PORTAL-E0401", "portal: db cannot be reached: ", "no route", "portal ping db shows the way hop by hop."},
	} {
		for kind, status := range map[inlet.Kind]string{inlet.HTTP: test.http, inlet.PG: test.pg} {
			t.Run(test.name+" "+status, func(t *testing.T) {
				virtual(t, test.role, func(o *outlet.Server, in *inlet.Server) {
					in.Kind = kind
					if test.change != nil {
						test.change(o, in)
					}
				}, func(s *street) {
					s.await(t, test.state)
					got, code, text, hint := s.told(kind)
					if got != status || code != test.code || !strings.HasPrefix(text, test.begins) || !strings.Contains(text, test.says) {
						t.Errorf("told %s, %s: %s", got, code, text)
					}
					if kind == inlet.PG && hint != test.hint {
						t.Errorf("the hint is %q", hint)
					}
				})
			})
		}
	}
}

// The outlet has one connection, and somebody has it.
func TestABusyOutletIsToldAsBusy(t *testing.T) {
	for kind, status := range map[inlet.Kind]string{inlet.HTTP: "502", inlet.PG: "57P03"} {
		virtual(t, "agent", func(o *outlet.Server, in *inlet.Server) { o.Limits.Streams, in.Kind = 1, kind }, func(s *street) {
			s.await(t, link.Ready)
			other, err := s.inlet.Dial(s.Context())
			if err != nil {
				t.Fatal(err)
			}
			if got, code, text, hint := s.told(kind); got != status || code != "PORTAL-E0404" || !strings.HasPrefix(text, "portal: db cannot be reached: busy") {
				t.Errorf("told %s, %s: %s; %s", got, code, text, hint)
			}
			other.Close()
		})
	}
}

// Nobody renews our credential: the outlet, asked again, says no.
func TestAnExpiredCredentialIsToldAsExpired(t *testing.T) {
	for kind, status := range map[inlet.Kind]string{inlet.HTTP: "403", inlet.PG: "28000"} {
		virtual(t, "agent", func(_ *outlet.Server, in *inlet.Server) { in.Kind = kind }, func(s *street) {
			s.await(t, link.Ready)
			time.Sleep(59 * time.Minute)
			renew(s, s.outlet.Self, identity.Attributes{"name": "db1", "serve": []string{"db"}}, 2*time.Hour)
			time.Sleep(2 * time.Minute)
			got, code, text, hint := s.told(kind)
			if got != status || code != "PORTAL-E0302" || !strings.Contains(text, "expired") {
				t.Errorf("told %s, %s: %s", got, code, text)
			}
			if kind == inlet.PG && hint != "See that the authority can be reached: it renews credentials." {
				t.Errorf("the hint is %q", hint)
			}
		})
	}
}

// An end without an answer would look like the service's own.
func TestAClientThatCannotBeToldIsReset(t *testing.T) {
	for name, kind := range map[string]inlet.Kind{"pg": inlet.PG, "http": inlet.HTTP} {
		for what, sends := range map[string]func(c *memnet.Conn){
			"only an end":            func(c *memnet.Conn) { c.CloseWrite() },
			"half a beginning":       func(c *memnet.Conn) { c.Write([]byte{0, 0, 0}); c.CloseWrite() },
			"half, and then waits":   func(c *memnet.Conn) { c.Write([]byte("GET")) },
			"what is no beginning":   func(c *memnet.Conn) { c.Write([]byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")) },
			"what is none, and ends": func(c *memnet.Conn) { c.Write([]byte("hello, world\r\n\r\n")); c.CloseWrite() },
		} {
			if kind == inlet.HTTP && strings.HasPrefix(what, "what is n") {
				continue // it is answered
			}
			t.Run(name+" "+what, func(t *testing.T) {
				virtual(t, "guest", func(_ *outlet.Server, in *inlet.Server) { in.Kind = kind }, func(s *street) {
					s.await(t, link.Refused)
					c, err := s.net.Dial(s.Context(), "mem", s.addr)
					if err != nil {
						t.Fatal(err)
					}
					sends(c.(*memnet.Conn))
					s.isReset(c)
				})
			})
		}
	}
}

func TestWhatIsNoHTTPIsAnsweredInHTTP(t *testing.T) {
	for _, text := range []string{"\x16\x03\x01\x02\x01\x01\x01\xfc\x03\x03\r\n\r\n", "hello, world\r\n\r\n", "GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"} {
		virtual(t, "agent", func(_ *outlet.Server, in *inlet.Server) { in.Kind = inlet.HTTP }, func(s *street) {
			s.await(t, link.Ready)
			c, err := s.net.Dial(s.Context(), "mem", s.addr)
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(c, text)
			if got, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 400 ") || !strings.Contains(string(got), "PORTAL-E0310") {
				t.Errorf("%q: %q, %v", text, got, err)
			}
			if n := s.outlet.Streams(); n != 0 {
				t.Errorf("%q: %d streams", text, n)
			}
			c.Close()
		})
	}
}

// What it sends is a beginning, and its end with it.
func TestAClientThatHasBeenToldSeesAnEnd(t *testing.T) {
	for name, test := range map[string]struct {
		kind  inlet.Kind
		sends string
	}{
		"pg":   {inlet.PG, "\x00\x00\x00\x10\x00\x03\x00\x00user\x00u\x00\x00"},
		"http": {inlet.HTTP, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"},
	} {
		for _, ends := range []bool{false, true} {
			t.Run(fmt.Sprint(name, " ends ", ends), func(t *testing.T) {
				virtual(t, "guest", func(_ *outlet.Server, in *inlet.Server) { in.Kind = test.kind }, func(s *street) {
					s.await(t, link.Refused)
					c, err := s.net.Dial(s.Context(), "mem", s.addr)
					if err != nil {
						t.Fatal(err)
					}
					c.Write([]byte(test.sends))
					if ends {
						c.(*memnet.Conn).CloseWrite()
					}
					if got, err := io.ReadAll(c); err != nil || !strings.Contains(string(got), "no policy permits it") {
						t.Errorf("%q, %v", got, err)
					}
					c.Close()
				})
			})
		}
	}
}

// way is a path that can be closed and opened.
func way(s *inlet.Server, open <-chan struct{}) {
	dial := s.Paths[0].Dial
	s.Paths[0].Dial = func(ctx context.Context) (net.Conn, error) {
		select {
		case <-open:
			return dial(ctx)
		default:
			return nil, errors.New("not yet")
		}
	}
}

func TestAConnectionThatComesTooEarlyIsHeldAndServed(t *testing.T) {
	open := make(chan struct{})
	h := build(t, outlet.TCP(echo(t)), "agent", func(_ *outlet.Server, in *inlet.Server) {
		in.Hold = 20 * time.Second
		way(in, open)
	})
	c, err := net.Dial("tcp", h.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Write([]byte("early")); err != nil {
		t.Fatal(err)
	}
	h.await(t, link.Waiting)
	close(open)
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "early" {
		t.Fatalf("%q, %v", got, err)
	}
}

func TestAConnectionIsResetWhenTheHoldIsOver(t *testing.T) {
	h := build(t, outlet.TCP(echo(t)), "agent", func(_ *outlet.Server, in *inlet.Server) {
		in.Hold = 50 * time.Millisecond
		way(in, nil)
	})
	c, err := net.Dial("tcp", h.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read %d bytes, %v; want a reset", n, err)
	}
}

func TestDialAndListenAreNetConns(t *testing.T) {
	nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
		var served *outlet.Server
		h := build(t, nil, "agent", func(o *outlet.Server, _ *inlet.Server) { served = o })
		ln := served.Listen()
		a, err := h.inlet.Dial(context.Background())
		if err != nil {
			return nil, nil, nil, err
		}
		b, err := ln.Accept()
		return a, b, func() {
			a.Close()
			b.Close()
			h.stop()
		}, err
	})
}

// The outlet would end the stream too: what is looked at is the inlet's channel.
func TestAWallClockSetBackDoesNotExtendTheOutletsCredential(t *testing.T) {
	var back atomic.Int64
	authority, err := identity.NewSelf()
	if err != nil {
		t.Fatal(err)
	}
	h := build(t, outlet.TCP(echo(t)), "agent", func(o *outlet.Server, in *inlet.Server) {
		o.Self = member(t, authority, identity.Attributes{"name": "db1", "serve": []string{"db"}}, 3*time.Second)
		in.Self = member(t, authority, identity.Attributes{"name": "bot", "role": "agent"}, time.Hour)
		o.Trust, in.Trust = identity.NewTrust(authority.ID()), identity.NewTrust(authority.ID())
		in.Now = func() time.Time { return time.Now().Add(-time.Duration(back.Load())) }
	})
	h.await(t, link.Ready)
	back.Store(int64(time.Hour))
	limit := time.After(30 * time.Second)
	for {
		select {
		case s := <-h.states:
			if strings.Contains(s.Reason, "the outlet's credential expired") {
				return
			}
		case <-limit:
			t.Fatal("the channel outlived the outlet's credential")
		}
	}
}
