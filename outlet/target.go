package outlet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/portal-tunnel/portal/identity"
)

// Request is an admitted stream that wants its target.
type Request struct {
	Name   string         // the outlet's
	Peer   *identity.Peer // who opened it
	Stream uint32
}

// Target reaches the private service. What it reaches is the configuration's
// alone: nothing of the request names an address.
type Target func(ctx context.Context, r *Request) (net.Conn, error)

// TCP dials addr, "host:port", with keepalive.
func TCP(addr string) Target {
	var d net.Dialer
	return func(ctx context.Context, _ *Request) (net.Conn, error) {
		return d.DialContext(ctx, "tcp", addr)
	}
}

// Unix dials a Unix socket. It has no reset: there a cut can look like an end.
func Unix(path string) Target {
	var d net.Dialer
	return func(ctx context.Context, _ *Request) (net.Conn, error) {
		return d.DialContext(ctx, "unix", path)
	}
}

// Exec runs a command for each stream and connects its standard input and
// output; standard error is this process's. The command is over when it exits:
// what it started and left behind in its process group is killed. The stream
// ends in good order when that was with status 0, else it is reset. A reset
// kills the command and its group.
func Exec(name string, args ...string) Target {
	return func(ctx context.Context, r *Request) (net.Conn, error) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		cmd := exec.Command(name, args...)
		cmd.Stderr = os.Stderr
		cmd.Env = append(os.Environ(), "PORTAL_NAME="+r.Name)
		cmd.SysProcAttr = processGroup()
		if r.Peer != nil {
			cmd.Env = append(cmd.Env, "PORTAL_PEER="+r.Peer.ID().String())
		}
		// Pipes of our own: those of cmd are closed by its Wait, perhaps before the
		// output has been read, or the input's end was passed on.
		childIn, in, err := os.Pipe()
		if err != nil {
			return nil, fmt.Errorf("starting the target's command: %w", err)
		}
		out, childOut, err := os.Pipe()
		if err != nil {
			childIn.Close()
			in.Close()
			return nil, fmt.Errorf("starting the target's command: %w", err)
		}
		cmd.Stdin, cmd.Stdout = childIn, childOut
		err = cmd.Start()
		childIn.Close()
		childOut.Close()
		if err != nil {
			in.Close()
			out.Close()
			return nil, fmt.Errorf("starting the target's command: %w", err)
		}
		p := &process{cmd: cmd, in: in, out: out, exited: make(chan struct{})}
		go p.wait() // Close waits for it
		return p, nil
	}
}

// process is a command as a connection.
type process struct {
	cmd    *exec.Cmd
	in     *os.File
	out    *os.File
	exited chan struct{} // closed when err is set
	err    error

	mu    sync.Mutex
	over  bool // its number is, or is about to be, free for another process
	close sync.Once
}

func (p *process) wait() {
	if waitable(p.cmd.Process.Pid) {
		p.kill(true) // what it left behind; its own status stands
	}
	p.err = p.cmd.Wait()
	p.mu.Lock()
	p.over = true
	p.mu.Unlock()
	close(p.exited)
}

// kill kills the whole process group, for the last time or not.
func (p *process) kill(last bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.over {
		syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	}
	p.over = p.over || last
}

// exitTime is how long a command may go on after it has closed its output.
const exitTime = 10 * time.Second

// Read gives io.EOF only for a command that ended well: output that a crash cut
// short must not look complete.
func (p *process) Read(b []byte) (int, error) {
	n, err := p.out.Read(b)
	if n > 0 || !errors.Is(err, io.EOF) {
		return n, err
	}
	t := time.NewTimer(exitTime)
	defer t.Stop()
	select {
	case <-p.exited:
	case <-t.C:
		return 0, errors.New("the target's command closed its output and did not exit")
	}
	if p.err != nil {
		return 0, fmt.Errorf("the target's command failed: %w", p.err)
	}
	return 0, io.EOF
}

func (p *process) Write(b []byte) (int, error) { return p.in.Write(b) }

// CloseWrite closes the command's standard input.
func (p *process) CloseWrite() error { return p.in.Close() }

// Close ends the command if it still runs, with everything it started.
func (p *process) Close() error {
	p.close.Do(func() {
		p.in.Close()
		p.kill(false)
		<-p.exited
		p.out.Close()
	})
	return nil
}

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "command" }

func (p *process) LocalAddr() net.Addr               { return pipeAddr{} }
func (p *process) RemoteAddr() net.Addr              { return pipeAddr{} }
func (p *process) SetDeadline(t time.Time) error     { return p.out.SetReadDeadline(t) }
func (p *process) SetReadDeadline(t time.Time) error { return p.out.SetReadDeadline(t) }
func (p *process) SetWriteDeadline(time.Time) error  { return os.ErrNoDeadline }

// processGroup gives the command a group of its own, so that what it starts can
// be killed with it.
func processGroup() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}
