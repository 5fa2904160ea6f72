package journeys_test

import (
	"math/rand/v2"
	"testing"

	"github.com/portal-tunnel/portal/tests/process"
)

var carriers = []string{"dial-back", "yamux"}

// Whichever of the three is killed, only that one is started again.
func TestAKilledRelayOutletOrInletIsAnExactPrefixAndThenAReset(t *testing.T) {
	kills := 3
	if long() {
		kills = 16
	}
	for _, carrier := range carriers {
		t.Run(carrier, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			m := newMeeting(t)
			m.enroll("db1", "--serve", "db")
			m.enroll("bot", "--attr", "role=agent")
			out := m.outlet("db1", s.addr(), "--carrier", carrier)
			in, addr := m.inlet("bot", "0")
			for _, victim := range []struct {
				name    string
				process **process.Process
				restart func()
			}{
				{"relay", &m.relay, func() { m.open(m.at) }},
				{"outlet", &out, func() { out = m.outlet("db1", s.addr(), "--carrier", carrier) }},
				{"inlet", &in, func() { in, _ = m.inlet("bot", addr) }},
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
		})
	}
}
