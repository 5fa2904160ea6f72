package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// patience is what a load grants beyond its time before it calls a connection stuck.
const patience = 20 * time.Second

func dial(ctx context.Context, addr string, d time.Duration) (*net.TCPConn, error) {
	conn, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	// An interrupted run ends when its loads do: at the latest at this deadline.
	return conn.(*net.TCPConn), conn.SetDeadline(time.Now().Add(d + patience))
}

// streamsOf connects n times and runs each on its own connection at once; it returns when all have
// ended, with the time since they began together.
func streamsOf(ctx context.Context, addr string, n int, d time.Duration, each func(c *net.TCPConn) error) (time.Duration, error) {
	conns := make([]*net.TCPConn, 0, n)
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	for range n {
		c, err := dial(ctx, addr, d)
		if err != nil {
			return 0, err
		}
		conns = append(conns, c)
	}
	stop := context.AfterFunc(ctx, func() {
		for _, c := range conns {
			c.SetDeadline(time.Unix(1, 0))
		}
	})
	defer stop()
	errs := make([]error, n)
	var wg sync.WaitGroup
	start := time.Now()
	for i, c := range conns {
		wg.Go(func() { errs[i] = each(c) })
	}
	wg.Wait()
	return time.Since(start), errors.Join(errs...)
}

// A spread is of many durations.
type spread struct{ p50, p99 time.Duration }

