package inlet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/pgwire"
	"github.com/portal-tunnel/portal/internal/stream"
)

// refuse tells a local client why it is not connected, as its kind can be
// told, and closes the connection: with a reset unless the client has been told,
// or when ctx has ended and nobody waits for it to listen.
func (s *Server) refuse(ctx context.Context, c net.Conn, err error) {
	if ctx.Err() != nil {
		stream.Abort(c)
		return
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	v := s.verdict(err)
	switch s.Kind {
	case PG:
		r := pgwire.Refusal{Code: pgwire.TargetDown, Message: v.text + " (" + v.code + ")", Hint: v.hint}
		if v.refused {
			r.Code = pgwire.Refused
		}
		if err := pgwire.Refuse(c, nil, r); err != nil {
			s.log.Debug("the client could not be told", "err", err)
		}
	case HTTP:
		if err := refuseHTTP(c, v); err != nil {
			stream.Abort(c)
			s.log.Debug("the client could not be told", "err", err)
		}
	default:
		stream.Abort(c)
	}
}

// greet reads what an HTTP client sends up to the end of its first head, and shows it
// to the guard. A client that sends nothing may take its time, until Drain.
func (s *Server) greet(ctx context.Context, c net.Conn, g *guard) ([]byte, error) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	end := context.AfterFunc(s.taking, func() { c.Close() }) // whoever has not asked yet
	defer end()
	var first []byte
	for g.heads == 0 {
		first = slices.Grow(first, 4096)
		n, err := c.Read(first[len(first):cap(first)])
		if bad := g.check(first[len(first) : len(first)+n]); bad != nil {
			return nil, bad
		}
		if len(first) == 0 && n > 0 {
			c.SetReadDeadline(time.Now().Add(headTime))
		}
		first = first[:len(first)+n]
		if err != nil && g.heads == 0 {
			return nil, &silentError{err}
		}
	}
	c.SetReadDeadline(time.Time{})
	return first, nil
}

// silentError is an HTTP client that did not come to ask for anything.
type silentError struct{ err error }

func (e *silentError) Error() string { return fmt.Sprintf("before a whole request: %v", e.err) }
func (e *silentError) Unwrap() error { return e.err }

// turnAway ends a connection whose first head did not come, or is not taken.
func (s *Server) turnAway(ctx context.Context, c net.Conn, err error) {
	var silent *silentError
	if errors.As(err, &silent) {
		stream.Abort(c)
		return
	}
	s.log.Warn("a request is refused", "name", s.Name, "reason", err)
	s.refuse(ctx, c, err)
}

// A verdict is what a client is told.
type verdict struct {
	code    string // what `portal explain` knows it by
	refused bool   // it may not come in; else it cannot now
	text    string // a sentence
	hint    string // what to do

	malformed bool // it asked for nothing that is understood
}

