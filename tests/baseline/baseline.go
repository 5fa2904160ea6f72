// Package baseline tells whether something has come back to what it was: the goroutines, descriptors and
// memory of this process, or the descriptors, threads, children and memory of another.
package baseline

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// lookEvery is how often what has not come back yet is looked at again: there is no event for it.
const lookEvery = 20 * time.Millisecond

// Measure is what a process has at a moment.
type Measure struct {
	PID         int // 0: this process
	Goroutines  int // this process's only
	Heap        int // bytes that are reachable; this process's only
	Descriptors int
	Threads     int // another's only, as what follows
	Children    int // dead ones that nobody has waited for among them
	Resident    int // bytes of memory
}

// Here measures this process. It collects garbage first.
func Here() (Measure, error) {
	runtime.GC()
	runtime.GC() // what finalizers and pools gave up in the first
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	m := Measure{Goroutines: runtime.NumGoroutine(), Heap: int(mem.HeapAlloc)}
	fds, err := os.ReadDir("/proc/self/fd")
	m.Descriptors = len(fds) - 1 // less the one that reads them
	return m, err
}

// Of measures another process.
func Of(pid int) (m Measure, err error) {
	m.PID = pid
	proc := fmt.Sprintf("/proc/%d/", pid)
	fds, err := os.ReadDir(proc + "fd")
	if err != nil {
		return m, err
	}
	m.Descriptors = len(fds)
	tasks, err := os.ReadDir(proc + "task")
	if err != nil {
		return m, err
	}
	m.Threads = len(tasks)
	statm, err := os.ReadFile(proc + "statm")
	if err != nil {
		return m, err
	}
	var size int
	if _, err := fmt.Sscan(string(statm), &size, &m.Resident); err != nil {
		return m, fmt.Errorf("%sstatm: %w", proc, err)
	}
	m.Resident *= os.Getpagesize()
	children, err := filepath.Glob(proc + "task/*/children")
	if err != nil {
		return m, err
	}
	for _, file := range children {
		if b, err := os.ReadFile(file); err == nil { // else the thread has ended
			m.Children += len(strings.Fields(string(b)))
		}
	}
	return m, nil
}

// now measures the same process again.
func (m Measure) now() (Measure, error) {
	if m.PID == 0 {
		return Here()
	}
	return Of(m.PID)
}

// Slack is how much more there may be, for what comes and goes by itself. Zero is none, but the memory
// and the threads of Go's runtime never come back exactly: they are asked only where their slack is set.
type Slack struct{ Goroutines, Heap, Descriptors, Threads, Children, Resident int }

// Back waits until the process has no more than it had at m, but for the slack, and gives what it has
// then. It fails, naming what is too much, when ctx ends first.
func (m Measure) Back(ctx context.Context, s Slack) (Measure, error) {
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	for {
		now, err := m.now()
		if err != nil {
			return now, fmt.Errorf("measuring process %d: %w", m.PID, err)
		}
		much := m.excess(now, s)
		if much == "" {
			return now, nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return now, fmt.Errorf("process %d has not come back: %s: %w", m.PID, much, context.Cause(ctx))
		}
	}
}

func (m Measure) excess(now Measure, s Slack) string {
	var much []string
	for _, c := range []struct {
		what               string
		before, now, slack int
		asked              bool
	}{
		{"goroutines", m.Goroutines, now.Goroutines, s.Goroutines, true},
		{"descriptors", m.Descriptors, now.Descriptors, s.Descriptors, true},
		{"children", m.Children, now.Children, s.Children, true},
		{"bytes of heap", m.Heap, now.Heap, s.Heap, s.Heap > 0},
		{"threads", m.Threads, now.Threads, s.Threads, s.Threads > 0},
		{"bytes of resident memory", m.Resident, now.Resident, s.Resident, s.Resident > 0},
	} {
		if c.asked && c.now > c.before+c.slack {
			much = append(much, fmt.Sprintf("%d %s, %d before", c.now, c.what, c.before))
		}
	}
	return strings.Join(much, ", ")
}
