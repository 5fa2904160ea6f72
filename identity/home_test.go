package identity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// The test binary is also the other process of tests that need one.
func TestMain(m *testing.M) {
	switch dir := os.Getenv("PORTAL_TEST_HOME"); os.Getenv("PORTAL_TEST_PROCESS") {
	case "":
		os.Exit(m.Run())
	case "self": // waits for a byte, then prints the identity of the home
		h, err := Open(dir)
		if err == nil {
			os.Stdin.Read(make([]byte, 1))
			var s *Self
			if s, err = h.Self(); err == nil {
				fmt.Println(s.ID())
				return
			}
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	case "lock": // says when it has the lock, and holds it until stdin ends
		h, err := Open(dir)
		if err == nil {
			_, err = h.Lock(context.Background())
		}
		fmt.Println(err)
		os.Stdin.Read(make([]byte, 1))
	}
}

// process starts the test binary as another process.
func process(t *testing.T, role, dir string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "PORTAL_TEST_PROCESS="+role, "PORTAL_TEST_HOME="+dir)
	return cmd
}

func openHome(t testing.TB, dir string) *Home {
	t.Helper()
	if err := os.Chmod(dir, 0o700); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	h, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func homeSelf(t testing.TB, h *Home) *Self {
	t.Helper()
	s, err := h.Self()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// listing maps each file below dir to its mode and content; the lock, which
// holds nothing, is left out.
func listing(t testing.TB, dir string) map[string]string {
	t.Helper()
	files := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		var content []byte
		if info.Mode().IsRegular() {
			content = readFile(t, path)
		}
		if d.Name() != lockName {
			files[path] = info.Mode().String() + " " + string(content)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// membershipOf returns what joining authority gives h's identity.
func membershipOf(t testing.TB, h *Home, authority *Self, life time.Duration) (*Membership, *Credential) {
	t.Helper()
	c := issueTo(t, authority, homeSelf(t, h), Attributes{"name": "db1", "role": "agent"}, noon, noon.Add(life))
	return &Membership{
		Authority:  authority.ID(),
		Name:       "db1",
		Ways:       []Way{{Addr: "authority.example.com:4000"}, {ID: authority.ID(), Addr: "[::1]:4000"}},
		TicketHash: [32]byte{7},
	}, c
}

func join(t testing.TB, h *Home, authority *Self, life time.Duration) (*Membership, *Credential) {
	t.Helper()
	m, c := membershipOf(t, h, authority, life)
	if err := h.Join(m, c, authority.History()); err != nil {
		t.Fatal(err)
	}
	return m, c
}

func TestHomeKeepsItsIdentity(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b", "home")
	h := openHome(t, dir)
	s := homeSelf(t, h)
	if again := homeSelf(t, h); again != s {
		t.Error("a second call gives another *Self")
	}
	if other := homeSelf(t, openHome(t, dir)); other.ID() != s.ID() || !bytes.Equal(other.History(), s.History()) {
		t.Error("another Home of the directory has another identity")
	}
	want := map[string]fs.FileMode{dir: 0o700, filepath.Dir(dir): 0o700, h.path(keyName): 0o600, h.path(lockName): 0o600}
	for path, mode := range want {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	if len(listing(t, dir)) != 2 {
		t.Errorf("files: %v", listing(t, dir))
	}
}

func TestLookingAtAHomeMakesNoIdentity(t *testing.T) {
	h := openHome(t, t.TempDir())
	if s, err := h.Existing(); s != nil || err != nil {
		t.Fatalf("in a new home: %v, %v", s, err)
	}
	if all, err := os.ReadDir(h.Dir()); len(all) != 0 || err != nil {
		t.Fatalf("looking made %v, %v", all, err)
	}
	s := homeSelf(t, h)
	for _, h := range []*Home{h, openHome(t, h.Dir())} {
		if found, err := h.Existing(); err != nil || found.ID() != s.ID() {
			t.Errorf("%v, %v", found, err)
		}
	}
	if err := os.WriteFile(filepath.Join(h.Dir(), keyName), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var damaged *FileError
	if s, err := openHome(t, h.Dir()).Existing(); !errors.As(err, &damaged) {
		t.Errorf("a damaged key: %v, %v", s, err)
	}
}

func TestFirstUseByManyGoroutinesGivesOneIdentity(t *testing.T) {
	dir := t.TempDir()
	const n = 32
	ids := make([]ID, n)
	begin := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		h := openHome(t, dir)
		wg.Go(func() {
			<-begin
			s, err := h.Self()
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = s.ID()
		})
	}
	close(begin)
	wg.Wait()
	if slices.ContainsFunc(ids, func(id ID) bool { return id != ids[0] }) {
		t.Errorf("identities: %v", ids)
	}
}

func TestFirstUseByManyProcessesGivesOneIdentity(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "home")
	const n = 8
	type other struct {
		cmd      *exec.Cmd
		out, err bytes.Buffer
	}
	processes := make([]*other, n)
	gate, release, err := os.Pipe() // one byte for each
	if err != nil {
		t.Fatal(err)
	}
	for i := range processes {
		p := &other{cmd: process(t, "self", dir)}
		p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = gate, &p.out, &p.err
		if err := p.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		processes[i] = p
	}
	gate.Close()
	release.Write(make([]byte, n))
	release.Close()
	for _, p := range processes {
		if err := p.cmd.Wait(); err != nil {
			t.Fatalf("%v: %s", err, &p.err)
		}
		if got, want := p.out.String(), processes[0].out.String(); got != want {
			t.Errorf("identities %s and %s", got, want)
		}
	}
	if got := homeSelf(t, openHome(t, dir)).ID().String() + "\n"; got != processes[0].out.String() {
		t.Errorf("the home has %s", got)
	}
}

func TestHomeThatOthersCanUseIsRefusedWithTheRemedy(t *testing.T) {
	tests := []struct {
		name   string
		spoil  func(t *testing.T, h *Home)
		expect string // DIR stands for the home
	}{
		{"directory others enter", func(t *testing.T, h *Home) { chmod(t, h.dir, 0o711) }, "run `chmod 700 DIR`"},
		{"directory of the group", func(t *testing.T, h *Home) { chmod(t, h.dir, 0o750) }, "run `chmod 700 DIR`"},
		{"key others read", func(t *testing.T, h *Home) { chmod(t, h.path(keyName), 0o604) }, "run `chmod 600 DIR/identity.key`"},
		{"key the group reads", func(t *testing.T, h *Home) { chmod(t, h.path(keyName), 0o640) }, "run `chmod 600 DIR/identity.key`"},
		{"key others write", func(t *testing.T, h *Home) { chmod(t, h.path(keyName), 0o602) }, "run `chmod 600 DIR/identity.key`"},
		{"key behind a link", func(t *testing.T, h *Home) {
			target := filepath.Join(t.TempDir(), "key")
			if err := os.Rename(h.path(keyName), target); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(target, h.path(keyName)); err != nil {
				t.Fatal(err)
			}
		}, "DIR/identity.key is a symbolic link: put the file itself there"},
		{"key is a pipe", func(t *testing.T, h *Home) {
			os.Remove(h.path(keyName))
			if err := syscall.Mkfifo(h.path(keyName), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "DIR/identity.key is not a regular file"},
		{"key is a directory", func(t *testing.T, h *Home) {
			os.Remove(h.path(keyName))
			if err := os.Mkdir(h.path(keyName), 0o700); err != nil {
				t.Fatal(err)
			}
		}, "DIR/identity.key is not a regular file"},
		{"key cut", func(t *testing.T, h *Home) {
			if err := os.Truncate(h.path(keyName), 100); err != nil {
				t.Fatal(err)
			}
		}, "DIR/identity.key is damaged"},
		{"key empty", func(t *testing.T, h *Home) {
			if err := os.Truncate(h.path(keyName), 0); err != nil {
				t.Fatal(err)
			}
		}, "DIR/identity.key is damaged"},
		{"key huge", func(t *testing.T, h *Home) {
			if err := os.Truncate(h.path(keyName), 1<<20); err != nil {
				t.Fatal(err)
			}
		}, "DIR/identity.key is larger than"},
		{"key altered", func(t *testing.T, h *Home) {
			b := readFile(t, h.path(keyName))
			b[len(b)/2] ^= 1
			if err := os.WriteFile(h.path(keyName), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "DIR/identity.key is damaged"},
		{"membership others read", func(t *testing.T, h *Home) { chmod(t, h.path(membershipName), 0o644) }, "run `chmod 600 DIR/membership`"},
		{"membership cut", func(t *testing.T, h *Home) {
			if err := os.Truncate(h.path(membershipName), 100); err != nil {
				t.Fatal(err)
			}
		}, "DIR/membership is damaged"},
		{"key missing beside a membership", func(t *testing.T, h *Home) { os.Remove(h.path(keyName)) }, "DIR/identity.key is missing"},
		{"key of another identity", func(t *testing.T, h *Home) {
			other := openHome(t, t.TempDir())
			homeSelf(t, other)
			if err := os.Rename(other.path(keyName), h.path(keyName)); err != nil {
				t.Fatal(err)
			}
		}, "move it away and enroll again"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := openHome(t, t.TempDir())
			join(t, h, newSelf(t), time.Hour)
			tt.spoil(t, h)
			before := listing(t, h.dir)
			again, err := Open(h.dir)
			if err == nil {
				_, err = again.Self()
			}
			var e *FileError
			if want := strings.ReplaceAll(tt.expect, "DIR", shellQuote(h.dir)); !errors.As(err, &e) || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %s", err, want)
			}
			if after := listing(t, h.dir); !mapsEqual(before, after) {
				t.Errorf("the home was changed: %v", after)
			}
		})
	}
}

func chmod(t *testing.T, path string, mode fs.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func mapsEqual(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if b[k] != v {
			return false
		}
	}
	return true
}

func TestFilesOfAnotherUserAreRefused(t *testing.T) {
	h := openHome(t, t.TempDir())
	homeSelf(t, h)
	uid := os.Geteuid()
	for _, path := range []string{h.dir, h.path(keyName)} {
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		info.Sys().(*syscall.Stat_t).Uid++
		want := fmt.Sprintf("%s belongs to user %d, and this process runs as user %d", path, uid+1, uid)
		if err := checkPrivate(path, info, 0o600); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	if uid != 0 {
		return
	}
	if err := os.Chown(h.path(keyName), 65534, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := openHome(t, h.dir).Self(); err == nil || !strings.Contains(err.Error(), "belongs to user 65534") {
		t.Errorf("got %v", err)
	}
}

func TestOpenRefusesWhatIsNoDirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"", file, filepath.Join(file, "home")} {
		if h, err := Open(dir); err == nil {
			t.Errorf("Open(%q) = %v", dir, h.dir)
		}
	}
	home := t.TempDir()
	chmod(t, home, 0o700)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(home, link); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(link); err != nil {
		t.Errorf("a link to a private directory: %v", err)
	}
}

func TestRemediesQuoteThePathForTheShell(t *testing.T) {
	for s, want := range map[string]string{
		"/home/a.b/x_1": "/home/a.b/x_1", "/my home": "'/my home'", "/it's": `'/it'\''s'`, "/$(x)`y`\n": "'/$(x)`y`\n'", "": "''",
	} {
		if got := shellQuote(s); got != want {
			t.Errorf("%q becomes %s", s, got)
		}
	}
}

func TestJoinIsReadBack(t *testing.T) {
	authority := newSelf(t)
	h := openHome(t, t.TempDir())
	if m, err := h.Membership(); m != nil || err != nil {
		t.Fatalf("before: %v, %v", m, err)
	}
	m, c := join(t, h, authority, time.Hour)
	got, err := openHome(t, h.dir).Membership()
	if err != nil || fmt.Sprint(got) != fmt.Sprint(m) {
		t.Errorf("got %v, %v\nwant %v", got, err, m)
	}
	s := homeSelf(t, openHome(t, h.dir))
	shown, issuer := s.Show()
	if shown == nil || !bytes.Equal(shown.Raw(), c.Raw()) || !bytes.Equal(issuer, authority.History()) {
		t.Errorf("the identity shows %v", shown)
	}
	if _, err := NewTrust(authority.ID()).Verify(shown.Raw(), issuer, s.ID(), s.Latest(), noon); err != nil {
		t.Error(err)
	}
	if homeSelf(t, h).Credential() != nil {
		t.Error("Join changed the live identity")
	}
	if err := h.Reload(homeSelf(t, h)); err != nil || homeSelf(t, h).Credential() == nil {
		t.Errorf("Reload did not: %v", err)
	}
}

func TestJoinThatCannotBeIsRefusedWhole(t *testing.T) {
	authority, other := newSelf(t), newSelf(t)
	hour := noon.Add(time.Hour)
	for name, tt := range map[string]struct {
		edit func(h *Home, m *Membership, c **Credential, history *[]byte)
		want error // nil: any
	}{
		"no credential": {func(h *Home, m *Membership, c **Credential, _ *[]byte) { *c = nil }, ErrMalformed},
		"about another": {func(h *Home, m *Membership, c **Credential, _ *[]byte) {
			*c = issueTo(t, authority, other, nil, noon, hour)
		}, ErrSubject},
		"of another": {func(h *Home, m *Membership, c **Credential, _ *[]byte) {
			*c = issueTo(t, other, homeSelf(t, h), nil, noon, hour)
		}, ErrIssuer},
		"another's history":     {func(h *Home, m *Membership, c **Credential, b *[]byte) { *b = other.History() }, ErrSignature},
		"no history":            {func(h *Home, m *Membership, c **Credential, b *[]byte) { *b = nil }, ErrMalformed},
		"name with a new line":  {func(h *Home, m *Membership, c **Credential, _ *[]byte) { m.Name = "db1\n" }, nil},
		"address without port":  {func(h *Home, m *Membership, c **Credential, _ *[]byte) { m.Ways[0].Addr = "x" }, nil},
		"too many ways":         {func(h *Home, m *Membership, c **Credential, _ *[]byte) { m.Ways = make([]Way, 9) }, nil},
		"member of another one": {func(h *Home, m *Membership, c **Credential, _ *[]byte) { join(t, h, other, time.Hour) }, ErrOtherAuthority},
	} {
		t.Run(name, func(t *testing.T) {
			h := openHome(t, t.TempDir())
			m, c := membershipOf(t, h, authority, time.Hour)
			history := authority.History()
			tt.edit(h, m, &c, &history)
			before := listing(t, h.dir)
			if err := h.Join(m, c, history); err == nil || tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if after := listing(t, h.dir); !mapsEqual(before, after) {
				t.Errorf("the home was changed: %v", after)
			}
		})
	}
}

func TestJoinAgainReplacesTheMembership(t *testing.T) {
	authority := newSelf(t)
	h := openHome(t, t.TempDir())
	join(t, h, authority, time.Hour)
	m, c := membershipOf(t, h, authority, time.Minute) // even when it ends earlier
	m.TicketHash = [32]byte{8}
	if err := h.Join(m, c, authority.History()); err != nil {
		t.Fatal(err)
	}
	if got, err := h.Membership(); err != nil || got.TicketHash != m.TicketHash {
		t.Errorf("%v, %v", got, err)
	}
}

// A copy of the authority's key from before a rotation is worth nothing to a
// process that begins on a home which has seen the rotation.
func TestTheTrustOfAHomeKnowsTheHistoryThatItKeeps(t *testing.T) {
	authority, other := newSelf(t), newSelf(t)
	thief := new(Self)
	thief.state.Store(authority.state.Load())
	rotate(t, authority)
	h := openHome(t, t.TempDir())
	if trust, err := h.Trust(); err != nil || len(trust.Authorities()) != 0 {
		t.Errorf("a home that joined nothing: %v, %v", trust, err)
	}
	join(t, h, authority, time.Hour)

	trust, err := openHome(t, h.dir).Trust()
	if err != nil {
		t.Fatal(err)
	}
	verify := func(by *Self) error {
		c := issueTo(t, by, other, Attributes{"role": "admin"}, noon, noon.Add(time.Hour))
		_, err := trust.Verify(c.Raw(), by.History(), other.ID(), other.Latest(), noon)
		return err
	}
	if err := verify(thief); !errors.Is(err, ErrSignature) {
		t.Errorf("by the key of before: %v", err)
	}
	rotate(t, thief)
	if err := verify(thief); !errors.Is(err, ErrFork) {
		t.Errorf("by one that forked: %v", err)
	}
	if err := verify(authority); err != nil {
		t.Errorf("by the latest: %v", err)
	}
	var untrusted *UntrustedError
	if err := verify(other); !errors.As(err, &untrusted) {
		t.Errorf("by another: %v", err)
	}

	if err := os.WriteFile(h.path(membershipName), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	var damaged *FileError
	if trust, err := openHome(t, h.dir).Trust(); !errors.As(err, &damaged) || trust != nil {
		t.Errorf("of a damaged home: %v, %v", trust, err)
	}
}

func TestAHomeKeepsTheLongestHistoryOfItsAuthority(t *testing.T) {
	authority := newSelf(t)
	thief, shorter := new(Self), authority.History()
	thief.state.Store(authority.state.Load())
	rotate(t, authority)
	h := openHome(t, t.TempDir())
	m, _ := join(t, h, authority, time.Hour)

	before := listing(t, h.dir)
	for _, want := range []error{ErrSignature, ErrFork} {
		name := "the key of before"
		if want == ErrFork {
			name = "one that forked"
			rotate(t, thief)
		}
		_, forged := membershipOf(t, h, thief, 2*time.Hour)
		if err := h.Join(m, forged, thief.History()); !errors.Is(err, want) {
			t.Errorf("%s, joining: %v", name, err)
		}
		if err := h.Store(forged, thief.History()); !errors.Is(err, want) {
			t.Errorf("%s, storing: %v", name, err)
		}
	}
	if after := listing(t, h.dir); !mapsEqual(before, after) {
		t.Errorf("the home was changed: %v", after)
	}

	_, renewed := membershipOf(t, h, authority, 3*time.Hour)
	if err := h.Store(renewed, shorter); err != nil { // signed by the latest key, shown with less
		t.Fatal(err)
	}
	if c, issuer := homeSelf(t, openHome(t, h.dir)).Show(); c.Serial != renewed.Serial || !bytes.Equal(issuer, authority.History()) {
		t.Errorf("it keeps %v with a history of %d bytes, the longest has %d", c, len(issuer), len(authority.History()))
	}
}

func TestStoreKeepsTheCredentialThatLastsLongest(t *testing.T) {
	authority, other := newSelf(t), newSelf(t)
	h := openHome(t, t.TempDir())
	s := homeSelf(t, h)
	end := func() time.Duration {
		t.Helper()
		return homeSelf(t, openHome(t, h.dir)).Credential().Expires.Sub(noon)
	}
	store := func(by *Self, life time.Duration) error {
		return h.Store(issueTo(t, by, s, nil, noon, noon.Add(life)), by.History())
	}
	if err := store(authority, time.Hour); !errors.Is(err, ErrNotMember) {
		t.Errorf("before joining: %v", err)
	}
	m, _ := join(t, h, authority, time.Hour)
	if err := store(authority, 2*time.Hour); err != nil || end() != 2*time.Hour {
		t.Errorf("a later one: %v, ends %v", err, end())
	}
	if err := store(authority, time.Minute); err != nil || end() != 2*time.Hour {
		t.Errorf("an earlier one: %v, ends %v", err, end())
	}
	if err := store(other, 3*time.Hour); !errors.Is(err, ErrIssuer) {
		t.Errorf("of another authority: %v", err)
	}
	if err := h.Store(issueTo(t, authority, other, nil, noon, noon.Add(9*time.Hour)), authority.History()); !errors.Is(err, ErrSubject) {
		t.Errorf("about another: %v", err)
	}
	if err := h.Store(nil, nil); !errors.Is(err, ErrMalformed) {
		t.Errorf("nil: %v", err)
	}
	if got, err := h.Membership(); err != nil || got.TicketHash != m.TicketHash || len(got.Ways) != 2 || end() != 2*time.Hour {
		t.Errorf("the membership became %v, %v", got, err)
	}
}

func TestReloadTakesOverWhatAnotherProcessWrote(t *testing.T) {
	authority := newSelf(t)
	mine := openHome(t, t.TempDir())
	s := homeSelf(t, mine)
	if err := mine.Reload(s); err != nil {
		t.Errorf("before joining: %v", err)
	}
	var changes int
	s.OnChange(func() { changes++ })
	theirs := openHome(t, mine.dir)
	_, c := join(t, theirs, authority, time.Hour)
	for range 2 {
		if err := mine.Reload(s); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(s.Credential().Raw(), c.Raw()) || changes != 1 {
		t.Errorf("%v after %d changes", s.Credential(), changes)
	}

	// An older credential on disk is not taken.
	later := issueTo(t, authority, s, nil, noon, noon.Add(2*time.Hour))
	if err := s.Renew(later, authority.History()); err != nil {
		t.Fatal(err)
	}
	if err := mine.Reload(s); err != nil || s.Credential() != later {
		t.Errorf("%v, %v", s.Credential(), err)
	}

	rotate(t, homeSelf(t, theirs))
	if err := mine.Reload(s); err != nil || s.Latest() != homeSelf(t, theirs).Latest() {
		t.Errorf("after a rotation: %v", err)
	}
	peerOf(t, s, noon)
	if err := mine.Reload(newSelf(t)); !errors.Is(err, ErrSubject) {
		t.Errorf("another identity: %v", err)
	}
}

func TestRotationIsWrittenBeforeItIsUsed(t *testing.T) {
	h := openHome(t, t.TempDir())
	s := homeSelf(t, h)
	rotate(t, s)
	if again := homeSelf(t, openHome(t, h.dir)); again.Latest() != s.Latest() || again.ID() != s.ID() {
		t.Error("the rotated key is not in the home")
	}
	latest := s.Latest()
	h.fault = func(string) error { return syscall.ENOSPC }
	if err := s.Rotate(); !errors.Is(err, syscall.ENOSPC) || s.Latest() != latest {
		t.Errorf("a rotation that could not be written: %v", err)
	}
	h.fault = nil

	other := homeSelf(t, openHome(t, h.dir))
	rotate(t, other)
	if err := s.Rotate(); !errors.Is(err, ErrFork) {
		t.Errorf("a rotation beside another process's: %v", err)
	}
	if again := homeSelf(t, openHome(t, h.dir)); again.Latest() != other.Latest() {
		t.Error("the other process's rotation was lost")
	}
}

func TestAuthorityHasAnIdentityOfItsOwn(t *testing.T) {
	h := openHome(t, t.TempDir())
	before := listing(t, h.dir)
	if _, err := h.Authority(false); !errors.Is(err, ErrNoAuthority) || !strings.Contains(err.Error(), h.dir) ||
		!strings.Contains(err.Error(), fmt.Sprintf("user %d", os.Geteuid())) {
		t.Errorf("got %v", err)
	}
	if !mapsEqual(before, listing(t, h.dir)) {
		t.Error("asking made something")
	}
	a, err := h.Authority(true)
	if err != nil {
		t.Fatal(err)
	}
	if a.ID() == homeSelf(t, h).ID() {
		t.Error("it is the node's own")
	}
	for _, create := range []bool{false, true} {
		again, err := openHome(t, h.dir).Authority(create)
		if err != nil || again.ID() != a.ID() {
			t.Errorf("%v, %v", again, err)
		}
	}
}

// TestFailureAtEachStepLeavesTheHomeAsItWas fails each step of each write.
func TestFailureAtEachStepLeavesTheHomeAsItWas(t *testing.T) {
	authority := newSelf(t)
	writes := map[string]struct {
		prepare func(h *Home)
		write   func(h *Home) error
	}{
		"first use": {func(*Home) {}, func(h *Home) error { _, err := h.Self(); return err }},
		"join": {func(h *Home) { homeSelf(t, h) }, func(h *Home) error {
			m, c := membershipOf(t, h, authority, time.Hour)
			return h.Join(m, c, authority.History())
		}},
		"join again": {func(h *Home) { join(t, h, authority, time.Minute) }, func(h *Home) error {
			m, c := membershipOf(t, h, authority, time.Hour)
			return h.Join(m, c, authority.History())
		}},
		"store": {func(h *Home) { join(t, h, authority, time.Minute) }, func(h *Home) error {
			return h.Store(issueTo(t, authority, homeSelf(t, h), nil, noon, noon.Add(time.Hour)), authority.History())
		}},
	}
	for name, w := range writes {
		for _, step := range []string{"create", "write", "sync", "rename"} {
			t.Run(name+"/"+step, func(t *testing.T) {
				h := openHome(t, t.TempDir())
				w.prepare(h)
				before := listing(t, h.dir)
				var reached bool
				h.fault = func(s string) error {
					if s == step {
						reached = true
						return syscall.ENOSPC
					}
					return nil
				}
				if err := w.write(h); !errors.Is(err, syscall.ENOSPC) || !reached {
					t.Errorf("got %v", err)
				}
				if after := listing(t, h.dir); !mapsEqual(before, after) {
					t.Errorf("the home became %v", after)
				}
				h.fault = nil
				if err := w.write(h); err != nil {
					t.Errorf("afterwards: %v", err)
				}
			})
		}
	}
}

func TestFullDiskWhileEnrollingLeavesNothingHalfApplied(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=32k,mode=0700"); err != nil {
		t.Skipf("mounting a small tmpfs needs root (%v); TestFailureAtEachStepLeavesTheHomeAsItWas holds each step without", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	authority := newSelf(t)
	h := openHome(t, dir)
	m, c := membershipOf(t, h, authority, time.Hour)

	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 64<<10), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	before := listing(t, dir)
	err := h.Join(m, c, authority.History())
	if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), h.path(membershipName)) {
		t.Errorf("got %v", err)
	}
	if after := listing(t, dir); !mapsEqual(before, after) {
		t.Errorf("files before %d, after %d", len(before), len(after))
	}
	if got, err := h.Membership(); got != nil || err != nil {
		t.Errorf("half a membership: %v, %v", got, err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if err := h.Join(m, c, authority.History()); err != nil {
		t.Errorf("with room again: %v", err)
	}
}

func TestLeftoverOfADeadProcessIsReplaced(t *testing.T) {
	h := openHome(t, t.TempDir())
	target := filepath.Join(t.TempDir(), "target")
	if err := os.Symlink(target, h.path(keyName)+".new"); err != nil {
		t.Fatal(err)
	}
	homeSelf(t, h)
	if _, err := os.Lstat(target); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the key was written through a link")
	}
	if len(listing(t, h.dir)) != 2 {
		t.Errorf("files: %v", listing(t, h.dir))
	}
}

func TestLockHeldTooLongNamesItsHolder(t *testing.T) {
	h := openHome(t, t.TempDir())
	homeSelf(t, h)
	cmd := process(t, "lock", h.dir)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 64)
	n, _ := out.Read(answer)
	if got := string(answer[:n]); got != "<nil>\n" {
		t.Fatalf("the other process says %q", got)
	}

	synctest.Test(t, func(t *testing.T) { // the wait is virtual, the other process is not
		h := openHome(t, h.dir)
		begin := time.Now()
		_, err := h.Lock(context.Background())
		var locked *LockedError
		if !errors.As(err, &locked) || locked.PID != cmd.Process.Pid || locked.Dir != h.dir {
			t.Errorf("got %v, want process %d", err, cmd.Process.Pid)
		} else if !strings.Contains(err.Error(), fmt.Sprintf("process %d", cmd.Process.Pid)) {
			t.Errorf("%v does not name process %d", err, cmd.Process.Pid)
		}
		if waited := time.Since(begin); waited != lockWait {
			t.Errorf("it waited for %v", waited)
		}
		if err := h.Store(nil, nil); errors.As(err, &locked) {
			t.Errorf("what cannot be stored waited for the lock: %v", err)
		}
		if err := h.Join(&Membership{}, nil, nil); errors.As(err, &locked) {
			t.Errorf("what cannot be joined waited for the lock: %v", err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := h.Lock(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("with a context that ended: %v", err)
		}
	})

	// The lock ends with its process, in whatever way that ends.
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	in.Close()
	unlock, err := h.Lock(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	unlock()
	unlock()
}

func TestWritesUnderALockOfTheSameHomeGoAhead(t *testing.T) {
	authority := newSelf(t)
	h := openHome(t, t.TempDir())
	m, c := membershipOf(t, h, authority, time.Minute)
	unlock, err := h.Lock(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Join(m, c, authority.History()); err != nil {
		t.Error(err)
	}
	if err := h.Store(issueTo(t, authority, homeSelf(t, h), nil, noon, noon.Add(time.Hour)), authority.History()); err != nil {
		t.Error(err)
	}
	if pid := strings.TrimSpace(string(readFile(t, h.path(lockName)))); pid != fmt.Sprint(os.Getpid()) {
		t.Errorf("the lock names process %q", pid)
	}
	unlock()
	if pid := readFile(t, h.path(lockName)); len(pid) != 0 {
		t.Errorf("the free lock names process %q", pid)
	}
}

func TestOneLockAtATime(t *testing.T) {
	dir := t.TempDir()
	shared := openHome(t, dir)
	var inside, most int
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range 8 {
		h := shared // half of them by one Home, half by their own
		if i%2 == 0 {
			h = openHome(t, dir)
		}
		wg.Go(func() {
			for range 5 {
				unlock, err := h.Lock(context.Background())
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				inside++
				most = max(most, inside)
				mu.Unlock()
				mu.Lock()
				inside--
				mu.Unlock()
				unlock()
			}
		})
	}
	wg.Wait()
	if most != 1 {
		t.Errorf("%d held the lock at once", most)
	}
}

func TestConcurrentStoresKeepTheLatest(t *testing.T) {
	authority := newSelf(t)
	h := openHome(t, t.TempDir())
	s := homeSelf(t, h)
	join(t, h, authority, time.Second)
	var wg sync.WaitGroup
	for i := range 6 {
		own := h
		if i%2 == 0 {
			own = openHome(t, h.dir)
		}
		c := issueTo(t, authority, s, nil, noon, noon.Add(time.Duration(i+1)*time.Minute))
		wg.Go(func() {
			if err := own.Store(c, authority.History()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := homeSelf(t, openHome(t, h.dir)).Credential().Expires.Sub(noon); got != 6*time.Minute {
		t.Errorf("the credential lasts %v", got)
	}
}
