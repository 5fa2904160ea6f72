package main

import (
	"strings"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/internal/stream"
)

// A teller prints what a long-running command is doing, one line for each
// change. Its methods may be called at once and never wait.
type teller struct {
	s          *session
	role, name string

	mu       sync.Mutex
	last     string // without the time of the next try
	notified bool
}

func (s *session) teller(role, name string) *teller { return &teller{s: s, role: role, name: name} }

func (t *teller) event(kind string) event { return event{Event: kind, Role: t.role, Name: t.name} }

// news reports whether the line differs from the one before.
func (t *teller) news(line string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if line == t.last {
		return false
	}
	t.last = line
	return true
}

func (t *teller) head() string { return job{role: t.role, name: t.name}.head() }

func (t *teller) listening(addrs []string) {
	ev := t.event("listening")
	ev.Address = addrs
	t.s.tell(ev, "%s listening on %s", t.head(), unready(list(addrs)))
}

func (t *teller) waiting(reason error, next time.Duration) {
	text := reasonText(reason)
	if !t.news("waiting: " + text) {
		return
	}
	ev := t.event("waiting")
	ev.Reason, ev.Next = text, next.Seconds()
	if next > 0 {
		t.s.tell(ev, "%s waiting: %s; next try in %s", t.head(), text, seconds(next))
		return
	}
	t.s.tell(ev, "%s waiting: %s", t.head(), text)
}

func (t *teller) refused(reason error) {
	text := reasonText(reason)
	if !t.news("refused: " + text) {
		return
	}
	ev := t.event("refused")
	f := classify(reason)
	ev.Reason, ev.Code = text, f.code.String()
	t.s.tell(ev, "%s refused: %s (%s)", t.head(), text, f.code)
}

// ready prints the line that scripts wait for; text begins with "ready", or with
// the words that stand before it. The word stands there once.
func (t *teller) ready(ev event, text string) {
	if !t.news(text) {
		return
	}
	ev.Event, ev.Role, ev.Name = "ready", t.role, t.name
	before, after, _ := strings.Cut(text, "ready")
	t.s.tell(ev, "%s %sready%s", t.head(), unready(before), unready(after))
	t.mu.Lock()
	first := !t.notified
	t.notified = true
	t.mu.Unlock()
	if first {
		t.s.notify("READY=1")
	}
}

// reasonText is an error on one line, fit to print: some of it may come from a
// peer. The word of the state stands before it already.
func reasonText(err error) string {
	text := strings.TrimPrefix(classify(err).Error(), stream.CodeRefused.String()+": ")
	return fromPeer(strings.ReplaceAll(text, "\n", "; "))
}

// list is "a", "a and b", "a, b and c".
func list(words []string) string {
	switch n := len(words); n {
	case 0:
		return ""
	case 1:
		return words[0]
	default:
		return strings.Join(words[:n-1], ", ") + " and " + words[n-1]
	}
}
