package channel

import (
	"encoding/binary"
	"errors"
	"unicode"
)

// A record's plaintext is one frame behind another, at least one:
//
//	kind (1) | stream (4) | length of the body (2) | body
//
// Stream 0 is the channel itself; the kinds below are its own. All others
// belong to the streams (internal/stream).
const (
	frameHeader = 7

	kindConfirm    = 0x01 // credential and issuer's history, first record of each direction
	kindClose      = 0x02 // code (1) | reason; the last frame of its direction
	kindPing       = 0x03 // 8 bytes, returned in a pong
	kindPong       = 0x04
	kindCredential = 0x05 // a renewed credential and its issuer's history
	// 0x06 is going away, the streams' business (internal/stream).
	// 0x08–0x0b are reserved for epochs: three handshake messages and a request.
	kindEpochFirst, kindEpochLast = 0x08, 0x0b
)

var errFrame = errors.New("a frame is malformed")

// AppendHeader appends a frame's header.
func AppendHeader(b []byte, kind uint8, stream uint32, length int) []byte {
	b = append(b, kind)
	b = binary.BigEndian.AppendUint32(b, stream)
	return binary.BigEndian.AppendUint16(b, uint16(length))
}

// cutFrame splits the first frame off b.
func cutFrame(b []byte) (kind uint8, stream uint32, body, rest []byte, err error) {
	if len(b) < frameHeader {
		return 0, 0, nil, nil, errFrame
	}
	n := int(binary.BigEndian.Uint16(b[5:]))
	if len(b)-frameHeader < n {
		return 0, 0, nil, nil, errFrame
	}
	return b[0], binary.BigEndian.Uint32(b[1:]), b[frameHeader : frameHeader+n], b[frameHeader+n:], nil
}

// CloseCode says in an authenticated close why a channel ends.
type CloseCode uint8

// Close codes of SPEC.md, "Closing".
const (
	CloseDone     CloseCode = 0 // nothing more to say
	CloseRefused  CloseCode = 1 // the other end's identity or credential is not accepted
	CloseProtocol CloseCode = 2 // the other end broke the protocol
	CloseAbuse    CloseCode = 3 // the other end used up its budget
	CloseDead     CloseCode = 4 // silence for too long
	CloseInternal CloseCode = 5
)

// Closed is why a channel ended when the other end said so.
type Closed struct {
	Code   CloseCode
	Reason string
}

func (e *Closed) Error() string {
	what := "the other end closed the channel"
	switch e.Code {
	case CloseRefused:
		what = "the other end refused us"
	case CloseProtocol:
		what = "the other end says that we broke the protocol"
	case CloseAbuse:
		what = "the other end says that we used up our budget"
	case CloseDead:
		what = "the other end heard nothing from us for too long"
	case CloseInternal:
		what = "the other end failed"
	}
	if e.Reason == "" {
		return what
	}
	return what + ": " + e.Reason
}

const maxReason = 200 // bytes of a reason in a close

func appendClose(b []byte, c CloseCode, reason string) []byte {
	if len(reason) > maxReason {
		reason = reason[:maxReason]
	}
	b = AppendHeader(b, kindClose, 0, 1+len(reason))
	b = append(b, byte(c))
	return append(b, reason...)
}

func parseClose(body []byte) (*Closed, error) {
	if len(body) < 1 || len(body) > 1+maxReason {
		return nil, errFrame
	}
	return &Closed{Code: CloseCode(body[0]), Reason: printable(body[1:])}, nil
}

// printable makes a peer's text harmless for logs and terminals.
func printable(b []byte) string {
	s := []rune(string(b))
	for i, r := range s {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			s[i] = '?'
		}
	}
	return string(s)
}
