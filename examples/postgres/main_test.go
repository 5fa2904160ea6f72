package main

import (
	"strings"
	"testing"
)

// TestAgentReadsRowsAndGuestIsRefused runs the example; it checks each line before printing it.
func TestAgentReadsRowsAndGuestIsRefused(t *testing.T) {
	var out strings.Builder
	err := run(t.Context(), &out)
	t.Logf("\n%s", &out)
	if err != nil {
		t.Fatal(err)
	}
	for _, proved := range []string{"agent: psql reads 1|ada|1250", "agent: pgx reads", "guest: psql exits 2", "guest: pgx gets SQLSTATE 28000"} {
		if !strings.Contains(out.String(), proved) {
			t.Errorf("no line %q", proved)
		}
	}
}
