package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
)

type pingOptions struct {
	member  memberOptions
	way     wayOptions
	name    string
	target  bool
	timeout time.Duration
}

// runPing goes the whole way to an outlet once: the channel, the policy, and
// with --target the dial of the target.
func runPing(ctx context.Context, s *session, o pingOptions) error {
	if err := validName(o.name); err != nil {
		return err
	}
	way, err := o.way.plan("ping", o.name)
	if err != nil {
		return err
	}
	if err := atLeast("timeout", o.timeout, time.Millisecond); err != nil {
		return err
	}
	m, err := s.memberFor(way, o.member)
	if err != nil {
		return err
	}
	defer m.close()
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	if err := m.join(ctx, s.teller("ping", o.name)); err != nil {
		return err
	}
	server := way.inlet(o.name, m, s.log)
	p, err := probe(ctx, server, o)
	if err != nil {
		return fmt.Errorf("outlet %s: %w", o.name, err)
	}
	c := p.Peer.Credential()
	if s.json {
		doc := map[string]any{
			"name": o.name, "via": p.Path, "peer": p.Peer.ID(), "member": c.Name(), "permitted": true,
			"rtt_ms": milliseconds(p.RTT), "answer_ms": milliseconds(p.Answer),
		}
		if o.target {
			doc["target_ms"] = milliseconds(p.Target)
		}
		return s.document(doc)
	}
	line := fmt.Sprintf("%s  %s  %s (%s)  permitted  round trip %.1f ms  answer %.1f ms",
		o.name, p.Path, memberName(c.Name()), p.Peer.ID().Short(), milliseconds(p.RTT), milliseconds(p.Answer))
	if o.target {
		line += fmt.Sprintf("  target %.1f ms", milliseconds(p.Target))
	}
	return s.print("%s\n", line)
}

// probe runs the inlet until it has an answer: nobody's longer than ctx, a
// refusal's at once.
func probe(ctx context.Context, server *inlet.Server, o pingOptions) (p inlet.Probe, err error) {
	states := make(chan inlet.State, 1)
	server.OnState = func(state inlet.State) {
		select {
		case <-states: // only the last counts
		default:
		}
		states <- state
	}
	run, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- server.Run(run) }()
	defer func() {
		stop()
		<-ended
	}()
	var last inlet.State
	for {
		select {
		case state := <-states:
			switch state.Kind {
			case link.Ready:
				p, err := server.Probe(ctx, o.target)
				if err != nil && late(ctx) {
					err = o.silent(p, err)
				}
				return p, err
			case link.Refused:
				return p, state.Err
			}
			if state.Err != nil { // not that it ends because ctx did
				last = state
			}
		case <-ctx.Done():
			if !late(ctx) {
				return p, ctx.Err()
			}
			return p, o.unreached(last)
		}
	}
}

// late reports whether ctx ended because its time was over.
func late(ctx context.Context) bool { return errors.Is(ctx.Err(), context.DeadlineExceeded) }

// unreached says what was waited for when the time was over, last being why that
// is what it came to.
func (o pingOptions) unreached(last inlet.State) error {
	switch {
	case last.Err == nil:
		return fail(codeUnreachable, causes[codeUnreachable][1], "neither a channel nor a decision within %s", o.timeout)
	case last.Peer == nil:
		return fail(codeUnreachable, causes[codeUnreachable][1], "no channel within %s: %w", o.timeout, last.Err)
	}
	return o.undecided()
}

func (o pingOptions) undecided() error {
	return fail(codeUnreachable, "see the outlet's log: it takes a channel and does not answer on it", "no decision of its policy within %s", o.timeout)
}

// silent says which of the two questions on the channel was not answered when the
// time was over.
func (o pingOptions) silent(p inlet.Probe, err error) error {
	var told *stream.RefusedError
	switch {
	case errors.As(err, &told): // in the last moment
		return err
	case p.Answer == 0:
		return o.undecided()
	}
	return fail(codeTargetSlow, "a --timeout longer than the outlet's --dial-timeout has the outlet say what its target does",
		"it lets this member in, and its target has not answered within %s", o.timeout)
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
