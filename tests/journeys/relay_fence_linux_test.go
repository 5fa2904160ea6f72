package journeys_test

import (
	"bufio"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/portal-tunnel/portal/tests/process"
)

// The hosts have addresses of their own here, in network namespaces on one bridge: they are nobody
// else's, whatever the machine's are.
const (
	relayHost = "10.77.0.1"
	relayPort = 4000
)

var hostAddrs = map[string]string{"relay": relayHost, "db1": "10.77.0.2", "bot": "10.77.0.3"}

// lan is the three hosts.
type lan struct {
	t      testing.TB
	prefix string // of the namespaces' names
}

// newLan makes the hosts, and takes them away at the test's end.
func newLan(t testing.TB) *lan {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces are root's to make; this user is another")
	}
	for _, tool := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%v; Debian packages: iproute2, nftables", err)
		}
	}
	l := &lan{t, fmt.Sprintf("portal-%d-%s-", os.Getpid(), strings.ToLower(rand.Text()[:6]))}
	for host := range hostAddrs {
		if out, err := exec.Command("ip", "netns", "add", l.name(host)).CombinedOutput(); err != nil {
			t.Skipf("this machine makes no network namespaces: %v: %s", err, out)
		}
		t.Cleanup(func() { l.do("", "ip", "netns", "del", l.name(host)) })
	}
	// Every device is made inside a namespace and ends with it.
	relay := l.name("relay")
	l.do("", "ip", "-n", relay, "link", "add", "lan", "type", "bridge")
	for host, addr := range hostAddrs {
		dev := "lan"
		if host != "relay" {
			dev = "eth0"
			l.do("", "ip", "-n", relay, "link", "add", host, "type", "veth", "peer", "name", dev, "netns", l.name(host))
			l.do("", "ip", "-n", relay, "link", "set", host, "master", "lan", "up")
		}
		l.do("", "ip", "-n", l.name(host), "addr", "add", addr+"/24", "dev", dev)
		l.do("", "ip", "-n", l.name(host), "link", "set", dev, "up")
	}
	return l
}

func (l *lan) name(host string) string { return l.prefix + host }

// within is what a command of a host begins with.
func (l *lan) within(host string) []string { return []string{"ip", "netns", "exec", l.name(host)} }

// do runs a command of the test's own, with stdin.
func (l *lan) do(stdin, name string, args ...string) string {
	l.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		l.t.Errorf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return string(out)
}

// fence shuts a host: what comes in is what it asked for, and it may ask the relay's one port.
func (l *lan) fence(host string) {
	l.t.Helper()
	l.do(fmt.Sprintf(`table inet fence {
	chain in { type filter hook input priority 0; policy drop; ct state established accept; counter drop; }
	chain out { type filter hook output priority 0; policy drop; ip daddr %s tcp dport %d accept; counter drop; }
}`, relayHost, relayPort), "ip", append(l.within(host)[1:], "nft", "-f", "-")...)
}

// dropped is how many packets a host's fence has kept in or out.
func (l *lan) dropped(host, chain string) int {
	l.t.Helper()
	out := l.do("", "ip", append(l.within(host)[1:], "nft", "list", "chain", "inet", "fence", chain)...)
	m := regexp.MustCompile(`counter packets (\d+)`).FindStringSubmatch(out)
	if m == nil {
		l.t.Fatalf("no counter in %s", out)
	}
	n, _ := strconv.Atoi(m[1])
	return n
}

// dial connects from a host.
func (l *lan) dial(host, addr string, within time.Duration) error {
	result := make(chan error, 1)
	go func() {
		// Not unlocked: the thread is in another namespace, and ends with this goroutine.
		runtime.LockOSThread()
		fd, err := unix.Open("/run/netns/"+l.name(host), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		if err != nil {
			l.t.Error(err)
		}
		c, err := net.DialTimeout("tcp", addr, within)
		if err == nil {
			c.Close()
		}
		result <- err
	}()
	return <-result
}

// socket is a line of /proc/net/tcp.
type socket struct {
	local, remote netip.AddrPort
	state         int
	unsent        int // bytes that the other side has not acknowledged
}

const (
	established = 1
	listening   = 10
)

// sockets are those of the namespace that a process is in.
func sockets(t testing.TB, p *process.Process) (all []socket) {
	t.Helper()
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/net/%s", p.Pid(), table))
		if errors.Is(err, os.ErrNotExist) && strings.HasSuffix(table, "6") {
			continue // the machine has no IPv6
		}
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		lines := bufio.NewScanner(f)
		lines.Scan() // the heading
		for lines.Scan() {
			fields := strings.Fields(lines.Text())
			s := socket{state: listening} // whatever is in a table of UDP takes what comes
			var state, queued uint64
			var errs [4]error
			s.local, errs[0] = endpoint(fields[1])
			s.remote, errs[1] = endpoint(fields[2])
			state, errs[2] = strconv.ParseUint(fields[3], 16, 8)
			sending, _, _ := strings.Cut(fields[4], ":")
			queued, errs[3] = strconv.ParseUint(sending, 16, 32)
			if err := errors.Join(errs[:]...); err != nil {
				t.Fatalf("%s: %q: %v", table, lines.Text(), err)
			}
			if strings.HasPrefix(table, "tcp") {
				s.state, s.unsent = int(state), int(queued)
			}
			all = append(all, s)
		}
	}
	return all
}

