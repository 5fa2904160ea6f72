//go:build !linux

package process

import "syscall"

// Only Linux tells a process that its parent ended.
func endWithParent(*syscall.SysProcAttr) {}
