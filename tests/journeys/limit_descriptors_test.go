package journeys_test

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"
)

// Each process in turn may have 256 descriptors and is asked for a thousand: by clients of the inlet,
// by streams to the outlet, by strangers who connect to the relay and to the outlet and say nothing.
// None of them ever needs the last ones, so whoever may come in does, and nothing that is open minds.
func TestAProcessWithFewDescriptorsKeepsItsStreamsAndSomeForMembers(t *testing.T) {
	t.Parallel()
	const few, tries = "ulimit -n 256", 1000
	for _, c := range []struct {
		name, role string
		direct     bool
		at         func(w *row) string // where the thousand connect
		speak      bool                // and ask for an echo
	}{
		{"inlet, by its clients", "inlet", false, func(w *row) string { return w.addr }, true},
		{"outlet, by its streams", "outlet", false, func(w *row) string { return w.addr }, true},
		{"outlet, by strangers", "outlet", true, func(w *row) string { return w.lanes }, false},
		{"relay, by strangers", "relay", false, func(w *row) string { return w.at }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newRow(t, rowOptions{
				to: elsewhere(t), direct: c.direct, shell: map[string]string{c.role: few},
				outlet: []string{"--max-streams", "20000"}, inlet: []string{"--max-streams", "20000"},
			})
			var open []net.Conn
			for range 20 {
				open = append(open, dial(t, w.addr, []byte("E")))
			}
			work := func(when string) {
				t.Helper()
				for i, s := range open {
					if err := echo(s); err != nil {
						t.Fatalf("%s, stream %d that was open: %v", when, i, err)
					}
				}
			}
			work("before")
			before := w.stand()
			var conns []net.Conn
			for range tries {
				s, err := net.DialTimeout("tcp", c.at(w), patience)
				if err != nil { // it was reset as soon as it was there
					continue
				}
				if c.speak {
					s.Write([]byte("Ex"))
				}
				conns = append(conns, s)
			}
			p := w.each()[c.role]
			if c.speak {
				var answered, ended, silent int
				for _, s := range conns {
					s.SetReadDeadline(time.Now().Add(time.Millisecond))
					switch _, err := s.Read(make([]byte, 1)); {
					case err == nil:
						answered++
					case errors.Is(err, os.ErrDeadlineExceeded):
						silent++
					default:
						ended++
					}
				}
				t.Logf("F-17: of %d: %d were reset at once, %d later, %d answered, %d wait", tries, tries-len(conns), ended, answered, silent)
			}
			work("meanwhile")
			held := settled(t, p, 0)
			if held > 250 {
				t.Errorf("%s has %d of its 256 descriptors", c.role, held)
			}
			begin := time.Now()
			if c.direct {
				w.run("bot", "ping", "db", "--direct", w.lanes)
			} else {
				w.run("bot", "ping", "db")
			}
			came := time.Since(begin)
			for _, s := range conns {
				s.Close()
			}
			begin = time.Now()
			ready(t, w.addr)
			took := time.Since(begin)
			work("after")
			if lines := w.logged(p, `too many open files`); len(lines) > 0 {
				t.Errorf("%s ran out of descriptors %d times: %s", c.role, len(lines), lines[0])
			}
			t.Logf("F-17: %s: %d descriptors, %d before; a ping in %v meanwhile; a new stream %v after they were given back; %d lines logged",
				c.role, held, before.descriptors[c.role], came.Round(time.Millisecond), took.Round(time.Millisecond), len(w.logged(p, ``)))
			bar(t, took <= time.Second, "a new stream took %v", took)
			settled(t, p, before.descriptors[c.role]+5)
		})
	}
}
