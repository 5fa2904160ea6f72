package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/control"
	"github.com/portal-tunnel/portal/relay"
)

// `portal status` asks every process of a home what it is doing. Each listens on
// HOME/run/PID.sock and answers with what it told last: what a person reads here is
// what the process has printed, and no second opinion.

const (
	methodStatus = "status"
	// answerTime is how long a process may take to answer, which it does from memory.
	answerTime = 2 * time.Second
	// namesShown keeps a relay's answer far below what control takes at once, 1 MiB:
	// a name has some 150 bytes with its authority.
	namesShown = 1000
	// namesPrinted is what a table has room for.
	namesPrinted = 20
)

// States of a process besides those that it tells.
const (
	stateStarting = "starting"
	stateDraining = "draining"
	stateNoAnswer = "no answer"
)

func runDir(home string) string { return filepath.Join(home, "run") }

// An entry is one line of `portal status`: one thing that a process does.
type entry struct {
	t    *teller
	self *identity.Self

	// What does not apply is left out.
	address []string
	target  string
	command []string   // the target's
	streams func() int // now
	hosts   identity.ID
	relay   func() relay.Status
}

// visible lets `portal status` see this process, until gone is called. It stops
// nobody: a process that cannot be seen runs all the same, and says so. A nil home
// is that of --ephemeral.
func (s *session) visible(h *identity.Home, all ...entry) (gone func()) {
	if h == nil || len(all) == 0 {
		return func() {}
	}
	for _, e := range all {
		if len(e.address) > 0 {
			e.t.at(e.address)
		}
	}
	unseen := func(err error) { s.log.Warn("`portal status` does not see this process", "error", err) }
	ln, err := control.ListenAmong(runDir(h.Dir()))
	if err != nil {
		unseen(err)
		return func() {}
	}
	began := time.Now()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		err := control.Serve(ctx, ln, func(_ context.Context, method string, _ json.RawMessage) (any, error) {
			if method != methodStatus {
				return nil, fmt.Errorf("this process knows no %q", method)
			}
			docs := []processDocument{}
			for _, e := range all {
				docs = append(docs, e.document(began, time.Now()))
			}
			return docs, nil
		})
		if err != nil {
			unseen(err)
		}
	}()
	return func() { cancel(); <-done }
}

// statusDocument is what `portal status -o json` prints; docs/status.md says what
// the fields are.
type statusDocument struct {
	Home      string            `json:"home"`
	Self      *selfDocument     `json:"self,omitempty"`
	Hosts     *identity.ID      `json:"hosts_authority,omitempty"`
	Processes []processDocument `json:"processes"`
	Warning   string            `json:"warning,omitempty"`
}

type selfDocument struct {
	ID        identity.ID  `json:"id"`
	Name      string       `json:"name,omitempty"`
	Authority *identity.ID `json:"authority,omitempty"`
	Expires   *time.Time   `json:"credential_expires,omitempty"`
}

type processDocument struct {
	PID     int            `json:"pid"`
	Role    string         `json:"role,omitempty"`
	Name    string         `json:"name,omitempty"`
	Started *time.Time     `json:"started,omitempty"`
	Self    *selfDocument  `json:"self,omitempty"`
	State   string         `json:"state"`
	Since   *time.Time     `json:"since,omitempty"`
	Reason  string         `json:"reason,omitempty"`
	Code    string         `json:"code,omitempty"`
	Next    float64        `json:"next_try_seconds,omitempty"`
	Via     string         `json:"via,omitempty"`
	Absent  []string       `json:"absent,omitempty"`
	Peer    string         `json:"peer,omitempty"`
	Member  string         `json:"member,omitempty"`
	Address []string       `json:"address,omitempty"`
	Target  string         `json:"target,omitempty"`
	Answer  string         `json:"answer,omitempty"`
	Command string         `json:"command,omitempty"`
	Streams *int           `json:"streams,omitempty"`
	Hosts   *identity.ID   `json:"hosts_authority,omitempty"`
	Relay   *relayDocument `json:"relay,omitempty"`
}

