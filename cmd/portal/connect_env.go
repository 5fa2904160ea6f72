package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/portal-tunnel/portal/inlet"
)

// How the command of `portal connect` finds its inlets, and what of our
// environment it does not get.

const (
	// A PostgreSQL client that is given a directory looks there for the socket of
	// its port.
	pgPort   = "5432"
	pgSocket = ".s.PGSQL." + pgPort
)

// nameVariable begins the variables of a name: PORTAL_ORDERS_DB_.
func nameVariable(name string) string {
	return "PORTAL_" + strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, name) + "_"
}

// environment is CMD's: ours without what it must not have, then where the names
// are, then what --env sets.
func (c *connection) environment(env environment) []string {
	var set []string
	add := func(name, value string) { set = append(set, name+"="+value) }
	all := append([]*door{c.doors[0]}, c.doors...)
	for i, d := range all {
		prefix := nameVariable(d.name)
		if i == 0 {
			prefix = "PORTAL_"
		}
		add(prefix+"ADDR", d.addr)
		add(prefix+"HOST", d.host)
		add(prefix+"PORT", d.port)
	}
	if c.speaks == inlet.PG {
		add("PGHOST", c.doors[0].host)
		add("PGPORT", c.doors[0].port)
	}
	for _, s := range c.set {
		set = slices.DeleteFunc(set, func(v string) bool { return strings.HasPrefix(v, s.variable+"=") })
		add(s.variable, s.fill(c.doors))
	}
	out := slices.DeleteFunc(slices.Clone(env), func(v string) bool {
		name, value, _ := strings.Cut(v, "=")
		return withheld(name, value) || c.speaks == inlet.PG && elsewhere(name) ||
			slices.ContainsFunc(set, func(s string) bool { return strings.HasPrefix(s, name+"=") })
	})
	return append(out, set...)
}

// withheld reports whether a variable is not CMD's: it holds a ticket or names
// one's file, or a passphrase, or is how the service manager knows us.
func withheld(name, value string) bool {
	switch name {
	case "PORTAL_TICKET", "PORTAL_TICKET_FILE", "NOTIFY_SOCKET":
		return true
	}
	return holdsTicket(value) ||
		strings.HasPrefix(name, "PORTAL_") && (strings.HasSuffix(name, "_TICKET") || strings.Contains(name, "PASSPHRASE"))
}

// elsewhere reports whether libpq takes the variable before PGHOST: the address in
// place of the host, the host of a service's entry.
func elsewhere(name string) bool { return name == "PGHOSTADDR" || name == "PGSERVICE" }

// A setting is one --env VAR=TEMPLATE, read.
type setting struct {
	variable string
	parts    []part
}

// A part is a text, or where a name is found.
type part struct {
	text  string
	door  int
	field string // addr, host, port; "": it is the text
}

var (
	variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	fields       = []string{"addr", "host", "port"}
)

