package relay

import (
	"io"
	"log/slog"
	"net"
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
