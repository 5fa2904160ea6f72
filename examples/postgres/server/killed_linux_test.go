package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

func TestAKilledParentLeavesNothing(t *testing.T) {
	if os.Getenv("SERVER_TEST_PARENT") != "" {
		s, err := Start(context.Background(), nil)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("%s %s\n", s.Socket, s.Addr())
		select {}
	}
	parent := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	parent.Env = append(os.Environ(), "SERVER_TEST_PARENT=1")
	stdout, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	var dir, addr string
	if _, err := fmt.Fscan(stdout, &dir, &addr); err != nil {
		t.Fatal("the parent did not start a server: ", err)
	}
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	session, err := pgconn.Connect(t.Context(), "host="+dir+" port="+port+" user=postgres")
	if err != nil {
		t.Fatal(err)
	}
	client := session.Conn()
	defer client.Close()
	fd, err := syscall.InotifyInit1(syscall.IN_NONBLOCK | syscall.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	watch := os.NewFile(uintptr(fd), "inotify")
	defer watch.Close()
	if _, err := syscall.InotifyAddWatch(fd, dir, syscall.IN_DELETE_SELF); err != nil {
		t.Fatal(err)
	}

	parent.Process.Kill()
	parent.Wait()

	client.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.Copy(io.Discard, client); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("the server outlived its parent")
	}
	watch.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := watch.Read(make([]byte, syscall.SizeofInotifyEvent)); err != nil {
		t.Fatal("the directory outlived the parent: ", err)
	}
	gone(t, dir, addr)
}