// parseSettings reads --env. Its values are never repeated: a password may stand
// in one.
func parseSettings(texts, names []string) ([]setting, error) {
	var out []setting
	for _, text := range texts {
		name, template, ok := strings.Cut(text, "=")
		switch {
		case !ok:
			return nil, fail(codeUsage, "--env VAR=TEMPLATE", "--env: there is no = between a variable and its value")
		case !variableName.MatchString(name):
			return nil, fail(codeUsage, "--env VAR=TEMPLATE; a variable's name has letters, digits and _", "--env: what stands before = is no name of a variable")
		case withheld(name, "") || holdsTicket(template):
			return nil, fail(codeUsage, "leave it out", "--env %s: tickets, passphrases and NOTIFY_SOCKET are not given to the command", name)
		case slices.ContainsFunc(out, func(s setting) bool { return s.variable == name }):
			return nil, fail(codeUsage, "leave out one of them", "--env %s stands there twice", name)
		}
		s := setting{variable: name}
		if err := s.parse(template, names); err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

// parse takes a template apart: {addr}, {NAME.addr}, {{, }}.
func (s *setting) parse(template string, names []string) error {
	wrong := func(at int, what, remedy string) error {
		if remedy == "" {
			remedy = "{addr}, {host}, {port}, or {" + names[len(names)-1] + ".addr} and so on; {{ and }} are braces"
		}
		return fail(codeUsage, remedy, "--env %s, character %d of its value: %s", s.variable, len([]rune(template[:at]))+1, what)
	}
	var text strings.Builder
	for i := 0; i < len(template); {
		switch two := template[i:min(i+2, len(template))]; {
		case two == "{{" || two == "}}":
			text.WriteByte(two[0])
			i += 2
			continue
		case two[0] == '}':
			return wrong(i, "a } that closes nothing", "")
		case two[0] != '{':
			text.WriteByte(two[0])
			i++
			continue
		}
		word, _, closed := strings.Cut(template[i+1:], "}")
		if !closed {
			return wrong(i, "a { that nothing closes", "")
		}
		p := part{field: word}
		name := ""
		if dot := strings.LastIndexByte(word, '.'); dot >= 0 {
			name, p.field = word[:dot], word[dot+1:]
		}
		if !slices.Contains(fields, p.field) {
			if near := nearest(p.field, fields); near != "" {
				return wrong(i, "there is no such placeholder", "did you mean {"+strings.TrimSuffix(word, p.field)+near+"}?")
			}
			return wrong(i, "there is no such placeholder", "")
		}
		if strings.Contains(word, ".") {
			if p.door = slices.Index(names, name); p.door < 0 {
				return wrong(i, "connect is not given a name "+fmt.Sprintf("%q", plain(name)), "")
			}
		}
		if text.Len() > 0 {
			s.parts = append(s.parts, part{text: text.String()})
			text.Reset()
		}
		s.parts = append(s.parts, p)
		i += 1 + len(word) + 1
	}
	if text.Len() > 0 {
		s.parts = append(s.parts, part{text: text.String()})
	}
	return nil
}

// fill is the variable's value.
func (s *setting) fill(doors []*door) string {
	var b strings.Builder
	for _, p := range s.parts {
		d := doors[p.door]
		switch p.field {
		case "addr":
			b.WriteString(d.addr)
		case "host":
			b.WriteString(d.host)
		case "port":
			b.WriteString(d.port)
		default:
			b.WriteString(p.text)
		}
	}
	return b.String()
}

// simplePath is a path that means itself in a URL, in a libpq connection string
// and in PGHOST, where a comma would part two hosts.
var simplePath = regexp.MustCompile(`^/[A-Za-z0-9/._+-]*$`)

// privateDir makes a directory that only this user can enter, where a socket's path
// is short enough: in the user's runtime directory, else in TMPDIR, else in /tmp.
func privateDir(env environment) (string, error) {
	var why []error
	for _, place := range []string{runtimeDir(env), env.get("TMPDIR"), "/tmp"} {
		if place == "" || slices.ContainsFunc(why, func(err error) bool { return strings.HasPrefix(err.Error(), place+": ") }) {
			continue
		}
		dir, err := privateDirIn(place)
		if err == nil {
			return dir, nil
		}
		why = append(why, fmt.Errorf("%s: %w", place, err))
	}
	return "", fail(codeListen, "set TMPDIR to a directory with a short path in which this user can make files",
		"connect: there is no place for a socket: %w", errors.Join(why...))
}

func privateDirIn(place string) (string, error) {
	if !simplePath.MatchString(place) {
		return "", errors.New("a path with other characters than letters, digits and / . _ + - is not the same everywhere")
	}
	dir, err := os.MkdirTemp(place, "portal-") // 0700
	if err != nil {
		var path *os.PathError
		if errors.As(err, &path) {
			err = path.Err
		}
		return "", err
	}
	if _, err := socketPath(filepath.Join(dir, pgSocket)); err != nil {
		os.Remove(dir)
		return "", errors.New("the path of a socket in it has more than 107 bytes")
	}
	return dir, nil
}

// runtimeDir is the user's own, "" when there is none: sudo may leave another
// user's in the environment, who could put another directory in place of ours.
func runtimeDir(env environment) string {
	dir := env.get("XDG_RUNTIME_DIR")
	info, err := os.Stat(dir)
	if err != nil || !info.IsDir() || info.Mode().Perm()&0o022 != 0 {
		return ""
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); !ok || int(stat.Uid) != os.Geteuid() {
		return ""
	}
	return dir
}
