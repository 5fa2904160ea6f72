// Package control is how commands talk to a running process of the same user:
// a Unix socket, 0600, in a home that only its owner can enter. One path is one
// process's (Listen); or each process has its own in a directory (ListenAmong).
//
// One connection carries one JSON request, ended by closing that direction,
// and one JSON answer, each at most 1 MiB, within ten seconds:
//
//	{"method": "ticket.create", "params": …}
//	{"result": …}  or  {"error": {"code": "…", "message": "…"}}
//
// The codes of this package are "refused" (another user's process),
// "malformed" (the request) and "failed" (an error without a code of its own).
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

const (
	maxMessage = 1 << 20
	callTime   = 10 * time.Second
	// atOnce bounds the connections being served: commands of one user.
	atOnce = 32
	// maxPath is what a socket's address holds on Linux, its final zero aside.
	maxPath = 107
	// acceptPause is how long descriptors that ran out are waited for at a time.
	acceptPause = 100 * time.Millisecond
)

// ErrNobody is returned by Call when no process listens.
var ErrNobody = errors.New("no process listens")

// ErrTaken is returned by Serve when another process listens already.
var ErrTaken = errors.New("another process listens already")

// Error is what a handler's error is at the caller.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// Handler answers one request. An *Error keeps its code on the way.
type Handler func(ctx context.Context, method string, params json.RawMessage) (any, error)

type request struct {
	Method string          `json:"method"`
	Params json.RawMessage `json:"params,omitempty"`
}

type response struct {
	Result json.RawMessage `json:"result,omitempty"`
	Error  *Error          `json:"error,omitempty"`
}

// Listen takes the socket at path. A socket file that nobody answers on is
// replaced; the lock beside it decides between two that start at once.
func Listen(path string) (net.Listener, error) {
	if err := fits(path); err != nil {
		return nil, fmt.Errorf("listening: %w", err)
	}
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	ln, err := take(path, lock)
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	return &listener{UnixListener: ln, path: path, lock: lock}, nil
}

// take makes the lock ours for as long as we listen. What lies at path then is
// a dead process's, unless somebody has removed the lock's file meanwhile.
func take(path string, lock *os.File) (*net.UnixListener, error) {
	err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, ErrTaken
	}
	if err != nil {
		return nil, fmt.Errorf("locking %s: %w", lock.Name(), err)
	}
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return listen(path)
	case err != nil:
		return nil, err
	case info.Mode().Type() != fs.ModeSocket:
		return nil, errors.New("there is a file that is no socket")
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
		return nil, ErrTaken
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("whether another process listens is not known: %w", err)
	}
	return listen(path) // in place of the dead one
}

// listen makes the socket with mode 0600 from its first moment: it is bound in
// a directory of its own and moved into place.
func listen(path string) (*net.UnixListener, error) {
	dir, err := os.MkdirTemp(filepath.Dir(path), ".s")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	at := filepath.Join(dir, "s")
	if len(at) > maxPath {
		return nil, fmt.Errorf("a socket's path has at most %d bytes; choose a shorter --home", maxPath)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: at, Net: "unix"})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false)
	if err = os.Chmod(at, 0o600); err == nil {
		err = os.Rename(at, path)
	}
	if err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}

// listener owns the socket and the lock. The lock's file stays: a later process
// would lock another one than a process that has it open.
type listener struct {
	*net.UnixListener
	path string
	lock *os.File // nil: one among others
	once sync.Once
	err  error
}

func (l *listener) Close() error {
	l.once.Do(func() {
		os.Remove(l.path)
		l.err = l.UnixListener.Close()
		if l.lock != nil {
			l.lock.Close()
		}
	})
	return l.err
}

// Serve answers requests on ln until ctx ends, and returns when every handler
// has, at most ten seconds later for those that heed their context. It owns ln.
func Serve(ctx context.Context, ln net.Listener, h Handler) error {
	var all sync.WaitGroup
	defer all.Wait()
	defer ln.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	all.Go(func() {
		<-ctx.Done()
		ln.Close()
	})
	slots := make(chan struct{}, atOnce)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		c, err := ln.Accept()
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ECONNABORTED):
			<-slots
			select { // until descriptors are free again
			case <-time.After(acceptPause):
			case <-ctx.Done():
			}
			continue
		default:
			return fmt.Errorf("accepting control connections: %w", err)
		}
		all.Go(func() {
			serve(ctx, c, h, callTime)
			<-slots
		})
	}
}

