// Package socket reads and writes sockets without waiting.
//
// A call that cannot wait need not be announced to the scheduler, which syscall.Read and
// syscall.Write do: whoever is announced and then comes back late, for the kernel delivers what is
// written to its own host in the same call, finds its place given to another thread, which was woken for
// it. On Linux the calls here are made as they are. They last as long as the kernel copies, and a
// collection may wait as long.
package socket

import "net"

// A Writer writes all that it is given to a connection, and waits as long as that takes no more.
// Not safe for concurrent use.
type Writer struct {
	conn net.Conn
	try  func(fd uintptr) bool // nil: no socket
	wait func(func(fd uintptr) bool) error

	// For try: what is left, and why it failed.
	rest net.Buffers
	err  error
}

// NewWriter returns a Writer to c, which may be any connection.
func NewWriter(c net.Conn) *Writer {
	w := &Writer{conn: c}
	if raw := Raw(c); raw != nil {
		w.try, w.wait = w.attempt, raw.Write
	}
	return w
}

// Write writes the buffers in order, of a socket by as few calls as it takes. It cuts off of bufs
// and of its elements what is written.
func (w *Writer) Write(bufs net.Buffers) error {
	w.rest, w.err = bufs, nil
	var err error
	switch {
	case w.try != nil:
		if err = w.wait(w.try); w.err != nil {
			err = w.err
		}
	case len(bufs) == 1:
		_, err = w.conn.Write(bufs[0])
	default:
		_, err = w.rest.WriteTo(w.conn)
	}
	w.rest = nil
	return err
}
