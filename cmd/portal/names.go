package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
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
	m, err := s.memberFor(way, o.member)
	if err != nil {
		return err
	}
	defer m.close()
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	if err := m.join(ctx, s.teller("names", "")); err != nil {
		return err
	}
	if err := m.client.Fresh(ctx); err != nil {
		s.log.Warn("the credential could not be renewed before asking", "error", err)
	}

	var mu sync.Mutex
	holds := make(map[string][]string)
	var failed []error
	var all sync.WaitGroup
	for _, h := range way.relays {
		all.Go(func() {
			names, err := m.relays.through(h).Names(ctx)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = append(failed, fmt.Errorf("%s: %w", viaText(h), err))
			}
			for _, n := range names {
				if !slices.Contains(holds[n], h.String()) {
					holds[n] = append(holds[n], h.String())
				}
			}
		})
	}
	all.Wait()
	if len(failed) == len(way.relays) {
		return errors.Join(failed...)
	}
	for _, err := range failed { // the others have answered
		s.say("%s", reasonText(err))
	}
	return s.printNames(holds)
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
