package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/portal-tunnel/portal/tests/fault/disk"
)

func TestMain(m *testing.M) {
	// The scripts wait seven times as long as they compute. -parallel counts when it is given.
	flag.Set("test.parallel", "8")
	testscript.Main(m, map[string]func(){"portal": main, "witness": witness})
}

// witness is a command that says what happens to it. `witness signals` prints a line
// for each signal it gets, and after SIGTERM how many of each there were; then it
// exits with 7. `witness hold` opens a connection to PORTAL_ADDR, sees a byte come
// back, and prints how the connection ends. `witness dial ADDR` fails when nobody
// listens there. `witness early` and `witness rude` are targets, which print where they
// listen on stderr: they send three bytes and their end at once, or three bytes and a reset
// when one has come, and print what came.
func witness() {
	switch os.Args[1] {
	case "signals":
		signals := make(chan os.Signal, 64)
		signal.Notify(signals, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGHUP, syscall.SIGTERM)
		fmt.Println("watching")
		counts := make(map[os.Signal]int)
		for sig := range signals {
			counts[sig]++
			fmt.Println(counts[sig], sig)
			if sig == syscall.SIGTERM {
				break
			}
		}
		fmt.Println("in all:", counts[syscall.SIGINT], counts[syscall.SIGQUIT], counts[syscall.SIGHUP], counts[syscall.SIGTERM])
		os.Exit(7)
	case "dial":
		c, err := net.Dial("tcp", os.Args[2])
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		c.Close()
	case "early", "rude":
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Fprintln(os.Stderr, "on", ln.Addr())
		for {
			accepted, err := ln.Accept()
			if err != nil {
				os.Exit(1)
			}
			c := accepted.(*net.TCPConn)
			io.WriteString(c, "abc")
			if os.Args[1] == "rude" {
				io.ReadFull(c, make([]byte, 1))
				c.SetLinger(0)
				c.Close()
				continue
			}
			c.CloseWrite()
			hash := sha256.New()
			n, err := io.Copy(hash, c)
			fmt.Printf("got %d bytes, %x, %v\n", n, hash.Sum(nil), err)
			c.Close()
		}
	case "hold":
		c, err := net.Dial("tcp", os.Getenv("PORTAL_ADDR"))
		if err == nil {
			_, err = c.Write([]byte("x"))
		}
		if err == nil {
			_, err = io.ReadFull(c, make([]byte, 1))
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("held")
		_, err = c.Read(make([]byte, 1))
		fmt.Println("reset:", errors.Is(err, syscall.ECONNRESET))
	}
}

// Each script is one thing the manual says, done with the real command.
func TestScript(t *testing.T) {
	// What the scripts start must hear these, also when the test does not:
	// children inherit what is ignored, not what is handled.
	for _, sig := range []os.Signal{syscall.SIGHUP, syscall.SIGINT} {
		if signal.Ignored(sig) {
			signal.Notify(make(chan os.Signal, 1), sig)
		}
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("HOME", filepath.Join(e.WorkDir, "home"))
			s := &stage{procs: make(map[string]*proc), held: make(map[string]net.Conn), screens: make(map[string]*os.File)}
			e.Values[stageKey{}] = s
			e.Defer(s.close)
			return nil
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status":    status,
			"start":     start,
			"await":     await,
			"pid":       pid,
			"signal":    sendSignal,
			"hangup":    hangup,
			"press":     press,
			"ends":      ends,
			"printed":   printed,
			"echo":      echo,
			"deaf":      deaf,
			"ask":       ask,
			"hold":      hold,
			"cut":       cut,
			"lets":      lets,
			"smalldisk": smallDisk,
			"readonly":  readOnly,
			"fill":      fill,
			"lock":      lock,
			"manager":   manager,
			"told":      told,
			"type":      typeIn,
		},
	})
}

// patience is for one step. Nothing waits for it but what has failed.
const patience = 20 * time.Second

type stageKey struct{}

