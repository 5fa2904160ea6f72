package process

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Portal is a built portal command.
type Portal struct {
	Path string
	// Within begins its command line: a program that becomes the command in
	// surroundings of its making, such as ip netns exec NAME.
	Within []string
}

// BuildPortal builds cmd/portal into dir: as it is shipped, or with further build tags. With PORTAL_RACE
// set it has the race detector, which GORACE tells where to report.
func BuildPortal(ctx context.Context, dir string, tags ...string) (*Portal, error) {
	p := &Portal{Path: filepath.Join(dir, "portal")}
	args := []string{"build", "-trimpath", "-buildvcs=false", "-tags", strings.Join(append([]string{"urfave_cli_no_docs"}, tags...), ","), "-o", p.Path}
	env := append(os.Environ(), "CGO_ENABLED=0")
	if os.Getenv("PORTAL_RACE") != "" {
		args, env = append(args, "-race"), os.Environ()
	}
	cmd := exec.CommandContext(ctx, "go", append(args, "github.com/portal-tunnel/portal/cmd/portal")...)
	cmd.Env = env
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building portal: %w\n%s", err, out)
	}
	return p, nil
}

// command is one on a home, not started yet.
func (p *Portal) command(ctx context.Context, home string, args []string) *exec.Cmd {
	line := slices.Concat(p.Within, []string{p.Path, "--home", home}, args)
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	cmd.Env = Environ()
	return cmd
}

// Start starts a long-running portal command on a home.
func (p *Portal) Start(home string, args ...string) (*Process, error) {
	cmd := p.command(context.Background(), home, args)
	return Start("portal "+strings.Join(args[:min(len(args), 2)], " "), cmd)
}

// Run runs a portal command on a home to its end and returns what it printed on stdout; its stderr
// is in the error.
func (p *Portal) Run(ctx context.Context, home string, args ...string) (string, error) {
	cmd := p.command(ctx, home, args)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("portal %s: %w\n%s", strings.Join(args, " "), err, &stderr)
	}
	return stdout.String(), nil
}

// Environ is the environment without what the commands and PostgreSQL's clients would take from it:
// a run must not depend on who runs it.
func Environ() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		for _, name := range []string{"PORTAL_", "PG", "NOTIFY_SOCKET=", "STATE_DIRECTORY="} {
			if strings.HasPrefix(v, name) {
				return true
			}
		}
		return false
	})
}
