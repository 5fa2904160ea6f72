package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"
)

// A listenAddress says where to listen:
//
//	PORT, localhost:PORT   127.0.0.1 and ::1
//	HOST:PORT              that address
//	:PORT, 0.0.0.0:PORT    every interface
//	unix:/path             a socket that only this user may open, unless mode says more
type listenAddress struct {
	text  string
	path  string   // unix
	hosts []string // tcp; both loopback addresses share one port
	port  uint16
}

func parseListen(text string) (listenAddress, error) {
	a := listenAddress{text: text}
	if path, ok := strings.CutPrefix(text, "unix:"); ok {
		var err error
		a.path, err = socketPath(path)
		return a, err
	}
	host, port, err := hostPort(text, "PORT, HOST:PORT or unix:/path")
	if err != nil {
		return a, err
	}
	a.port = port
	switch host {
	case "localhost":
		a.hosts = []string{"127.0.0.1", "::1"}
	case "*":
		a.hosts = []string{""}
	default:
		a.hosts = []string{host}
	}
	return a, nil
}

// hostPort takes apart PORT and HOST:PORT; PORT alone is on localhost. form is the
// remedy: what else may stand there.
func hostPort(text, form string) (host string, port uint16, err error) {
	for _, scheme := range []string{"tls://", "http://", "https://"} {
		if strings.HasPrefix(text, scheme) {
			return "", 0, fail(codeNotYet, "give HOST:PORT", "%q: %s is reserved and not available in this version", text, scheme)
		}
	}
	form += "; an IPv6 address stands in brackets: [::1]:5432"
	host, digits := "localhost", text
	if strings.Contains(text, ":") {
		if host, digits, err = net.SplitHostPort(text); err != nil {
			return "", 0, fail(codeAddress, form, "%q is no address", text)
		}
	}
	n, err := strconv.ParseUint(digits, 10, 16)
	if err != nil && host == "localhost" && digits == text && text != "" && !unicode.IsDigit(rune(text[0])) {
		return "", 0, fail(codeAddress, form, "%q is no address: it has no port", text)
	}
	if err != nil {
		return "", 0, fail(codeAddress, form, "%q is no address: %q is no port from 0 to 65535", text, digits)
	}
	if strings.ContainsFunc(host, func(r rune) bool { return unprintable(r) || strings.ContainsRune(" /@,;", r) }) {
		return "", 0, fail(codeAddress, form, "%q is no address: %q is no host", text, host)
	}
	return host, uint16(n), nil
}

// socketPath checks the path of a Unix socket: Linux takes 107 bytes.
func socketPath(path string) (string, error) {
	if path == "" {
		return "", fail(codeAddress, "unix:/path", "unix: names no path")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if len(path) > 107 || strings.ContainsRune(path, 0) {
		return "", fail(codeAddress, "", "unix:%s: the path of a socket has at most 107 bytes", path)
	}
	return path, nil
}

// everywhere reports whether the address reaches beyond this host without
// naming one interface. What a name stands for is known only when it is
// listened on.
func (a listenAddress) everywhere() bool {
	if a.path != "" {
		return false
	}
	for _, h := range a.hosts {
		if h == "" {
			return true
		}
		// ::ffff:0.0.0.0 and ::%lo are other spellings of the same.
		if ip, err := netip.ParseAddr(h); err == nil && ip.WithZone("").Unmap().IsUnspecified() {
			return true
		}
	}
	return false
}

// exposed refuses an address on every interface.
func (a listenAddress) exposed() error {
	return fail(codeWildcard, fmt.Sprintf("--from %d listens on loopback; --unsafe-listen allows this", a.port),
		"--from %s: an inlet on every interface is open to whoever reaches this host", plain(a.text))
}

// socketOptions say who may reach a socket.
type socketOptions struct {
	everywhere bool        // it may be on every interface
	mode       fs.FileMode // of a Unix socket; 0: 0600
	group      string
}

func parseMode(text string) (fs.FileMode, error) {
	n, err := strconv.ParseUint(text, 8, 32)
	if err != nil || n == 0 || n > 0o777 {
		return 0, fail(codeUsage, "octal digits, as in --mode 0660", "--mode %q is no file mode", text)
	}
	return fs.FileMode(n), nil
}

// listen opens the sockets. Port 0 gives every address the same free port. An
// IPv6 loopback that this host does not have is left out.
func (a listenAddress) listen(ctx context.Context, o socketOptions) ([]net.Listener, error) {
	if a.path != "" {
		ln, err := listenUnix(ctx, a.path, o)
		if err != nil {
			return nil, err
		}
		return []net.Listener{ln}, nil
	}
	// With port 0 the port that the first address was given may be taken on the
	// second; another round asks for another.
	for round := 0; ; round++ {
		lns, err := a.listenTCP(ctx, o)
		if err == nil || a.port != 0 || round == 16 || !errors.Is(err, syscall.EADDRINUSE) {
			return lns, err
		}
	}
}

func (a listenAddress) listenTCP(ctx context.Context, o socketOptions) (lns []net.Listener, err error) {
	port := a.port
	var lc net.ListenConfig
	for i, host := range a.hosts {
		addr := net.JoinHostPort(host, strconv.Itoa(int(port)))
		ln, err := lc.Listen(ctx, "tcp", addr)
		if err != nil && i > 0 && (errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT)) {
			continue
		}
		if err != nil {
			closeAll(lns)
			return nil, listenFailure(addr, err)
		}
		lns = append(lns, ln)
		at := ln.Addr().(*net.TCPAddr)
		if at.IP.IsUnspecified() && !o.everywhere {
			closeAll(lns)
			return nil, a.exposed()
		}
		port = uint16(at.Port)
	}
	return lns, nil
}

