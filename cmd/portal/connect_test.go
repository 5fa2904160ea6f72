package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/link"
)

func TestTemplatesAreFilledIn(t *testing.T) {
	names := []string{"db", "team/cache-2.eu", "addr"}
	doors := []*door{
		{host: "127.0.0.1", port: "1000", addr: "127.0.0.1:1000"},
		{host: "127.0.0.1", port: "2000", addr: "127.0.0.1:2000"},
		{host: "/tmp/p", port: "5432", addr: "%2Ftmp%2Fp:5432"},
	}
	for template, want := range map[string]string{
		"":                              "",
		"none":                          "none",
		"pg://u@{addr}/x":               "pg://u@127.0.0.1:1000/x",
		"{host}|{port}":                 "127.0.0.1|1000",
		"{db.port}{addr.host}":          "1000/tmp/p",
		"{team/cache-2.eu.addr}":        "127.0.0.1:2000",
		"pg://u@{addr.addr}/x":          "pg://u@%2Ftmp%2Fp:5432/x",
		`{{"host":"{host}"}}`:           `{"host":"127.0.0.1"}`,
		"{{addr}}":                      "{addr}",
		"{{{addr}}}":                    "{127.0.0.1:1000}",
		"{{}}{{}}":                      "{}{}",
		"k=v={port}":                    "k=v=1000",
		"\xff{port}é":                   "\xff1000é",
		"${HOME} $(x)":                  "", // wrong
		"{ADDR}":                        "",
		"{db.}":                         "",
		"{.addr}":                       "",
		"{db.addr.x}":                   "",
		"{other.addr}":                  "",
		"{ addr }":                      "",
		"{":                             "",
		"}":                             "",
		"{}":                            "",
		"{{addr}":                       "",
		"{addr}}":                       "",
		"{{{addr}}":                     "",
		"a{addr}{" + "addr":             "",
		"{" + strings.Repeat("x", 1000): "",
	} {
		set, err := parseSettings([]string{"V=" + template}, names)
		if wrong := want == "" && template != ""; wrong || err != nil {
			var f *failure
			if !wrong || !errors.As(err, &f) || f.code.exit() != exitUsage || !strings.Contains(f.Error(), "--env V, character ") || f.remedy == "" || len(f.Error()) > 200 {
				t.Errorf("%q: %v", template, err)
			}
			continue
		}
		if got := set[0].fill(doors); got != want {
			t.Errorf("%q: %q, want %q", template, got, want)
		}
	}
}

// Whatever a template is, it is refused or stands for itself once the braces are doubled.
func FuzzTemplate(f *testing.F) {
	for _, template := range []string{"{addr}", "{{", "}", "{db.host}{", "é{port}"} {
		f.Add(template)
	}
	names, doors := []string{"db"}, []*door{{host: "h", port: "1", addr: "h:1"}}
	f.Fuzz(func(t *testing.T, template string) {
		if holdsTicket(template) {
			return
		}
		if _, err := parseSettings([]string{"V=" + template}, names); err != nil {
			var fail *failure
			if !errors.As(err, &fail) || fail.code.exit() != exitUsage {
				t.Fatalf("%q: %v", template, err)
			}
		}
		set, err := parseSettings([]string{"V=" + strings.NewReplacer("{", "{{", "}", "}}").Replace(template)}, names)
		if err != nil {
			t.Fatalf("%q: %v", template, err)
		}
		if got := set[0].fill(doors); got != template {
			t.Fatalf("%q became %q", template, got)
		}
	})
}

