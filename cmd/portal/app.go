package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/outlet"
	"github.com/urfave/cli/v2"
)

// The table of commands. An Action is a thin call: it reads the flags into an
// options struct and calls the function that does the work.

// shared are the flags of every command that have a variable without the
// command's name: PORTAL_HOME.
var shared = []string{"home", "log-level", "log-format"}

func everyCommand() []cli.Flag {
	const category = "Every command"
	return []cli.Flag{
		&cli.StringFlag{Category: category, Name: "home", Usage: "keep identity and membership in `DIR` [$PORTAL_HOME]"},
		&cli.StringFlag{Category: category, Name: "output", Aliases: []string{"o"}, Value: "text", Usage: "`text` or json"},
		&cli.StringFlag{Category: category, Name: "log-level", Usage: "`LEVEL`: debug, info, warn, error; info for what keeps running, else warn [$PORTAL_LOG_LEVEL]"},
		&cli.StringFlag{Category: category, Name: "log-format", Usage: "`FORMAT`: text or json; text on a terminal, else json [$PORTAL_LOG_FORMAT]"},
	}
}

const reservedMark = "reserved: not available in this version"

// notYetCommand keeps a name for a later version: asking for it is refused, not
// ignored.
func notYetCommand(name string) *cli.Command {
	return &cli.Command{Name: name, Usage: reservedMark, Hidden: true}
}

func reserved(c *cli.Command) bool { return c.Usage == reservedMark }

// notYetFlag keeps a flag for a later version.
func notYetFlag(name string) cli.Flag {
	return &cli.StringSliceFlag{Name: name, Usage: reservedMark, Hidden: true}
}

func isReservedFlag(f cli.Flag) bool {
	d, ok := f.(cli.DocGenerationFlag)
	return ok && d.GetUsage() == reservedMark
}

// takesCommand reports whether a command runs what stands behind `--`.
func takesCommand(c *cli.Command) bool { return strings.Contains(c.ArgsUsage, "-- CMD") }

// membership are the flags of a command that acts for a member.
func membershipFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "ticket", Usage: "redeem the ticket in `FILE` while this home is no member [$PORTAL_TICKET, $PORTAL_TICKET_FILE]"},
		&cli.BoolFlag{Name: "ephemeral", Usage: "keep the key in memory only; needs a ticket at each start, and 'portal status' does not see it"},
	}
}

func graceFlag() cli.Flag {
	return &cli.DurationFlag{Name: "grace", Value: 25 * time.Second, Usage: "at the end, wait `TIME` for streams before they are reset"}
}

// wayFlags say how to reach an outlet.
func wayFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringSliceFlag{Name: "direct", Usage: "the outlet's --listen, as `[ID@]HOST:PORT`; repeated: alternatives, the fastest first"},
		&cli.StringFlag{Name: "peer", Usage: "demand the outlet with this `ID`, besides its right to serve the name"},
		&cli.StringSliceFlag{Name: "relay", Usage: "a relay, as `[ID@]HOST:PORT`, in place of the membership's; repeated: alternatives, the fastest first"},
		&cli.StringSliceFlag{Name: "via", Usage: "several relays, one behind another, as `[ID@]HOST:PORT,[ID@]NAME…`: NAME is in the --next of the one before; repeated: alternatives"},
	}
}

