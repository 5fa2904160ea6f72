package stream

import (
	"encoding/binary"
	"testing"

	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/routing"
)

// slow is a sink that calls meanwhile before it takes an end.
type slow struct {
	sink
	meanwhile func()
}

func (s *slow) Post(q *buffer.Queue, b *buffer.Buffer) error {
	if b.Bytes()[buffer.Prefix] == frameEnd {
		s.meanwhile()
	}
	return s.sink.Post(q, b)
}

// Whoever waits for a stream closes its channel next: an end that is not queued by
// then would be lost, and a complete stream would look cut at the other end.
func TestAStreamIsNotOverBeforeItsEndIsQueued(t *testing.T) {
	var node routing.Node
	over := &slow{sink: sink{control: make(map[uint64]bool)}}
	m := NewMux(&node, over, true, Limits{}, nil)
	c, err := m.Open(Header{Kind: Bytes, Name: "db"})
	if err != nil {
		t.Fatal(err)
	}
	frame := func(kind uint8) {
		if err := m.Frame(kind, 1, binary.BigEndian.AppendUint64(nil, 0)); err != nil {
			t.Fatal(err)
		}
	}
	isDone := func() bool {
		select {
		case <-c.Done():
			return true
		default:
			return false
		}
	}
	frame(frameOpened)
	over.meanwhile = func() {
		frame(frameEnd) // theirs comes now
		if isDone() || m.Streams() != 1 {
			t.Error("it is over, and its end is not queued")
		}
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if !isDone() || m.Streams() != 0 {
		t.Error("both ends are in, and it is not over")
	}
	m.Fail(errEnding)
	node.Close()
}
