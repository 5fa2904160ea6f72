package relay

import (
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
)

// What a close has to say waits for the session, which may be stuck.
func TestCloseOfALaneInAStuckCarrierFreesItsReaderFirst(t *testing.T) {
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
	closed, read := make(chan struct{}), make(chan struct{})
	c := &carried{Stream: y}
	go func() {
		io.ReadAll(c)
		close(read)
	}()
	go func() {
		c.Close()
		close(closed)
	}()
	select {
	case <-read:
	case <-time.After(5 * time.Second): // a third of what a session is given to write
		t.Error("the reader waits for what the close has to say")
	}
	session.Close()
	<-closed
	<-read
}