func newApp(s *session) *cli.App {
	app := &cli.App{
		Name:      "portal",
		HelpName:  "portal",
		Usage:     "private services, reached by those a policy permits",
		UsageText: "portal COMMAND [flags and arguments in any order]",
		Description: "The shortest real set-up:\n\n" +
			"   relay$ portal relay --listen :4000 --advertise relay.example.com:4000 --authority\n" +
			"   relay$ portal ticket create --name db1 --serve orders-db | ssh db1 portal enroll -\n" +
			"   relay$ portal ticket create --name bot --attr role=agent | ssh bot portal enroll -\n" +
			"   db1$ portal outlet orders-db --to 5432 --allow 'principal.role == \"agent\"'\n" +
			"   bot$ portal inlet orders-db --from 15432\n\n" +
			"`portal demo` shows the whole of it on this host alone.\n\n" +
			"Exit status: 0 fine, 1 failed at run time, 2 usage or configuration, 3 refused,\n" +
			"4 unreachable, 5 drain timed out, 130 interrupted.",
		Reader:                    s.stdin,
		Writer:                    s.stdout,
		ErrWriter:                 s.stderr,
		HideVersion:               true,
		HideHelpCommand:           true,
		DisableSliceFlagSeparator: true, // commas are the policy's and the attribute's
		ExitErrHandler:            func(*cli.Context, error) {},
		Commands: []*cli.Command{
			{
				Name: "demo", Usage: "the whole path on loopback, in one process, each step proved", Category: "Begin",
				Flags: []cli.Flag{notYetFlag("to")},
				Action: s.once(0, 0, func(ctx context.Context, c *cli.Context) error {
					o := demoOptions{}
					if c.String("log-level") != "" {
						o.log = s.log
					}
					return runDemo(ctx, s, o)
				}),
			},
			{
				Name: "version", Usage: "what this is", Category: "Begin",
				Action: s.once(0, 0, func(context.Context, *cli.Context) error { return showVersion(s) }),
			},
			{
				Name: "explain", Usage: "what an error code means, and what to do", ArgsUsage: "PORTAL-E…", Category: "Begin",
				Action: s.once(1, 1, func(_ context.Context, c *cli.Context) error { return explain(s, c.Args().First()) }),
			},

			{
				Name: "authority", Usage: "issue credentials to members", Category: "Membership",
				Description: "Creates the authority on first start. It answers on --listen: enrolment by ticket, and renewal.\n" +
					"Whoever controls this host can issue credentials.",
				Flags: []cli.Flag{
					&cli.StringSliceFlag{Name: "listen", Usage: "answer on `ADDR`: PORT (loopback), :PORT (every interface), HOST:PORT"},
					&cli.StringSliceFlag{Name: "advertise", Usage: "`HOST:PORT` that tickets name, where it differs from --listen"},
					&cli.DurationFlag{Name: "credential-ttl", Value: time.Hour, Usage: "`TIME` that a credential lives; renewed at half of it"},
					graceFlag(),
					&cli.StringSliceFlag{Name: "relay", Usage: "be found at the relay `ID@HOST:PORT`, which trusts this authority; repeated: at all of them"},
				},
				Action: s.long(0, 0, func(ctx context.Context, c *cli.Context) error {
					return runAuthority(ctx, s, authorityOptions{
						home:      c.String("home"),
						listen:    c.StringSlice("listen"),
						relay:     c.StringSlice("relay"),
						advertise: c.StringSlice("advertise"),
						ttl:       c.Duration("credential-ttl"),
						grace:     c.Duration("grace"),
					})
				}),
			},
			{
				Name: "ticket", Usage: "let somebody in", Category: "Membership",
				Subcommands: []*cli.Command{
					{
						Name: "create", Usage: "print one ticket on stdout, and on stderr what it grants",
						Description: "portal ticket create --name db1 --serve orders-db | ssh db1 portal enroll -\n" +
							"portal ticket create --name bot --attr role=agent --attr 'level:=3' --out bot.ticket",
						Flags: []cli.Flag{
							&cli.StringFlag{Name: "name", Usage: "the member's `NAME`"},
							&cli.StringSliceFlag{Name: "attr", Usage: "grant `k=v`, or k:=JSON for integers, booleans and lists of strings"},
							&cli.StringSliceFlag{Name: "serve", Usage: "allow an outlet of this `NAME`; a trailing /* is a wildcard"},
							&cli.BoolFlag{Name: "as-relay", Usage: "allow to be a relay"},
							&cli.DurationFlag{Name: "ttl", Value: 10 * time.Minute, Usage: "redeemable for `TIME`"},
							&cli.IntFlag{Name: "uses", Value: 1, Usage: "redeemable by `N` identities"},
							&cli.StringFlag{Name: "out", Usage: "write it to `FILE` (0600) in place of stdout"},
							&cli.StringSliceFlag{Name: "advertise", Usage: "`HOST:PORT` of the authority, in place of its own"},
							&cli.StringSliceFlag{Name: "relay", Usage: "a relay to the authority, as `ID@HOST:PORT`, in place of its own ways; repeated: several"},
						},
						Action: s.once(0, 0, func(ctx context.Context, c *cli.Context) error {
							return createTicket(ctx, s, ticketOptions{
								home:      c.String("home"),
								name:      c.String("name"),
								attr:      c.StringSlice("attr"),
								serve:     c.StringSlice("serve"),
								relay:     c.Bool("as-relay"),
								ttl:       c.Duration("ttl"),
								uses:      c.Int("uses"),
								out:       c.String("out"),
								advertise: c.StringSlice("advertise"),
								through:   c.StringSlice("relay"),
							})
						}),
					},
					{
						Name: "list", Usage: "tickets that were made, without their secrets",
						Action: s.once(0, 0, func(ctx context.Context, c *cli.Context) error { return listTickets(ctx, s, c.String("home")) }),
					},
					{
						Name: "revoke", Usage: "make a ticket worthless", ArgsUsage: "REF",
						Action: s.once(1, 1, func(ctx context.Context, c *cli.Context) error {
							return revokeTicket(ctx, s, c.String("home"), c.Args().First())
						}),
					},
				},
			},
			{
				Name: "enroll", Usage: "become a member by a ticket", ArgsUsage: "[FILE|-]", Category: "Membership",
				Description: "The ticket is read from FILE, from stdin (-), from $PORTAL_TICKET, from the file that\n" +
					"$PORTAL_TICKET_FILE names, or asked for on the terminal; never from the command line.",
				Flags: []cli.Flag{
					&cli.StringSliceFlag{Name: "direct", Usage: "the authority's --listen, as `HOST:PORT`, in place of the ticket's; remembered"},
					&cli.DurationFlag{Name: "timeout", Value: 30 * time.Second, Usage: "try for `TIME` to reach the authority"},
					&cli.StringSliceFlag{Name: "relay", Usage: "a relay to the authority, as `ID@HOST:PORT`, in place of the ticket's; remembered"},
				},
				Action: s.once(0, 1, func(ctx context.Context, c *cli.Context) error {
					return runEnroll(ctx, s, enrollOptions{
						home:    c.String("home"),
						file:    c.Args().First(),
						direct:  c.StringSlice("direct"),
						relay:   c.StringSlice("relay"),
						timeout: c.Duration("timeout"),
					})
				}),
			},
			{
				Name: "identity", Usage: "who this is", Category: "Membership",
				Subcommands: []*cli.Command{
					{
						Name: "show", Usage: "print the identifier",
						Action: s.once(0, 0, func(_ context.Context, c *cli.Context) error { return showIdentity(s, c.String("home")) }),
					},
					notYetCommand("rotate"),
				},
			},
			{
				Name: "credential", Usage: "what this may do", Category: "Membership",
				Subcommands: []*cli.Command{
					{
						Name: "list", Usage: "the credential of this home",
						Action: s.once(0, 0, func(_ context.Context, c *cli.Context) error { return listCredentials(s, c.String("home")) }),
					},
					notYetCommand("issue"),
				},
			},

			{
				Name: "relay", Usage: "join those who can only dial out, and see nothing", Category: "Tunnel",
				Description: "portal relay --listen :4000 --advertise relay.example.com:4000 --authority\n" +
					"portal relay --listen :4000 --advertise relay.example.com:4000 --trust PA6Z…\n" +
					"Passes sealed bytes between inlets and outlets of the authorities it trusts: those of --trust, or\n" +
					"the one that it is a member of.",
				Flags: slices.Concat([]cli.Flag{
					&cli.StringSliceFlag{Name: "listen", Usage: "take connections on `ADDR`: PORT (loopback), :PORT (every interface), HOST:PORT"},
					&cli.StringSliceFlag{Name: "advertise", Usage: "`HOST:PORT` by which others reach it"},
					&cli.StringSliceFlag{Name: "trust", Usage: "serve members of the authority with this `ID`"},
					&cli.StringSliceFlag{Name: "allow-serve", Usage: "who may serve a name, besides a credential that says so: `P` is a Cedar expression or @FILE"},
					&cli.StringSliceFlag{Name: "allow-connect", Usage: "who may ask for a name, of all members: `P`"},
					&cli.StringSliceFlag{Name: "next", Usage: "another relay that callers may go on to, as `NAME=[ID@]HOST:PORT`; they then take no other ID there"},
					&cli.StringSliceFlag{Name: "allow-next", Usage: "who may go on; nobody unless said: `P`"},
					&cli.StringSliceFlag{Name: "from-relay", Usage: "`CIDR` of other relays: their connections count as many sources"},
					&cli.BoolFlag{Name: "authority", Usage: "host the authority in this process: whoever controls this host can then issue credentials"},
					&cli.DurationFlag{Name: "credential-ttl", Value: time.Hour, Usage: "with --authority: `TIME` that a credential lives; renewed at half of it"},
					graceFlag(),
				}, membershipFlags()),
				Action: s.long(0, 0, func(ctx context.Context, c *cli.Context) error {
					return runRelay(ctx, s, relayOptions{
						member:    memberFlags(c),
						listen:    c.StringSlice("listen"),
						advertise: c.StringSlice("advertise"),
						trust:     c.StringSlice("trust"),
						serve:     c.StringSlice("allow-serve"),
						connect:   c.StringSlice("allow-connect"),
						next:      c.StringSlice("next"),
						allowNext: c.StringSlice("allow-next"),
						from:      c.StringSlice("from-relay"),
						authority: c.Bool("authority"),
						ttl:       c.Duration("credential-ttl"),
						ttlGiven:  c.IsSet("credential-ttl"),
						grace:     c.Duration("grace"),
					})
				}),
			},
			{
				Name: "outlet", Usage: "serve a private target under a name", ArgsUsage: "NAME [-- CMD …]", Category: "Tunnel",
				Description: "portal outlet orders-db --to 5432 --listen :4100 --allow 'principal.role == \"agent\"'\n" +
					"portal outlet files --listen :4100 --allow @files.cedar -- cat /srv/report.txt",
				Flags: slices.Concat([]cli.Flag{
					&cli.StringFlag{Name: "to", Usage: "the target: `PORT`, HOST:PORT or unix:/path"},
					&cli.StringSliceFlag{Name: "allow", Usage: "who may open it: `P` is a Cedar expression or @FILE; repeated: any of them"},
					&cli.StringSliceFlag{Name: "listen", Usage: "take channels on `ADDR`: PORT (loopback), :PORT (every interface), HOST:PORT"},
					&cli.StringSliceFlag{Name: "label", Usage: "`k=v` or k:=JSON, the policy's resource.k"},
					&cli.IntFlag{Name: "max-streams", Value: outlet.DefaultStreams, Usage: "`N` streams to the target at once; below PostgreSQL's default of 100"},
					&cli.IntFlag{Name: "max-streams-each", Usage: "`N` of them for one identity, so that others find room; without it, all"},
					&cli.IntFlag{Name: "max-dials", Value: outlet.DefaultDials, Usage: "`N` dials of the target at once"},
					&cli.DurationFlag{Name: "dial-timeout", Value: 10 * time.Second, Usage: "the target must accept within `TIME`"},
					graceFlag(),
					&cli.StringSliceFlag{Name: "relay", Usage: "be found at the relay `[ID@]HOST:PORT`, in place of the membership's; repeated: at all of them"},
					&cli.StringFlag{Name: "carrier", Value: "dial-back", Usage: "how lanes come from a relay: `dial-back`, a connection each, or yamux, one connection for all"},
				}, membershipFlags()),
				Action: s.long(1, 1, func(ctx context.Context, c *cli.Context) error {
					return runOutlet(ctx, s, outletOptions{
						member:       memberFlags(c),
						name:         c.Args().First(),
						to:           c.String("to"),
						command:      s.after,
						allow:        c.StringSlice("allow"),
						listen:       c.StringSlice("listen"),
						relay:        c.StringSlice("relay"),
						carrier:      c.String("carrier"),
						carrierGiven: c.IsSet("carrier"),
						label:        c.StringSlice("label"),
						streams:      c.Int("max-streams"),
						streamsEach:  c.Int("max-streams-each"),
						eachGiven:    c.IsSet("max-streams-each"),
						dials:        c.Int("max-dials"),
						dialTimeout:  c.Duration("dial-timeout"),
						grace:        c.Duration("grace"),
					})
				}),
			},
			{
				Name: "inlet", Usage: "listen here, come out there", ArgsUsage: "NAME", Category: "Tunnel",
				Description: "portal inlet orders-db --from 15432 --direct db1:4100\n" +
					"portal inlet orders-db --from unix:/run/portal/.s.PGSQL.5432 --mode 0660 --group app --direct db1:4100 --kind pg",
				Flags: slices.Concat([]cli.Flag{
					&cli.StringSliceFlag{Name: "from", Usage: "listen on `ADDR`: PORT (loopback), HOST:PORT, unix:/path; port 0 takes a free one"},
				}, wayFlags(), []cli.Flag{
					&cli.StringSliceFlag{Name: "require", Usage: "what the outlet must be, besides being allowed to serve NAME: `P` is a Cedar expression or @FILE"},
					&cli.StringFlag{Name: "kind", Value: "raw", Usage: "`KIND` of the bytes, so that a refusal can be said in them: raw, pg, http"},
					&cli.StringSliceFlag{Name: "host", Usage: "with --kind http: requests may name the host `NAME`, besides this one's names; repeated: any of them"},
					&cli.BoolFlag{Name: "unsafe-listen", Usage: "allow --from on every interface: whoever reaches this host may use the inlet"},
					&cli.StringFlag{Name: "mode", Value: "0600", Usage: "who may open a Unix socket, as octal `MODE`"},
					&cli.StringFlag{Name: "group", Usage: "the Unix socket's `GROUP`"},
					&cli.DurationFlag{Name: "hold", Value: 5 * time.Second, Usage: "hold a connection that comes too early for `TIME`, then reset it"},
					&cli.IntFlag{Name: "max-streams", Value: inlet.DefaultStreams, Usage: "`N` connections at once"},
					graceFlag(),
				}, membershipFlags()),
				Action: s.long(1, 1, func(ctx context.Context, c *cli.Context) error {
					return runInlet(ctx, s, inletOptions{
						member:  memberFlags(c),
						way:     wayOf(c),
						name:    c.Args().First(),
						from:    c.StringSlice("from"),
						require: c.StringSlice("require"),
						kind:    c.String("kind"),
						hosts:   c.StringSlice("host"),
						unsafe:  c.Bool("unsafe-listen"),
						mode:    c.String("mode"),
						moded:   c.IsSet("mode"),
						group:   c.String("group"),
						hold:    c.Duration("hold"),
						streams: c.Int("max-streams"),
						grace:   c.Duration("grace"),
					})
				}),
			},
			{
				Name: "connect", Usage: "inlets for the life of one command, or a stream on stdin and stdout",
				ArgsUsage: "NAME[,NAME…] [-- CMD …]", Category: "Tunnel", Description: connectUsage,
				Flags: slices.Concat(wayFlags(), []cli.Flag{
					&cli.StringFlag{Name: "kind", Value: "raw", Usage: "`KIND` of the bytes: raw, http, or pg, which comes with a Unix socket, PGHOST and PGPORT"},
					&cli.StringSliceFlag{Name: "env", Usage: "set a variable of CMD, as `VAR=TEMPLATE`, in which {addr}, {host}, {port} and {NAME.addr}… are filled in"},
					&cli.DurationFlag{Name: "timeout", Value: 30 * time.Second, Usage: "every name must be there within `TIME`"},
				}, membershipFlags()),
				Action: s.lend(1, 1, func(ctx context.Context, c *cli.Context) error {
					return runConnect(ctx, s, connectOptions{
						member:  memberFlags(c),
						way:     wayOf(c),
						list:    c.Args().First(),
						kind:    c.String("kind"),
						setting: c.StringSlice("env"),
						timeout: c.Duration("timeout"),
						command: s.after,
					})
				}),
			},
			{
				Name: "ping", Usage: "ask an outlet whether this member may come in, and how long it takes hop by hop", ArgsUsage: "NAME", Category: "Tunnel",
				Flags: slices.Concat(wayFlags(), []cli.Flag{
					&cli.BoolFlag{Name: "target", Usage: "have the outlet dial its target as well"},
					// Longer than an outlet dials, so that it can say that its target is silent.
					&cli.DurationFlag{Name: "timeout", Value: 15 * time.Second, Usage: "give up after `TIME`"},
				}, membershipFlags()),
				Action: s.once(1, 1, func(ctx context.Context, c *cli.Context) error { return runPing(ctx, s, pingFlags(c)) }),
			},
			{
				Name: "wait", Usage: "return when an outlet lets this member in: for scripts", ArgsUsage: "NAME", Category: "Tunnel",
				Description: "portal wait orders-db --timeout 1m && psql -h localhost -p 15432\n" +
					"Exit status: 0 it does, 3 refused, 4 not in time.",
				Flags: slices.Concat(wayFlags(), []cli.Flag{
					&cli.BoolFlag{Name: "target", Usage: "wait until its target answers as well"},
					&cli.DurationFlag{Name: "timeout", Value: 30 * time.Second, Usage: "give up after `TIME`"},
				}, membershipFlags()),
				Action: s.once(1, 1, func(ctx context.Context, c *cli.Context) error { return runWait(ctx, s, pingFlags(c)) }),
			},
			{
				Name: "names", Usage: "which names are served that this member may ask for", Category: "Tunnel",
				Description: "Asks the relays of the membership, or of --relay and --via. A relay knows who may ask for a name;\n" +
					"whether the outlet lets this member in, `portal ping NAME` finds out.",
				Flags: slices.Concat([]cli.Flag{
					&cli.StringSliceFlag{Name: "relay", Usage: "a relay, as `[ID@]HOST:PORT`, in place of the membership's; repeated: all of them"},
					&cli.StringSliceFlag{Name: "via", Usage: "a relay behind others, as `[ID@]HOST:PORT,[ID@]NAME…`; repeated: all of them"},
					&cli.DurationFlag{Name: "timeout", Value: 15 * time.Second, Usage: "give up after `TIME`"},
				}, membershipFlags()),
				Action: s.once(0, 0, func(ctx context.Context, c *cli.Context) error {
					return runNames(ctx, s, namesOptions{member: memberFlags(c), way: wayOf(c), timeout: c.Duration("timeout")})
				}),
			},
			{
				Name: "status", Usage: "what runs on this home, and by which way", ArgsUsage: "[NAME]", Category: "Tunnel",
				Description: "Asks all processes of the home at once; those of --ephemeral have none. With NAME: only those of\n" +
					"that name. Exit status 0, whatever their states are, and when nothing runs; 1 when a process\n" +
					"does not answer within 2 s: it is listed as `no answer`.",
				Action: s.once(0, 1, func(ctx context.Context, c *cli.Context) error {
					return runStatus(ctx, s, statusOptions{home: c.String("home"), name: c.Args().First()})
				}),
			},
		},
	}
	for _, name := range []string{"up", "check", "doctor",
		"member", "policy", "audit", "mailbox", "send", "call", "completion"} {
		app.Commands = append(app.Commands, notYetCommand(name))
	}
	for _, c := range app.Commands {
		finish(c)
	}
	return app
}

