package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/alloc"
	"github.com/portal-tunnel/portal/internal/authority"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/stream"
)

func TestPeerTextIsEscapedAndBounded(t *testing.T) {
	for text, want := range map[string]string{
		"db1":                    "db1",
		"naïve":                  "naïve",
		"a\x1b[2Jb":              `a\x1b[2Jb`,
		"a\nportal: b":           `a\nportal: b`,
		"a\u202eb":               `a\u202eb`,
		"\xff\xfe":               `\xff\xfe`,
		"db is ready":            "db is READY",
		"already enrolled":       "already enrolled",
		strings.Repeat("x", 999): strings.Repeat("x", peerText) + "…",
	} {
		if got := fromPeer(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func FuzzPeerText(f *testing.F) {
	f.Add("a\x1b[31m\xff\u202e")
	f.Fuzz(func(t *testing.T, text string) {
		defer alloc.Bound(t, len(text))()
		got := fromPeer(text)
		if !utf8.ValidString(got) || strings.ContainsAny(got, "\n\r\x1b") || ready.MatchString(got) || len(got) > 10*peerText {
			t.Errorf("%q: %q", text, got)
		}
	})
}

func TestHomeIsFoundInThisOrder(t *testing.T) {
	env := environment{"HOME=/u", "XDG_STATE_HOME=/x", "STATE_DIRECTORY=/s:/t"}
	for _, test := range []struct {
		flag string
		env  environment
		want string
	}{
		{"/f", env, "/f"},
		{"", env, "/s"},
		{"", env[:2], "/x/portal"},
		{"", env[:1], "/u/.local/state/portal"},
		{"", environment{"HOME=/u", "XDG_STATE_HOME=relative"}, "/u/.local/state/portal"},
	} {
		if got, err := homeDir(test.flag, test.env); err != nil || got != test.want {
			t.Errorf("%q %q: %q, %v", test.flag, test.env, got, err)
		}
	}
	var f *failure
	if _, err := homeDir("", nil); !errors.As(err, &f) || f.code != codeNoHome || f.code.exit() != exitUsage {
		t.Errorf("without any: %v", err)
	}
}

// stuck is a reader of stderr that does not read until it is let go.
type stuck struct {
	gate chan struct{}
	got  bytes.Buffer
}

func (s *stuck) Write(b []byte) (int, error) {
	<-s.gate
	return s.got.Write(b)
}

func TestSlowReaderOfTheLogLosesLinesAndStallsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &stuck{gate: make(chan struct{})}
		l := newLines(w, lostLines)
		line := []byte(strings.Repeat("x", 1023) + "\n")
		l.Write(line)
		synctest.Wait() // the first line is with the reader
		for range 2 * logHeld / len(line) {
			l.Write(line) // returns: it is what the test is about
		}
		close(w.gate)
		l.Close()
		if want := "portal: 1024 lines dropped"; !strings.Contains(w.got.String(), want) {
			t.Errorf("no %q in what was written", want)
		}
		if n := strings.Count(w.got.String(), "xxx\n"); n != 1025 {
			t.Errorf("%d lines arrived, want 1025", n)
		}
	})
}

func TestEndOfTheProcessDoesNotWaitForASlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &stuck{gate: make(chan struct{})}
		l := newLines(w, lostLines)
		l.Write([]byte("x\n"))
		begin := time.Now()
		l.Close()
		if took := time.Since(begin); took != logFlush {
			t.Errorf("closing took %s", took)
		}
		close(w.gate)
	})
}

func testSession(stderr *bytes.Buffer) *session {
	s := &session{stdin: strings.NewReader(""), stdout: new(bytes.Buffer), stderr: newLines(stderr, lostLines)}
	s.log, _ = newLog(s.stderr, false, "info", "")
	return s
}

