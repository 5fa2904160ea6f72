package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// The server's protocol. A client's first byte says what it wants of the connection.
const (
	opEcho    = 'E' // every byte back, until the client's end
	opUp      = 'U' // then bytes to the client's end; answered by their number, u64 big-endian
	opDown    = 'D' // then for how long, u64 nanoseconds; answered by bytes for that time, whose last 8 are the number of those before
	opConnect = 'C' // answered by this byte and the server's end
	opHTTP    = 'G' // of GET: HTTP; see sse.go
)

const (
	bulkChunk    = 256 << 10 // bytes a read or write of bulk, at either end
	forwardChunk = 64 << 10  // bytes a read of a copying forwarder
	listening    = "bench: listening on "
)

// serveCommand is the server behind all systems: `serve IP`.
func serveCommand(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: serve IP")
	}
	l, err := listen(args[0])
	if err != nil {
		return err
	}
	return accept(l, serve)
}

// listen takes a free port and prints it, which is what the parent waits for.
func listen(ip string) (*net.TCPListener, error) {
	l, err := net.Listen("tcp4", net.JoinHostPort(ip, "0"))
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(os.Stderr, "%s%s\n", listening, l.Addr())
	return l.(*net.TCPListener), nil
}

func accept(l *net.TCPListener, handle func(*net.TCPConn) error) error {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return err
		}
		go func() {
			// What went wrong is the client's to notice; it must see a reset, not an end.
			if err := handle(c); err != nil {
				c.SetLinger(0)
			}
			c.Close()
		}()
	}
}

func serve(c *net.TCPConn) error {
	var op [1]byte
	if _, err := io.ReadFull(c, op[:]); err != nil {
		return err
	}
	switch op[0] {
	case opEcho:
		_, err := io.CopyBuffer(onlyWriter{c}, onlyReader{c}, make([]byte, 4<<10))
		return err
	case opUp:
		n, err := io.CopyBuffer(onlyWriter{io.Discard}, onlyReader{c}, make([]byte, bulkChunk))
		if err != nil {
			return err
		}
		_, err = c.Write(binary.BigEndian.AppendUint64(nil, uint64(n)))
		return err
	case opDown:
		var d [8]byte
		if _, err := io.ReadFull(c, d[:]); err != nil {
			return err
		}
		return generate(c, time.Duration(binary.BigEndian.Uint64(d[:])))
	case opConnect:
		_, err := c.Write(op[:])
		return err
	case opHTTP:
		return serveHTTP(c, op[:])
	}
	return errors.New("no such operation")
}

func generate(c *net.TCPConn, d time.Duration) error {
	chunk := make([]byte, bulkChunk)
	total := uint64(0)
	for end := time.Now().Add(d); time.Now().Before(end); {
		n, err := c.Write(chunk)
		total += uint64(n)
		if err != nil {
			return err
		}
	}
	_, err := c.Write(binary.BigEndian.AppendUint64(nil, total))
	return err
}

// onlyReader and onlyWriter hide the methods by which io.Copy would let the kernel splice.
type onlyReader struct{ io.Reader }
type onlyWriter struct{ io.Writer }

// forwardCommand is one plain forwarder: `forward copy|splice IP TARGET`.
func forwardCommand(args []string) error {
	if len(args) != 3 {
		return errors.New("usage: forward copy|splice IP TARGET")
	}
	how, ok := map[string]func(dst, src *net.TCPConn) error{"copy": copyBytes, "splice": spliceBytes}[args[0]]
	if !ok {
		return fmt.Errorf("no way to forward %q", args[0])
	}
	l, err := listen(args[1])
	if err != nil {
		return err
	}
	return accept(l, func(c *net.TCPConn) error { return forward(c, args[2], how) })
}

func copyBytes(dst, src *net.TCPConn) error {
	_, err := io.CopyBuffer(onlyWriter{dst}, onlyReader{src}, make([]byte, forwardChunk))
	return err
}

func spliceBytes(dst, src *net.TCPConn) error {
	_, err := io.Copy(dst, src)
	return err
}

// forward carries both directions, each to its own end; an error in one resets both sides.
func forward(c *net.TCPConn, target string, how func(dst, src *net.TCPConn) error) error {
	conn, err := net.Dial("tcp", target)
	if err != nil {
		return err
	}
	t := conn.(*net.TCPConn)
	defer t.Close()
	one := func(dst, src *net.TCPConn) error {
		err := how(dst, src)
		if err == nil {
			err = dst.CloseWrite()
		}
		if err != nil {
			// The other direction may be waiting on a side that will never speak again.
			c.SetLinger(0)
			t.SetLinger(0)
			c.Close()
			t.Close()
		}
		return err
	}
	back := make(chan error, 1)
	go func() { back <- one(c, t) }()
	return errors.Join(one(t, c), <-back)
}
