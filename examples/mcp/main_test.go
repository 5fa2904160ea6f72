package main

import (
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestMain lets the test binary be the servers that the example starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-") {
		main()
		return
	}
	os.Exit(m.Run())
}

// TestAgentCallsToolsAndGuestIsRefused runs the example; it checks each line before printing it.
func TestAgentCallsToolsAndGuestIsRefused(t *testing.T) {
	others := runtime.NumGoroutine()
	var out strings.Builder
	err := run(t.Context(), &out)
	t.Logf("\n%s", &out)
	if err != nil {
		t.Fatal(err)
	}
	for _, proved := range []string{
		"stdio, 2026-07-28: connects", "stdio, 2025-11-25: connects", "two clients at once", "stdio: report sends 5 notes",
		"stdio: a report is given up", "has exited with status 0",
		"HTTP, 2026-07-28: connects", "HTTP, 2026-07-28: report sends 5 notes", "HTTP, 2026-07-28: a report is given up",
		"HTTP, 2025-11-25: connects in a session", "HTTP, 2025-11-25: a report is given up", "and the server told",
		"with Host: evil.example the inlet refuses: 403", "with Origin: http://evil.example the inlet refuses: 403",
		"its connection is reset", "the answer is 403", "no process was started for it",
	} {
		if !strings.Contains(out.String(), proved) {
			t.Errorf("no line %q", proved)
		}
	}
	for end := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > others; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines before, %d after:\n%s", others, runtime.NumGoroutine(), buf[:runtime.Stack(buf, true)])
		}
	}
}
