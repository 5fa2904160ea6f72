package serving

import (
	"io"
	"net"
	"testing"
)

func TestCloseEndsConnectionsThatWaitAndTheirHandlers(t *testing.T) {
	begun, ended := make(chan struct{}), make(chan struct{})
	s, err := Listen("tcp", "127.0.0.1:0", func(c net.Conn) {
		close(begun)
		io.Copy(io.Discard, c) // of a client that says nothing
		close(ended)
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	<-begun
	s.Close()
	select {
	case <-ended:
	default:
		t.Error("Close returned before the handler did")
	}
	if late, _ := net.Pipe(); s.enter(late) {
		t.Error("a connection is let in behind Close")
	}
}
