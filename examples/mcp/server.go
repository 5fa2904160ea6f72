package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// An order is a row of the table that the tools read.
type order struct {
	ID       int    `json:"id"`
	Customer string `json:"customer"`
	Cents    int    `json:"cents"`
}

var orders = []order{{1, "ada", 1250}, {2, "grace", 980}, {3, "edsger", 4400}, {4, "barbara", 720}, {5, "tony", 3150}}

// server is an MCP server over the orders.
type server struct {
	// pace waits behind each note of a report.
	pace func(context.Context) error
	// say prints what happened, as a line of this process.
	say func(format string, args ...any)
}

type (
	which struct {
		ID int `json:"id" jsonschema:"the order's number"`
	}
	found struct {
		order
		Process int `json:"process" jsonschema:"the process that answers"`
	}
	total struct {
		Orders int `json:"orders"`
		Cents  int `json:"cents"`
	}
)

func (s *server) mcp() *mcp.Server {
	m := mcp.NewServer(&mcp.Implementation{Name: "orders", Version: "v1.0.0"}, nil)
	mcp.AddTool(m, &mcp.Tool{Name: "lookup", Description: "One order."}, s.lookup)
	mcp.AddTool(m, &mcp.Tool{Name: "report", Description: "All orders added up, with a note for each."}, s.report)
	return m
}

func (s *server) lookup(_ context.Context, _ *mcp.CallToolRequest, w which) (*mcp.CallToolResult, found, error) {
	for _, o := range orders {
		if o.ID == w.ID {
			return nil, found{o, os.Getpid()}, nil
		}
	}
	return nil, found{}, fmt.Errorf("there is no order %d", w.ID)
}

func (s *server) report(ctx context.Context, r *mcp.CallToolRequest, _ struct{}) (_ *mcp.CallToolResult, t total, err error) {
	defer func() {
		if err != nil {
			s.say("a report ended behind %d notes: %v", t.Orders, err)
		}
	}()
	token := r.Params.GetProgressToken()
	for _, o := range orders {
		t.Orders++
		t.Cents += o.Cents
		if token == nil {
			continue // a client that did not ask gets none
		}
		note := &mcp.ProgressNotificationParams{
			ProgressToken: token, Progress: float64(t.Orders), Total: float64(len(orders)), Message: o.Customer,
		}
		if err := r.Session.NotifyProgress(ctx, note); err != nil {
			return nil, t, err
		}
		if err := s.pace(ctx); err != nil {
			return nil, t, err
		}
	}
	return nil, t, nil
}

// serve is this program as a server: over standard input and output, or over HTTP.
func serve(args []string) error {
	flags := flag.NewFlagSet("mcp "+args[0], flag.ExitOnError)
	listen := flags.String("listen", "127.0.0.1:8081", "the server's `address`, of http")
	lockstep := flags.Bool("lockstep", false, "a report waits for SIGUSR1 behind each note, as the example sends it")
	flags.Parse(args[1:])

	s := &server{say: say, pace: slowly}
	if *lockstep {
		confirmed := make(chan os.Signal, 1) // nobody sends another before the next note
		signal.Notify(confirmed, syscall.SIGUSR1)
		s.pace = func(ctx context.Context) error {
			select {
			case <-confirmed:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	switch args[0] {
	case "stdio":
		return s.stdio()
	case "http":
		return s.http(*listen)
	}
	return fmt.Errorf("there is no %q; stdio, http, or nothing for the whole example", args[0])
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "orders: process %d: %s\n", os.Getpid(), fmt.Sprintf(format, args...))
}

// slowly lets a person see the notes come one by one.
func slowly(ctx context.Context) error {
	select {
	case <-time.After(300 * time.Millisecond):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// begins is what a server over standard input and output says first.
const begins = "serves one client"

// stdio serves one client, and ends when that does: with the end of standard input.
func (s *server) stdio() error {
	s.say(begins)
	err := s.mcp().Run(context.Background(), &mcp.StdioTransport{})
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	s.say("its client is gone")
	return nil
}

const (
	// sessionTime is how long a session of an older client is kept that neither asks nor ends it.
	sessionTime = 10 * time.Minute
	// headTime is how long a client may take to say what it wants.
	headTime = 10 * time.Second
)

// handler serves Streamable HTTP: /mcp without sessions, which clients of every version speak, and
// /sessions/mcp as servers of 2025-11-25 and before are, with a session that its client ends.
//
// The SDK refuses requests whose Host is not a loopback one when they come over loopback, which
// keeps a page in somebody's browser out that had its own name point here. Portal passes bytes as
// they are, so that check sees the inlet's localhost:PORT, and goes on working behind it. An inlet
// that listens elsewhere needs a server with DisableLocalhostProtection, and a proxy that checks
// in its place. Pages that say where they come from are refused by net/http.
func (s *server) handler() http.Handler {
	m := s.mcp()
	get := func(*http.Request) *mcp.Server { return m }
	mux := http.NewServeMux()
	mux.Handle("/mcp", mcp.NewStreamableHTTPHandler(get, &mcp.StreamableHTTPOptions{
		Stateless: true, PropagateRequestCancellation: true, // the closed answer is how a client of 2026-07-28 cancels
	}))
	sessions := mcp.NewStreamableHTTPHandler(get, &mcp.StreamableHTTPOptions{SessionTimeout: sessionTime})
	mux.Handle("/sessions/mcp", sessions)
	mux.HandleFunc("DELETE /sessions/mcp", func(w http.ResponseWriter, r *http.Request) {
		sessions.ServeHTTP(w, r)
		s.say("a client ended its session")
	})
	return http.NewCrossOriginProtection().Handler(mux)
}

// http serves until SIGINT or SIGTERM.
func (s *server) http(listen string) error {
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	s.say("serves http://%s/mcp", ln.Addr())
	fmt.Fprintf(os.Stderr, `Here:           portal outlet orders-mcp --to %s --allow 'principal.role == "agent"'
At the agent's: portal inlet orders-mcp --from 18081 --kind http
For a client:   http://localhost:18081/mcp
`, port)
	h := &http.Server{Handler: s.handler(), ReadHeaderTimeout: headTime}
	stopping := context.AfterFunc(ctx, func() { h.Close() })
	defer stopping()
	if err := h.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
