// Package stream carries many flows of bytes in one channel, each like a TCP
// connection: ordered, with its own flow control, a half-close each way and a
// reset.
//
// What it adds to other multiplexers is an honest end: a reader sees io.EOF
// only after an authenticated end whose total is the number of bytes it has
// read. Everything else that ends a stream is a reset.
//
// The way of a byte: Conn.Join or Conn.Write (send.go) → Over.Send → the lane
// → Mux.Frame (mux.go) → Conn.data → one non-blocking write to the local
// socket, or held for the stream's actor (receive.go).
package stream

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/routing"
)

// Over is what streams travel over: one end of a channel.
type Over interface {
	Send(q *buffer.Queue, b *buffer.Buffer) error     // takes b; may wait, may write here
	Post(q *buffer.Queue, b *buffer.Buffer) error     // takes b; neither waits nor writes
	Flush()                                           // writes what was posted; may wait
	Wake()                                            // has it written; does not wait
	Unsent() int                                      // buffers posted and not yet written
	Clear(n int, d time.Duration) bool                // waits until at most n control frames are unsent; false: d was too short
	Stop(q *buffer.Queue, err error)                  // ends or resumes waiting in Send
	Discard(q *buffer.Queue, why error) (sealed bool) // drops what is queued
	Control(key uint64, frame []byte) error           // never waits; replaces an unsent frame of key
	Budget() int                                      // payload bytes that a buffer should have now
	RTT() time.Duration
}

// Limits of one mux. The zero value has the defaults.
type Limits struct {
	Streams int     // open at once; default 16,384
	Window  int     // the most one stream may have on its way; default 16 MiB
	Budget  *Budget // shared by the muxes of a node; nil: one of its own
}

const (
	defaultStreams = 16384
	defaultWindow  = 16 << 20

	// firstWindow is the credit of a new stream: enough for a query and its
	// answer. That of 16,384 streams is four times the node's budget, which
	// counts what is held and not what is granted.
	firstWindow = 64 << 10
	// earlyWindow may be sent before the open is answered.
	earlyWindow = 16 << 10

	// maxUnsent bounds, beside two for each open stream, the ends that wait for a lane
	// which takes nothing. Streams that open and end at once, as probes do, count
	// as open no more, and each unsent end holds some 1 KiB.
	maxUnsent = 1024
	// answersTime is how long an end that opens streams may leave more answers than as
	// many, beside three for each open stream, unread. Nothing more of it is read
	// meanwhile: each answer is held, and there is no other end to them.
	answersTime = 10 * time.Second

	// Opens that come to nothing fill a bucket that leaks badPerSecond; a peer
	// that overflows it does nothing but open and reset.
	badPerSecond = 200
	badBurst     = 2000

	// maxLate is how many late resets are remembered: who wants to know of one asks soon.
	maxLate = 1024
)

// A late reset came for a stream that was over on the wire here.
type late struct {
	id   uint32
	code Code
}

// Mux is one end of all streams of a channel. Frame and Flush are called by
// the lane reader alone; all else from anywhere.
type Mux struct {
	node      *routing.Node
	over      Over
	initiator bool
	limits    Limits
	accept    func(*Incoming)

	mu      sync.Mutex
	conns   map[uint32]*Conn // by id, until nothing is left of them here
	idle    *sync.Cond       // conns became empty
	next    uint32           // our next id
	highest uint32           // their highest id so far
	err     error            // the channel has ended
	away    bool             // we take no new streams
	theirs  bool             // they take no new streams
	onAway  func()

	path    path
	pending pending // the lane reader's

	late   []late // resets of streams that were over here, the newest last
	forgot uint32 // the highest stream of those that late had no room for

	refused atomic.Int64 // opens of the other end that came to nothing, not yet counted
	bad     float64      // the bucket's level; the lane reader's
	badAt   time.Time
}

// pending is data of one stream that has been read but not yet delivered: the
// frames of one lane read leave in one write.
type pending struct {
	c    *Conn
	data [][]byte
}

