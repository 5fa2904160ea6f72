package channel

import (
	"bytes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/memnet"
)

func TestRecordIsItsLengthAndSealedPlaintext(t *testing.T) {
	for name, suite := range suites {
		t.Run(name, func(t *testing.T) {
			out, in := twoRecords(t, suite)
			for _, n := range []int{1, 2, 100, buffer.Plain} {
				rec := make([]byte, n+buffer.Around)
				for i := range n {
					rec[buffer.Prefix+i] = byte(i)
				}
				plain := bytes.Clone(rec[buffer.Prefix : buffer.Prefix+n])
				check(t, out.seal(rec))
				size, err := length(rec)
				if err != nil || size != len(rec) || bytes.Contains(rec, plain) && n > 2 {
					t.Fatalf("%d bytes: length %d (%v), sealed %v", n, size, err, !bytes.Contains(rec, plain))
				}
				got, err := in.open(rec)
				if err != nil || !bytes.Equal(got, plain) {
					t.Fatalf("%d bytes do not come back: %v", n, err)
				}
			}
			for _, n := range []int{0, buffer.Plain + 1} {
				if err := out.seal(make([]byte, n+buffer.Around)); err != errLength {
					t.Errorf("a record of %d bytes: %v", n, err)
				}
			}
		})
	}
	if _, err := newRecords(9, [32]byte{}); err == nil {
		t.Error("there is a suite 9")
	}
}

func twoRecords(t testing.TB, s Suite) (out, in *records) {
	t.Helper()
	return must(newRecords(s, [32]byte{7}))(t), must(newRecords(s, [32]byte{7}))(t)
}

func TestRecordThatDoesNotVerifyEndsTheDirection(t *testing.T) {
	for name, suite := range suites {
		t.Run(name, func(t *testing.T) {
			out, _ := twoRecords(t, suite)
			rec := append([]byte{0, 0}, append([]byte("some plaintext"), make([]byte, 16)...)...)
			check(t, out.seal(rec))
			next := bytes.Clone(rec)
			check(t, out.seal(next))
			for i := range rec {
				for _, genuine := range [][]byte{rec, next} {
					_, in := twoRecords(t, suite)
					bad := bytes.Clone(rec)
					bad[i] ^= 0x40
					if plain, err := in.open(bad); err != errRecord || plain != nil {
						t.Errorf("byte %d: %q, %v", i, plain, err)
					}
					if _, err := in.open(bytes.Clone(genuine)); err != errRecord {
						t.Errorf("byte %d: a genuine record opens afterwards: %v", i, err)
					}
				}
			}
		})
	}
}

func TestLengthOfARecordIsBounded(t *testing.T) {
	for n := range 1 << 16 {
		size, err := length(binary.BigEndian.AppendUint16(nil, uint16(n)))
		if n <= buffer.Suffix && err != errLength || n > buffer.Suffix && (err != nil || size != n+buffer.Prefix) {
			t.Fatalf("length %d: %d, %v", n, size, err)
		}
	}
}

func TestRecordLayerAllocatesNothing(t *testing.T) {
	for name, suite := range suites {
		t.Run(name, func(t *testing.T) {
			out, in := twoRecords(t, suite)
			rec := make([]byte, 16<<10)
			if n := testing.AllocsPerRun(200, func() {
				if out.seal(rec) != nil {
					t.Fatal("sealing failed")
				}
				if _, err := in.open(rec); err != nil {
					t.Fatal(err)
				}
			}); n != 0 {
				t.Errorf("%v allocations a record", n)
			}
		})
	}
}

// What may happen to records on the way. i is the number of a record since the
// channel was confirmed, rec its bytes; what is returned arrives in its place.
var tampering = map[string]func(tap *tap, i int, rec []byte) []byte{
	"a bit of the length":   func(_ *tap, i int, rec []byte) []byte { rec[1] ^= 1; return rec },
	"a high bit of length":  func(_ *tap, i int, rec []byte) []byte { rec[0] ^= 0x80; return rec },
	"the first byte":        func(_ *tap, i int, rec []byte) []byte { rec[2] ^= 0x80; return rec },
	"a byte in the middle":  func(_ *tap, i int, rec []byte) []byte { rec[len(rec)/2] ^= 4; return rec },
	"the tag":               func(_ *tap, i int, rec []byte) []byte { rec[len(rec)-1] ^= 1; return rec },
	"dropped":               func(_ *tap, i int, rec []byte) []byte { return nil },
	"repeated":              func(_ *tap, i int, rec []byte) []byte { return append(bytes.Clone(rec), rec...) },
	"cut short":             func(_ *tap, i int, rec []byte) []byte { return rec[:len(rec)-9] }, // of the tag
	"a byte more":           func(_ *tap, i int, rec []byte) []byte { return append(bytes.Clone(rec), 0) },
	"something in front":    func(_ *tap, i int, rec []byte) []byte { return append([]byte{0, 17, 1}, rec...) },
	"zeros":                 func(_ *tap, i int, rec []byte) []byte { return make([]byte, len(rec)) },
	"the first one again":   func(p *tap, i int, rec []byte) []byte { return bytes.Clone(p.all[0]) },
	"of the other end":      func(p *tap, i int, rec []byte) []byte { return bytes.Clone(p.other.all[i]) },
	"of another channel":    func(p *tap, i int, rec []byte) []byte { return bytes.Clone(p.foreign) },
	"swapped with the next": func(p *tap, i int, rec []byte) []byte { p.held = bytes.Clone(rec); return nil },
}

