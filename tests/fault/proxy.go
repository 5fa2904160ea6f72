// Package fault damages connections on purpose: a TCP proxy that cuts, resets
// or alters at a chosen byte, or listens in. It can stand between any two ends of
// any tunnel.
package fault

import (
	"bytes"
	"errors"
	"net"
	"sync"
)

// Kind is what happens at the byte.
type Kind int

// The faults. Bytes before the chosen one pass unchanged.
const (
	FIN  Kind = iota // both connections are closed in good order
	RST              // both connections are reset
	Flip             // one bit of the byte is changed; everything else passes
)

func (k Kind) String() string { return [...]string{"FIN", "RST", "flip"}[k] }

// Direction is which way the counted bytes travel.
type Direction int

// The directions, from the dialler of the proxy.
const (
	Out Direction = iota
	In
)

func (d Direction) String() string { return [...]string{"out", "in"}[d] }

// Proxy forwards connections to a target and damages those it is told to. It
// owns its listener, its connections and its goroutines until Close.
type Proxy struct {
	target string
	ln     net.Listener
	all    sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]struct{}
	armed *fault
	done  bool
	tapes []*[]byte // of Record, one for each direction of a connection
	taped bool
}

type fault struct {
	kind      Kind
	direction Direction
	left      int64
	fired     chan struct{}
}

// New listens on loopback and forwards to target.
func New(target string) (*Proxy, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &Proxy{target: target, ln: ln, conns: make(map[net.Conn]struct{})}
	p.all.Go(p.accept)
	return p, nil
}

// Addr is where the proxy listens.
func (p *Proxy) Addr() string { return p.ln.Addr().String() }

// Arm lets kind happen after n more bytes in direction d, over all connections.
// The channel is closed when it has.
func (p *Proxy) Arm(kind Kind, d Direction, n int64) <-chan struct{} {
	f := &fault{kind: kind, direction: d, left: n, fired: make(chan struct{})}
	p.mu.Lock()
	p.armed = f
	p.mu.Unlock()
	return f.fired
}

// Record keeps what passes on the connections to come.
func (p *Proxy) Record() {
	p.mu.Lock()
	p.taped = true
	p.mu.Unlock()
}

// Recorded is a copy of what has passed, one direction of one connection each.
func (p *Proxy) Recorded() (all [][]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, t := range p.tapes {
		all = append(all, bytes.Clone(*t))
	}
	return all
}

// tape is where one direction is kept; nil: it is not.
func (p *Proxy) tape() *[]byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.taped {
		return nil
	}
	t := new([]byte)
	p.tapes = append(p.tapes, t)
	return t
}

func (p *Proxy) write(t *[]byte, b []byte) {
	if t != nil {
		p.mu.Lock()
		*t = append(*t, b...)
		p.mu.Unlock()
	}
}

// Close ends everything and waits for it.
func (p *Proxy) Close() error {
	p.mu.Lock()
	p.done = true
	for c := range p.conns {
		c.Close()
	}
	p.mu.Unlock()
	err := p.ln.Close()
	p.all.Wait()
	return err
}

func (p *Proxy) keep(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.done {
		p.conns[c] = struct{}{}
	}
	return !p.done
}

func (p *Proxy) accept() {
	for {
		a, err := p.ln.Accept()
		if err != nil {
			return
		}
		b, err := net.Dial("tcp", p.target)
		if err != nil {
			a.(*net.TCPConn).SetLinger(0)
			a.Close()
			continue
		}
		if !p.keep(a) || !p.keep(b) {
			a.Close()
			b.Close()
			return
		}
		p.all.Go(func() {
			var both sync.WaitGroup
			both.Go(func() { p.forward(a, b, Out) })
			both.Go(func() { p.forward(b, a, In) })
			both.Wait()
			p.mu.Lock()
			delete(p.conns, a)
			delete(p.conns, b)
			p.mu.Unlock()
			a.Close()
			b.Close()
		})
	}
}

var errCut = errors.New("cut")

func (p *Proxy) forward(from, to net.Conn, d Direction) {
	buf := make([]byte, 32<<10)
	tape := p.tape()
	for {
		n, err := from.Read(buf)
		pass, fault := p.judge(buf[:n], d)
		p.write(tape, buf[:pass]) // before anybody can have it
		if _, werr := to.Write(buf[:pass]); werr != nil {
			err = werr
		}
		if fault != nil {
			if fault.kind == RST {
				from.(*net.TCPConn).SetLinger(0)
				to.(*net.TCPConn).SetLinger(0)
			}
			close(fault.fired)
			err = errCut
		}
		if errors.Is(err, errCut) {
			from.Close()
			to.Close()
			return
		}
		if err != nil {
			to.(*net.TCPConn).CloseWrite()
			return
		}
	}
}

// judge counts b against the armed fault: it says how many of the bytes pass,
// and gives the fault when the connection is to be cut behind them.
func (p *Proxy) judge(b []byte, d Direction) (pass int, cut *fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.armed
	if f == nil || f.direction != d || len(b) == 0 {
		return len(b), nil
	}
	if int64(len(b)) <= f.left {
		f.left -= int64(len(b))
		return len(b), nil
	}
	p.armed = nil
	at := int(f.left)
	if f.kind == Flip {
		b[at] ^= 1 << (at % 8)
		close(f.fired)
		return len(b), nil
	}
	return at, f
}
