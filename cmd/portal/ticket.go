package main

import (
	"os"
	"strings"

	"github.com/portal-tunnel/portal/identity"
	"golang.org/x/term"
)

// maxTicketFile is more than a ticket has, so that a wrong file is told from a
// long one.
const maxTicketFile = 16 << 10

// givenTicket reads the ticket that a long-running command was given: --ticket
// FILE, $PORTAL_TICKET, or the file that $PORTAL_TICKET_FILE names. nil: none.
func (s *session) givenTicket(file string) (*identity.Ticket, error) {
	if file == "" {
		if text := s.env.get("PORTAL_TICKET"); text != "" {
			return readTicket("PORTAL_TICKET", text)
		}
		if file = s.env.get("PORTAL_TICKET_FILE"); file == "" {
			return nil, nil
		}
	}
	return ticketFile(file)
}

// enrollTicket reads the ticket for `portal enroll`: what its argument says,
// what the environment has, or what is typed on the terminal, unseen.
func (s *session) enrollTicket(file string) (*identity.Ticket, error) {
	switch t, err := s.givenTicket(""); {
	case file == "-":
		b, err := readAll(s.stdin, maxTicketFile, "the ticket from stdin")
		if err != nil {
			return nil, fail(codeTicketForm, "", "%w", err)
		}
		return readTicket("stdin", string(b))
	case file != "":
		return ticketFile(file)
	case t != nil || err != nil:
		return t, err
	}
	in, ok := s.stdin.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return nil, fail(codeUsage, "`portal enroll FILE`, `… | portal enroll -`, or PORTAL_TICKET", "enroll: there is no ticket")
	}
	return s.askTicket(in)
}

// askTicket reads a line from the terminal without echo. An interruption must
// not leave the terminal so.
func (s *session) askTicket(in *os.File) (*identity.Ticket, error) {
	s.stderr.Write([]byte("portal: paste the ticket (it is not shown): "))
	b, err := term.ReadPassword(int(in.Fd()))
	s.line("")
	if err != nil {
		return nil, fail(codeTicketForm, "", "reading the ticket from the terminal: %w", err)
	}
	return readTicket("the terminal", string(b))
}

func ticketFile(file string) (*identity.Ticket, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fail(codeUsage, "", "reading the ticket: %w", err)
	}
	defer f.Close()
	b, err := readAll(f, maxTicketFile, file)
	if err != nil {
		return nil, fail(codeTicketForm, "", "%w", err)
	}
	return readTicket(file, string(b))
}

func readTicket(from, text string) (*identity.Ticket, error) {
	t, err := identity.ParseTicket(strings.TrimSpace(text))
	if err != nil {
		return nil, fail(codeTicketForm, causes[codeTicketForm][1], "%s: %w", plain(from), err)
	}
	return t, nil
}
