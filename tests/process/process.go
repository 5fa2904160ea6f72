// Package process runs real programs for examples, benchmarks and journeys. It waits for the lines
// that a program prints on stderr, where others would sleep, and leaves no program behind: not
// after Stop, and on Linux not after a kill -9 of the process that started it either.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// heldLines is what a chatty program may make us keep: enough to find a state line among logs.
	heldLines = 1000
	// lineBytes cuts a line that does not end.
	lineBytes = 64 << 10
)

// A Process is a started program. Its methods may be called at the same time.
type Process struct {
	Name string
	cmd  *exec.Cmd
	done chan struct{} // closed when the program has ended and its stderr is read
	err  error         // of Wait; written before done is closed

	mu      sync.Mutex
	lines   []string      // the last heldLines of them
	dropped int           // how many came before lines[0]
	partial []byte        // of the line that has not ended yet
	more    chan struct{} // closed and replaced with every line
}

// Start starts cmd, whose Stderr must be nil: Line reads it. Name stands in errors.
// The program gets a process group of its own: a terminal's Ctrl-C is for the caller alone, which
// then stops its programs in its own order.
func Start(name string, cmd *exec.Cmd) (*Process, error) {
	p := &Process{Name: name, cmd: cmd, done: make(chan struct{}), more: make(chan struct{})}
	cmd.Stderr = (*lineWriter)(p)
	// A grandchild that keeps stderr open must not keep Wait waiting.
	cmd.WaitDelay = 2 * time.Second
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Setpgid = true
	endWithParent(cmd.SysProcAttr)

	started := make(chan error)
	go func() {
		// The kernel sends the parent-death signal when the thread that started the program ends
		// (prctl(2)), so this thread stays until the program has.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = cmd.Wait()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	return p, nil
}

// lineWriter is a Process as the writer of its stderr.
type lineWriter Process

func (w *lineWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(b)
	for len(b) > 0 {
		line, rest, ended := bytes.Cut(b, []byte("\n"))
		w.partial = append(w.partial, line[:min(len(line), lineBytes-len(w.partial))]...)
		b = rest
		if !ended {
			break
		}
		w.lines = append(w.lines, string(w.partial))
		w.partial = w.partial[:0]
		if len(w.lines) > heldLines {
			w.lines = w.lines[1:]
			w.dropped++
		}
		close(w.more)
		w.more = make(chan struct{})
	}
	return n, nil
}

// Line waits for a line that re matches, beginning with those already printed, and returns re's
// submatches. It fails when ctx ends or the program does, with the program's last lines.
func (p *Process) Line(ctx context.Context, re *regexp.Regexp) ([]string, error) {
	next := 0
	for {
		// done is asked before the lines: what was printed before the end is then among them.
		ended := false
		select {
		case <-p.done:
			ended = true
		default:
		}
		p.mu.Lock()
		lines, more := p.lines[max(next-p.dropped, 0):], p.more
		next = p.dropped + len(p.lines)
		p.mu.Unlock()
		for _, line := range lines {
			if m := re.FindStringSubmatch(line); m != nil {
				return m, nil
			}
		}
		if ended {
			return nil, fmt.Errorf("%s ended (%s) without printing /%s/%s", p.Name, p.cmd.ProcessState, re, p.tail())
		}
		select {
		case <-more:
		case <-p.done:
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for %s to print /%s/: %w%s", p.Name, re, context.Cause(ctx), p.tail())
		}
	}
}

// tail is the end of what the program printed, for an error.
func (p *Process) tail() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	last := p.lines[max(len(p.lines)-20, 0):]
	if len(last) == 0 {
		return "; it printed nothing"
	}
	return "; it printed:\n\t" + strings.Join(last, "\n\t")
}

// Lines are those that the program has printed so far, the last 1,000 of them.
func (p *Process) Lines() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.lines)
}

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Pid is the program's process id, also after its end.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Stop sends SIGTERM and, when the program is still there after grace, SIGKILL to its whole group.
// It returns, once the program has ended, what Wait said; nil means exit status 0. It may be called
// again, also for a program that ended by itself.
func (p *Process) Stop(grace time.Duration) error {
	p.cmd.Process.Signal(syscall.SIGTERM) // one that has ended already is told nothing
	select {
	case <-p.done:
		return p.err
	case <-time.After(grace):
	}
	if err := syscall.Kill(-p.Pid(), syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("killing %s: %w", p.Name, err)
	}
	<-p.done
	return fmt.Errorf("%s did not end within %v of SIGTERM and was killed%s", p.Name, grace, p.tail())
}
