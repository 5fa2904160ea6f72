package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/portal-tunnel/portal/examples/walk"
)

// pipe is a connection to a server that speaks over standard input and output behind an outlet.
type pipe struct {
	conn  *net.TCPConn
	out   *io.PipeReader
	ended chan struct{}
	err   error // how the server's output ended, nil in good order; behind ended
}

func dial(ctx context.Context, addr string) (*pipe, error) {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	r, w := io.Pipe()
	p := &pipe{conn: c.(*net.TCPConn), out: r, ended: make(chan struct{})}
	go p.read(w)
	return p, nil
}

// read passes the server's output on, and reads it to its end also when the SDK has what it wants:
// an answer to what was given up may still come.
func (p *pipe) read(w *io.PipeWriter) {
	defer close(p.ended)
	_, p.err = io.Copy(w, p.conn)
	if errors.Is(p.err, io.ErrClosedPipe) {
		_, p.err = io.Copy(io.Discard, p.conn)
	}
	w.CloseWithError(p.err)
}

func (p *pipe) transport() mcp.Transport {
	return &mcp.IOTransport{Reader: p.out, Writer: input{p.conn}}
}

// input is the server's standard input. Its Close ends that, and nothing else.
type input struct{ *net.TCPConn }

func (i input) Close() error { return i.CloseWrite() }

// close resets what is left, and waits for the reader.
func (p *pipe) close() {
	p.conn.Close()
	<-p.ended
}

// exited waits for the server's end, once its input has: portal passes on an end of file only when the
// process has exited with status 0, and a reset otherwise.
func (p *pipe) exited(ctx context.Context) error {
	ctx, cancel := walk.Patience(ctx, "the server's process did not end")
	defer cancel()
	select {
	case <-p.ended:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if p.err != nil {
		return fmt.Errorf("the server's output ended with %w", p.err)
	}
	return nil
}

// A client is one session with the server.
type client struct {
	*mcp.ClientSession
	process int // that answers
	notes   chan string
}

// connect begins a session in a version of the protocol: since 2026-07-28 by asking what there is
// (server/discover), before by initialize. It finds the two tools, and the process that serves it.
func connect(ctx context.Context, t mcp.Transport, version string) (_ *client, err error) {
	c := &client{notes: make(chan string, len(orders))}
	options := &mcp.ClientOptions{ProgressNotificationHandler: func(_ context.Context, r *mcp.ProgressNotificationClientRequest) {
		c.notes <- r.Params.Message
	}}
	c.ClientSession, err = mcp.NewClient(&mcp.Implementation{Name: "agent", Version: "v1.0.0"}, options).
		Connect(ctx, t, &mcp.ClientSessionOptions{ProtocolVersion: version})
	if err != nil {
		return nil, err
	}
	if err := c.meet(ctx, version); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *client) meet(ctx context.Context, version string) error {
	if got := c.InitializeResult(); got.ProtocolVersion != version || got.ServerInfo.Name != "orders" {
		return fmt.Errorf("%s speaks %s, want orders and %s", got.ServerInfo.Name, got.ProtocolVersion, version)
	}
	list, err := c.ListTools(ctx, nil)
	if err != nil {
		return err
	}
	if len(list.Tools) != 2 || list.Tools[0].Name != "lookup" || list.Tools[1].Name != "report" {
		return fmt.Errorf("the tools are %v", list.Tools)
	}
	found, err := c.lookup(ctx, 2)
	if err != nil {
		return err
	}
	if found.order != orders[1] {
		return fmt.Errorf("order 2 is %v", found.order)
	}
	c.process = found.Process
	return nil
}

// call calls a tool and reads its result into v.
func (c *client) call(ctx context.Context, params *mcp.CallToolParams, v any) error {
	r, err := c.CallTool(ctx, params)
	if err != nil {
		return err
	}
	b, err := json.Marshal(r.StructuredContent)
	if err != nil {
		return err
	}
	if r.IsError {
		return fmt.Errorf("%s: %w", params.Name, r.GetError())
	}
	return json.Unmarshal(b, v)
}

func (c *client) lookup(ctx context.Context, id int) (f found, err error) {
	err = c.call(ctx, &mcp.CallToolParams{Name: "lookup", Arguments: which{id}}, &f)
	return f, err
}

// report calls the tool that tells how far it is.
func (c *client) report(ctx context.Context) (t total, err error) {
	params := &mcp.CallToolParams{Name: "report"}
	params.SetProgressToken("report")
	err = c.call(ctx, params, &t)
	return t, err
}

// note waits for the next one.
func (c *client) note(ctx context.Context) (string, error) {
	ctx, cancel := walk.Patience(ctx, "a note was sent and did not arrive")
	defer cancel()
	select {
	case n := <-c.notes:
		return n, nil
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// confirm tells the server, behind portal's back, that its note is here. It sends nothing before.
func (c *client) confirm() error { return syscall.Kill(c.process, syscall.SIGUSR1) }

// inLockstep takes a report whose every note is confirmed: had anything on the way held one until
// there was more, no more would have come.
func (c *client) inLockstep(ctx context.Context) (notes int, t total, err error) {
	type result struct {
		total
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan result, 1)
	go func() {
		t, err := c.report(ctx)
		done <- result{t, err}
	}()
	for ; notes < len(orders); notes++ {
		n, err := c.note(ctx)
		if err == nil && n != orders[notes].Customer {
			err = fmt.Errorf("note %d is %q", notes+1, n)
		}
		select {
		case r := <-done:
			return notes, r.total, fmt.Errorf("the result came before note %d was confirmed: %v", notes+1, r.err)
		default:
		}
		if err == nil {
			err = c.confirm()
		}
		if err != nil {
			cancel()
			<-done
			return notes, t, err
		}
	}
	r := <-done
	return notes, r.total, r.err
}

// abandoned gives a report up behind so many notes, of which the last is not confirmed.
func (c *client) abandoned(ctx context.Context, notes int) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := c.report(ctx)
		done <- err
	}()
	_, err := c.note(ctx)
	for i := 1; i < notes && err == nil; i++ {
		if err = c.confirm(); err == nil {
			_, err = c.note(ctx)
		}
	}
	cancel()
	if given := <-done; err == nil && !errors.Is(given, context.Canceled) {
		err = fmt.Errorf("a report that was given up said %v", given)
	}
	return err
}
