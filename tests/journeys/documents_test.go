package journeys_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The threat model names the test that holds each line: one that was renamed, or never was, holds none.
func TestEachTestThatTheThreatModelNamesExists(t *testing.T) {
	const root = "../.."
	written := map[string]bool{}
	name := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		for _, m := range name.FindAllSubmatch(b, -1) {
			written[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(root, "THREAT_MODEL.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(b), "\n## Properties\n")
	table, _, _ = strings.Cut(table, "\n## ")
	named := regexp.MustCompile("`(Test\\w+)`")
	rows := 0
	for row := range strings.Lines(table) {
		if !strings.HasPrefix(row, "| ") || strings.HasPrefix(row, "| property ") {
			continue
		}
		rows++
		all := named.FindAllStringSubmatch(row, -1)
		if len(all) == 0 && !strings.HasSuffix(row, "| by type |\n") {
			t.Errorf("no test is named: %s", row)
		}
		for _, m := range all {
			if !written[m[1]] {
				t.Errorf("there is no %s: %s", m[1], row)
			}
		}
	}
	if rows == 0 {
		t.Error("the table was not found")
	}
}
