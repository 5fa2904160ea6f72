// Command postgres shows the product's main job on real programs: a private PostgreSQL, reached
// by an agent whose credential allows it, and refused to a guest.
//
//	go run ./examples/postgres
//
// It starts a PostgreSQL of its own (Debian's postgresql must be installed), builds portal, and
// runs what a person would type on four hosts, each with its own home: an authority, the database
// host with its outlet, an agent's inlet, a guest's inlet. Every line that it prints was checked
// before. It exits 0 when all of them held, 1 otherwise, and leaves nothing behind.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/portal-tunnel/portal/examples/postgres/server"
	"github.com/portal-tunnel/portal/examples/walk"
	"github.com/portal-tunnel/portal/tests/process"
)

const schema = `
create role reader login;
create database orders;
\connect orders
create table orders (id int primary key, customer text not null, cents int not null);
insert into orders values (1, 'ada', 1250), (2, 'grace', 980), (3, 'edsger', 4400);
grant select on orders to reader;
`

func main() { walk.Main("postgres", run) }

func run(ctx context.Context, out io.Writer) error {
	return walk.Run(ctx, out, steps)
}

func steps(ctx context.Context, w *walk.Walk) error {
	db, err := server.Start(ctx, &server.Options{Setup: schema})
	if err != nil {
		return err
	}
	w.Later(db.Close)
	w.Say("PostgreSQL on %s: table orders with 3 rows, role reader", db.Addr())

	authority, err := w.Start("authority", "authority", "--listen", "127.0.0.1:0")
	if err != nil {
		return err
	}
	addr, err := walk.Line(ctx, authority, `^portal: authority ready on (\S+) `)
	if err != nil {
		return err
	}
	w.Say("authority on %s", addr)

	e := &example{w}
	outlet, err := e.outlet(ctx, db)
	if err != nil {
		return err
	}
	w.Say(`outlet orders-db on %s, allow: principal.role == "agent"`, outlet)

	if err := e.agentReads(ctx, outlet); err != nil {
		return fmt.Errorf("the agent: %w", err)
	}
	if err := e.guestIsRefused(ctx, outlet); err != nil {
		return fmt.Errorf("the guest: %w", err)
	}
	return nil
}

type example struct{ *walk.Walk }

func (e *example) outlet(ctx context.Context, db *server.Server) (addr string, err error) {
	if err := e.Enroll(ctx, "authority", "db1", "--serve", "orders-db"); err != nil {
		return "", err
	}
	p, _, err := e.Outlet(ctx, "db1", "orders-db", "--to", strconv.Itoa(db.Port),
		"--allow", `principal.role == "agent"`, "--listen", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return walk.Line(ctx, p, `ready on ([^\s;]+); target \S+ answers`)
}

func (e *example) agentReads(ctx context.Context, outlet string) error {
	if err := e.Enroll(ctx, "authority", "agent", "--attr", "role=agent"); err != nil {
		return err
	}
	at, who, err := e.Inlet(ctx, "agent", "ready", "orders-db", "--direct", outlet)
	if err != nil {
		return err
	}
	e.Say("agent's inlet on %s, ready %s", at, who)

	stdout, stderr, err := psql(ctx, at, "select id, customer, cents from orders order by id")
	if err != nil {
		return fmt.Errorf("psql: %w: %s", err, stderr)
	}
	if want := "1|ada|1250\n2|grace|980\n3|edsger|4400"; stdout != want {
		return fmt.Errorf("psql printed %q, want %q", stdout, want)
	}
	e.Say("agent: psql reads %s", strings.ReplaceAll(stdout, "\n", "  "))

	conn, err := pgx.Connect(ctx, url(at))
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	var sum int64
	if err := conn.QueryRow(ctx, "select sum(cents) from orders where id <> $1", 2).Scan(&sum); err != nil {
		return fmt.Errorf("pgx: %w", err)
	}
	if sum != 5650 {
		return fmt.Errorf("pgx read the sum %d, want 5650", sum)
	}
	e.Say("agent: pgx reads the sum of orders 1 and 3: %d cents", sum)
	return conn.Close(ctx)
}

func (e *example) guestIsRefused(ctx context.Context, outlet string) error {
	if err := e.Enroll(ctx, "authority", "guest", "--attr", "role=guest"); err != nil {
		return err
	}
	// --kind pg: the inlet answers a refused client in PostgreSQL's own words.
	at, why, err := e.Inlet(ctx, "guest", "refused:", "orders-db", "--direct", outlet, "--kind", "pg")
	if err != nil {
		return err
	}
	e.Say("guest's inlet on %s, refused: %s", at, why)

	stdout, stderr, err := psql(ctx, at, "select id from orders")
	var exit *exec.ExitError
	switch {
	case err == nil:
		return fmt.Errorf("psql was let in and printed %q", stdout)
	case !errors.As(err, &exit) || exit.ExitCode() != 2: // psql: the connection to the server went bad
		return fmt.Errorf("psql: %w: %s", err, stderr)
	}
	_, told, ok := strings.Cut(stderr, "FATAL:")
	if !ok {
		return fmt.Errorf("psql was not told why: %s", stderr)
	}
	told, _, _ = strings.Cut(strings.TrimSpace(told), "\n")
	e.Say("guest: psql exits 2 and prints: FATAL: %s", told)

	const invalidAuthorization = "28000"
	_, err = pgx.Connect(ctx, url(at))
	var refusal *pgconn.PgError
	if !errors.As(err, &refusal) || refusal.Code != invalidAuthorization {
		return fmt.Errorf("pgx: %v, want SQLSTATE %s", err, invalidAuthorization)
	}
	e.Say("guest: pgx gets SQLSTATE %s", refusal.Code)
	return nil
}

func url(addr string) string { return "postgres://reader@" + addr + "/orders?sslmode=prefer" }

// psql runs one query as the role reader, as a person would by way of the inlet's address.
func psql(ctx context.Context, addr, query string) (stdout, stderr string, err error) {
	cmd := exec.CommandContext(ctx, "psql", "-X", "-At", "-d", url(addr), "-c", query)
	cmd.Env = process.Environ()
	var o, e strings.Builder
	cmd.Stdout, cmd.Stderr = &o, &e
	err = cmd.Run()
	return strings.TrimSpace(o.String()), strings.TrimSpace(e.String()), err
}
