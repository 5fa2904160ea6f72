package journeys_test

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/tests/fault/proxy"
	"github.com/portal-tunnel/portal/tests/fault/ruler"
	"github.com/portal-tunnel/portal/tests/process"
	"github.com/portal-tunnel/portal/tests/serving"
)

// silence is patience for what is noticed by hearing nothing, which takes up to 30 s.
const silence = 45 * time.Second

// station is a service for any number of transfers at a time, each by its number. A client begins with
//
//	D number size   the first size bytes of the transfer, without an end behind them
//	U number size   reading until the end
//	E               an echo, ended when the client ends
//	GET /number     by HTTP: 1 MiB of the transfer, and its end is the connection's
//
// and the transfer's outcome is how its connection ended here.
type station struct {
	server *serving.Server

	mu        sync.Mutex
	transfers map[uint32]*trip
}

// trip is one transfer, as its client expects it.
type trip struct {
	*station
	number  uint32
	mark    mark         // of what comes here, or goes by HTTP
	begun   bool         // the station's lock
	outcome chan outcome // at the station
}

// outcome is how many right bytes were read, and what came behind them: nil is an end of file.
type outcome struct {
	n   int64
	err error
	at  time.Time
}

// verdict says what is wrong with the outcome of a transfer that was cut.
func (o outcome) verdict() error {
	switch {
	case errors.Is(o.err, ruler.ErrWrong):
		return fmt.Errorf("behind %d right bytes %w", o.n, o.err)
	case o.err == nil:
		return fmt.Errorf("a clean end after %d bytes", o.n)
	case !errors.Is(o.err, syscall.ECONNRESET):
		return fmt.Errorf("%w after %d bytes, not a reset", o.err, o.n)
	}
	return nil
}

func newStation(t testing.TB) *station {
	t.Helper()
	s := &station{transfers: make(map[uint32]*trip)}
	var err error
	if s.server, err = serving.Listen("tcp", "127.0.0.1:0", s.serve); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.server.Close)
	return s
}

func (s *station) addr() string { return s.server.Addr() }

// expect makes a transfer, before its client dials.
func (s *station) expect(m mark) *trip {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := &trip{station: s, number: uint32(len(s.transfers) + 1), mark: m, outcome: make(chan outcome, 1)}
	s.transfers[x.number] = x
	return x
}

func (s *station) begin(number uint32) *trip {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.transfers[number]
	if x != nil {
		x.begun = true
	}
	return x
}

func (s *station) serve(c net.Conn) {
	c.SetDeadline(time.Now().Add(10 * silence)) // the client is the one who gives up first
	r := bufio.NewReader(c)
	kind, err := r.Peek(1)
	if err != nil {
		return
	}
	switch kind[0] {
	case 'E':
		r.Discard(1)
		io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{r})
		c.(halfCloser).CloseWrite()
		return
	case 'G':
		s.page(c, r)
		return
	}
	var head [headSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return
	}
	x := s.begin(binary.BigEndian.Uint32(head[1:]))
	if x == nil {
		return
	}
	var o outcome
	switch kind[0] {
	case 'D':
		// What it says of its connection is what it reads: an error of a write may be the first to tell.
		if _, o.err = ruler.Send(c, x.number, int64(binary.BigEndian.Uint64(head[5:]))); o.err == nil {
			_, o.err = io.Copy(io.Discard, r)
		} else if errors.Is(o.err, syscall.EPIPE) {
			o.err = syscall.ECONNRESET
		}
	case 'U':
		o.n, o.err = ruler.Receive(&marked{r, x.mark}, x.number)
	}
	o.at = time.Now()
	x.outcome <- o
}

// page answers by HTTP/1.0 without a length.
func (s *station) page(c net.Conn, r *bufio.Reader) {
	q, err := http.ReadRequest(r)
	if err != nil {
		return
	}
	number, _ := strconv.ParseUint(q.URL.Path[1:], 10, 32)
	x := s.begin(uint32(number))
	if x == nil {
		return
	}
	_, err = io.WriteString(c, "HTTP/1.0 200 OK\r\nContent-Type: application/octet-stream\r\n\r\n")
	if err == nil {
		sent := int64(0)
		if x.mark.do != nil {
			// The mark is between two writes.
			first := make([]byte, x.mark.n)
			ruler.Fill(first, x.number, 0)
			_, err = c.Write(first)
			sent = int64(len(first))
			x.mark.do()
		}
		rest := make([]byte, transfer-sent)
		ruler.Fill(rest, x.number, sent)
		if err == nil {
			_, err = c.Write(rest)
		}
	}
	if err == nil {
		c.(halfCloser).CloseWrite()
		_, err = io.Copy(io.Discard, r)
	}
	x.outcome <- outcome{err: err, at: time.Now()}
}