// A stage is what a script has started; all of it ends with the script.
type stage struct {
	procs   map[string]*proc
	held    map[string]net.Conn
	screens map[string]*os.File // the terminals' other ends
	manager *net.UnixConn
	ends    []func()
}

func stageOf(ts *testscript.TestScript) *stage { return ts.Value(stageKey{}).(*stage) }

func (s *stage) close() {
	for _, p := range s.procs {
		syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // its commands too, which have our pipes
		<-p.ended
	}
	for i := len(s.ends) - 1; i >= 0; i-- {
		s.ends[i]()
	}
}

func (s *stage) proc(ts *testscript.TestScript, name string) *proc {
	p := s.procs[name]
	if p == nil {
		ts.Fatalf("nothing named %q was started", name)
	}
	return p
}

// A proc is a started command whose lines are waited for.
type proc struct {
	cmd   *exec.Cmd
	out   output // stderr
	data  output // stdout
	ended chan struct{}
	err   error
}

// output is a stream of lines that can be waited for.
type output struct {
	mu   sync.Mutex
	b    bytes.Buffer
	more chan struct{}
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.b.Write(b)
	if o.more != nil {
		close(o.more)
		o.more = nil
	}
	return len(b), nil
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// wait waits until the text matches, the process ends, or patience does.
func (o *output) wait(re *regexp.Regexp, ended <-chan struct{}) []string {
	limit := time.NewTimer(patience)
	defer limit.Stop()
	for over := false; ; {
		o.mu.Lock()
		if o.more == nil {
			o.more = make(chan struct{})
		}
		m, more := re.FindStringSubmatch(o.b.String()), o.more
		o.mu.Unlock()
		if m != nil || over {
			return m
		}
		select {
		case <-more:
		case <-ended:
			over = true
		case <-limit.C:
			over = true
		}
	}
}

// variables are those of the script that its processes get.
var variables = []string{"HOME", "PATH", "GOCOVERDIR", "STATE_DIRECTORY", "XDG_STATE_HOME", "NOTIFY_SOCKET",
	"PORTAL_HOME", "PORTAL_TICKET", "PORTAL_TICKET_FILE", "PORTAL_LOG_LEVEL", "PORTAL_OUTLET_ALLOW"}

func command(ts *testscript.TestScript, args []string) *exec.Cmd {
	cmd := exec.Command(args[0], args[1:]...)
	if path, err := exec.LookPath(args[0]); err == nil {
		cmd.Path = path
	}
	cmd.Dir = ts.MkAbs(".")
	for _, name := range variables {
		if v := ts.Getenv(name); v != "" {
			cmd.Env = append(cmd.Env, name+"="+v)
		}
	}
	return cmd
}

// status CODE COMMAND… runs a command to its end and checks its exit status.
func status(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	cmd := command(ts, args[1:])
	if in := ts.MkAbs("stdin"); fileExists(in) {
		b, err := os.ReadFile(in)
		ts.Check(err)
		ts.Check(os.Remove(in))
		cmd.Stdin = bytes.NewReader(b)
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	ts.Check(cmd.Start())
	timer := time.AfterFunc(patience, func() { cmd.Process.Kill() })
	cmd.Wait()
	timer.Stop()
	ts.Logf("[stdout]\n%s[stderr]\n%s", &stdout, &stderr)
	ts.Check(os.WriteFile(ts.MkAbs("stdout.txt"), stdout.Bytes(), 0o600))
	ts.Check(os.WriteFile(ts.MkAbs("stderr.txt"), stderr.Bytes(), 0o600))
	wantNoPanic(ts, stdout.String()+stderr.String())
	if got := cmd.ProcessState.ExitCode(); got != want {
		ts.Fatalf("exit status %d, want %d", got, want)
	}
}

// wantNoPanic tells a crash from a usage error: a Go program exits 2 for both.
func wantNoPanic(ts *testscript.TestScript, text string) {
	if strings.Contains(text, "panic:") || strings.Contains(text, "goroutine ") {
		ts.Fatalf("it panicked:\n%s", text)
	}
}

func fileExists(path string) bool { _, err := os.Stat(path); return err == nil }

// printed PATTERN: stderr of the last status command matches.
// ! printed PATTERN: neither stderr nor stdout does.
func printed(ts *testscript.TestScript, neg bool, args []string) {
	re, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	text := ts.ReadFile("stderr.txt")
	if neg {
		text += ts.ReadFile("stdout.txt")
	}
	if re.MatchString(text) == neg {
		ts.Fatalf("printed %v %q:\n%s", !neg, args[0], text)
	}
}

// start NAME COMMAND… starts a command that keeps running, in a session of its
// own: it has no controlling terminal. With start -tty it has one, its stdin;
// hangup NAME takes that away.
func start(ts *testscript.TestScript, neg bool, args []string) {
	tty := args[0] == "-tty"
	if tty {
		args = args[1:]
	}
	s := stageOf(ts)
	p := &proc{cmd: command(ts, args[1:]), ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.data, &p.out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: tty}
	if tty {
		screen, line := terminal(ts)
		defer line.Close()
		s.screens[args[0]], p.cmd.Stdin = screen, line
		s.ends = append(s.ends, func() { screen.Close() })
	}
	ts.Check(p.cmd.Start())
	go func() {
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	s.procs[args[0]] = p
}

// await NAME PATTERN [VARIABLE…] waits for a line of a started command's stderr;
// submatches go to the variables. await -stdout looks at stdout.
func await(ts *testscript.TestScript, neg bool, args []string) {
	stdout := args[0] == "-stdout"
	if stdout {
		args = args[1:]
	}
	p := stageOf(ts).proc(ts, args[0])
	re, err := regexp.Compile("(?m)" + args[1])
	ts.Check(err)
	o := &p.out
	if stdout {
		o = &p.data
	}
	m := o.wait(re, p.ended)
	if m == nil {
		ts.Fatalf("%s printed no %q:\n%s%s", args[0], args[1], p.out.String(), p.data.String())
	}
	for i, name := range args[2:] {
		ts.Setenv(name, m[i+1])
	}
}

// pid NAME VARIABLE puts the number of a started command's process into VARIABLE.
func pid(ts *testscript.TestScript, neg bool, args []string) {
	ts.Setenv(args[1], strconv.Itoa(stageOf(ts).proc(ts, args[0]).cmd.Process.Pid))
}

// signal NAME TERM|INT|HUP|KILL|STOP|CONT
func sendSignal(ts *testscript.TestScript, neg bool, args []string) {
	p := stageOf(ts).proc(ts, args[0])
	sig := map[string]syscall.Signal{"TERM": syscall.SIGTERM, "INT": syscall.SIGINT, "HUP": syscall.SIGHUP, "KILL": syscall.SIGKILL,
		"STOP": syscall.SIGSTOP, "CONT": syscall.SIGCONT}[args[1]]
	ts.Check(p.cmd.Process.Signal(sig))
}

func hangup(ts *testscript.TestScript, neg bool, args []string) {
	ts.Check(stageOf(ts).screens[args[0]].Close())
}

// press NAME KEYS types into the terminal that a command was started on: ^C, ^\, ^D,
// and a text as it is.
func press(ts *testscript.TestScript, neg bool, args []string) {
	keys := args[1]
	if len(keys) == 2 && keys[0] == '^' {
		keys = string(keys[1] & 0x1f)
	}
	_, err := io.WriteString(stageOf(ts).screens[args[0]], keys)
	ts.Check(err)
}

// ends NAME CODE waits for the end of a started command.
func ends(ts *testscript.TestScript, neg bool, args []string) {
	p := stageOf(ts).proc(ts, args[0])
	select {
	case <-p.ended:
	case <-time.After(patience):
		ts.Fatalf("%s does not end:\n%s", args[0], p.out.String())
	}
	ts.Logf("%s", p.out.String())
	wantNoPanic(ts, p.out.String()+p.data.String())
	if got := strconv.Itoa(p.cmd.ProcessState.ExitCode()); got != args[1] {
		ts.Fatalf("%s: exit status %s, want %s:\n%s", args[0], got, args[1], p.out.String())
	}
}

// echo VARIABLE starts a target that echoes, on a port that goes to VARIABLE.
func echo(ts *testscript.TestScript, neg bool, args []string) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		var all sync.WaitGroup
		defer all.Wait()
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				defer context.AfterFunc(ctx, func() { c.Close() })()
				io.Copy(c, c)
			})
		}
	}()
	s := stageOf(ts)
	s.ends = append(s.ends, func() { cancel(); ln.Close(); <-done })
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	ts.Setenv(args[0], port)
}

