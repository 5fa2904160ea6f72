package main

import (
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"
)

// logHeld is how many bytes of lines wait for a slow reader of stderr: enough
// for some thousand lines, and no more memory than one busy stream's.
const logHeld = 1 << 20

// logFlush is how long the end of the process waits for that reader.
const logFlush = time.Second

// lines writes whole lines to w from a goroutine of its own, so that whoever
// logs never waits for whoever reads. What does not fit into logHeld bytes is
// dropped, counted and said.
type lines struct {
	w    io.Writer
	lost func(n int) []byte // the line that says so

	mu      sync.Mutex
	held    []byte
	dropped int
	closed  bool
	asked   []chan struct{} // by Flush; closed when what was held is written
	wake    chan struct{}   // one slot: there is something to write, or the end
	done    chan struct{}
}

func newLines(w io.Writer, lost func(n int) []byte) *lines {
	l := &lines{w: w, lost: lost, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go l.run()
	return l
}

// Write takes one or more whole lines; it copies them and never waits.
func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	switch {
	case l.closed || len(l.held)+len(b) > logHeld:
		l.dropped++
	default:
		l.held = append(l.held, b...)
	}
	l.mu.Unlock()
	l.poke()
	return len(b), nil
}

func (l *lines) poke() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

func (l *lines) run() {
	defer close(l.done)
	var spare []byte
	for range l.wake {
		l.mu.Lock()
		b, dropped, closed, asked := l.held, l.dropped, l.closed, l.asked
		l.held, l.dropped, l.asked = spare[:0], 0, nil
		l.mu.Unlock()
		if len(b) > 0 {
			l.w.Write(b)
		}
		if dropped > 0 {
			l.w.Write(l.lost(dropped))
		}
		for _, written := range asked {
			close(written)
		}
		spare = b
		if closed {
			return
		}
	}
}

// Flush returns when what is held is written, logFlush at most. Others may write
// meanwhile; the lines are not closed.
func (l *lines) Flush() {
	written := make(chan struct{})
	l.mu.Lock()
	l.asked = append(l.asked, written)
	l.mu.Unlock()
	l.poke()
	t := time.NewTimer(logFlush)
	defer t.Stop()
	select {
	case <-written:
	case <-t.C:
	}
}

// Close writes what is held. It gives up after logFlush: a reader that does not
// read must not keep the process from ending.
func (l *lines) Close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.poke()
	t := time.NewTimer(logFlush)
	defer t.Stop()
	select {
	case <-l.done:
	case <-t.C:
	}
}

// lostLines is what stderr says of lines that were dropped.
func lostLines(n int) []byte {
	return fmt.Appendf(nil, "portal: %s dropped: stderr is read too slowly\n", count(n, "line"))
}

// lostEvents is what stdout says of events that were dropped.
func lostEvents(n int) []byte {
	return fmt.Appendf(nil, `{"event":"dropped","lines":%d}`+"\n", n)
}

// newLog makes the logger: text on a terminal and JSON otherwise unless format
// says which.
func newLog(w io.Writer, terminal bool, level, format string) (*slog.Logger, error) {
	var o slog.HandlerOptions
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fail(codeUsage, "one of debug, info, warn, error", "--log-level %q is no level", plain(level))
	}
	o.Level = l
	switch format {
	case "":
		if !terminal {
			return slog.New(slog.NewJSONHandler(w, &o)), nil
		}
		return slog.New(slog.NewTextHandler(w, &o)), nil
	case "text":
		return slog.New(slog.NewTextHandler(w, &o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, &o)), nil
	}
	return nil, fail(codeUsage, "text or json", "--log-format %q is no format", plain(format))
}