// tap is in the middle of one direction of a lane and sees one record a write.
type tap struct {
	all     [][]byte
	at      int
	act     func(tap *tap, i int, rec []byte) []byte
	held    []byte
	other   *tap
	foreign []byte
}

func (p *tap) write(_ int64, rec []byte) []byte {
	i := len(p.all)
	p.all = append(p.all, bytes.Clone(rec))
	if p.act != nil && i == p.at {
		return p.act(p, i, rec)
	}
	if p.held != nil {
		rec, p.held = append(rec, p.held...), nil
	}
	return rec
}

func TestTamperingGivesAPrefixAndAnError(t *testing.T) {
	body := func(i int) []byte { return bytes.Repeat([]byte{byte(i + 1)}, 100+i) }
	const sent = 6
	for name, act := range tampering {
		for _, initiator := range []bool{true, false} {
			for _, at := range []int{0, 1, 4} {
				if at == 0 && name == "the first one again" {
					continue // that is what it is
				}
				t.Run(fmt.Sprintf("%s, initiator %v, record %d", name, initiator, at), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						foreign := &tap{}
						if strings.Contains(name, "channel") {
							a, _, x, _ := open(t, memnet.Link{})
							x.OnWrite(foreign.write)
							check(t, a.send(new(buffer.Queue), body(at)))
							a.end.Close()
						} else {
							foreign.all = [][]byte{nil}
						}
						a, b, x, y := open(t, memnet.Link{})
						if !initiator {
							a, b, x, y = b, a, y, x
						}
						back := &tap{}
						y.OnWrite(back.write)
						forth := &tap{at: at, act: act, other: back, foreign: foreign.all[0]}
						x.OnWrite(forth.write)
						for i := range sent {
							check(t, b.send(new(buffer.Queue), body(i)))
						}
						for i := range sent {
							// After the error the sender is told at some time.
							if a.send(new(buffer.Queue), body(i)) != nil {
								break
							}
							synctest.Wait()
						}
						a.end.Close()
						x.Close()
						err := <-b.ran
						if err == nil || errors.Is(err, ErrClosed) {
							t.Errorf("a clean end: %v", err)
						}
						if errA := <-a.ran; errA == nil {
							t.Error("the sender's reader ended without an error")
						}
						got, want := b.got.all(), at
						if name == "repeated" || name == "a byte more" {
							want++ // the genuine record came first
						}
						if len(got) != want {
							t.Errorf("%d frames arrived, want %d", len(got), want)
						}
						for i, g := range got {
							if !bytes.Equal(g, body(i)) {
								t.Errorf("frame %d is wrong", i)
							}
						}
					})
				})
			}
		}
	}
}

func TestReflectedRecordsAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, x, y := open(t, memnet.Link{})
		x.OnWrite(func(_ int64, rec []byte) []byte {
			go y.Write(rec) // back to where it came from
			return nil
		})
		check(t, a.send(new(buffer.Queue), []byte("me")))
		if err := <-a.ran; err != errRecord {
			t.Errorf("the end that hears itself: %v", err)
		}
		if len(a.got.all()) != 0 {
			t.Error("its own frame reached it")
		}
		<-b.ran
	})
}

// A recorder keeps (key, nonce) of every record that is sealed, in all channels that it watches, and
// reports a pair that comes twice.
type recorder struct {
	t    testing.TB
	mu   sync.Mutex
	seen map[[2]string]bool
	keys map[string]bool
}

// watch has a direction's sealing recorded from now on. A key is named by what it makes of nothing
// under a nonce that no record has: two AEADs of one key have one name.
func (r *recorder) watch(out *records) {
	name := string(out.aead.Seal(nil, bytes.Repeat([]byte{0xff}, out.aead.NonceSize()), nil, nil))
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.keys[name] {
		r.t.Error("two directions have one key")
	}
	r.keys[name] = true
	out.aead = &recorded{out.aead, r, name}
}

