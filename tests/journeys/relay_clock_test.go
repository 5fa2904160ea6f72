package journeys_test

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/authority"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/store"
	"github.com/portal-tunnel/portal/relay"
	"github.com/portal-tunnel/portal/routing"
)

// The authority is in this process, where its clock can be set; the relay and the host that enrolls
// are processes.
func TestAClockThatIsFiveMinutesOffIsToldAtEnrolmentAndNothingIsHalfDone(t *testing.T) {
	t.Parallel()
	m := newBlindMeeting(t)
	self, err := identity.NewSelf()
	if err != nil {
		t.Fatal(err)
	}
	st, err := store.Open(filepath.Join(t.TempDir(), "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	m.relay = m.start("relay", "relay", "--listen", m.at, "--trust", self.ID().String())
	m.line(m.relay, `relay ready`)

	var off atomic.Int64 // of the authority's clock
	node := new(routing.Node)
	defer node.Close()
	server := &authority.Server{Self: self, Store: st, Node: node, Now: func() time.Time { return time.Now().Add(time.Duration(off.Load())) }}
	defer server.Close()
	pin, err := identity.ParseID(m.pin)
	if err != nil {
		t.Fatal(err)
	}
	way := identity.Way{ID: pin, Addr: m.at}
	client := &relay.Client{ID: way.ID, Addr: way.Addr, Node: node, Self: self, Trust: identity.NewTrust()}
	links := &link.Server{Services: map[channel.Kind]link.Service{channel.Authority: server.Service()}}
	ctx, cancel := context.WithCancel(context.Background())
	ln := client.Listen(relay.AuthorityName, nil)
	ended := make(chan struct{}, 2)
	go func() { client.Run(ctx); ended <- struct{}{} }()
	go func() { links.Serve(ctx, ln); ended <- struct{}{} }()
	defer func() { cancel(); <-ended; <-ended }()

	ticket, err := server.CreateTicket(ctx, authority.Grant{Name: "bot", TTL: time.Hour, Uses: 1, Ways: []identity.Way{way}})
	if err != nil {
		t.Fatal(err)
	}
	text, err := ticket.Text()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(m.dir, "bot.ticket")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	m.run("bot", "identity", "show")
	before := files(t, m.home("bot"))
	for _, d := range []time.Duration{5 * time.Minute, -5 * time.Minute} {
		off.Store(int64(d))
		said := m.fails("bot", 3, "enroll", file)
		told := regexp.MustCompile(`this machine's clock says (\S+), the authority's says (\S+): .*\(PORTAL-E0308\)`).FindStringSubmatch(said)
		if told == nil {
			t.Fatalf("%v off: enroll says %s", d, said)
		}
		ours, err := time.Parse(time.RFC3339, told[1])
		theirs, terr := time.Parse(time.RFC3339, told[2])
		if err != nil || terr != nil || (theirs.Sub(ours)-d).Abs() > patience {
			t.Errorf("%v off: enroll says %s", d, said)
		}
		if files(t, m.home("bot")) != before {
			t.Errorf("%v off: the home is not as it was", d)
		}
		m.fails("bot", 2, "inlet", "db", "--from", "0")
	}
	// The ticket has not been spent.
	off.Store(0)
	m.run("bot", "enroll", file)
}

// files are the names and contents in a directory.
func files(t testing.TB, dir string) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		all.WriteString(path + "\n" + string(b) + "\n")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}