// The life of a job that has streams: what it says and its exit status.
func TestSignalsDrainAndExitAsDocumented(t *testing.T) {
	type signal struct {
		after time.Duration
		sig   os.Signal
	}
	const grace = 25 * time.Second
	for _, test := range []struct {
		name    string
		streams int
		ends    time.Duration // when the streams end by themselves; 0: never
		signals []signal
		status  int
		took    time.Duration
		says    string
		hangup  bool // SIGHUP ends it
	}{
		{"idle, SIGTERM", 0, time.Nanosecond, []signal{{0, syscall.SIGTERM}}, 0, time.Nanosecond, "ended: terminated", false},
		{"idle, SIGINT", 0, time.Nanosecond, []signal{{0, syscall.SIGINT}}, 130, time.Nanosecond, "ended: interrupt", false},
		{"drained, SIGTERM", 1, 3 * time.Second, []signal{{0, syscall.SIGTERM}}, 0, 3 * time.Second, "draining 1 stream for 25 s; again to end now", false},
		{"drained, SIGINT", 2, 3 * time.Second, []signal{{0, syscall.SIGINT}}, 130, 3 * time.Second, "draining 2 streams for 25 s; again to end now", false},
		{"timed out, SIGTERM", 1, 0, []signal{{0, syscall.SIGTERM}}, 5, grace, "ended: 1 stream reset (PORTAL-E0501)", false},
		{"timed out, SIGINT", 1, 0, []signal{{0, syscall.SIGINT}}, 5, grace, "ended: 1 stream reset", false},
		{"second SIGINT", 1, 0, []signal{{0, syscall.SIGINT}, {time.Second, syscall.SIGINT}}, 130, time.Second, "ended: 1 stream reset", false},
		{"second SIGTERM", 1, 0, []signal{{0, syscall.SIGTERM}, {time.Second, syscall.SIGTERM}}, 5, time.Second, "ended: 1 stream reset", false},
		{"SIGTERM, then SIGINT", 1, 0, []signal{{0, syscall.SIGTERM}, {time.Second, syscall.SIGINT}}, 130, time.Second, "ended: 1 stream reset", false},
		{"SIGHUP of a terminal", 1, 3 * time.Second, []signal{{0, syscall.SIGHUP}}, 0, 3 * time.Second, "draining 1 stream", true},
		{"SIGHUP of a terminal, then of a shell", 1, 0, []signal{{0, syscall.SIGHUP}, {time.Second, syscall.SIGHUP}}, 5, time.Second, "ended: 1 stream reset", true},
		{"SIGHUP, then SIGTERM", 1, 3 * time.Second, []signal{{0, syscall.SIGHUP}, {time.Second, syscall.SIGTERM}}, 0, 4 * time.Second, "outlet db: nothing to read again", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var stderr bytes.Buffer
				s := testSession(&stderr)
				signals := make(chan os.Signal, 4)
				go func() {
					for _, g := range test.signals {
						time.Sleep(g.after)
						signals <- g.sig
					}
				}()
				begin := time.Now()
				err := s.govern(context.Background(), job{
					role: "outlet", name: "db", grace: grace,
					run:     func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
					streams: func() int { return test.streams },
					drain: func(ctx context.Context) int {
						if test.ends != 0 {
							select {
							case <-time.After(test.ends):
								return 0
							case <-ctx.Done():
							}
						}
						<-ctx.Done()
						return test.streams
					},
				}, signals, test.hangup)
				took := time.Since(begin)
				status := s.report(err)
				s.stderr.Close()
				if status != test.status || took != test.took {
					t.Errorf("exit %d after %s, want %d after %s", status, took, test.status, test.took)
				}
				if !strings.Contains(stderr.String(), test.says) {
					t.Errorf("stderr has no %q:\n%s", test.says, &stderr)
				}
			})
		})
	}
}

func TestJobThatFailsEndsTheProcess(t *testing.T) {
	var stderr bytes.Buffer
	s := testSession(&stderr)
	err := s.govern(context.Background(), job{role: "outlet", run: func(context.Context) error { return errors.New("the port is gone") }}, nil, false)
	if status := s.report(err); status != exitFailed {
		t.Errorf("exit %d", status)
	}
	s.stderr.Close()
	if !strings.Contains(stderr.String(), "portal: the port is gone (PORTAL-E0100)") {
		t.Errorf("stderr: %s", &stderr)
	}
}

