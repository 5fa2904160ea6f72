package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/outlet"
	"github.com/urfave/cli/v2"
)

func orderLine(env environment, args ...string) (*commandLine, error) {
	return order(newApp(new(session)), args, env)
}

func TestFlagsWorkBeforeAndAfterArguments(t *testing.T) {
	want := []string{"portal", "outlet", "--to=5432", "--allow=true", "--ephemeral", "--output=json", "--", "db"}
	for _, line := range []string{
		"outlet --to 5432 --allow true --ephemeral -o json db",
		"outlet db --to 5432 --allow true --ephemeral -o json",
		"outlet --to=5432 db --allow=true --ephemeral -o=json",
		"outlet -to 5432 --allow true db --ephemeral --output json",
	} {
		l, err := orderLine(nil, strings.Fields(line)...)
		if err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		if got := l.argv("portal"); !slices.Equal(got, want) {
			t.Errorf("%s:\n got %q\nwant %q", line, got, want)
		}
	}
}

func TestFlagsBeforeTheCommandAreTheCommands(t *testing.T) {
	l, err := orderLine(environment{"PORTAL_HOME=/env"}, "--home", "/h", "-o", "json", "ticket", "list")
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"portal", "ticket", "list", "--home=/h", "--output=json", "--"}; !slices.Equal(l.argv("portal"), want) {
		t.Errorf("got %q, want %q", l.argv("portal"), want)
	}
}

func TestReorderingStopsAtTheDashes(t *testing.T) {
	l, err := orderLine(nil, "outlet", "db", "--allow", "true", "--", "cat", "--listen", "--", "-x")
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"cat", "--listen", "--", "-x"}; !slices.Equal(l.after, want) {
		t.Errorf("behind --: %q, want %q", l.after, want)
	}
	if want := []string{"portal", "outlet", "--allow=true", "--", "db"}; !slices.Equal(l.argv("portal"), want) {
		t.Errorf("got %q, want %q", l.argv("portal"), want)
	}
}

func TestEnvironmentGivesWayToTheLine(t *testing.T) {
	env := environment{
		"PORTAL_OUTLET_TO=1", "PORTAL_OUTLET_ALLOW=a, b", "PORTAL_OUTLET_EPHEMERAL=true", "PORTAL_OUTLET_DIAL_TIMEOUT=3s",
		"PORTAL_HOME=/all", "PORTAL_LOG_LEVEL=debug", "PORTAL_OUTLET_LOG_LEVEL=warn", "PORTAL_OUTLET_GRACE=", "PORTAL_INLET_HOLD=9s",
	}
	l, err := orderLine(env, "outlet", "db", "--to", "2")
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(l.flags)
	want := []string{"--allow=a, b", "--dial-timeout=3s", "--ephemeral=true", "--home=/all", "--log-level=warn", "--to=2"}
	if !slices.Equal(l.flags, want) {
		t.Errorf("got %q, want %q", l.flags, want)
	}
}

func TestEnvironmentOfASubcommandHasBothNames(t *testing.T) {
	l, err := orderLine(environment{"PORTAL_TICKET_CREATE_AS_RELAY=true"}, "ticket", "create")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(l.flags, []string{"--as-relay=true"}) {
		t.Errorf("got %q", l.flags)
	}
}

