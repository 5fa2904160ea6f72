package identity

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// FileError says what is wrong with a file of a home, and what mends it.
type FileError struct {
	Path    string
	Problem string
	Remedy  string
}

func (e *FileError) Error() string { return fmt.Sprintf("%s %s: %s", e.Path, e.Problem, e.Remedy) }

// checkPrivate refuses a file or directory of another user, or one that others
// may read or enter.
func checkPrivate(path string, info fs.FileInfo, mode fs.FileMode) error {
	uid := os.Geteuid()
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != uid {
		return &FileError{path, fmt.Sprintf("belongs to user %d, and this process runs as user %d", st.Uid, uid),
			"run as its owner, or use another --home"}
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return &FileError{path, fmt.Sprintf("can be used by others (mode %04o)", perm),
			fmt.Sprintf("run `chmod %03o %s`", mode, shellQuote(path))}
	}
	return nil
}

// shellQuote returns s as one word of a POSIX shell.
func shellQuote(s string) string {
	plain := func(c rune) bool {
		return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("/._-+:@%", c)
	}
	if s != "" && strings.IndexFunc(s, func(c rune) bool { return !plain(c) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// readPrivate reads a file of at most max bytes that is nobody else's. It
// follows no symbolic link and waits for no pipe.
func readPrivate(path string, max int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.ELOOP) {
		return nil, &FileError{path, "is a symbolic link", "put the file itself there"}
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, &FileError{path, "is not a regular file", "move it away"}
	}
	if err := checkPrivate(path, info, 0o600); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, max+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > max {
		return nil, &FileError{path, fmt.Sprintf("is larger than %d bytes", max), "restore it from a backup"}
	}
	return b, nil
}

// replaceFile puts b at path in one atomic, durable step: a new file 0600
// beside it, synced and renamed over it, then the directory synced. After an
// error the old content stands, or, when only the last sync failed, the whole
// new one. The caller holds the home's lock, so a temporary file found there is
// left over from a process that died. Each step first asks fault, which is nil
// but in tests.
func replaceFile(path string, b []byte, fault func(step string) error) (err error) {
	step := func(name string, f func() error) {
		if err == nil && fault != nil {
			err = fault(name)
		}
		if err == nil {
			err = f()
		}
	}
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var f *os.File
	step("create", func() (err error) {
		f, err = os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	step("write", func() error { _, err := f.Write(b); return err })
	step("sync", f.Sync)
	if e := f.Close(); err == nil {
		err = e
	}
	step("rename", func() error { return os.Rename(tmp, path) })
	if err != nil {
		os.Remove(tmp)
		return err
	}
	step("sync directory", func() error { return syncDir(filepath.Dir(path)) })
	return err
}

// makeDir makes dir and the directories above it that are missing, 0700 and
// durable: what is synced inside must not be lost with its directory.
func makeDir(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(dir)
	if err := makeDir(parent); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := syncDir(parent); !errors.Is(err, fs.ErrPermission) { // we may write where we may not read
		return err
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