func TestPingSaysWhatItWaitedFor(t *testing.T) {
	o := pingOptions{name: "db", timeout: 2 * time.Second}
	late := fmt.Errorf("waiting for the stream's answer: %w", context.DeadlineExceeded)
	for _, test := range []struct {
		err  error
		code code
		text string
	}{
		{o.unreached(inlet.State{}), codeUnreachable, "neither a channel nor a decision within 2s"},
		{o.unreached(inlet.State{Err: errors.New("no route")}), codeUnreachable, "no channel within 2s: no route"},
		{o.unreached(inlet.State{Err: late, Peer: new(identity.Peer)}), codeUnreachable, "no decision of its policy within 2s"},
		{o.silent(inlet.Probe{}, late), codeUnreachable, "no decision of its policy within 2s"},
		{o.silent(inlet.Probe{Answer: 1}, late), codeTargetSlow, "it lets this member in, and its target has not answered within 2s"},
	} {
		if f := classify(test.err); f.code != test.code || f.Error() != test.text || f.remedy == "" {
			t.Errorf("%s: %s; %s", f.code, f.Error(), f.remedy)
		}
	}
	told := &stream.RefusedError{Code: stream.CodeTargetTimeout}
	if err := o.silent(inlet.Probe{Answer: 1}, told); !errors.Is(err, error(told)) {
		t.Errorf("told in the last moment: %v", err)
	}
}

func TestTicketThatCannotBeRevokedEitherIsNamed(t *testing.T) {
	ticket := &identity.Ticket{Secret: identity.NewSecret(), Expires: time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)}
	ref := authority.Ref(ticket.Hash())
	var asked string
	err := takeBack(ticket, fmt.Errorf("writing to stdout: %w", syscall.ENOSPC), func(ref string) error {
		asked = ref
		return errors.New("the authority is gone")
	})
	f := classify(err)
	if asked != ref || f.code != codeFailed || !strings.Contains(f.Error(), "no space left on device; revoking it: the authority is gone") {
		t.Errorf("asked for %s; %s: %s", asked, f.code, f.Error())
	}
	for _, want := range []string{"portal ticket revoke " + ref, "2030-01-02T03:04:05Z"} {
		if !strings.Contains(f.remedy, want) {
			t.Errorf("the remedy has no %q: %s", want, f.remedy)
		}
	}
}

func TestAChannelThatBreaksIsUnreachable(t *testing.T) {
	for _, cause := range []error{channel.ErrCut, channel.ErrDead, fmt.Errorf("%w: %w", channel.ErrCut, syscall.ECONNRESET)} {
		if f := classify(fmt.Errorf("asking for the names: %w", cause)); f.code != codeUnreachable {
			t.Errorf("%v: %s", cause, f.code)
		}
	}
}

