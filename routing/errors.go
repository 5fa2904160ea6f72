package routing

import (
	"context"
	"errors"
	"fmt"
)

// Why a message was not delivered or not answered. They come wrapped; compare with errors.Is.
var (
	ErrNoActor     = errors.New("no such actor")
	ErrFull        = errors.New("mailbox is full")
	ErrCycle       = errors.New("actors wait for one another")
	ErrRefused     = errors.New("refused")
	ErrUnreachable = errors.New("unreachable")
	ErrTimeout     = errors.New("timed out")
	ErrStopped     = errors.New("stopped")
)

// ErrTaken is what Spawn returns for an address that has an actor.
var ErrTaken = errors.New("address is taken")

var (
	errNoRoute = fmt.Errorf("%w: it has no onward route", ErrUnreachable)
	errTooFar  = fmt.Errorf("%w: delivered %d times", ErrRefused, MaxHops)
	errQueued  = errors.New("it is in a mailbox already")
)

// reasons are the errors that travel between nodes; the code on the wire is the index.
var reasons = [...]error{1: ErrNoActor, 2: ErrFull, 3: ErrCycle, 4: ErrRefused, 5: ErrUnreachable, 6: ErrTimeout, 7: ErrStopped}

// reasonCode returns the code of the error that err wraps.
func reasonCode(err error) byte {
	for code, reason := range reasons {
		if reason != nil && errors.Is(err, reason) {
			return byte(code)
		}
	}
	return 5
}

// reasonOf returns the error of a code.
func reasonOf(code byte) error {
	if code == 0 || int(code) >= len(reasons) {
		return ErrUnreachable
	}
	return reasons[code]
}

// A DeliveryError says which address a message did not reach and why: Err wraps one of the errors above.
type DeliveryError struct {
	To  Address
	Err error
}

func (e *DeliveryError) Error() string {
	if e.To == "" {
		return "delivering a message: " + e.Err.Error()
	}
	return "delivering a message to " + e.To.String() + ": " + e.Err.Error()
}

func (e *DeliveryError) Unwrap() error { return e.Err }

// A PanicError is what stopped an actor whose worker panicked.
type PanicError struct {
	Value any    // what was given to panic; nil when the worker called runtime.Goexit
	Stack []byte // of the panicking goroutine, for the log; nil after runtime.Goexit
}

func (e *PanicError) Error() string {
	if e.Value == nil {
		return "worker called runtime.Goexit"
	}
	return fmt.Sprintf("worker panicked: %v", e.Value)
}

// Unwrap returns the panic's value when it was an error.
func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

// ended says why the wait under ctx is over: ErrStopped, ErrTimeout, or the cause of its cancellation.
func ended(ctx context.Context) error {
	cause := context.Cause(ctx)
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("%w: %w", ErrTimeout, cause)
	}
	return cause
}