type relayDocument struct {
	Members   int            `json:"members"`
	Strangers int            `json:"strangers"`
	Lanes     int            `json:"lanes"`
	Names     []nameDocument `json:"names"`
	More      int            `json:"more_names,omitempty"`
}

type nameDocument struct {
	Name      string      `json:"name"`
	Authority identity.ID `json:"authority"`
	Outlets   int         `json:"outlets"`
}

func documentOf(self *identity.Self) *selfDocument {
	doc := &selfDocument{ID: self.ID()}
	if c := self.Credential(); c != nil {
		doc.Name, doc.Authority, doc.Expires = c.Name(), &c.Issuer, moment(c.Expires)
	}
	return doc
}

func moment(t time.Time) *time.Time {
	t = t.UTC().Truncate(time.Millisecond)
	return &t
}

func authorityDocument(id identity.ID) *identity.ID {
	if id.IsZero() {
		return nil
	}
	return &id
}

// document is what the process says of an entry at this moment.
func (e entry) document(began, now time.Time) processDocument {
	told := e.t.condition()
	doc := processDocument{
		PID: os.Getpid(), Role: e.t.role, Name: e.t.name, Started: moment(began), Self: documentOf(e.self), Hosts: authorityDocument(e.hosts),
		State: told.Event, Since: moment(cmp.Or(told.since, began)), Reason: told.Reason, Code: told.Code,
		Via: told.Via, Absent: told.Absent, Peer: told.Peer, Member: told.Member, Address: told.Address, Target: e.target, Answer: told.Answer,
	}
	if left := told.next.Sub(now); left > 0 {
		doc.Next = left.Round(time.Millisecond).Seconds()
	}
	switch {
	case told.away:
		// Nothing is tried again, and nothing is reached by a way any more.
		doc.State, doc.Reason, doc.Code, doc.Next, doc.Absent = stateDraining, "", "", 0, nil
	case told.Event == "":
		doc.State = stateStarting
	}
	if len(e.command) > 0 { // and not its arguments, which may be anything
		doc.Command = e.command[0]
	}
	if e.streams != nil {
		n := e.streams()
		doc.Streams = &n
	}
	if e.relay != nil {
		doc.Relay = relayDocumentOf(e.relay())
	}
	return doc
}

func relayDocumentOf(st relay.Status) *relayDocument {
	doc := &relayDocument{Members: st.Members, Strangers: st.Strangers, Lanes: st.Lanes, Names: []nameDocument{}}
	for _, n := range st.Names[:min(len(st.Names), namesShown)] {
		doc.Names = append(doc.Names, nameDocument{n.Name, n.Authority, n.Outlets})
	}
	doc.More = len(st.Names) - len(doc.Names)
	return doc
}

type statusOptions struct {
	home string
	name string // only what has this name; empty: all
}

// runStatus changes nothing but the sockets of dead processes, which it removes.
func runStatus(ctx context.Context, s *session, o statusOptions) error {
	if o.name != "" {
		if err := validName(o.name); err != nil {
			return err
		}
	}
	h, dir, err := s.existingHome(o.home)
	if err != nil {
		return err
	}
	doc := statusDocument{Home: dir, Processes: []processDocument{}}
	if h != nil {
		if err := doc.who(h); err != nil {
			return err
		}
		var dead bool
		if doc.Processes, dead, err = askAmong(ctx, runDir(dir)); err != nil {
			return err
		}
		if dead {
			if err := control.Sweep(runDir(dir)); err != nil {
				s.log.Warn("sockets of dead processes stay", "error", err)
			}
		}
	}
	if err := control.FitsAmong(runDir(dir)); err != nil {
		doc.Warning = fmt.Sprintf("what runs on this home may not be seen: %v", err)
	}
	// One that does not answer may be the one that is asked for.
	doc.Processes = slices.DeleteFunc(doc.Processes, func(p processDocument) bool {
		return o.name != "" && p.Name != o.name && p.State != stateNoAnswer
	})
	if s.json {
		err = s.document(doc)
	} else {
		err = s.showStatus(&doc, h != nil, o.name)
	}
	if err == nil && slices.ContainsFunc(doc.Processes, func(p processDocument) bool { return p.State == stateNoAnswer }) {
		err = exitStatus(exitFailed)
	}
	return err
}