// deaf VARIABLE makes a target that answers no SYN: its queue of connections that
// nobody accepts is full. Its port goes to VARIABLE.
func deaf(ts *testscript.TestScript, neg bool, args []string) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	ts.Check(err)
	s := stageOf(ts)
	s.ends = append(s.ends, func() { syscall.Close(fd) })
	ts.Check(syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	ts.Check(syscall.Listen(fd, 0))
	bound, err := syscall.Getsockname(fd)
	ts.Check(err)
	port := strconv.Itoa(bound.(*syscall.SockaddrInet4).Port)
	for range 16 {
		c, err := net.DialTimeout("tcp", "127.0.0.1:"+port, 500*time.Millisecond)
		if err != nil {
			ts.Setenv(args[0], port)
			return
		}
		s.ends = append(s.ends, func() { c.Close() })
	}
	ts.Fatalf("a full queue still takes connections")
}

func dialScript(ts *testscript.TestScript, addr string) net.Conn {
	c, err := tryScript(addr)
	ts.Check(err)
	return c
}

func tryScript(addr string) (net.Conn, error) {
	network := "tcp"
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		network, addr = "unix", path
	}
	c, err := net.DialTimeout(network, addr, patience)
	if err == nil {
		c.SetDeadline(time.Now().Add(patience))
	}
	return c, err
}

