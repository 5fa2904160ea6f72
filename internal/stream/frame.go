package stream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode"
)

// Frame kinds (SPEC.md, "Streams"). A frame's header is kind (1), stream (4)
// and length (2); the bodies:
const (
	frameAway    = 0x06 // on stream 0, empty: no new streams, please; open ones finish
	frameOpen    = 0x10 // header kind (1) | credit (8) | name length (1) | name | body
	frameOpened  = 0x11 // credit (8)
	frameRefused = 0x12 // code (1) | reason
	frameData    = 0x13 // bytes
	frameEnd     = 0x14 // total (8): all bytes sent in this direction
	frameReset   = 0x15 // code (1) | reason
	frameCredit  = 0x16 // offset (8): bytes up to here may be sent

	headerSize = 7
)

// HeaderKind says what a stream is for.
type HeaderKind uint8

const (
	// Bytes is a TCP connection's worth of bytes to the target.
	Bytes HeaderKind = 1
	// Probe asks whether Bytes would be admitted; nothing is dialled.
	Probe HeaderKind = 2
	// Request is one question to an authority and its answer.
	Request HeaderKind = 3
	// PingTarget dials the target and closes it again.
	PingTarget HeaderKind = 4
	// Register offers to serve a name at a relay, for as long as the stream is open.
	Register HeaderKind = 5
	// Connect asks a relay for a lane to whoever serves a name.
	Connect HeaderKind = 6
	// Next asks a relay for a lane to the next relay.
	Next HeaderKind = 7
	// Names asks a relay which names there are.
	Names HeaderKind = 8
)

// Header opens a stream: what is wanted, by which name. Name is at most 63
// bytes (255 on the wire), Body at most 1 KiB.
type Header struct {
	Kind HeaderKind
	Name string
	Body []byte
}

const (
	maxName   = 255
	maxBody   = 1 << 10
	maxReason = 200
)

// Code says why a stream was refused or reset.
type Code uint8

// Codes of SPEC.md. Zero is never sent.
const (
	CodeRefused       Code = 1  // no policy permits it, or there is no such name
	CodeBusy          Code = 2  // a limit on streams, dials or memory is reached
	CodeTargetRefused Code = 3  // the target refused the connection
	CodeTargetTimeout Code = 4  // the target did not answer in time
	CodeTarget        Code = 5  // the target cannot be reached
	CodeExpired       Code = 6  // a credential ended
	CodeRevoked       Code = 7  // a credential, policy or membership was taken back
	CodeLocal         Code = 8  // the application reset its connection
	CodeAway          Code = 9  // this end is shutting down
	CodeChannel       Code = 10 // the channel ended; never on the wire
	CodeProtocol      Code = 11 // the other end broke the protocol
	CodeClosed        Code = 12 // data for a stream that its reader has closed
	CodeInternal      Code = 13
	CodeAbsent        Code = 14 // nobody serves the name at this relay now
)

var codeText = map[Code]string{
	CodeRefused:       "refused",
	CodeBusy:          "busy",
	CodeTargetRefused: "the target refused the connection",
	CodeTargetTimeout: "the target did not answer in time",
	CodeTarget:        "the target cannot be reached",
	CodeExpired:       "a credential expired",
	CodeRevoked:       "the permission was taken back",
	CodeLocal:         "the application at the other end reset the connection",
	CodeAway:          "the other end is shutting down",
	CodeChannel:       "the channel ended",
	CodeProtocol:      "protocol error",
	CodeClosed:        "the reader closed the connection",
	CodeInternal:      "internal error",
	CodeAbsent:        "nobody serves it",
}

func (c Code) String() string {
	if s, ok := codeText[c]; ok {
		return s
	}
	return fmt.Sprintf("code %d", uint8(c))
}

var errFrame = errors.New("a stream frame is malformed")

func appendHeader(b []byte, kind uint8, id uint32, length int) []byte {
	b = append(b, kind)
	b = binary.BigEndian.AppendUint32(b, id)
	return binary.BigEndian.AppendUint16(b, uint16(length))
}

// putHeader writes a header at the front of b.
func putHeader(b []byte, kind uint8, id uint32, length int) {
	b[0] = kind
	binary.BigEndian.PutUint32(b[1:], id)
	binary.BigEndian.PutUint16(b[5:], uint16(length))
}

func appendOpen(b []byte, id uint32, h Header, credit uint64) ([]byte, error) {
	if len(h.Name) > maxName || len(h.Body) > maxBody {
		return nil, fmt.Errorf("opening a stream: a name of %d bytes and a body of %d are more than %d and %d", len(h.Name), len(h.Body), maxName, maxBody)
	}
	b = appendHeader(b, frameOpen, id, 1+8+1+len(h.Name)+len(h.Body))
	b = append(b, byte(h.Kind))
	b = binary.BigEndian.AppendUint64(b, credit)
	b = append(b, byte(len(h.Name)))
	b = append(b, h.Name...)
	return append(b, h.Body...), nil
}

func parseOpen(body []byte) (h Header, credit uint64, err error) {
	if len(body) < 10 || len(body)-10 < int(body[9]) || len(body)-10-int(body[9]) > maxBody {
		return Header{}, 0, errFrame
	}
	n := 10 + int(body[9])
	h = Header{Kind: HeaderKind(body[0]), Name: string(body[10:n])}
	if len(body) > n {
		h.Body = append([]byte(nil), body[n:]...)
	}
	return h, binary.BigEndian.Uint64(body[1:9]), nil
}

func appendOffset(b []byte, kind uint8, id uint32, n uint64) []byte {
	return binary.BigEndian.AppendUint64(appendHeader(b, kind, id, 8), n)
}

func parseOffset(body []byte) (uint64, error) {
	if len(body) != 8 {
		return 0, errFrame
	}
	return binary.BigEndian.Uint64(body), nil
}

func appendCode(b []byte, kind uint8, id uint32, c Code, reason string) []byte {
	if len(reason) > maxReason {
		reason = reason[:maxReason]
	}
	b = appendHeader(b, kind, id, 1+len(reason))
	b = append(b, byte(c))
	return append(b, reason...)
}

func parseCode(body []byte) (Code, string, error) {
	if len(body) < 1 || len(body) > 1+maxReason || body[0] == 0 {
		return 0, "", errFrame
	}
	return Code(body[0]), clean(string(body[1:])), nil
}

// clean makes a peer's text harmless for logs and terminals.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return '?'
		}
		return r
	}, s)
}
