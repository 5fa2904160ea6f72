package identity

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"time"
)

func newTicket(t testing.TB, ways int) *Ticket {
	t.Helper()
	ticket := &Ticket{Authority: newSelf(t).ID(), Secret: NewSecret(), Expires: noon.Add(10 * time.Minute)}
	for i := range ways {
		w := Way{Addr: fmt.Sprintf("relay-%d.example.com:4000", i)}
		if i%2 == 0 {
			w.ID = newSelf(t).ID()
		}
		ticket.Ways = append(ticket.Ways, w)
	}
	return ticket
}

func ticketText(t testing.TB, ticket *Ticket) string {
	t.Helper()
	s, err := ticket.Text()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestTicketRoundTrip(t *testing.T) {
	for ways := 1; ways <= MaxWays; ways++ {
		ticket := newTicket(t, ways)
		text := ticketText(t, ticket)
		if len(text) > maxTicketText || strings.ContainsAny(text, " \n") || strings.ToLower(text) != text {
			t.Errorf("%d ways: %d characters: %s", ways, len(text), text)
		}
		for _, s := range []string{text, text + "\n", "  \t" + text + "\r\n"} {
			got, err := ParseTicket(s)
			if err != nil || !reflect.DeepEqual(got, ticket) {
				t.Fatalf("%d ways: %v, %v", ways, got, err)
			}
		}
	}
}

func TestTicketThatNobodyCouldUseIsNotWritten(t *testing.T) {
	for name, edit := range map[string]func(*Ticket){
		"no authority":  func(k *Ticket) { k.Authority = ID{} },
		"no secret":     func(k *Ticket) { k.Secret = Secret{} },
		"no way":        func(k *Ticket) { k.Ways = nil },
		"no expiry":     func(k *Ticket) { k.Expires = time.Time{} },
		"nine ways":     func(k *Ticket) { k.Ways = make([]Way, 9) },
		"bad address":   func(k *Ticket) { k.Ways[0].Addr = "relay" },
		"long address":  func(k *Ticket) { k.Ways[0].Addr = strings.Repeat("a", 254) + ":65535" },
		"above a KiB":   func(k *Ticket) { k.Ways = []Way{longWay('a'), longWay('b'), longWay('c')} },
		"after 9999":    func(k *Ticket) { k.Expires = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) },
		"two addresses": func(k *Ticket) { k.Ways[0].Addr = "a:1\nb:2" },
	} {
		ticket := newTicket(t, 2)
		edit(ticket)
		if s, err := ticket.Text(); err == nil {
			t.Errorf("%s: %s", name, s)
		}
	}
}

func longWay(c byte) Way {
	return Way{ID: ID{1}, Addr: strings.Repeat(string(c), 200) + ":1"}
}

