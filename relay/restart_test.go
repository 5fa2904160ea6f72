package relay_test

import (
	"testing"
	"time"
)

// However often the connections to it are cut, as by kill -9: pauses grow for relays that take
// somebody in only to hang up, not for those that are gone in the middle of it.
func TestARelayThatIsKilledAgainAndAgainServesItsNamesWithinTwoSecondsEachTime(t *testing.T) {
	in(t, func(w *town) {
		w.relay(nil)
		w.outlet("db", w.member(serves("db")), echoing, nil)
		bot := w.member(agent)
		in := w.inlet("db", bot, w.client(bot, nil))
		for i := range 30 {
			c := w.dial(in)
			w.mu.Lock()
			all := w.dialled
			w.dialled = nil
			w.mu.Unlock()
			for _, lane := range all {
				lane.Cut()
			}
			w.isReset(c)
			begin := time.Now()
			w.dial(in).Close()
			if d := time.Since(begin); d > 2*time.Second {
				t.Errorf("cut %d: %v until it serves again", i+1, d)
			}
		}
	})
}
