package authority

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/alloc"
)

func mustEncode(t testing.TB, v any) []byte {
	t.Helper()
	b, err := encode(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestQuestionsAndAnswersSurviveTheWire(t *testing.T) {
	enroll := &question{Now: 1_795_000_000_000, Secret: bytes.Repeat([]byte{7}, 32), Proof: bytes.Repeat([]byte{9}, 64)}
	if got, err := decodeQuestion(nameEnroll, mustEncode(t, enroll)); err != nil || !reflect.DeepEqual(got, enroll) {
		t.Errorf("enroll: %v", err)
	}
	renew := &question{Now: -1}
	if got, err := decodeQuestion(nameRenew, mustEncode(t, renew)); err != nil || !reflect.DeepEqual(got, renew) {
		t.Errorf("renew: %v", err)
	}
	for _, a := range []*answer{
		{Now: 5, Credential: []byte{1}, History: []byte{2}},
		{Now: 5, Credential: make([]byte, identity.MaxCredential), History: make([]byte, identity.MaxHistory), Repeat: true},
		{Code: codeTicketUsed, Now: 5, When: 4},
		{Code: 200, Now: 5},
	} {
		b := mustEncode(t, a)
		if len(b) > maxAnswer {
			t.Errorf("an answer of %d bytes is longer than is read", len(b))
		}
		if got, err := decodeAnswer(b); err != nil || !reflect.DeepEqual(got, a) {
			t.Errorf("answer %d: %v", a.Code, err)
		}
	}
}

func TestDecodersRefuseWhatIsNotTheirs(t *testing.T) {
	secret, proof := bytes.Repeat([]byte{7}, 32), bytes.Repeat([]byte{9}, 64)
	good := mustEncode(t, &question{Now: 1, Secret: secret, Proof: proof})
	for what, c := range map[string]struct {
		name string
		b    []byte
	}{
		"nothing":                       {nameEnroll, nil},
		"cut short":                     {nameEnroll, good[:len(good)-1]},
		"a byte too many":               {nameEnroll, append(bytes.Clone(good), 0)},
		"a short secret":                {nameEnroll, mustEncode(t, &question{Now: 1, Secret: secret[:31], Proof: proof})},
		"a long proof":                  {nameEnroll, mustEncode(t, &question{Now: 1, Secret: secret, Proof: append(proof, 1)})},
		"a renewal with a secret":       {nameRenew, good},
		"an enrolment without":          {nameEnroll, mustEncode(t, &question{Now: 1})},
		"an unknown key":                {nameRenew, []byte{0xa2, 0x01, 0x01, 0x07, 0x01}},
		"attributes of the asker's own": {nameRenew, mustEncode(t, map[int]any{1: 1, 4: map[string]any{"role": "admin"}})},
		"a repeated key":                {nameRenew, []byte{0xa2, 0x01, 0x01, 0x01, 0x01}},
		"a longer form of a number":     {nameRenew, []byte{0xa1, 0x01, 0x18, 0x01}},
		"an indefinite length":          {nameRenew, []byte{0xbf, 0x01, 0x01, 0xff}},
		"a tag":                         {nameRenew, []byte{0xa1, 0x01, 0xc1, 0x01}},
		"null":                          {nameRenew, []byte{0xf6}},
		"a list":                        {nameRenew, []byte{0x81, 0x01}},
		"an empty secret spelled out":   {nameRenew, []byte{0xa2, 0x01, 0x01, 0x02, 0x40}},
		"a length that lies":            {nameRenew, []byte{0xa2, 0x01, 0x01, 0x02, 0x5b, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}},
	} {
		if _, err := decodeQuestion(c.name, c.b); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	for what, a := range map[string]*answer{
		"granted without a credential": {Now: 1, History: []byte{1}},
		"granted without a history":    {Now: 1, Credential: []byte{1}},
		"granted with a time":          {Now: 1, When: 1, Credential: []byte{1}, History: []byte{1}},
		"a credential that is long":    {Now: 1, Credential: make([]byte, identity.MaxCredential+1), History: []byte{1}},
		"refused with a credential":    {Code: codeTicketUsed, Now: 1, Credential: []byte{1}},
		"refused as a repeat":          {Code: codeTicketUsed, Now: 1, Repeat: true},
	} {
		if _, err := decodeAnswer(mustEncode(t, a)); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
}

func TestAQuestionLongerThanTheLimitIsNotRead(t *testing.T) {
	r := &counting{r: strings.NewReader(strings.Repeat("x", 10*maxQuestion))}
	if _, err := readAll(r, maxQuestion); err == nil {
		t.Error("accepted")
	}
	if r.n > maxQuestion+1 {
		t.Errorf("%d bytes read of at most %d", r.n, maxQuestion)
	}
}

type counting struct {
	r *strings.Reader
	n int
}

func (c *counting) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n += n
	return n, err
}

func TestRefusalsMeanTheSameAtBothEnds(t *testing.T) {
	authority := newSelf(t).ID()
	when := time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC)
	ours, theirs := when, when.Add(5*time.Minute)
	for _, said := range []error{
		&TicketError{Reason: ErrTicketUnknown, Ref: "r"},
		&TicketError{Reason: ErrTicketExpired, When: when, Ref: "r"},
		&TicketError{Reason: ErrTicketUsed, When: when, Ref: "r"},
		&TicketError{Reason: ErrTicketRevoked, When: when, Ref: "r"},
		&RefusedError{Authority: authority, Reason: ErrNotMember},
		&RefusedError{Authority: authority, Reason: ErrRemoved, When: when},
		&RefusedError{Authority: authority, Reason: ErrFull},
		&RefusedError{Authority: authority, Reason: ErrProof},
		&RefusedError{Authority: authority, Reason: ErrMalformed},
		&RefusedError{Authority: authority, Reason: ErrRotatedAway},
		&SkewError{Ours: ours, Theirs: theirs},
	} {
		a := refusal(fmt.Errorf("doing it: %w", said))
		a.Now = millis(theirs)
		a, err := decodeAnswer(mustEncode(t, a))
		if err != nil {
			t.Fatalf("%v: %v", said, err)
		}
		if heard := a.err(authority, ours, "r"); !reflect.DeepEqual(heard, said) {
			t.Errorf("said %#v, heard %#v", said, heard)
		}
	}
	trouble := refusal(errors.New("open /var/lib/portal/store: no space left on device"))
	if err := trouble.err(authority, ours, "r"); !errors.Is(err, ErrUnavailable) || strings.Contains(err.Error(), "/var") {
		t.Errorf("the authority's own trouble is heard as %v", err)
	}
	var refused *RefusedError
	if err := (&answer{Code: 99}).err(authority, ours, "r"); !errors.As(err, &refused) {
		t.Errorf("a code of a later version is heard as %v", err)
	}
}

func FuzzQuestion(f *testing.F) {
	f.Add(nameEnroll, mustEncode(f, &question{Now: 1, Secret: make([]byte, 32), Proof: make([]byte, 64)}))
	f.Add(nameRenew, mustEncode(f, &question{Now: 1_795_000_000_000}))
	f.Add(nameRenew, []byte{0xa1, 0x01, 0x18, 0x01})
	f.Add("", []byte{0xbf, 0xff})
	f.Fuzz(func(t *testing.T, name string, b []byte) {
		defer alloc.Bound(t, len(name)+len(b))()
		q, err := decodeQuestion(name, b)
		if err != nil {
			return
		}
		if again := mustEncode(t, q); !bytes.Equal(again, b) {
			t.Errorf("%x was accepted in place of %x", b, again)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	f.Add(mustEncode(f, &answer{Now: 1, Credential: []byte{1}, History: []byte{2}, Repeat: true}))
	f.Add(mustEncode(f, &answer{Code: codeRemoved, Now: 1, When: 1}))
	f.Add([]byte{0xa2, 0x01, 0x0c, 0x02, 0x01})
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		a, err := decodeAnswer(b)
		if err != nil {
			return
		}
		if again := mustEncode(t, a); !bytes.Equal(again, b) {
			t.Errorf("%x was accepted in place of %x", b, again)
		}
		if err := a.err(identity.ID{}, time.Time{}, "r"); (err == nil) != (a.Code == codeGranted) || err != nil && err.Error() == "" {
			t.Errorf("code %d is heard as %v", a.Code, err)
		}
	})
}

func FuzzRecords(f *testing.F) {
	grant := grantRecord{Name: "db1", Attributes: identity.Attributes{"role": "db", "teams": []string{"a", "b"}, "level": int64(-3), "on": true, "none": []string{}}, Serve: []string{"orders/*"}, Relay: true}
	f.Add(mustEncode(f, &ticketRecord{Grant: grant, Created: 1, Expires: 2, Uses: 3, Left: 2, Spent: 1, Revoked: 1}))
	f.Add(mustEncode(f, &memberRecord{Grant: grant, Ticket: make([]byte, 32), Joined: 1, Granted: 1, Removed: 2, Issued: []issuedRecord{{make([]byte, 16), 9}}, Change: make([]byte, 32)}))
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		if r, err := decodeTicketRecord(b); err == nil && !bytes.Equal(mustEncode(t, r), b) {
			t.Errorf("ticket: %x is not what it decodes to", b)
		}
		if r, err := decodeMemberRecord(b); err == nil && !bytes.Equal(mustEncode(t, r), b) {
			t.Errorf("member: %x is not what it decodes to", b)
		}
	})
}

func TestRecordsKeepTheTypesOfAttributes(t *testing.T) {
	attrs := identity.Attributes{"s": "x", "i": int64(-5), "b": false, "l": []string{"a", "b"}, "empty": []string{}}
	r, err := decodeTicketRecord(mustEncode(t, &ticketRecord{Grant: grantRecord{Attributes: attrs}}))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(r.Grant.Attributes, attrs) {
		t.Errorf("%#v became %#v", attrs, r.Grant.Attributes)
	}
}

func TestDecodersOfLyingInputAllocateLittle(t *testing.T) {
	attributes := identity.Attributes{"role": "db", "teams": []string{"a", "b"}, "level": int64(-3), "on": true, "none": []string{}}
	grant := grantRecord{Name: "db1", Attributes: attributes, Serve: []string{"orders/*"}, Relay: true}
	for _, d := range []struct {
		name    string
		decode  func([]byte)
		genuine [][]byte
	}{
		{"question", func(b []byte) {
			if b, err := readAll(bytes.NewReader(b), maxQuestion); err == nil {
				decodeQuestion(nameEnroll, b)
				decodeQuestion(nameRenew, b)
			}
		}, [][]byte{mustEncode(t, &question{Now: 1, Secret: make([]byte, 32), Proof: make([]byte, 64)}), mustEncode(t, &question{Now: 1_795_000_000_000})}},
		{"answer", func(b []byte) {
			if b, err := readAll(bytes.NewReader(b), maxAnswer); err == nil {
				decodeAnswer(b)
			}
		}, [][]byte{mustEncode(t, &answer{Now: 1, Credential: []byte{1}, History: []byte{2}, Repeat: true}), mustEncode(t, &answer{Code: codeRemoved, Now: 1, When: 1})}},
		{"stored ticket", func(b []byte) { decodeTicketRecord(b) }, [][]byte{mustEncode(t, &ticketRecord{Grant: grant, Created: 1, Expires: 2, Uses: 3, Left: 2, Spent: 1, Revoked: 1})}},
		{"stored member", func(b []byte) { decodeMemberRecord(b) }, [][]byte{mustEncode(t, &memberRecord{Grant: grant, Ticket: make([]byte, 32), Joined: 1, Granted: 1, Removed: 2, Issued: []issuedRecord{{make([]byte, 16), 9}}, Change: make([]byte, 32)})}},
	} {
		t.Run(d.name, func(t *testing.T) { alloc.Hostile(t, d.decode, d.genuine...) })
	}
}
