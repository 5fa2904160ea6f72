// Command mcp shows private MCP servers that are reached by an agent whose credential allows it,
// and refused to a guest: over standard input and output, one process for each client, and over
// Streamable HTTP.
//
//	go run ./examples/mcp
//
// It starts an MCP server over HTTP, builds portal, and runs what a person would type on four
// hosts, each with its own home: a relay that issues the tickets, the servers' host with an outlet
// for each transport, an agent's inlets, a guest's. The client and the servers are those of the
// official SDK. Every line that it prints was checked before. It exits 0 when all of them held, 1
// otherwise, and leaves nothing behind.
//
// To type it by hand, build it (go build -o bin/mcp ./examples/mcp). `bin/mcp http` is the server
// over HTTP and prints what to type. Over standard input and output the outlet starts it:
//
//	portal outlet orders-stdio --allow 'principal.role == "agent"' -- bin/mcp stdio
//	portal inlet orders-stdio --from 18082
//
// and a client whose configuration wants a command is given `socat STDIO TCP:localhost:18082`.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/portal-tunnel/portal/examples/walk"
	"github.com/portal-tunnel/portal/tests/process"
)

func main() {
	if len(os.Args) > 1 {
		if err := serve(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "mcp:", err)
			os.Exit(1)
		}
		return
	}
	walk.Main("mcp", run)
}

// The two ways in which the protocol begins.
const (
	today  = "2026-07-28"
	before = "2025-11-25"
)

func run(ctx context.Context, out io.Writer) error {
	return walk.Run(ctx, out, steps)
}

func steps(ctx context.Context, w *walk.Walk) error {
	x := &example{Walk: w}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	addr, err := x.serve(ctx, self)
	if err != nil {
		return err
	}
	w.Say("MCP server over Streamable HTTP on http://%s/mcp", addr)

	relay, err := w.Relay(ctx)
	if err != nil {
		return err
	}
	w.Say("relay on %s, and the authority in it", relay)

	if err := w.Enroll(ctx, "relay", "mcp1", "--serve", "orders-mcp", "--serve", "orders-stdio"); err != nil {
		return err
	}
	const allow = `principal.role == "agent"`
	_, ready, err := w.Outlet(ctx, "mcp1", "orders-mcp", "--to", addr, "--allow", allow)
	if err != nil {
		return err
	}
	w.Say("outlet orders-mcp ready %s; allow: %s", ready, allow)
	if x.stdio, _, err = w.Outlet(ctx, "mcp1", "orders-stdio", "--allow", allow, "--", self, "stdio", "--lockstep"); err != nil {
		return err
	}
	w.Say("outlet orders-stdio ready; each stream runs mcp stdio; allow: %s", allow)

	if err := x.agent(ctx); err != nil {
		return fmt.Errorf("the agent: %w", err)
	}
	if err := x.guest(ctx); err != nil {
		return fmt.Errorf("the guest: %w", err)
	}
	return nil
}

type example struct {
	*walk.Walk
	http  *process.Process // the server over HTTP
	stdio *process.Process // the outlet whose stderr is that of the servers over stdio
	begun int              // of those
}

// serve starts the server over HTTP.
func (x *example) serve(ctx context.Context, self string) (addr string, err error) {
	cmd := exec.Command(self, "http", "--listen", "127.0.0.1:0", "--lockstep")
	cmd.Env = process.Environ()
	if x.http, err = process.Start("mcp http", cmd); err != nil {
		return "", err
	}
	x.Later(func() error { return x.http.Stop(10 * time.Second) })
	return walk.Line(ctx, x.http, `serves http://(\S+)/mcp$`)
}

func (x *example) agent(ctx context.Context) error {
	if err := x.Enroll(ctx, "relay", "agent", "--attr", "role=agent"); err != nil {
		return err
	}
	stdio, how, err := x.Inlet(ctx, "agent", "ready", "orders-stdio")
	if err != nil {
		return err
	}
	x.Say("agent's inlet of orders-stdio on %s, ready %s", stdio, how)
	if err := x.overStdio(ctx, stdio); err != nil {
		return fmt.Errorf("over stdio: %w", err)
	}
	at, how, err := x.Inlet(ctx, "agent", "ready", "orders-mcp", "--kind", "http")
	if err != nil {
		return err
	}
	x.Say("agent's inlet of orders-mcp on %s, ready %s", at, how)
	for _, c := range []struct{ version, path string }{{today, "/mcp"}, {before, "/mcp"}, {before, "/sessions/mcp"}} {
		if err := x.overHTTP(ctx, c.version, "http://"+at+c.path); err != nil {
			return fmt.Errorf("%s over HTTP, %s: %w", c.version, c.path, err)
		}
	}
	return x.pagesAreRefused(ctx, at)
}