// listenFailure says why an address cannot be listened on, and who holds it.
func listenFailure(addr string, err error) error {
	var cause syscall.Errno
	if !errors.As(err, &cause) {
		return fail(codeListen, "", "listening on %s: %w", addr, err)
	}
	switch cause {
	case syscall.EADDRINUSE:
		if pid, name := holder(addr); pid != 0 {
			return fail(codeInUse, "stop it, or listen on another port; port 0 takes a free one",
				"listening on %s: in use by process %d (%s)%w", addr, pid, plain(name), quiet{cause})
		}
		return fail(codeInUse, "listen on another port; port 0 takes a free one", "listening on %s: %w", addr, cause)
	case syscall.EACCES:
		return fail(codeListen, "ports below 1024 need a capability; use a higher one", "listening on %s: %w", addr, cause)
	}
	return fail(codeListen, "", "listening on %s: %w", addr, cause)
}

// quiet keeps an error in the chain and out of the text.
type quiet struct{ err error }

func (q quiet) Error() string { return "" }
func (q quiet) Unwrap() error { return q.err }

func closeAll(lns []net.Listener) {
	for _, ln := range lns {
		ln.Close()
	}
}

// addresses are what the listeners got, as text.
func addresses(lns []net.Listener) []string {
	var out []string
	for _, ln := range lns {
		out = append(out, addressText(ln.Addr()))
	}
	return out
}

func addressText(a net.Addr) string {
	if a.Network() == "unix" {
		return "unix:" + a.String()
	}
	return a.String()
}

// holder finds the process that listens on a TCP address: the socket's inode in
// /proc/net/tcp, then the descriptor that leads to it. It sees only processes
// of this user, or all for root. 0: not known.
func holder(addr string) (pid int, name string) {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return 0, ""
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return 0, ""
	}
	inodes := make(map[string]bool)
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(table)
		if err != nil {
			continue
		}
		for line := range strings.SplitSeq(string(b), "\n") {
			// sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode
			f := strings.Fields(line)
			const listening = "0A"
			if len(f) > 9 && f[3] == listening && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", n)) {
				inodes["socket:["+f[9]+"]"] = true
			}
		}
	}
	if len(inodes) == 0 {
		return 0, ""
	}
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return 0, ""
	}
	for _, link := range links {
		to, err := os.Readlink(link)
		if err != nil || !inodes[to] {
			continue
		}
		dir := filepath.Dir(filepath.Dir(link))
		pid, _ := strconv.Atoi(filepath.Base(dir))
		comm, _ := os.ReadFile(filepath.Join(dir, "comm"))
		return pid, strings.TrimSpace(string(comm))
	}
	return 0, ""
}

