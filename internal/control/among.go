package control

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"syscall"
	"time"
)

// Processes that share a home have a socket each in one directory, PID.sock.
// Whoever makes or removes one holds the directory's lock meanwhile, never longer:
// so a socket that refuses is a dead process's, and not one that is being made.

const (
	// lockWait is how long another one's change of the directory is waited for: it
	// takes a few calls of the kernel.
	lockWait  = time.Second
	lockRetry = 5 * time.Millisecond
	// namesakes of one number are processes of other PID namespaces, as of containers
	// in which each is number 1.
	namesakes = 100
)

var socketName = regexp.MustCompile(`^([0-9]{1,10})(\.[0-9]{1,3})?\.sock$`)

// LongPathError says that a path is too long for a socket.
type LongPathError struct{ Path string }

func (e *LongPathError) Error() string {
	return fmt.Sprintf("the path %s has %d bytes and a socket's at most %d; choose a shorter --home", e.Path, len(e.Path), maxPath)
}

// fits is nil when a socket can be at path.
func fits(path string) error {
	if len(path) > maxPath {
		return &LongPathError{path}
	}
	return nil
}

// FitsAmong is nil when every process can have its socket in dir.
func FitsAmong(dir string) error {
	return fits(filepath.Join(dir, "4194304.sock")) // the largest number that Linux gives (proc_sys_kernel(5))
}

// ListenAmong takes a socket for this process in dir, which it makes, 0700, when
// there is none. What dead processes left there is removed.
func ListenAmong(dir string) (net.Listener, error) {
	ln, err := listenAmong(dir, os.Getpid())
	if err != nil {
		return nil, fmt.Errorf("listening in %s: %w", dir, err)
	}
	return ln, nil
}

func listenAmong(dir string, pid int) (net.Listener, error) {
	// Before anything is made that would be of no use.
	if err := fits(filepath.Join(dir, strconv.Itoa(pid)+".sock")); err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := sweep(dir); err != nil {
		return nil, err
	}
	for n := 1; n <= namesakes; n++ {
		name := strconv.Itoa(pid)
		if n > 1 {
			name += "." + strconv.Itoa(n)
		}
		path := filepath.Join(dir, name+".sock")
		if err := fits(path); err != nil {
			return nil, err
		}
		if _, err := os.Lstat(path); err == nil {
			continue
		}
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return nil, err
		}
		ln.SetUnlinkOnClose(false)
		if err := os.Chmod(path, 0o600); err != nil { // nobody else could enter dir before
			os.Remove(path)
			ln.Close()
			return nil, err
		}
		return &listener{UnixListener: ln, path: path}, nil
	}
	return nil, ErrTaken
}

// A Socket is one in the directory, which a process listens on, or did.
type Socket struct {
	Path string
	PID  int // as its own PID namespace counts
}

// Among returns the sockets in dir. None is there when dir is not.
func Among(dir string) ([]Socket, error) {
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []Socket
	for _, f := range files {
		m := socketName.FindStringSubmatch(f.Name())
		if m == nil || f.Type() != fs.ModeSocket {
			continue
		}
		pid, err := strconv.Atoi(m[1])
		if err != nil {
			continue
		}
		all = append(all, Socket{filepath.Join(dir, f.Name()), pid})
	}
	slices.SortStableFunc(all, func(a, b Socket) int { return a.PID - b.PID })
	return all, nil
}

// Sweep removes the sockets in dir that nobody listens on.
func Sweep(dir string) error {
	lock, err := lockDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		defer lock.Close()
		err = sweep(dir)
	}
	if err != nil {
		return fmt.Errorf("sweeping %s: %w", dir, err)
	}
	return nil
}

// sweep is Sweep under the lock. A process that hangs accepts nothing, and its
// socket does not refuse: Linux queues for it, or says that the queue is full.
func sweep(dir string) error {
	all, err := Among(dir)
	if err != nil {
		return err
	}
	for _, s := range all {
		c, err := net.Dial("unix", s.Path)
		if err == nil {
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			continue
		}
		if err := os.Remove(s.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// lockDir takes the lock of dir, which lasts until it is closed.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	if err := private(f); err != nil {
		f.Close()
		return nil, err
	}
	for limit := time.Now().Add(lockWait); ; time.Sleep(lockRetry) {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		held := errors.Is(err, syscall.EWOULDBLOCK)
		switch {
		case err == nil:
			return f, nil
		case held && time.Now().Before(limit), errors.Is(err, syscall.EINTR):
			continue
		case held:
			err = fmt.Errorf("another process has locked it for %s", lockWait)
		}
		f.Close()
		return nil, err
	}
}

// private refuses a directory of another user, or one that others can enter.
func private(dir *os.File) error {
	info, err := dir.Stat()
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("it belongs to user %d and this process runs as user %d", st.Uid, os.Geteuid())
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("others can enter it (mode %04o); chmod 700 %s", mode, dir.Name())
	}
	return nil
}
