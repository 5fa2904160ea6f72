// Package proxy damages on purpose what passes between two processes: it ends, stalls, delays and slows
// connections, and alters their bytes. It can stand between any two ends of any tunnel. Of this project's
// wire it knows the lengths, so that a fault can be in a certain record: lost, repeated, in another order
// or another connection.
package proxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	chunkSize = 32 << 10
	// delayed bounds what is on its way while it is delayed: 4 MiB a direction.
	delayed = 128
	// kept is how many records of a connection Replay and Stale may take, and keptBytes how many bytes
	// of them are held, a direction.
	kept, keptBytes = 64, 8 << 20 // as many of the longest
	// finTime is how long a connection that was closed in good order is read from, so that what the peer
	// was still sending does not turn the end it reads into a reset.
	finTime = time.Second
)

// Server forwards connections to a target and damages those it is told to. It owns its listener, its
// connections and its goroutines until Close.
type Server struct {
	to  string
	ln  net.Listener
	all sync.WaitGroup

	mu     sync.Mutex
	links  map[*link]struct{}
	damage *Damage
	before map[uint8]*[2][][]byte // for each preface and direction the records of the longest link that ended, of such the last
	delay  time.Duration
	rate   int64
	done   bool
	taped  bool
	tapes  []*[]byte // of Record, one for each direction of a connection
}

// Listen listens on addr, "" for a free port of loopback, and forwards to another address.
func Listen(addr, to string) (*Server, error) {
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	s := &Server{to: to, ln: ln, links: make(map[*link]struct{}), before: make(map[uint8]*[2][][]byte)}
	s.all.Go(s.accept)
	return s, nil
}

// Addr is where the proxy listens.
func (s *Server) Addr() string { return s.ln.Addr().String() }

// Arm lets a fault happen, once. It takes the place of one that has not happened yet. A fault that
// Check objects to panics.
func (s *Server) Arm(f Fault) *Damage {
	if err := f.Check(); err != nil {
		panic("proxy: " + err.Error())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.damage = newDamage(f)
	return s.damage
}

// Delay lets what is sent on connections made from now on arrive later by d, each way.
func (s *Server) Delay(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.delay = d
}

// Limit lets connections made from now on carry n bytes a second each way; 0 is no limit.
func (s *Server) Limit(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rate = n
}

// Record keeps what passes on connections made from now on.
func (s *Server) Record() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taped = true
}

// Recorded is a copy of what has passed, one direction of one connection each.
func (s *Server) Recorded() (all [][]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tapes {
		all = append(all, bytes.Clone(*t))
	}
	return all
}

// Cut resets the connections that are there: those of a preface, or all with AnyPreface.
func (s *Server) Cut(preface uint8) {
	for _, l := range s.present(preface) {
		l.reset()
	}
}

// Open is how many connections of a preface there are, or of all with AnyPreface.
func (s *Server) Open(preface uint8) int { return len(s.present(preface)) }

func (s *Server) present(preface uint8) (all []*link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := range s.links {
		if preface == AnyPreface || l.of() == preface {
			all = append(all, l)
		}
	}
	return all
}

// Close ends everything, by resets, and waits for it.
func (s *Server) Close() error {
	s.mu.Lock()
	s.done = true
	s.mu.Unlock()
	err := s.ln.Close()
	s.Cut(AnyPreface)
	s.all.Wait()
	return err
}

func (s *Server) accept() {
	for {
		c, err := s.ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // descriptors have run out, or the dialler has gone
			time.Sleep(10 * time.Millisecond)
			continue
		}
		a := c.(*net.TCPConn)
		c, err = net.Dial("tcp", s.to)
		if err != nil {
			a.SetLinger(0)
			a.Close()
			continue
		}
		s.start(a, c.(*net.TCPConn))
	}
}

// start makes a link of two connections, which it owns from now on.
func (s *Server) start(a, b *net.TCPConn) {
	s.mu.Lock()
	l := &link{server: s, conns: [2]*net.TCPConn{a, b}, gone: make(chan struct{}), rate: s.rate}
	delay, done := s.delay, s.done
	if !done {
		s.links[l] = struct{}{}
	}
	if s.taped {
		for side := range l.tapes {
			l.tapes[side] = new([]byte)
			s.tapes = append(s.tapes, l.tapes[side])
		}
	}
	s.mu.Unlock()
	if done {
		l.reset()
		return
	}
	var halves [2]*half
	for d := range halves {
		h := &half{link: l, way: Direction(d), from: Direction(d), to: Direction(1 - d)}
		h.read = h.direct
		if delay > 0 {
			h.read = h.later(delay)
		}
		halves[d] = h
	}
	s.all.Go(func() {
		var both sync.WaitGroup
		for _, h := range halves {
			both.Go(h.run)
		}
		both.Wait()
		for _, c := range l.conns {
			c.Close()
		}
		l.end()
		for _, h := range halves {
			if h.swapped != nil { // nothing came that it could be behind
				h.pending.happens()
				h.pending.happened()
			}
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.links, l)
		if s.before[l.of()] == nil {
			s.before[l.of()] = new([2][][]byte)
		}
		for d, h := range halves {
			if old := &s.before[l.of()][d]; len(h.kept) >= len(*old) {
				*old = h.kept
			}
		}
		for _, d := range l.hits {
			if d.ended++; d.Kind != Exchange || d.ended == 2 {
				close(d.over)
			}
		}
	})
}

