package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/portal-tunnel/portal/internal/link"
)

type namesOptions struct {
	member  memberOptions
	way     wayOptions
	timeout time.Duration
}

// servedName is one that relays hold now and that this member may ask for.
type servedName struct {
	Name   string   `json:"name"`
	Relays []string `json:"relays"` // that hold it
}

// runNames asks each relay which names there are.
func runNames(ctx context.Context, s *session, o namesOptions) error {
	way, err := o.way.plan("names", "")
	if err != nil {
		return err
	}
	if err := atLeast("timeout", o.timeout, time.Millisecond); err != nil {
		return err
	}
	m, err := s.memberFor(ctx, way, o.member)
	if err != nil {
		return err
	}
	defer m.close()
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	t := s.teller("names", "")
	if err := m.join(ctx, t); err != nil {
		return err
	}
	if err := m.client.Fresh(ctx); err != nil {
		s.log.Warn("the credential could not be renewed before asking", "error", err)
	}

	holds, failed := m.names(ctx, t, way.relays)
	if len(failed) == len(way.relays) {
		return errors.Join(failed...)
	}
	for _, err := range failed { // the others have answered
		s.say("%s", reasonText(err))
	}
	return s.printNames(holds)
}

// names asks all relays at once, and returns by whom each name is held and what kept
// others from answering. When one has answered, the others have quietTime more; until
// then t says what is waited for.
func (m *member) names(ctx context.Context, t *teller, relays []hops) (holds map[string][]string, failed []error) {
	type answer struct {
		from  hops
		names []string
		err   error
	}
	asking, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan answer)
	for _, h := range relays {
		go func() {
			names, err := m.relays.through(h).Names(asking)
			answers <- answer{h, names, err}
		}()
	}
	quiet := time.NewTimer(quietTime)
	defer quiet.Stop()
	holds, answered := make(map[string][]string), false
	for n := 0; n < len(relays); {
		select {
		case <-quiet.C:
			if answered {
				cancel()
				continue
			}
			for _, h := range relays {
				switch state := m.relays.through(h).State(); {
				case state.Kind == link.Ready:
				case state.Err != nil:
					t.waiting(fmt.Errorf("%s: %w", viaText(h), state.Err), 0)
				default:
					t.waiting(fmt.Errorf("nothing is heard yet, %s", viaText(h)), 0)
				}
			}
		case a := <-answers:
			n++
			switch {
			case a.err == nil && !answered:
				answered = true
				quiet.Reset(quietTime)
			case a.err != nil && asking.Err() != nil && ctx.Err() == nil && m.relays.through(a.from).State().Err == nil:
				failed = append(failed, fmt.Errorf("%s: it has not answered within %s of another", viaText(a.from), quietTime))
			case a.err != nil:
				failed = append(failed, fmt.Errorf("%s: %w", viaText(a.from), a.err))
			}
			for _, name := range a.names {
				if !slices.Contains(holds[name], a.from.String()) {
					holds[name] = append(holds[name], a.from.String())
				}
			}
		}
	}
	return holds, failed
}

func (s *session) printNames(holds map[string][]string) error {
	served := []servedName{}
	for _, n := range slices.Sorted(maps.Keys(holds)) {
		slices.Sort(holds[n])
		served = append(served, servedName{n, holds[n]})
	}
	if s.json {
		return s.document(served)
	}
	if len(served) == 0 {
		s.say("no name is served now that this member may ask for")
		return nil
	}
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	for _, n := range served {
		fmt.Fprintf(w, "%s\tvia %s\n", plain(n.Name), list(n.Relays))
	}
	w.Flush()
	return s.print("%s", &text)
}
