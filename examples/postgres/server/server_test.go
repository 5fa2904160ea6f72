package server

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
)

func TestPsqlReadsWhatSetupWrote(t *testing.T) {
	s, err := Start(t.Context(), &Options{MaxConnections: 17, Setup: `
		create role reader login;
		create database orders;
		\connect orders
		create table orders (id int primary key);
		insert into orders select generate_series(1, 42);
		grant select on orders to reader;`})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()

	for _, c := range []struct{ host, role, input, want string }{
		{"127.0.0.1", "reader", "select count(*) from orders", "42"},
		{s.Socket, "reader", "select max(id) from orders", "42"},
		{"127.0.0.1", "reader", "show max_connections", "17"},
		{"127.0.0.1", "reader", "show fsync", "off"},
	} {
		if got, err := psql(t.Context(), c.host, s.Port, c.role, "orders", c.input); got != c.want || err != nil {
			t.Errorf("%s as %s at %s: %q, %v; want %q", c.input, c.role, c.host, got, err, c.want)
		}
	}
	for _, c := range []struct{ host, role, input, want string }{
		{"127.0.0.1", "reader", "delete from orders", "permission denied"},
		{"127.0.0.1", "postgres", "select 1", "pg_hba.conf rejects connection"},
	} {
		if got, err := psql(t.Context(), c.host, s.Port, c.role, "orders", c.input); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s as %s: %q, %v; want an error with %q", c.input, c.role, got, err, c.want)
		}
	}
}

// gone tells that nothing of a server is left.
func gone(t *testing.T, dir, addr string) {
	t.Helper()
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("its directory: %v", err)
	}
	if c, err := net.Dial("tcp", addr); err == nil {
		c.Close()
		t.Error("it still answers")
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	s, err := Start(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	silent, err := net.Dial("tcp", s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	session, err := pgconn.Connect(t.Context(), "host="+s.Socket+" port="+strconv.Itoa(s.Port)+" user=postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close(t.Context())
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	gone(t, s.Socket, s.Addr())
}

func TestFailedSetupLeavesNothing(t *testing.T) {
	t.Setenv("TMPDIR", shortTemp(t))
	if _, err := Start(t.Context(), &Options{Setup: "select 1; select nothing;"}); err == nil || !strings.Contains(err.Error(), `column "nothing" does not exist`) {
		t.Fatal(err)
	}
	empty(t, os.Getenv("TMPDIR"))
}

func TestAStartGivenUpLeavesNothing(t *testing.T) {
	t.Setenv("TMPDIR", shortTemp(t))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Start(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	empty(t, os.Getenv("TMPDIR"))
}

// shortTemp is a temporary directory that the user postgres can enter and whose name leaves room
// for a socket's 107 bytes.
func shortTemp(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

func empty(t *testing.T, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Fatalf("left behind: %v, %v", left, err)
	}
}

func TestNoServerSaysHowToInstallOne(t *testing.T) {
	root := t.TempDir()
	if _, err := binaries(root); !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), "apt-get install postgresql") {
		t.Fatal(err)
	}
	for _, version := range []string{"9", "15", "contrib"} {
		dir := filepath.Join(root, version, "bin")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "initdb"), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if dir, err := binaries(root); err != nil || dir != filepath.Join(root, "15", "bin") {
		t.Fatal(dir, err)
	}
}