func TestTicketCutShortIsToldFromOneAltered(t *testing.T) {
	text := ticketText(t, newTicket(t, 2))
	for n := len(ticketPrefix); n < len(text); n++ {
		if _, err := ParseTicket(text[:n]); !errors.Is(err, ErrTicketCut) {
			t.Fatalf("cut to %d of %d: %v", n, len(text), err)
		}
	}
	// Behind version and length, which say themselves how long it should be.
	for i := len(ticketPrefix) + 5; i < len(text); i++ {
		for _, c := range "a7" {
			if byte(c) == text[i] {
				continue
			}
			altered := text[:i] + string(c) + text[i+1:]
			if _, err := ParseTicket(altered); !errors.Is(err, ErrTicketAltered) {
				t.Fatalf("character %d is %c: %v", i, c, err)
			}
		}
	}
	for i := len(ticketPrefix); i < len(ticketPrefix)+5; i++ {
		altered := []byte(text)
		altered[i] ^= 1
		_, err := ParseTicket(string(altered))
		if !errors.Is(err, ErrTicketAltered) && !errors.Is(err, ErrTicketCut) {
			t.Errorf("character %d: %v", i, err)
		}
	}
	middle := len(text) / 2
	for name, s := range map[string]string{
		"character missing":  text[:middle] + text[middle+1:], // says itself that it is short
		"characters swapped": text[:middle] + swap(text[middle:]),
		"a character more":   text + "a",
		"upper case":         ticketPrefix + strings.ToUpper(text[len(ticketPrefix):]),
		"another alphabet":   text[:middle] + "1" + text[middle+1:],
		"two lines":          text[:middle] + "\n" + text[middle:],
		"blank inside":       text[:middle] + " " + text[middle:],
		"NUL inside":         text[:middle] + "\x00" + text[middle+1:],
		"two tickets":        text + "\n" + text,
		"not UTF-8":          text[:middle] + "\xff\xfe" + text[middle+2:],
	} {
		want := ErrTicketAltered
		if name == "character missing" {
			want = ErrTicketCut
		}
		if _, err := ParseTicket(s); !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// swap exchanges the first two characters that differ.
func swap(s string) string {
	b := []byte(s)
	for i := 1; i < len(b); i++ {
		if b[i] != b[i-1] {
			b[i], b[i-1] = b[i-1], b[i]
			break
		}
	}
	return string(b)
}

// handmade writes bytes as a ticket with a right checksum.
func handmade(b []byte) string {
	sum := sha256.Sum256(b)
	return ticketPrefix + ticketEncoding.EncodeToString(append(b, sum[:ticketChecksum]...))
}

func TestTicketOfANewerVersionIsToldSo(t *testing.T) {
	text := ticketText(t, newTicket(t, 1))
	body := []byte{2, 0, 3, 'n', 'e', 'w'}
	for name, s := range map[string]string{
		"version byte": handmade(body),
		"prefix":       "portal2" + text[len(ticketPrefix):],
		"short prefix": "portal9abc",
	} {
		if _, err := ParseTicket(s); !errors.Is(err, ErrTicketVersion) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTicketWithARightChecksumAndAWrongBodyIsRefused(t *testing.T) {
	good := ticketBody{Authority: make([]byte, 32), Secret: bytes.Repeat([]byte{1}, 32), Expires: 1, Ways: []wireWay{{Addr: "a:1"}}}
	good.Authority[0] = 1
	frame := func(body []byte) []byte {
		return append([]byte{ticketVersion, byte(len(body) >> 8), byte(len(body))}, body...)
	}
	if _, err := ParseTicket(handmade(frame(encode(&good)))); err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(*ticketBody){
		"short authority": func(b *ticketBody) { b.Authority = b.Authority[:31] },
		"no authority":    func(b *ticketBody) { b.Authority = make([]byte, 32) },
		"long secret":     func(b *ticketBody) { b.Secret = make([]byte, 33) },
		"no secret":       func(b *ticketBody) { b.Secret = make([]byte, 32) },
		"negative expiry": func(b *ticketBody) { b.Expires = -1 },
		"no way":          func(b *ticketBody) { b.Ways = nil },
		"nine ways":       func(b *ticketBody) { b.Ways = make([]wireWay, 9) },
		"short pin":       func(b *ticketBody) { b.Ways = []wireWay{{ID: []byte{1}, Addr: "a:1"}} },
		"zero pin":        func(b *ticketBody) { b.Ways = []wireWay{{ID: make([]byte, 32), Addr: "a:1"}} },
		"escape sequence": func(b *ticketBody) { b.Ways = []wireWay{{Addr: "\x1b[2J:1"}} },
		"port 0":          func(b *ticketBody) { b.Ways = []wireWay{{Addr: "a:0"}} },
	} {
		b := good
		edit(&b)
		if k, err := ParseTicket(handmade(frame(encode(&b)))); !errors.Is(err, ErrTicketAltered) {
			t.Errorf("%s: %v, %v", name, k, err)
		}
	}
	for name, b := range map[string][]byte{
		"version 0":     append([]byte{0}, frame(encode(&good))[1:]...),
		"wrong length":  append([]byte{1, 0, 1}, encode(&good)...),
		"trailing byte": frame(append(encode(&good), 0)),
		"no body":       frame(nil),
	} {
		if k, err := ParseTicket(handmade(b)); !errors.Is(err, ErrTicketAltered) {
			t.Errorf("%s: %v, %v", name, k, err)
		}
	}
}

func TestWhatIsNoTicketIsNamed(t *testing.T) {
	home := openHome(t, t.TempDir())
	if _, err := home.Self(); err != nil {
		t.Fatal(err)
	}
	key := string(readFile(t, home.path(keyName)))
	for s, want := range map[string]string{
		"":                           "it is empty",
		" \n":                        "it is empty",
		"/run/secrets/portal-ticket": "name of a file",
		"ticket.txt":                 "name of a file",
		"portal1.txt":                "name of a file",
		"~/portal1":                  "name of a file",
		key:                          "private key",
		"-----BEGIN OPENSSH PRIVATE KEY-----\nb3Blbn": "private key",
		newSelf(t).ID().String():                      "an identifier",
		"hello":                                       `begins with "portal1"`,
		"portal":                                      `begins with "portal1"`,
		"portal enroll":                               `begins with "portal1"`,
		strings.Repeat("a", 1<<20):                    "more than 1024 characters",
		"portal1" + strings.Repeat("a", 1<<20):        "more than 1024 characters",
	} {
		_, err := ParseTicket(s)
		if !errors.Is(err, ErrNotTicket) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v", s, err)
		}
	}
}

func TestErrorsNeverRepeatTheTicket(t *testing.T) {
	text := ticketText(t, newTicket(t, 1))
	for _, s := range []string{text[:len(text)-9], text + "aaaa", "x" + text, text + "!", strings.ToUpper(text), text + " " + text} {
		_, err := ParseTicket(s)
		if err == nil {
			t.Fatalf("accepted %q", s)
		}
		for i := 0; i+12 < len(s); i++ {
			if strings.Contains(err.Error(), s[i:i+12]) {
				t.Errorf("%v repeats part of %s", err, s)
				break
			}
		}
	}
}

func TestHashOfATicketIsThatOfItsSecret(t *testing.T) {
	ticket := newTicket(t, 2)
	bare := &Ticket{Authority: ticket.Authority, Secret: ticket.Secret}
	if ticket.Hash() != bare.Hash() {
		t.Error("ways or expiry count")
	}
	bare.Secret[31] ^= 1
	if ticket.Hash() == bare.Hash() {
		t.Error("the secret does not count")
	}
	bare.Secret, bare.Authority = ticket.Secret, ID{1}
	if ticket.Hash() == bare.Hash() {
		t.Error("the authority does not count")
	}
}

func TestWaysAreReadAsTheyAreWritten(t *testing.T) {
	id := newSelf(t).ID()
	for s, want := range map[string]Way{
		"relay.example.com:4000":       {Addr: "relay.example.com:4000"},
		id.String() + "@[::1]:1":       {ID: id, Addr: "[::1]:1"},
		id.String() + "@10.0.0.1:4000": {ID: id, Addr: "10.0.0.1:4000"},
	} {
		got, err := ParseWay(s)
		if err != nil || got != want || got.String() != s {
			t.Errorf("ParseWay(%q) = %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "relay", ":4000", "relay:", "relay:0", "relay:65536", "relay:http", "P@relay:1", "@relay:1",
		id.String() + "@", id.String() + "@a@b:1", "a b:1", "a:1\n", "a:+1", "a:-1", "a:1:2", strings.Repeat("a", 300) + ":1"} {
		if w, err := ParseWay(s); err == nil {
			t.Errorf("ParseWay(%q) = %v", s, w)
		}
	}
}

// TestSecretsShowThemselvesNowhere looks for each secret, in each writing that
// fmt and the encoders have, in everything that may be printed.
func TestSecretsShowThemselvesNowhere(t *testing.T) {
	ticket := newTicket(t, 1)
	home := openHome(t, t.TempDir())
	self, err := home.Self()
	if err != nil {
		t.Fatal(err)
	}
	static, _, err := self.Static(noon)
	if err != nil {
		t.Fatal(err)
	}
	authority, err := home.Authority(true)
	if err != nil {
		t.Fatal(err)
	}
	peer := peerOf(t, self, noon)

	var secrets []string
	for _, b := range [][]byte{ticket.Secret[:], self.state.Load().key.Seed(), authority.state.Load().key.Seed(), static.Bytes()} {
		for _, part := range [][]byte{b[:8], b[12:20], b[24:]} {
			list := strings.Trim(fmt.Sprint(part), "[]")
			secrets = append(secrets, string(part), fmt.Sprintf("%x", part), fmt.Sprintf("%X", part), list,
				strings.ReplaceAll(list, " ", ","), strings.Trim(strings.TrimPrefix(fmt.Sprintf("%#v", part), "[]byte"), "{}"),
				ticketEncoding.EncodeToString(part[:5]))
		}
	}
	type holder struct {
		Secret Secret
		Ticket *Ticket
		Value  Ticket
		Self   *Self
		Peer   *Peer
		Home   *Home
		inside *Self
	}
	values := []any{ticket.Secret, &ticket.Secret, *ticket, ticket, self, authority, peer, home,
		holder{ticket.Secret, ticket, *ticket, self, peer, home, self}, []any{self, ticket}, map[string]any{"s": ticket.Secret}}
	var shown bytes.Buffer
	for _, v := range values {
		// fmt asks no method of anything inside a value whose verb is wrong, and
		// never for %p: those are left to vet, which refuses both.
		verbs := []string{"%v", "%+v", "%#v"}
		switch v.(type) {
		case Secret, *Secret, Ticket, *Ticket, *Self, *Peer, *Home:
			verbs = append(verbs, "%s", "%q", "%x", "%X", "%d", "%o", "%t")
		}
		for _, verb := range verbs {
			fmt.Fprintf(&shown, verb+"\n", v)
		}
		for _, h := range []slog.Handler{slog.NewTextHandler(&shown, nil), slog.NewJSONHandler(&shown, nil)} {
			slog.New(h).Info("shown", "value", v)
		}
		b, err := json.Marshal(v)
		if err != nil {
			t.Errorf("%T: %v", v, err)
		}
		shown.Write(b)
	}
	for _, s := range secrets {
		if i := strings.Index(shown.String(), s); i >= 0 {
			t.Errorf("a secret is shown: …%.80q…", shown.String()[max(0, i-40):])
		}
	}
	for _, want := range []string{redacted, self.ID().String(), ticket.Authority.String()} {
		if !strings.Contains(shown.String(), want) {
			t.Errorf("%s is not shown", want)
		}
	}
}
