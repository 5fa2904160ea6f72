package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/authority"
	"github.com/portal-tunnel/portal/internal/store"
)

// What an interruption ends: reading from a pipe that nobody writes to, and opening one.
func TestReadingATicketEndsWithTheContext(t *testing.T) {
	silent, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	defer silent.Close()
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	defer func() { // whoever waits in open(2) goes on
		if f, err := os.OpenFile(fifo, os.O_RDWR, 0); err == nil {
			f.Close()
		}
	}()
	why := errors.New("enough")
	for _, file := range []string{"-", fifo} {
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(why)
		s := &session{stdin: silent}
		if ticket, err := s.enrollTicket(ctx, file); ticket != nil || !errors.Is(err, why) {
			t.Errorf("enroll %s: %v, %v", file, ticket, err)
		}
		if ticket, err := s.givenTicket(ctx, fifo); ticket != nil || !errors.Is(err, why) {
			t.Errorf("--ticket %s: %v, %v", fifo, ticket, err)
		}
	}
}

// One answer of the control socket has 1 MiB, and an authority remembers ten thousand tickets.
func TestTicketsAreListedPageByPage(t *testing.T) {
	st, err := store.Open(filepath.Join(t.TempDir(), "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	self, err := identity.NewSelf()
	if err != nil {
		t.Fatal(err)
	}
	d := &desk{server: &authority.Server{Self: self, Store: st}, store: st}
	create := func() {
		t.Helper()
		if _, err := d.server.CreateTicket(t.Context(), authority.Grant{
			Ways: []identity.Way{{Addr: "192.0.2.1:4000"}}, Attributes: identity.Attributes{"note": strings.Repeat("x", 900), "more": strings.Repeat("y", 900)},
		}); err != nil {
			t.Fatal(err)
		}
	}
	for range 600 {
		create()
	}
	want, err := d.server.Tickets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []authority.TicketInfo
	pages := 0
	for after := (ticketCursor{}); ; pages++ {
		params, err := json.Marshal(after)
		if err != nil {
			t.Fatal(err)
		}
		result, err := d.do(t.Context(), "ticket.list", params)
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(result)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > ticketPage+2 {
			t.Errorf("a page of %d bytes", len(b))
		}
		var page []authority.TicketInfo
		if err := json.Unmarshal(b, &page); err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			break
		}
		got = append(got, page...)
		last := page[len(page)-1]
		after = ticketCursor{last.Created, last.Ref}
		create() // newer than all, and in no page behind the first
	}
	if pages < 2 {
		t.Errorf("%d pages: nothing is proved", pages)
	}
	if !slices.EqualFunc(got, want, func(a, b authority.TicketInfo) bool { return a.Ref == b.Ref }) {
		t.Errorf("%d tickets are listed, there were %d, or in another order", len(got), len(want))
	}
}
