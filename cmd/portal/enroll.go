package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/authority"
	"github.com/portal-tunnel/portal/routing"
)

type enrollOptions struct {
	home    string
	file    string // - is stdin; empty: the environment or the terminal
	direct  []string
	relay   []string
	timeout time.Duration
}

// runEnroll redeems a ticket. While the authority cannot be reached it tries
// again, until the timeout; the ticket is then unspent.
func runEnroll(ctx context.Context, s *session, o enrollOptions) error {
	ways, err := dialable("direct", o.direct)
	if err != nil {
		return err
	}
	relayWays, err := relayAddresses("relay", o.relay, true)
	if err != nil {
		return err
	}
	if ways = append(ways, relayWays...); len(ways) > identity.MaxWays {
		return fail(codeUsage, "", "%d addresses by --direct and --relay; at most %d are used", len(ways), identity.MaxWays)
	}
	if err := atLeast("timeout", o.timeout, time.Second); err != nil {
		return err
	}
	ticket, err := s.enrollTicket(ctx, o.file)
	if err != nil {
		return err
	}
	h, err := s.openHome(o.home)
	if err != nil {
		return err
	}
	self, err := h.Self()
	if err != nil {
		return err
	}
	node := &routing.Node{Logger: s.log}
	defer node.Close()
	trust := identity.NewTrust(ticket.Authority)
	relays := newRelays(node, self, trust, s.log)
	defer relays.close()
	client := &authority.Client{
		Node: node, Self: self, Trust: trust, Home: h, Ways: ways, Logger: s.log, Dial: relays.toAuthority(ticket.Authority),
	}
	e, err := enroll(ctx, s, client, ticket, o.timeout)
	if err != nil {
		return err
	}
	if s.json {
		return s.document(enrolledDocument(self.ID(), e))
	}
	how := "enrolled"
	if e.Already {
		how = "already enrolled"
	}
	s.say("%s as %s%s", how, standing(self.ID(), e.Membership, e.Credential), by(e.Membership))
	if e.Before != nil && !e.Already {
		for _, c := range e.Changes() {
			s.say("  %s: %s, before %s", fromPeer(c.Name), grant(c.After), grant(c.Before))
		}
	}
	return nil
}

func enroll(ctx context.Context, s *session, client *authority.Client, ticket *identity.Ticket, timeout time.Duration) (*authority.Enrolled, error) {
	limited, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for try := 0; ; try++ {
		e, err := client.Enroll(limited, ticket)
		if err == nil || !temporary(err) {
			return e, err
		}
		next := backoff(try)
		if deadline, _ := limited.Deadline(); ctx.Err() != nil || time.Until(deadline) < next {
			return nil, unspent(err)
		}
		s.say("waiting: %s; next try in %s", reasonText(err), seconds(next))
		pause(limited, next)
	}
}

// by is how the authority is reached, as a sentence goes on.
func by(m *identity.Membership) string {
	var direct, relays []string
	for _, w := range m.Ways {
		if w.ID.IsZero() {
			direct = append(direct, w.Addr)
		} else {
			relays = append(relays, w.Addr)
		}
	}
	text := ""
	if len(direct) > 0 {
		text += "; authority " + m.Authority.Short() + " at " + fromPeer(list(direct))
	}
	if len(relays) > 0 {
		text += "; relay " + fromPeer(list(relays))
	}
	return text
}

// grant is an attribute's value, or that there is none.
func grant(v any) string {
	if v == nil {
		return "nothing"
	}
	return fromPeer(valueText(v))
}

func enrolledDocument(id identity.ID, e *authority.Enrolled) any {
	type change struct {
		Attribute string `json:"attribute"`
		Before    any    `json:"before"`
		After     any    `json:"after"`
	}
	doc := struct {
		ID         identity.ID         `json:"id"`
		Authority  identity.ID         `json:"authority"`
		Name       string              `json:"name,omitempty"`
		Attributes identity.Attributes `json:"attributes"`
		Serve      []string            `json:"serve,omitempty"`
		Relay      bool                `json:"relay,omitempty"`
		Expires    time.Time           `json:"expires"`
		Already    bool                `json:"already"`
		Changes    []change            `json:"changes"`
	}{
		ID: id, Authority: e.Membership.Authority, Name: e.Membership.Name, Attributes: free(e.Credential.Attributes), Serve: e.Credential.Serve(),
		Relay: e.Credential.Relay(), Expires: e.Credential.Expires.UTC(), Already: e.Already, Changes: []change{},
	}
	if e.Before != nil {
		for _, c := range e.Changes() {
			doc.Changes = append(doc.Changes, change{c.Name, c.Before, c.After})
		}
	}
	return doc
}

// dialable reads addresses of an authority: HOST:PORT each.
func dialable(flag string, texts []string) ([]identity.Way, error) {
	var out []identity.Way
	for _, text := range texts {
		if id, _, pinned := strings.Cut(text, "@"); pinned {
			return nil, fail(codeAddress, "HOST:PORT; the ticket says which identity must answer there", "--%s: %q: an ID stands there: %s", flag, plain(text), plain(id))
		}
		addr, err := dialAddress(text)
		if err != nil {
			return nil, fmt.Errorf("--%s: %w", flag, err)
		}
		out = append(out, identity.Way{Addr: addr})
	}
	return out, nil
}
