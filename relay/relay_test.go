package relay_test

import (
	"testing"

	"github.com/portal-tunnel/portal/relay"
)

func TestAStreamComesOutBehindTheRelay(t *testing.T) {
	for _, carrier := range []relay.Carrier{relay.DialBack, relay.Yamux} {
		t.Run(carrier.String(), func(t *testing.T) {
			in(t, func(w *town) {
				w.relay(nil)
				w.outlet("db", w.member(serves("db")), echoing, func(c *relay.Client) { c.Carrier = carrier })
				bot := w.member(agent)
				s := w.inlet("db", bot, w.client(bot, nil))
				c := w.dial(s)
				w.echoes(c)
				c.Close()
			})
		})
	}
}
