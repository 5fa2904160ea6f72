package main

import (
	"bytes"
	"errors"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/internal/memnet"
)

const megabyte = 1e6 // a second

func TestAWireDelaysAndPaces(t *testing.T) {
	w := &wire{delay: 50 * time.Millisecond, rate: megabyte}
	start := time.Unix(0, 0)
	at := func(ms float64) time.Time { return start.Add(time.Duration(ms * float64(time.Millisecond))) }
	for _, c := range []struct {
		given float64
		bytes int
		out   float64
		wait  float64
	}{
		{0, 1000, 51, 0},    // a millisecond to send, then the way
		{0, 1000, 52, 0},    // behind the first
		{1, 4000, 56, 0},    // 6 ms of bytes in the queue, of which one has gone
		{1, 2000, 58, 2},    // more than the queue holds
		{100, 0, 150, 0},    // an end takes no time
		{100, 1000, 151, 0}, // the queue is empty again
	} {
		out, wait := w.take(at(c.given), c.bytes)
		if !out.Equal(at(c.out)) || wait != at(c.wait).Sub(start) {
			t.Errorf("%d bytes at %g ms: out at %v, wait %v; want %g ms, %g ms", c.bytes, c.given, out.Sub(start), wait, c.out, c.wait)
		}
	}
}

// linked is a client and a server with a link between them, in virtual time.
func linked(t *testing.T, delay time.Duration, rate float64) (client, server *memnet.Conn, ended <-chan error) {
	client, near := memnet.Pipe(memnet.Link{})
	far, server := memnet.Pipe(memnet.Link{})
	done := make(chan error, 1)
	go func() { done <- shape(near, far, &wire{delay: delay, rate: rate}, &wire{delay: delay, rate: rate}) }()
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server, done
}

func TestALinkTakesItsDelayAndItsRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const delay, size = 50 * time.Millisecond, 5_000_000
		client, server, ended := linked(t, delay, 10*megabyte)
		go func() {
			io.Copy(onlyWriter{server}, onlyReader{server})
			server.CloseWrite()
		}()

		start := time.Now()
		if _, err := client.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(client, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != 2*delay+200*time.Nanosecond { // and a byte's time, twice
			t.Errorf("a byte there and back took %v", took)
		}

		start = time.Now()
		sent := bytes.Repeat([]byte("0123456789"), size/10)
		go func() {
			client.Write(sent)
			client.CloseWrite()
		}()
		got, err := io.ReadAll(client)
		if err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("%d of %d bytes in order, %v", len(got), size, err)
		}
		// Half a second to send, and the way there and back; a chunk is sent again once it is all there.
		least := 2*delay + 500*time.Millisecond
		if took := time.Since(start); took < least || took > least+20*time.Millisecond {
			t.Errorf("%d bytes there and back took %v, want %v and little more", size, took, least)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func TestConnectionsShareALinksRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n, each = 4, 1_000_000
		there, back := &wire{delay: time.Millisecond, rate: megabyte}, &wire{delay: time.Millisecond, rate: megabyte}
		start := time.Now()
		read := make(chan error, n)
		var all sync.WaitGroup
		for range n {
			client, near := memnet.Pipe(memnet.Link{})
			far, server := memnet.Pipe(memnet.Link{})
			t.Cleanup(func() { client.Close(); server.Close() })
			all.Go(func() { shape(near, far, there, back) })
			all.Go(func() {
				client.Write(make([]byte, each))
				client.CloseWrite()
				io.Copy(io.Discard, onlyReader{client})
			})
			all.Go(func() {
				_, err := io.Copy(io.Discard, onlyReader{server})
				read <- err
				server.CloseWrite()
			})
		}
		for range n {
			if err := <-read; err != nil {
				t.Fatal(err)
			}
		}
		if took, want := time.Since(start), n*time.Second+time.Millisecond; took != want {
			t.Errorf("took %v, want %v", took, want)
		}
		all.Wait()
	})
}

// TestAnInteractiveStreamWaitsForAShortQueue: a link that let a bulk connection's window queue up
// before the others would measure itself, not the tunnel.
func TestAnInteractiveStreamWaitsForAShortQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const delay = 10 * time.Millisecond
		there, back := &wire{delay: delay, rate: gigabit}, &wire{delay: delay, rate: gigabit}
		var all sync.WaitGroup
		connect := func() (client, server *memnet.Conn) {
			client, near := memnet.Pipe(memnet.Link{})
			far, server := memnet.Pipe(memnet.Link{})
			t.Cleanup(func() { client.Close(); server.Close() })
			all.Go(func() { shape(near, far, there, back) })
			return client, server
		}
		bulk, sink := connect()
		all.Go(func() { io.Copy(io.Discard, onlyReader{sink}) })
		all.Go(func() { io.Copy(onlyWriter{bulk}, zeros{}) })
		client, server := connect()
		all.Go(func() { io.Copy(onlyWriter{server}, onlyReader{server}) })
		time.Sleep(100 * time.Millisecond) // virtual: the bulk flows
		for range 10 {
			start := time.Now()
			if _, err := client.Write([]byte{1}); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(client, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(start); took > 2*delay+shapeQueue+time.Millisecond {
				t.Fatalf("a byte took %v beside the bulk", took)
			}
		}
		bulk.Cut()
		client.Cut()
		all.Wait()
	})
}

func TestASlowReaderIsFeltAtTheOtherEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server, ended := linked(t, time.Millisecond, gigabit)
		w := &wire{delay: time.Millisecond, rate: gigabit}
		written := make(chan int, 1)
		client.SetWriteDeadline(time.Now().Add(time.Hour))
		go func() {
			n, _ := client.Write(make([]byte, 1<<30))
			written <- n
		}()
		n := <-written                                                     // nobody has read anything for an hour
		if most := int(w.window()) + 2*shapeChunk + 2*(64<<10); n > most { // and what either end's socket holds
			t.Errorf("%d bytes were taken of a connection whose end reads nothing; its window is %d", n, w.window())
		}
		server.Cut()
		if err := <-ended; err == nil {
			t.Error("a reset ended the connection in good order")
		}
	})
}

func TestAResetPassesALink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server, ended := linked(t, time.Second, gigabit)
		if _, err := client.Write([]byte("half of a")); err != nil {
			t.Fatal(err)
		}
		client.SetLinger(0)
		client.Close()
		if _, err := io.ReadAll(server); !errors.Is(err, memnet.ErrReset) {
			t.Errorf("the server read %v", err)
		}
		if err := <-ended; err == nil {
			t.Error("and it ended in good order")
		}
	})
}
