//go:build measure && unix

package main

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"syscall"
)

// A build with the tag measure, which no release has, tells tests/bench what it holds and does:
//
//	SIGUSR1   collect garbage, then print `measure: N heap=BYTES stacks=BYTES goroutines=COUNT`
//	SIGUSR2   begin a CPU profile and print `measure: N profiling`; the next one ends it and prints
//	          `measure: N profile FILE`, a file in MEASURE_DIR, or in the working directory
//
// N counts the answers of a process from 1, so that whoever asks can tell a new one from an old.
func init() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2)
	go func() { // to the end of the process
		var profile *os.File
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

// toggle ends the profile under way, or begins one.
func toggle(profile *os.File, n int) (*os.File, string) {
	if profile != nil {
		pprof.StopCPUProfile()
		if err := profile.Close(); err != nil {
			return nil, "failed: " + err.Error()
		}
		return nil, "profile " + profile.Name()
	}
	f, err := os.Create(filepath.Join(os.Getenv("MEASURE_DIR"), fmt.Sprintf("portal-%d-%d.pprof", os.Getpid(), n)))
	if err == nil {
		err = pprof.StartCPUProfile(f)
	}
	if err != nil {
		return nil, "failed: " + err.Error()
	}
	return f, "profiling"
}
