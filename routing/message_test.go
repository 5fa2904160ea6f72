package routing

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/portal-tunnel/portal/internal/alloc"
)

var messages = []struct {
	name string
	m    Message
	wire string
}{
	{"empty", Message{}, "\x00\x00\x00\x00"},
	{"body", Message{Onward: Route{"\x02db"}, Return: Route{"\x01a\x01b"}, Hops: 3, Body: []byte("hello")}, "\x00\x03\x01\x02db\x02\x01a\x01bhello"},
	{"origin stays", Message{Onward: Route{"\x02db"}, Origin: "peer"}, "\x00\x00\x01\x02db\x00"},
	{"report", Message{Onward: Route{"\x01a"}, Body: []byte("not sent back"), Err: &DeliveryError{"db", ErrFull}}, "\x01\x00\x01\x01a\x00\x02"},
	{"report of something else", Message{Err: errors.New("disk")}, "\x01\x00\x00\x00\x05"},
}

func TestMessageWireForm(t *testing.T) {
	for _, tt := range messages {
		t.Run(tt.name, func(t *testing.T) {
			b, err := tt.m.AppendBinary([]byte("head"))
			if err != nil || string(b) != "head"+tt.wire {
				t.Fatalf("%q, %v; want %q", b, err, tt.wire)
			}
			m, err := DecodeMessage([]byte(tt.wire))
			if err != nil {
				t.Fatal(err)
			}
			if m.Onward != tt.m.Onward || m.Return != tt.m.Return || m.Hops != tt.m.Hops || m.Origin != nil {
				t.Errorf("decoded %+v", m)
			}
			if tt.m.Err == nil && (m.Err != nil || !bytes.Equal(m.Body, tt.m.Body)) {
				t.Errorf("decoded body %q, error %v", m.Body, m.Err)
			}
			if tt.m.Err != nil && (m.Body != nil || m.Err == nil) {
				t.Errorf("decoded report with body %q, error %v", m.Body, m.Err)
			}
		})
	}
}

func TestReasonsSurviveTheWire(t *testing.T) {
	for _, reason := range []error{ErrNoActor, ErrFull, ErrCycle, ErrRefused, ErrUnreachable, ErrTimeout, ErrStopped} {
		b, err := (&Message{Err: &DeliveryError{"db", fmt.Errorf("wrapped: %w", reason)}}).AppendBinary(nil)
		if err != nil {
			t.Fatal(err)
		}
		m, err := DecodeMessage(append(b, "from the future"...))
		if err != nil || m.Err != reason {
			t.Errorf("%v: decoded %v, error %v", reason, m, err)
		}
	}
	for _, code := range []byte{0, 8, 255} {
		if m, err := DecodeMessage([]byte{1, 0, 0, 0, code}); err != nil || m.Err != ErrUnreachable {
			t.Errorf("unknown reason %d: %v, %v", code, m, err)
		}
	}
}

func TestMalformedMessageIsRefused(t *testing.T) {
	for name, b := range map[string]string{
		"nothing":               "",
		"no hops":               "\x00",
		"unknown kind":          "\x02\x00\x00\x00",
		"nine hops":             "\x00\x09\x00\x00",
		"no onward route":       "\x00\x00",
		"no return route":       "\x00\x00\x00",
		"report without reason": "\x01\x00\x00\x00",
	} {
		m, err := DecodeMessage([]byte(b))
		if m != nil || !errors.Is(err, ErrMessage) && !errors.Is(err, ErrRoute) {
			t.Errorf("%s: %v, %v", name, m, err)
		}
	}
	if b, err := (&Message{Hops: 9}).AppendBinary([]byte("head")); !errors.Is(err, ErrMessage) || string(b) != "head" {
		t.Errorf("encoding nine hops: %q, %v", b, err)
	}
}

func FuzzDecodeMessage(f *testing.F) {
	for _, tt := range messages {
		f.Add([]byte(tt.wire))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		m, err := DecodeMessage(b)
		if err != nil {
			if m != nil || !errors.Is(err, ErrMessage) && !errors.Is(err, ErrRoute) {
				t.Fatalf("%v, %v", m, err)
			}
			return
		}
		again, err := m.AppendBinary(nil)
		if err != nil {
			t.Fatal(err)
		}
		if m.Err == nil && !bytes.Equal(again, b) {
			t.Fatalf("encoded again %q, was %q", again, b)
		}
		if m2, err := DecodeMessage(again); err != nil || m2.Err != m.Err || m2.Onward != m.Onward || m2.Return != m.Return {
			t.Fatalf("decoded again %v, %v", m2, err)
		}
	})
}

func TestDecodersOfLyingInputAllocateLittle(t *testing.T) {
	var wire, texts, whole [][]byte
	for _, tt := range routes {
		wire, texts = append(wire, []byte(tt.wire)), append(texts, []byte(tt.text))
	}
	for _, tt := range messages {
		whole = append(whole, []byte(tt.wire))
	}
	t.Run("route", func(t *testing.T) { alloc.Hostile(t, func(b []byte) { DecodeRoute(b) }, wire...) })
	t.Run("text of a route", func(t *testing.T) { alloc.Hostile(t, func(b []byte) { ParseRoute(string(b)) }, texts...) })
	t.Run("message", func(t *testing.T) { alloc.Hostile(t, func(b []byte) { DecodeMessage(b) }, whole...) })
}
