package relay_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/outlet"
)

// long says whether the long forms run, as `make long` does.
func long() bool { return os.Getenv("PORTAL_LONG") != "" }

// A hand is what a relay does with the nth record of one direction of a lane. It gives
// what goes on in its place, at once and in front of the next record.
type hand struct {
	record  []byte   // with its length
	earlier [][]byte // of this direction
	other   []byte   // the nth of another channel
	back    net.Conn // to whom it came from
}

// hands are the ways to lay hands on a record. What they return takes its place; later
// is held until the next record has gone by.
var hands = map[string]func(h *hand) (now, later []byte){
	"drops it":                  func(*hand) (_, _ []byte) { return nil, nil },
	"repeats it":                func(h *hand) (_, _ []byte) { return append(h.record, h.record...), nil },
	"has it overtaken":          func(h *hand) (_, _ []byte) { return nil, h.record },
	"flips its first bit":       func(h *hand) (_, _ []byte) { h.record[2] ^= 0x80; return h.record, nil },
	"flips its last bit":        func(h *hand) (_, _ []byte) { h.record[len(h.record)-1] ^= 1; return h.record, nil },
	"flips a bit of its length": func(h *hand) (_, _ []byte) { h.record[1] ^= 1; return h.record, nil },
	"cuts off its last byte":    func(h *hand) (_, _ []byte) { return relength(h.record[:len(h.record)-1]), nil },
	"adds a byte":               func(h *hand) (_, _ []byte) { return relength(append(h.record, 0)), nil },
	"puts one of its own before": func(h *hand) (_, _ []byte) {
		return append(relength(make([]byte, 2+40)), h.record...), nil
	},
	"has an earlier one in its place": func(h *hand) (_, _ []byte) {
		if len(h.earlier) == 0 {
			return nil, nil
		}
		return h.earlier[len(h.earlier)/2], nil
	},
	"gives it back":                        func(h *hand) (_, _ []byte) { h.back.Write(h.record); return nil, nil },
	"gives it back, too":                   func(h *hand) (_, _ []byte) { h.back.Write(h.record); return h.record, nil },
	"has another channel's in its place":   func(h *hand) (_, _ []byte) { return h.other, nil },
	"has nothing behind it, for 40 s":      func(h *hand) (_, _ []byte) { time.Sleep(40 * time.Second); return h.record, nil },
	"ends the lane before it":              func(h *hand) (_, _ []byte) { h.back.Close(); return nil, nil },
	"has its first half and no more of it": func(h *hand) (_, _ []byte) { return h.record[:len(h.record)/2], nil },
}

// relength gives a record the length that it has.
func relength(b []byte) []byte {
	binary.BigEndian.PutUint16(b, uint16(len(b)-2))
	return b
}

// tamperer is a relay that lays hands on the nth record of one direction.
type tamperer struct {
	how  func(*hand) (now, later []byte)
	mine bool // of the caller's direction, else of the outlet's
	n    int  // negative: none

	mu    sync.Mutex
	other [][]byte // records of that direction of an earlier channel
	did   int
}

func (m *tamperer) asked(h *hostile, _ *link.Live, in *stream.Incoming) {
	key := random32()
	caller, far := h.invite(in, key), h.summon(in.Header.Name, 0, key)
	if caller == nil || far == nil {
		h.cut(caller, far)
		return
	}
	var head [24]byte
	if _, err := io.ReadFull(caller, head[:]); err != nil {
		h.cut(caller, far)
		return
	}
	far.Write(head[:])
	// Two messages of the caller's handshake and one of the outlet's come before their
	// records.
	h.all.Go(func() { m.pass(far, caller, m.mine, 2); h.cut(caller, far) })
	h.all.Go(func() { m.pass(caller, far, !m.mine, 1); h.cut(caller, far) })
}

// pass copies messages and records, all of which begin with a length.
func (m *tamperer) pass(to, from net.Conn, hands bool, messages int) {
	var earlier [][]byte
	var later []byte
	for i := -messages; ; i++ {
		b := make([]byte, 2, 4096)
		if _, err := io.ReadFull(from, b); err != nil {
			return
		}
		b = append(b, make([]byte, binary.BigEndian.Uint16(b))...)
		if _, err := io.ReadFull(from, b[2:]); err != nil {
			return
		}
		if hands && i >= 0 {
			kept := bytes.Clone(b)
			switch h := m.turn(i, kept, earlier); {
			case h != nil:
				h.record, h.back = b, from
				b, later = m.how(h)
			case later != nil:
				b, later = append(b, later...), nil
			}
			earlier = append(earlier, kept)
			if len(b) == 0 {
				continue
			}
		}
		if _, err := to.Write(b); err != nil {
			return
		}
	}
}

