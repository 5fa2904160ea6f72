//go:build !linux

package main

import (
	"context"
	"errors"

	"github.com/portal-tunnel/portal/tests/tunnels"
)

var errNotLinux = errors.New("only Linux has network namespaces")

func inNamespaces(context.Context, *plan, *setting, *binaries, *report) error {
	return &skipped{errNotLinux.Error()}
}

func lossyCommand([]string) error { return errNotLinux }

func (r *rig) lossyHosts(context.Context) (near, far *tunnels.Host, err error) {
	return nil, nil, errNotLinux
}

func holdCommand([]string) error { return errNotLinux }
