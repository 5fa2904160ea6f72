package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/portal-tunnel/portal/abac"
)

// maxPolicy is what is read of a file; abac's own limit is the same.
const maxPolicy = 64 << 10

// policy reads the values of one flag: P is a Cedar expression, scoped to the
// action and the name, or @FILE with whole policies. Together they are one set:
// any permit, no forbid. nil when there are none.
func policy(flag, action, name string, ps []string) (*abac.Policy, error) {
	return policies(flag, ps, func(expr string) (*abac.Policy, error) { return abac.Short(action, name, expr) })
}

// policyForAny is policy for whatever name.
func policyForAny(flag, action string, ps []string) (*abac.Policy, error) {
	return policies(flag, ps, func(expr string) (*abac.Policy, error) { return abac.ShortAny(action, expr) })
}

func policies(flag string, ps []string, short func(expr string) (*abac.Policy, error)) (*abac.Policy, error) {
	var set []*abac.Policy
	for _, p := range ps {
		one, err := onePolicy(p, short)
		var syntax *abac.SyntaxError
		if errors.As(err, &syntax) {
			if syntax.Name == "" {
				syntax.Name = "--" + flag
			}
			return nil, &failure{code: codePolicy, err: syntax}
		}
		if err != nil {
			return nil, fail(codePolicy, "@FILE names a regular file with whole policies", "--%s: %w", flag, err)
		}
		set = append(set, one)
	}
	if len(set) == 0 {
		return nil, nil
	}
	return abac.Join(set...), nil
}

func onePolicy(p string, short func(expr string) (*abac.Policy, error)) (*abac.Policy, error) {
	file, ok := strings.CutPrefix(p, "@")
	if !ok {
		return short(p)
	}
	// Opening a pipe would wait for its writer, and a signal to end for that.
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", file)
	}
	src, err := readAll(f, maxPolicy, file)
	if err != nil {
		return nil, err
	}
	return abac.Parse(file, src)
}
