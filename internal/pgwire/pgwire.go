// Package pgwire tells a PostgreSQL client why it was refused, so that psql shows
// a sentence and not "server closed the connection unexpectedly".
//
// A client begins without a type byte (PostgreSQL documentation, "Message Flow"
// and "Message Formats"):
//
//	u32 length, itself included | u32 code | rest
//
// Code 80877103 (SSLRequest) and 80877104 (GSSENCRequest) are answered with the
// one byte 'N', each at most once and in either order, and the client goes on in
// clear; 3<<16 | minor is the StartupMessage, which is answered with an
// ErrorResponse. 80877102 (CancelRequest) never has an answer: it is closed. A
// first byte 0x16 is a TLS record: that, and whatever else cannot be answered, is
// reset.
//
// Nothing is read beyond the message at hand. A tunnel uses this package only
// where it has to speak itself; what it forwards, it does not look at.
package pgwire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgproto3"
)

// SQLSTATEs that clients understand (PostgreSQL documentation, appendix A).
const (
	Refused    = "28000" // invalid_authorization_specification
	TargetDown = "57P03" // cannot_connect_now
)

// Refusal is what the client is told, with severity FATAL.
type Refusal struct {
	Code    string // SQLSTATE; "" or what is none: Refused
	Message string // one sentence
	Hint    string // what to do; "": none
}

const (
	codeCancel = 80877102
	codeSSL    = 80877103
	codeGSS    = 80877104

	maxStartup = 10_000          // bytes behind the length; MAX_STARTUP_PACKET_LENGTH of the server
	minStartup = 4               // the code
	patience   = 5 * time.Second // for all of it: a client sends its startup at once
	maxField   = 1024            // bytes of message and hint: some of it comes from the other side
	maxRest    = 64 << 10        // bytes read and dropped while the client closes
)

var (
	ErrDirectTLS = errors.New("the client began with TLS, which leaves no room for a refusal")
	ErrProtocol  = errors.New("the client does not speak PostgreSQL's protocol")
	ErrAnswered  = errors.New("the client has been answered already")
)

// Refuse answers a client with r. startup is what was already read from conn and
// nothing else; the rest is read from conn, exactly to the end of the startup.
// Nothing may have been written to conn. Refuse owns conn and returns within 5 s.
// nil means that the client was told, or asked only to cancel, to which no answer
// exists: conn was closed in good order, so that the answer arrives. With an error,
// ErrDirectTLS and ErrProtocol among them, it was reset: an end that nobody
// explained would look like the service's.
func Refuse(conn net.Conn, startup []byte, r Refusal) error {
	defer conn.Close()
	if err := refuse(conn, startup, r); err != nil {
		linger(conn, 0)
		return fmt.Errorf("refusing a PostgreSQL client: %w", err)
	}
	// A reset would overtake the answer.
	linger(conn, -1)
	// Closing with bytes unread, such as the key of a cancel request, is a reset
	// too: the client closes first, or has had its time.
	if w, ok := conn.(interface{ CloseWrite() error }); ok {
		w.CloseWrite()
		io.Copy(io.Discard, io.LimitReader(conn, maxRest))
	}
	return nil
}

// refuse reads the client's beginning and writes the answer to it, if there is one.
func refuse(conn net.Conn, startup []byte, r Refusal) error {
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	c := client{conn, startup}
	cancel, err := c.untilStartup()
	if cancel || err != nil {
		return err
	}
	msg, err := r.encode()
	if err == nil {
		_, err = conn.Write(msg)
	}
	return err
}

// linger with 0 makes closing a socket a reset; a negative number undoes that.
func linger(conn net.Conn, sec int) {
	if l, ok := conn.(interface{ SetLinger(sec int) error }); ok {
		l.SetLinger(sec)
	}
}

// client reads what was read before, then the connection.
type client struct {
	conn net.Conn
	read []byte
}

func (c *client) Read(b []byte) (int, error) {
	if len(c.read) > 0 {
		n := copy(b, c.read)
		c.read = c.read[n:]
		return n, nil
	}
	return c.conn.Read(b)
}

