package memnet

import (
	"context"
	"net"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// backlog is how many connections wait for Accept at one listener; further dials wait.
const backlog = 128

// Network connects dialers with listeners by address. The zero value is a network whose links have no delay and no limit.
//
// An address is any host:port; nothing is resolved. Port 0 in Listen is replaced by a free one. Dial takes a round trip; Accept returns
// the connection one latency later.
type Network struct {
	Link Link // of connections dialled from now on; set it before the network is in use

	// OnConnect, when set, is called for each new connection before either end is handed out: the place to tamper with it. Set it before
	// the network is in use.
	OnConnect func(addr string, dialer, listener *Conn)

	mu        sync.Mutex
	listeners map[string]*listener
	port      int // last one given out
}

// Listen listens on addr. It fails with EADDRINUSE when something does already.
func (n *Network) Listen(addr string) (net.Listener, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: "mem", Err: err}
	}
	for port == "0" {
		if a := n.nextAddr(host); n.listeners[a] == nil {
			addr, port = a, ""
		}
	}
	if n.listeners[addr] != nil {
		return nil, &net.OpError{Op: "listen", Net: "mem", Addr: Addr(addr), Err: os.NewSyscallError("bind", syscall.EADDRINUSE)}
	}
	l := &listener{network: n, addr: Addr(addr)}
	if n.listeners == nil {
		n.listeners = make(map[string]*listener)
	}
	n.listeners[addr] = l
	return l, nil
}

func (n *Network) nextAddr(host string) string {
	n.port = n.port%65535 + 1
	return net.JoinHostPort(host, strconv.Itoa(n.port))
}

// Dial connects to addr from the host 10.0.0.1. It returns a *Conn, or a *net.OpError: around ECONNREFUSED when nothing listens there,
// around the error of ctx when that ends first. The name of the network is not looked at.
func (n *Network) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return n.dial(ctx, "10.0.0.1", addr)
}

// From returns a Dial whose connections come from host.
func (n *Network) From(host string) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		return n.dial(ctx, host, addr)
	}
}

func (n *Network) dial(ctx context.Context, host, addr string) (net.Conn, error) {
	conn, err := n.connect(ctx, host, addr)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "mem", Addr: Addr(addr), Err: err}
	}
	return conn, nil
}

func (n *Network) connect(ctx context.Context, host, addr string) (*Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if d := 2 * n.Link.Latency; d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	for {
		n.mu.Lock()
		l := n.listeners[addr]
		if l == nil {
			n.mu.Unlock()
			return nil, os.NewSyscallError("connect", syscall.ECONNREFUSED)
		}
		if len(l.queue) < backlog {
			a, b := pipe(n.Link, Addr(n.nextAddr(host)), l.addr)
			if n.OnConnect != nil {
				n.OnConnect(addr, a, b)
			}
			l.queue = append(l.queue, knock{b, time.Now().Add(n.Link.Latency)})
			l.changed.wake()
			n.mu.Unlock()
			return a, nil
		}
		changed := l.changed.wait()
		n.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// listener is all under its network's lock.
type listener struct {
	network *Network
	addr    Addr
	queue   []knock
	closed  bool
	changed event // the queue, or closed
}

// knock is a connection that waits for Accept.
type knock struct {
	conn *Conn
	at   time.Time // when the dialer's last packet of the handshake arrives
}

func (l *listener) Accept() (net.Conn, error) {
	l.network.mu.Lock()
	defer l.network.mu.Unlock()
	for !l.closed {
		var due <-chan time.Time
		if len(l.queue) > 0 {
			left := time.Until(l.queue[0].at)
			if left <= 0 {
				conn := l.queue[0].conn
				l.queue = l.queue[1:]
				l.changed.wake()
				return conn, nil
			}
			t := time.NewTimer(left)
			defer t.Stop()
			due = t.C
		}
		changed := l.changed.wait()
		l.network.mu.Unlock()
		select {
		case <-changed:
		case <-due:
		}
		l.network.mu.Lock()
	}
	return nil, &net.OpError{Op: "accept", Net: "mem", Addr: l.addr, Err: net.ErrClosed}
}

// Close frees the address and resets the connections that nobody has accepted.
func (l *listener) Close() error {
	l.network.mu.Lock()
	defer l.network.mu.Unlock()
	if l.closed {
		return &net.OpError{Op: "close", Net: "mem", Addr: l.addr, Err: net.ErrClosed}
	}
	l.closed = true
	delete(l.network.listeners, string(l.addr))
	for _, k := range l.queue {
		k.conn.SetLinger(0)
		k.conn.Close()
	}
	l.queue = nil
	l.changed.wake()
	return nil
}

func (l *listener) Addr() net.Addr { return l.addr }
