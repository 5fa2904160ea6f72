package outlet

import (
	"context"
	"encoding/binary"
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
// kills the command and its group, and so does the end of this process, by
// kill -9 too: its input ends only when the stream's did. For that each command
// has a process beside it, which is this program again; see holderName.
func Exec(name string, args ...string) Target {
	return func(ctx context.Context, r *Request) (net.Conn, error) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		cmd := exec.Command(name, args...)
		cmd.Stderr = os.Stderr
		cmd.Env = append(os.Environ(), "PORTAL_NAME="+r.Name)
		if r.Peer != nil {
			cmd.Env = append(cmd.Env, "PORTAL_PEER="+r.Peer.ID().String())
		}
		p, err := start(cmd)
		if err != nil {
			return nil, fmt.Errorf("starting the target's command: %w", err)
		}
		return p, nil
	}
}

// process is a command as a connection.
type process struct {
	cmd     *exec.Cmd
	holder  *exec.Cmd // leads the group
	life    *os.File  // what the holder listens to
	in, out *os.File
	exited  chan struct{} // closed when err is set
	err     error
	all     sync.WaitGroup

	mu    sync.Mutex
	over  bool // the group's number is, or is about to be, free for another
	close sync.Once
}

func start(cmd *exec.Cmd) (_ *process, err error) {
	if cmd.Err != nil {
		return nil, cmd.Err
	}
	p := &process{cmd: cmd, exited: make(chan struct{})}
	defer func() {
		if err != nil {
			p.files()
		}
	}()
	// Pipes of our own: those of cmd are closed by its Wait, perhaps before the
	// output has been read, or the input's end was passed on.
	childIn, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer childIn.Close()
	p.in = in
	out, childOut, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer childOut.Close()
	p.out = out
	if p.holder, p.life, err = startHolder(in); err != nil {
		return nil, err
	}
	cmd.Stdin, cmd.Stdout = childIn, childOut
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pgid: p.holder.Process.Pid}
	if err := cmd.Start(); err != nil {
		p.kill(true)
		p.holder.Wait()
		return nil, err
	}
	p.all.Go(p.wait)
	// Before the first byte of the input. A holder that is gone already is found
	// by watch.
	p.life.Write(binary.BigEndian.AppendUint32(nil, uint32(cmd.Process.Pid)))
	p.all.Go(p.watch)
	return p, nil
}

func (p *process) wait() {
	p.err = p.cmd.Wait()
	p.kill(true) // what it left behind, and the holder
	p.holder.Wait()
	close(p.exited)
}

// watch ends the command when its holder has ended: without one a kill of this
// process would be an end of the input.
func (p *process) watch() {
	p.life.Read(make([]byte, 1))
	p.kill(false)
}

// kill kills the whole process group, and the command if it left it, for the
// last time or not.
func (p *process) kill(last bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.over {
		syscall.Kill(-p.holder.Process.Pid, syscall.SIGKILL)
		if p.cmd.Process != nil {
			p.cmd.Process.Kill()
		}
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

// CloseWrite ends the command's standard input.
func (p *process) CloseWrite() error {
	if err := p.in.Close(); err != nil {
		return err
	}
	p.life.Write([]byte{0}) // a holder that is gone holds nothing
	return nil
}

// Close ends the command if it still runs, with everything it started. Its
// input is closed behind that: to the command that is an end.
func (p *process) Close() error {
	p.close.Do(func() {
		p.kill(false)
		p.in.Close() // and with it a Write that waits
		p.all.Wait()
		p.files()
	})
	return nil
}

func (p *process) files() {
	for _, f := range []*os.File{p.in, p.out, p.life} {
		if f != nil {
			f.Close()
		}
	}
}

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "command" }

func (p *process) LocalAddr() net.Addr               { return pipeAddr{} }
func (p *process) RemoteAddr() net.Addr              { return pipeAddr{} }
func (p *process) SetDeadline(t time.Time) error     { return p.out.SetReadDeadline(t) }
func (p *process) SetReadDeadline(t time.Time) error { return p.out.SetReadDeadline(t) }
func (p *process) SetWriteDeadline(time.Time) error  { return os.ErrNoDeadline }
