package channel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/alloc"
)

func FuzzParsePreface(f *testing.F) {
	for _, p := range []Preface{
		{Kind: Relay, Suite: AESGCM}, {Kind: Service, Suite: ChaChaPoly}, {Kind: Authority, Suite: AESGCM},
		{Kind: KindLane, ID: [16]byte{1}}, {Kind: Carrier}, HopPreface(1), HopPreface(MaxHops + 1), {Kind: 3, Suite: 3}, {Kind: Service, Suite: AESGCM, ID: [16]byte{15: 1}},
	} {
		f.Add(p.Append(nil))
	}
	f.Add([]byte("prtl\x02"))
	f.Add([]byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		r := bytes.NewReader(b)
		p, err := ReadPreface(r)
		if len(b) < PrefaceSize {
			if err == nil {
				t.Fatalf("%d bytes are a preface", len(b))
			}
			return
		}
		if r.Len() != len(b)-PrefaceSize {
			t.Fatalf("%d bytes were read", len(b)-r.Len())
		}
		if err != nil {
			if !errors.Is(err, ErrPreface) || p != (Preface{}) {
				t.Fatalf("%v with %v", p, err)
			}
			return
		}
		// There is one way to write a preface.
		if back := p.Append(nil); !bytes.Equal(back, b[:PrefaceSize]) {
			t.Fatalf("%x is read as %v and written as %x", b[:PrefaceSize], p, back)
		}
		_ = p.Kind.String()
	})
}

func FuzzDecodeProof(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte{0, 2, 1, 2, 0, 1, 3})
	f.Add([]byte{0xff, 0xff, 0, 0})
	f.Add(make([]byte, maxProof+1))
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		history, attestation, err := decodeProof(b)
		if err != nil {
			if err != ErrHandshake || history != nil || attestation != nil {
				t.Fatalf("%x, %x, %v", history, attestation, err)
			}
			return
		}
		back, err := encodeProof(history, attestation)
		if err != nil || !bytes.Equal(back, b) {
			t.Fatalf("%x is written as %x (%v)", b, back, err)
		}
	})
}

func FuzzParseClose(f *testing.F) {
	f.Add([]byte{0})
	f.Add(append([]byte{1}, "its credential expired"...))
	f.Add([]byte("\x02\x1b]0;title\a\xff\xfe\u202e\u2028"))
	f.Add(make([]byte, 2+maxReason))
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		c, err := parseClose(b)
		if err != nil {
			if len(b) >= 1 && len(b) <= 1+maxReason {
				t.Fatal(err)
			}
			return
		}
		if c.Error() == "" || byte(c.Code) != b[0] || !utf8.ValidString(c.Reason) {
			t.Fatalf("%q", c.Error())
		}
		for _, r := range c.Reason {
			if !unicode.IsPrint(r) {
				t.Fatalf("%q is printed", c.Reason)
			}
		}
		frame := appendClose(nil, c.Code, c.Reason)
		kind, stream, body, rest, err := cutFrame(frame)
		if kind != kindClose || stream != 0 || len(rest) != 0 || err != nil {
			t.Fatalf("the frame of a close is %x", frame)
		}
		if _, err := parseClose(body); err != nil {
			t.Fatal(err)
		}
	})
}

// checking is a Handler that compares what it is given with what a simple
// reading of the same plaintext says.
type checking struct {
	t    *testing.T
	want [][]byte // header and body
}

func (c *checking) Frame(kind uint8, stream uint32, body []byte) error {
	got := append(AppendHeader(nil, kind, stream, len(body)), body...)
	if len(c.want) == 0 || !bytes.Equal(got, c.want[0]) {
		c.t.Fatalf("the handler is given %x", got)
	}
	c.want = c.want[1:]
	return nil
}

func (*checking) Flush() error { return nil }

