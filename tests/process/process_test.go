package process

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"
)

func sh(t *testing.T, script string) *Process {
	t.Helper()
	p, err := Start("the script", exec.Command("sh", "-c", script))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Stop(time.Second) })
	return p
}

func TestLineFindsWhatWasPrintedBeforeAndAfterTheCall(t *testing.T) {
	p := sh(t, `echo one 1 >&2; printf 'two ' >&2; echo 2 >&2; read x`)
	for _, c := range []struct{ re, want string }{{`^two (\d)$`, "2"}, {`^one (\d)$`, "1"}} {
		m, err := p.Line(t.Context(), regexp.MustCompile(c.re))
		if err != nil || m[1] != c.want {
			t.Fatalf("%s: %v, %v", c.re, m, err)
		}
	}
}

func TestLineOfAnEndedProgramSaysWhatItPrinted(t *testing.T) {
	p := sh(t, `echo no such database >&2; exit 3`)
	_, err := p.Line(t.Context(), regexp.MustCompile(`ready`))
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "no such database") {
		t.Fatal(err)
	}
}

func TestLineGivesUpWithItsContext(t *testing.T) {
	p := sh(t, `echo waiting >&2; exec sleep 1000`)
	ctx, cancel := context.WithCancelCause(t.Context())
	if _, err := p.Line(ctx, regexp.MustCompile(`waiting`)); err != nil {
		t.Fatal(err)
	}
	cancel(io.ErrNoProgress)
	if _, err := p.Line(ctx, regexp.MustCompile(`ready`)); err == nil || !strings.Contains(err.Error(), io.ErrNoProgress.Error()) {
		t.Fatal(err)
	}
}

func TestAFloodOfLinesIsBounded(t *testing.T) {
	p := sh(t, `i=0; while [ $i -lt 3000 ]; do echo line $i >&2; i=$((i+1)); done; head -c 200000 /dev/zero >&2; echo end >&2; echo last >&2`)
	<-p.Done()
	if _, err := p.Line(t.Context(), regexp.MustCompile(`^last$`)); err != nil {
		t.Fatal(err)
	}
	if len(p.lines) > heldLines || len(p.lines)+p.dropped != 3002 || len(p.lines[len(p.lines)-2]) > lineBytes {
		t.Fatalf("%d lines held, %d dropped", len(p.lines), p.dropped)
	}
}

func TestStopEndsWhatIgnoresSIGTERM(t *testing.T) {
	p := sh(t, `trap '' TERM; echo deaf >&2; while :; do sleep 1000; done`)
	if _, err := p.Line(t.Context(), regexp.MustCompile(`deaf`)); err != nil {
		t.Fatal(err)
	}
	if err := p.Stop(10 * time.Millisecond); err == nil || !strings.Contains(err.Error(), "was killed") {
		t.Fatal(err)
	}
	// Its sleep held stderr too: had it lived on, Wait would have given up on reading.
	if errors.Is(p.err, exec.ErrWaitDelay) {
		t.Fatal("the group lives on")
	}
}

func TestStopReportsTheExitStatus(t *testing.T) {
	p := sh(t, `trap 'exit 5' TERM; echo up >&2; while :; do sleep 0.01; done`)
	if _, err := p.Line(t.Context(), regexp.MustCompile(`up`)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := p.Stop(10 * time.Second); err == nil || err.Error() != "exit status 5" {
			t.Fatal(err)
		}
	}
}

// TestAKilledParentTakesItsProgramsAlong: the program holds the write end of a pipe, so the pipe
// ends when the program has.
func TestAKilledParentTakesItsProgramsAlong(t *testing.T) {
	if os.Getenv("PROCESS_TEST_PARENT") != "" {
		cmd := exec.Command("sh", "-c", `echo up >&2; exec sleep 1000`)
		cmd.ExtraFiles = []*os.File{os.NewFile(3, "pipe")}
		p, err := Start("the script", cmd)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Line(context.Background(), regexp.MustCompile("up")); err != nil {
			t.Fatal(err)
		}
		os.NewFile(3, "pipe").Write([]byte("ready\n"))
		select {}
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	parent := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	parent.Env = append(os.Environ(), "PROCESS_TEST_PARENT=1")
	parent.ExtraFiles = []*os.File{w}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	lines := bufio.NewReader(r)
	if _, err := lines.ReadString('\n'); err != nil {
		t.Fatal("the parent did not start its program: ", err)
	}
	parent.Process.Kill()
	parent.Wait()
	r.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := lines.ReadByte(); err != io.EOF {
		t.Fatalf("the program outlived its parent: %v", err)
	}
}
