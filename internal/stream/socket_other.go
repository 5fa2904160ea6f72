//go:build !linux

package stream

// maxWrite is how many frames of one lane read are delivered at once.
const maxWrite = 16

// Elsewhere there are no raw connections: see package socket.

func (r *reader) attempt(uintptr) bool { return true }

// A reset behind the peer's end shows with the next write to it.
func (r *reader) awaitReset() bool { return false }

// Not known here: a reset that a writer was told looks like an end to the reader.
func (*local) isReset() bool { return false }

type nowWriter struct{}

func (*nowWriter) init() {}

func (*local) writeNow([][]byte) (int, error) { return 0, nil }
