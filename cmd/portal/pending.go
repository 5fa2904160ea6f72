package main

import (
	"context"
	"errors"
	"time"
)

var errPending = errors.New("not wired")

type demoOptions struct{ keep bool }
type authorityOptions struct {
	home              string
	listen, advertise []string
	ttl, grace        time.Duration
}
type ticketOptions struct {
	home, name, out        string
	attr, serve, advertise []string
	relay                  bool
	ttl                    time.Duration
	uses                   int
}
type enrollOptions struct {
	home, file string
	direct     []string
	timeout    time.Duration
}
type pingOptions struct {
	member  memberOptions
	way     wayOptions
	name    string
	target  bool
	timeout time.Duration
}

func runDemo(context.Context, *session, demoOptions) error           { return errPending }
func runAuthority(context.Context, *session, authorityOptions) error { return errPending }
func createTicket(context.Context, *session, ticketOptions) error    { return errPending }
func listTickets(context.Context, *session, string) error            { return errPending }
func revokeTicket(context.Context, *session, string, string) error   { return errPending }
func runEnroll(context.Context, *session, enrollOptions) error       { return errPending }
func runPing(context.Context, *session, pingOptions) error           { return errPending }
func serveOutlet(context.Context, *session, *outletPlan) error       { return errPending }
func serveInlet(context.Context, *session, *inletPlan) error         { return errPending }
func classify(err error) *failure {
	var f *failure
	if errors.As(err, &f) {
		if text := err.Error(); text != f.Error() {
			return &failure{code: f.code, err: errors.New(text), remedy: f.remedy}
		}
		return f
	}
	return &failure{code: codeFailed, err: err}
}