// hit takes the armed fault for a link when it is meant; of an exchange two links take it.
func (s *Server) hit(l *link, meant func(*Damage) bool) *Damage {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.damage
	if d == nil || d.Preface != AnyPreface && d.Preface != l.of() || !meant(d) {
		return nil
	}
	if d.hits++; d.Kind != Exchange || d.hits == 2 {
		s.damage = nil
	}
	l.hits = append(l.hits, d)
	return d
}

// link is one connection, both its sides.
type link struct {
	server  *Server
	conns   [2]*net.TCPConn // the dialler's, the target's
	writing [2]sync.Mutex
	tapes   [2]*[]byte // what is written to each side; the server's lock
	rate    int64
	preface atomic.Uint32
	mute    atomic.Bool // nothing is passed on any more
	still   atomic.Bool // nor read
	once    sync.Once
	gone    chan struct{} // closed when it is reset, or over
	hits    []*Damage     // the server's lock
}

func (l *link) of() uint8 { return uint8(l.preface.Load()) }

func (l *link) end() { l.once.Do(func() { close(l.gone) }) }

func (l *link) reset() {
	l.end()
	for _, c := range l.conns {
		c.SetLinger(0)
		c.Close()
	}
}

// cut ends or stalls a link.
func (l *link) cut(k Kind) {
	switch k {
	case RST:
		l.mute.Store(true)
		l.reset()
	case Stall:
		l.still.Store(true)
		l.mute.Store(true)
	case FIN:
		l.mute.Store(true)
		for i, c := range l.conns {
			l.writing[i].Lock() // a write that has begun comes whole
			c.CloseWrite()
			l.writing[i].Unlock()
			c.SetReadDeadline(time.Now().Add(finTime))
		}
	}
}

// write writes to one side, whole and with nothing else in between.
func (l *link) write(side Direction, b []byte) error {
	l.writing[side].Lock()
	defer l.writing[side].Unlock()
	if t := l.tapes[side]; t != nil { // before anybody can have it
		l.server.mu.Lock()
		*t = append(*t, b...)
		l.server.mu.Unlock()
	}
	_, err := l.conns[side].Write(b)
	return err
}

// half is one direction of a link. Its goroutine's, but for what is said.
type half struct {
	link     *link
	way      Direction
	from, to Direction // the sides: what travels out comes from the dialler, side 0
	read     func() ([]byte, error)
	buf      []byte
	cutter   cutter
	kept     [][]byte // the first records; the link's after its end
	bytes    int      // in kept
	swapped  []byte   // waits for the one behind it
	pending  *Damage  // Swap: done when that has passed
	shadow   *Damage  // done, and nothing has followed it yet
}

// direct reads what comes when it comes.
func (h *half) direct() ([]byte, error) {
	if h.buf == nil {
		h.buf = make([]byte, chunkSize)
	}
	n, err := h.link.conns[h.from].Read(h.buf)
	return h.buf[:n], err
}

// later reads it when it has been on its way for d longer.
func (h *half) later(d time.Duration) func() ([]byte, error) {
	type chunk struct {
		b   []byte
		err error
		due time.Time
	}
	queue := make(chan chunk, delayed)
	h.link.server.all.Go(func() {
		for {
			b := make([]byte, chunkSize)
			n, err := h.link.conns[h.from].Read(b)
			select {
			case queue <- chunk{b[:n], err, time.Now().Add(d)}:
			case <-h.link.gone:
				return
			}
			if err != nil {
				return
			}
		}
	})
	return func() ([]byte, error) {
		select {
		case c := <-queue:
			h.link.wait(time.Until(c.due))
			return c.b, c.err
		case <-h.link.gone:
			return nil, net.ErrClosed
		}
	}
}

func (l *link) wait(d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-l.gone:
	}
}

func (h *half) run() {
	b, err := h.read()
	if h.way == Out { // until it is known what the connection is for
		head := b
		kind, more := purpose(head)
		for ; err == nil && more; kind, more = purpose(head) {
			head = bytes.Clone(head)
			if b, err = h.read(); len(b) > 0 {
				head = append(head, b...)
			}
		}
		b = head
		h.link.preface.Store(uint32(kind))
	}
	for ; ; b, err = h.read() {
		if h.link.still.Load() {
			<-h.link.gone // until then the sockets are there, and nobody reads them
			return
		}
		if !h.link.mute.Load() {
			if werr := h.pass(b); err == nil && !h.link.mute.Load() {
				err = werr
			}
		}
		if err == nil && h.link.rate > 0 {
			h.link.wait(time.Duration(int64(len(b)) * int64(time.Second) / h.link.rate))
		}
		switch {
		case err == nil || h.link.still.Load():
			continue
		case h.link.mute.Load(): // an end or a reset that we made
		case errors.Is(err, io.EOF):
			if h.flush() == nil {
				h.link.conns[h.to].CloseWrite()
			}
		default:
			h.link.reset() // one of them was reset: so is the other
		}
		return
	}
}

