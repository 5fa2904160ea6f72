package baseline

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"
)

var errLate = errors.New("late")

// atOnce is a context that has ended: Back then looks once.
func atOnce() context.Context {
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errLate)
	return ctx
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), 30*time.Second, errLate)
	t.Cleanup(cancel)
	return ctx
}

func TestThisProcessComesBack(t *testing.T) {
	before, err := Here()
	if err != nil {
		t.Fatal(err)
	}
	held := make([]byte, 16<<20)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	end := make(chan struct{})
	go func() { <-end; clear(held); ln.Close() }() // until then it is reachable

	_, err = before.Back(atOnce(), Slack{Heap: 1 << 20})
	for _, what := range []string{"goroutines", "descriptors", "bytes of heap"} {
		if err == nil || !errors.Is(err, errLate) || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := before.Back(atOnce(), Slack{Heap: 32 << 20, Descriptors: 10, Goroutines: 10}); err != nil {
		t.Errorf("within its slack: %v", err)
	}
	close(end)
	if now, err := before.Back(within(t), Slack{Heap: 1 << 20, Descriptors: 4}); err != nil { // the poller's stay
		t.Errorf("%+v: %v", now, err)
	}
}

func TestAnotherProcessComesBack(t *testing.T) {
	// A descriptor and a child more until the next line comes.
	cmd := exec.Command("sh", "-c", `echo begun; read x; exec 9</dev/null; sleep 1000 & echo more; read x; exec 9<&-; kill $!; wait; echo less; read x`)
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
	defer cmd.Wait()
	defer in.Close()
	lines := bufio.NewReader(out)
	if _, err := lines.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	before, err := Of(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if before.Resident == 0 || before.Threads != 1 || before.Children != 0 {
		t.Errorf("%+v", before)
	}
	next := func(want string) {
		t.Helper()
		if _, err := io.WriteString(in, "\n"); err != nil {
			t.Fatal(err)
		}
		if s, err := lines.ReadString('\n'); s != want+"\n" {
			t.Fatalf("%q, %v", s, err)
		}
	}
	next("more")
	_, err = before.Back(atOnce(), Slack{})
	for _, what := range []string{"descriptors", "1 children, 0 before"} {
		if err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
	next("less")
	if now, err := before.Back(within(t), Slack{Resident: 1 << 20}); err != nil {
		t.Errorf("%+v: %v", now, err)
	}
}
