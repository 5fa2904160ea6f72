package authority

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/control"
)

// Operator is what commands do with an authority: Server in the process that owns the store, Remote from any other of
// the same user.
type Operator interface {
	CreateTicket(ctx context.Context, g Grant) (*identity.Ticket, error)
	Tickets(ctx context.Context) ([]TicketInfo, error)
	RevokeTicket(ctx context.Context, ref string) error
	Members(ctx context.Context) ([]MemberInfo, error)
	RemoveMember(ctx context.Context, id identity.ID) error
}

var (
	_ Operator = (*Server)(nil)
	_ Operator = Remote("")
)

// The methods of the control socket.
const (
	methodCreateTicket = "ticket.create"
	methodTickets      = "ticket.list"
	methodRevokeTicket = "ticket.revoke"
	methodMembers      = "member.list"
	methodRemoveMember = "member.remove"
)

// Codes of errors that have a type of their own at the caller too.
const (
	errorGrant        = "grant"
	errorNoSuchTicket = "no-such-ticket"
	errorNoSuchMember = "no-such-member"
)

// pageBytes keeps a page of a listing, whose last item may be 20 KiB, below the 1 MiB of a control message.
const pageBytes = 512 << 10

type createParams struct {
	Name       string              `json:"name,omitempty"`
	Attributes identity.Attributes `json:"attributes,omitempty"`
	Serve      []string            `json:"serve,omitempty"`
	Relay      bool                `json:"relay,omitempty"`
	TTL        time.Duration       `json:"ttl,omitempty"` // nanoseconds
	Uses       int                 `json:"uses,omitempty"`
	Ways       []string            `json:"ways"`
}

type createResult struct {
	Ticket string `json:"ticket"` // its text, with the secret
}

type listParams struct {
	From int `json:"from,omitempty"`
}

type listResult struct {
	Items []json.RawMessage `json:"items"`
	Next  int               `json:"next,omitempty"` // 0: no more
}

type revokeParams struct {
	Ref string `json:"ref"`
}

type removeParams struct {
	ID identity.ID `json:"id"`
}

// Control answers a Remote's requests; it is a control.Handler for the socket of the process that owns the store.
// Methods that are not the authority's have ok false.
func (s *Server) Control(ctx context.Context, method string, params json.RawMessage) (result any, ok bool, err error) {
	switch method {
	case methodCreateTicket:
		result, err = s.controlCreate(ctx, params)
	case methodTickets:
		result, err = controlList(ctx, params, s.Tickets)
	case methodRevokeTicket:
		var p revokeParams
		if err = decodeParams(params, &p); err == nil {
			err = s.RevokeTicket(ctx, p.Ref)
		}
	case methodMembers:
		result, err = controlList(ctx, params, s.Members)
	case methodRemoveMember:
		var p removeParams
		if err = decodeParams(params, &p); err == nil {
			err = s.RemoveMember(ctx, p.ID)
		}
	default:
		return nil, false, nil
	}
	var grant *GrantError
	switch {
	case errors.As(err, &grant):
		err = &control.Error{Code: errorGrant, Message: grant.Error()}
	case errors.Is(err, ErrNoSuchTicket):
		err = &control.Error{Code: errorNoSuchTicket, Message: err.Error()}
	case errors.Is(err, ErrNoSuchMember):
		err = &control.Error{Code: errorNoSuchMember, Message: err.Error()}
	}
	return result, true, err
}

func (s *Server) controlCreate(ctx context.Context, params json.RawMessage) (any, error) {
	var p createParams
	if err := decodeParams(params, &p); err != nil {
		return nil, err
	}
	if err := settleAttributes(p.Attributes); err != nil {
		return nil, err
	}
	g := Grant{Name: p.Name, Attributes: p.Attributes, Serve: p.Serve, Relay: p.Relay, TTL: p.TTL, Uses: p.Uses}
	for _, text := range p.Ways {
		w, err := identity.ParseWay(text)
		if err != nil {
			return nil, &GrantError{"ways", err.Error()}
		}
		g.Ways = append(g.Ways, w)
	}
	t, err := s.CreateTicket(ctx, g)
	if err != nil {
		return nil, err
	}
	text, err := t.Text()
	return createResult{text}, err
}

// controlList answers with as much of the list as fits into one page.
func controlList[T any](ctx context.Context, params json.RawMessage, list func(context.Context) ([]T, error)) (any, error) {
	var p listParams
	if err := decodeParams(params, &p); err != nil {
		return nil, err
	}
	all, err := list(ctx)
	if err != nil {
		return nil, err
	}
	r := listResult{Items: []json.RawMessage{}}
	size := 0
	for i := max(0, p.From); i < len(all); i++ {
		b, err := json.Marshal(all[i])
		if err != nil {
			return nil, err
		}
		r.Items = append(r.Items, b)
		if size += len(b); size >= pageBytes && i+1 < len(all) {
			r.Next = i + 1
			break
		}
	}
	return r, nil
}

