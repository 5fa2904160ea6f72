package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"

	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/stream"
	"golang.org/x/sys/unix"
)

// `portal connect` without a command: stdin and stdout are the stream.

// stream opens it and carries its bytes until both directions have ended, or it was
// cut. A read of stdin and a write to stdout cannot be called off: O_NONBLOCK
// would be everybody's who has the same file open. What waits in one at the end
// ends with the process.
func (c *connection) stream(ctx context.Context) error {
	d := c.doors[0]
	st, err := c.dial(ctx, d)
	if err != nil {
		return err
	}
	defer st.Reset(stream.CodeLocal, "") // nothing to one that has ended
	var sent, received atomic.Int64
	up, down := make(chan error, 1), make(chan error, 1) // nil: it has ended
	uploaded, downloaded := up, down
	go func() { uploaded <- upload(st, c.stdin, &sent) }()
	go func() { downloaded <- download(c.stdout, st, &received) }()
	cut := func(err error) error {
		if down == nil {
			return fail(codeFailed, "stdout is whole; whether all of stdin has arrived is not known",
				"outlet %s: reset behind its end: %w", d.name, err)
		}
		return fail(codeFailed, "what went to stdout is the beginning of what the outlet's target sent, no more",
			"outlet %s: cut behind %s: %w", d.name, count(int(received.Load()), "byte"), err)
	}
	over := st.Done()
	for up != nil || down != nil {
		select {
		case err = <-up:
			if err == nil {
				up = nil
			}
		case err = <-down:
			if err != nil {
				break
			}
			down = nil
			if isTerminal(c.stdin) {
				// Nobody types on to whom there is no answer.
				up, err = nil, st.CloseWrite()
			}
		case <-over: // seen here when stdin is silent, or stdout takes nothing
			over = nil
			_, err = st.Read(nil)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		var local *localError
		switch {
		case errors.As(err, &local):
			return fail(codeFailed, "", "outlet %s: %w", d.name, local)
		case err != nil:
			return cut(err)
		}
	}
	select {
	case <-st.Done():
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if _, err := st.Read(nil); err != nil {
		return cut(err)
	}
	if sent.Load() > 0 {
		if err := st.Arrived(ctx); err != nil {
			return fail(codeFailed, "", "outlet %s: it is not known whether all of stdin has arrived: %w", d.name, err)
		}
	}
	return nil
}

// dial opens the stream, which the outlet answers when its target has.
func (c *connection) dial(ctx context.Context, d *door) (*inlet.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	st, err := d.server.Open(ctx)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return nil, fail(codeUnreachable, "see the outlet's log", "outlet %s: no answer within %s: %w", d.name, c.timeout, err)
	}
	return st, err
}

// A localError is stdin's or stdout's own.
type localError struct{ err error }

func (e *localError) Error() string { return e.err.Error() }
func (e *localError) Unwrap() error { return e.err }

// upload sends what r gives, and its end.
func upload(st *inlet.Conn, r io.Reader, n *atomic.Int64) error {
	b := make([]byte, pieces)
	for {
		k, err := r.Read(b)
		n.Add(int64(k))
		if k > 0 {
			if _, err := st.Write(b[:k]); err != nil {
				return err
			}
		}
		switch {
		case err == io.EOF:
			return st.CloseWrite()
		case err != nil:
			return &localError{fmt.Errorf("reading stdin: %w", cause(err))}
		}
	}
}

// download writes what comes to w, and its end.
func download(w io.Writer, st *inlet.Conn, n *atomic.Int64) error {
	b := make([]byte, pieces)
	for {
		k, err := st.Read(b)
		n.Add(int64(k)) // what is on stdout is counted
		if k > 0 {
			if _, err := w.Write(b[:k]); err != nil {
				return &localError{fmt.Errorf("writing to stdout: %w", cause(err))}
			}
		}
		switch {
		case err == io.EOF:
			if err := endOf(w); err != nil {
				return &localError{fmt.Errorf("writing to stdout: %w", cause(err))}
			}
			return nil
		case err != nil:
			return err
		}
	}
}

// pieces is how much is read at once: what a pipe holds.
const pieces = 64 << 10

// endOf ends stdout. Of a socket that is stdin too only the one direction ends.
func endOf(w io.Writer) error {
	f, ok := w.(*os.File)
	if !ok {
		return nil
	}
	if info, err := f.Stat(); err == nil && info.Mode().Type() == os.ModeSocket {
		if err := unix.Shutdown(int(f.Fd()), unix.SHUT_WR); err != nil && err != syscall.ENOTCONN {
			return err
		}
	}
	return f.Close()
}

// cause is an error of a file without the file, which is named already.
func cause(err error) error {
	var path *os.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}
