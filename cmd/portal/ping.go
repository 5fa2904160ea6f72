package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/urfave/cli/v2"
)

type pingOptions struct {
	member  memberOptions
	way     wayOptions
	name    string
	target  bool
	patient bool // wait for the target too
	timeout time.Duration
}

func pingFlags(c *cli.Context) pingOptions {
	return pingOptions{
		member:  memberFlags(c),
		way:     wayOf(c),
		name:    c.Args().First(),
		target:  c.Bool("target"),
		timeout: c.Duration("timeout"),
	}
}

// asked is an outlet that was asked, and how it was reached.
type asked struct {
	inlet.Probe
	hops []hop
}

// ask goes the whole way to an outlet: the channel, the policy, and with target the
// dial of the target. tell is told what it waits for; nil: nobody.
func (o pingOptions) ask(ctx context.Context, s *session, command string, tell func(*teller, inlet.State)) (a asked, err error) {
	if err := validName(o.name); err != nil {
		return a, err
	}
	way, err := o.way.plan(command, o.name)
	if err != nil {
		return a, err
	}
	if err := atLeast("timeout", o.timeout, time.Millisecond); err != nil {
		return a, err
	}
	m, err := s.memberFor(ctx, way, o.member)
	if err != nil {
		return a, err
	}
	defer m.close()
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	t := s.teller(command, o.name)
	if err := m.join(ctx, t); err != nil {
		return a, err
	}
	p := &prober{pingOptions: o, server: way.inlet(o.name, m, s.log)}
	for _, path := range p.server.Paths {
		p.ways = append(p.ways, path.Name)
	}
	if tell != nil {
		p.tell = func(state inlet.State) { tell(t, state) }
	}
	if a.Probe, err = p.run(ctx); err == nil {
		a.hops, err = way.passed(ctx, m, a.Probe)
	} else {
		way.reached(s, m, err)
	}
	if err != nil {
		return a, fmt.Errorf("outlet %s: %w", o.name, err)
	}
	return a, nil
}

// runPing asks an outlet once, and prints the way hop by hop.
func runPing(ctx context.Context, s *session, o pingOptions) error {
	p, err := o.ask(ctx, s, "ping", untilReady(ctx))
	if err != nil {
		return err
	}
	c := p.Peer.Credential()
	if s.json {
		doc := map[string]any{
			"name": o.name, "via": p.Path, "peer": p.Peer.ID(), "member": c.Name(), "permitted": true,
			"rtt_ms": milliseconds(p.RTT), "answer_ms": milliseconds(p.Answer), "hops": p.hops,
		}
		if o.target {
			doc["target_ms"] = milliseconds(p.Target)
		}
		return s.document(doc)
	}
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	for i, h := range p.hops {
		fmt.Fprintf(w, "  %d %s\t%s\t%s\thandshake %.1f ms\tround trip %.1f ms\n", i+1, h.Role, h.Address, h.ID.Short(), h.Handshake, h.RTT)
	}
	w.Flush()
	fmt.Fprintf(&text, "%s  %s  %s (%s)  permitted  round trip %.1f ms  answer %.1f ms",
		o.name, p.Path, memberName(c.Name()), p.Peer.ID().Short(), milliseconds(p.RTT), milliseconds(p.Answer))
	if o.target {
		fmt.Fprintf(&text, "  target %.1f ms", milliseconds(p.Target))
	}
	return s.print("%s\n", &text)
}

// A hop is one channel of the way, each inside the lanes of those before it.
type hop struct {
	Role      string      `json:"role"`    // relay, outlet
	Address   string      `json:"address"` // a relay's, or the name of it at the one before; the outlet's member name
	ID        identity.ID `json:"id"`
	Handshake float64     `json:"handshake_ms"` // the outlet's: with its coming for the lane
	RTT       float64     `json:"rtt_ms"`       // from here, through the channel
}

// passed are the hops of the way that led to the outlet, each measured. Ways may
// differ in their pins alone: it is one whose last relay is there.
func (r *route) passed(ctx context.Context, m *member, p inlet.Probe) ([]hop, error) {
	var all []hop
	for _, h := range r.relays {
		if viaText(h) != p.Path || m.relays.through(h).State().Kind != link.Ready {
			continue
		}
		for i := range h {
			at, err := m.relays.through(h[:i+1]).Probe(ctx)
			if err != nil {
				return nil, err
			}
			all = append(all, hop{"relay", h[i].Addr, at.Peer.ID(), milliseconds(at.Handshake), milliseconds(at.RTT)})
		}
		break
	}
	return append(all, hop{"outlet", memberName(p.Peer.Credential().Name()), p.Peer.ID(), milliseconds(p.Handshake), milliseconds(p.RTT)}), nil
}

// reached says how far each way leads that did not lead to the outlet, err being what
// is said of it anyway.
func (r *route) reached(s *session, m *member, err error) {
	for _, h := range r.relays {
		for i := range h {
			state, at := m.relays.through(h[:i+1]).State(), fmt.Sprintf("hop %d of %s: relay %s", i+1, viaText(h), h[i].Addr)
			if state.Kind == link.Ready {
				s.say("%s (%s) answers", at, state.Peer.ID().Short())
				continue
			}
			if state.Err != nil && !strings.Contains(err.Error(), state.Err.Error()) {
				s.say("%s is not reached: %s", at, reasonText(state.Err))
			}
			break
		}
	}
}