// verdict says what an error means to a client: who refuses whom, or what cannot
// be reached. The codes are those that the command gives for the same errors.
func (s *Server) verdict(err error) verdict {
	code, local := streamCode(err)
	var here *channel.Refused
	var there *channel.Closed
	var over *identity.ExpiredError
	var foreign *foreignError
	var v verdict
	c := s.Self.Credential()
	ended := c != nil && !s.now().Before(c.Expires)
	switch {
	case errors.As(err, &foreign):
		return verdict{code: "PORTAL-E0309", refused: true, text: fmt.Sprintf("portal: refused by inlet %s: %v", s.Name, err)}
	case isMalformed(err):
		return verdict{code: "PORTAL-E0310", malformed: true, text: fmt.Sprintf("portal: inlet %s takes HTTP/1 requests: %v", s.Name, err)}
	case errors.Is(err, channel.ErrPin):
		v = verdict{code: "PORTAL-E0307", refused: true, hint: "Compare the inlet's --peer, or the ID in its --direct, with `portal identity show` on the outlet's host."}
		local = true
	case code == stream.CodeRefused, code == stream.CodeRevoked:
		v = verdict{code: "PORTAL-E0301", refused: true}
	case code == stream.CodeExpired:
		v = verdict{code: "PORTAL-E0302", refused: true}
	case code == stream.CodeChannel && ended: // with that, in the moment before the stream was
		v = verdict{code: "PORTAL-E0302", refused: true}
	case code == stream.CodeBusy:
		v = verdict{code: "PORTAL-E0404", hint: "Try again later, or raise the outlet's limit."}
	case code == stream.CodeTargetRefused, code == stream.CodeTarget:
		v = verdict{code: "PORTAL-E0402", hint: "Start the service behind the outlet."}
	case code == stream.CodeTargetTimeout:
		v = verdict{code: "PORTAL-E0403", hint: "See why the service behind the outlet does not accept."}
	case errors.As(err, &here):
		v = verdict{code: "PORTAL-E0301", refused: true}
		local = true
		if errors.As(err, &over) {
			v.code = "PORTAL-E0302"
		}
	case errors.As(err, &there) && there.Code == channel.CloseRefused:
		v = verdict{code: "PORTAL-E0301", refused: true}
	default:
		v = verdict{code: "PORTAL-E0401", hint: "portal ping " + s.Name + " shows the way hop by hop."}
	}
	if v.code == "PORTAL-E0301" && ended {
		v.code = "PORTAL-E0302" // which is why
	}
	switch {
	case !v.refused:
		v.text = fmt.Sprintf("portal: %s cannot be reached: %v", s.Name, err)
	case local:
		v.text = fmt.Sprintf("portal: the outlet of %s is refused here: %v", s.Name, err)
	default:
		v.text = fmt.Sprintf("portal: refused by outlet %s: %v", s.Name, err)
	}
	switch {
	case v.hint != "":
	case v.code == "PORTAL-E0302":
		v.hint = "See that the authority can be reached: it renews credentials."
	case local:
		v.hint = "Compare the inlet's --require with `portal credential list` on the outlet's host."
	default:
		v.hint = "Ask whoever issues your credential for the attribute that the outlet's policy wants."
	}
	return v
}

// streamCode is why a stream was refused, or reset before it was answered, and
// whether this end did that; 0 for any other error.
func streamCode(err error) (code stream.Code, local bool) {
	var refused *stream.RefusedError
	var reset *stream.ResetError
	switch {
	case errors.As(err, &refused):
		return refused.Code, false
	case errors.As(err, &reset):
		return reset.Code, reset.Local
	}
	return 0, false
}

const (
	refuseTime = 5 * time.Second
	refuseBody = 64 << 20         // how much of a refused request's body is read, within refuseTime; one with pictures has some MiB
	headTime   = 30 * time.Second // from a head's first byte to its last; what servers allow
	maxHead    = 64 << 10         // a request's head; what browsers and proxies allow
	maxHosts   = 4                // a request's Host lines and its target's host; one or two, and a server refuses two lines
)

// refuseHTTP answers the request whose head was read with 403, 400 or 502 and closes
// in good order. With an error the client has not been told, and c is open.
func refuseHTTP(c net.Conn, v verdict) error {
	c.SetDeadline(time.Now().Add(refuseTime))
	status := http.StatusBadGateway
	switch {
	case v.refused:
		status = http.StatusForbidden
	case v.malformed:
		status = http.StatusBadRequest
	}
	type message struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	body, _ := json.Marshal(map[string]message{"error": {v.code, v.text}})
	_, err := fmt.Fprintf(c, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s",
		status, http.StatusText(status), len(body), body)
	if err != nil {
		return fmt.Errorf("writing the answer: %w", err)
	}
	stream.Disarm(c)
	defer c.Close()
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		w.CloseWrite()
		// A body that is still on its way would turn the close into a reset and
		// take the answer with it.
		io.CopyN(io.Discard, c, refuseBody)
	}
	return nil
}