func TestRoomsAreLeftOutWhereAnErrorBegins(t *testing.T) {
	for text, want := range map[string]string{
		"identity: opening the home: x":                   "opening the home: x",
		"outlet db: channel: x":                           "outlet db: x",
		"identity: abac: x":                               "x",
		"enrolling: identity: stream: x: authority: y":    "enrolling: x: y",
		"opening the channel: x":                          "opening the channel: x",
		"lane: opening the stream: identity: x":           "lane: opening the stream: x",
		"open identity: no such file":                     "open identity: no such file",
		"asking the authority: stream: x":                 "asking the authority: x",
		"by a: no way\nidentity: by b: the channel: gone": "by a: no way\nby b: the channel: gone",
		"mychannel: x":                                    "mychannel: x",
		"via a:1: by relay a:1: a:1: refused":             "via a:1: by relay a:1: refused",
		"by [::1]:4000: [::1]:4000: refused":              "by [::1]:4000: refused",
		"by a:1: a:10: b: b: refused":                     "by a:1: a:10: b: b: refused",
	} {
		if got := spoken(errors.New(text)).Error(); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func TestPausesArePrintedAsTheyAre(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", time.Millisecond: "0.1s", 60 * time.Millisecond: "0.1s", 449 * time.Millisecond: "0.4s", 949 * time.Millisecond: "0.9s",
		950 * time.Millisecond: "1s", 1400 * time.Millisecond: "1s", 4 * time.Second: "4s", 90 * time.Second: "1m30s",
	} {
		if got := seconds(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
	if got := spaced(100 * time.Millisecond); got != "0.1 s" {
		t.Errorf("in a sentence: %q", got)
	}
}

// Whatever has that word for a name.
func TestWordForScriptsStandsOnceInItsLineAndInNoOther(t *testing.T) {
	for _, name := range []string{"db", "ready", "db-ready", "a/ready/b"} {
		var stderr bytes.Buffer
		s := testSession(&stderr)
		tell := s.teller("inlet", name)
		tell.listening([]string{"unix:/run/ready/s"})
		tell.waiting(errors.New("not ready"), time.Second)
		tell.refused(errors.New("not ready"))
		tell.ready(event{}, "ready direct ready.example.com:1 (ready, P)")
		j := job{role: "inlet", name: name}
		s.reload(j)
		j.reload = func() error { return nil }
		s.reload(j)
		j.run = func(ctx context.Context) error { <-ctx.Done(); return nil }
		j.streams, j.drain = func() int { return 1 }, func(context.Context) int { return 1 }
		signals := make(chan os.Signal, 1)
		signals <- syscall.SIGTERM
		s.govern(context.Background(), j, signals, false)
		s.stderr.Close()
		lines := strings.Split(strings.TrimSpace(stderr.String()), "\n")
		if len(lines) != 8 {
			t.Errorf("%d lines:\n%s", len(lines), &stderr)
		}
		for _, line := range lines {
			want := 0
			if strings.Contains(line, " ready direct ") {
				want = 1
			}
			if n := len(ready.FindAllString(line, -1)); n != want {
				t.Errorf("%d times in %q", n, line)
			}
		}
		if !strings.Contains(stderr.String(), "portal: inlet "+unready(name)+" ready direct READY.example.com:1 (READY, P)\n") {
			t.Errorf("stderr:\n%s", &stderr)
		}
	}
}

func TestEveryCodeIsExplainedAndLeadsToADocumentedExit(t *testing.T) {
	for c, text := range causes {
		if e := c.exit(); e < exitFailed || e > exitDrain {
			t.Errorf("%s: exit %d", c, e)
		}
		if text[0] == "" || text[1] == "" {
			t.Errorf("%s is not explained", c)
		}
	}
}

func TestDemoLeavesNothingBehind(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	demo := func() {
		var stdout, stderr bytes.Buffer
		if status := run(context.Background(), []string{"demo"}, strings.NewReader(""), &stdout, &stderr, nil); status != exitFine {
			t.Fatalf("exit %d\n%s%s", status, &stdout, &stderr)
		}
	}
	demo() // what the runtime keeps for good, such as the poller and the signals' goroutine
	goroutines, files := runtime.NumGoroutine(), openFiles(t)
	demo()
	limit := time.Now().Add(5 * time.Second)
	for runtime.NumGoroutine() > goroutines && time.Now().Before(limit) {
		runtime.Gosched() // a goroutine that was waited for may still be returning
	}
	if n := runtime.NumGoroutine(); n > goroutines {
		b := make([]byte, 1<<20)
		t.Errorf("%d goroutines, %d before:\n%s", n, goroutines, b[:runtime.Stack(b, true)])
	}
	// The relay keeps the pipes through which it splices in a pool that the collector empties.
	for openFiles(t) > files && time.Now().Before(limit) {
		runtime.GC()
	}
	if n := openFiles(t); n > files {
		t.Errorf("%d open files, %d before", n, files)
	}
	if left, err := os.ReadDir(tmp); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func openFiles(t *testing.T) int {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// The word stands in the line that scripts wait for, and in no other.
func TestNoExplanationSaysReady(t *testing.T) {
	for c, text := range causes {
		if ready.MatchString(text[0] + text[1]) {
			t.Errorf("%s: %q", c, text)
		}
	}
}

func TestTextOfAPeerAllocatesLittle(t *testing.T) {
	alloc.Hostile(t, func(b []byte) { fromPeer(string(b)) }, []byte("too many connections"), []byte("a\x1b[31m\xff\u202e"))
}
