package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// What a person sees.
//
// stdout is for data, stderr for people. A line for people begins with
// "portal: ", is lower-case and ends without a full stop; an error brings its
// code and a remedy. Text that a peer chose is printed with everything escaped
// that is not printable, and cut to peerText bytes.

// A session is one run of the command: its three streams, its environment and
// what stood behind `--`.
type session struct {
	stdin  io.Reader
	stdout io.Writer
	stderr *lines
	env    environment
	after  []string // behind --; nil when there was none
	json   bool     // -o json
	events *lines   // events of a long-running command as JSON lines; nil: none
	log    *slog.Logger
	room   room
}

// environment is the process's, as os.Environ gives it.
type environment []string

// lookup returns the last value of the name, as the C library and Go do.
func (e environment) lookup(name string) (string, bool) {
	for i := len(e) - 1; i >= 0; i-- {
		if k, v, ok := strings.Cut(e[i], "="); ok && k == name {
			return v, true
		}
	}
	return "", false
}

func (e environment) get(name string) string {
	v, _ := e.lookup(name)
	return v
}

// say prints one line for people.
func (s *session) say(format string, args ...any) {
	s.line("portal: " + fmt.Sprintf(format, args...))
}

func (s *session) line(text string) {
	s.stderr.Write([]byte(text + "\n"))
}

// print writes data to stdout.
func (s *session) print(format string, args ...any) error {
	_, err := fmt.Fprintf(s.stdout, format, args...)
	if err != nil {
		return fmt.Errorf("writing to stdout: %w", err)
	}
	return nil
}

// document writes one JSON document to stdout.
func (s *session) document(v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return s.print("%s\n", b)
}

// An event is one change of a long-running command, as `-o json` prints it: one
// line on stdout, fields that do not apply left out.
type event struct {
	Time    time.Time `json:"time"`
	Event   string    `json:"event"`             // listening, waiting, refused, ready, draining, ended
	Role    string    `json:"role"`              // authority, outlet, inlet
	Name    string    `json:"name,omitempty"`    // the outlet's
	ID      string    `json:"id,omitempty"`      // authority, ready: its identifier
	Address []string  `json:"address,omitempty"` // listening: the real ones
	Via     string    `json:"via,omitempty"`     // ready: the way
	Absent  []string  `json:"absent,omitempty"`  // ready: ways that are not there, and why
	Peer    string    `json:"peer,omitempty"`    // ready: the other side's identifier
	Member  string    `json:"member,omitempty"`  // ready: the name in the peer's credential
	Target  string    `json:"target,omitempty"`  // outlet, ready
	Answer  string    `json:"answer,omitempty"`  // what the target said when it was dialled at start
	Reason  string    `json:"reason,omitempty"`  // waiting, refused, ended
	Code    string    `json:"code,omitempty"`    // refused: PORTAL-E…
	Next    float64   `json:"next_try_seconds,omitempty"`
	Streams int       `json:"streams,omitempty"` // draining
}

// tell prints a change of a long-running command: the line for people, and the
// event when they were asked for. It never waits for whoever reads.
func (s *session) tell(ev event, format string, args ...any) {
	s.say(format, args...)
	if s.events == nil {
		return
	}
	ev.Time = time.Now().UTC()
	b, err := json.Marshal(ev)
	if err != nil {
		s.log.Error("writing an event", "error", err)
		return
	}
	s.events.Write(append(b, '\n'))
}

// peerText is how much of a text that a peer chose is printed.
const peerText = 256

// fromPeer makes a text that a peer chose fit to print: bounded, escaped, and
// unable to pass for a state line.
func fromPeer(text string) string {
	if len(text) > peerText {
		cut := peerText
		for cut > 0 && !utf8.RuneStart(text[cut]) {
			cut--
		}
		text = text[:cut] + "…"
	}
	return unready(plain(text))
}

// plain escapes what is not printable: control characters, the terminal's
// escape sequences, bidirectional overrides, invalid UTF-8.
func plain(text string) string {
	if strings.IndexFunc(text, unprintable) < 0 && utf8.ValidString(text) {
		return text
	}
	var b strings.Builder
	for i, r := range text {
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(text[i:], "\uFFFD"):
			fmt.Fprintf(&b, `\x%02x`, text[i])
		case unprintable(r):
			q := strconv.QuoteRuneToASCII(r)
			b.WriteString(q[1 : len(q)-1])
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) && r != '\t' }

var ready = regexp.MustCompile(`\bready\b`)

// unready keeps the word "ready" for the one line that means it: scripts wait
// for it.
func unready(text string) string { return ready.ReplaceAllString(text, "READY") }

// count is "1 stream", "2 streams".
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.Itoa(n) + " " + noun + "s"
}

// seconds is a duration as state lines print it: "4s", "0.5s". One that is not
// over at once is never "0s".
func seconds(d time.Duration) string {
	if tenths := d.Round(100 * time.Millisecond); d > 0 && tenths < time.Second {
		return fmt.Sprintf("%.1fs", max(tenths.Seconds(), 0.1))
	}
	return d.Round(time.Second).String()
}