// who says whose home it is, and makes nothing.
func (d *statusDocument) who(h *identity.Home) error {
	self, err := h.Existing()
	if err != nil {
		return err
	}
	if self != nil {
		d.Self = documentOf(self)
		m, err := h.Membership()
		if err != nil {
			return err
		}
		if m != nil {
			d.Self.Name, d.Self.Authority = m.Name, &m.Authority
		}
	}
	switch a, err := h.Authority(false); {
	case err == nil:
		d.Hosts = authorityDocument(a.ID())
	case !errors.Is(err, identity.ErrNoAuthority):
		return err
	}
	return nil
}

// askAmong asks all processes at once, in order of role, name and number. dead says
// that there are sockets without one.
func askAmong(ctx context.Context, dir string) (docs []processDocument, dead bool, err error) {
	sockets, err := control.Among(dir)
	if err != nil {
		return nil, false, fmt.Errorf("looking for processes: %w", err)
	}
	answers := make([][]processDocument, len(sockets))
	var all sync.WaitGroup
	for i, socket := range sockets {
		all.Go(func() { answers[i] = askOne(ctx, socket) })
	}
	all.Wait()
	if ctx.Err() != nil {
		return nil, false, context.Cause(ctx)
	}
	docs = []processDocument{}
	for _, a := range answers {
		docs, dead = append(docs, a...), dead || a == nil
	}
	roles := []string{"authority", "relay", "outlet", "inlet", "connect"}
	place := func(p processDocument) int {
		if i := slices.Index(roles, p.Role); i >= 0 {
			return i
		}
		return len(roles)
	}
	slices.SortStableFunc(docs, func(a, b processDocument) int {
		return cmp.Or(cmp.Compare(place(a), place(b)), cmp.Compare(a.Name, b.Name), cmp.Compare(a.PID, b.PID))
	})
	return docs, dead, nil
}

// askOne is nil when there is no process behind the socket. It says `no answer` of
// one that hangs, and of one that cannot be understood.
func askOne(ctx context.Context, socket control.Socket) []processDocument {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	docs := []processDocument{}
	var told *control.Error
	err := control.Call(ctx, socket.Path, methodStatus, nil, &docs)
	if err != nil && !late(ctx) && !errors.As(err, &told) {
		docs = []processDocument{} // it may have ended in between; then it is not there now
		err = control.Call(ctx, socket.Path, methodStatus, nil, &docs)
	}
	switch {
	case err == nil:
		return docs
	case errors.Is(err, control.ErrNobody):
		return nil
	}
	doc := processDocument{PID: socket.PID, State: stateNoAnswer, Reason: reasonText(err)}
	if late(ctx) {
		doc.Reason = "it has not answered within " + spaced(answerTime)
	}
	return []processDocument{doc}
}

// showStatus prints whose home it is and a table of what runs on it.
func (s *session) showStatus(doc *statusDocument, made bool, name string) error {
	if err := s.print("%s", doc.head(time.Now())); err != nil {
		return err
	}
	if len(doc.Processes) > 0 {
		if err := s.print("%s", table(doc.Processes, time.Now())); err != nil {
			return err
		}
	}
	what := "nothing"
	if name != "" {
		what = "no " + name
	}
	switch {
	case !made:
		s.say("nothing runs on %s: there is no such home", plain(doc.Home))
	case len(doc.Processes) == 0:
		s.say("%s runs on %s", what, plain(doc.Home))
	}
	if doc.Warning != "" {
		s.say("warning: %s", plain(doc.Warning))
	}
	return nil
}