// ask ADDR TEXT ANSWER sends a text, ends its direction, and wants the answer,
// then an end. ! ask ADDR TEXT wants a reset, or an end without an answer.
func ask(ts *testscript.TestScript, neg bool, args []string) {
	c, err := tryScript(args[0])
	if neg && errors.Is(err, syscall.ECONNRESET) {
		return // as soon as that
	}
	ts.Check(err)
	defer c.Close()
	c.Write([]byte(args[1]))
	c.(interface{ CloseWrite() error }).CloseWrite()
	got, err := io.ReadAll(c)
	switch {
	case neg && err == nil && len(got) > 0:
		ts.Fatalf("got the answer %q", got)
	case !neg && (err != nil || string(got) != args[2]):
		ts.Fatalf("got %q, %v, want %q", got, err, args[2])
	}
}

// hold NAME ADDR opens a connection that stays open, and sees a byte go through
// it and back.
func hold(ts *testscript.TestScript, neg bool, args []string) {
	c := dialScript(ts, args[1])
	s := stageOf(ts)
	s.ends = append(s.ends, func() { c.Close() })
	s.held[args[0]] = c
	_, err := c.Write([]byte("x"))
	ts.Check(err)
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		ts.Fatalf("no echo: %v", err)
	}
}

// lets NAME ends the held connection from this side, and wants a good end.
func lets(ts *testscript.TestScript, neg bool, args []string) {
	c := stageOf(ts).held[args[0]]
	ts.Check(c.(interface{ CloseWrite() error }).CloseWrite())
	if rest, err := io.ReadAll(c); err != nil || len(rest) != 0 {
		ts.Fatalf("got %q, %v; want an end", rest, err)
	}
}

// cut NAME wants the held connection to be reset.
func cut(ts *testscript.TestScript, neg bool, args []string) {
	n, err := stageOf(ts).held[args[0]].Read(make([]byte, 1))
	if n != 0 || !errors.Is(err, syscall.ECONNRESET) {
		ts.Fatalf("read %d bytes, %v; want a reset", n, err)
	}
}