func FuzzFrames(f *testing.F) {
	frame := func(kind uint8, stream uint32, body string) []byte {
		return append(AppendHeader(nil, kind, stream, len(body)), body...)
	}
	f.Add(frame(0x13, 1, "data"))
	f.Add(slices.Concat(frame(0x10, 3, "open"), frame(kindPing, 0, "12345678"), frame(0x06, 0, "")))
	f.Add(slices.Concat(frame(kindPong, 0, "\x00\x00\x00\x00\x00\x00\x00\x00"), frame(kindClose, 0, "\x00"), frame(0x13, 1, "behind")))
	f.Add(frame(kindClose, 0, "\x01refused"))
	f.Add(frame(kindCredential, 0, "\x00\x02xy\x00\x00"))
	f.Add(frame(kindConfirm, 0, "\x00\x00\x00\x00"))
	f.Add([]byte{0x13, 0, 0, 0, 1, 0xff, 0xff, 1})
	authority, self := mustSelf(), mustSelf()
	now := time.Now()
	key, attestation, err := self.Static(now)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, plain []byte) {
		defer alloc.Bound(t, len(plain))()
		peer, err := identity.VerifyProof(self.History(), attestation, key.PublicKey().Bytes(), now)
		if err != nil {
			t.Fatal(err)
		}
		e := &End{
			peer: peer, begin: now, done: make(chan struct{}),
			config: &Config{Trust: identity.NewTrust(authority.ID()), Logger: slog.New(slog.DiscardHandler)},
		}
		e.sealer.err = ErrClosed // answers go nowhere
		h := &checking{t: t}
		// What a simple reading says: frames up to the first that is malformed or
		// a close.
		var wantErr, wantEnd bool
		for rest := plain; len(rest) > 0 && !wantErr && !wantEnd; {
			if len(rest) < 7 || len(rest)-7 < int(binary.BigEndian.Uint16(rest[5:])) {
				wantErr = true
				break
			}
			n := 7 + int(binary.BigEndian.Uint16(rest[5:]))
			one := rest[:n]
			rest = rest[n:]
			switch {
			case binary.BigEndian.Uint32(one[1:]) != 0 || one[0] >= 0x10 || one[0] == 0x06:
				h.want = append(h.want, one)
			case one[0] == kindPing || one[0] == kindPong:
				wantErr = n != 15
			case one[0] == kindClose:
				wantErr = n < 8 || n > 8+maxReason || one[7] != 0
				wantEnd = !wantErr
			case one[0] == kindCredential:
				_, _, err := decodeTwo(one[7:])
				wantErr = err != nil
			default:
				wantErr = true
			}
		}
		ended, err := e.frames(plain, h)
		if err == errSpurned {
			return // more credentials than may fail; what came before was looked at
		}
		if (err != nil) != wantErr || ended != wantEnd || len(h.want) != 0 {
			t.Fatalf("%x: ended %v (want %v), %v (want an error: %v), %d frames not given", plain, ended, wantEnd, err, wantErr, len(h.want))
		}
		if closed := (*Closed)(nil); err != nil && err != errFrame && !errors.As(err, &closed) {
			t.Fatalf("the error is %v", err)
		}
		if peer.Credential() != nil {
			t.Fatal("a credential was accepted")
		}
	})
}

func FuzzLaneReader(f *testing.F) {
	rec := func(n int) []byte { return append(binary.BigEndian.AppendUint16(nil, uint16(n)), make([]byte, n)...) }
	f.Add(rec(17), []byte{})
	f.Add(slices.Concat(rec(300), rec(65535), rec(20)), []byte{1, 0, 200})
	f.Add(slices.Concat(rec(65535), rec(65535), rec(65535), rec(65535), rec(65535), rec(65535), rec(65535)), []byte{255, 255, 155})
	f.Add(slices.Concat(rec(17), rec(16)), []byte{1})
	f.Add(append(rec(100), 0xff, 0xff, 1, 2, 3), []byte{0})
	f.Fuzz(func(t *testing.T, lane, sizes []byte) {
		defer alloc.Bound(t, len(lane)+len(sizes))()
		want, wantErr := split(lane)
		l := newLaneReader(&chunked{bytes: slices.Clone(lane), sizes: sizes, err: io.EOF})
		defer l.release()
		got, err := take(t, l)
		if err != wantErr || !slices.EqualFunc(got, want, bytes.Equal) {
			t.Fatalf("%d records and %v, want %d and %v", len(got), err, len(want), wantErr)
		}
	})
}

// FuzzOpenRecord feeds a record layer anything but what was sealed for it.
func FuzzOpenRecord(f *testing.F) {
	out, err := newRecords(AESGCM, [32]byte{7})
	if err != nil {
		f.Fatal(err)
	}
	genuine := append([]byte{0, 0}, append([]byte("plaintext"), make([]byte, 16)...)...)
	if err := out.seal(genuine); err != nil {
		f.Fatal(err)
	}
	f.Add(genuine)
	f.Add(make([]byte, 19))
	f.Fuzz(func(t *testing.T, rec []byte) {
		defer alloc.Bound(t, len(rec))()
		if len(rec) < 2 {
			return
		}
		if n, err := length(rec); err != nil || n != len(rec) {
			return // the lane reader gives no such record
		}
		same := bytes.Equal(rec, genuine)
		in, err := newRecords(AESGCM, [32]byte{7})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := in.open(rec); (err == nil) != same {
			t.Fatalf("%x: %v", rec, err)
		}
	})
}

// mute is a lane on which the other end says one thing and then nothing.
type mute struct {
	net.Conn
	in *bytes.Reader
}

func (m mute) Read(b []byte) (int, error)    { return m.in.Read(b) }
func (mute) Write(b []byte) (int, error)     { return len(b), nil }
func (mute) SetDeadline(time.Time) error     { return nil }
func (mute) SetReadDeadline(time.Time) error { return nil }
func (mute) Close() error                    { return nil }

// toStrangers is both ends' config towards whoever sends what a fuzzer made up.
func toStrangers() *Config {
	return &Config{Self: mustSelf(), Kind: Relay, Trust: identity.NewTrust(mustSelf().ID()), Proofless: true, Judge: func(*identity.Peer) error { return nil }}
}

