package relay_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/relay"
	"github.com/portal-tunnel/portal/routing"
)

// relayEnv makes this program a relay in a process of its own, for members of the
// authority that it names.
const relayEnv = "RELAY_TEST_AUTHORITY"

func TestMain(m *testing.M) {
	if a := os.Getenv(relayEnv); a != "" {
		if err := serveAlone(a); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// keeps is what a process of a relay has.
type keeps struct {
	ID   identity.ID
	Addr string

	Goroutines, Actors, Lanes int
	Objects, Bytes            uint64 // of the heap
}

// serveAlone is a relay that says on stdout what it keeps, at first and for each line
// of stdin, until that ends.
func serveAlone(authority string) error {
	id, err := identity.ParseID(authority)
	if err != nil {
		return err
	}
	self, err := identity.NewSelf()
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s := &relay.Server{Node: new(routing.Node), Self: self, Trust: identity.NewTrust(id)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ln) }()
	say := json.NewEncoder(os.Stdout)
	lines := bufio.NewScanner(os.Stdin)
	for more := true; more; more = lines.Scan() {
		runtime.GC() // what is in pools
		runtime.GC() // goes with the second
		var mem runtime.MemStats
		runtime.ReadMemStats(&mem)
		if err := say.Encode(keeps{self.ID(), ln.Addr().String(), runtime.NumGoroutine(), s.Node.Len(), s.Lanes(), mem.HeapObjects, mem.HeapAlloc}); err != nil {
			break
		}
	}
	cancel()
	return <-done
}

// alone starts a relay in a process of its own; ask says what it keeps now.
func (w *town) alone() (ask func() keeps) {
	w.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), relayEnv+"="+w.authority.ID().String())
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		w.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		w.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		w.Fatal(err)
	}
	w.stops = append(w.stops, func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			w.Errorf("the relay: %v", err)
		}
	})
	said := json.NewDecoder(out)
	first := true
	return func() (k keeps) {
		w.Helper()
		if !first {
			fmt.Fprintln(in)
		}
		first = false
		if err := said.Decode(&k); err != nil {
			w.Fatal(err)
		}
		return k
	}
}

// With a thousand streams in a channel a relay keeps what it keeps with one: it does not
// see that there are streams. A process of its own is asked, in which nothing else is.
func TestAThousandStreamsAreNothingToTheRelaysProcess(t *testing.T) {
	const many = 1000
	for _, carrier := range carriers {
		t.Run(carrier.String(), func(t *testing.T) {
			runTown(&town{T: t}, func(w *town) {
				ask := w.alone()
				at := ask()
				w.limits.Streams = many + 1
				f := w.streams(carrier, func(c *relay.Client) { c.ID, c.Addr, c.Dial = at.ID, at.Addr, new(net.Dialer).DialContext })
				var conns []net.Conn
				open := func(n int) keeps {
					for len(conns) < n {
						conns = append(conns, f.begin(t, echoes))
					}
					for _, c := range conns {
						if err := through(c, 1000); err != nil {
							t.Fatal(err)
						}
					}
					// The least of several: a ping may be on its way.
					k := ask()
					for range 20 {
						next := ask()
						k.Goroutines = min(k.Goroutines, next.Goroutines)
						k.Objects, k.Bytes = min(k.Objects, next.Objects), min(k.Bytes, next.Bytes)
					}
					return k
				}
				one, all := open(1), open(many)
				t.Logf("with 1 stream %d goroutines, %d objects, %d bytes", one.Goroutines, one.Objects, one.Bytes)
				t.Logf("with %d %d goroutines, %d objects, %d bytes", many, all.Goroutines, all.Objects, all.Bytes)
				if all.Goroutines != one.Goroutines || all.Actors != one.Actors || all.Lanes != one.Lanes {
					t.Errorf("%d goroutines, %d actors, %d lanes; with one stream %d, %d and %d",
						all.Goroutines, all.Actors, all.Lanes, one.Goroutines, one.Actors, one.Lanes)
				}
				// A buffer that grew is no stream's: a fifth of an object, 64 bytes for each.
				if all.Objects > one.Objects+many/5 || all.Bytes > one.Bytes+64*many {
					t.Errorf("%d objects, %d bytes; with one stream %d and %d", all.Objects, all.Bytes, one.Objects, one.Bytes)
				}
				for _, c := range conns {
					c.Close()
				}
			})
		})
	}
}
