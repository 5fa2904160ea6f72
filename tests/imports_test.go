package tests

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/portal-tunnel/portal"

// ranks is the house: rooms import only rooms of a lower rank, so rooms of one rank do not know
// each other. A folder inside a room belongs to it. docs/architecture.md says what each is for.
var ranks = map[string]int{
	"identity":         0,
	"abac":             0,
	"routing":          0,
	"internal/alloc":   0,
	"internal/buffer":  0,
	"internal/memnet":  0,
	"internal/socket":  0,
	"internal/store":   0,
	"internal/control": 0,

	"internal/channel": 1,
	"internal/stream":  1,
	"internal/lease":   1,
	"internal/pgwire":  1,

	"internal/link": 2,

	"inlet":              3,
	"outlet":             3,
	"relay":              3,
	"internal/authority": 3,

	"cmd/portal": 4,
	"examples":   4,
	"tests":      4,
}

// free rooms show and test the others: they import what they like, of ours and of others.
var free = []string{"examples", "tests"}

// importers names, for each outside module of the core, the rooms that may know it: one, so that
// it can be replaced there. golang.org/x/sys is no exception to that but the rest of syscall.
var importers = map[string][]string{
	"github.com/cedar-policy/cedar-go": {"abac"},
	"github.com/flynn/noise":           {"internal/channel"},
	"github.com/fxamacker/cbor/v2":     {"identity", "internal/authority"},
	"github.com/hashicorp/yamux":       {"relay"},
	"github.com/jackc/pgx/v5/pgproto3": {"internal/pgwire"},
	"github.com/urfave/cli/v2":         {"cmd/portal"},
	"github.com/veraison/go-cose":      {"identity"},
	"go.etcd.io/bbolt":                 {"internal/store"},
	"golang.org/x/crypto":              {"internal/channel"},
	"golang.org/x/sys":                 {"identity", "internal/store", "internal/control", "internal/socket", "internal/stream", "internal/link", "inlet", "outlet", "relay", "cmd/portal"},
	"golang.org/x/term":                {"cmd/portal"},
}

// within reports whether path is root or lies below it.
func within(path, root string) bool {
	return path == root || strings.HasPrefix(path, root+"/")
}

// room finds which room a path relative to the module belongs to.
func room(path string) (string, bool) {
	for r := range ranks {
		if within(path, r) {
			return r, true
		}
	}
	return "", false
}

// objection says why the package at path (relative to the module) may not import what; "" if it may.
func objection(path, what string) string {
	from, ok := room(path)
	if !ok {
		return "the package has no line in the table of ranks"
	}
	if slices.Contains(free, from) {
		return ""
	}
	if first, _, _ := strings.Cut(what, "/"); !strings.Contains(first, ".") {
		return "" // the standard library
	}
	if within(what, module) {
		to, ok := room(strings.TrimPrefix(strings.TrimPrefix(what, module), "/"))
		switch {
		case !ok:
			return "what it imports has no line in the table of ranks"
		case to == from:
			return ""
		case to == "internal/memnet":
			return "internal/memnet is for tests"
		case ranks[to] == ranks[from]:
			return fmt.Sprintf("%s and %s are both of rank %d and do not know each other", from, to, ranks[to])
		case ranks[to] > ranks[from]:
			return fmt.Sprintf("imports go down, from %s (rank %d) never up to %s (rank %d)", from, ranks[from], to, ranks[to])
		}
		return ""
	}
	for outside, rooms := range importers {
		if within(what, outside) {
			if slices.Contains(rooms, from) {
				return ""
			}
			return fmt.Sprintf("only %s imports %s", strings.Join(rooms, ", "), outside)
		}
	}
	return "an outside dependency without a line in the table of importers and in docs/decisions/dependencies.md"
}

// TestImportsGoDown holds the table over every file that is built anywhere; imports of test files
// are not asked. The files are read here, not by `go list`, which leaves out other platforms'
// and whose answer the test cache would not know to be out of date.
func TestImportsGoDown(t *testing.T) {
	packages := map[string]bool{}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if path == ".." {
				return nil
			}
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil || name == "testdata" || name[0] == '.' || name[0] == '_' {
				return fs.SkipDir // another module's, or not the go command's
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		dir, err := filepath.Rel("..", filepath.Dir(path))
		if err != nil {
			return err
		}
		dir = filepath.ToSlash(dir)
		if _, ok := room(dir); !ok && !packages[dir] {
			t.Errorf("%s: the package has no line in the table of ranks", dir)
		}
		packages[dir] = true
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range file.Imports {
			what, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if why := objection(dir, what); why != "" {
				t.Errorf("%s/%s imports %s: %s", dir, name, what, why)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(packages) == 0 {
		t.Fatal("no package of ours was found")
	}
}

// TestTheTableSaysNo keeps the test above from passing because it asks nothing.
func TestTheTableSaysNo(t *testing.T) {
	for _, c := range []struct {
		path, what string
		may        bool
	}{
		{"internal/channel", module + "/identity", true},
		{"internal/authority", module + "/internal/link", true},
		{"internal/authority", module + "/internal/store", true},
		{"internal/authority", module + "/internal/control", true},
		{"cmd/portal", module + "/internal/authority", true},
		{"cmd/portal/complete", module + "/cmd/portal", true},
		{"examples/postgres", module + "/tests/process", true},
		{"examples/postgres", "github.com/jackc/pgx/v5", true},
		{"examples/llm", "github.com/openai/openai-go/v3", true},
		{"examples/mcp", "github.com/modelcontextprotocol/go-sdk/mcp", true},
		{"internal/channel", "github.com/flynn/noise", true},
		{"internal/stream", "golang.org/x/sys/unix", true},
		{"identity", "crypto/ed25519", true},

		{"identity", module + "/abac", false}, // one rank
		{"internal/stream", module + "/internal/channel", false},
		{"inlet", module + "/outlet", false},
		{"outlet", module + "/internal/authority", false},
		{"internal/link", module + "/inlet", false}, // up
		{"inlet", module + "/tests/process", false},
		{"inlet", module + "/internal/memnet", false},      // for tests
		{"internal/link", "github.com/flynn/noise", false}, // not its room
		{"internal/channel", "github.com/fxamacker/cbor/v2", false},
		{"outlet", "github.com/jackc/pgx/v5/pgproto3", false},
		{"internal/pgwire", "github.com/jackc/pgx/v5", false}, // no line: all of pgx
		{"inlet", "github.com/stretchr/testify/require", false},
		{"cmd/portal", "github.com/openai/openai-go/v3", false},
		{"outlet", "github.com/modelcontextprotocol/go-sdk/mcp", false},
		{"cmd/portal", module + "/examples/mcp", false},
		{"util", "fmt", false}, // no such room
		{"inlet", module + "/util", false},
	} {
		if why := objection(c.path, c.what); (why == "") != c.may {
			t.Errorf("%s imports %s: may = %t, want %t (%s)", c.path, c.what, why == "", c.may, why)
		}
	}
}
