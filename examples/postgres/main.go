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
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/portal-tunnel/portal/examples/postgres/server"
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

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute) // a cold build of portal is most of it
	defer cancel()
	if err := run(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "postgres example:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out io.Writer) (err error) {
	e := &example{out: out}
	e.dir, err = os.MkdirTemp("", "portal-example-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.close()) }()

	db, err := server.Start(ctx, &server.Options{Setup: schema})
	if err != nil {
		return err
	}
	e.later(db.Close)
	e.say("PostgreSQL on %s: table orders with 3 rows, role reader", db.Addr())

	e.portal, err = process.BuildPortal(ctx, e.dir)
	if err != nil {
		return err
	}
	authority, err := e.authority(ctx)
	if err != nil {
		return err
	}
	e.say("authority on %s", authority)

	outlet, err := e.outlet(ctx, db)
	if err != nil {
		return err
	}
	e.say(`outlet orders-db on %s, allow: principal.role == "agent"`, outlet)

	if err := e.agentReads(ctx, outlet); err != nil {
		return fmt.Errorf("the agent: %w", err)
	}
	if err := e.guestIsRefused(ctx, outlet); err != nil {
		return fmt.Errorf("the guest: %w", err)
	}
	return nil
}

type example struct {
	out    io.Writer
	dir    string // the binary, and a home for each host
	portal *process.Portal
	lines  int
	stops  []func() error // in the order of the starts
}

// say prints a numbered line: what has just been checked.
func (e *example) say(format string, args ...any) {
	e.lines++
	fmt.Fprintf(e.out, "%3d  %s\n", e.lines, fmt.Sprintf(format, args...))
}

func (e *example) later(stop func() error) { e.stops = append(e.stops, stop) }

// close stops the last started first: inlets, outlet, authority, PostgreSQL.
func (e *example) close() error {
	var errs []error
	for i := len(e.stops) - 1; i >= 0; i-- {
		errs = append(errs, e.stops[i]())
	}
	return errors.Join(append(errs, os.RemoveAll(e.dir))...)
}

func (e *example) home(host string) string { return filepath.Join(e.dir, host) }

// start starts a long-running command on a host; it must end with status 0 when it is stopped.
func (e *example) start(host string, args ...string) (*process.Process, error) {
	p, err := e.portal.Start(e.home(host), args...)
	if err != nil {
		return nil, err
	}
	e.later(func() error {
		if err := p.Stop(10 * time.Second); err != nil {
			return fmt.Errorf("stopping %s on %s: %w", p.Name, host, err)
		}
		return nil
	})
	return p, nil
}

// line waits for a line of a command and returns its first submatch.
func line(ctx context.Context, p *process.Process, pattern string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("nothing for 30 s"))
	defer cancel()
	m, err := p.Line(ctx, regexp.MustCompile(pattern))
	if err != nil {
		return "", err
	}
	return m[1], nil
}

func (e *example) authority(ctx context.Context) (addr string, err error) {
	p, err := e.start("authority", "authority", "--listen", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return line(ctx, p, `^portal: authority ready on (\S+) `)
}

// enroll makes a ticket on the authority's host and redeems it on another.
func (e *example) enroll(ctx context.Context, host string, grants ...string) error {
	ticket, err := e.portal.Run(ctx, e.home("authority"), append([]string{"ticket", "create", "--name", host}, grants...)...)
	if err != nil {
		return err
	}
	// A ticket is a secret: in a file that only we can read, never on a command line.
	file := filepath.Join(e.dir, host+".ticket")
	if err := os.WriteFile(file, []byte(ticket), 0o600); err != nil {
		return err
	}
	_, err = e.portal.Run(ctx, e.home(host), "enroll", file)
	return err
}

func (e *example) outlet(ctx context.Context, db *server.Server) (addr string, err error) {
	if err := e.enroll(ctx, "db1", "--serve", "orders-db"); err != nil {
		return "", err
	}
	p, err := e.start("db1", "outlet", "orders-db", "--to", strconv.Itoa(db.Port),
		"--allow", `principal.role == "agent"`, "--listen", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return line(ctx, p, `^portal: outlet orders-db ready on ([^\s;]+); target \S+ answers`)
}

func (e *example) agentReads(ctx context.Context, outlet string) error {
	if err := e.enroll(ctx, "agent", "--attr", "role=agent"); err != nil {
		return err
	}
	inlet, err := e.start("agent", "inlet", "orders-db", "--from", "0", "--direct", outlet)
	if err != nil {
		return err
	}
	at, err := line(ctx, inlet, `^portal: inlet orders-db listening on (127\.0\.0\.1:\d+)`)
	if err != nil {
		return err
	}
	who, err := line(ctx, inlet, `^portal: inlet orders-db ready direct (.*)`)
	if err != nil {
		return err
	}
	e.say("agent's inlet on %s, ready direct %s", at, who)

	stdout, stderr, err := psql(ctx, at, "select id, customer, cents from orders order by id")
	if err != nil {
		return fmt.Errorf("psql: %w: %s", err, stderr)
	}
	if want := "1|ada|1250\n2|grace|980\n3|edsger|4400"; stdout != want {
		return fmt.Errorf("psql printed %q, want %q", stdout, want)
	}
	e.say("agent: psql reads %s", strings.ReplaceAll(stdout, "\n", "  "))

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
	e.say("agent: pgx reads the sum of orders 1 and 3: %d cents", sum)
	return conn.Close(ctx)
}

func (e *example) guestIsRefused(ctx context.Context, outlet string) error {
	if err := e.enroll(ctx, "guest", "--attr", "role=guest"); err != nil {
		return err
	}
	// --kind pg: the inlet answers a refused client in PostgreSQL's own words.
	inlet, err := e.start("guest", "inlet", "orders-db", "--from", "0", "--direct", outlet, "--kind", "pg")
	if err != nil {
		return err
	}
	at, err := line(ctx, inlet, `^portal: inlet orders-db listening on (127\.0\.0\.1:\d+)`)
	if err != nil {
		return err
	}
	why, err := line(ctx, inlet, `^portal: inlet orders-db refused: (.*)`)
	if err != nil {
		return err
	}
	e.say("guest's inlet on %s, refused: %s", at, why)

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
	e.say("guest: psql exits 2 and prints: FATAL: %s", told)

	const invalidAuthorization = "28000"
	_, err = pgx.Connect(ctx, url(at))
	var refusal *pgconn.PgError
	if !errors.As(err, &refusal) || refusal.Code != invalidAuthorization {
		return fmt.Errorf("pgx: %v, want SQLSTATE %s", err, invalidAuthorization)
	}
	e.say("guest: pgx gets SQLSTATE %s", refusal.Code)
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