// turn says what there is to lay hands on record i with, nil when it is to go by.
func (m *tamperer) turn(i int, record []byte, earlier [][]byte) *hand {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.n < 0 {
		m.other = append(m.other, record)
	}
	if i != m.n {
		return nil
	}
	m.did++
	h := &hand{earlier: earlier}
	if i < len(m.other) {
		h.other = m.other[i]
	}
	return h
}

// ledger is what a target has read of each stream.
type ledger struct {
	mu    sync.Mutex
	reads []*bytes.Buffer
}

// target echoes, and writes down what it reads before it answers.
func (l *ledger) target(context.Context, *outlet.Request) (net.Conn, error) {
	near, far := memnet.Pipe(memnet.Link{})
	page := new(bytes.Buffer)
	l.mu.Lock()
	l.reads = append(l.reads, page)
	l.mu.Unlock()
	go func() {
		b := make([]byte, 100)
		for {
			n, err := far.Read(b)
			l.mu.Lock()
			page.Write(b[:n])
			l.mu.Unlock()
			if err == nil {
				_, err = far.Write(b[:n])
			}
			if err == io.EOF {
				far.CloseWrite()
			}
			if err != nil {
				far.Close()
				return
			}
		}
	}()
	return near, nil
}

const rounds = 100

// word is the ith thing that is said.
func word(i int) []byte { return binary.BigEndian.AppendUint64(nil, uint64(i)*0x9e3779b97f4a7c15) }

// talk says one word after another, each when the one before has come back. It gives
// the error that ends it.
func talk(c net.Conn) error {
	c.SetDeadline(time.Now().Add(2 * time.Minute))
	got := make([]byte, 8)
	for i := range rounds {
		if _, err := c.Write(word(i)); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, got); err != nil {
			return err
		}
		if !bytes.Equal(got, word(i)) {
			return fmt.Errorf("%w: word %d came back as %x", errWrong, i, got)
		}
	}
	return nil
}

var errWrong = errors.New("wrong bytes")

// Whatever a relay does with a record of a lane, the ends have an exact prefix, and
// then a reset: never a wrong byte, never an end.
func TestARelayThatTampersWithARecordGivesAPrefixAndAReset(t *testing.T) {
	var touched atomic.Int32
	defer func() { t.Logf("F-02: %d records were tampered with", touched.Load()) }()
	records := 5
	if long() {
		records = 64
	}
	for name, how := range hands {
		for _, mine := range []bool{true, false} {
			side := map[bool]string{true: "caller", false: "outlet"}[mine]
			t.Run(name+", the "+side+"'s", func(t *testing.T) {
				in(t, func(w *town) {
					m := &tamperer{how: how, mine: mine, n: -1}
					h := w.hostileAt(relayAddr, m.asked)
					var l ledger
					w.outlet("a", w.member(serves("a")), l.target, nil)
					s := &scene{hostile: h}
					bot := s.agentAt("a", identity.ID{})
					dial := func() (net.Conn, error) {
						ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
						defer cancel()
						return bot.Dial(ctx)
					}
					c, err := dial()
					if err != nil {
						t.Fatal(err)
					}
					if err := talk(c); err != nil {
						t.Fatalf("untouched: %v", err)
					}
					m.mu.Lock()
					if len(m.other) < 64 {
						t.Errorf("%d records went by", len(m.other))
					}
					m.mu.Unlock()
					c.Close()
					for n := range records {
						// The channel is made anew, with this record changed; the first of them
						// come before there is a stream.
						m.mu.Lock()
						m.n, m.did = n, 0
						m.mu.Unlock()
						h.drop()
						synctest.Wait()
						c, err := dial()
						if err == nil {
							begin := time.Now()
							if err = talk(c); err == nil {
								t.Errorf("record %d: all went well", n)
							} else if !errors.Is(err, syscall.ECONNRESET) {
								t.Errorf("record %d: it ends with %v", n, err)
							}
							// At the next record of that direction, which is a ping at the latest; with
							// none, as with any silence.
							if d := time.Since(begin); d > 30*time.Second {
								t.Errorf("record %d: the end came after %v", n, d)
							}
							c.Close()
						}
						m.mu.Lock()
						if m.did == 0 {
							t.Errorf("record %d never came", n)
						}
						m.mu.Unlock()
					}
					l.check(t)
					touched.Add(int32(records))
				})
			})
		}
	}
}

// check wants prefixes of what is said.
func (l *ledger) check(t *testing.T) {
	t.Helper()
	var all []byte
	for i := range rounds {
		all = append(all, word(i)...)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, page := range l.reads {
		if !bytes.HasPrefix(all, page.Bytes()) {
			t.Errorf("the target of stream %d read what was not said", i)
		}
	}
}