// finish gives a command what every command has.
func finish(c *cli.Command) {
	c.HideHelpCommand = true
	c.OnUsageError = func(c *cli.Context, err error, _ bool) error {
		remedy := "see `" + c.Command.HelpName + " --help`"
		text := strings.Replace(err.Error(), " for flag -", " for --", 1)
		if value, ok := strings.CutSuffix(text, ": parse error"); ok {
			text = value + ": it is no number, or no time with its unit, such as 5s"
		}
		return fail(codeUsage, remedy, "%s: %s", strings.TrimPrefix(c.Command.HelpName, "portal "), plain(text))
	}
	for _, sub := range c.Subcommands {
		finish(sub)
	}
	if len(c.Subcommands) == 0 {
		c.Flags = append(c.Flags, everyCommand()...)
	}
}

type action = func(context.Context, *cli.Context) error

// once is the Action of a command that ends by itself.
func (s *session) once(least, most int, do action) cli.ActionFunc {
	return func(c *cli.Context) error {
		if err := arguments(c, s, least, most); err != nil {
			return err
		}
		if err := s.begin(c, "warn"); err != nil {
			return err
		}
		ctx, after := interruptible(c.Context)
		return after(do(ctx, c))
	}
}

// long is the Action of a command that runs until it is told to end; with
// -o json its events go to stdout.
func (s *session) long(least, most int, do action) cli.ActionFunc {
	return func(c *cli.Context) error {
		if err := arguments(c, s, least, most); err != nil {
			return err
		}
		if err := s.begin(c, "info"); err != nil {
			return err
		}
		if s.json {
			s.events = newLines(s.stdout, lostEvents)
		}
		return do(c.Context, c)
	}
}

// explain says what a code means.
func explain(s *session, text string) error {
	var n int
	if _, err := fmt.Sscanf(strings.TrimPrefix(strings.ToUpper(text), "PORTAL-"), "E%d", &n); err != nil {
		return fail(codeUsage, "portal explain PORTAL-E0301", "%q is no code", plain(text))
	}
	cause, ok := causes[code(n)]
	if !ok {
		return fail(codeUsage, "see that it is copied as it was printed", "there is no code %s", code(n))
	}
	if s.json {
		return s.document(map[string]any{"code": code(n).String(), "exit_status": code(n).exit(), "cause": cause[0], "remedy": cause[1]})
	}
	return s.print("%s (exit status %d)\n%s\ntry: %s\n", code(n), code(n).exit(), cause[0], cause[1])
}
