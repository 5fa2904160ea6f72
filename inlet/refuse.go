package inlet

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
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

// A verdict is what a client is told.
type verdict struct {
	code    string // what `portal explain` knows it by
	refused bool   // it may not come in; else it cannot now
	text    string // a sentence
	hint    string // what to do
}

// verdict says what an error means to a client: who refuses whom, or what cannot
// be reached. The codes are those that the command gives for the same errors.
func (s *Server) verdict(err error) verdict {
	code, local := streamCode(err)
	var here *channel.Refused
	var there *channel.Closed
	var over *identity.ExpiredError
	var v verdict
	switch {
	case errors.Is(err, channel.ErrPin):
		v = verdict{"PORTAL-E0307", true, "", "Compare the inlet's --peer, or the ID in its --direct, with `portal identity show` on the outlet's host."}
		local = true
	case code == stream.CodeRefused, code == stream.CodeRevoked:
		v = verdict{code: "PORTAL-E0301", refused: true}
	case code == stream.CodeExpired:
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
	if c := s.Self.Credential(); v.code == "PORTAL-E0301" && c != nil && !s.now().Before(c.Expires) {
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
	maxHead    = 64 << 10 // a request's head; what browsers and proxies allow
)

// refuseHTTP answers one request with 403 or 502 and closes in good order. With
// an error the client has not been told, and c is open.
func refuseHTTP(c net.Conn, v verdict) error {
	c.SetDeadline(time.Now().Add(refuseTime))
	// The head is read, so that the client is listening when it is answered;
	// what it asks for does not matter.
	if _, err := http.ReadRequest(bufio.NewReader(io.LimitReader(c, maxHead))); err != nil {
		return fmt.Errorf("reading the request: %w", err)
	}
	status := http.StatusBadGateway
	if v.refused {
		status = http.StatusForbidden
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
		io.CopyN(io.Discard, c, 1<<20)
	}
	return nil
}
