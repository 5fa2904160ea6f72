package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// idleOpening is how many connections an idle load opens at once.
const idleOpening = 32

// A crowd is connections that have said one byte, got it back, and say nothing.
type crowd []*net.TCPConn

// gather opens n connections.
func gather(ctx context.Context, addr string, n int) (crowd, error) {
	all := make(crowd, n)
	errs := make([]error, idleOpening)
	var wg sync.WaitGroup
	for w := range idleOpening {
		wg.Go(func() {
			for i := w; i < n && errs[w] == nil; i += idleOpening {
				var err error
				if all[i], err = dial(ctx, addr, 0); err == nil {
					_, err = all[i].Write([]byte{opEcho})
				}
				if err == nil {
					err = answers(all[i], byte(i))
				}
				if err != nil {
					errs[w] = fmt.Errorf("stream %d of %d: %w", i+1, n, err)
				}
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		all.disperse()
		return nil, firstOf(errs)
	}
	return all, nil
}

func firstOf(errs []error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// answers sends a byte and wants it back.
func answers(c *net.TCPConn, b byte) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := c.Write([]byte{b}); err != nil {
		return err
	}
	var got [1]byte
	if _, err := io.ReadFull(c, got[:]); err != nil {
		return err
	}
	if got[0] != b {
		return errors.New("the echo is not what was sent")
	}
	return nil
}

// lives reports whether every one still answers.
func (all crowd) lives() error {
	for i, c := range all {
		if err := answers(c, byte(i)+1); err != nil {
			return fmt.Errorf("stream %d of %d, opened a while ago: %w", i+1, len(all), err)
		}
	}
	return nil
}

func (all crowd) disperse() {
	for _, c := range all {
		if c != nil {
			c.Close()
		}
	}
}

// crowdSize is how many streams there can be when a process has so many descriptors for each. Some
// it needs for itself, and stunnel keeps one in forty back.
func crowdSize(wanted, each int, limit uint64) int {
	return max(1, min(wanted, int(min(limit, 1<<30))*24/25/each))
}

func idleStreams(wanted, each int) int {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) != nil {
		return wanted
	}
	return crowdSize(wanted, each, limit.Cur)
}

// idle opens streams and gives what they cost all processes of a system, and each.
func idle(ctx context.Context, d *deployment, n int) (outcome, error) {
	before, err := d.look(ctx)
	if err != nil {
		return outcome{}, err
	}
	all, err := gather(ctx, d.Addr, n)
	if err != nil {
		return outcome{}, err
	}
	defer all.disperse()
	after, err := d.look(ctx)
	if err != nil {
		return outcome{}, err
	}
	if err := all.lives(); err != nil {
		return outcome{}, err
	}
	o := outcome{values: []float64{0, 0, float64(n)}}
	for i, p := range d.Parts {
		each := func(now, then float64) float64 { return (now - then) / float64(n) }
		memory, threads := each(after[i].memory, before[i].memory)/1024, after[i].threads-before[i].threads
		o.values[0] += memory
		o.values[1] += threads
		o.parts = append(o.parts, note{p.Name, "idle memory", memory}, note{p.Name, "idle threads", threads})
		if p.Measured {
			o.parts = append(o.parts,
				note{p.Name, "idle heap+stacks", each(after[i].heap+after[i].stacks, before[i].heap+before[i].stacks) / 1024},
				note{p.Name, "idle goroutines", each(after[i].goroutines, before[i].goroutines)})
		}
	}
	return o, nil
}

// seen is what a process has.
type seen struct {
	memory, threads float64
	holdings
}

// look looks at each of a system's processes. Those of portal have collected garbage before.
func (d *deployment) look(ctx context.Context) (all []seen, err error) {
	for _, p := range d.Parts {
		var s seen
		if p.Measured {
			if s.holdings, err = holdingsOf(ctx, p); err != nil {
				return nil, err
			}
		}
		if s.memory, s.threads, err = memory(p.Process.Pid()); err != nil {
			return nil, fmt.Errorf("looking at %s: %w", p.Name, err)
		}
		all = append(all, s)
	}
	return all, nil
}

// A note is a figure of one process.
type note struct {
	part, figure string
	value        float64
}
