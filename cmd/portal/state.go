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
	quiet    bool   // what is told is kept, and not printed
	notified bool
	now      condition
}

// A condition is what was told last, for `portal status`, which may ask at any time.
// Addresses and the target's answer are kept when a later event has none.
type condition struct {
	event
	since time.Time // it is in this state
	next  time.Time // the next try; zero: not known
	away  bool      // draining, whatever is told
}

func (s *session) teller(role, name string) *teller { return &teller{s: s, role: role, name: name} }

func (t *teller) event(kind string) event { return event{Event: kind, Role: t.role, Name: t.name} }

// note keeps a state and reports whether it is news to print: whether its line differs
// from the one before.
func (t *teller) note(ev event, line string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now, before := time.Now(), t.now
	t.now.event, t.now.next = ev, time.Time{}
	if ev.Next > 0 {
		t.now.next = now.Add(time.Duration(ev.Next * float64(time.Second)))
	}
	if ev.Event != before.Event && !before.away {
		t.now.since = now
	}
	if ev.Address == nil {
		t.now.Address = before.Address
	}
	if ev.Answer == "" {
		t.now.Answer = before.Answer
	}
	if line == t.last {
		return false
	}
	t.last = line
	return !t.quiet
}

// hush says whether what is told from now on is only kept, for `portal status`.
func (t *teller) hush(quiet bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.quiet = quiet
}

func (t *teller) head() string { return job{role: t.role, name: t.name}.head() }

func (t *teller) listening(addrs []string) {
	ev := t.event("listening")
	ev.Address = addrs
	t.at(addrs)
	t.s.tell(ev, "%s listening on %s", t.head(), unready(list(addrs)))
}

func (t *teller) waiting(reason error, next time.Duration) {
	text := reasonText(reason)
	ev := t.event("waiting")
	ev.Reason, ev.Next = text, next.Seconds()
	if !t.note(ev, "waiting: "+text) {
		return
	}
	if next > 0 {
		t.s.tell(ev, "%s waiting: %s; next try in %s", t.head(), text, seconds(next))
		return
	}
	t.s.tell(ev, "%s waiting: %s", t.head(), text)
}

func (t *teller) refused(reason error) {
	text := reasonText(reason)
	ev := t.event("refused")
	f := classify(reason)
	ev.Reason, ev.Code = text, f.code.String()
	if !t.note(ev, "refused: "+text) {
		return
	}
	t.s.tell(ev, "%s refused: %s (%s)", t.head(), text, f.code)
}

// ready prints the line that scripts wait for; text begins with "ready", or with
// the words that stand before it. The word stands there once.
func (t *teller) ready(ev event, text string) {
	ev.Event, ev.Role, ev.Name = "ready", t.role, t.name
	if !t.note(ev, text) {
		return
	}
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

// at notes where the process listens.
func (t *teller) at(addrs []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.now.Address = addrs
}

// again notes when a refusal is tried again, which its line does not say.
func (t *teller) again(next time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.now.next = time.Now().Add(next)
}

func (t *teller) condition() condition {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.now
}

// draining is told when the process is going away. It stays so: what its parts
// still tell is about their end.
func (t *teller) draining() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.now.away {
		t.now.away, t.now.since = true, time.Now()
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
