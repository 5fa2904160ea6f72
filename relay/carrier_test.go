package relay

import (
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
)

// What a close has to say waits for the session, which may be stuck. Others hold locks when they close.
func TestCloseOfALaneInAStuckCarrierDoesNotWait(t *testing.T) {
	a, b := net.Pipe() // whoever writes to it waits for a reader
	defer b.Close()
	go io.ReadFull(b, make([]byte, 12)) // the stream's beginning, and no more
	session, err := yamux.Client(a, carrierConfig(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	y, err := session.OpenStream()
	if err != nil {
		t.Fatal(err)
	}
	over, free := make(chan struct{}), make(chan struct{})
	c := &carried{Stream: y, over: func() { close(over) }}
	go func() {
		var reader sync.WaitGroup
		reader.Go(func() { io.ReadAll(c) })
		c.Close()
		reader.Wait()
		close(free)
	}()
	select {
	case <-free:
	case <-time.After(5 * time.Second): // a third of what a session is given to write
		t.Error("Close or a reader waits for what the close has to say")
	}
	select {
	case <-over:
		t.Error("the lane is given back before it has said that it is over")
	default:
	}
	session.Close()
	<-over
}

// Each offer is good for a stream, which may come late: one that is not answered counts as one for a minute.
func TestOffersThatAreNotAnsweredTakeRoomInACarrier(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	session, err := yamux.Server(a, carrierConfig(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	c := &carrier{server: new(Server), session: session}
	offer := func() (n int) {
		for c.reserve() == nil {
			n++
		}
		return n
	}
	giveUp := func(n int) {
		for range n {
			c.give()
		}
	}
	if n := offer(); n != carrierLanes {
		t.Errorf("%d lanes at once", n)
	}
	giveUp(carrierLanes)
	if n := offer(); n != carrierLanes {
		t.Errorf("%d more, with as many offers not answered", n)
	}
	giveUp(carrierLanes)
	if n := offer(); n != 0 {
		t.Errorf("%d beyond %d offers", n, carrierStreams)
	}
	if !c.owes() || offer() != 1 {
		t.Error("a stream that has come makes no room")
	}
	c.give()
	c.owed = slices.Repeat([]time.Time{time.Now().Add(-owedTime - time.Second)}, carrierStreams)
	if n := offer(); n != carrierLanes || len(c.owed) != carrierLanes {
		t.Errorf("%d lanes after a minute, %d offers", n, len(c.owed))
	}
	for c.owes() {
	}
	if c.lanes != carrierLanes {
		t.Errorf("%d lanes when each has come", c.lanes)
	}
}
