// Package server starts a real PostgreSQL for a purpose and takes all of it away afterwards: a new
// cluster in a temporary directory, on a Unix socket and a free port of 127.0.0.1.
//
// The superuser comes in through the socket alone, whose directory only this user (and root) can
// enter; over TCP every other role comes in without a password. Nothing is synced to disk: it is
// for tests and examples.
package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/portal-tunnel/portal/tests/process"
)

// ErrMissing says that no PostgreSQL server is installed, and how to install one.
var ErrMissing = errors.New("no PostgreSQL server under /usr/lib/postgresql; install it: apt-get install postgresql")

// Options of Start; nil means the defaults.
type Options struct {
	MaxConnections int    // default 100
	Setup          string // psql's input, run once as the superuser, connected to database "postgres"
}

// A Server is a running PostgreSQL.
type Server struct {
	Port   int    // on 127.0.0.1
	Socket string // directory of the Unix socket, which is .s.PGSQL.<Port> in it

	dir     string
	process *process.Process
	close   sync.Once
	closed  error
}

const stopWithin = 20 * time.Second

// supervise is what runs as PostgreSQL's user. It outlives us when we are killed (SIGTERM is then
// sent to it by the kernel), so it is the one that owns the directory $1 and removes it.
// SIGQUIT is PostgreSQL's immediate shutdown: nothing here is worth a checkpoint. It does not reach
// a backend forked while the shutdown began, whose client has not spoken yet (a "dead-end" one, read
// in 15's postmaster.c); that one goes at authentication_timeout, far below stopWithin.
// $! names the child from its fork on, where a variable would name it one command later, with room
// for a SIGTERM between. A shell starts its background children with SIGQUIT ignored: it is said
// again until the child, which sets it otherwise, is gone.
const supervise = `
dir=$1 bin=$2 port=$3 connections=$4
cd / && umask 077
trap 'rm -rf -- "$dir"' EXIT
trap 'trap "" TERM; [ -z "$!" ] || { while kill -QUIT $! 2>/dev/null; do sleep 0.1; done; wait; }; exit 0' TERM
"$bin/initdb" -D "$dir/data" -U postgres -A trust -E UTF8 --locale=C --no-sync --no-instructions >&2 &
wait $! || exit 1
cat >"$dir/data/pg_hba.conf" <<'end'
local all all                   trust
host  all postgres 127.0.0.1/32 reject
host  all all      127.0.0.1/32 trust
end
"$bin/postgres" -D "$dir/data" -k "$dir" -p "$port" -c listen_addresses=127.0.0.1 -c max_connections="$connections" \
	-c authentication_timeout=5s \
	-c fsync=off -c synchronous_commit=off -c full_page_writes=off -c shared_buffers=32MB \
	-c logging_collector=off -c log_destination=stderr -c lc_messages=C &
wait $!
`

var (
	ready     = regexp.MustCompile(`database system is ready to accept connections|could not bind IPv4 address .*: Address already in use`)
	readyText = "ready to accept connections"
)

// Start starts a server and waits until it accepts connections, ctx at most. Close stops it.
// As root it runs as the user postgres, whom PostgreSQL's package makes: PostgreSQL refuses root.
func Start(ctx context.Context, o *Options) (*Server, error) {
	if o == nil {
		o = new(Options)
	}
	bin, err := binaries("/usr/lib/postgresql")
	if err != nil {
		return nil, err
	}
	// Between choosing a free port and PostgreSQL's taking it, another process may have it.
	for try := 1; ; try++ {
		s, err := start(ctx, bin, o)
		if errors.Is(err, errPortTaken) && try < 5 {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("starting PostgreSQL: %w", err)
		}
		if o.Setup == "" {
			return s, nil
		}
		if _, err := s.Admin(ctx, o.Setup); err != nil {
			return nil, errors.Join(fmt.Errorf("setting PostgreSQL up: %w", err), s.Close())
		}
		return s, nil
	}
}

// binaries finds the directory of the newest server's programs.
func binaries(root string) (string, error) {
	found, err := filepath.Glob(filepath.Join(root, "*", "bin", "initdb"))
	if err != nil {
		return "", err
	}
	newest, dir := -1, ""
	for _, path := range found {
		bin := filepath.Dir(path)
		if major, err := strconv.Atoi(filepath.Base(filepath.Dir(bin))); err == nil && major > newest {
			newest, dir = major, bin
		}
	}
	if dir == "" {
		return "", ErrMissing
	}
	return dir, nil
}

var errPortTaken = errors.New("the free port was taken by another process")

func start(ctx context.Context, bin string, o *Options) (*Server, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "portal-postgres-") // 0700
	if err != nil {
		return nil, err
	}
	connections := o.MaxConnections
	if connections == 0 {
		connections = 100
	}
	cmd := exec.Command("/bin/sh", "-c", supervise, "sh", dir, bin, strconv.Itoa(port), strconv.Itoa(connections))
	cmd.Env = process.Environ()
	cmd.SysProcAttr, err = owner(dir)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	p, err := process.Start("PostgreSQL", cmd)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	s := &Server{Port: port, Socket: dir, dir: dir, process: p}
	line, err := p.Line(ctx, ready)
	switch {
	case err != nil:
		return nil, errors.Join(err, s.Close())
	case !strings.Contains(line[0], readyText):
		return nil, errors.Join(errPortTaken, s.Close())
	}
	return s, nil
}

// owner gives dir to the user who will run the server: ourselves, or postgres when we are root.
func owner(dir string) (*syscall.SysProcAttr, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil, fmt.Errorf("PostgreSQL refuses to run as root: %w; its package makes that user: apt-get install postgresql", err)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("the user postgres: %w", err)
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("the user postgres: %w", err)
	}
	if err := os.Chown(dir, int(uid), int(gid)); err != nil {
		return nil, err
	}
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}, nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("finding a free port: %w", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// Addr is the server's TCP address.
func (s *Server) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.Port)) }

// Admin runs psql's input as the superuser, through the socket, and returns what it printed
// unaligned and without headings. The first error ends it.
func (s *Server) Admin(ctx context.Context, input string) (string, error) {
	return psql(ctx, s.Socket, s.Port, "postgres", "postgres", input)
}

func psql(ctx context.Context, host string, port int, role, database, input string) (string, error) {
	cmd := exec.CommandContext(ctx, "psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1",
		"-h", host, "-p", strconv.Itoa(port), "-U", role, "-d", database, "-f", "-")
	cmd.Env = process.Environ()
	cmd.Stdin = strings.NewReader(input)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("psql: %w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(stdout.String()), nil
}

// Close stops the server at once, with every connection to it, and removes its directory.
// It may be called again.
func (s *Server) Close() error {
	s.close.Do(func() {
		err := s.process.Stop(stopWithin)
		// The supervisor has removed it, unless it had to be killed.
		s.closed = errors.Join(err, os.RemoveAll(s.dir))
	})
	return s.closed
}
