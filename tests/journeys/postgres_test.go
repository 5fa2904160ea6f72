package journeys_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/portal-tunnel/portal/examples/postgres/server"
	"github.com/portal-tunnel/portal/tests/process"
)

const schema = `
create role bench login createdb;
create database bench owner bench;
`

func postgres(t *testing.T, connections int) *server.Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	db, err := server.Start(ctx, &server.Options{MaxConnections: connections, Setup: schema})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// client is psql or pgbench through an inlet.
func client(ctx context.Context, name, addr string, args ...string) *exec.Cmd {
	host, port, _ := net.SplitHostPort(addr)
	cmd := exec.CommandContext(ctx, name, append([]string{"-h", host, "-p", port, "-U", "bench"}, args...)...)
	cmd.Env = append(process.Environ(), "PGCONNECT_TIMEOUT=20")
	return cmd
}

func TestPgbenchWith64ClientsAndPgxThroughThePortal(t *testing.T) {
	db := postgres(t, 100)
	w := newWay(t, db.Addr())
	h, addr := w.house, w.addr
	run := func(args ...string) string {
		t.Helper()
		out, err := client(h.ctx, "pgbench", addr, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("pgbench %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	run("-i", "-q", "-s", "1", "bench")
	transactions := 640
	if long() {
		transactions = 64 * 500
	}
	out := run("-n", "-c", "64", "-j", "2", "-t", fmt.Sprint(transactions/64), "bench")
	if want := fmt.Sprintf("%d/%d", transactions, transactions); !strings.Contains(out, want) {
		t.Fatalf("not %s transactions:\n%s", want, out)
	}

	conn, err := pgx.Connect(h.ctx, "postgres://bench@"+addr+"/bench?sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(h.ctx)
	var deltas, balances int64
	if err := conn.QueryRow(h.ctx, "select (select sum(delta) from pgbench_history), (select sum(abalance) from pgbench_accounts)").Scan(&deltas, &balances); err != nil {
		t.Fatal(err)
	}
	if deltas != balances {
		t.Fatalf("the history sums to %d and the accounts to %d", deltas, balances)
	}
}

// A cancel is a connection of its own, which PostgreSQL closes without an answer; the session that
// it is for goes on.
func TestACancelEndsTheQueryAndNotTheSession(t *testing.T) {
	t.Parallel()
	db := postgres(t, 20)
	w := newWay(t, db.Addr())
	// sleeping waits until a session runs the query, and gives its backend.
	sleeping := func(query string) string {
		t.Helper()
		for end := time.Now().Add(patience); ; {
			pid, err := db.Admin(w.ctx, fmt.Sprintf("select pid from pg_stat_activity where state = 'active' and wait_event = 'PgSleep' and query = '%s';", query))
			if err != nil || time.Now().After(end) {
				t.Fatalf("the query does not run: %v", err)
			}
			if pid = strings.TrimSpace(pid); pid != "" {
				return pid
			}
		}
	}

	// Ctrl-C, of psql as people use it.
	psql := client(w.ctx, "psql", w.addr, "-d", "bench", "-X", "-c", "select pg_sleep(1001)")
	var stderr bytes.Buffer
	psql.Stderr = &stderr
	if err := psql.Start(); err != nil {
		t.Fatal(err)
	}
	sleeping("select pg_sleep(1001)")
	if err := psql.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	err := psql.Wait()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(stderr.String(), "canceling statement due to user request") {
		t.Errorf("psql ended with %v:\n%s", err, stderr.String())
	}

	conn, err := pgx.Connect(w.ctx, "postgres://bench@"+w.addr+"/bench?sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(w.ctx)
	queried := make(chan error, 1)
	go func() {
		_, err := conn.Exec(w.ctx, "select pg_sleep(1002)")
		queried <- err
	}()
	backend := sleeping("select pg_sleep(1002)")
	if err := conn.PgConn().CancelRequest(w.ctx); err != nil {
		t.Fatal(err)
	}
	if said := (*pgconn.PgError)(nil); !errors.As(<-queried, &said) || said.Code != "57014" {
		t.Errorf("the query ended with %v", said)
	}
	var pid int
	if err := conn.QueryRow(w.ctx, "select pg_backend_pid()").Scan(&pid); err != nil || fmt.Sprint(pid) != backend {
		t.Errorf("backend %d answers, %s was cancelled: %v", pid, backend, err)
	}
}

// One psql session, one backend, while both ends' credentials are renewed over
// and over: nothing is dialled anew.
func TestAPsqlSessionOutlivesTwentyRenewals(t *testing.T) {
	t.Parallel()
	db := postgres(t, 20)
	h := newHouse(t, "--credential-ttl", "2s")
	h.enroll("db1", "--serve", "db")
	h.enroll("bot", "--attr", "role=agent")
	_, lanes := h.outlet("127.0.0.1:0", db.Addr())
	in, addr := h.inlet("bot", "0", lanes)
	h.line(in, `inlet db ready direct`)

	psql := client(h.ctx, "psql", addr, "-d", "bench", "-X", "-A", "-t", "-q")
	stdin, err := psql.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := psql.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var failure bytes.Buffer
	psql.Stderr = &failure
	if err := psql.Start(); err != nil {
		t.Fatal(err)
	}
	answers := bufio.NewReader(stdout)
	// Renewals come a second apart, at half of two: less than half of that passes from one look at the
	// homes to the next.
	ask := func() string {
		t.Helper()
		if _, err := io.WriteString(stdin, "select pg_backend_pid() from pg_sleep(0.3);\n"); err != nil {
			t.Fatal(err)
		}
		line, err := answers.ReadString('\n')
		if err != nil {
			psql.Wait()
			t.Fatalf("psql: %v\n%s", err, failure.String())
		}
		return strings.TrimSpace(line)
	}
	const renewals = 20
	first, queries := ask(), 1
	seen := map[string]map[string]bool{"db1": {h.serial("db1"): true}, "bot": {h.serial("bot"): true}}
	for end := time.Now().Add(4 * renewals * time.Second); len(seen["db1"]) <= renewals || len(seen["bot"]) <= renewals; {
		if time.Now().After(end) {
			t.Fatalf("%d renewals at the outlet and %d at the inlet", len(seen["db1"])-1, len(seen["bot"])-1)
		}
		if pid := ask(); pid != first {
			t.Fatalf("query %d came from backend %s, the first from %s", queries+1, pid, first)
		}
		queries++
		for host, serials := range seen {
			serials[h.serial(host)] = true
		}
	}
	t.Logf("%d queries, %d renewals at the outlet and %d at the inlet", queries, len(seen["db1"])-1, len(seen["bot"])-1)
	stdin.Close()
	if err := psql.Wait(); err != nil {
		t.Fatalf("psql: %v\n%s", err, failure.String())
	}
}