// listenUnix makes the socket in a directory that only this user may enter,
// gives it its mode and group there, and moves it to its place: at no moment
// can anybody open it who may not. What lies in that place is replaced only
// when it is a socket and nobody answers on it; of several processes that find
// that at once, one has the place.
func listenUnix(ctx context.Context, path string, o socketOptions) (net.Listener, error) {
	at := "unix:" + path
	unlock, err := lockDir(ctx, filepath.Dir(path))
	if err != nil {
		return nil, fail(codeListen, "", "listening on %s: %w", at, err)
	}
	defer unlock()
	if err := stale(ctx, path); err != nil {
		return nil, err
	}
	var nonce [3]byte
	rand.Read(nonce[:])
	dir := filepath.Join(filepath.Dir(path), ".p"+hex.EncodeToString(nonce[:]))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fail(codeListen, "", "listening on %s: %w", at, err)
	}
	defer os.RemoveAll(dir)
	made := filepath.Join(dir, "s")
	ln, err := new(net.ListenConfig).Listen(ctx, "unix", made)
	if err != nil {
		return nil, fail(codeListen, "", "listening on %s: %w", at, err)
	}
	l := &unixListener{UnixListener: ln.(*net.UnixListener), path: path}
	l.SetUnlinkOnClose(false)
	if err := l.place(made, o); err != nil {
		l.UnixListener.Close()
		return nil, fail(codeListen, "", "listening on %s: %w", at, err)
	}
	return l, nil
}

const (
	dirWait  = 5 * time.Second // others hold the lock for a moment
	dirRetry = 10 * time.Millisecond
)

// lockDir takes the lock of the directory itself: a file beside the socket would
// stay there, and that of PostgreSQL's socket has a meaning.
func lockDir(ctx context.Context, dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, dirWait, fmt.Errorf("another process has locked %s for %s", dir, dirWait))
	defer cancel()
	for {
		err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case err == nil:
			return func() { d.Close() }, nil
		case errors.Is(err, syscall.EINTR):
			continue
		case errors.Is(err, syscall.EWOULDBLOCK):
			err = pause(ctx, dirRetry)
		default:
			err = fmt.Errorf("locking %s: %w", dir, err)
		}
		if err != nil {
			d.Close()
			return nil, err
		}
	}
}

// stale looks at what lies where a socket is to be: nothing, or a socket that
// its owner left behind.
func stale(ctx context.Context, path string) error {
	at := "unix:" + path
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fail(codeListen, "", "listening on %s: %w", at, err)
	case info.Mode().Type() != fs.ModeSocket:
		return fail(codeListen, "move it away, or use another path", "listening on %s: there is something that is no socket", at)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		c.Close()
		return fail(codeInUse, "stop that process, or use another path", "listening on %s: another process answers there", at)
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return fail(codeInUse, "use another path", "listening on %s: %w", at, err)
}

// unixListener is known by the path it was moved to, and removes it at the end
// unless another process has put its own there.
type unixListener struct {
	*net.UnixListener
	path string
	info fs.FileInfo
	gone sync.Once
}

func (l *unixListener) place(made string, o socketOptions) error {
	mode := o.mode
	if mode == 0 {
		mode = 0o600
	}
	if o.group != "" {
		g, err := user.LookupGroup(o.group)
		if err != nil {
			return err
		}
		gid, err := strconv.Atoi(g.Gid)
		if err != nil {
			return err
		}
		if err := os.Chown(made, -1, gid); err != nil {
			return err
		}
	}
	if err := os.Chmod(made, mode); err != nil {
		return err
	}
	info, err := os.Lstat(made)
	if err != nil {
		return err
	}
	l.info = info
	return os.Rename(made, l.path)
}

func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

func (l *unixListener) Close() error {
	// Once: the number of a file that is gone may be the next one's, at the same path.
	l.gone.Do(func() {
		if info, err := os.Lstat(l.path); err == nil && os.SameFile(info, l.info) {
			os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}

// A targetAddress is what an outlet dials: PORT (on 127.0.0.1), HOST:PORT or
// unix:/path.
type targetAddress struct {
	network, addr string
}

func parseTarget(text string) (targetAddress, error) {
	if path, ok := strings.CutPrefix(text, "unix:"); ok {
		path, err := socketPath(path)
		return targetAddress{"unix", path}, err
	}
	addr, err := dialAddress(text)
	return targetAddress{"tcp", addr}, err
}

func (t targetAddress) String() string {
	if t.network == "unix" {
		return "unix:" + t.addr
	}
	return t.addr
}

// dialAddress is HOST:PORT, or PORT on 127.0.0.1; it can be dialled.
func dialAddress(text string) (string, error) {
	host, port, err := hostPort(text, "HOST:PORT, or PORT of this host")
	if err != nil {
		return "", err
	}
	if port == 0 || host == "" || host == "*" {
		return "", fail(codeAddress, "HOST:PORT", "%q cannot be dialled", text)
	}
	if !strings.Contains(text, ":") {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port))), nil
}
