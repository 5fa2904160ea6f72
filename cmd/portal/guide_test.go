package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// guides are the pages that tell people what to type.
func guides(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob("../../docs/guides/*.md")
	if err != nil || len(files) == 0 {
		t.Fatalf("guides: %d, %v", len(files), err)
	}
	all := make(map[string]string)
	for _, f := range append(files, "../../README.md") {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all[filepath.Base(f)] = string(b)
	}
	return all
}

// Whoever types what a page says meets no unknown flag.
func TestCommandLinesInTheGuidesAreTaken(t *testing.T) {
	typed := regexp.MustCompile(`(?m)(?:^\w+\$ +|^ExecStart=/usr/local/bin/|\| (?:ssh \w+ )?)(portal [^|\n]*)`)
	for page, text := range guides(t) {
		lines := typed.FindAllStringSubmatch(text, -1)
		if len(lines) == 0 {
			t.Errorf("%s: no command line was found", page)
		}
		for _, m := range lines {
			if _, err := order(newApp(&session{}), shellWords(m[1])[1:], nil); err != nil {
				t.Errorf("%s: %s: %v", page, m[1], err)
			}
		}
	}
}

// shellWords takes a line apart as a shell does, as far as the guides need it.
func shellWords(line string) (words []string) {
	for _, m := range regexp.MustCompile(`#.*|(?:'[^']*'|[^\s'])+`).FindAllString(line, -1) {
		if strings.HasPrefix(m, "#") {
			break
		}
		words = append(words, strings.ReplaceAll(m, "'", ""))
	}
	return words
}

// systemd reads the units as it would read them on a host.
func TestUnitsInTheGuidesAreGood(t *testing.T) {
	verify, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("there is no systemd-analyze")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	units := 0
	for page, text := range guides(t) {
		for _, m := range regexp.MustCompile("(?s)`/etc/systemd/system/([\\w-]+\\.service)`.*?\n```ini\n(.*?)```").FindAllStringSubmatch(text, -1) {
			units++
			file := filepath.Join(t.TempDir(), m[1])
			unit := strings.ReplaceAll(m[2], "/usr/local/bin/portal", self)
			if err := os.WriteFile(file, []byte(unit), 0o600); err != nil {
				t.Fatal(err)
			}
			// Units that are named elsewhere need not be on this host.
			out, err := exec.Command(verify, "verify", "--man=no", "--recursive-errors=no", file).CombinedOutput()
			if err != nil || strings.Contains(string(out), m[1]) {
				t.Errorf("%s: %s: %v\n%s", page, m[1], err, out)
			}
		}
	}
	if units == 0 {
		t.Error("no unit was found")
	}
}
