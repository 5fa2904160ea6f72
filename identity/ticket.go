package identity

import (
	"bytes"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"
)

// Ticket invites its bearer to join an authority: whom to trust, where to find
// it, and a secret that it takes in exchange for a credential.
//
// Its text is one line of at most 1 KiB: "portal1" and lower-case base32
// without padding (RFC 4648) of
//
//	version 1 | length 2 | body (length bytes) | checksum 4
//
// with version 1, big-endian length, and as checksum the beginning of the
// SHA-256 of all bytes before it. The body is deterministic CBOR:
//
//	[authority: bstr .size 32, secret: bstr .size 32, expires: int (milliseconds),
//	 ways: [1*8 [relay: bstr .size 32 / empty, "host:port"]]]
//
// A ticket prints without its secret; Text writes it out.
type Ticket struct {
	Authority ID
	Ways      []Way
	Secret    Secret
	Expires   time.Time // to the millisecond
}

const (
	ticketPrefix   = "portal1"
	ticketVersion  = 1
	ticketHeader   = 3
	ticketChecksum = 4
	maxTicketText  = 1 << 10
)

var (
	// ErrNotTicket: the text is something else.
	ErrNotTicket = errors.New("this is not a ticket")
	// ErrTicketCut: the end of the ticket is missing.
	ErrTicketCut = errors.New("the ticket is cut short: its end is missing")
	// ErrTicketAltered: the ticket's checksum or form is wrong.
	ErrTicketAltered = errors.New("the ticket was altered on its way")
	// ErrTicketVersion: the ticket was made by a later version of portal.
	ErrTicketVersion = errors.New("the ticket was made by a newer version of portal: update this one")
)

var ticketEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

type ticketBody struct {
	_         struct{} `cbor:",toarray"`
	Authority []byte
	Secret    []byte
	Expires   int64
	Ways      []wireWay
}

// Text returns the ticket for its bearer; with it goes the secret.
func (t *Ticket) Text() (string, error) {
	text, err := t.text()
	if err != nil {
		return "", fmt.Errorf("identity: writing the ticket: %w", err)
	}
	return text, nil
}

func (t *Ticket) text() (string, error) {
	expires := t.Expires.UnixMilli()
	switch {
	case t.Authority.IsZero():
		return "", errors.New("it has no authority")
	case t.Secret.Equal(Secret{}):
		return "", errors.New("it has no secret")
	case len(t.Ways) == 0:
		return "", errors.New("it names no way to the authority")
	case expires <= 0 || expires > latestTime:
		return "", fmt.Errorf("it would expire at %s", t.Expires)
	}
	ways, err := encodeWays(t.Ways)
	if err != nil {
		return "", err
	}
	body := encode(&ticketBody{Authority: t.Authority[:], Secret: t.Secret[:], Expires: expires, Ways: ways})
	if n := len(ticketPrefix) + ticketEncoding.EncodedLen(ticketHeader+len(body)+ticketChecksum); n > maxTicketText {
		return "", fmt.Errorf("it would take %d characters; at most %d are read: name fewer ways", n, maxTicketText)
	}
	b := append(make([]byte, 0, ticketHeader+len(body)+ticketChecksum), ticketVersion)
	b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
	b = append(b, body...)
	sum := sha256.Sum256(b)
	b = append(b, sum[:ticketChecksum]...)
	return ticketPrefix + ticketEncoding.EncodeToString(b), nil
}

// ParseTicket reads a ticket, with blanks around it or not. Its errors say what
// is wrong and never repeat the text: they wrap ErrNotTicket, ErrTicketCut,
// ErrTicketAltered or ErrTicketVersion. An expired ticket is read like another.
func ParseTicket(s string) (*Ticket, error) {
	t, err := parseTicket(strings.TrimSpace(s))
	if err != nil {
		return nil, fmt.Errorf("identity: reading the ticket: %w", err)
	}
	return t, nil
}