type recorded struct {
	cipher.AEAD
	by  *recorder
	key string
}

func (a *recorded) Seal(dst, nonce, plain, ad []byte) []byte {
	a.by.mu.Lock()
	pair := [2]string{a.key, string(nonce)}
	if a.by.seen[pair] {
		a.by.t.Errorf("nonce %x comes twice under one key", nonce)
	}
	a.by.seen[pair] = true
	a.by.mu.Unlock()
	return a.AEAD.Seal(dst, nonce, plain, ad)
}

// Every channel of the same two ends has keys of its own, one for each direction, and under each a nonce
// comes once, however many send at a time.
func TestNoNonceComesTwice(t *testing.T) {
	const channels, senders, each = 4, 8, 50
	synctest.Test(t, func(t *testing.T) {
		r := &recorder{t: t, seen: make(map[[2]string]bool), keys: make(map[string]bool)}
		a, b := newSides(t)
		sealed := uint64(0)
		for _, suite := range suites {
			a.config.Suite = suite
			for range channels {
				x, y := memnet.Pipe(memnet.Link{})
				errA, errB := meet(a, b, x, y)
				check(t, errors.Join(errA, errB))
				for _, s := range []*side{a, b} {
					r.watch(s.end.records)
					sealed -= s.end.records.count // the confirmation was sealed before
					s.got = new(frames)
					s.run()
				}
				var all sync.WaitGroup
				for _, s := range []*side{a, b} {
					for range senders {
						all.Go(func() {
							q := new(buffer.Queue)
							for i := range each {
								if err := s.send(q, make([]byte, 1+i*61%3000)); err != nil {
									t.Error(err)
									return
								}
								s.end.Ping()
							}
						})
					}
				}
				all.Wait()
				a.end.Close()
				<-a.ran
				<-b.ran
				for _, s := range []*side{a, b} {
					if n := len(s.got.all()); n != senders*each {
						t.Errorf("%d frames arrived", n)
					}
					sealed += s.end.records.count
				}
			}
		}
		if n := uint64(len(r.seen)); n != sealed || n < 1000 { // several frames go into a record
			t.Errorf("%d nonces for %d records", n, sealed)
		}
		if n := 2 * len(suites) * channels; len(r.keys) != n {
			t.Errorf("%d keys, want %d", len(r.keys), n)
		}
	})
}

// A key's limits hold for what it seals and for what it opens alike.
func TestLimitsOfAKey(t *testing.T) {
	for name, tt := range map[string]struct {
		set  func(*records)
		aged bool // before the first record
		ok   int  // records of 100 bytes (and a header) before the limit
	}{
		"soft, records": {func(r *records) { r.count = softRecords - 2 }, false, -1},
		"soft, bytes":   {func(r *records) { r.bytes = softBytes - 150 }, false, -1},
		"hard, records": {func(r *records) { r.count = hardRecords - 3 }, true, 3},
		"hard, bytes":   {func(r *records) { r.bytes = hardBytes - 3*107 - 50 }, true, 3},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := newSides(t)
				x, y := memnet.Pipe(memnet.Link{})
				errA, errB := meet(a, b, x, y)
				check(t, errors.Join(errA, errB))
				tt.set(a.end.records)
				tt.set(b.end.in)
				a.run()
				b.run()
				if a.end.Aged() || b.end.Aged() {
					t.Error("aged before anything was sent")
				}
				sent := 0
				for range 10 {
					if a.send(new(buffer.Queue), make([]byte, 100)) != nil {
						break
					}
					synctest.Wait()
					if sent++; sent == 2 && !(a.end.Aged() && b.end.Aged()) {
						t.Errorf("after the soft limit: aged %v and %v", a.end.Aged(), b.end.Aged())
					}
				}
				if tt.ok < 0 {
					if sent != 10 || len(b.got.all()) != 10 {
						t.Errorf("the soft limit stops the channel after %d records", sent)
					}
					a.end.Close()
					return
				}
				if got := len(b.got.all()); got != tt.ok {
					t.Errorf("%d records arrived, want %d", got, tt.ok)
				}
				if err := <-a.ran; err != errSpent {
					t.Errorf("the sender: %v", err)
				}
				if err := <-b.ran; !errors.Is(err, ErrCut) {
					t.Errorf("the receiver: %v", err)
				}
			})
		})
	}
	for name, set := range map[string]func(*records){
		"records": func(r *records) { r.count = hardRecords },
		"bytes":   func(r *records) { r.bytes = hardBytes },
	} {
		_, in := twoRecords(t, AESGCM)
		set(in)
		if _, err := in.open(make([]byte, 30)); err != errSpent {
			t.Errorf("%s: what comes behind the hard limit: %v", name, err)
		}
	}
}
