package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
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
