package journeys_test

import (
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/portal-tunnel/portal/tests/process"
)

// meeting is a house whose members meet at a relay.
type meeting struct {
	*house
	relay *process.Process
	at    string // where the relay listens
	pin   string // of a blind one: its identifier
}

// newMeeting has the authority in the relay's process.
func newMeeting(t testing.TB) *meeting {
	t.Helper()
	m := &meeting{house: newHomes(t, "relay")}
	m.open("127.0.0.1:0")
	return m
}

// open starts the relay, or starts it again.
func (m *meeting) open(listen string) {
	m.t.Helper()
	m.relay = m.start("relay", "relay", "--listen", listen, "--authority")
	m.at = m.line(m.relay, `relay ready on (\S+)`)
}

// newBlindMeeting has a relay that is an identity and an address, and does not run yet. Its
// authority is elsewhere, and comes to it as the others do.
func newBlindMeeting(t testing.TB) *meeting {
	t.Helper()
	m := &meeting{house: newHomes(t, "office"), at: free(t)}
	m.pin = m.id("relay").String()
	return m
}

// openBlind starts the authority, which comes to the relay by an address, and the relay.
func (m *meeting) openBlind(addr string, flags ...string) (trust string) {
	m.t.Helper()
	m.keeper = m.start("office", "authority", "--relay", m.pin+"@"+addr)
	trust = m.line(m.keeper, `--trust (P[A-Z2-7]{52})$`)
	m.relay = m.start("relay", append([]string{"relay", "--listen", m.at, "--trust", trust}, flags...)...)
	m.line(m.keeper, `authority ready via`)
	return trust
}

// outlet starts an outlet of a host for members whose role is agent, which is ready when it returns.
func (m *meeting) outlet(host, to string, flags ...string) *process.Process {
	m.t.Helper()
	args := []string{"outlet", "db", "--to", to, "--allow", `principal.role == "agent"`}
	p := m.start(host, append(args, flags...)...)
	m.line(p, `outlet db ready via`)
	return p
}

// inlet starts an inlet of a host and gives its address once it listens.
func (m *meeting) inlet(host, from string, flags ...string) (*process.Process, string) {
	m.t.Helper()
	p := m.start(host, append([]string{"inlet", "db", "--from", from}, flags...)...)
	return p, m.line(p, `inlet db listening on (\S+)`)
}

// fails runs a command of a host that must end with a status, and gives what it said.
func (h *house) fails(host string, status int, args ...string) string {
	h.t.Helper()
	_, err := h.portal(host).Run(h.ctx, h.home(host), args...)
	exit := (*exec.ExitError)(nil)
	if err == nil || errors.As(err, &exit) && exit.ExitCode() != status {
		h.t.Errorf("portal %s: %v, not status %d", strings.Join(args, " "), err, status)
	} else if exit == nil {
		h.t.Fatal(err)
	}
	if err == nil {
		return ""
	}
	return err.Error()
}
