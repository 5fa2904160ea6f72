package journeys_test

import (
	"bytes"
	"crypto/rand"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/tests/fault/proxy"
	"github.com/portal-tunnel/portal/tests/process"
)

// word is one that is nowhere by chance.
func word() string { return strings.ToLower(rand.Text() + rand.Text()) }

// Everything that comes to the relay or leaves it is recorded on the way. It knows the name, which
// it is told inside the control channels; the rest it has no key to.
func TestNothingThatARelayCarriesIsReadable(t *testing.T) {
	for _, carrier := range carriers {
		t.Run(carrier, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			m := newBlindMeeting(t)
			ways := map[string]*proxy.Server{}
			for _, host := range []string{"office", "db1", "bot"} {
				p, err := proxy.Listen("", m.at)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { p.Close() })
				p.Record()
				ways[host] = p
			}
			way := func(host string) string { return m.pin + "@" + ways[host].Addr() }
			m.openBlind(ways["office"].Addr(), "--log-level", "debug")

			name, attribute, payload := word(), word(), word()
			secrets := map[string][]string{"name": written([]byte(name)), "attribute": written([]byte(attribute)), "payload": written([]byte(payload))}
			for host, grants := range map[string][]string{"db1": {"--serve", name}, "bot": {"--attr", "role=" + attribute}} {
				file := m.ticket(host, grants...)
				text, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				ticket, err := identity.ParseTicket(strings.TrimSpace(string(text)))
				if err != nil {
					t.Fatal(err)
				}
				secrets["ticket of "+host] = written(ticket.Secret[:])
				m.run(host, "enroll", "--relay", way(host), file)
			}
			out := m.start("db1", "outlet", name, "--to", s.addr(), "--allow", `principal.role == "`+attribute+`"`, "--carrier", carrier)
			m.line(out, `ready via `+ways["db1"].Addr())
			in := m.start("bot", "inlet", name, "--from", "0")
			addr := m.line(in, `listening on (\S+)`)
			m.line(in, `ready via `+ways["bot"].Addr())

			sent := bytes.Repeat([]byte(payload), 4096)
			c := dial(t, addr, []byte("E"))
			go func() {
				c.Write(sent)
				c.(halfCloser).CloseWrite()
			}()
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sent) {
				t.Fatalf("%d of %d bytes came back, %v", len(got), len(sent), err)
			}

			// What a recorder would find if it were in clear.
			plain, err := proxy.Listen("", s.addr())
			if err != nil {
				t.Fatal(err)
			}
			defer plain.Close()
			plain.Record()
			if err := echo(dial(t, plain.Addr(), []byte("E"+payload))); err != nil {
				t.Fatal(err)
			}
			if !found(secrets["payload"], plain.Recorded()...) {
				t.Fatal("the payload is not found where it passed in clear: nothing is proved")
			}

			for host, p := range ways {
				size := 0
				for _, tape := range p.Recorded() {
					size += len(tape)
				}
				if host != "office" && size < 2*len(sent) {
					t.Errorf("only %d bytes of %s were recorded", size, host)
				}
				for what, forms := range secrets {
					if found(forms, p.Recorded()...) {
						t.Errorf("between %s and the relay: there is the %s", host, what)
					}
				}
			}
			for _, p := range []*process.Process{in, out, m.relay} {
				p.Stop(patience) // what they say at their end is in the log too
			}
			said := m.relay.Lines()
			if len(said) >= 1000 {
				t.Fatal("the first lines of the relay's log are lost")
			}
			log := []byte(strings.Join(said, "\n"))
			if !found(secrets["name"], log) || !bytes.Contains(log, []byte(`"level":"DEBUG"`)) {
				t.Errorf("the relay is not talkative, nothing is proved:\n%s", log)
			}
			for what, forms := range secrets {
				if what != "name" && found(forms, log) {
					t.Errorf("in the relay's log: there is the %s", what)
				}
			}
			err = filepath.WalkDir(m.home("relay"), func(path string, d fs.DirEntry, err error) error {
				if err != nil || !d.Type().IsRegular() {
					return err
				}
				b, err := os.ReadFile(path)
				for what, forms := range secrets {
					if found(forms, b) {
						t.Errorf("in the relay's %s: there is the %s", d.Name(), what)
					}
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// found reports whether one of the forms, in whatever case, is in one of the texts.
func found(forms []string, texts ...[]byte) bool {
	for _, text := range texts {
		text = bytes.ToLower(text)
		for _, form := range forms {
			if bytes.Contains(text, []byte(strings.ToLower(form))) {
				return true
			}
		}
	}
	return false
}