// untilStartup declines encryption until the StartupMessage is read, or a
// CancelRequest's head.
func (c *client) untilStartup() (cancel bool, err error) {
	var head [8]byte
	var ssl, gss bool
	for {
		if _, err := io.ReadFull(c, head[:1]); err != nil {
			return false, fmt.Errorf("reading the startup: %w", err)
		}
		if head[0] == 0x16 {
			return false, ErrDirectTLS
		}
		if _, err := io.ReadFull(c, head[1:]); err != nil {
			return false, fmt.Errorf("reading the startup: %w", err)
		}
		size := int64(binary.BigEndian.Uint32(head[:])) - 4
		if size < minStartup || size > maxStartup {
			return false, fmt.Errorf("%w: a startup of %d bytes", ErrProtocol, size)
		}
		switch code := binary.BigEndian.Uint32(head[4:]); {
		case code == codeCancel:
			return true, nil
		case code == codeSSL && !ssl && size == minStartup:
			ssl = true
		case code == codeGSS && !gss && size == minStartup:
			gss = true
		case code>>16 == 3: // any minor version: it is refused in words all of them know
			if _, err := io.CopyN(io.Discard, c, size-minStartup); err != nil {
				return false, fmt.Errorf("reading the startup: %w", err)
			}
			return false, nil
		default:
			return false, fmt.Errorf("%w: code %d", ErrProtocol, code)
		}
		// What came with the request was sent before the answer to it; whoever
		// would take that for what follows the answer could be fed by a third
		// party (CVE-2021-23222).
		if len(c.read) > 0 {
			return false, fmt.Errorf("%w: it went on before it was answered about encryption", ErrProtocol)
		}
		if _, err := c.conn.Write([]byte{'N'}); err != nil {
			return false, fmt.Errorf("declining encryption: %w", err)
		}
	}
}

func (r Refusal) encode() ([]byte, error) {
	code := r.Code
	if len(code) != 5 || strings.Trim(code, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ") != "" {
		code = Refused
	}
	msg := pgproto3.ErrorResponse{
		Severity: "FATAL", SeverityUnlocalized: "FATAL",
		Code: code, Message: field(r.Message), Hint: field(r.Hint),
	}
	if msg.Message == "" { // the protocol demands one
		msg.Message = "refused"
	}
	return msg.Encode(nil)
}

// field makes s fit into a field: no zero byte, nothing that a terminal obeys.
func field(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case unicode.IsPrint(r):
			return r
		case unicode.IsSpace(r):
			return ' '
		}
		return utf8.RuneError
	}, s)
	if len(s) > maxField {
		end := maxField
		for !utf8.RuneStart(s[end]) {
			end--
		}
		s = s[:end] + "…"
	}
	return s
}

// Head is the beginning of a forwarded connection: what its client said before it
// was answered. It decides, once, whether the first answer is the other side's or a
// refusal; an inlet that forwards before it knows whether it may calls Said for
// what it reads and Answer before it writes. The zero value is ready; it is safe
// for concurrent use, holds at most 10,004 bytes, and none after Answer.
type Head struct {
	mu       sync.Mutex
	said     []byte
	taken    bool // by an answer or by a refusal
	answered bool // by an answer
}

// Said records b, bytes just read from the client. What lies beyond a longest
// startup is not kept; a refusal does not read it.
func (h *Head) Said(b []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if room := 4 + maxStartup - len(h.said); !h.taken && room > 0 {
		h.said = append(h.said, b[:min(len(b), room)]...)
	}
}

// Answer reports whether the other side may answer: it may unless a refusal has
// begun. From the first true on, Refuse returns ErrAnswered.
func (h *Head) Answer() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.taken {
		h.taken, h.answered, h.said = true, true, nil
	}
	return h.answered
}

// Refuse calls [Refuse] with what the client has said, unless the client has been
// answered or refused: then it returns ErrAnswered and does not touch conn. The
// caller no longer reads from conn.
func (h *Head) Refuse(conn net.Conn, r Refusal) error {
	h.mu.Lock()
	said, taken := h.said, h.taken
	if !taken {
		h.taken, h.said = true, nil
	}
	h.mu.Unlock()
	if taken {
		return ErrAnswered
	}
	return Refuse(conn, said, r)
}