func spreadOf(all []time.Duration) spread {
	slices.Sort(all)
	at := func(p float64) time.Duration { return all[int(p*float64(len(all)-1))] }
	return spread{at(.50), at(.99)}
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// roundTrips sends 64 bytes and waits for them, again and again, for d in each stream.
func roundTrips(ctx context.Context, addr string, streams int, d time.Duration) (spread, error) {
	const size = 64
	// Not counted: the first 20, or over a slow link those of the first tenth of the time.
	const warm = 20
	var mu sync.Mutex
	var all []time.Duration
	_, err := streamsOf(ctx, addr, streams, d, func(c *net.TCPConn) error {
		if _, err := c.Write([]byte{opEcho}); err != nil {
			return err
		}
		ask, answer := make([]byte, size), make([]byte, size)
		samples := make([]time.Duration, 0, 1<<16)
		begin := time.Now()
		for i := uint64(0); ; i++ {
			start := time.Now()
			if start.Sub(begin) > d && len(samples) > 0 {
				break
			}
			binary.BigEndian.PutUint64(ask, i) // an answer to another ask must not pass
			if _, err := c.Write(ask); err != nil {
				return err
			}
			if _, err := io.ReadFull(c, answer); err != nil {
				return fmt.Errorf("the echo: %w", err)
			}
			if !bytes.Equal(ask, answer) {
				return errors.New("the echo is not what was sent")
			}
			if i >= warm || start.Sub(begin) > d/10 {
				samples = append(samples, time.Since(start))
			}
		}
		mu.Lock()
		defer mu.Unlock()
		all = append(all, samples...)
		return nil
	})
	if err != nil {
		return spread{}, err
	}
	return spreadOf(all), nil
}

// beside runs round trips for d beside a bulk download, which begins before them and is still under
// way when they end.
func beside(ctx context.Context, addr string, d time.Duration) (spread, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	flows := make(chan struct{})
	ended := make(chan error, 1)
	go func() { ended <- flood(ctx, addr, flows, d) }()
	select {
	case err := <-ended:
		return spread{}, fmt.Errorf("the bulk beside: %w", err)
	case <-flows:
	}
	s, err := roundTrips(ctx, addr, 1, d)
	select {
	case early := <-ended:
		return spread{}, fmt.Errorf("the bulk beside ended early: %w", early)
	default:
	}
	cancel()
	<-ended
	return s, err
}

// flood downloads until ctx ends; the first bytes close flows.
func flood(ctx context.Context, addr string, flows chan<- struct{}, d time.Duration) error {
	_, err := streamsOf(ctx, addr, 1, d, func(c *net.TCPConn) error {
		c.SetLinger(0) // what is under way need not arrive
		if _, err := c.Write(binary.BigEndian.AppendUint64([]byte{opDown}, uint64(d+patience))); err != nil {
			return err
		}
		first, buf := true, make([]byte, bulkChunk)
		for {
			if _, err := c.Read(buf); err != nil {
				return err
			}
			if first {
				close(flows)
				first = false
			}
		}
	})
	return err
}

// A bulk is bytes that went through, and how long it took.
type bulk struct {
	bytes uint64
	took  time.Duration
}

func (b bulk) rate() float64 { return float64(b.bytes) / 1e6 / b.took.Seconds() } // MB/s

// up writes for d, ends its side, and waits for the server to say how many bytes it got: timed from
// the first byte to that answer, so that nothing in a buffer counts as sent.
func up(ctx context.Context, addr string, streams int, d time.Duration) (bulk, error) {
	var total atomic.Uint64
	took, err := streamsOf(ctx, addr, streams, d, func(c *net.TCPConn) error {
		if _, err := c.Write([]byte{opUp}); err != nil {
			return err
		}
		chunk := make([]byte, bulkChunk)
		sent := uint64(0)
		for end := time.Now().Add(d); time.Now().Before(end); {
			n, err := c.Write(chunk)
			sent += uint64(n)
			if err != nil {
				return err
			}
		}
		if err := c.CloseWrite(); err != nil {
			return err
		}
		answer, err := io.ReadAll(io.LimitReader(c, 9))
		if err != nil {
			return fmt.Errorf("the count after half-close: %w", err)
		}
		if len(answer) != 8 {
			return fmt.Errorf("the count after half-close has %d bytes, not 8", len(answer))
		}
		if got := binary.BigEndian.Uint64(answer); got != sent {
			return fmt.Errorf("sent %d bytes, the server got %d", sent, got)
		}
		total.Add(sent)
		return nil
	})
	return bulk{total.Load(), took}, err
}

// down reads what the server sends for d, to its end, whose last 8 bytes must say how many came
// before them.
func down(ctx context.Context, addr string, streams int, d time.Duration) (bulk, error) {
	var total atomic.Uint64
	took, err := streamsOf(ctx, addr, streams, d, func(c *net.TCPConn) error {
		if _, err := c.Write(binary.BigEndian.AppendUint64([]byte{opDown}, uint64(d))); err != nil {
			return err
		}
		got, last, err := readCounting(c)
		if err != nil {
			return err
		}
		if got < 8 || last != got-8 {
			return fmt.Errorf("read %d bytes to a clean end, of which the last 8 say %d", got, last)
		}
		total.Add(got)
		return nil
	})
	return bulk{total.Load(), took}, err
}

// readCounting reads to the end: how many bytes there were, and the last 8 of them as a number.
func readCounting(r io.Reader) (n, last uint64, err error) {
	const kept = 8
	buf := make([]byte, kept+bulkChunk) // the last 8 bytes read so far, then room for more
	for {
		m, err := r.Read(buf[kept:])
		copy(buf, buf[m:m+kept])
		n += uint64(m)
		if err == io.EOF {
			return n, binary.BigEndian.Uint64(buf), nil
		}
		if err != nil {
			return n, 0, err
		}
	}
}

// connections opens one after another in each stream: connect, ask, answer, end of both sides. It
// gives how many there were in a second.
// The server ends first, so that the port that waits (TIME_WAIT) is the listener's, and nobody
// runs out of ephemeral ones.
func connections(ctx context.Context, addr string, streams int, d time.Duration) (float64, error) {
	errs := make([]error, streams)
	var count atomic.Uint64
	var wg sync.WaitGroup
	start := time.Now()
	for i := range streams {
		wg.Go(func() {
			for time.Since(start) < d && ctx.Err() == nil && errs[i] == nil {
				errs[i] = connection(ctx, addr, d)
				count.Add(1)
			}
		})
	}
	wg.Wait()
	return float64(count.Load()) / time.Since(start).Seconds(), errors.Join(errs...)
}

func connection(ctx context.Context, addr string, d time.Duration) error {
	c, err := dial(ctx, addr, d)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write([]byte{opConnect}); err != nil {
		return err
	}
	answer, err := io.ReadAll(io.LimitReader(c, 2))
	if err != nil {
		return err
	}
	if string(answer) != string(rune(opConnect)) {
		return fmt.Errorf("asked %q, answered %q", opConnect, answer)
	}
	return nil
}