// marked calls its mark's do once as many bytes have been read.
type marked struct {
	io.Reader
	mark
}

func (m *marked) Read(b []byte) (int, error) {
	if m.do != nil && m.n == 0 {
		m.do()
		m.do = nil
	}
	if m.do != nil {
		b = b[:min(len(b), m.n)]
	}
	n, err := m.Reader.Read(b)
	m.n -= min(n, m.n)
	return n, err
}

// headSize is of a transfer's first bytes: kind, number, size.
const headSize = 13

// dial begins a transfer of size bytes, without an end when it is negative.
func (x *trip) dial(addr string, kind byte, size int64) (net.Conn, error) {
	head := binary.BigEndian.AppendUint32([]byte{kind}, x.number)
	c, err := connect(addr, binary.BigEndian.AppendUint64(head, uint64(size)))
	if err == nil {
		c.SetDeadline(time.Now().Add(silence))
	}
	return c, err
}

// cut is a transfer that must not come to its end: down tells the direction, m is of the bytes that
// arrive. sure says that its service must have seen it.
func (s *station) cut(addr string, down bool, m mark, sure bool) error {
	if down {
		x := s.expect(mark{})
		c, err := x.dial(addr, 'D', transfer)
		if err != nil {
			return err
		}
		defer c.Close()
		var o outcome
		o.n, o.err = ruler.Receive(&marked{c, m}, x.number)
		if err := o.verdict(); err != nil {
			return fmt.Errorf("the client read %w", err)
		}
		return x.ended(addr, sure)
	}
	x := s.expect(m)
	c, err := x.dial(addr, 'U', transfer)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err = ruler.Send(c, x.number, transfer); err == nil {
		_, err = io.Copy(io.Discard, c)
	}
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		return fmt.Errorf("the client was told %v, not a reset", err)
	}
	return x.ended(addr, sure)
}

// ended says what is wrong with the outcome at the service, if it has one. A stream that was cut before
// the service saw it has none: that is known when a later one has been served.
func (x *trip) ended(addr string, sure bool) error {
	if !sure {
		if err := again(addr); err != nil {
			return err
		}
		x.mu.Lock()
		sure = x.begun
		x.mu.Unlock()
		if !sure {
			return nil
		}
	}
	select {
	case o := <-x.outcome:
		if err := o.verdict(); err != nil {
			return fmt.Errorf("the service read %w", err)
		}
		return nil
	case <-time.After(silence):
		return errors.New("the service was not told")
	}
}

// again tries until an echo comes back: everything is there again by itself.
func again(addr string) (err error) {
	for end := time.Now().Add(silence); time.Now().Before(end); {
		var c net.Conn
		if c, err = connect(addr, []byte("E")); err == nil {
			err = echo(c)
			c.Close()
		}
		if err == nil {
			return nil
		}
	}
	return fmt.Errorf("not there again: %w", err)
}

// crossing is a relay with no key to anything and no credential to issue, and tracks across it.
type crossing struct {
	*house
	*station
	relay *process.Process
	pin   string // its identifier
	at    string // its address
	trust string // the authority's identifier
}

// newCrossing makes one whose members are db1 and bot. The credentials of those in brief last 4 s, those of
// others an hour.
func newCrossing(t testing.TB, brief ...string) *crossing {
	t.Helper()
	x := &crossing{house: newHouse(t), station: newStation(t)}
	grants := map[string][]string{"db1": {"--serve", "db", "--serve", "db/*"}, "bot": {"--attr", "role=agent"}}
	for host, g := range grants {
		if !slices.Contains(brief, host) {
			x.enroll(host, g...)
		}
	}
	if len(brief) > 0 {
		kill(t, x.keeper)
		x.keeper = x.start("authority", "authority", "--listen", x.authority, "--credential-ttl", "4s")
		x.line(x.keeper, `authority ready on`)
	}
	for _, host := range brief {
		x.enroll(host, grants[host]...)
	}
	var ticket struct{ Authority string }
	if err := json.Unmarshal([]byte(x.run("authority", "ticket", "create", "-o", "json")), &ticket); err != nil {
		t.Fatal(err)
	}
	x.trust, x.pin = ticket.Authority, x.run("relay", "identity", "show")
	x.pin = x.pin[:len(x.pin)-1] // its line's end
	x.open("127.0.0.1:0")
	return x
}