// bound lets the reads and writes of c end with ctx. release waits for what it
// started.
func bound(ctx context.Context, c net.Conn) (release func()) {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		c.SetDeadline(time.Unix(1, 0))
	})
	return func() {
		if !stop() {
			<-done
		}
	}
}

func serve(ctx context.Context, c net.Conn, h Handler, limit time.Duration) {
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	defer bound(ctx, c)()
	var answer response
	if err := samePeer(c); err != nil {
		answer.Error = &Error{"refused", err.Error()}
	} else if r, err := readRequest(c); err != nil {
		answer.Error = &Error{"malformed", err.Error()}
	} else {
		result, err := h(ctx, r.Method, r.Params)
		if err == nil {
			answer.Result, err = json.Marshal(result)
		}
		var coded *Error
		switch {
		case errors.As(err, &coded):
			answer.Error = coded
		case err != nil:
			answer.Error = &Error{"failed", err.Error()}
		}
	}
	b, err := json.Marshal(answer)
	if err != nil || len(b) > maxMessage {
		b = []byte(`{"error":{"code":"failed","message":"the answer is too long"}}`)
	}
	c.Write(b)
}

func readRequest(r io.Reader) (*request, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxMessage+1))
	if err != nil {
		return nil, fmt.Errorf("reading the request: %w", err)
	}
	if len(b) > maxMessage {
		return nil, errors.New("the request is too long")
	}
	q := new(request)
	if err := json.Unmarshal(b, q); err != nil {
		return nil, fmt.Errorf("reading the request: %w", err)
	}
	if q.Method == "" {
		return nil, errors.New("the request names no method")
	}
	return q, nil
}

// Call asks the process that listens at path and decodes its answer to out,
// which may be nil. It returns ErrNobody when no process listens, the handler's
// error as an *Error, and the error of ctx when that ends first; ten seconds
// are the limit without one.
func Call(ctx context.Context, path, method string, in, out any) error {
	b, err := encodeRequest(method, in)
	if err != nil {
		return fmt.Errorf("asking %s for %s: %w", path, method, err)
	}
	if err := fits(path); err != nil {
		return fmt.Errorf("asking for %s: %w", method, err)
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return ErrNobody
	}
	if err != nil {
		return fmt.Errorf("asking %s: %w", path, err)
	}
	defer c.Close()
	defer bound(ctx, c)()
	if err := samePeer(c); err != nil {
		return fmt.Errorf("asking %s: %w", path, err)
	}
	b, err = exchange(c.(*net.UnixConn), b)
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("asking %s for %s: %w", path, method, err)
	}
	var answer response
	if len(b) > maxMessage || json.Unmarshal(b, &answer) != nil {
		return fmt.Errorf("asking %s for %s: the answer is not whole: the process may have ended", path, method)
	}
	if answer.Error != nil {
		return answer.Error
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(answer.Result, out); err != nil {
		return fmt.Errorf("reading the answer to %s: %w", method, err)
	}
	return nil
}

func encodeRequest(method string, in any) ([]byte, error) {
	params, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(request{method, params})
	if err == nil && len(b) > maxMessage {
		err = fmt.Errorf("the request has %d bytes; at most %d are taken", len(b), maxMessage)
	}
	return b, err
}

// exchange writes the request and reads the answer. A server may answer and
// close without reading all of the request, as one that refuses does: then the
// answer says more than the failed write.
func exchange(c *net.UnixConn, request []byte) ([]byte, error) {
	_, failed := c.Write(request)
	if failed == nil {
		failed = c.CloseWrite()
	}
	answer, err := io.ReadAll(io.LimitReader(c, maxMessage+1))
	if len(answer) > 0 && (err == nil || errors.Is(err, syscall.ECONNRESET)) {
		return answer, nil
	}
	if failed != nil {
		return nil, failed
	}
	return answer, err
}
