package tests

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
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
	"internal/buffer":  0,
	"internal/memnet":  0,
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
	"golang.org/x/sys":                 {"identity", "internal/store", "internal/control", "internal/stream", "internal/link", "inlet", "outlet", "relay", "cmd/portal"},
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

// TestImportsGoDown holds the table over what is built; imports of test files are not asked.
func TestImportsGoDown(t *testing.T) {
	// -e: a package that does not compile has imports all the same.
	list := exec.Command("go", "list", "-e", "-json=ImportPath,Imports", module+"/...")
	var stderr strings.Builder
	list.Stderr = &stderr
	out, err := list.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	decoder := json.NewDecoder(strings.NewReader(string(out)))
	packages := 0
	for {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		packages++
		path := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		if _, ok := room(path); !ok {
			t.Errorf("%s: the package has no line in the table of ranks", path)
		}
		for _, what := range p.Imports {
			if why := objection(path, what); why != "" {
				t.Errorf("%s imports %s: %s", path, what, why)
			}
		}
	}
	if packages == 0 {
		t.Fatal("go list found no package of ours")
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
		{"util", "fmt", false}, // no such room
		{"inlet", module + "/util", false},
	} {
		if why := objection(c.path, c.what); (why == "") != c.may {
			t.Errorf("%s imports %s: may = %t, want %t (%s)", c.path, c.what, why == "", c.may, why)
		}
	}
}
