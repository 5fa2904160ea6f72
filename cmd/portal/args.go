package main

import (
	"regexp"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// The command line, put in order. urfave/cli takes flags only before arguments
// and reads the process's environment; people write flags anywhere, and a test
// brings its own environment. So the line is read here once, against the table
// of commands, and handed on as command, flags, `--`, arguments.

// A commandLine is what somebody asked for.
type commandLine struct {
	path  []string // the command: "ticket", "create"
	flags []string // --name=value; from the environment first, so that the line's win
	args  []string
	after []string // behind --; nil when there was none
	help  bool
}

// argv is the line as urfave/cli takes it.
func (l *commandLine) argv(app string) []string {
	out := append([]string{app}, l.path...)
	if l.help {
		return append(out, "--help")
	}
	out = append(out, l.flags...)
	return append(append(out, "--"), l.args...)
}

// order reads argv, without the program's name.
func order(app *cli.App, argv []string, env environment) (*commandLine, error) {
	// Before anything is said about a word: wherever a ticket stands in it, it
	// must not be repeated.
	for _, word := range argv {
		if word == "--" { // no flag takes that for its value
			break
		}
		if holdsTicket(word) {
			return nil, ticketInArgument()
		}
	}
	l := new(commandLine)
	var early []string // flags before the command: they are the command's
	rest := argv
	for len(rest) > 0 && strings.HasPrefix(rest[0], "-") && rest[0] != "--" {
		n := 1
		switch name, value, bound := cutFlag(rest[0]); {
		case name == "help" || name == "h":
			l.help = true
		case name == "version" || name == "v":
			return &commandLine{path: []string{"version"}}, nil
		default:
			f := findFlag(everyCommand(), name)
			if f == nil {
				return nil, unknownFlag(rest[0], "", everyCommand())
			}
			if !bound && takesValue(f) {
				if len(rest) < 2 || rest[1] == "--" {
					return nil, missingValue(rest[0])
				}
				value, n = rest[1], 2
			}
			early = append(early, join(f, value, bound || takesValue(f)))
		}
		rest = rest[n:]
	}
	if len(rest) == 0 || rest[0] == "--" {
		l.help = true
		return l, nil
	}
	if rest[0] == "help" {
		l.help = true
		if rest = rest[1:]; len(rest) == 0 {
			return l, nil
		}
	}

	cmd := findCommand(app.Commands, rest[0])
	if cmd == nil {
		return nil, unknownCommand(rest[0], "", app.Commands)
	}
	l.path, rest = append(l.path, cmd.Name), rest[1:]
	if reserved(cmd) {
		return nil, notYet("command `portal " + cmd.Name + "`")
	}
	for len(cmd.Subcommands) > 0 {
		if len(rest) == 0 || strings.HasPrefix(rest[0], "-") {
			if l.help || slices.Contains(rest, "--help") || slices.Contains(rest, "-h") {
				l.help = true
				return l, nil
			}
			return nil, fail(codeUsage, "see `portal "+strings.Join(l.path, " ")+" --help`",
				"%s: which one? %s", strings.Join(l.path, " "), strings.Join(names(cmd.Subcommands), ", "))
		}
		sub := findCommand(cmd.Subcommands, rest[0])
		if sub == nil {
			return nil, unknownCommand(rest[0], strings.Join(l.path, " ")+" ", cmd.Subcommands)
		}
		cmd, rest = sub, rest[1:]
		l.path = append(l.path, cmd.Name)
		if reserved(cmd) {
			return nil, notYet("command `portal " + strings.Join(l.path, " ") + "`")
		}
	}

	var given []string
	for len(rest) > 0 {
		word := rest[0]
		rest = rest[1:]
		if word == "--" {
			l.after = append([]string{}, rest...)
			break
		}
		if !strings.HasPrefix(word, "-") || word == "-" {
			l.args = append(l.args, word)
			continue
		}
		name, value, bound := cutFlag(word)
		if name == "help" || name == "h" {
			l.help = true
			continue
		}
		f := findFlag(cmd.Flags, name)
		if f == nil {
			if l.help {
				continue
			}
			return nil, unknownFlag(word, strings.Join(l.path, " "), cmd.Flags)
		}
		if isReservedFlag(f) {
			return nil, notYet("--" + f.Names()[0] + " of `portal " + strings.Join(l.path, " ") + "`")
		}
		if !bound && takesValue(f) {
			if len(rest) == 0 || rest[0] == "--" || isFlag(cmd.Flags, rest[0]) {
				return nil, missingValue(word)
			}
			value, rest, bound = rest[0], rest[1:], true
		}
		given = append(given, join(f, value, bound))
	}
	given = append(early, given...)

	fromEnv, err := environmentFlags(cmd, l.path, given, env)
	if err != nil {
		return nil, err
	}
	l.flags = append(fromEnv, given...)
	return l, nil
}

// environmentFlags are the flags that the line does not give and the
// environment does: PORTAL_OUTLET_ALLOW is --allow of `portal outlet`. A flag
// of every command has a variable for all of them as well: PORTAL_HOME.
func environmentFlags(cmd *cli.Command, path, given []string, env environment) ([]string, error) {
	var out []string
	prefix := "PORTAL_" + variable(strings.Join(path, "_")) + "_"
	for _, f := range cmd.Flags {
		name := f.Names()[0]
		if slices.ContainsFunc(given, func(g string) bool {
			return g == "--"+name || strings.HasPrefix(g, "--"+name+"=")
		}) {
			continue
		}
		v, ok := env.lookup(prefix + variable(name))
		if !ok && slices.Contains(shared, name) {
			v, ok = env.lookup("PORTAL_" + variable(name))
		}
		if !ok || v == "" {
			continue
		}
		if isReservedFlag(f) {
			return nil, notYet(prefix + variable(name))
		}
		if holdsTicket(v) {
			return nil, fail(codeSecretArg, "put the ticket in PORTAL_TICKET, or its file's name in PORTAL_TICKET_FILE",
				"%s%s holds a ticket; it takes the name of a file", prefix, variable(name))
		}
		out = append(out, join(f, v, true))
	}
	return out, nil
}

func variable(name string) string {
	return strings.ToUpper(strings.NewReplacer("-", "_", " ", "_").Replace(name))
}

// cutFlag takes apart --name=value, -n=value, --name.
func cutFlag(word string) (name, value string, bound bool) {
	name, value, bound = strings.Cut(strings.TrimPrefix(strings.TrimPrefix(word, "-"), "-"), "=")
	return name, value, bound
}

func join(f cli.Flag, value string, bound bool) string {
	if !bound {
		return "--" + f.Names()[0]
	}
	return "--" + f.Names()[0] + "=" + value
}

func findFlag(flags []cli.Flag, name string) cli.Flag {
	for _, f := range flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}

func isFlag(flags []cli.Flag, word string) bool {
	if len(word) < 2 || word[0] != '-' {
		return false
	}
	name, _, _ := cutFlag(word)
	return findFlag(flags, name) != nil
}

func takesValue(f cli.Flag) bool {
	d, ok := f.(cli.DocGenerationFlag)
	return ok && d.TakesValue()
}

func findCommand(cmds []*cli.Command, name string) *cli.Command {
	for _, c := range cmds {
		if c.HasName(name) {
			return c
		}
	}
	return nil
}

func names(cmds []*cli.Command) []string {
	var out []string
	for _, c := range cmds {
		if !reserved(c) {
			out = append(out, c.Name)
		}
	}
	return out
}

func unknownFlag(word, command string, flags []cli.Flag) error {
	name, _, _ := cutFlag(word)
	var all []string
	for _, f := range flags {
		all = append(all, f.Names()...)
	}
	see := strings.TrimSpace("portal " + command)
	remedy := "see `" + see + " --help`"
	if near := nearest(name, all); near != "" {
		remedy = "did you mean --" + near + "? " + remedy
	}
	// A value may be a secret, and is not what is unknown.
	dashes := word[:strings.Index(word, name)]
	return fail(codeUnknownFlag, remedy, "%s: unknown flag %s%s", strings.TrimPrefix(see, "portal "), dashes, name)
}

func unknownCommand(word, parent string, cmds []*cli.Command) error {
	remedy := "see `portal " + parent + "--help`"
	var all []string
	for _, c := range cmds {
		all = append(all, c.Names()...)
	}
	if near := nearest(word, all); near != "" {
		remedy = "did you mean `portal " + parent + near + "`? " + remedy
	}
	return fail(codeUnknown, remedy, "unknown command `portal %s%s`", parent, word)
}

func missingValue(word string) error {
	return fail(codeUsage, word+" VALUE, or "+word+"=VALUE when it begins with a dash", "%s needs a value", word)
}

func notYet(what string) error {
	return fail(codeNotYet, "", "%s is not available in this version; the syntax is reserved", what)
}

// aTicket is a ticket, or the most of one, anywhere in a word. 40 characters are
// more than any name of a file or service has that is written so.
var aTicket = regexp.MustCompile(`(?i)portal1[a-z0-9]{33}`)

// holdsTicket finds a secret where none must be.
func holdsTicket(word string) bool { return aTicket.MatchString(word) }

func ticketInArgument() error {
	return fail(codeSecretArg, "give it on stdin: `portal enroll -`; in a file: `portal enroll FILE`; or in PORTAL_TICKET. Make a new one: this one has been seen",
		"a ticket stands on the command line, where every user of this host can read it")
}

// nearest is the name that is a slip away from word: at most two edits, fewer
// than half its letters; empty when there is none.
func nearest(word string, names []string) string {
	best, at := "", 3
	for _, n := range names {
		if len(n) < 2 {
			continue
		}
		if d := distance(word, n); d < at && 2*d < len(n)+1 {
			best, at = n, d
		}
	}
	return best
}

// distance counts edits: a letter inserted, removed, replaced, or exchanged
// with its neighbour (optimal string alignment).
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	before, row := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	var twice []int
	for i := 1; i <= len(a); i++ {
		twice, before, row = before, row, make([]int, len(b)+1)
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(before[j]+1, row[j-1]+1, before[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], twice[j-2]+1)
			}
		}
	}
	return row[len(b)]
}