// smalldisk DIR SIZE mounts a disk of that size. fill DIR leaves no room on it;
// readonly DIR lets nobody write to it.
func smallDisk(ts *testscript.TestScript, neg bool, args []string) {
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o700))
	ts.Check(disk.Mount(dir, args[1]))
	s := stageOf(ts)
	s.ends = append(s.ends, func() { disk.Unmount(dir) })
}

func readOnly(ts *testscript.TestScript, neg bool, args []string) {
	ts.Check(syscall.Mount("", ts.MkAbs(args[0]), "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
}

func fill(ts *testscript.TestScript, neg bool, args []string) {
	ts.Check(disk.Fill(ts.MkAbs(args[0]), 0))
}

// lock FILE holds the lock of a home, as a process that hangs in a write does.
func lock(ts *testscript.TestScript, neg bool, args []string) {
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_RDWR|os.O_CREATE, 0o600)
	ts.Check(err)
	s := stageOf(ts)
	s.ends = append(s.ends, func() { f.Close() })
	ts.Check(syscall.Flock(int(f.Fd()), syscall.LOCK_EX))
	_, err = fmt.Fprint(f, os.Getpid())
	ts.Check(err)
	ts.Setenv("LOCKER", strconv.Itoa(os.Getpid()))
}

// manager VARIABLE listens as systemd does and puts the socket's path into
// VARIABLE; told TEXT waits until it has been told so.
func manager(ts *testscript.TestScript, neg bool, args []string) {
	path := ts.MkAbs("notify.sock")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	ts.Check(err)
	s := stageOf(ts)
	s.manager = c
	s.ends = append(s.ends, func() { c.Close() })
	ts.Setenv(args[0], path)
}

func told(ts *testscript.TestScript, neg bool, args []string) {
	c := stageOf(ts).manager
	c.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, 256)
	n, err := c.Read(b)
	if err != nil || string(b[:n]) != args[0] {
		ts.Fatalf("told %q, %v; want %q", b[:n], err, args[0])
	}
}

// type FILE COMMAND… runs a command on a terminal, types the file when the
// command asks, and leaves what the terminal showed in screen.txt.
func typeIn(ts *testscript.TestScript, neg bool, args []string) {
	ptmx, tty := terminal(ts)
	defer ptmx.Close()
	cmd := command(ts, args[1:])
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	ts.Check(cmd.Start())
	tty.Close()
	timer := time.AfterFunc(patience, func() { cmd.Process.Kill() })
	defer timer.Stop()
	var screen bytes.Buffer
	typed := false
	for b := make([]byte, 4096); ; {
		n, err := ptmx.Read(b)
		screen.Write(b[:n])
		if !typed && strings.Contains(screen.String(), "(it is not shown): ") {
			typed = true
			for limit := time.Now().Add(patience); echoes(ptmx) && time.Now().Before(limit); {
				runtime.Gosched() // the question comes before the terminal is told not to show the answer
			}
			io.WriteString(ptmx, ts.ReadFile(args[0]))
		}
		if err != nil { // EIO: nobody has the other end any more
			break
		}
	}
	err := cmd.Wait()
	ts.Logf("%s", &screen)
	ts.Check(os.WriteFile(ts.MkAbs("screen.txt"), screen.Bytes(), 0o600))
	if (err != nil) != neg {
		ts.Fatalf("%v", err)
	}
}

// echoes reports whether the terminal shows what is typed.
func echoes(screen *os.File) bool {
	state, err := unix.IoctlGetTermios(int(screen.Fd()), unix.TCGETS)
	return err == nil && state.Lflag&unix.ECHO != 0
}

// terminal makes a terminal: the end that a person looks at, and the end that a
// process has.
func terminal(ts *testscript.TestScript) (screen, line *os.File) {
	screen, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	ts.Check(err)
	fd := int(screen.Fd())
	ts.Check(unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	ts.Check(err)
	line, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	ts.Check(err)
	return screen, line
}