// untilReady says once what is waited for, as it changes.
func untilReady(ctx context.Context) func(*teller, inlet.State) {
	return func(t *teller, state inlet.State) {
		if state.Kind == link.Waiting && state.Err != nil && ctx.Err() == nil {
			t.waiting(state.Err, state.Next)
		}
	}
}

// runWait returns when an outlet lets this member in, with --target when its target
// answers too: for scripts. What it waits for is said once.
func runWait(ctx context.Context, s *session, o pingOptions) error {
	o.patient = true
	p, err := o.ask(ctx, s, "wait", untilReady(ctx))
	if err != nil {
		return err
	}
	c := p.Peer.Credential()
	if s.json {
		return s.document(map[string]any{"name": o.name, "via": p.Path, "peer": p.Peer.ID(), "member": c.Name()})
	}
	s.say("wait %s ready %s (%s, %s)", unready(o.name), p.Path, memberName(c.Name()), p.Peer.ID().Short())
	return nil
}

// A prober runs an inlet until it has an answer: nobody's longer than its context, a
// refusal's at once.
type prober struct {
	pingOptions
	server *inlet.Server
	ways   []string
	tell   func(inlet.State) // what is waited for; nil: nobody
}

// quietTime is how long a person waits without a word.
const quietTime = 2 * time.Second

func (o *prober) run(ctx context.Context) (p inlet.Probe, err error) {
	states := make(chan inlet.State, 1)
	o.server.OnState = func(state inlet.State) {
		select {
		case <-states: // only the last counts
		default:
		}
		states <- state
	}
	run, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- o.server.Run(run) }()
	defer func() {
		stop()
		<-ended
	}()
	quiet := time.NewTimer(quietTime)
	defer quiet.Stop()
	var last inlet.State
	for {
		select {
		case <-quiet.C:
			if last.Err == nil && o.tell != nil {
				o.tell(inlet.State{Kind: link.Waiting, Err: fmt.Errorf("nothing is heard yet, %s", list(o.ways))})
			}
		case state := <-states:
			switch state.Kind {
			case link.Ready:
				return o.probe(ctx)
			case link.Refused:
				return p, state.Err
			}
			if state.Err != nil { // not that it ends because ctx did
				last = state
			}
			if o.tell != nil {
				o.tell(state)
			}
		case <-ctx.Done():
			if !late(ctx) {
				return p, ctx.Err()
			}
			return p, o.unreached(last)
		}
	}
}

// targetAgain is how soon a target that did not answer is dialled again.
const targetAgain = time.Second

// probe asks on a channel that is there. Whoever is patient waits for a target that
// does not answer yet.
func (o *prober) probe(ctx context.Context) (inlet.Probe, error) {
	for {
		p, err := o.server.Probe(ctx, o.target)
		switch {
		case err == nil:
			return p, nil
		case late(ctx):
			return p, o.silent(p, err)
		case !o.patient || p.Answer == 0 || classify(err).code.exit() != exitUnreachable:
			return p, err
		}
		if o.tell != nil {
			o.tell(inlet.State{Kind: link.Waiting, Err: err, Next: targetAgain})
		}
		if pause(ctx, targetAgain) != nil {
			return p, err // what was waited for
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
		return fail(codeUnreachable, remedyWithin(o.timeout, o.way), "neither a channel nor a decision within %s", o.timeout)
	case last.Peer == nil:
		return fail(codeUnreachable, remedyFor(last.Err), "no channel within %s: %w", o.timeout, last.Err)
	}
	return o.undecided()
}

// remedyWithin is what to do about an outlet of which nothing was heard in a time. A relay
// waits for two seconds for a name that nobody serves, before it says so.
func remedyWithin(timeout time.Duration, way wayOptions) string {
	if timeout < 5*time.Second && len(way.direct) == 0 {
		return "give it more time: --timeout 5s says whether a relay knows an outlet of the name"
	}
	return causes[codeUnreachable][1]
}

// remedyFor is what to do about an outlet that was not reached.
func remedyFor(err error) string {
	refused, ok := errors.AsType[*stream.RefusedError](err)
	op, _ := errors.AsType[*net.OpError](err)
	switch {
	case op != nil && op.Op == "dial": // nobody has taken the connection
	case ok && refused.Code == stream.CodeAbsent && strings.Contains(refused.Reason, "next one"):
		return "see the --next of the relay before: the names of --via stand there"
	case ok && refused.Code == stream.CodeAbsent:
		return "start its outlet, or see by `portal names` which names are served"
	case errors.Is(err, channel.ErrHandshake), errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, os.ErrDeadlineExceeded):
		return "see that a portal listens there: --direct is an outlet's own --listen, not its target"
	}
	return causes[codeUnreachable][1]
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
