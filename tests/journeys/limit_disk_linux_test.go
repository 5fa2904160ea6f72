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

	"github.com/portal-tunnel/portal/tests/process"
)

// A smallDisk is one of a megabyte, for what a process writes.
type smallDisk struct {
	t   testing.TB
	dir string
}

func newSmallDisk(t testing.TB, options string) *smallDisk {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size=1m"+options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	return &smallDisk{t, dir}
}

func (d *smallDisk) ballast() string { return filepath.Join(d.dir, "ballast") }

// leave fills the disk but for some pages of 4 KiB.
func (d *smallDisk) leave(pages int) {
	d.t.Helper()
	f, err := os.Create(d.ballast())
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	n := int64(0)
	for b := make([]byte, 4096); err == nil; n += 4096 {
		_, err = f.Write(b)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		d.t.Fatal(err)
	}
	if err := f.Truncate(max(n-4096*int64(1+pages), 0)); err != nil {
		d.t.Fatal(err)
	}
}

func (d *smallDisk) empty() {
	d.t.Helper()
	if err := os.Remove(d.ballast()); err != nil {
		d.t.Fatal(err)
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
		d := newSmallDisk(t, "")
		d.leave(pages)
		home := filepath.Join(d.dir, "office")
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
		d.empty()
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

// A ticket is revoked, or is as it was and the command says so.
func TestATicketIsRevokedOnAFullDiskOrTheCommandSaysNo(t *testing.T) {
	t.Parallel()
	if !root(t) {
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*patience)
	defer cancel()
	d := newSmallDisk(t, "")
	p := &process.Portal{Path: portal.Path}
	home := filepath.Join(d.dir, "office")
	authority, err := p.Start(home, "authority", "--listen", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer authority.Stop(patience)
	if _, err := authority.Line(ctx, authorityReady); err != nil {
		t.Fatal(err)
	}
	done := 0
	for i := range 8 { // what was free in its file is used up before long
		name := fmt.Sprint("bot", i)
		if _, err := p.Run(ctx, home, "ticket", "create", "--name", name); err != nil {
			t.Fatal(err)
		}
		line := regexp.MustCompile(`(?m)^(\S+) +(\S+) +` + name + ` `)
		listed := func() (id, state string) {
			all, err := p.Run(ctx, home, "ticket", "list")
			m := line.FindStringSubmatch(all)
			if err != nil || m == nil {
				t.Fatalf("%s, %v", all, err)
			}
			return m[1], m[2]
		}
		id, before := listed()
		d.leave(0)
		_, err := p.Run(ctx, home, "ticket", "revoke", id)
		_, now := listed()
		switch {
		case err == nil && now == "revoked":
			done++
		case err != nil && now == before && strings.Contains(err.Error(), "PORTAL-E0104"):
		default:
			t.Errorf("revoke says %v, and a ticket that was %s is %s", err, before, now)
		}
		d.empty()
		if err != nil {
			if _, err := p.Run(ctx, home, "ticket", "revoke", id); err != nil {
				t.Errorf("with room: %v", err)
			}
		}
		if _, now := listed(); now != "revoked" {
			t.Errorf("with room it is %s", now)
		}
	}
	t.Logf("%d of 8 were revoked without room", done)
}

// A socket needs no room but an inode.
func TestAnInletWhoseSocketFindsNoRoomSaysSo(t *testing.T) {
	t.Parallel()
	if !root(t) {
		return
	}
	w := newHouse(t)
	d := newSmallDisk(t, ",nr_inodes=3")
	path := filepath.Join(d.dir, "s")
	for i := range 3 {
		f, err := os.Create(filepath.Join(d.dir, fmt.Sprint(i)))
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
