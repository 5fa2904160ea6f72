package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/link"
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
	m, err := s.member(o.member)
	if err != nil {
		return err
	}
	defer m.node.Close()
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	if err := m.join(ctx, s.teller("ping", o.name)); err != nil {
		return err
	}
	server := way.inlet(o.name, m, s.log)
	p, err := probe(ctx, server, o.target)
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
func probe(ctx context.Context, server *inlet.Server, target bool) (p inlet.Probe, err error) {
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
	var last error
	for {
		select {
		case state := <-states:
			switch state.Kind {
			case link.Ready:
				return server.Probe(ctx, target)
			case link.Refused:
				return p, state.Err
			}
			last = state.Err
		case <-ctx.Done():
			if last == nil || !errors.Is(ctx.Err(), context.DeadlineExceeded) {
				last = ctx.Err()
			}
			return p, fail(codeUnreachable, causes[codeUnreachable][1], "no answer in time: %w", last)
		}
	}
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