// NewMux makes the streams' end over a channel's end. The initiator of the
// channel gives odd ids, the responder even ones. accept is called by the lane
// reader for each stream that the other end opens, must not wait, and may keep
// the Incoming; nil refuses all.
func NewMux(n *routing.Node, over Over, initiator bool, l Limits, accept func(*Incoming)) *Mux {
	if l.Streams <= 0 {
		l.Streams = defaultStreams
	}
	if l.Window <= 0 {
		l.Window = defaultWindow
	}
	if l.Budget == nil {
		l.Budget = new(Budget)
	}
	m := &Mux{
		node: n, over: over, initiator: initiator, limits: l, accept: accept,
		conns: make(map[uint32]*Conn), next: 2,
	}
	if initiator {
		m.next = 1
	}
	m.idle = sync.NewCond(&m.mu)
	l.Budget.join(m)
	return m
}

// Open opens a stream: an id is given and its open queued in one step, and at
// most 16 KiB may be written before the answer is in. Wait tells the answer.
func (m *Mux) Open(h Header) (*Conn, error) {
	c := newConn(m, 0)
	c.opener = true
	c.limit, c.granted = earlyWindow, firstWindow
	if err := c.spawn(); err != nil {
		return nil, err
	}
	b := buffer.Get(headerSize + 10 + len(h.Name) + len(h.Body) + buffer.Around)
	m.mu.Lock()
	err := m.openableLocked()
	if err == nil {
		c.id = m.next
		var frame []byte
		if frame, err = appendOpen(b.Next()[:0], c.id, h, firstWindow); err == nil {
			b.Commit(len(frame))
			err = m.over.Post(&c.queue, b)
			b = nil
		}
	}
	if err == nil {
		m.next += 2
		m.conns[c.id] = c
	}
	m.mu.Unlock()
	if b != nil {
		b.Release()
	}
	if err != nil {
		c.actor.Stop(err)
		return nil, fmt.Errorf("opening a stream: %w", err)
	}
	m.over.Flush()
	return c, nil
}

func (m *Mux) openableLocked() error {
	switch {
	case m.err != nil:
		return &ResetError{Code: CodeChannel, Reason: m.err.Error()}
	case m.theirs:
		return ErrAway
	case m.away:
		return errors.New("this end is going away")
	case len(m.conns) >= m.limits.Streams:
		return &RefusedError{Code: CodeBusy, Reason: fmt.Sprintf("%d streams are open in this channel", len(m.conns)), Local: true}
	case m.next > math.MaxUint32-2:
		return errors.New("the channel has no stream ids left")
	}
	return nil
}

// Away tells the other end that no new streams are taken. Open ones live on.
func (m *Mux) Away() {
	m.mu.Lock()
	m.away = true
	m.mu.Unlock()
	m.over.Control(frameAway, appendHeader(nil, frameAway, 0, 0))
}

// OnAway calls f, which must not wait, when the other end is going away.
func (m *Mux) OnAway(f func()) {
	m.mu.Lock()
	m.onAway = f
	called := m.theirs
	m.mu.Unlock()
	if called {
		f()
	}
}

// Going reports whether the other end has said that it is going away.
func (m *Mux) Going() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.theirs
}

// Streams is the number of streams that are not finished at this end.
func (m *Mux) Streams() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.conns)
}

// WaitIdle returns when no stream is left.
func (m *Mux) WaitIdle() {
	m.mu.Lock()
	for len(m.conns) > 0 {
		m.idle.Wait()
	}
	m.mu.Unlock()
}

// Quit is Away for whoever closes the channel next: what is not over on the wire is reset, as the
// other end is told. What it is not told of until the close had all arrived.
func (m *Mux) Quit(code Code, reason string) {
	m.Away()
	for _, c := range m.all() {
		c.kill(&ResetError{Code: code, Reason: reason, Local: true}, false)
	}
}

// ResetAll resets every stream, telling the other end why.
func (m *Mux) ResetAll(code Code, reason string) {
	for _, c := range m.all() {
		c.Reset(code, reason)
	}
}

// Fail is told that the channel has ended: every stream that is not over on
// the wire is reset. One whose both ends are in goes on to its reader.
func (m *Mux) Fail(err error) {
	m.mu.Lock()
	if m.err == nil {
		m.err = err
	}
	m.mu.Unlock()
	for _, c := range m.all() {
		c.kill(&ResetError{Code: CodeChannel, Reason: err.Error()}, false)
	}
	m.leaveIfIdle()
}

