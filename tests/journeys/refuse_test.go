package journeys_test

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// kinds starts an inlet of each kind, waits for a line of each, and gives their addresses.
func (h *house) kinds(host, lanes, line string) map[string]string {
	h.t.Helper()
	addrs := map[string]string{}
	for _, kind := range []string{"raw", "pg", "http"} {
		p, addr := h.inlet(host, "0", lanes, "--kind", kind)
		h.line(p, line)
		addrs[kind] = addr
	}
	return addrs
}

func TestAMemberWithoutTheAttributeIsRefusedInItsProtocol(t *testing.T) {
	t.Parallel()
	s := newService(t)
	w := newWay(t, s.addr())
	before := s.accepted.Load()
	w.enroll("eve", "--attr", "role=guest")
	addrs := w.kinds("eve", w.lanes, `inlet db refused: .*PORTAL-E0301`)

	// Many at once, so that a clean end that is seldom is seen.
	for range 50 {
		wantReset(t, addrs["raw"])
	}

	psql := client(w.ctx, "psql", addrs["pg"], "-d", "bench", "-X", "-c", "select 1")
	out, err := psql.CombinedOutput()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 2 {
		t.Errorf("psql ended with %v, not with 2, no connection", err)
	}
	if !regexp.MustCompile(`FATAL: .*refused by outlet db.*PORTAL-E0301`).Match(out) {
		t.Errorf("psql shows %s", out)
	}
	wantPostgres(t, w.house, addrs["pg"], "28000", "PORTAL-E0301")
	wantHTTP(t, addrs["http"], http.StatusForbidden, "PORTAL-E0301")

	if n := s.accepted.Load(); n != before {
		t.Errorf("the service was reached %d times", n-before)
	}
	ready(t, w.addr) // those who may are not disturbed
}

// wantReset asks for an echo and must get a reset, at any of the steps.
func wantReset(t testing.TB, addr string) {
	t.Helper()
	c, err := connect(addr, []byte("E"))
	if err == nil {
		err = echo(c)
		c.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("%v, not a reset", err)
	}
}

func wantPostgres(t testing.TB, h *house, addr, code, text string) {
	t.Helper()
	for _, mode := range []string{"disable", "prefer"} {
		conn, err := pgx.Connect(h.ctx, "postgres://bench@"+addr+"/bench?sslmode="+mode)
		if err == nil {
			conn.Close(h.ctx)
		}
		if said := (*pgconn.PgError)(nil); !errors.As(err, &said) || said.Severity != "FATAL" || said.Code != code || !strings.Contains(said.Message, text) {
			t.Errorf("sslmode=%s: pgx was told %v, not FATAL %s with %s", mode, err, code, text)
		}
	}
}

func wantHTTP(t testing.TB, addr string, status int, code string) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	for _, ask := range []func() (*http.Response, error){
		func() (*http.Response, error) { return client.Get("http://" + addr + "/v1/models") },
		func() (*http.Response, error) {
			return client.Post("http://"+addr+"/", "application/octet-stream", strings.NewReader(strings.Repeat("x", 512<<10)))
		},
	} {
		r, err := ask()
		if err != nil {
			t.Error(err)
			continue
		}
		body, err := io.ReadAll(r.Body)
		r.Body.Close()
		var said struct {
			Error struct{ Code, Message string }
		}
		if err == nil {
			err = json.Unmarshal(body, &said)
		}
		if err != nil || r.StatusCode != status || r.Header.Get("Content-Type") != "application/json" || said.Error.Code != code || said.Error.Message == "" {
			t.Errorf("%s, %v: %s", r.Status, err, body)
		}
	}
}

func TestATargetThatIsDownIsToldInTheClientsProtocolAndTriedAgain(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target := ln.Addr().String()
	ln.Close() // its port refuses now
	w := newWay(t, target)
	w.line(w.out, `ready on [^;]+; target \S+ .*refused`)
	addrs := w.kinds("bot", w.lanes, `inlet db ready direct`)
	wantReset(t, addrs["raw"])
	wantPostgres(t, w.house, addrs["pg"], "57P03", "refused")
	wantHTTP(t, addrs["http"], http.StatusBadGateway, "PORTAL-E0402")

	s, err := serveOn(target)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	for kind, addr := range addrs {
		first := "E"
		if kind == "http" { // an inlet that speaks it passes nothing on before a whole head
			first += " / HTTP/1.1\r\nHost: " + addr + "\r\n\r\n"
		}
		c := dial(t, addr, []byte(first))
		if err := echo(c); err != nil {
			t.Errorf("%s, now that the target is up: %v", kind, err)
		}
	}
}

func TestATargetThatTimesOutIsToldInTheClientsProtocol(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	_, lanes := h.outlet("127.0.0.1:0", deaf(t), "--dial-timeout", "300ms")
	addrs := h.kinds("bot", lanes, `inlet db ready direct`)
	wantReset(t, addrs["raw"])
	wantPostgres(t, h, addrs["pg"], "57P03", "time")
	wantHTTP(t, addrs["http"], http.StatusBadGateway, "PORTAL-E0403")
}

// deaf is an address that answers no SYN: its queue of connections not yet accepted is full.
func deaf(t *testing.T) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	loopback := &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	if err := syscall.Bind(fd, loopback); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	bound, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := (&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: bound.(*syscall.SockaddrInet4).Port}).String()
	for range 16 {
		c, err := net.DialTimeout("tcp", addr, 500e6)
		if err != nil {
			return addr
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Fatal("a full queue still takes connections")
	return ""
}
