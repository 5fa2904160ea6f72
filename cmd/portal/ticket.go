package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/authority"
	"golang.org/x/term"
)

type ticketOptions struct {
	home      string
	name      string
	attr      []string
	serve     []string
	relay     bool
	ttl       time.Duration
	uses      int
	out       string // a file, 0600, in place of stdout
	advertise []string
	through   []string // relays, as ID@HOST:PORT
}

// createTicket prints one ticket on stdout, alone; what it grants is for
// people.
func createTicket(ctx context.Context, s *session, o ticketOptions) error {
	grants, err := attributes("attr", o.attr)
	if err != nil {
		return err
	}
	if o.name != "" {
		if err := validName(o.name); err != nil {
			return err
		}
	}
	for _, pattern := range o.serve {
		if err := identity.ValidServe(pattern); err != nil {
			return fail(codeName, causes[codeName][1], "--serve %q: %w", plain(pattern), err)
		}
	}
	ways, err := dialable("advertise", o.advertise)
	if err != nil {
		return err
	}
	through, err := relayAddresses("relay", o.through, true)
	if err != nil {
		return err
	}
	ways = append(ways, distinct(through)...)
	if o.ttl < time.Second || o.ttl > authority.MaxTicketTTL {
		return fail(codeUsage, "", "--ttl %s: from 1s to %s", o.ttl, authority.MaxTicketTTL)
	}
	if o.uses < 1 || o.uses > authority.MaxUses {
		return fail(codeUsage, "", "--uses %d: from 1 to %d", o.uses, authority.MaxUses)
	}
	// The file comes first: a ticket that cannot be written must not exist.
	out, err := newTicketFile(o.out)
	if err != nil {
		return err
	}
	request := ticketRequest{Name: o.name, Attr: o.attr, Serve: o.serve, Relay: o.relay, TTL: o.ttl, Uses: o.uses, Ways: wayTexts(ways)}
	var reply ticketReply
	if err := askAuthority(ctx, s, o.home, "ticket.create", request, &reply); err != nil {
		out.discard()
		return err
	}
	t, err := identity.ParseTicket(reply.Ticket)
	if err != nil {
		out.discard()
		return err
	}
	if err := handOver(s, o, out, t, reply, grants); err != nil {
		out.discard()
		// Also when this was interrupted: nobody has the ticket.
		ctx := context.WithoutCancel(ctx)
		return takeBack(t, err, func(ref string) error { return askAuthority(ctx, s, o.home, "ticket.revoke", ref, nil) })
	}
	return nil
}

// handOver writes the ticket to where it was asked for, and says what it grants.
func handOver(s *session, o ticketOptions, out outFile, t *identity.Ticket, reply ticketReply, grants map[string]any) error {
	surviveReaders()
	if err := out.write(reply.Ticket); err != nil {
		return err
	}
	if reply.Guessed {
		s.warnGuess("the ticket names", reply.Ways)
	}
	switch {
	case s.json:
		doc := map[string]any{
			"ref": authority.Ref(t.Hash()), "authority": t.Authority, "name": o.name, "attributes": grants,
			"serve": append([]string{}, o.serve...), "relay": o.relay, "uses": o.uses, "expires": t.Expires, "ways": reply.Ways,
		}
		if o.out == "" {
			doc["ticket"] = reply.Ticket
		} else {
			doc["file"] = o.out
		}
		return s.document(doc)
	case o.out == "":
		if err := s.print("%s\n", reply.Ticket); err != nil {
			return err
		}
	}
	s.say("ticket %s for %s; %s until %s", authority.Ref(t.Hash()), granted(o, grants), uses(o.uses), when(t.Expires))
	file := "-"
	if o.out != "" {
		file = filepath.Base(o.out)
	}
	s.say("on the other side: portal enroll %s", file)
	return nil
}

// takeBack revokes a ticket that could not be handed over, and says why that was.
func takeBack(t *identity.Ticket, why error, revoke func(ref string) error) error {
	ref := authority.Ref(t.Hash())
	if err := revoke(ref); err != nil {
		// No code that says that nothing was changed.
		return fail(codeFailed, fmt.Sprintf("`portal ticket revoke %s`; else it can be redeemed until %s", ref, when(t.Expires)),
			"handing over ticket %s: %w; revoking it: %w", ref, why, err)
	}
	return fail(classify(why).code, "write it elsewhere, or make room, and make another", "handing over ticket %s: %w; it is revoked", ref, why)
}

// granted is what a ticket makes of its bearer.
func granted(o ticketOptions, attrs map[string]any) string {
	text := "a member"
	if o.name != "" {
		text = o.name
	}
	if len(o.serve) > 0 {
		text += "; may serve " + list(o.serve)
	}
	if o.relay {
		text += "; may be a relay"
	}
	if len(attrs) > 0 {
		text += "; " + attributeText(attrs, plain)
	}
	return text
}

func uses(n int) string {
	if n == 1 {
		return "good once"
	}
	return fmt.Sprintf("good for %d identities", n)
}

// outFile is where a ticket goes that does not go to stdout. The zero value is
// stdout's.
type outFile struct{ f *os.File }

// newTicketFile makes a file that was not there, for nobody else to read.
func newTicketFile(path string) (outFile, error) {
	if path == "" {
		return outFile{}, nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return outFile{}, fail(codeUsage, "remove it, or use another name", "--out %s: the file is there already", plain(path))
	}
	if err != nil {
		return outFile{}, fail(codeState, "", "--out: %w", err)
	}
	return outFile{f}, nil
}

func (o outFile) discard() {
	if o.f != nil {
		o.f.Close()
		os.Remove(o.f.Name())
	}
}