func parseTicket(s string) (*Ticket, error) {
	if err := looksLikeTicket(s); err != nil {
		return nil, err
	}
	s = s[len(ticketPrefix):]
	for i, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= '2' && c <= '7':
		case c <= ' ':
			return nil, fmt.Errorf("%w: it is broken at character %d; paste it as one line", ErrTicketAltered, len(ticketPrefix)+i+1)
		default:
			return nil, fmt.Errorf("%w: character %d is none that a ticket has", ErrTicketAltered, len(ticketPrefix)+i+1)
		}
	}

	if b, ok := decodeTicket(s); ok {
		end := len(b) - ticketChecksum
		switch {
		case b[0] > ticketVersion:
			return nil, ErrTicketVersion
		case b[0] != ticketVersion, ticketHeader+int(binary.BigEndian.Uint16(b[1:])) != end:
			return nil, ErrTicketAltered
		}
		return parseTicketBody(b[ticketHeader:end])
	}

	// What the checksum does not vouch for is cut when it says itself that it
	// should be longer.
	const headerText = 8 // characters, of 5 bytes
	if len(s) < headerText {
		return nil, ErrTicketCut
	}
	b, err := ticketEncoding.DecodeString(s[:headerText])
	if err != nil {
		return nil, ErrTicketAltered
	}
	want := len(ticketPrefix) + ticketEncoding.EncodedLen(ticketHeader+int(binary.BigEndian.Uint16(b[1:]))+ticketChecksum)
	have := len(ticketPrefix) + len(s)
	switch {
	case want > maxTicketText:
		return nil, ErrTicketAltered
	case have < want:
		return nil, fmt.Errorf("%w (%d of %d characters are there)", ErrTicketCut, have, want)
	case have > want:
		return nil, fmt.Errorf("%w: it has %d characters too many", ErrTicketAltered, have-want)
	}
	return nil, ErrTicketAltered
}

// decodeTicket returns the bytes of s and whether their checksum is right. In
// later versions too the version comes first and the checksum last.
func decodeTicket(s string) ([]byte, bool) {
	b, err := ticketEncoding.DecodeString(s)
	if err != nil || len(b) < ticketHeader+ticketChecksum || ticketEncoding.EncodeToString(b) != s {
		return nil, false
	}
	end := len(b) - ticketChecksum
	sum := sha256.Sum256(b[:end])
	return b, bytes.Equal(sum[:ticketChecksum], b[end:])
}

// looksLikeTicket tells what was given in place of a ticket, as well as can be
// told.
func looksLikeTicket(s string) error {
	const fileMarks = "/\\.-_~"
	version, prefixed := strings.CutPrefix(s, ticketPrefix[:len(ticketPrefix)-1])
	switch {
	case s == "":
		return fmt.Errorf("%w: it is empty", ErrNotTicket)
	case strings.Contains(s, "-----BEGIN") || strings.HasPrefix(s, "AGE-SECRET-KEY-"):
		return fmt.Errorf("%w but a private key, which no other host should ever see", ErrNotTicket)
	case len(s) > maxTicketText:
		return fmt.Errorf("%w: it has more than %d characters", ErrNotTicket, maxTicketText)
	case prefixed && (len(s) > 100 || !strings.ContainsAny(s, fileMarks)) && version != "" && version[0] >= '1' && version[0] <= '9':
		if version[0] != ticketPrefix[len(ticketPrefix)-1] {
			return ErrTicketVersion
		}
		return nil
	case len(s) == idText && s[0] == 'P':
		return fmt.Errorf("%w but an identifier", ErrNotTicket)
	case strings.ContainsAny(s, fileMarks) && !strings.ContainsAny(s, " \t\r\n"):
		return fmt.Errorf("%w but looks like the name of a file: give what the file contains", ErrNotTicket)
	}
	return fmt.Errorf("%w: a ticket is one line that begins with %q", ErrNotTicket, ticketPrefix)
}

// parseTicketBody reads what a right checksum vouches for; what is wrong here
// was made wrong.
func parseTicketBody(b []byte) (*Ticket, error) {
	var body ticketBody
	if err := decode(b, &body); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrTicketAltered, err)
	}
	t := &Ticket{Expires: time.UnixMilli(body.Expires).UTC()}
	if len(body.Authority) != len(t.Authority) || len(body.Secret) != len(t.Secret) {
		return nil, fmt.Errorf("%w: an identifier or secret of the wrong length", ErrTicketAltered)
	}
	copy(t.Authority[:], body.Authority)
	copy(t.Secret[:], body.Secret)
	var err error
	if t.Ways, err = decodeWays(body.Ways); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrTicketAltered, err)
	}
	if _, err := t.text(); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrTicketAltered, err)
	}
	return t, nil
}

// Hash returns what an authority stores in place of the secret: the SHA-256 of
// the label "portal/ticket-hash/v1", the authority and the secret, each preceded
// by its length in four bytes. Ways and expiry do not count.
func (t *Ticket) Hash() [32]byte {
	return sha256.Sum256(signed("ticket-hash", t.Authority[:], t.Secret[:]))
}

func (t Ticket) String() string {
	return fmt.Sprintf("ticket of %s until %s", t.Authority, t.Expires.UTC().Format(time.RFC3339))
}
func (t Ticket) Format(f fmt.State, _ rune) { io.WriteString(f, t.String()) }
func (t Ticket) LogValue() slog.Value       { return slog.StringValue(t.String()) }
