// Portal tunnels TCP connections between an inlet, where a program connects,
// and an outlet, which dials a private service, through a secure channel between
// two identities; a policy over the peer's credential decides about each one.
//
// This directory holds flags, files, the wiring of one process, and what a
// person sees. It knows no protocol.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"
)

func main() {
	env := environment(os.Environ())
	// What is started from here, such as an outlet's command, inherits neither
	// the ticket nor the right to speak to the service manager.
	for _, name := range []string{"PORTAL_TICKET", "PORTAL_TICKET_FILE", "NOTIFY_SOCKET"} {
		os.Unsetenv(name)
	}
	os.Exit(run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr, env))
}

// run is the whole command: args without the program's name, env in place of
// the process's. It returns the exit status.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer, env []string) int {
	s := &session{stdin: stdin, stdout: stdout, env: env}
	s.stderr = newLines(stderr, lostLines)
	status := s.report(s.run(ctx, args, isTerminal(stderr)))
	if s.events != nil {
		s.events.Close()
	}
	s.stderr.Close()
	return status
}

func (s *session) run(ctx context.Context, args []string, terminal bool) error {
	app := newApp(s)
	line, err := order(app, args, s.env)
	if err != nil {
		return err
	}
	s.after = line.after
	app.Metadata = map[string]any{"terminal": terminal}
	return app.RunContext(ctx, line.argv(app.Name))
}

// begin reads the flags that every command has; level is the log's unless they
// say another.
func (s *session) begin(c *cli.Context, level string) error {
	switch out := c.String("output"); out {
	case "text", "json":
		s.json = out == "json"
	default:
		return fail(codeUsage, "text or json", "-o %q is no form of output", plain(out))
	}
	if given := c.String("log-level"); given != "" {
		level = given
	}
	log, err := newLog(s.stderr, c.App.Metadata["terminal"] == true, level, c.String("log-format"))
	if err != nil {
		return err
	}
	s.log = log
	s.room = findRoom(log)
	return nil
}

// arguments refuses too many and too few arguments, and a command behind `--`
// where none is run.
func arguments(c *cli.Context, s *session, least, most int) error {
	usage := strings.TrimSpace("usage: " + c.Command.HelpName + " " + c.Command.ArgsUsage)
	name := strings.TrimPrefix(c.Command.HelpName, "portal ")
	switch n := c.NArg(); {
	case n < least:
		return fail(codeUsage, usage, "%s: an argument is missing", name)
	case n > most && strings.ContainsAny(c.Args().Get(most), "=<>&|!"):
		return fail(codeUsage, "an expression stands in quotes, so that the shell leaves it whole: --allow 'principal.role == \"agent\"'",
			"%s: unexpected argument %q", name, plain(c.Args().Get(most)))
	case n > most && takesCommand(c.Command):
		return fail(codeUsage, usage+"; a command and its arguments stand behind --", "%s: unexpected argument %q", name, plain(c.Args().Get(most)))
	case n > most:
		return fail(codeUsage, usage, "%s: unexpected argument %q", name, plain(c.Args().Get(most)))
	case s.after != nil && !takesCommand(c.Command):
		return fail(codeUsage, usage, "%s runs no command: nothing may stand behind --", name)
	case s.after != nil && len(s.after) == 0:
		return fail(codeUsage, usage, "%s: no command stands behind --", name)
	}
	return nil
}

func isTerminal(f any) bool {
	file, ok := f.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}

func readAll(r io.Reader, limit int64, what string) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", what, err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("reading %s: it is longer than %d bytes", what, limit)
	}
	return b, nil
}