// endpoint is one as those tables have it: words of this machine's, of bytes in the network's order.
func endpoint(field string) (netip.AddrPort, error) {
	host, port, _ := strings.Cut(field, ":")
	raw, err := hex.DecodeString(host)
	if err != nil || len(raw)%4 != 0 {
		return netip.AddrPort{}, fmt.Errorf("%q is no address", field)
	}
	for i := 0; i < len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	ip, _ := netip.AddrFromSlice(raw)
	n, err := strconv.ParseUint(port, 16, 16)
	return netip.AddrPortFrom(ip.Unmap(), uint16(n)), err
}

// Twenty streams by four inlets, which are four lanes: by dial-back each is a connection of the
// outlet's beside its control channel; a carrier is one for all of them.
func TestOutletAndInletNeedOneOutgoingPortAndNoOther(t *testing.T) {
	t.Parallel()
	const inlets, each = 4, 5
	l := newLan(t)
	at := netip.AddrPortFrom(netip.MustParseAddr(relayHost), relayPort)

	// Where nobody listens a dial is refused, as long as its packets get through.
	ways := []struct{ from, to string }{{"relay", "db1"}, {"bot", "db1"}, {"db1", "bot"}, {"db1", "relay"}}
	for _, way := range ways {
		if err := l.dial(way.from, hostAddrs[way.to]+":22", patience); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatalf("from %s to %s without a fence: %v", way.from, way.to, err)
		}
	}
	l.fence("db1")
	l.fence("bot")
	for _, way := range ways {
		keeper, chain := way.from, "out"
		if way.from == "relay" {
			keeper, chain = way.to, "in"
		}
		before := l.dropped(keeper, chain)
		for end := time.Now().Add(patience); l.dropped(keeper, chain) == before; {
			err := l.dial(way.from, hostAddrs[way.to]+":22", 200*time.Millisecond)
			if timeout := net.Error(nil); !errors.As(err, &timeout) || !timeout.Timeout() {
				t.Fatalf("from %s to %s with a fence: %v", way.from, way.to, err)
			}
			if time.Now().After(end) {
				t.Fatalf("from %s to %s: the fence of %s saw nothing", way.from, way.to, keeper)
			}
		}
	}

	dir, err := os.MkdirTemp("", "portal") // short: a socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := serveOn("unix:" + filepath.Join(dir, "target"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	m := &meeting{house: newHomes(t, "relay")}
	m.house.within = make(map[string][]string)
	for host := range hostAddrs {
		m.house.within[host] = l.within(host)
	}
	m.open(at.String())
	m.enroll("db1", "--serve", "db")
	m.enroll("bot", "--attr", "role=agent")
	for carrier, want := range map[string]int{"dial-back": 1 + inlets, "yamux": 2} {
		out := m.outlet("db1", "unix:"+s.addr(), "--carrier", carrier)
		var in []*process.Process
		var conns []net.Conn
		for i := range inlets {
			p, addr := m.inlet("bot", fmt.Sprintf("unix:%s/%s.%d", dir, carrier, i))
			in = append(in, p)
			for range each {
				c := dial(t, addr, []byte("E"))
				if err := echo(c); err != nil {
					t.Fatal(err)
				}
				conns = append(conns, c)
			}
		}
		for end := time.Now().Add(patience); ; {
			n := 0
			for _, s := range sockets(t, out) {
				if s.state == established {
					n++
				}
			}
			if n == want {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%s: the outlet has %d connections, not %d: %v", carrier, n, want, sockets(t, out))
			}
		}
		for _, p := range append(in, out) {
			for _, s := range sockets(t, p) {
				if s.state == listening || s.state == established && s.remote != at {
					t.Errorf("%s: where %s is there is a socket in state %d to %v", carrier, p.Name, s.state, s.remote)
				}
			}
		}
		for i, c := range conns {
			if err := echo(c); err != nil {
				t.Errorf("%s: stream %d: %v", carrier, i, err)
			}
			c.Close()
		}
		for _, p := range append(in, out) {
			p.Stop(patience)
		}
	}
}
