package channel

import (
	"context"
	"errors"
	"net"
	"runtime"
)

// A gate bounds how many responders compute at once. Anybody can send first messages,
// and each costs a fifth of a millisecond: without a gate a flood of them takes the
// turns of the channels that are there on every core.
type gate chan struct{}

var (
	// firsts are answers to message 1. Half of the cores is theirs at most.
	firsts = make(gate, max(runtime.GOMAXPROCS(0)/2, 1))
	// lasts are verifications of message 3 and of a credential, of those whose message
	// 2 arrived. They do not queue behind the others.
	lasts = make(gate, max(runtime.GOMAXPROCS(0)/2, 1))
)

// compute runs f on a goroutine of its own when it is its turn: the arithmetic makes a
// stack of it that whoever goes on to wait for the other end, or serves the channel,
// would keep.
func (o *opening) compute(g gate, f func() error) error {
	select {
	case g <- struct{}{}:
	case <-o.ctx.Done():
		return lost(context.Cause(o.ctx))
	}
	// Nothing is computed for a lane that was given up meanwhile.
	if err := o.lane.SetDeadline(o.deadline); errors.Is(err, net.ErrClosed) || o.ctx.Err() != nil {
		<-g
		return lost(errors.Join(err, o.ctx.Err()))
	}
	done := make(chan error, 1)
	go func() {
		defer func() { <-g }()
		done <- f()
	}()
	return <-done
}
