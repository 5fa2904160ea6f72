package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/control"
	"github.com/portal-tunnel/portal/relay"
)

func TestTableOfAnOutletAndTwoInletsFitsATerminal(t *testing.T) {
	now := time.Date(2026, 3, 1, 11, 0, 0, 0, time.UTC)
	long, short := now.Add(-time.Hour), now.Add(-192*time.Second)
	three, none := 3, 0
	const way = "via relay.example.com:4000"
	id, _ := identity.NewSelf()
	got := table([]processDocument{
		{Role: "outlet", Name: "orders-db", PID: 41022, State: "ready", Since: &long, Via: way, Target: "127.0.0.1:5432", Answer: "answers", Streams: &three},
		{Role: "inlet", Name: "orders-db", PID: 4194303, State: "ready", Since: &long, Via: way, Peer: id.ID().String(), Member: "db1",
			Address: []string{"127.0.0.1:15432", "[::1]:15432"}, Streams: &none},
		{Role: "inlet", Name: "metrics", PID: 41077, State: "waiting", Since: &short, Next: 24, Reason: way + ": nobody serves it",
			Address: []string{"127.0.0.1:9090", "[::1]:9090"}, Streams: &none},
	}, now)
	const want = `ROLE    NAME       STATE    STREAMS  PID      PEER  WAY
outlet  orders-db  ready    3        41022    -     via relay.example.com:4000
        target 127.0.0.1:5432; asked at start, it answers
inlet   orders-db  ready    0        4194303  db1   via relay.example.com:4000
        listens on 127.0.0.1:15432 and [::1]:15432
inlet   metrics    waiting  0        41077    -     -
        via relay.example.com:4000: nobody serves it
        for 3m12s; next try in 24s
        listens on 127.0.0.1:9090 and [::1]:9090
`
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	for line := range strings.Lines(got) {
		if n := len(strings.TrimSuffix(line, "\n")); n > 80 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
}

func TestRowsOfOtherRoles(t *testing.T) {
	self, _ := identity.NewSelf()
	id := self.ID()
	now := time.Now()
	names := []nameDocument{{"db", id, 2}, {"metrics", id, 1}}
	for _, test := range []struct {
		doc  processDocument
		want []string
	}{
		{processDocument{Role: "inlet", Peer: id.String(), State: "ready"}, []string{`\A\S+  -     ready  -        0    P...…  -\n\z`}},
		{processDocument{Role: "relay", Hosts: &id, Relay: &relayDocument{Members: 2, Strangers: 1, Lanes: 3, Names: names}},
			[]string{`hosts authority P...…\n`, `2 members, 1 stranger, 3 lanes\n`, `names: db \(2 outlets\) and metrics\n`}},
		{processDocument{Role: "relay", Relay: &relayDocument{}}, []string{`0 members, 0 strangers, 0 lanes\n\z`}},
		{processDocument{Role: "relay", Relay: &relayDocument{Names: names, More: 5}}, []string{`names: db \(2 outlets\), metrics and 5 more\n`}},
		{processDocument{Role: "authority", Hosts: &id, State: "ready"}, []string{`\Aauthority  -     ready  -        0    -     -\n\z`}},
		{processDocument{Role: "outlet", Command: "cat"}, []string{`each stream runs cat\n`}},
		{processDocument{Role: "outlet", Target: "unix:/s"}, []string{`target unix:/s\n`}},
		{processDocument{PID: 7, State: stateNoAnswer, Reason: "it hangs"}, []string{`\A-     -     no answer  -        7    -     -\n {8}it hangs\n\z`}},
	} {
		_, row, _ := strings.Cut(table([]processDocument{test.doc}, now), "\n")
		for _, want := range test.want {
			if !regexp.MustCompile(want).MatchString(row) {
				t.Errorf("%+v: no %s in\n%s", test.doc, want, row)
			}
		}
	}
	many := new(relayDocument)
	for i := range namesPrinted + 10 {
		many.Names = append(many.Names, nameDocument{Name: fmt.Sprintf("n%02d", i), Outlets: 1})
	}
	if got := many.list(); !strings.Contains(got, "n19 and 10 more") || strings.Contains(got, "n20") {
		t.Errorf("many names: %s", got)
	}
}

// What a process hands on, a peer may have chosen: it stays in its column and its
// line, and passes for no state.
func TestPeerTextInTheTableIsEscaped(t *testing.T) {
	const evil = "a\x1b[2J\tb\nready\u202e\xff"
	doc := processDocument{
		Role: evil, Name: evil, State: evil, Via: evil, Member: evil, Reason: evil + " ready", Code: evil, Address: []string{evil}, Target: evil, Answer: evil,
		Relay: &relayDocument{Names: []nameDocument{{Name: evil + strings.Repeat("x", 999), Outlets: 1}}},
	}
	command := doc
	command.Command = evil
	got := table([]processDocument{doc, command}, time.Now())
	if strings.ContainsAny(got, "\x1b\r") || !utf8.ValidString(got) || strings.Contains(got, "\u202e") {
		t.Errorf("%q", got)
	}
	lines := strings.Split(strings.TrimSuffix(got, "\n"), "\n")
	if want := 1 + 2*(1+2+1+1+2); len(lines) != want {
		t.Errorf("%d lines, want %d:\n%s", len(lines), want, got)
	}
	for _, line := range lines {
		detail := strings.HasPrefix(line, " ")
		if detail && (ready.MatchString(line) || len(line) > 10*peerText) || !detail && strings.Contains(line, "\t") {
			t.Errorf("%q", line)
		}
	}
	who := statusDocument{Home: evil, Self: &selfDocument{Name: evil, Authority: new(identity.ID)}}
	if head := who.head(time.Now()); strings.Contains(head, "\x1b") || !utf8.ValidString(head) || strings.Count(head, "\n") != 2 {
		t.Errorf("%q", head)
	}
}

func TestHeadSaysWhoseHomeItIs(t *testing.T) {
	self, _ := identity.NewSelf()
	id, now := self.ID(), time.Date(2026, 3, 1, 11, 0, 0, 0, time.UTC)
	later, before := now.Add(time.Hour), now.Add(-time.Hour)
	for _, test := range []struct {
		doc  statusDocument
		want string
	}{
		{statusDocument{}, `\Ahome /h
\z`},
		{statusDocument{Self: &selfDocument{ID: id}}, `\AP...…, no member of an authority yet
home /h
\z`},
		{statusDocument{Self: &selfDocument{ID: id, Name: "db1", Authority: &id, Expires: &later}}, `\Adb1 \(P...…\) of authority P...…, credential until 2026-03-01T12:00:00Z
`},
		{statusDocument{Self: &selfDocument{ID: id, Authority: &id, Expires: &before}}, `\Amember \(P...…\) of authority P...…, credential expired at 2026-03-01T10:00:00Z
`},
		{statusDocument{Hosts: &id}, `\Aholds authority P...…
home /h
\z`},
		{statusDocument{Self: &selfDocument{ID: id}, Hosts: &id}, `yet; holds authority P...…
home /h
\z`},
	} {
		test.doc.Home = "/h"
		if got := test.doc.head(now); !regexp.MustCompile(test.want).MatchString(got) {
			t.Errorf("%q, want %s", got, test.want)
		}
	}
}

// One source of truth: status says what the process told last, and when that began.
func TestStatusIsWhatWasToldLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := testSession(new(bytes.Buffer))
		defer s.stderr.Close()
		self, err := identity.NewSelf()
		if err != nil {
			t.Fatal(err)
		}
		e := entry{t: s.teller("inlet", "db"), self: self, streams: func() int { return 4 }, command: []string{"psql", "password"}}
		begin := time.Now()
		is := func(what string, want processDocument) {
			t.Helper()
			four := 4
			want.PID, want.Role, want.Name, want.Started, want.Streams, want.Command = os.Getpid(), "inlet", "db", moment(begin), &four, "psql"
			want.Self = &selfDocument{ID: self.ID()}
			if got := e.document(begin, time.Now()); !reflect.DeepEqual(got, want) {
				g, _ := json.Marshal(got)
				w, _ := json.Marshal(want)
				t.Errorf("%s:\n%s, want\n%s", what, g, w)
			}
		}
		since := moment(begin)
		addr := []string{"127.0.0.1:1"}
		is("at first", processDocument{State: "starting", Since: since})
		e.t.listening(addr)
		is("listening", processDocument{State: "starting", Since: since, Address: addr})
		time.Sleep(time.Second)
		since = moment(time.Now())
		e.t.waiting(errors.New("no\nway\x1b"), 4*time.Second)
		is("waiting", processDocument{State: "waiting", Since: since, Address: addr, Reason: `no; way\x1b`, Next: 4})
		time.Sleep(3 * time.Second)
		is("still waiting", processDocument{State: "waiting", Since: since, Address: addr, Reason: `no; way\x1b`, Next: 1})
		time.Sleep(2 * time.Second)
		is("trying", processDocument{State: "waiting", Since: since, Address: addr, Reason: `no; way\x1b`})
		// No news, and so no line; but another moment.
		e.t.waiting(errors.New("no\nway\x1b"), 8*time.Second)
		is("waiting again", processDocument{State: "waiting", Since: since, Address: addr, Reason: `no; way\x1b`, Next: 8})
		time.Sleep(time.Second)
		since = moment(time.Now())
		e.t.ready(event{Via: "direct a:1", Peer: "P", Member: "db1", Answer: "answers"}, "ready direct a:1 (db1, P)")
		is("ready", processDocument{State: "ready", Since: since, Address: addr, Via: "direct a:1", Peer: "P", Member: "db1", Answer: "answers"})
		time.Sleep(time.Second)
		since = moment(time.Now())
		e.t.refused(fail(codeRefused, "", "no policy"))
		is("refused", processDocument{State: "refused", Since: since, Address: addr, Reason: "no policy", Code: "PORTAL-E0301", Answer: "answers"})
		e.t.again(30 * time.Second)
		is("refused until", processDocument{State: "refused", Since: since, Address: addr, Reason: "no policy", Code: "PORTAL-E0301", Next: 30, Answer: "answers"})
		time.Sleep(time.Second)
		since = moment(time.Now())
		e.t.draining()
		is("draining", processDocument{State: "draining", Since: since, Address: addr, Answer: "answers"})
		time.Sleep(time.Second)
		e.t.waiting(errors.New("the channel is gone"), time.Second)
		e.t.draining()
		is("still draining", processDocument{State: "draining", Since: since, Address: addr, Answer: "answers"})
	})
}

