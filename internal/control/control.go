// Package control is how commands talk to a running process of the same user:
// a Unix socket, 0600, in a home that only its owner can enter.
//
// One connection carries one JSON request and one JSON answer, each at most
// 1 MiB, within ten seconds:
//
//	{"method": "ticket.create", "params": …}
//	{"result": …}  or  {"error": {"code": "…", "message": "…"}}
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
	if len(path) > maxPath {
		return nil, fmt.Errorf("listening on %s: the path has %d bytes and a socket's at most %d; choose a shorter --home", path, len(path), maxPath)
	}
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("listening on %s: %w", path, ErrTaken)
	}
	// The lock is ours for as long as we listen: what lies there is a dead one's.
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != fs.ModeSocket {
			lock.Close()
			return nil, fmt.Errorf("listening on %s: there is a file that is no socket", path)
		}
		if err := os.Remove(path); err != nil {
			lock.Close()
			return nil, fmt.Errorf("replacing the dead socket %s: %w", path, err)
		}
	}
	ln, err := listen(path)
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	return &listener{ln, lock}, nil
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

type listener struct {
	*net.UnixListener
	lock *os.File
}

func (l *listener) Close() error {
	path := l.lock.Name()
	os.Remove(path[:len(path)-len(".lock")])
	err := l.UnixListener.Close()
	l.lock.Close()
	return err
}

// Serve answers requests on ln until ctx ends, and returns when every handler
// has. It owns ln.
func Serve(ctx context.Context, ln net.Listener, h Handler) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	var all sync.WaitGroup
	defer all.Wait()
	slots := make(chan struct{}, atOnce)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			ln.Close()
			return fmt.Errorf("accepting control connections: %w", err)
		}
		all.Go(func() {
			serve(ctx, c, h)
			<-slots
		})
	}
}

func serve(ctx context.Context, c net.Conn, h Handler) {
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
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

// Call asks the process that listens at path. out may be nil.
func Call(ctx context.Context, path, method string, in, out any) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return ErrNobody
	}
	if err != nil {
		return fmt.Errorf("asking %s: %w", path, err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := samePeer(c); err != nil {
		return fmt.Errorf("asking %s: %w", path, err)
	}
	params, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("asking %s: %w", path, err)
	}
	b, err := json.Marshal(request{method, params})
	if err != nil {
		return fmt.Errorf("asking %s: %w", path, err)
	}
	if _, err := c.Write(b); err != nil {
		return fmt.Errorf("asking %s: %w", path, err)
	}
	c.(*net.UnixConn).CloseWrite()
	b, err = io.ReadAll(io.LimitReader(c, maxMessage+1))
	if err != nil {
		return fmt.Errorf("reading the answer of %s: %w", path, err)
	}
	var answer response
	if err := json.Unmarshal(b, &answer); err != nil || len(b) > maxMessage {
		return fmt.Errorf("reading the answer of %s: it is cut short", path)
	}
	if answer.Error != nil {
		return answer.Error
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(answer.Result, out)
}