// overStdio has two clients at the same time, one of each way to begin.
func (x *example) overStdio(ctx context.Context, addr string) error {
	var pipes [2]*pipe
	var clients [2]*client
	for i, version := range []string{today, before} {
		p, err := dial(ctx, addr)
		if err != nil {
			return err
		}
		defer p.close()
		c, err := connect(ctx, p.transport(), version)
		if err != nil {
			return err
		}
		defer c.Close()
		x.begun++
		pipes[i], clients[i] = p, c
		x.Say("agent, stdio, %s: connects, lists lookup and report, looks up order 2 (%s); process %d answers", version, orders[1].Customer, c.process)
	}
	first, second := clients[0], clients[1]
	if first.process == second.process {
		return fmt.Errorf("both are served by process %d", first.process)
	}
	if f, err := first.lookup(ctx, 1); err != nil || f.Process != first.process {
		return fmt.Errorf("process %d answers the client of %d: %v", f.Process, first.process, err)
	}
	x.Say("agent, stdio: two clients at once, served by processes %d and %d", first.process, second.process)

	for i, c := range clients {
		if err := x.report(ctx, "stdio", c); err != nil {
			return err
		}
		if err := x.abandon(ctx, "stdio", c, x.stdio, 2); err != nil {
			return err
		}
		if err := c.Close(); err != nil {
			return err
		}
		if err := pipes[i].exited(ctx); err != nil {
			return err
		}
		if err := syscall.Kill(c.process, 0); !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("process %d is there: %v", c.process, err)
		}
		x.Say("agent, stdio: the session is closed: process %d has exited with status 0", c.process)
	}
	return nil
}

// report takes a report in lockstep.
func (x *example) report(ctx context.Context, over string, c *client) error {
	notes, t, err := c.inLockstep(ctx)
	if err != nil {
		return fmt.Errorf("a report, behind %d notes: %w", notes, err)
	}
	sum := 0
	for _, o := range orders {
		sum += o.Cents
	}
	if want := (total{len(orders), sum}); t != want {
		return fmt.Errorf("the report is %v, want %v", t, want)
	}
	x.Say("agent, %s: report sends %d notes, each only when the one before had arrived, and then the result: %d cents", over, notes, t.Cents)
	return nil
}

// abandon gives a report up behind so many notes, of which server prints the end.
func (x *example) abandon(ctx context.Context, over string, c *client, server *process.Process, notes int) error {
	if err := c.abandoned(ctx, notes); err != nil {
		return fmt.Errorf("a report that is given up: %w", err)
	}
	why, err := walk.Line(ctx, server, fmt.Sprintf(`process %d: a report ended behind %d notes: (.*)`, c.process, notes))
	if err != nil {
		return err
	}
	x.Say("agent, %s: a report is given up behind note %d: the tool ends there (%s)", over, notes, why)
	return nil
}

func (x *example) overHTTP(ctx context.Context, version, url string) error {
	t := &http.Transport{}
	defer t.CloseIdleConnections() // an inlet that is stopped waits for its streams
	c, err := connect(ctx, &mcp.StreamableClientTransport{Endpoint: url, HTTPClient: &http.Client{Transport: t}}, version)
	if err != nil {
		return err
	}
	defer c.Close()
	if c.process != x.http.Pid() {
		return fmt.Errorf("process %d answers", c.process)
	}
	over := "HTTP, " + version
	session := ""
	if c.ID() != "" {
		session = " in a session"
	}
	x.Say("agent, %s: connects%s, lists lookup and report, looks up order 2 (%s)", over, session, orders[1].Customer)
	if err := x.report(ctx, over, c); err != nil {
		return err
	}
	// Since 2026-07-28 the closed answer says so, in a session a note does. An older client without
	// a session has no way to.
	notes := map[string]int{today: 2, before: 3}[version] // which tells the lines apart
	if version == today || session != "" {
		if err := x.abandon(ctx, over, c, x.http, notes); err != nil {
			return err
		}
	}
	if err := c.Close(); err != nil {
		return err
	}
	if session == "" {
		return nil
	}
	if _, err := walk.Line(ctx, x.http, `(a client ended its session)`); err != nil {
		return err
	}
	x.Say("agent, %s: the session is closed, and the server told", over)
	return nil
}

