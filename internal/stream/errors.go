package stream

import (
	"errors"
	"fmt"
	"net"
	"syscall"
)

// ErrAway is returned by Open when the other end takes no new streams.
var ErrAway = errors.New("the other end is going away and takes no new streams")

// errEnding is returned to a writer behind CloseWrite or Close.
var errEnding = fmt.Errorf("this direction of the stream has ended: %w", net.ErrClosed)

// errJoined is returned to a second Join.
var errJoined = errors.New("the stream is joined already")

// ResetError is what the reader and the writer of a stream get that did not
// end in good order. It is a connection reset for errors.Is.
type ResetError struct {
	Code   Code
	Reason string
	Local  bool // this end reset it
}

func (e *ResetError) Error() string {
	s := "stream reset: " + e.Code.String()
	if e.Reason != "" {
		s += ": " + e.Reason
	}
	return s
}

// Is makes errors.Is(err, syscall.ECONNRESET) true.
func (e *ResetError) Is(target error) bool { return target == syscall.ECONNRESET }

// Timeout and Temporary make it a net.Error, as other errors of a net.Conn.
func (e *ResetError) Timeout() bool   { return false }
func (e *ResetError) Temporary() bool { return false }

// RefusedError is the answer to an open that was not admitted.
type RefusedError struct {
	Code   Code
	Reason string
	Local  bool // by this end, which asked nobody
}

func (e *RefusedError) Error() string {
	switch {
	case e.Reason == "":
		return e.Code.String()
	case e.Code == CodeRefused:
		return e.Reason // it says so itself
	}
	return e.Code.String() + ": " + e.Reason
}

// Is makes a refused stream look like a refused connection.
func (e *RefusedError) Is(target error) bool { return target == syscall.ECONNREFUSED }

// ProtocolError ends the whole channel: the other end sent what no honest end sends.
type ProtocolError struct{ What string }

func (e *ProtocolError) Error() string { return "protocol error: " + e.What }

// AbuseError ends the whole channel: the other end used up a budget.
type AbuseError struct{ What string }

func (e *AbuseError) Error() string { return "budget used up: " + e.What }

// Abuse tells the channel which close code to give.
func (e *AbuseError) Abuse() bool { return true }
