package main

import (
	"context"
	"io"
	"strings"
	"syscall"
	"testing"

	"github.com/portal-tunnel/portal/examples/postgres/server"
	"github.com/portal-tunnel/portal/tests/fault/ledger"
	"github.com/portal-tunnel/portal/tests/fault/proxy"
	"github.com/portal-tunnel/portal/tests/fault/ruler"
	"github.com/portal-tunnel/portal/tests/tunnels"
)

func TestAFaultIsReadAsItIsWritten(t *testing.T) {
	for text, want := range map[string]proxy.Fault{
		"rst@1000":               {Kind: proxy.RST, At: 1000},
		"fin@0,in":               {Kind: proxy.FIN, Direction: proxy.In},
		"flip@7,out,n=3":         {Kind: proxy.Flip, At: 7, N: 3},
		"drop@r5":                {Kind: proxy.Drop, Unit: proxy.Record, At: 5},
		"truncate@r5,in,n=1,fit": {Kind: proxy.Truncate, Unit: proxy.Record, At: 5, Direction: proxy.In, N: 1, Fit: true},
		"reflect@m2":             {Kind: proxy.Reflect, Unit: proxy.Message, At: 2},
	} {
		if got, err := parseFault(text); err != nil || got != want {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "rst", "rst@", "rst@x", "melt@5", "drop@5", "flip@5,n=8", "rst@5,sideways", "drop@r-1", "insert@r5", "replay@m1", "flip@1,n=x"} {
		if f, err := parseFault(text); err == nil {
			t.Errorf("%q is read as %v", text, f)
		}
	}
}

// What passes bytes on and knows nothing of them shows the cut as it came: the table is not always the same.
func TestWithoutATunnelAnEndIsAnEndAndAResetAReset(t *testing.T) {
	tr := &trial{cuts: 4, size: 4 << 20, dir: t.TempDir()}
	r := tr.run(t.Context(), tunnels.System{Key: "none", Name: "none",
		Start: func(ctx context.Context, d *tunnels.Deployment) (string, error) { return d.Link(ctx, d.Target) }})
	if r.err != nil {
		t.Fatal(r.err)
	}
	for name, got := range map[string]tally{"downloads": r.down, "uploads": r.up} {
		if got != (tally{reset: 2, clean: 2}) {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestOtherCommandsAreATunnelTooAndJudged(t *testing.T) {
	s, err := chosen(nil, "far {target} {addr}", "near {far} {listen}")
	if err != nil || len(s) != 1 || s[0].Key != "command" {
		t.Fatalf("%v, %v", s, err)
	}
	for _, n := range []tally{{clean: 1}, {wrong: 1}, {hung: 1}} {
		if err := verdict([]result{{system: s[0], up: n}}); err == nil {
			t.Errorf("%v is well", n)
		}
		if err := verdict([]result{{system: tunnels.System{Peer: true}, up: n}, {system: s[0], up: tally{reset: 1}}}); err != nil {
			t.Error(err)
		}
	}
	if _, err := chosen([]string{"carrier-pigeon"}, "", ""); err == nil {
		t.Error("a pigeon is a tunnel")
	}
}

func TestAnEndingIsJudgedByWhatWasRead(t *testing.T) {
	b := &bench{trial: &trial{size: 100}}
	for _, c := range []struct {
		n    int64
		err  error
		want ending
	}{
		{100, nil, whole}, {99, nil, clean}, {0, nil, clean}, {50, syscall.ECONNRESET, reset},
		{50, ruler.ErrWrong, wrong}, {50, context.DeadlineExceeded, hung}, {50, io.ErrUnexpectedEOF, other},
	} {
		if got := b.judge(c.n, c.err); got != c.want {
			t.Errorf("%d bytes and %v: %v", c.n, c.err, got)
		}
	}
}

func TestALedgerIsRightWhereNothingIsBetween(t *testing.T) {
	db, err := server.Start(t.Context(), &server.Options{Setup: ledger.Setup})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	there, nowhere := ledger.URL(db.Addr()), ledger.URL("127.0.0.1:1")
	for _, c := range []struct {
		through, past string
		wrong         string // what the error says; "": there is none
	}{
		{there, there, ""},
		{nowhere, there, "no transaction was acknowledged"},
		{there, nowhere, "preparing the ledger"},
		{"", there, "it needs -through URL"},
	} {
		err := bank(t.Context(), []string{"-through", c.through, "-past", c.past, "-for", "300ms"})
		if c.wrong == "" && err != nil || c.wrong != "" && (err == nil || !strings.Contains(err.Error(), c.wrong)) {
			t.Errorf("through %q, past %q: %v", c.through, c.past, err)
		}
	}
}