// post asks for the tools without the SDK.
func post(ctx context.Context, url string, change func(*http.Request)) (status int, body string, err error) {
	const list = `{"jsonrpc":"2.0","id":1,"method":"tools/list"}`
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(list))
	if err != nil {
		return 0, "", err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "application/json, text/event-stream")
	change(r)
	t := &http.Transport{DisableKeepAlives: true}
	a, err := t.RoundTrip(r)
	if err != nil {
		return 0, "", err
	}
	defer a.Body.Close()
	b, err := io.ReadAll(a.Body)
	return a.StatusCode, strings.TrimSpace(string(b)), err
}

// pagesAreRefused shows that a web page of another site cannot speak through the inlet.
func (x *example) pagesAreRefused(ctx context.Context, addr string) error {
	for _, c := range []struct {
		what   string
		change func(*http.Request)
		status int
	}{
		{"as it is", func(*http.Request) {}, http.StatusOK},
		{"Host: evil.example", func(r *http.Request) { r.Host = "evil.example" }, http.StatusForbidden},
		{"Origin: http://evil.example", func(r *http.Request) { r.Header.Set("Origin", "http://evil.example") }, http.StatusForbidden},
	} {
		status, body, err := post(ctx, "http://"+addr+"/mcp", c.change)
		if err != nil {
			return err
		}
		if status != c.status || status == http.StatusForbidden && !strings.Contains(body, "PORTAL-E0309") {
			return fmt.Errorf("%s: %d %s", c.what, status, body)
		}
		if status != http.StatusOK {
			x.Say("agent, HTTP: with %s the inlet refuses: %d %s", c.what, status, body)
		}
	}
	return nil
}

func (x *example) guest(ctx context.Context) error {
	if err := x.Enroll(ctx, "relay", "guest", "--attr", "role=guest"); err != nil {
		return err
	}
	stdio, why, err := x.Inlet(ctx, "guest", "refused:", "orders-stdio")
	if err != nil {
		return err
	}
	x.Say("guest's inlet of orders-stdio on %s, refused: %s", stdio, why)
	if err := x.reset(ctx, stdio); err != nil {
		return fmt.Errorf("over stdio: %w", err)
	}

	// --kind http: the inlet answers a refused client in HTTP.
	at, why, err := x.Inlet(ctx, "guest", "refused:", "orders-mcp", "--kind", "http")
	if err != nil {
		return err
	}
	x.Say("guest's inlet of orders-mcp on %s, refused: %s", at, why)
	url := "http://" + at + "/mcp"
	t := &http.Transport{}
	defer t.CloseIdleConnections()
	c, err := connect(ctx, &mcp.StreamableClientTransport{Endpoint: url, HTTPClient: &http.Client{Transport: t}}, today)
	switch {
	case err == nil:
		c.Close()
		return errors.New("it was let in over HTTP")
	case !strings.Contains(err.Error(), http.StatusText(http.StatusForbidden)):
		return fmt.Errorf("over HTTP it was told %w", err)
	}
	x.Say("guest, HTTP: the SDK's error is %q", err)
	status, body, err := post(ctx, url, func(*http.Request) {})
	if err != nil {
		return err
	}
	var told struct {
		Error struct{ Code, Message string }
	}
	if err := json.Unmarshal([]byte(body), &told); err != nil || status != http.StatusForbidden || told.Error.Code != "PORTAL-E0301" {
		return fmt.Errorf("over HTTP it was told %d %s: %v", status, body, err)
	}
	x.Say("guest, HTTP: the answer is %d %s", status, body)

	for _, line := range x.stdio.Lines() {
		if strings.Contains(line, ": "+begins) {
			x.begun--
		}
	}
	if x.begun != 0 {
		return fmt.Errorf("%d more processes began than the agent had clients", -x.begun)
	}
	x.Say("guest: no process was started for it")
	return nil
}

// reset shows a refusal where nothing can be told. It may come as early as the answer to dial.
func (x *example) reset(ctx context.Context, addr string) error {
	silent := func() error {
		p, err := dial(ctx, addr)
		if err != nil {
			return err
		}
		defer p.close()
		return p.exited(ctx)
	}
	if err := silent(); !errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("it read %v, not a reset", err)
	}
	p, err := dial(ctx, addr)
	if err == nil {
		defer p.close()
		var c *client
		if c, err = connect(ctx, p.transport(), today); err == nil {
			c.Close()
			return errors.New("it was let in")
		}
	}
	x.Say("guest, stdio: its connection is reset; the SDK's error is %q", err)
	return nil
}
