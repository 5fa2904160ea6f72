package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/portal-tunnel/portal/identity"
)

// homeDir says where the identity is kept: --home, or PORTAL_HOME, which came
// in as that flag; then $STATE_DIRECTORY, which systemd gives a service;
// $XDG_STATE_HOME/portal; ~/.local/state/portal. A relative XDG_STATE_HOME does
// not count (XDG Base Directory Specification).
func homeDir(flag string, env environment) (string, error) {
	if flag != "" {
		return flag, nil
	}
	if dirs := env.get("STATE_DIRECTORY"); dirs != "" {
		first, _, _ := strings.Cut(dirs, ":")
		return first, nil
	}
	if xdg := env.get("XDG_STATE_HOME"); filepath.IsAbs(xdg) {
		return filepath.Join(xdg, "portal"), nil
	}
	if home := env.get("HOME"); home != "" {
		return filepath.Join(home, ".local", "state", "portal"), nil
	}
	return "", fail(codeNoHome, "--home DIR, or PORTAL_HOME", "there is no home: neither --home, PORTAL_HOME, STATE_DIRECTORY, XDG_STATE_HOME nor HOME is set")
}

func (s *session) openHome(flag string) (*identity.Home, error) {
	dir, err := homeDir(flag, s.env)
	if err != nil {
		return nil, err
	}
	return identity.Open(dir)
}

// existingHome is openHome for whoever has no use for a new home: nil where there
// is none, and none is made.
func (s *session) existingHome(flag string) (h *identity.Home, dir string, err error) {
	if dir, err = homeDir(flag, s.env); err == nil {
		dir, err = filepath.Abs(dir)
	}
	if err != nil {
		return nil, "", err
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, dir, nil
	}
	h, err = identity.Open(dir)
	return h, dir, err
}