func TestManyNamesOfARelayAreCutAndCounted(t *testing.T) {
	var st relay.Status
	for i := range 20000 {
		st.Names = append(st.Names, relay.Name{Name: strings.Repeat("n", 58) + fmt.Sprintf("%05d", i), Outlets: 1})
	}
	doc := relayDocumentOf(st)
	if len(doc.Names) != namesShown || doc.More != 20000-namesShown {
		t.Errorf("%d names and %d more", len(doc.Names), doc.More)
	}
	if b, err := json.Marshal(doc); err != nil || len(b) > 1<<19 {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// statusOf runs `portal status` on a home.
func statusOf(t *testing.T, home string, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	status = run(context.Background(), append([]string{"status", "--home", home}, args...), strings.NewReader(""), &out, &err, nil)
	return status, out.String(), err.String()
}

// A command that reaches several names shows each.
func TestAProcessOfSeveralNamesIsThereOnceForEach(t *testing.T) {
	h, err := identity.Open(filepath.Join(t.TempDir(), "h"))
	if err != nil {
		t.Fatal(err)
	}
	self, err := h.Self()
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	s := testSession(&log)
	a, b := s.teller("connect", "a"), s.teller("connect", "b")
	gone := s.visible(h, entry{t: b, self: self}, entry{t: a, self: self, address: []string{"unix:/s"}})
	a.ready(event{Via: "direct x:1"}, "ready direct x:1")
	status, stdout, stderr := statusOf(t, h.Dir(), "-o", "json")
	var doc statusDocument
	if err := json.Unmarshal([]byte(stdout), &doc); err != nil || status != exitFine {
		t.Fatalf("exit %d, %v\n%s%s", status, err, stdout, stderr)
	}
	var got []string
	for _, p := range doc.Processes {
		got = append(got, fmt.Sprint(p.Role, " ", p.Name, " ", p.State, " ", p.Via, " ", p.Address, " ", p.PID == os.Getpid()))
	}
	if want := []string{"connect a ready direct x:1 [unix:/s] true", "connect b starting  [] true"}; !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
	gone()
	if _, stdout, stderr := statusOf(t, h.Dir()); strings.Contains(stdout, "connect") || !strings.Contains(stderr, "nothing runs on") {
		t.Errorf("when it has ended:\n%s%s", stdout, stderr)
	}
	s.visible(nil, entry{t: a, self: self})() // --ephemeral
	s.stderr.Close()
	if strings.Contains(log.String(), "WARN") {
		t.Errorf("log:\n%s", &log)
	}
}

// A process of another version, a socket that is another program's, one that closes
// without a word: each is listed, and none keeps the others from it.
func TestAProcessThatCannotBeUnderstoodIsListed(t *testing.T) {
	h, err := identity.Open(filepath.Join(t.TempDir(), "h"))
	if err != nil {
		t.Fatal(err)
	}
	dir := runDir(h.Dir())
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, says := range map[string]string{
		"11.sock": `{"error":{"code":"failed","message":"this process knows no \u001b[2J"}}`,
		"12.sock": "SSH-2.0-x\r\n",
		"13.sock": "",
		"14.sock": `{"result":{"pid":"x"}}`,
		"15.sock": `{"result":[{"pid":15,"role":"outlet","name":"db","state":"asleep","later":[1]}]}`,
	} {
		ln, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				c.Write([]byte(says))
				c.(*net.UnixConn).CloseWrite()
				c.Read(make([]byte, 1<<10))
				c.Close()
			}
		}()
	}
	status, stdout, stderr := statusOf(t, h.Dir())
	if status != exitFailed || strings.Contains(stdout, "\x1b") {
		t.Errorf("exit %d\n%q", status, stdout)
	}
	for _, want := range []string{
		`(?m)^outlet +db +asleep +- +15 +- +-$`,
		`(?m)^- +- +no answer +- +11 +- +-\n +this process knows no \\x1b\[2J$`,
		`(?m)^- +- +no answer +- +12 `, `(?m)^- +- +no answer +- +13 `, `(?m)^- +- +no answer +- +14 `,
	} {
		if !regexp.MustCompile(want).MatchString(stdout) {
			t.Errorf("no %s in\n%s%s", want, stdout, stderr)
		}
	}
	if left, err := control.Among(dir); len(left) != 5 || err != nil {
		t.Errorf("left are %v, %v", left, err)
	}
}

// docs/status.md names every field, and no other.
func TestFieldsOfStatusAreDocumented(t *testing.T) {
	b, err := os.ReadFile("../../docs/status.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(b), "\n## `-o json`\n")
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile("`([a-z_]+)`").FindAllStringSubmatch(text, -1) {
		documented[m[1]] = true
	}
	for _, role := range []string{"authority", "relay", "outlet", "inlet", "connect"} {
		delete(documented, role) // values of role, of which two are fields as well
	}
	fields := map[string]bool{}
	for _, doc := range []any{statusDocument{}, selfDocument{}, processDocument{}, relayDocument{}, nameDocument{}} {
		for i := range reflect.TypeOf(doc).NumField() {
			name, _, _ := strings.Cut(reflect.TypeOf(doc).Field(i).Tag.Get("json"), ",")
			fields[name] = true
		}
	}
	delete(fields, "authority")
	delete(fields, "relay")
	if !reflect.DeepEqual(documented, fields) {
		t.Errorf("documented are %v\nthere are %v", documented, fields)
	}
}
