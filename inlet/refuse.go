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
	refused := isRefusal(err)
	switch s.Kind {
	case PG:
		r := pgwire.Refusal{
			Code:    pgwire.TargetDown,
			Message: fmt.Sprintf("portal: %s cannot be reached: %v", s.Name, err),
			Hint:    "portal ping " + s.Name + " shows the way hop by hop.",
		}
		if refused {
			r.Code = pgwire.Refused
			r.Message = fmt.Sprintf("portal: refused by outlet %s: %v (PORTAL-E0301)", s.Name, err)
			r.Hint = "Ask whoever issues your credential for the attribute that the outlet's policy wants."
		}
		if err := pgwire.Refuse(c, nil, r); err != nil {
			s.log.Debug("the client could not be told", "err", err)
		}
	case HTTP:
		if err := s.refuseHTTP(c, refused, err); err != nil {
			stream.Abort(c)
			s.log.Debug("the client could not be told", "err", err)
		}
	default:
		stream.Abort(c)
	}
}

func isRefusal(err error) bool {
	var refused *stream.RefusedError
	if errors.As(err, &refused) {
		return refused.Code == stream.CodeRefused || refused.Code == stream.CodeExpired || refused.Code == stream.CodeRevoked
	}
	var here *channel.Refused
	var there *channel.Closed
	return errors.As(err, &here) || errors.As(err, &there) && there.Code == channel.CloseRefused
}

const (
	refuseTime = 5 * time.Second
	maxHead    = 64 << 10 // a request's head; what browsers and proxies allow
)

// refuseHTTP answers one request with 403 or 502 and closes in good order. With
// an error the client has not been told, and c is open.
func (s *Server) refuseHTTP(c net.Conn, refused bool, why error) error {
	c.SetDeadline(time.Now().Add(refuseTime))
	// The head is read, so that the client is listening when it is answered;
	// what it asks for does not matter.
	if _, err := http.ReadRequest(bufio.NewReader(io.LimitReader(c, maxHead))); err != nil {
		return fmt.Errorf("reading the request: %w", err)
	}
	status, code := http.StatusBadGateway, "PORTAL-E0401"
	if refused {
		status, code = http.StatusForbidden, "PORTAL-E0301"
	}
	type message struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	body, _ := json.Marshal(map[string]message{"error": {code, fmt.Sprintf("portal: %s: %v", s.Name, why)}})
	_, err := fmt.Fprintf(c, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s",
		status, http.StatusText(status), len(body), body)
	if err != nil {
		return fmt.Errorf("writing the answer: %w", err)
	}
	disarm(c)
	defer c.Close()
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		w.CloseWrite()
		// A body that is still on its way would turn the close into a reset and
		// take the answer with it.
		io.CopyN(io.Discard, c, 1<<20)
	}
	return nil
}

// disarm lets a client that has been told see an end.
func disarm(c net.Conn) {
	if t, ok := c.(interface{ SetLinger(int) error }); ok {
		t.SetLinger(-1)
	}
}
