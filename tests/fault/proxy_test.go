package fault

import (
	"bytes"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"
)

// pair is a connection through a proxy, both its ends.
func pair(t *testing.T) (p *Proxy, client, server net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if p, err = New(ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	if client, err = net.Dial("tcp", p.Addr()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	if server, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	for _, c := range []net.Conn{client, server} {
		c.SetDeadline(time.Now().Add(30 * time.Second))
	}
	return p, client, server
}

func TestAFaultHappensAtItsByte(t *testing.T) {
	sent := bytes.Repeat([]byte("0123456789abcdef"), 8<<10) // several reads of the proxy
	for _, at := range []int{0, 1, 32<<10 - 1, 32 << 10, 100_000, len(sent) - 1} {
		for _, d := range []Direction{Out, In} {
			for _, kind := range []Kind{FIN, RST, Flip} {
				p, from, to := pair(t)
				if d == In {
					from, to = to, from
				}
				fired := p.Arm(kind, d, int64(at))
				go func() {
					from.Write(sent)
					from.(*net.TCPConn).CloseWrite()
				}()
				got, err := io.ReadAll(to)
				<-fired
				want := sent[:at]
				switch kind {
				case FIN:
					if err != nil {
						t.Errorf("%v %v at %d: %v, not an end", kind, d, at, err)
					}
				case RST:
					if !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("%v %v at %d: %v, not a reset", kind, d, at, err)
					}
					// A reset may overtake what was on its way.
					want = sent[:min(len(got), at)]
				case Flip:
					want = bytes.Clone(sent)
					if err != nil || len(got) != len(want) || got[at] == want[at] {
						t.Errorf("%v %v at %d: %d bytes, %v", kind, d, at, len(got), err)
						continue
					}
					want[at] = got[at]
				}
				if !bytes.Equal(got, want) {
					t.Errorf("%v %v at %d: %d bytes, not the %d that were to pass", kind, d, at, len(got), len(want))
				}
			}
		}
	}
}

func TestAProxyThatIsNotArmedPassesHalfCloses(t *testing.T) {
	_, client, server := pair(t)
	for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
		if _, err := way[0].Write([]byte("all of it")); err != nil {
			t.Fatal(err)
		}
		way[0].(*net.TCPConn).CloseWrite()
		if got, err := io.ReadAll(way[1]); err != nil || string(got) != "all of it" {
			t.Fatalf("%q, %v", got, err)
		}
	}
}

func TestAFaultHappensOnce(t *testing.T) {
	p, client, server := pair(t)
	fired := p.Arm(Flip, Out, 1)
	for i, want := range []string{"\x00\x02", "\x00\x00"} {
		got := make([]byte, 2)
		if _, err := client.Write([]byte{0, 0}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(server, got); err != nil || string(got) != want {
			t.Fatalf("write %d arrived as %q, %v", i+1, got, err)
		}
		<-fired
	}
}

func TestWhatPassesIsRecordedByDirection(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	p, err := New(ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	p.Record()
	client, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	there, back := bytes.Repeat([]byte("there "), 20_000), []byte("back")
	for _, way := range []struct {
		from, to net.Conn
		sent     []byte
	}{{client, server, there}, {server, client, back}} {
		go way.from.Write(way.sent)
		if _, err := io.ReadFull(way.to, make([]byte, len(way.sent))); err != nil {
			t.Fatal(err)
		}
	}
	all := p.Recorded()
	if len(all) != 2 || !bytes.Equal(all[0], there) && !bytes.Equal(all[1], there) || !bytes.Equal(all[0], back) && !bytes.Equal(all[1], back) {
		t.Errorf("%d directions were kept, %.40q", len(all), all)
	}
}