// leaveIfIdle takes a mux whose channel has ended off the node's budget when its
// last stream has been delivered.
func (m *Mux) leaveIfIdle() {
	m.mu.Lock()
	over := m.err != nil && len(m.conns) == 0
	m.mu.Unlock()
	if over {
		m.limits.Budget.leave(m)
	}
}

func (m *Mux) all() []*Conn {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]*Conn, 0, len(m.conns))
	for _, c := range m.conns {
		all = append(all, c)
	}
	return all
}

// finished is told once for each stream, when nothing of it is left here.
func (m *Mux) finished(c *Conn) {
	m.mu.Lock()
	delete(m.conns, c.id)
	idle := len(m.conns) == 0
	if idle {
		m.idle.Broadcast()
	}
	m.mu.Unlock()
	if idle {
		m.leaveIfIdle()
	}
}

// find gives the stream of id, nil for one that is dead, and an error for one
// that never was.
func (m *Mux) find(id uint32) (*Conn, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.conns[id]; c != nil {
		if c.wireOver() {
			c = nil
		}
		return c, nil
	}
	if id == 0 || m.ours(id) && id >= m.next || !m.ours(id) && id > m.highest {
		return nil, &ProtocolError{fmt.Sprintf("a frame for stream %d, which was never opened", id)}
	}
	return nil, nil
}

func (m *Mux) ours(id uint32) bool { return (id&1 == 1) == m.initiator }

// Frame takes one frame off the lane. body is valid until the next Flush.
func (m *Mux) Frame(kind uint8, id uint32, body []byte) error {
	if kind == frameData {
		return m.data(id, body)
	}
	// Any other frame of the stream comes behind its data.
	if c := m.pending.c; c != nil && c.id == id {
		m.deliver()
	}
	switch kind {
	case frameAway:
		if id != 0 || len(body) != 0 {
			return errFrame
		}
		m.mu.Lock()
		m.theirs = true
		f := m.onAway
		m.mu.Unlock()
		if f != nil {
			f()
		}
		return nil
	case frameOpen:
		return m.incoming(id, body)
	case frameOpened, frameRefused, frameEnd, frameReset, frameCredit:
		c, err := m.find(id)
		if err == nil && c == nil && kind == frameReset {
			var code Code
			if code, _, err = parseCode(body); err == nil {
				m.lateReset(id, code)
			}
		}
		if err != nil || c == nil {
			return err
		}
		return c.frame(kind, body)
	}
	return &ProtocolError{fmt.Sprintf("a frame of unknown kind %#x", kind)}
}

// lateReset remembers a reset of a stream that is over here: the other end had not read all of it.
func (m *Mux) lateReset(id uint32, code Code) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.late) == maxLate {
		m.forgot = max(m.forgot, m.late[0].id)
		m.late = append(m.late[:0], m.late[1:]...)
	}
	m.late = append(m.late, late{id, code})
}

// Flush delivers what the frames since the last one left pending. Their bodies
// are free afterwards.
func (m *Mux) Flush() error {
	m.deliver()
	return nil
}

func (m *Mux) data(id uint32, body []byte) error {
	c := m.pending.c
	if c == nil || c.id != id {
		m.deliver()
		var err error
		if c, err = m.find(id); err != nil || c == nil {
			return err
		}
	}
	if len(body) == 0 {
		return &ProtocolError{"an empty data frame"}
	}
	later, err := c.data(body)
	if later {
		m.pending.c = c
		if m.pending.data = append(m.pending.data, body); len(m.pending.data) == maxWrite {
			m.deliver()
		}
	}
	return err
}

func (m *Mux) deliver() {
	if c := m.pending.c; c != nil {
		c.deliver(m.pending.data)
		clear(m.pending.data)
		m.pending.c, m.pending.data = nil, m.pending.data[:0]
	}
}

// Incoming is a stream that the other end wants to open. It is answered once,
// by Accept or Refuse, from any goroutine.
type Incoming struct {
	Header Header
	conn   *Conn
}

// Stream is the id, for logs at both ends.
func (i *Incoming) Stream() uint32 { return i.conn.id }