func (o outFile) write(ticket string) error {
	if o.f == nil {
		return nil
	}
	_, err := o.f.WriteString(ticket + "\n")
	return errors.Join(err, o.f.Close())
}

// listTickets lists what the authority remembers, newest first.
func listTickets(ctx context.Context, s *session, home string) error {
	tickets := []authority.TicketInfo{}
	for after := (ticketCursor{}); ; {
		var page []authority.TicketInfo
		if err := askAuthority(ctx, s, home, "ticket.list", after, &page); err != nil {
			return err
		}
		if len(page) == 0 {
			break
		}
		last := page[len(page)-1]
		// Of an authority's process that knows no cursor each page is all there is.
		if !last.Behind(after.Created, after.Ref) {
			break
		}
		tickets = append(tickets, page...)
		after = ticketCursor{Created: last.Created, Ref: last.Ref}
	}
	if s.json {
		return s.document(tickets)
	}
	w := tabwriter.NewWriter(s.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "REF\tSTATE\tNAME\tSERVE\tATTRIBUTES\tLEFT\tEXPIRES")
	for _, t := range tickets {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d of %d\t%s\n", t.Ref, t.State, cell(t.Name), cell(strings.Join(t.Serve, ",")),
			cell(attributeText(t.Attributes, plain)), t.Left, t.Uses, when(t.Expires))
	}
	return w.Flush()
}

func revokeTicket(ctx context.Context, s *session, home, ref string) error {
	if err := askAuthority(ctx, s, home, "ticket.revoke", ref, nil); err != nil {
		return err
	}
	if s.json {
		return s.document(map[string]any{"ref": ref, "state": "revoked"})
	}
	s.say("ticket %s revoked; members that it made stay members", plain(ref))
	return nil
}

// maxTicketFile is more than a ticket has, so that a wrong file is told from a
// long one.
const maxTicketFile = 16 << 10

// givenTicket reads the ticket that a long-running command was given: --ticket
// FILE, $PORTAL_TICKET, or the file that $PORTAL_TICKET_FILE names. nil: none.
func (s *session) givenTicket(ctx context.Context, file string) (*identity.Ticket, error) {
	if file == "" {
		if text := s.env.get("PORTAL_TICKET"); text != "" {
			return readTicket("PORTAL_TICKET", text)
		}
		if file = s.env.get("PORTAL_TICKET_FILE"); file == "" {
			return nil, nil
		}
	}
	return ticketFile(ctx, file)
}

// enrollTicket reads the ticket for `portal enroll`: what its argument says,
// what the environment has, or what is typed on the terminal, unseen.
func (s *session) enrollTicket(ctx context.Context, file string) (*identity.Ticket, error) {
	terminal := isTerminal(s.stdin)
	switch {
	case file == "-" && !terminal:
		return unlessDone(ctx, func() (*identity.Ticket, error) { return ticketFrom(s.stdin, "stdin") })
	case file == "":
		if t, err := s.givenTicket(ctx, ""); t != nil || err != nil {
			return t, err
		}
		if !terminal {
			return nil, fail(codeUsage, "`portal enroll FILE`, `… | portal enroll -`, or PORTAL_TICKET", "enroll: there is no ticket")
		}
	case file != "-":
		return ticketFile(ctx, file)
	}
	return s.askTicket(ctx, s.stdin.(*os.File))
}

// askTicket reads a line from the terminal without echo. Interrupted, it leaves
// the terminal as it was and the goroutine that reads to the end of the process.
func (s *session) askTicket(ctx context.Context, in *os.File) (*identity.Ticket, error) {
	before, err := term.GetState(int(in.Fd()))
	if err != nil {
		return nil, fail(codeTicketForm, "", "reading the ticket from the terminal: %w", err)
	}
	s.stderr.Write([]byte("portal: paste the ticket (it is not shown): "))
	typed, err := unlessDone(ctx, func() ([]byte, error) { return term.ReadPassword(int(in.Fd())) })
	if ctx.Err() != nil {
		term.Restore(int(in.Fd()), before)
	}
	s.line("")
	if err != nil {
		return nil, fail(codeTicketForm, "", "reading the ticket from the terminal: %w", err)
	}
	return readTicket("the terminal", string(typed))
}

// ticketFile reads the ticket from a file, which may be a pipe.
func ticketFile(ctx context.Context, file string) (*identity.Ticket, error) {
	return unlessDone(ctx, func() (*identity.Ticket, error) {
		f, err := os.Open(file)
		if err != nil {
			return nil, fail(codeUsage, "", "reading the ticket: %w", err)
		}
		defer f.Close()
		return ticketFrom(f, file)
	})
}

func ticketFrom(r io.Reader, what string) (*identity.Ticket, error) {
	b, err := readAll(r, maxTicketFile, "the ticket from "+what)
	if err != nil {
		return nil, fail(codeTicketForm, "", "%w", err)
	}
	return readTicket(what, string(b))
}

// unlessDone is what a read returns that may wait for whoever writes. When ctx ends
// first it is ctx's cause, and the goroutine that reads is left to the end of the process.
func unlessDone[T any](ctx context.Context, read func() (T, error)) (T, error) {
	type result struct {
		v   T
		err error
	}
	c := make(chan result, 1)
	go func() {
		v, err := read()
		c <- result{v, err}
	}()
	select {
	case r := <-c:
		return r.v, r.err
	case <-ctx.Done():
		var none T
		return none, context.Cause(ctx)
	}
}

func readTicket(from, text string) (*identity.Ticket, error) {
	t, err := identity.ParseTicket(strings.TrimSpace(text))
	if err != nil {
		return nil, fail(codeTicketForm, causes[codeTicketForm][1], "%s: %w", plain(from), err)
	}
	return t, nil
}
