package outlet_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/outlet"
)

// real opens a stream to target in real time and ends everything afterwards.
func real(t *testing.T, target outlet.Target) *stream.Conn {
	t.Helper()
	y := open(t, target, nil)
	t.Cleanup(func() {
		y.close()
		for end := time.Now().Add(5 * time.Second); y.actors() > 0 && time.Now().Before(end); {
			runtime.Gosched() // an actor that was stopped ends on a goroutine of its own
		}
		y.empty()
	})
	return y.stream(y.call(agent))
}

func TestACommandsExitIsTheStreamsEnd(t *testing.T) {
	for _, c := range []struct {
		name, script, in, out string
		reset                 bool
	}{
		{"half-close reaches its input", "cat; echo end", "hello ", "hello end\n", false},
		{"an exit before the input's end is an end", "echo hi", "", "hi\n", false},
		{"a failure is a reset", "cat; exit 3", "hello", "", true},
		{"a kill is a reset", "cat; kill -9 $$", "hello", "", true},
		{"what it leaves behind does not hold the stream", "sleep 1000 & echo hi", "", "hi\n", false},
		{"it knows the name", `printf %s "$PORTAL_NAME"`, "", "db", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := real(t, outlet.Exec("sh", "-c", c.script))
			io.WriteString(s, c.in)
			s.CloseWrite()
			got, err := io.ReadAll(s)
			if c.reset {
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%q, %v; want a reset", got, err)
				}
			} else if err != nil || string(got) != c.out {
				t.Errorf("%q, %v; want %q", got, err, c.out)
			}
		})
	}
}

func TestAResetKillsTheCommandsWholeGroup(t *testing.T) {
	s := real(t, outlet.Exec("sh", "-c", "sleep 1000 & echo $!; wait"))
	line, err := bufio.NewReader(s).ReadString('\n')
	pid, _ := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || pid == 0 {
		t.Fatalf("%q, %v", line, err)
	}
	s.Reset(stream.CodeLocal, "")
	for end := time.Now().Add(10 * time.Second); alive(pid); {
		if time.Now().After(end) {
			t.Fatal("a process of the group is left")
		}
		time.Sleep(time.Millisecond)
	}
}

func TestUnixAndTCPTargetsAreReached(t *testing.T) {
	for network, addr := range map[string]string{"unix": filepath.Join(t.TempDir(), "s"), "tcp": "127.0.0.1:0"} {
		ln, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			c, err := ln.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			io.Copy(c, c)
			c.Close()
		}()
		target := outlet.TCP(ln.Addr().String())
		if network == "unix" {
			target = outlet.Unix(addr)
		}
		s := real(t, target)
		io.WriteString(s, "hello")
		s.CloseWrite()
		if got, err := io.ReadAll(s); err != nil || string(got) != "hello" {
			t.Errorf("%s: %q, %v", network, got, err)
		}
		<-done
		ln.Close()
		if _, err := target(context.Background(), &outlet.Request{}); err == nil {
			t.Errorf("%s: a target that is gone was reached", network)
		}
	}
}
