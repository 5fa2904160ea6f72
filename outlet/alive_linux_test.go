package outlet_test

import (
	"fmt"
	"os"
	"strings"
)

// alive reports whether pid runs; a zombie, which only waits to be reaped by
// whoever inherited it, does not.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return !strings.HasPrefix(rest, "Z")
}
