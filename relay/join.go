package relay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/internal/stream"
)

// lingerTime is how long the second direction of a lane may outlive the first. Both
// ends of a channel send a close within two seconds of one another.
const lingerTime = 5 * time.Second

// join copies both ways until both have ended, or ctx does, and owns both
// connections. An end of file on one side is passed on behind what was read; an
// error on one is a reset on both.
func join(ctx context.Context, a, b net.Conn) (err error) {
	cut := sync.OnceFunc(func() {
		stream.Abort(a)
		stream.Abort(b)
	})
	stop := context.AfterFunc(ctx, cut)
	defer stop()
	errs := make(chan error, 2)
	pass := func(to, from net.Conn) {
		err := forward(to, from)
		if err == nil {
			err = closeWrite(to)
		}
		if err != nil {
			cut() // frees the other direction, too
		}
		errs <- err
	}
	go pass(a, b)
	go pass(b, a)
	err = <-errs
	t := time.AfterFunc(lingerTime, cut)
	defer t.Stop()
	if second := <-errs; err == nil {
		err = second
	}
	switch {
	case !stop():
		return fmt.Errorf("the lane was cut: %w", context.Cause(ctx))
	case err != nil:
		return err
	}
	for _, c := range []net.Conn{a, b} {
		stream.Disarm(c)
		c.Close()
	}
	return nil
}

func closeWrite(c net.Conn) error {
	w, ok := c.(interface{ CloseWrite() error })
	if !ok {
		return errors.New("a lane's connection cannot end one direction")
	}
	return w.CloseWrite()
}
