package main

import (
	"context"
	"errors"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/portal-tunnel/portal/identity"
)

// The life of a long-running command:
//
//	SIGTERM, SIGINT   nothing new, streams may end within the grace time, then they are reset
//	a second one      they are reset at once
//	SIGHUP            with a controlling terminal as SIGTERM; else policies are read again
//	SIGPIPE           nothing: its streams outlive whoever reads its lines
//
// SIGINT and SIGHUP do nothing in a process that was started with them ignored,
// as by nohup.
//
// Drained after SIGTERM it exits 0, after SIGINT 130; when the grace time ended
// first, 5.

// A job is what a long-running command does.
type job struct {
	role, name string
	// run works until ctx ends, then stops what it started in order and waits for it.
	run func(ctx context.Context) error
	// streams counts what a drain would wait for.
	streams func() int
	// drain says "going away", takes nothing new, waits for the streams until
	// ctx ends, resets the rest and returns how many those were.
	drain func(ctx context.Context) int
	// reload reads policies and the home again; on error what was in force stays.
	reload func() error
	grace  time.Duration

	// What `portal status` sees of it, and on which home; nil: --ephemeral.
	home    *identity.Home
	entries []entry
}

// head begins a line about the job. It may be named like the state that scripts
// wait for.
func (j job) head() string { return unready(strings.TrimSpace(j.role + " " + j.name)) }

// supervise runs a job until it fails, ctx ends, or a signal ends it.
func (s *session) supervise(ctx context.Context, j job) error {
	signals := make(chan os.Signal, 4)
	hear(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)
	surviveReaders()
	defer s.visible(j.home, j.entries...)()
	// Asked now: when the terminal hangs up it is not there to be found.
	return s.govern(ctx, j, signals, controllingTerminal())
}

// surviveReaders has a write to a pipe that nobody reads be an error like another; unasked for, it
// ends the process. Not ignored, which commands would inherit; to the end of the process, since the
// last lines are written behind whoever asks.
func surviveReaders() { signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) }

// hear is signal.Notify without the signals that whoever started this process
// has it ignore: Notify would undo that.
func hear(signals chan<- os.Signal, which ...os.Signal) {
	for _, sig := range which {
		if !signal.Ignored(sig) {
			signal.Notify(signals, sig)
		}
	}
}

// govern is supervise for these signals; hangup says that SIGHUP ends the job.
func (s *session) govern(ctx context.Context, j job, signals <-chan os.Signal, hangup bool) error {
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- j.run(work) }()

	var why os.Signal
	for why == nil {
		select {
		case err := <-ended:
			return err
		case <-ctx.Done():
			why = syscall.SIGTERM
		case sig := <-signals:
			if sig == syscall.SIGHUP && !hangup {
				s.reload(j)
				continue
			}
			why = sig
		}
	}

	s.notify("STOPPING=1")
	for _, e := range j.entries {
		e.t.draining()
	}
	patience, hurry := context.WithTimeout(work, j.grace)
	defer hurry()
	if n := j.streams(); n > 0 {
		s.tell(event{Event: "draining", Role: j.role, Name: j.name, Streams: n},
			"draining %s for %s; again to end now", count(n, "stream"), spaced(j.grace))
	}
	left := make(chan int, 1)
	go func() { left <- j.drain(patience) }()
	reset := -1
	for reset < 0 {
		select {
		case reset = <-left:
		case again := <-signals:
			if again == syscall.SIGHUP && !hangup {
				continue
			}
			if again == syscall.SIGINT {
				why = again
			}
			hurry()
		}
	}
	timedOut := errors.Is(patience.Err(), context.DeadlineExceeded)
	stop()
	err := <-ended
	switch {
	case reset > 0:
		s.tell(event{Event: "ended", Role: j.role, Name: j.name, Streams: reset, Reason: "drain timed out"},
			"%s ended: %s reset (%s)", j.head(), count(reset, "stream"), codeDrainTimeout)
	default:
		s.tell(event{Event: "ended", Role: j.role, Name: j.name, Reason: why.String()}, "%s ended: %s", j.head(), why)
	}
	switch {
	case err != nil && !errors.Is(err, context.Canceled):
		return err
	case reset > 0 && (timedOut || why != syscall.SIGINT):
		return exitStatus(exitDrain)
	case why == syscall.SIGINT:
		return exitStatus(exitInterrupted)
	}
	return nil
}

func (s *session) reload(j job) {
	if j.reload == nil {
		s.say("%s: nothing to read again", j.head())
		return
	}
	if err := j.reload(); err != nil {
		s.report(err)
		s.say("%s: what was in force stays in force", j.head())
		return
	}
	s.say("%s: policy and home read again", j.head())
}

// spaced is a duration as a sentence has it: "25 s".
func spaced(d time.Duration) string {
	text := seconds(d)
	if d < time.Minute {
		return strings.TrimSuffix(text, "s") + " s"
	}
	return text
}

func controllingTerminal() bool {
	f, err := os.OpenFile("/dev/tty", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return false
	}
	f.Close()
	return true
}

// interruptible ends ctx on SIGINT and SIGTERM, for a command that ends by
// itself; after turns its error into the exit status of an interruption.
func interruptible(ctx context.Context) (_ context.Context, after func(error) error) {
	ctx, cancel := context.WithCancelCause(ctx)
	signals := make(chan os.Signal, 1)
	hear(signals, syscall.SIGINT, syscall.SIGTERM)
	done := make(chan struct{})
	stop := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case sig := <-signals:
			cancel(interrupted{sig})
		case <-stop:
		}
	}()
	return ctx, func(err error) error {
		signal.Stop(signals)
		close(stop)
		<-done
		var by interrupted
		ours := errors.As(context.Cause(ctx), &by)
		cancel(nil)
		switch {
		case err == nil || !ours:
			return err
		case by.Signal == syscall.SIGINT:
			return exitStatus(exitInterrupted)
		}
		return exitStatus(exitFailed)
	}
}

type interrupted struct{ os.Signal }

func (i interrupted) Error() string { return i.String() }

// notify tells the service manager, when there is one, what changed
// (sd_notify(3)).
func (s *session) notify(state string) {
	path := s.env.get("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	if path[0] == '@' { // Linux's abstract namespace
		path = "\x00" + path[1:]
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		s.log.Warn("telling the service manager", "error", err)
		return
	}
	defer c.Close()
	c.SetWriteDeadline(time.Now().Add(time.Second))
	if _, err := c.Write([]byte(state)); err != nil {
		s.log.Warn("telling the service manager", "error", err)
	}
}