func (m *Mux) incoming(id uint32, body []byte) error {
	h, credit, err := parseOpen(body)
	if err != nil {
		return err
	}
	if !m.over.Clear(3*m.Streams()+maxUnsent, answersTime) {
		return &AbuseError{"streams opened by an end that does not read the answers"}
	}
	m.mu.Lock()
	if m.ours(id) || id == 0 || id <= m.highest {
		m.mu.Unlock()
		return &ProtocolError{fmt.Sprintf("stream %d is opened out of order", id)}
	}
	m.highest = id
	if m.over.Unsent() > 2*len(m.conns)+maxUnsent {
		m.mu.Unlock()
		return &AbuseError{"streams opened and ended by an end that does not read"}
	}
	code, reason := Code(0), ""
	switch {
	case m.away:
		code = CodeAway
	case len(m.conns) >= m.limits.Streams:
		code, reason = CodeBusy, "too many streams in this channel"
	case !m.limits.Budget.open():
		code, reason = CodeBusy, "out of memory for streams that are not read"
	case m.accept == nil:
		code = CodeRefused
	}
	if code != 0 {
		m.mu.Unlock()
		m.over.Control(key(frameRefused, id), appendCode(nil, frameRefused, id, code, reason))
		m.refused.Add(1)
		return m.countBad()
	}
	c := newConn(m, id)
	c.limit, c.granted = credit, earlyWindow
	m.conns[id] = c
	m.mu.Unlock()
	m.accept(&Incoming{Header: h, conn: c})
	return m.countBad()
}

// countBad fills the bucket with the opens that came to nothing.
func (m *Mux) countBad() error {
	n := m.refused.Swap(0)
	if n == 0 {
		return nil
	}
	now := time.Now()
	m.bad = max(0, m.bad-now.Sub(m.badAt).Seconds()*badPerSecond) + float64(n)
	m.badAt = now
	if m.bad > badBurst {
		return &AbuseError{"streams opened only to be refused or reset"}
	}
	return nil
}

// Accept answers yes and gives the stream. Nothing happens to a stream that
// has been reset meanwhile: its first use tells.
func (i *Incoming) Accept() *Conn {
	c := i.conn
	c.recv.Lock()
	if c.over() {
		c.recv.Unlock()
		return c
	}
	if err := c.spawn(); err != nil {
		c.recv.Unlock()
		c.Reset(CodeInternal, err.Error())
		return c
	}
	c.granted = firstWindow
	c.answered = true
	c.recv.Unlock()
	c.mux.over.Control(key(frameOpened, c.id), appendOffset(nil, frameOpened, c.id, firstWindow))
	return c
}

// Answer answers yes and ends the stream: whoever asks wants to know no more. It never waits.
func (i *Incoming) Answer() {
	i.conn.queue.Async.Store(true)
	i.Accept().Close()
}

// Refuse answers no and says why; it never waits. It counts as an open that came to
// nothing.
func (i *Incoming) Refuse(code Code, reason string) {
	if i.decline(code, reason) {
		i.conn.mux.refused.Add(1)
	}
}

// Decline is Refuse for what is lacking on this side, a place or the target: the
// opener is not to blame, and what else it has in the channel must not end for it.
func (i *Incoming) Decline(code Code, reason string) { i.decline(code, reason) }

func (i *Incoming) decline(code Code, reason string) bool {
	c := i.conn
	if !c.end(&ResetError{Code: code, Reason: reason, Local: true}, false, nil) {
		return false
	}
	c.mux.over.Control(key(frameRefused, c.id), appendCode(nil, frameRefused, c.id, code, reason))
	return true
}

// Done is closed when the opener has given up, or the channel has ended, before an
// answer; and for an accepted stream when nothing of it is left here.
func (i *Incoming) Done() <-chan struct{} { return i.conn.done }

// Gone reports whether the opener has given up meanwhile.
func (i *Incoming) Gone() bool {
	select {
	case <-i.conn.done:
		return true
	default:
		return false
	}
}

// key names a control frame's slot: one for each kind and stream.
func key(kind uint8, id uint32) uint64 { return uint64(kind)<<32 | uint64(id) }
