package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/portal-tunnel/portal/examples/postgres/server"
	"github.com/portal-tunnel/portal/tests/process"
)

const (
	// pgbenchScale is the number of branches, whose rows TPC-B updates: at 1 its clients would wait for each other alone.
	pgbenchScale = 10
	// pgbenchClients is the most that a load has.
	pgbenchClients = 64
)

// startPostgres starts a server with pgbench's tables in a database `bench`.
func startPostgres(ctx context.Context) (*server.Server, error) {
	if _, err := exec.LookPath("pgbench"); err != nil {
		return nil, fmt.Errorf("%w (Debian: postgresql)", err)
	}
	db, err := server.Start(ctx, &server.Options{
		MaxConnections: pgbenchClients + 40, // those of a load before may still be ending
		Setup:          "create role bench login createdb;\ncreate database bench owner bench;",
	})
	if err != nil {
		return nil, err
	}
	if _, err := pgbench(ctx, db.Addr(), "-i", "-q", "-s", strconv.Itoa(pgbenchScale)); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

func pgbench(ctx context.Context, addr string, args ...string) (string, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("pgbench did not end within a minute"))
	defer cancel()
	cmd := exec.CommandContext(ctx, "pgbench", append(append([]string{"-h", host, "-p", port, "-U", "bench"}, args...), "bench")...)
	cmd.Env = append(process.Environ(), "PGCONNECT_TIMEOUT=20")
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		said := strings.Split(strings.TrimSpace(string(out)), "\n")
		return "", fmt.Errorf("pgbench: %w: %s", err, strings.Join(said[max(len(said)-3, 0):], "; "))
	}
	return string(out), nil
}

var (
	tps        = regexp.MustCompile(`(?m)^tps = ([\d.]+) \(without initial connection time\)`)
	failedOnes = regexp.MustCompile(`(?m)^number of failed transactions: ([1-9]\d*) `)
)

// transactions runs a script with so many clients: how many there were in a second, without the time
// to connect. They last d, in whole seconds; or each client does so many, where connecting may take
// longer than that, which pgbench counts in.
func transactions(ctx context.Context, addr, script string, clients, each int, d time.Duration) (float64, error) {
	until := []string{"-T", strconv.Itoa(max(1, int(d.Round(time.Second)/time.Second)))}
	if each > 0 {
		until = []string{"-t", strconv.Itoa(each)}
	}
	out, err := pgbench(ctx, addr, append([]string{"-n", "-b", script, "-c", strconv.Itoa(clients), "-j", strconv.Itoa(min(clients, 2))}, until...)...)
	if err != nil {
		return 0, err
	}
	if m := failedOnes.FindStringSubmatch(out); m != nil {
		return 0, fmt.Errorf("pgbench: %s transactions failed", m[1])
	}
	m := tps.FindStringSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("pgbench printed no transactions a second: %q", out)
	}
	return strconv.ParseFloat(m[1], 64)
}

// askPostgres asks a server whether it does TLS, which it answers before anything else.
func askPostgres(ctx context.Context, addr string) error {
	c, err := dial(ctx, addr, 0)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write([]byte{0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f}); err != nil {
		return err
	}
	var answer [1]byte
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		return err
	}
	if answer[0] != 'N' && answer[0] != 'S' {
		return fmt.Errorf("PostgreSQL answered %q", answer)
	}
	return nil
}