func TestTheEnvironmentOfACommandIsExactlyThis(t *testing.T) {
	ticket := "portal1" + strings.Repeat("a", 60)
	ours := environment{
		"PATH=/bin", "EMPTY=", "=odd", "odd", "PORTAL_HOME=/h", "PORTAL_CONNECT_TIMEOUT=3s",
		"PORTAL_ADDR=an outer connect's", "PORTAL_DB_PORT=1", "PGPASSWORD=hers", "PGHOST=/var/run", "PGHOSTADDR=192.0.2.1", "PGSERVICE=other",
		"PORTAL_TICKET=x", "PORTAL_TICKET_FILE=/run/t", "PORTAL_CONNECT_TICKET=/run/t", "PORTAL_OUTLET_TICKET=/run/t", "PORTAL_PASSPHRASE=p",
		"PORTAL_HOME_PASSPHRASE_FILE=/run/p", "NOTIFY_SOCKET=/run/n", "MINE=see " + ticket, "URL=old", "PATH=/usr/bin",
	}
	doors := []*door{
		{name: "db", host: "127.0.0.1", port: "1000", addr: "127.0.0.1:1000"},
		{name: "a/b-c.d_9", host: "127.0.0.1", port: "2000", addr: "127.0.0.1:2000"},
	}
	all := []string{
		"PORTAL_ADDR=127.0.0.1:1000", "PORTAL_HOST=127.0.0.1", "PORTAL_PORT=1000",
		"PORTAL_DB_ADDR=127.0.0.1:1000", "PORTAL_DB_HOST=127.0.0.1", "PORTAL_DB_PORT=1000",
		"PORTAL_A_B_C_D_9_ADDR=127.0.0.1:2000", "PORTAL_A_B_C_D_9_HOST=127.0.0.1", "PORTAL_A_B_C_D_9_PORT=2000",
	}
	kept := []string{"PATH=/bin", "EMPTY=", "=odd", "odd", "PORTAL_HOME=/h", "PORTAL_CONNECT_TIMEOUT=3s", "PGPASSWORD=hers"}
	set, err := parseSettings([]string{"URL=tcp://{addr}", "EMPTY={port}"}, []string{"db", "a/b-c.d_9"})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		speaks inlet.Kind
		set    []setting
		want   []string
	}{
		{inlet.Raw, nil, slices.Concat(kept, []string{"PGHOST=/var/run", "PGHOSTADDR=192.0.2.1", "PGSERVICE=other", "URL=old", "PATH=/usr/bin"}, all)},
		{inlet.PG, nil, slices.Concat(kept, []string{"URL=old", "PATH=/usr/bin"}, all, []string{"PGHOST=127.0.0.1", "PGPORT=1000"})},
		{inlet.HTTP, set, slices.Concat(slices.DeleteFunc(slices.Clone(kept), func(v string) bool { return v == "EMPTY=" }),
			[]string{"PGHOST=/var/run", "PGHOSTADDR=192.0.2.1", "PGSERVICE=other", "PATH=/usr/bin"}, all, []string{"URL=tcp://127.0.0.1:1000", "EMPTY=1000"})},
	} {
		c := &connection{connectPlan: &connectPlan{speaks: test.speaks, set: test.set}, doors: doors}
		before := slices.Clone(ours)
		if got := c.environment(ours); !slices.Equal(got, test.want) {
			t.Errorf("kind %d:\n got %q\nwant %q", test.speaks, got, test.want)
		}
		if !slices.Equal(ours, before) {
			t.Error("ours has changed")
		}
	}
}

func TestAPrivateDirectoryIsShortSimpleAndPrivate(t *testing.T) {
	short, err := os.MkdirTemp("/tmp", "p")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(short)
	dir, err := privateDirIn(short)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode() != os.ModeDir|0o700 || filepath.Dir(dir) != short {
		t.Errorf("%s: %v, %v", dir, info, err)
	}
	os.Remove(dir)
	long := filepath.Join(short, strings.Repeat("x", 100))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	for place, says := range map[string]string{
		long:                  "more than 107 bytes",
		"relative":            "other characters",
		short + "/a b":        "other characters",
		short + "/a,b":        "other characters",
		short + "/none":       "no such file",
		"/proc/self/nowhere/": "no such file",
	} {
		if dir, err := privateDirIn(place); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %s, %v", place, dir, err)
		}
	}
	if left, err := filepath.Glob(long + "/*"); err != nil || len(left) > 0 {
		t.Errorf("%q is left", left)
	}
	// One that will not do is passed over.
	dir, err = privateDir(environment{"TMPDIR=" + long})
	if err != nil || filepath.Dir(dir) != "/tmp" {
		t.Errorf("%s, %v", dir, err)
	}
	os.Remove(dir)
	if dir := runtimeDir(environment{"XDG_RUNTIME_DIR=" + long}); dir != long {
		t.Errorf("%q is taken, not the user's own", dir)
	}
	for _, mode := range []os.FileMode{0o770, 0o702} {
		os.Chmod(long, mode)
		if dir := runtimeDir(environment{"XDG_RUNTIME_DIR=" + long}); dir != "" {
			t.Errorf("%s of mode %o is taken", dir, mode)
		}
	}
}

