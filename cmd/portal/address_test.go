package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestListenAddresses(t *testing.T) {
	for _, test := range []struct {
		text       string
		hosts      []string
		port       uint16
		everywhere bool
	}{
		{"5432", []string{"127.0.0.1", "::1"}, 5432, false},
		{"0", []string{"127.0.0.1", "::1"}, 0, false},
		{"localhost:5432", []string{"127.0.0.1", "::1"}, 5432, false},
		{"127.0.0.1:1", []string{"127.0.0.1"}, 1, false},
		{"[::1]:1", []string{"::1"}, 1, false},
		{"10.0.0.7:65535", []string{"10.0.0.7"}, 65535, false},
		{"db.example.com:1", []string{"db.example.com"}, 1, false},
		{":4000", []string{""}, 4000, true},
		{"*:4000", []string{""}, 4000, true},
		{"0.0.0.0:1", []string{"0.0.0.0"}, 1, true},
		{"[::]:1", []string{"::"}, 1, true},
		{"[0:0::0]:1", []string{"0:0::0"}, 1, true},
		{"[::ffff:0.0.0.0]:1", []string{"::ffff:0.0.0.0"}, 1, true},
		{"[::%lo]:1", []string{"::%lo"}, 1, true},
		{"[::ffff:0.0.0.0%lo]:1", []string{"::ffff:0.0.0.0%lo"}, 1, true},
		{"[::ffff:127.0.0.1]:1", []string{"::ffff:127.0.0.1"}, 1, false},
		{"[fe80::1%lo]:1", []string{"fe80::1%lo"}, 1, false},
	} {
		a, err := parseListen(test.text)
		if err != nil {
			t.Errorf("%s: %v", test.text, err)
			continue
		}
		if !slices.Equal(a.hosts, test.hosts) || a.port != test.port || a.everywhere() != test.everywhere {
			t.Errorf("%s: %+v", test.text, a)
		}
	}
}

var badAddresses = []string{
	"", " ", "x", "-1", "65536", "99999999999999999999", "1.5", "host", "host:", "host:x", "host:65536", "::1:5432", "[::1]", "[::1", "a b:1", "h\n:1",
	"5432/tcp", "user@host:1", "unix:", "unix:/" + "0123456789/0123456789/0123456789/0123456789/0123456789/0123456789/0123456789/0123456789/0123456789/0123456789",
	"tls://h:1", "http://h:1", "https://h",
}

func TestBadAddressesAreUsageErrors(t *testing.T) {
	for _, text := range badAddresses {
		for what, parse := range map[string]func(string) error{
			"listen": func(s string) error { _, err := parseListen(s); return err },
			"target": func(s string) error { _, err := parseTarget(s); return err },
		} {
			var f *failure
			if err := parse(text); !errors.As(err, &f) || f.code.exit() != exitUsage {
				t.Errorf("%s %q: %v", what, text, err)
			}
		}
	}
}

func TestTargets(t *testing.T) {
	for text, want := range map[string]targetAddress{
		"5432":           {"tcp", "127.0.0.1:5432"},
		"localhost:5432": {"tcp", "localhost:5432"},
		"[::1]:5432":     {"tcp", "[::1]:5432"},
		"unix:/run/x":    {"unix", "/run/x"},
	} {
		if got, err := parseTarget(text); err != nil || got != want {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"0", ":1", "*:1"} {
		if _, err := parseTarget(text); err == nil {
			t.Errorf("%s can be dialled", text)
		}
	}
}

func FuzzAddress(f *testing.F) {
	for _, text := range badAddresses {
		f.Add(text)
	}
	f.Add("localhost:5432")
	f.Fuzz(func(t *testing.T, text string) {
		a, err := parseListen(text)
		if err == nil && a.path == "" && len(a.hosts) == 0 {
			t.Fatalf("%q: no host", text)
		}
		parseTarget(text)
	})
}

func listenOn(t *testing.T, text string, o socketOptions) ([]net.Listener, error) {
	t.Helper()
	a, err := parseListen(text)
	if err != nil {
		t.Fatal(err)
	}
	lns, err := a.listen(context.Background(), o)
	t.Cleanup(func() { closeAll(lns) })
	return lns, err
}

func TestPortZeroIsOnePortForBothFamilies(t *testing.T) {
	lns, err := listenOn(t, "0", socketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	port := lns[0].Addr().(*net.TCPAddr).Port
	for _, ln := range lns {
		if a := ln.Addr().(*net.TCPAddr); a.Port != port || port == 0 || !a.IP.IsLoopback() {
			t.Errorf("listening on %s, the first port is %d", a, port)
		}
	}
}

// Whatever spelling or name led there.
func TestWhatListensOnEveryInterfaceIsRefusedUnlessItMay(t *testing.T) {
	for _, text := range []string{":0", "0.0.0.0:0", "[::]:0", "[::ffff:0.0.0.0]:0"} {
		lns, err := listenOn(t, text, socketOptions{})
		var f *failure
		if !errors.As(err, &f) || f.code != codeWildcard || len(lns) != 0 {
			t.Errorf("%s: %v, %v", text, addresses(lns), err)
		}
		if _, err := listenOn(t, text, socketOptions{everywhere: true}); err != nil {
			t.Errorf("%s, which may: %v", text, err)
		}
	}
	for _, unsafe := range []bool{false, true} {
		p, err := inletOptions{name: "db", from: []string{"1"}, way: wayOptions{direct: []string{"1"}}, kind: "raw", mode: "0600", streams: 1, unsafe: unsafe}.plan()
		if err != nil {
			t.Fatal(err)
		}
		if p.socket.everywhere != unsafe {
			t.Errorf("--unsafe-listen=%t lets an inlet on every interface: %t", unsafe, p.socket.everywhere)
		}
	}
}

func TestPortInUseNamesTheProcess(t *testing.T) {
	lns, err := listenOn(t, "127.0.0.1:0", socketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	addr := lns[0].Addr().String()
	_, err = listenOn(t, addr, socketOptions{})
	var f *failure
	if !errors.As(err, &f) || f.code != codeInUse || f.code.exit() != exitFailed {
		t.Fatalf("got %v", err)
	}
	for _, want := range []string{addr, fmt.Sprintf("process %d", os.Getpid())} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not name %s", err, want)
		}
	}
}

func TestSocketIsPrivateUntilTold(t *testing.T) {
	dir := t.TempDir()
	for _, test := range []struct{ mode, want fs.FileMode }{{0, 0o600}, {0o660, 0o660}} {
		path := filepath.Join(dir, "s")
		lns, err := listenOn(t, "unix:"+path, socketOptions{mode: test.mode})
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != test.want {
			t.Errorf("mode %04o, want %04o", info.Mode().Perm(), test.want)
		}
		if got := addresses(lns); got[0] != "unix:"+path {
			t.Errorf("address %s", got[0])
		}
		closeAll(lns)
		if left, _ := os.ReadDir(dir); len(left) != 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}

func TestStaleSocketIsReplacedAndALiveOneIsNot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	first, err := listenOn(t, "unix:"+path, socketOptions{})
	if err != nil {
		t.Fatalf("over a stale socket: %v", err)
	}
	_, err = listenOn(t, "unix:"+path, socketOptions{})
	var f *failure
	if !errors.As(err, &f) || f.code != codeInUse {
		t.Errorf("over a live socket: %v", err)
	}
	go func() {
		if c, err := first[0].Accept(); err == nil { // the probe of the second
			c.Close()
		}
		if c, err := first[0].Accept(); err == nil {
			c.Write([]byte("1"))
			c.Close()
		}
	}()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the first is gone: %v", err)
	}
	c.Close()
}