// pass passes bytes on, or does to them what is to be done.
func (h *half) pass(b []byte) error {
	n, d := h.judge(b)
	out, cut := h.cut(b[:n])
	switch {
	case d == nil:
	case d.Kind == Flip:
		h.shadow = d
	default:
		cut = d
		out = append(out, h.cutter.rest()...)
	}
	var err error
	if len(out) > 0 && !h.link.mute.Load() {
		err = h.link.write(h.to, out)
	}
	if cut != nil {
		cut.happens()
		h.link.cut(cut.Kind)
		cut.happened()
	}
	return err
}

// judge counts bytes against a fault in them. It gives the fault when it is in these, and how many pass; a
// bit it flips itself.
func (h *half) judge(b []byte) (pass int, d *Damage) {
	pass = len(b)
	d = h.link.server.hit(h.link, func(d *Damage) bool {
		if d.Unit != Byte || d.Direction != h.way || len(b) == 0 {
			return false
		}
		if d.left -= int64(len(b)); d.left >= 0 {
			return false
		}
		pass += int(d.left)
		return true
	})
	if d != nil && d.Kind == Flip {
		b[pass] ^= 0x80 >> d.N
		d.happens()
		d.happened()
		pass = len(b)
	}
	return pass, d
}

// cut splits bytes into records, and does to a record what is to be done. It gives what is to be passed on,
// and the fault when the connection is to be cut behind that.
func (h *half) cut(b []byte) (out []byte, cut *Damage) {
	if h.cutter.plain {
		h.follow()
		return b, nil
	}
	h.cutter.feed(b)
	for {
		p, ok := h.cutter.next(h.link.of())
		if !ok {
			return out, nil
		}
		d := h.link.server.hit(h.link, func(d *Damage) bool {
			return d.Unit != Byte && d.Unit == p.unit && d.At == p.number && d.Direction == h.way && h.able(d, p)
		})
		if d == nil {
			h.keep(p)
			out = append(out, p.bytes...)
			h.follow()
			if h.swapped != nil {
				out = append(out, h.swapped...)
				h.swapped = nil
				h.pending.happens()
				h.pending.happened()
				h.shadow = h.pending
			}
			continue
		}
		if d.Kind < Flip {
			return out, d
		}
		if d.Kind != Exchange {
			d.happens()
		}
		instead, ok := h.instead(d, p)
		h.keep(p)
		out = append(out, instead...)
		if ok {
			h.shadow = d
			// What was before it and itself go out now: whoever waits for Done may look at the receiver.
			if err := h.link.write(h.to, out); err != nil {
				h.link.reset()
			}
			out = out[:0]
			d.happened()
		}
	}
}

// able says whether there is what a fault takes from elsewhere. The server's lock is held.
func (h *half) able(d *Damage, p piece) bool {
	switch d.Kind {
	case Replay:
		return len(h.kept) > 0
	case Stale:
		old := h.link.server.before[h.link.of()]
		return old != nil && p.number < int64(len(old[h.way]))
	}
	return true
}

// instead gives what comes instead of a piece, and whether the fault is done with that.
func (h *half) instead(d *Damage, p piece) ([]byte, bool) {
	switch d.Kind {
	case Drop:
		return nil, true
	case Swap:
		h.swapped, h.pending = bytes.Clone(p.bytes), d
		return nil, false
	case Replay:
		return append(bytes.Clone(h.kept[0]), p.bytes...), true
	case Stale:
		s := h.link.server
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.before[h.link.of()][h.way][p.number], true
	case Reflect:
		h.link.write(h.from, p.bytes) // who has gone, or was told of an end, gets nothing
		return nil, true
	case Exchange:
		return h.exchange(d, p.bytes)
	}
	return d.alter(p.bytes), true
}

// exchange waits, when it is the first of two, for the other's record. The second one's is Done's.
func (h *half) exchange(d *Damage, b []byte) ([]byte, bool) {
	s := h.link.server
	b = bytes.Clone(b)
	s.mu.Lock()
	first := d.first == nil
	if first {
		d.first = b
	}
	s.mu.Unlock()
	if !first {
		d.happens()
		d.came <- b
		return d.first, true
	}
	select {
	case other := <-d.came:
		return other, false
	case <-h.link.gone:
		return nil, false
	}
}

// keep keeps a record for Replay and Stale.
func (h *half) keep(p piece) {
	if p.unit == Record && len(h.kept) < kept && h.bytes+len(p.bytes) <= keptBytes {
		h.kept = append(h.kept, bytes.Clone(p.bytes))
		h.bytes += len(p.bytes)
	}
}

// follow says that something is about to be passed on behind a fault.
func (h *half) follow() {
	if h.shadow != nil {
		h.shadow.passedOn()
		h.shadow = nil
	}
}

// flush passes on what is not whole or waits for another.
func (h *half) flush() error {
	rest := append(h.cutter.rest(), h.swapped...)
	if len(rest) == 0 {
		return nil
	}
	return h.link.write(h.to, rest)
}