// Remote is an Operator by the control socket at this path. Its errors are those of Server, where they have a type, and
// control.ErrNobody when no process listens there.
type Remote string

func (r Remote) CreateTicket(ctx context.Context, g Grant) (*identity.Ticket, error) {
	p := createParams{Name: g.Name, Attributes: g.Attributes, Serve: g.Serve, Relay: g.Relay, TTL: g.TTL, Uses: g.Uses}
	for _, w := range g.Ways {
		p.Ways = append(p.Ways, w.String())
	}
	var result createResult
	if err := r.call(ctx, methodCreateTicket, p, &result); err != nil {
		return nil, err
	}
	return identity.ParseTicket(result.Ticket)
}

func (r Remote) Tickets(ctx context.Context) ([]TicketInfo, error) {
	return remoteList[TicketInfo](ctx, r, methodTickets)
}

func (r Remote) RevokeTicket(ctx context.Context, ref string) error {
	return r.call(ctx, methodRevokeTicket, revokeParams{ref}, nil)
}

func (r Remote) Members(ctx context.Context) ([]MemberInfo, error) {
	return remoteList[MemberInfo](ctx, r, methodMembers)
}

func (r Remote) RemoveMember(ctx context.Context, id identity.ID) error {
	return r.call(ctx, methodRemoveMember, removeParams{id}, nil)
}

func (r Remote) call(ctx context.Context, method string, in, out any) error {
	err := control.Call(ctx, string(r), method, in, out)
	var coded *control.Error
	if !errors.As(err, &coded) {
		return err
	}
	switch coded.Code {
	case errorGrant:
		field, reason, _ := strings.Cut(strings.TrimPrefix(coded.Message, grantPrefix), ": ")
		return &GrantError{Field: field, Reason: reason}
	case errorNoSuchTicket:
		return said{coded.Message, ErrNoSuchTicket}
	case errorNoSuchMember:
		return said{coded.Message, ErrNoSuchMember}
	}
	return err
}

// said is an error in the words of the other process.
type said struct {
	message string
	is      error
}

func (e said) Error() string { return e.message }
func (e said) Unwrap() error { return e.is }

func remoteList[T any](ctx context.Context, r Remote, method string) ([]T, error) {
	var all []T
	for from := 0; ; {
		var page listResult
		if err := r.call(ctx, method, listParams{from}, &page); err != nil {
			return nil, err
		}
		for _, item := range page.Items {
			var v T
			if err := json.Unmarshal(item, &v); err != nil {
				return nil, fmt.Errorf("reading the answer of %s: %w", r, err)
			}
			all = append(all, v)
		}
		if page.Next <= from {
			return all, nil
		}
		from = page.Next
	}
}

// decodeParams keeps integers what they are.
func decodeParams(b []byte, v any) error {
	if len(b) == 0 {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return &control.Error{Code: "malformed", Message: err.Error()}
	}
	return nil
}

// settleAttributes gives attributes that JSON brought the types that identity.Attributes has.
func settleAttributes(attrs identity.Attributes) error {
	for name, v := range attrs {
		switch v := v.(type) {
		case json.Number:
			n, err := v.Int64()
			if err != nil {
				return &GrantError{"attribute " + name, fmt.Sprintf("%s is not an integer of 64 bits", v)}
			}
			attrs[name] = n
		case []any:
			texts := make([]string, len(v))
			for i, e := range v {
				text, ok := e.(string)
				if !ok {
					return &GrantError{"attribute " + name, "a list holds text only"}
				}
				texts[i] = text
			}
			attrs[name] = texts
		}
	}
	return nil
}

// UnmarshalJSON reads what MarshalJSON wrote, attributes of type int64 and []string included.
func (i *TicketInfo) UnmarshalJSON(b []byte) error {
	type plain TicketInfo
	if err := unmarshalNumbers(b, (*plain)(i)); err != nil {
		return err
	}
	return settleAttributes(i.Attributes)
}

// UnmarshalJSON reads what MarshalJSON wrote, attributes of type int64 and []string included.
func (i *MemberInfo) UnmarshalJSON(b []byte) error {
	type plain MemberInfo
	if err := unmarshalNumbers(b, (*plain)(i)); err != nil {
		return err
	}
	return settleAttributes(i.Attributes)
}

func unmarshalNumbers(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	return d.Decode(v)
}