// head says whose home it is.
func (d *statusDocument) head(now time.Time) string {
	var who []string
	if self := d.Self; self != nil {
		text := fmt.Sprintf("%s (%s)", memberName(self.Name), self.ID.Short())
		if self.Authority == nil {
			text = fmt.Sprintf("%s, no member of an authority yet", self.ID.Short())
		} else {
			text += " of authority " + self.Authority.Short()
		}
		switch {
		case self.Expires == nil:
		case now.Before(*self.Expires):
			text += ", credential until " + when(*self.Expires)
		default:
			text += ", credential expired at " + when(*self.Expires)
		}
		who = append(who, text)
	}
	if d.Hosts != nil {
		who = append(who, "holds authority "+d.Hosts.Short())
	}
	if len(who) == 0 {
		return "home " + plain(d.Home) + "\n"
	}
	return strings.Join(who, "; ") + "\nhome " + plain(d.Home) + "\n"
}

// table has a line for each process in columns, the widest last, and below it,
// indented, what has no column.
func table(docs []processDocument, now time.Time) string {
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ROLE\tNAME\tSTATE\tSTREAMS\tPID\tPEER\tWAY")
	for _, p := range docs {
		streams := ""
		if p.Streams != nil {
			streams = strconv.Itoa(*p.Streams)
		}
		peer := p.Member
		if id, err := identity.ParseID(p.Peer); peer == "" && err == nil {
			peer = id.Short()
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", cell(p.Role), cell(p.Name), cell(p.State), cell(streams), p.PID, cell(peer), cell(p.Via))
	}
	w.Flush()
	head, rows, _ := strings.Cut(b.String(), "\n")
	out := head + "\n"
	i := 0
	for row := range strings.Lines(rows) {
		out += row
		for _, line := range docs[i].details(now) {
			out += "        " + line + "\n"
		}
		i++
	}
	return out
}

// details are what has no column. All of it may come from a peer.
func (p processDocument) details(now time.Time) (lines []string) {
	add := func(format string, args ...any) { lines = append(lines, fromPeer(fmt.Sprintf(format, args...))) }
	if p.Reason != "" {
		text := p.Reason
		if p.Code != "" {
			text += " (" + p.Code + ")"
		}
		lines = append(lines, fromPeer(text))
		if p.State != stateNoAnswer {
			text = "for " + seconds(sinceFrom(p.Since, now))
			if p.Next > 0 {
				text += "; next try in " + seconds(time.Duration(p.Next*float64(time.Second)))
			}
			lines = append(lines, text)
		}
	}
	for _, way := range p.Absent {
		add("not %s", way)
	}
	if len(p.Address) > 0 {
		add("listens on %s", list(p.Address))
	}
	switch {
	case p.Command != "":
		add("each stream runs %s", p.Command)
	case p.Target != "" && p.Answer != "":
		add("target %s; asked at start, it %s", p.Target, p.Answer)
	case p.Target != "":
		add("target %s", p.Target)
	}
	if p.Hosts != nil && p.Role != "authority" {
		add("hosts authority %s", p.Hosts.Short())
	}
	if r := p.Relay; r != nil {
		add("%s, %s, %s", count(r.Members, "member"), count(r.Strangers, "stranger"), count(r.Lanes, "lane"))
		if len(r.Names) > 0 {
			lines = append(lines, fromPeer("names: "+r.list()))
		}
	}
	return lines
}

// list is the names, each once, with the number of outlets where that is not one.
func (r *relayDocument) list() string {
	outlets := make(map[string]int)
	for _, n := range r.Names {
		outlets[n.Name] += n.Outlets
	}
	var words []string
	for _, name := range slices.Sorted(maps.Keys(outlets)) {
		if n := outlets[name]; n != 1 {
			name += " (" + count(n, "outlet") + ")"
		}
		words = append(words, name)
	}
	if more := len(words) - namesPrinted; more > 0 || r.More > 0 {
		words = append(words[:min(len(words), namesPrinted)], fmt.Sprintf("%d more", max(more, 0)+r.More))
	}
	return list(words)
}

func sinceFrom(since *time.Time, now time.Time) time.Duration {
	if since == nil {
		return 0
	}
	return max(now.Sub(*since), 0)
}