// While all is well nothing is printed: the terminal is the command's.
func TestConnectTellsTroubleAndItsEnd(t *testing.T) {
	broken := errors.New("no way")
	there := inlet.State{Kind: link.Ready, Path: "direct here", Peer: peerNamed(t, "db1")}
	for _, test := range []struct {
		name    string
		running bool
		states  []inlet.State
		want    []string
		kept    string
	}{
		{"not there", false, []inlet.State{{Kind: link.Waiting, Err: broken}}, []string{"portal: connect db waiting: no way"}, "waiting"},
		{"refused before it runs", false, []inlet.State{{Kind: link.Refused, Err: broken}}, nil, "refused"},
		{"refused while it runs", true, []inlet.State{{Kind: link.Refused, Err: broken}}, []string{"portal: connect db refused: no way (PORTAL-E0100)"}, "refused"},
		{"the same again", true, []inlet.State{{Kind: link.Waiting, Err: broken}, {Kind: link.Waiting, Err: broken}}, []string{"portal: connect db waiting: no way"}, "waiting"},
		{"all is well", false, []inlet.State{there}, nil, "ready"},
		{"well again", true, []inlet.State{there, {Kind: link.Waiting, Err: broken}, there, there},
			[]string{"portal: connect db waiting: no way", "portal: connect db ready direct here (db1, " + there.Peer.ID().Short() + ")"}, "ready"},
		{"the end", true, []inlet.State{there, {Kind: link.Draining}}, nil, "ready"},
	} {
		var stderr bytes.Buffer
		s := testSession(&stderr)
		d := &door{t: s.teller("connect", "db")}
		for _, state := range test.states {
			d.tell(state, test.running)
		}
		if at := d.t.condition(); test.kept != at.Event {
			t.Errorf("%s: for status it is %q", test.name, at.Event)
		}
		s.stderr.Close()
		if got := strings.Fields(stderr.String()); !slices.Equal(got, strings.Fields(strings.Join(test.want, " "))) {
			t.Errorf("%s: %q", test.name, stderr.String())
		}
	}
}

// peerNamed is an identity with a credential, as a channel's other end shows it.
func peerNamed(t *testing.T, name string) *identity.Peer {
	t.Helper()
	now := time.Now()
	authority, err := identity.NewSelf()
	if err != nil {
		t.Fatal(err)
	}
	self, err := identity.NewSelf()
	if err != nil {
		t.Fatal(err)
	}
	key, attestation, err := self.Static(now)
	if err != nil {
		t.Fatal(err)
	}
	p, err := identity.VerifyProof(self.History(), attestation, key.PublicKey().Bytes(), now)
	if err != nil {
		t.Fatal(err)
	}
	c, err := authority.Issue(self.ID(), self.Latest(), identity.Attributes{"name": name}, now, now.Add(time.Hour))
	if err == nil {
		err = p.Accept(c)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestFlushWaitsForWhatIsHeldAndNoLongerThanForASlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &stuck{gate: make(chan struct{})}
		l := newLines(w, lostLines)
		l.Write([]byte("one\n"))
		synctest.Wait() // it is with the reader
		l.Write([]byte("two\n"))
		flushed := make(chan struct{})
		go func() {
			l.Flush()
			close(flushed)
		}()
		synctest.Wait()
		select {
		case <-flushed:
			t.Error("nothing was written, and it was flushed")
		default:
		}
		w.gate <- struct{}{}
		w.gate <- struct{}{}
		<-flushed
		if got := w.got.String(); got != "one\ntwo\n" {
			t.Errorf("written was %q", got)
		}
		l.Flush() // nothing is held
		l.Write([]byte("three\n"))
		l.Flush() // returns, though nobody reads
		close(w.gate)
		l.Close()
		if got := w.got.String(); got != "one\ntwo\nthree\n" {
			t.Errorf("written was %q", got)
		}
	})
}
