//go:build measure && unix

package main

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"runtime/pprof"
	"syscall"
)

// A build with the tag measure, which no release has, tells tests/bench what it holds and does:
//
//	SIGUSR1   collect garbage, then print `measure: N heap=BYTES stacks=BYTES goroutines=COUNT`
//	SIGUSR2   begin a CPU profile and print `measure: N profiling`; the next one ends it and prints
//	          `measure: N profile allocations=COUNT bytes=BYTES waited=SECONDS in FILE`: what was allocated
//	          meanwhile, how long goroutines waited for mutexes, all together, and the profile, a
//	          file in MEASURE_DIR or in the working directory
//
// N counts the answers of a process from 1, so that whoever asks can tell a new one from an old.
func init() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2)
	go func() { // to the end of the process
		var profile *profiling
		for n := 1; ; n++ {
			answer := ""
			if sig := <-signals; sig == syscall.SIGUSR1 {
				answer = holdings()
			} else {
				profile, answer = toggle(profile, n)
			}
			fmt.Fprintf(os.Stderr, "measure: %d %s\n", n, answer)
		}
	}()
}

func holdings() string {
	runtime.GC()
	runtime.GC() // what a sync.Pool holds goes with the second
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return fmt.Sprintf("heap=%d stacks=%d goroutines=%d", m.HeapInuse, m.StackInuse, runtime.NumGoroutine())
}

// profiling is a profile under way, and what the process had spent when it began.
type profiling struct {
	*os.File
	at spent
}

// spent is what a process has allocated, and how long its goroutines have waited for mutexes.
type spent struct {
	allocations, bytes uint64
	waited             float64 // seconds
}

func spentSoFar() spent {
	waited := []metrics.Sample{{Name: "/sync/mutex/wait/total:seconds"}}
	metrics.Read(waited)
	var m runtime.MemStats // counts what is in the threads' caches, which metrics do not
	runtime.ReadMemStats(&m)
	return spent{m.Mallocs, m.TotalAlloc, waited[0].Value.Float64()}
}

// toggle ends the profile under way, or begins one.
func toggle(p *profiling, n int) (*profiling, string) {
	if p != nil {
		now := spentSoFar()
		pprof.StopCPUProfile()
		if err := p.Close(); err != nil {
			return nil, "failed: " + err.Error()
		}
		return nil, fmt.Sprintf("profile allocations=%d bytes=%d waited=%g in %s",
			now.allocations-p.at.allocations, now.bytes-p.at.bytes, now.waited-p.at.waited, p.Name())
	}
	f, err := os.Create(filepath.Join(os.Getenv("MEASURE_DIR"), fmt.Sprintf("portal-%d-%d.pprof", os.Getpid(), n)))
	if err == nil {
		err = pprof.StartCPUProfile(f)
	}
	if err != nil {
		return nil, "failed: " + err.Error()
	}
	return &profiling{f, spentSoFar()}, "profiling"
}