func TestOfTwoThatTakeASocketAtOnceOneGetsIt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	a, err := parseListen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	for round := range 200 {
		if round%2 == 1 { // over one that was left behind
			dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			dead.SetUnlinkOnClose(false)
			dead.Close()
		}
		var lns [2][]net.Listener
		var errs [2]error
		var both sync.WaitGroup
		begin := make(chan struct{})
		for i := range 2 {
			both.Go(func() {
				<-begin
				lns[i], errs[i] = a.listen(t.Context(), socketOptions{})
			})
		}
		close(begin)
		both.Wait()
		won, lost := 0, errs[1]
		if errs[0] != nil {
			won, lost = 1, errs[0]
		}
		var f *failure
		if errs[won] != nil || !errors.As(lost, &f) || f.code != codeInUse {
			t.Fatalf("round %d: %v, %v", round, errs[0], errs[1])
		}
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatalf("round %d: nobody has the socket: %v", round, err)
		}
		c.Close()
		closeAll(lns[won])
	}
}

func TestDirectoryThatStaysLockedIsNamed(t *testing.T) {
	dir := t.TempDir()
	unlock, err := lockDir(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	a, err := parseListen("unix:" + filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.listen(ctx, socketOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
	synctest.Test(t, func(t *testing.T) {
		_, err := a.listen(t.Context(), socketOptions{})
		if err == nil || !strings.Contains(err.Error(), "another process has locked "+dir+" for 5s") {
			t.Errorf("got %v", err)
		}
	})
}

func TestFileInPlaceOfASocketIsLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenOn(t, "unix:"+path, socketOptions{}); err == nil {
		t.Error("replaced a file")
	}
	if b, _ := os.ReadFile(path); string(b) != "mine" {
		t.Errorf("the file has %q", b)
	}
}

func TestListenerThatWasReplacedLeavesItsSuccessor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	old, err := listenOn(t, "unix:"+path, socketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := listenOn(t, "unix:"+path, socketOptions{}); err != nil {
		t.Fatal(err)
	}
	closeAll(old)
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the successor's socket: %v", err)
	}
}

// The file system may give a successor's socket the number of the one that is gone.
func TestListenerThatWasClosedLeavesWhatLooksLikeItsOwn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	old, err := listenOn(t, "unix:"+path, socketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	closeAll(old)
	if _, err := listenOn(t, "unix:"+path, socketOptions{}); err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	old[0].(*unixListener).info = info
	closeAll(old)
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the successor's socket: %v", err)
	}
}

func TestHoldOfZeroIsNotTheDefault(t *testing.T) {
	p, err := inletOptions{name: "db", from: []string{"1"}, way: wayOptions{direct: []string{"1"}}, kind: "raw", mode: "0600", streams: 1}.plan()
	if err != nil || p.hold <= 0 || p.hold > time.Millisecond {
		t.Errorf("held for %v, %v", p.hold, err)
	}
}
