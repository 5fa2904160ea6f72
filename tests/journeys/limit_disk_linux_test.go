package journeys_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/tests/fault/disk"
	"github.com/portal-tunnel/portal/tests/process"
)

// smallDisk is one of a megabyte.
func smallDisk(t testing.TB, options string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := disk.Mount(dir, "1m"+options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { disk.Unmount(dir) })
	return dir
}

func fill(t testing.TB, dir string, pages int) {
	t.Helper()
	if err := disk.Fill(dir, pages); err != nil {
		t.Fatal(err)
	}
}

func empty(t testing.TB, dir string) {
	t.Helper()
	if err := disk.Empty(dir); err != nil {
		t.Fatal(err)
	}
}

// root reports whether a disk can be mounted.
func root(t testing.TB) bool {
	if os.Geteuid() != 0 {
		t.Log("NOT RUN: mounting a small disk needs root")
		return false
	}
	return true
}

var authorityReady = regexp.MustCompile(`authority ready on (\S+)`)

// With whatever room there is an authority begins, or says that the disk is full; and then it begins once
// there is room, as if it had never been tried.
func TestAnAuthorityThatFindsTheDiskFullBeginsOnceThereIsRoom(t *testing.T) {
	t.Parallel()
	if !root(t) {
		return
	}
	p := &process.Portal{Path: portal.Path}
	failed := 0
	for pages := 0; ; pages++ {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if pages == 200 {
			t.Fatal("it does not begin in 800 KiB")
		}
		d := smallDisk(t, "")
		fill(t, d, pages)
		home := filepath.Join(d, "office")
		first, err := p.Start(home, "authority", "--listen", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		_, err = first.Line(ctx, authorityReady)
		first.Stop(patience)
		if err == nil {
			break // there was room
		}
		failed++
		if said := strings.Join(first.Lines(), "\n"); !strings.Contains(said, "no space left on device") || !strings.Contains(said, "PORTAL-E0104") || strings.Contains(said, "goroutine ") {
			t.Errorf("with %d pages it says %s", pages, said)
		}
		empty(t, d)
		again, err := p.Start(home, "authority", "--listen", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := again.Line(ctx, authorityReady); err != nil {
			t.Errorf("with room, behind a try with %d pages: %v", pages, err)
		} else if said, err := p.Run(ctx, home, "ticket", "create", "--name", "bot"); err != nil || !strings.HasPrefix(said, "portal1") {
			t.Errorf("a ticket, behind a try with %d pages: %q, %v", pages, said, err)
		}
		again.Stop(patience)
	}
	if failed == 0 {
		t.Error("there was always room: nothing is proved")
	}
	t.Logf("%d tries found no room", failed)
}

// Taking a right away needs no room: the store has pages that it wrote before.
func TestATicketIsRevokedOnAFullDisk(t *testing.T) {
	t.Parallel()
	if !root(t) {
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*patience)
	defer cancel()
	d := smallDisk(t, "")
	p := &process.Portal{Path: portal.Path}
	home := filepath.Join(d, "office")
	authority, err := p.Start(home, "authority", "--listen", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer authority.Stop(patience)
	if _, err := authority.Line(ctx, authorityReady); err != nil {
		t.Fatal(err)
	}
	for i := range 8 {
		name := fmt.Sprint("bot", i)
		if _, err := p.Run(ctx, home, "ticket", "create", "--name", name); err != nil {
			t.Fatal(err)
		}
		listed := func() (id, state string) {
			all, err := p.Run(ctx, home, "ticket", "list")
			m := regexp.MustCompile(`(?m)^(\S+) +(\S+) +` + name + ` `).FindStringSubmatch(all)
			if err != nil || m == nil {
				t.Fatalf("%s, %v", all, err)
			}
			return m[1], m[2]
		}
		id, _ := listed()
		fill(t, d, 0)
		if _, err := p.Run(ctx, home, "ticket", "revoke", id); err != nil {
			t.Error(err)
		}
		empty(t, d)
		if _, state := listed(); state != "revoked" {
			t.Errorf("it is %s", state)
		}
	}
}

// A socket needs no room but an inode.
func TestAnInletWhoseSocketFindsNoRoomSaysSo(t *testing.T) {
	t.Parallel()
	if !root(t) {
		return
	}
	w := newHouse(t)
	d := smallDisk(t, ",nr_inodes=3")
	path := filepath.Join(d, "s")
	for i := range 3 {
		f, err := os.Create(filepath.Join(d, fmt.Sprint(i)))
		if err == nil {
			f.Close()
		} else if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
	}
	w.enroll("bot", "--attr", "role=agent")
	in, err := w.portal("bot").Start(w.home("bot"), "inlet", "db", "--from", "unix:"+path, "--direct", "127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Stop(patience)
	select {
	case <-in.Done():
	case <-time.After(patience):
		t.Fatal("it goes on")
	}
	if said := strings.Join(in.Lines(), "\n"); !strings.Contains(said, "no space left on device") || !strings.Contains(said, path) {
		t.Errorf("it says %s", said)
	}
	if _, err := net.Dial("unix", path); err == nil {
		t.Error("somebody listens")
	}
}