// firstBytes are what an initiator sends first, and a responder.
func firstBytes(t testing.TB, c *Config) (initiator, responder []byte) {
	t.Helper()
	p := Preface{Kind: c.Kind, Suite: AESGCM}
	i, err := newHandshake(c.Self, true, p, [32]byte{}, time.Now(), nil)
	if err != nil {
		t.Fatal(err)
	}
	m1, err := i.write1()
	if err != nil {
		t.Fatal(err)
	}
	r, err := newHandshake(c.Self, false, p, [32]byte{}, time.Now(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.read1(m1); err != nil {
		t.Fatal(err)
	}
	m2, err := r.write2()
	if err != nil {
		t.Fatal(err)
	}
	return appendField(p.Append(nil), m1), appendField(nil, m2)
}

// proved is a peer that has proved to be the identity of c, and has shown no credential.
func proved(t testing.TB, c *Config) *identity.Peer {
	t.Helper()
	key, attestation, err := c.Self.Static(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	peer, err := identity.VerifyProof(c.Self.History(), attestation, key.PublicKey().Bytes(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return peer
}

// confirmations are such records: without a credential, with one that does not
// count, a close.
func confirmations() [][]byte {
	frame := func(kind uint8, body []byte) []byte { return append(AppendHeader(nil, kind, 0, len(body)), body...) }
	return [][]byte{
		frame(kindConfirm, make([]byte, 4)),
		frame(kindConfirm, appendField(appendField(nil, []byte{0x84, 0x40, 0xa0, 0x40, 0x40}), mustSelf().History())),
		appendClose(nil, 1, "its credential expired"),
	}
}

// Nobody becomes a member by what is made up, and only a confirmation without a
// credential passes without a word.
func FuzzConfirm(f *testing.F) {
	c := toStrangers()
	for _, b := range confirmations() {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		defer alloc.Bound(t, len(b))()
		peer := proved(t, c)
		unproved, err := (&opening{config: c, peer: peer}).takeConfirm(b)
		if err == nil && unproved == nil && len(b) != frameHeader+4 && !bytes.HasPrefix(b[frameHeader:], []byte{0, 0}) {
			t.Errorf("%x is taken without a word", b)
		}
		if peer.Credential() != nil {
			t.Fatalf("%x is a credential that nobody issued", b)
		}
	})
}

func TestDecodersOfLyingInputAllocateLittle(t *testing.T) {
	c := toStrangers()
	initiator, responder := firstBytes(t, c)
	proof, err := encodeProof(c.Self.History(), make([]byte, 193))
	if err != nil {
		t.Fatal(err)
	}
	frame := append(AppendHeader(nil, 0x13, 1, 4), "data"...)
	record := append([]byte{0, 25 + 9}, make([]byte, 25+9)...)
	discard, peer := &checkless{}, proved(t, c)
	for _, d := range []struct {
		name    string
		decode  func([]byte)
		genuine [][]byte
	}{
		{"preface", func(b []byte) { ReadPreface(bytes.NewReader(b)) }, [][]byte{Preface{Kind: KindLane, ID: [16]byte{1}}.Append(nil)}},
		{"opening, as responder", func(b []byte) {
			if _, err := Respond(t.Context(), mute{in: bytes.NewReader(b)}, c); err == nil {
				t.Errorf("%x opened a channel", b[:min(len(b), 100)])
			}
		}, [][]byte{initiator}},
		{"opening, as initiator", func(b []byte) {
			if _, err := Initiate(t.Context(), mute{in: bytes.NewReader(b)}, c); err == nil {
				t.Errorf("%x opened a channel", b[:min(len(b), 100)])
			}
		}, [][]byte{responder}},
		{"proof", func(b []byte) { decodeProof(b) }, [][]byte{proof}},
		{"confirmation", func(b []byte) { (&opening{config: c, peer: peer}).takeConfirm(b) }, confirmations()},
		{"close", func(b []byte) { parseClose(b) }, [][]byte{append([]byte{1}, "its credential expired"...)}},
		{"frames", func(b []byte) {
			e := &End{peer: peer, begin: time.Now(), done: make(chan struct{}), config: &Config{Trust: c.Trust, Logger: slog.New(slog.DiscardHandler)}}
			e.sealer.err = ErrClosed
			e.frames(b, discard)
		}, [][]byte{frame, append(AppendHeader(nil, kindPing, 0, 8), make([]byte, 8)...)}},
		{"records", func(b []byte) {
			l := newLaneReader(&chunked{bytes: b, err: io.EOF})
			defer l.release()
			for l.fill() == nil {
				for rec, err := l.record(); rec != nil && err == nil; rec, err = l.record() {
				}
			}
		}, [][]byte{record}},
	} {
		t.Run(d.name, func(t *testing.T) { alloc.Hostile(t, d.decode, d.genuine...) })
	}
}

// checkless is a Handler that takes every frame.
type checkless struct{}

func (*checkless) Frame(uint8, uint32, []byte) error { return nil }
func (*checkless) Flush() error                      { return nil }
