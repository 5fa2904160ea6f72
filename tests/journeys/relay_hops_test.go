package journeys_test

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/portal-tunnel/portal/tests/process"
)

// The first relay goes on to the second, where the outlet is. It passes on what it has no key to, and is
// not told even the name. The caller has a control channel with each.
func TestThroughTwoRelaysAKilledOneIsAnExactPrefixAndThenAReset(t *testing.T) {
	kills := 1
	if long() {
		kills = 16
	}
	for _, carrier := range carriers {
		t.Run(carrier, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			m := newMeeting(t) // the second, with the authority
			name := word()
			m.enroll("db1", "--serve", name)
			m.enroll("bot", "--attr", "role=agent")
			var first *process.Process
			var log []string // the first relay's, of its lives before
			at := "127.0.0.1:0"
			open := func() {
				if first != nil {
					log = append(log, first.Lines()...)
				}
				first = m.start("first", "relay", "--listen", at, "--trust", m.member("bot").String(), "--next", "b="+m.id("relay").String()+"@"+m.at,
					"--allow-next", `principal.role == "agent"`, "--log-level", "debug")
				at = m.line(first, `relay ready on (\S+)`)
			}
			open()
			out := m.start("db1", "outlet", name, "--to", s.addr(), "--allow", `principal.role == "agent"`, "--carrier", carrier)
			m.line(out, `ready via `+m.at)
			via := []string{"--via", m.id("first").String() + "@" + at + "," + m.id("relay").String() + "@b"}
			in := m.start("bot", append([]string{"inlet", name, "--from", "0"}, via...)...)
			addr := m.line(in, `listening on (\S+)`)
			m.line(in, `ready via \S+,b \(db1, `)
			m.run("bot", append([]string{"ping", name}, via...)...)

			for _, victim := range []struct {
				name    string
				process **process.Process
				restart func()
			}{
				{"the first relay", &first, open},
				{"the second relay", &m.relay, func() { m.open(m.at) }},
			} {
				for i := range kills {
					k := mark{i*transfer/kills + rand.IntN(transfer/kills/2), func() { kill(t, *victim.process) }}
					ready(t, addr)
					if err := download(t, s, addr, k); err != nil {
						t.Errorf("download, %s killed at %d: %v", victim.name, k.n, err)
					}
					victim.restart()

					ready(t, addr)
					s.marks <- k
					if err := upload(t, s, addr, true); err != nil {
						t.Errorf("upload, %s killed at %d: %v", victim.name, k.n, err)
					}
					victim.restart()
				}
			}
			ready(t, addr)

			first.Stop(patience)
			all := strings.Join(append(log, first.Lines()...), "\n")
			if !strings.Contains(all, `"level":"DEBUG"`) {
				t.Error("the first relay is not talkative: nothing is proved")
			}
			if strings.Contains(all, name) {
				t.Errorf("the first relay knows the name:\n%s", all)
			}
		})
	}
}
