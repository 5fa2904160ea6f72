package authority

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/portal-tunnel/portal/internal/store"
)

// smallDisk mounts a disk of size bytes for the test and returns a directory on it.
func smallDisk(t *testing.T, size int) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0700", size)); err != nil {
		t.Skipf("a disk that is full takes the right to mount one (%v); TestAStoreThatFailsSpendsNothing and TestAHomeThatCannotBeWrittenIsLeftAsItWas do without", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill takes what is left of the disk until the returned function is called.
func fill(t *testing.T, dir string) (empty func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for block := make([]byte, 4096); ; {
		if _, err := f.Write(block); errors.Is(err, syscall.ENOSPC) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAFullDiskOfTheAuthoritySpendsNoTicket(t *testing.T) {
	dir := smallDisk(t, 1<<20)
	st, err := store.Open(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	clock := newClock()
	s := &Server{Self: newSelf(t), Store: st, Now: clock.now}
	n := &network{server: s}
	var large []string
	for range 60 { // records that need pages of their own
		large = append(large, fmt.Sprintf("name-%040d", len(large)))
	}
	ticket := newTicket(t, s, Grant{Uses: MaxUses, Serve: large})
	empty := fill(t, dir)

	// The store's free pages take some, then there is no room.
	var members int
	var out *Client
	for members = 0; ; members++ {
		c := newClient(t, n, newHome(t, homeDir(t)))
		_, err := c.Enroll(t.Context(), ticket)
		if err == nil {
			continue
		}
		if !errors.Is(err, ErrUnavailable) {
			t.Fatalf("with a full disk: %v", err)
		}
		out = c
		break
	}
	if m, err := out.Home.Membership(); m != nil || err != nil || out.Self.Credential() != nil || len(out.Trust.Authorities()) != 0 {
		t.Errorf("something is applied at the member's: %v, %v", m, err)
	}
	list, err := s.Tickets(t.Context())
	if err != nil || list[0].Left != MaxUses-members {
		t.Errorf("%d uses are left after %d members, %v", list[0].Left, members, err)
	}
	if got := ids(t, s); len(got) != members || got[out.Self.ID()] {
		t.Errorf("%d members, want %d without the one that was refused", len(got), members)
	}
	if _, err := s.CreateTicket(t.Context(), Grant{Ways: aWay, Serve: large}); err == nil {
		t.Error("a ticket was made on a full disk")
	}
	empty()
	if e := enroll(t, out, ticket); e.Already {
		t.Error("the use was taken after all")
	}
}

func TestAFullDiskOfTheMemberLeavesItsHomeAsItWas(t *testing.T) {
	dir := smallDisk(t, 256<<10)
	s := newServer(t, newClock().now)
	n := &network{server: s}
	ticket := newTicket(t, s, Grant{Name: "db1"})
	home := newHome(t, filepath.Join(dir, "home"))
	c := newClient(t, n, home)
	empty := fill(t, dir)
	if _, err := c.Enroll(t.Context(), ticket); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("with a full disk: %v", err)
	}
	if m, err := home.Membership(); m != nil || err != nil || c.Self.Credential() != nil || len(c.Trust.Authorities()) != 0 {
		t.Errorf("something is applied: %v, %v", m, err)
	}
	left, err := os.ReadDir(home.Dir())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range left {
		if name := f.Name(); name != "identity.key" && name != "lock" {
			t.Errorf("%s is left in the home", name)
		}
	}
	empty()
	if e := enroll(t, c, ticket); e.Membership.Name != "db1" {
		t.Errorf("the repeat: %+v", e)
	}
	if next, err := newHome(t, home.Dir()).Self(); err != nil || next.Credential() == nil {
		t.Errorf("the next process: %v", err)
	}
	if got := ids(t, s); len(got) != 1 || !got[c.Self.ID()] {
		t.Errorf("members: %v", got)
	}
}