// open starts the relay, or starts it again.
func (x *crossing) open(listen string) {
	x.t.Helper()
	x.relay = x.start("relay", "relay", "--listen", listen, "--trust", x.trust)
	x.at = x.line(x.relay, `relay ready on (\S+)`)
}

// The legs of a track.
const (
	inletLeg  = 0
	outletLeg = 1
)

// track is an outlet and an inlet, and between either and the relay a proxy.
type track struct {
	*crossing
	name, carrier string
	out, in       *process.Process
	addr          string // the inlet's
	legs          [2]*proxy.Server
}

// A victim is one of a track's three processes: what kills it has to look who it is now, since restart puts
// another one there.
type victim struct {
	name    string
	process **process.Process
	restart func()
}

func (k *track) victims() []victim {
	return []victim{
		{"relay", &k.relay, func() { k.open(k.at) }},
		{"outlet", &k.out, k.openOutlet},
		{"inlet", &k.in, k.openInlet},
	}
}

func (x *crossing) track(name, carrier string) *track {
	x.t.Helper()
	k := &track{crossing: x, name: name, carrier: carrier, addr: "127.0.0.1:0"}
	for i := range k.legs {
		p, err := proxy.Listen("", x.at)
		if err != nil {
			x.t.Fatal(err)
		}
		x.t.Cleanup(func() { p.Close() })
		k.legs[i] = p
	}
	k.openOutlet()
	k.openInlet()
	return k
}

func (k *track) openOutlet() {
	k.t.Helper()
	k.out = k.start("db1", "outlet", k.name, "--to", k.crossing.station.addr(), "--carrier", k.carrier,
		"--relay", k.pin+"@"+k.legs[outletLeg].Addr(), "--allow", `principal.role == "agent"`, "--max-streams", "200")
	k.line(k.out, `outlet \S+ ready via`)
}

func (k *track) openInlet() {
	k.t.Helper()
	k.in = k.start("bot", "inlet", k.name, "--from", k.addr, "--relay", k.pin+"@"+k.legs[inletLeg].Addr())
	k.addr = k.line(k.in, `inlet \S+ listening on (\S+)`)
}

// hit is a fault of a byte of a transfer, on a leg.
func (k *track) hit(kind proxy.Kind, leg int, down bool, at int64) *proxy.Damage {
	f := proxy.Fault{Kind: kind, At: at, Preface: proxy.Lane, Direction: proxy.Out}
	if kind == proxy.Flip {
		f.N = int(at % 8)
	}
	if down == (leg == inletLeg) {
		f.Direction = proxy.In // both dial the relay
	}
	if leg == outletLeg && k.carrier == "yamux" {
		f.Preface = proxy.Carrier
	}
	return k.legs[leg].Arm(f)
}

// The station's check is worth something: it sees what another tunnel makes of a cut.
func TestACutOfADirectConnectionIsNoticedAsAnEnd(t *testing.T) {
	t.Parallel()
	s := newStation(t)
	p, err := proxy.Listen("", s.addr())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for _, c := range []struct {
		down bool
		who  string
	}{{true, "client"}, {false, "service"}} {
		way := proxy.Out
		if c.down {
			way = proxy.In
		}
		flipped := p.Arm(proxy.Fault{Kind: proxy.Flip, Direction: way, At: 1000, N: 1})
		// A service that saw it may end the connection before the client has sent all: it is told an end then.
		if err := s.cut(p.Addr(), c.down, mark{}, false); err == nil || c.down && !errors.Is(err, ruler.ErrWrong) {
			t.Errorf("a bit that was changed for the %s: %v", c.who, err)
		}
		<-flipped.Over // what is left of it would meet the next fault
		p.Arm(proxy.Fault{Kind: proxy.FIN, Direction: way, At: 1000})
		err := s.cut(p.Addr(), c.down, mark{}, false)
		if c.down && (err == nil || err.Error() != "the client read a clean end after 1000 bytes") {
			t.Errorf("an end for the client: %v", err)
		}
		if !c.down && err == nil {
			t.Error("an end for the service is not noticed")
		}
	}
	for _, o := range []outcome{{n: 1}, {err: io.ErrUnexpectedEOF}, {err: os.ErrDeadlineExceeded}, {err: ruler.ErrWrong}} {
		if o.verdict() == nil {
			t.Errorf("%v passes", o)
		}
	}
}
