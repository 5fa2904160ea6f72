package journeys_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

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
	h, addr, _, _ := path(t, db.Addr())
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

	// A cancel is a connection of its own, without a credential of PostgreSQL's.
	slow, cancel := context.WithTimeout(h.ctx, time.Second)
	defer cancel()
	if _, err := conn.Exec(slow, "select pg_sleep(60)"); err == nil {
		t.Fatal("a query of 60 s ended within one")
	}
}

// One psql session, one backend, while both ends' credentials are renewed over
// and over: nothing is dialled anew.
func TestAPsqlSessionOutlivesTwentyRenewals(t *testing.T) {
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
	// Each query sleeps in the server for about one renewal: half of two seconds.
	ask := func() string {
		t.Helper()
		if _, err := io.WriteString(stdin, "select pg_backend_pid() from pg_sleep(1.1);\n"); err != nil {
			t.Fatal(err)
		}
		line, err := answers.ReadString('\n')
		if err != nil {
			psql.Wait()
			t.Fatalf("psql: %v\n%s", err, failure.String())
		}
		return strings.TrimSpace(line)
	}
	first := ask()
	for i := range 20 {
		if pid := ask(); pid != first {
			t.Fatalf("query %d came from backend %s, the first from %s", i+2, pid, first)
		}
	}
	stdin.Close()
	if err := psql.Wait(); err != nil {
		t.Fatalf("psql: %v\n%s", err, failure.String())
	}
}
