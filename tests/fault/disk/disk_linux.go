// Package disk is small disks that are full.
package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

const page = 4096

// Mount puts a disk of a size (as tmpfs reads it, with further options of its behind commas) at a directory.
// That takes root.
func Mount(dir, size string) error {
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size="+size); err != nil {
		return fmt.Errorf("mounting a disk of %s at %s: %w", size, dir, err)
	}
	return nil
}

// Unmount takes it away, also from processes that have files open there.
func Unmount(dir string) error { return syscall.Unmount(dir, syscall.MNT_DETACH) }

// Fill leaves so many pages of 4 KiB on a disk free. What takes the rest is the file ballast.
func Fill(dir string, pages int) error {
	f, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		return fmt.Errorf("filling a disk: %w", err)
	}
	defer f.Close()
	n := int64(0)
	for b := make([]byte, page); err == nil; {
		var k int
		k, err = f.Write(b)
		n += int64(k)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("filling a disk: %w", err)
	}
	return f.Truncate(max(n-page*int64(pages), 0))
}

// Empty removes the ballast.
func Empty(dir string) error { return os.Remove(filepath.Join(dir, "ballast")) }