func TestCommasNeverSplitAValue(t *testing.T) {
	var got []string
	app := newApp(&session{stdout: os.Stdout, stderr: newLines(new(bytes.Buffer), lostLines)})
	app.Command("outlet").Action = func(c *cli.Context) error { got = c.StringSlice("allow"); return nil }
	l, err := order(app, []string{"outlet", "db", "--allow", `["a","b"].contains(principal.role)`, "--allow", "x, y"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := app.RunContext(context.Background(), l.argv("portal")); err != nil {
		t.Fatal(err)
	}
	if want := []string{`["a","b"].contains(principal.role)`, "x, y"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestLinesThatAreRefused(t *testing.T) {
	const ticket = "portal1aaaqeayeaudaocajbifqydiob4ibceqtcqkrmfyydenbwha5dypsaij"
	for _, test := range []struct {
		line string
		code code
		says string // in the text or the remedy
	}{
		{"outlet --alow true", codeUnknownFlag, "did you mean --allow?"},
		{"outlet --lisetn 4", codeUnknownFlag, "did you mean --listen?"},
		{"outlet db --zzzzz", codeUnknownFlag, "portal outlet --help"},
		{"--hme /x version", codeUnknownFlag, "did you mean --home?"},
		{"ticket creat", codeUnknown, "did you mean `portal ticket create`?"},
		{"outlte", codeUnknown, "did you mean `portal outlet`?"},
		{"ticket", codeUsage, "create, list, revoke"},
		{"outlet --to", codeUsage, "needs a value"},
		{"outlet --to --allow true", codeUsage, "--to needs a value"},
		{"outlet --to -- cat", codeUsage, "--to needs a value"},
		{"demo --to 5432", codeNotYet, "reserved"},
		{"doctor", codeNotYet, "reserved"},
		{"up -f portal.yaml", codeNotYet, "reserved"},
		{"identity rotate", codeNotYet, "reserved"},
		{"credential issue", codeNotYet, "reserved"},
		{"enroll " + ticket, codeSecretArg, "stdin"},
		{"enroll " + strings.ToUpper(ticket), codeSecretArg, "stdin"},
		{"outlet db --ticket " + ticket, codeSecretArg, "stdin"},
		{"outlet db --ticket=" + ticket, codeSecretArg, "stdin"},
		{ticket, codeSecretArg, "stdin"},
		{"--home " + ticket + " identity show", codeSecretArg, "stdin"},
		{"--home=" + ticket + " identity show", codeSecretArg, "stdin"},
		{"-o " + ticket + " version", codeSecretArg, "stdin"},
		{"--help " + ticket, codeSecretArg, "stdin"},
		{"-" + ticket, codeSecretArg, "stdin"},
		{"enroll -" + ticket, codeSecretArg, "stdin"},
		{"enroll --" + ticket, codeSecretArg, "stdin"},
		{"enroll --ticket:" + ticket, codeSecretArg, "stdin"},
		{"outlet db --tikcet=" + ticket, codeSecretArg, "stdin"},
		{"outlet db --label x:=" + ticket, codeSecretArg, "stdin"},
		{"ticket revoke /" + ticket + "/", codeSecretArg, "stdin"},
		{"ticket " + ticket, codeSecretArg, "stdin"},
		{"explain " + ticket[:40], codeSecretArg, "stdin"},
		{"--home -- " + ticket, codeUsage, "needs a value"},
	} {
		_, err := orderLine(nil, strings.Fields(test.line)...)
		var f *failure
		if !errors.As(err, &f) {
			t.Errorf("portal %s: %v", test.line, err)
			continue
		}
		text := f.Error() + "\n" + f.remedy
		if f.code != test.code || f.code.exit() != exitUsage || !strings.Contains(text, test.says) {
			t.Errorf("portal %s: %s: %s", test.line, f.code, text)
		}
		if strings.Contains(strings.ToLower(text), ticket[:20]) {
			t.Errorf("portal %s: repeats the ticket: %s", test.line, text)
		}
	}
}

func TestTicketInAVariableForAFileIsRefused(t *testing.T) {
	_, err := orderLine(environment{"PORTAL_OUTLET_TICKET=portal1" + strings.Repeat("a", 60)}, "outlet", "db")
	var f *failure
	if !errors.As(err, &f) || f.code != codeSecretArg {
		t.Errorf("got %v", err)
	}
}

// Whoever is given a program to run gets its arguments as they are.
func TestTicketBehindTheDashesIsTheCommands(t *testing.T) {
	l, err := orderLine(nil, "outlet", "db", "--", "cat", "portal1"+strings.Repeat("a", 60))
	if err != nil || len(l.after) != 2 {
		t.Errorf("%+v, %v", l, err)
	}
}

// Every command and flag of the contract is either there or refused by name.
func TestEveryCommandOfTheContractIsKnown(t *testing.T) {
	for _, line := range []string{
		"demo", "relay", "authority", "ticket create", "ticket list", "ticket revoke", "enroll", "outlet", "inlet", "connect", "up", "check",
		"status", "ping", "wait", "names", "doctor", "member list", "identity show", "identity rotate", "credential list", "credential issue",
		"policy test", "audit list", "explain", "mailbox", "send", "call", "version", "completion bash",
	} {
		_, err := orderLine(nil, strings.Fields(line)...)
		var f *failure
		if errors.As(err, &f) && f.code != codeNotYet {
			t.Errorf("portal %s: %v", line, err)
		}
	}
	app := newApp(new(session))
	for command, flags := range map[string]string{
		"authority": "listen relay advertise credential-ttl",
		"enroll":    "relay direct timeout",
		"outlet":    "to allow relay listen label carrier grace ticket ephemeral home output",
		"inlet":     "from relay via direct peer require kind unsafe-listen mode group hold grace ticket ephemeral",
		"connect":   "relay via direct peer kind env timeout ticket ephemeral",
		"ping":      "relay via direct peer target",
		"relay":     "listen advertise authority trust allow-serve allow-connect next allow-next from-relay",
	} {
		for name := range strings.FieldsSeq(flags) {
			if findFlag(app.Command(command).Flags, name) == nil {
				t.Errorf("portal %s has no --%s", command, name)
			}
		}
	}
}

func TestLimitsOfTheOutletCommandAreThoseOfItsPackage(t *testing.T) {
	flags := newApp(new(session)).Command("outlet").Flags
	for name, want := range map[string]int{"max-streams": outlet.DefaultStreams, "max-dials": outlet.DefaultDials} {
		if f := findFlag(flags, name).(*cli.IntFlag); f.Value != want {
			t.Errorf("--%s is %d without being given, and the package's default is %d", name, f.Value, want)
		}
	}
}

// An outlet that is asked for its target must be able to say that it is silent.
func TestPingWaitsLongerThanAnOutletDials(t *testing.T) {
	app := newApp(new(session))
	ping := findFlag(app.Command("ping").Flags, "timeout").(*cli.DurationFlag).Value
	dial := findFlag(app.Command("outlet").Flags, "dial-timeout").(*cli.DurationFlag).Value
	if ping < dial+time.Second {
		t.Errorf("ping gives up after %s, an outlet after %s", ping, dial)
	}
}

func FuzzOrder(f *testing.F) {
	for _, line := range []string{"outlet db --to 1 -- x", "-o", "--", "ticket create --attr=a:=[1]", "help ticket", "-", "---", "--=", "outlet --=x", "enroll -"} {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		args := strings.Split(line, " ")
		l, err := orderLine(environment{"PORTAL_OUTLET_TO=1"}, args...)
		if err != nil {
			var fail *failure
			if !errors.As(err, &fail) || fail.code.exit() != exitUsage {
				t.Fatalf("%q: %v", line, err)
			}
			return
		}
		// Nothing is lost and nothing made up: each argument stood on the line, in order.
		rest := args
		for _, a := range append(slices.Clone(l.args), l.after...) {
			i := slices.Index(rest, a)
			if i < 0 {
				t.Fatalf("%q: argument %q", line, a)
			}
			rest = rest[i+1:]
		}
	})
}
