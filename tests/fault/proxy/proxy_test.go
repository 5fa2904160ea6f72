package proxy

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const patience = 30 * time.Second

// rig is a proxy before a listener.
type rig struct {
	*Server
	t  testing.TB
	ln net.Listener
}

func newRig(t testing.TB) *rig {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	s, err := Listen("", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return &rig{s, t, ln}
}

// pair is a connection through the proxy, both its ends: by the direction in which each sends.
func (r *rig) pair() [2]*net.TCPConn {
	r.t.Helper()
	a, err := net.Dial("tcp", r.Addr())
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { a.Close() })
	b, err := r.ln.Accept()
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { b.Close() })
	for _, c := range []net.Conn{a, b} {
		c.SetDeadline(time.Now().Add(patience))
	}
	return [2]*net.TCPConn{a.(*net.TCPConn), b.(*net.TCPConn)}
}

// done waits for what a fault is to bring about.
func done(t testing.TB, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("%s: never", what)
	}
}

func TestAFaultHappensAtItsByte(t *testing.T) {
	sent := bytes.Repeat([]byte("0123456789abcdef"), 8<<10) // several reads of the proxy
	for _, at := range []int{0, 1, chunkSize - 1, chunkSize, 100_000, len(sent) - 1} {
		for _, way := range []Direction{Out, In} {
			for _, kind := range []Kind{FIN, RST, Stall, Flip} {
				r := newRig(t)
				ends := r.pair()
				d := r.Arm(Fault{Kind: kind, Direction: way, At: int64(at), N: at % 8 * int(kind/Flip)})
				go func() {
					ends[way].Write(sent)
					ends[way].CloseWrite()
				}()
				if kind == Stall {
					go func() {
						<-d.Done
						r.Close() // a wire that is dead for good: else nothing would ever come
					}()
				}
				got, err := io.ReadAll(ends[1-way])
				done(t, "the fault", d.Done)
				want := sent[:at]
				switch kind {
				case FIN:
					if err != nil {
						t.Errorf("%v: %v, not an end", d, err)
					}
				case RST, Stall:
					if !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("%v: %v, not a reset", d, err)
					}
					// A reset may overtake what was on its way.
					want = sent[:min(len(got), at)]
				case Flip:
					want = bytes.Clone(sent)
					want[at] ^= 0x80 >> (at % 8)
					if err != nil {
						t.Errorf("%v: %v", d, err)
					}
				}
				if !bytes.Equal(got, want) {
					t.Errorf("%v: %d bytes, not the %d that were to pass", d, len(got), len(want))
				}
				r.Close()
				done(t, "its connection's end", d.Over)
			}
		}
	}
}

func TestAnEndIsReadByBothSidesHoweverMuchTheySend(t *testing.T) {
	r := newRig(t)
	ends := r.pair()
	d := r.Arm(Fault{Kind: FIN, Direction: In, At: 1 << 20})
	for _, c := range ends {
		go func() {
			for b := make([]byte, 1<<16); ; {
				if _, err := c.Write(b); err != nil {
					return
				}
			}
		}()
	}
	if n, err := io.Copy(io.Discard, ends[Out]); err != nil || n != 1<<20 {
		t.Errorf("the dialler read %d bytes and %v", n, err)
	}
	if _, err := io.Copy(io.Discard, ends[In]); err != nil {
		t.Errorf("the target read %v", err)
	}
	done(t, "the fault", d.Done)
}

func TestAProxyThatIsNotArmedPassesEndsAndResets(t *testing.T) {
	r := newRig(t)
	ends := r.pair()
	for _, way := range []Direction{Out, In} {
		if _, err := ends[way].Write([]byte("all of it")); err != nil {
			t.Fatal(err)
		}
		ends[way].CloseWrite()
		if got, err := io.ReadAll(ends[1-way]); err != nil || string(got) != "all of it" {
			t.Fatalf("%q, %v", got, err)
		}
	}
	for _, way := range []Direction{Out, In} {
		ends := r.pair()
		if _, err := ends[way].Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(ends[1-way], make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		ends[way].SetLinger(0)
		ends[way].Close()
		if n, err := ends[1-way].Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a reset %v arrives as %d bytes and %v", way, n, err)
		}
	}
}

func TestAFaultHappensOnce(t *testing.T) {
	r := newRig(t)
	ends := r.pair()
	d := r.Arm(Fault{Kind: Flip, Direction: Out, At: 1, N: 6})
	for i, want := range []string{"\x00\x02", "\x00\x00"} {
		got := make([]byte, 2)
		if _, err := ends[Out].Write([]byte{0, 0}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(ends[In], got); err != nil || string(got) != want {
			t.Fatalf("write %d arrived as %q, %v", i+1, got, err)
		}
		done(t, "the fault", d.Done)
	}
	done(t, "what follows", d.Followed)
}

func preface(kind uint8) []byte {
	return append([]byte{'p', 'r', 't', 'l', 1, kind, 1, 0}, make([]byte, 16)...)
}

// record is one, or a message, that says which it is.
func record(format string, args ...any) []byte {
	b := []byte(strings.Repeat(fmt.Sprintf(format+" ", args...), 4))
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...)
}

// conversation is what either side of a lane sends, as pieces: the initiator's first.
func conversation(name string) (pieces [2][][]byte) {
	pieces[Out] = [][]byte{preface(Lane), preface(Service), record("%s message 1", name), record("%s message 3", name)}
	pieces[In] = [][]byte{record("%s message 2", name)}
	for d := range pieces {
		for i := range 6 {
			pieces[d] = append(pieces[d], record("%s record %d %v", name, i, Direction(d)))
		}
	}
	return pieces
}

// first is where the pieces of a conversation have record 0.
var first = [2]int{4, 1}

// converse sends a conversation and gives what arrived, and the errors behind it. As on any lane nothing
// comes in before something has gone out; and the target ends last.
func converse(ends [2]*net.TCPConn, pieces [2][][]byte) (got [2][]byte, errs [2]error) {
	begun, ended := make(chan struct{}), make(chan struct{}) // what goes out, at the target
	var all sync.WaitGroup
	for d, c := range ends {
		all.Go(func() {
			if Direction(d) == In {
				var one [1]byte
				n, _ := c.Read(one[:])
				got[Out] = append(got[Out], one[:n]...)
				close(begun)
			}
			var rest []byte
			rest, errs[1-d] = io.ReadAll(c)
			got[1-d] = append(got[1-d], rest...)
			if Direction(d) == In {
				close(ended)
			}
		})
		all.Go(func() {
			if Direction(d) == In {
				<-begun
			}
			for _, b := range pieces[d] {
				c.Write(b)
			}
			if Direction(d) == In {
				<-ended
			}
			c.CloseWrite()
		})
	}
	all.Wait()
	return got, errs
}

func TestAFaultIsInItsRecord(t *testing.T) {
	const at = 2
	for _, way := range []Direction{Out, In} {
		whole := conversation("it")[way]
		i := first[way] + at
		its := whole[i]
		altered := func(f func(b []byte) []byte) [][]byte {
			return slices.Concat(whole[:i], [][]byte{f(bytes.Clone(its))}, whole[i+1:])
		}
		fits := func(b []byte) []byte {
			binary.BigEndian.PutUint16(b, uint16(len(b)-2))
			return b
		}
		for _, c := range []struct {
			f    Fault
			want [][]byte
		}{
			{Fault{Kind: FIN}, whole[:i]},
			{Fault{Kind: Flip, N: 15}, altered(func(b []byte) []byte { b[1] ^= 1; return b })},
			{Fault{Kind: Flip, N: 16}, altered(func(b []byte) []byte { b[2] ^= 0x80; return b })},
			{Fault{Kind: Flip, N: -1}, altered(func(b []byte) []byte { b[len(b)-1] ^= 1; return b })},
			{Fault{Kind: Drop}, slices.Concat(whole[:i], whole[i+1:])},
			{Fault{Kind: Duplicate}, slices.Insert(slices.Clone(whole), i, its)},
			{Fault{Kind: Swap}, slices.Concat(whole[:i], [][]byte{whole[i+1], its}, whole[i+2:])},
			{Fault{Kind: Replay}, slices.Insert(slices.Clone(whole), i, whole[first[way]])},
			{Fault{Kind: Insert, N: 5, Fill: 7}, slices.Insert(slices.Clone(whole), i, []byte{0, 3, 7, 7, 7})},
			{Fault{Kind: Truncate, N: 3}, altered(func(b []byte) []byte { return b[:len(b)-3] })},
			{Fault{Kind: Truncate, N: 3, Fit: true}, altered(func(b []byte) []byte { return fits(b[:len(b)-3]) })},
			{Fault{Kind: Extend, N: 2, Fill: 9}, altered(func(b []byte) []byte { return append(b, 9, 9) })},
			{Fault{Kind: Extend, N: 2, Fill: 9, Fit: true}, altered(func(b []byte) []byte { return fits(append(b, 9, 9)) })},
		} {
			c.f.Direction, c.f.Unit, c.f.At, c.f.Preface = way, Record, at, Lane
			r := newRig(t)
			d := r.Arm(c.f)
			got, _ := converse(r.pair(), conversation("it"))
			if want := bytes.Join(c.want, nil); !bytes.Equal(got[way], want) {
				t.Errorf("%v: %q arrived, want %q", d, got[way], want)
			}
			done(t, "the fault", d.Done)
			done(t, "the end of its connection", d.Over)
			if c.f.Kind != FIN {
				done(t, "what follows", d.Followed)
				if other := 1 - way; !bytes.Equal(got[other], bytes.Join(conversation("it")[other], nil)) {
					t.Errorf("%v: the other direction is not what it was", d)
				}
			}
		}
	}
}

func TestASwappedRecordThatIsTheLastComesAllTheSame(t *testing.T) {
	r := newRig(t)
	d := r.Arm(Fault{Kind: Swap, Direction: Out, Unit: Record, At: 5})
	got, _ := converse(r.pair(), conversation("it"))
	if !bytes.Equal(got[Out], bytes.Join(conversation("it")[Out], nil)) {
		t.Errorf("%q went out", got[Out])
	}
	done(t, "the fault", d.Done)
}

func TestAResetAtARecord(t *testing.T) {
	r := newRig(t)
	d := r.Arm(Fault{Kind: RST, Direction: In, Unit: Record, At: 1})
	got, errs := converse(r.pair(), conversation("it"))
	// A reset may overtake what was on its way; what went out may have ended before.
	if want := bytes.Join(conversation("it")[In][:first[In]+1], nil); !bytes.HasPrefix(want, got[In]) || !errors.Is(errs[In], syscall.ECONNRESET) {
		t.Errorf("%q came in, and %v", got[In], errs[In])
	}
	done(t, "the fault", d.Done)
}

func TestAFaultIsInItsMessage(t *testing.T) {
	for number, way := range map[int64]Direction{1: Out, 2: In, 3: Out} {
		r := newRig(t)
		d := r.Arm(Fault{Kind: Drop, Direction: way, Unit: Message, At: number})
		got, _ := converse(r.pair(), conversation("it"))
		for i, whole := range conversation("it") {
			whole = slices.DeleteFunc(whole, func(b []byte) bool {
				return bytes.Equal(b, record("it message %d", number))
			})
			if !bytes.Equal(got[i], bytes.Join(whole, nil)) {
				t.Errorf("%v: %q went %v", d, got[i], Direction(i))
			}
		}
		done(t, "the fault", d.Done)
	}
}

func TestAReflectedRecordComesBackAndDoesNotGoOn(t *testing.T) {
	r := newRig(t)
	d := r.Arm(Fault{Kind: Reflect, Direction: Out, Unit: Record, At: 3})
	got, _ := converse(r.pair(), conversation("it"))
	whole := conversation("it")
	its := whole[Out][first[Out]+3]
	if want := bytes.Join(slices.DeleteFunc(whole[Out], func(b []byte) bool { return bytes.Equal(b, its) }), nil); !bytes.Equal(got[Out], want) {
		t.Errorf("%q went out", got[Out])
	}
	// Between which records it comes back is not said; but it is between two.
	before, after, ok := bytes.Cut(got[In], its)
	if !ok || !bytes.Equal(append(bytes.Clone(before), after...), bytes.Join(whole[In], nil)) {
		t.Errorf("%q came in", got[In])
	}
	var c cutter
	c.feed(before)
	for {
		if _, ok := c.next(Lane); !ok {
			break
		}
	}
	if len(c.rest()) > 0 {
		t.Error("it came back inside a record")
	}
	done(t, "the fault", d.Done)
}

func TestTwoConnectionsExchangeARecord(t *testing.T) {
	r := newRig(t)
	d := r.Arm(Fault{Kind: Exchange, Direction: In, Unit: Record, At: 3})
	names := [2]string{"one", "other"}
	var got [2][2][]byte
	read := make(chan struct{})
	for i, name := range names {
		ends := r.pair()
		go func() {
			got[i], _ = converse(ends, conversation(name))
			read <- struct{}{}
		}()
	}
	<-read
	<-read
	for i, name := range names {
		whole := conversation(name)
		whole[In][first[In]+3] = conversation(names[1-i])[In][first[In]+3]
		for way := range whole {
			if !bytes.Equal(got[i][way], bytes.Join(whole[way], nil)) {
				t.Errorf("%q of the connection %s went %v", got[i][way], name, Direction(way))
			}
		}
	}
	done(t, "the fault", d.Done)
	done(t, "the end of both", d.Over)
}

func TestAStaleRecordIsOfTheConnectionBefore(t *testing.T) {
	r := newRig(t)
	drop := r.Arm(Fault{Kind: Drop, Direction: Out, Unit: Record, At: 5})
	converse(r.pair(), conversation("old"))
	done(t, "the end of the connection before", drop.Over)
	d := r.Arm(Fault{Kind: Stale, Direction: In, Unit: Record, At: 4})
	got, _ := converse(r.pair(), conversation("new"))
	whole := conversation("new")[In]
	whole[first[In]+4] = conversation("old")[In][first[In]+4]
	if !bytes.Equal(got[In], bytes.Join(whole, nil)) {
		t.Errorf("%q came in", got[In])
	}
	done(t, "the fault", d.Done)
}

func TestAFaultIsForItsConnections(t *testing.T) {
	r := newRig(t)
	d := r.Arm(Fault{Kind: Drop, Direction: Out, Unit: Record, At: 1, Preface: Lane})
	for _, c := range []struct {
		name  string
		begin []byte
		n     int // records
		want  bool
	}{
		{"one for something else", preface(Control), 3, false},
		{"one in another protocol", []byte("GET / HTTP/1.0 and more, so that it is as long"), 3, false},
		{"a lane that does not come so far", preface(Lane), 1, false},
		{"a lane", preface(Lane), 3, true},
		{"the next lane", preface(Lane), 3, false},
	} {
		whole := [2][][]byte{{c.begin, record("message")}, nil}
		if c.begin[5] == Control { // an initiator has two messages, whoever dials as a responder one
			whole[Out] = append(whole[Out], record("message"))
		}
		for i := range c.n {
			whole[Out] = append(whole[Out], record("record %d", i))
		}
		got, _ := converse(r.pair(), whole)
		sent := bytes.Join(whole[Out], nil)
		if bytes.Equal(got[Out], sent) == c.want {
			t.Errorf("%s: %d of %d bytes arrived", c.name, len(got[Out]), len(sent))
		}
	}
	done(t, "the fault", d.Done)

	// Bytes are counted over all that are meant.
	d = r.Arm(Fault{Kind: FIN, Direction: Out, At: 2*prefaceSize + 6, Preface: Service})
	for _, c := range []struct{ kind, want int }{{Control, prefaceSize}, {Service, prefaceSize}, {Lane, prefaceSize}, {Service, prefaceSize}, {Service, 6}, {Service, prefaceSize}} {
		if got, _ := converse(r.pair(), [2][][]byte{{preface(uint8(c.kind))}, nil}); len(got[Out]) != c.want {
			t.Errorf("%d: %d bytes arrived, want %d", c.kind, len(got[Out]), c.want)
		}
	}
	done(t, "the fault", d.Done)
}

// What a cutter gives does not depend on how the bytes come.
func TestPiecesAreTheSameHoweverTheyCome(t *testing.T) {
	said := conversation("it")[Out][2:]
	for _, prefaces := range [][]uint8{{Service}, {Lane, Service}, {Hop, Control}, {Hop, Lane, Service}} {
		var pieces [][]byte
		for _, kind := range prefaces {
			pieces = append(pieces, preface(kind))
		}
		pieces = append(pieces, said...)
		whole := bytes.Join(pieces, nil)
		of, more := purpose(whole)
		if want := prefaces[min(1, len(prefaces)-1)]; more || prefaces[0] == Hop && of != want || prefaces[0] != Hop && of != prefaces[0] {
			t.Errorf("behind %v: it is for %d, more is wanted: %v", prefaces, of, more)
		}
		for _, step := range []int{1, 2, 3, 7, 25, 1000, len(whole)} {
			var c cutter
			var got [][]byte
			numbers := map[Unit][]int64{}
			for rest := whole; len(rest) > 0; {
				n := min(step, len(rest))
				c.feed(rest[:n])
				rest = rest[n:]
				for {
					p, ok := c.next(of)
					if !ok {
						break
					}
					got = append(got, bytes.Clone(p.bytes))
					numbers[p.unit] = append(numbers[p.unit], p.number)
				}
			}
			if !slices.EqualFunc(got, pieces, bytes.Equal) {
				t.Errorf("behind %v, %d at a time: %q", prefaces, step, got)
			}
			if !slices.Equal(numbers[Record], []int64{0, 1, 2, 3, 4, 5}) || !slices.Equal(numbers[Message], []int64{1, 3}) {
				t.Errorf("behind %v, %d at a time: numbers %v", prefaces, step, numbers)
			}
		}
	}
	// A carrier's bytes, and those of another protocol, are nobody's records, whichever way they go.
	yamux, other := []byte{0, 3, 1, 2, 3, 0}, []byte("\x00\x03abcd")
	for _, whole := range [][]byte{append(preface(Carrier), yamux...), append(append(preface(Hop), preface(Carrier)...), yamux...), other} {
		of, _ := purpose(whole)
		for _, b := range [][]byte{whole, whole[len(whole)-len(yamux):]} {
			var c cutter
			c.feed(b)
			n := 0
			for {
				p, ok := c.next(of)
				if !ok {
					break
				}
				if n += len(p.bytes); p.unit != Byte {
					t.Errorf("%v of %q", p.unit, b)
				}
			}
			if n != len(b) {
				t.Errorf("%d bytes of %q are passed on", n, b)
			}
		}
	}
}

func TestWhatIsDelayedOrLimitedTakesLonger(t *testing.T) {
	r := newRig(t)
	const d = 30 * time.Millisecond
	r.Delay(d)
	ends := r.pair()
	begin := time.Now()
	for _, way := range []Direction{Out, In} {
		if _, err := ends[way].Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(ends[1-way], make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(begin); took < 2*d {
		t.Errorf("there and back in %v", took)
	}
	// More on its way at once than passes in one delay.
	sent := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
	got, errs := converse(ends, [2][][]byte{{sent}, {sent}})
	for way := range got {
		if errs[way] != nil || !bytes.Equal(got[way], sent) {
			t.Errorf("%d bytes went %v, %v", len(got[way]), Direction(way), errs[way])
		}
	}

	r.Delay(0)
	r.Limit(1 << 20)
	ends = r.pair()
	begin = time.Now()
	half := sent[:256<<10]
	if got, errs := converse(ends, [2][][]byte{{half}, nil}); errs[Out] != nil || !bytes.Equal(got[Out], half) {
		t.Errorf("%d bytes, %v", len(got[Out]), errs[Out])
	}
	if took := time.Since(begin); took < 200*time.Millisecond {
		t.Errorf("256 KiB at 1 MiB a second in %v", took)
	}
}

func TestCutResetsTheConnectionsThatAreThere(t *testing.T) {
	r := newRig(t)
	var lanes [][2]*net.TCPConn
	for _, kind := range []uint8{Lane, Control} {
		ends := r.pair()
		if _, err := ends[Out].Write(preface(kind)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(ends[In], make([]byte, prefaceSize)); err != nil {
			t.Fatal(err)
		}
		lanes = append(lanes, ends)
	}
	if a, b := r.Open(Lane), r.Open(AnyPreface); a != 1 || b != 2 {
		t.Errorf("%d lanes of %d connections", a, b)
	}
	r.Cut(Lane)
	for _, c := range lanes[0] {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a side of the lane reads %v", err)
		}
	}
	if got, errs := converse(lanes[1], [2][][]byte{{[]byte("on")}, {[]byte("on")}}); errs != [2]error{} || string(got[Out]) != "on" {
		t.Errorf("the other connection: %q, %v", got, errs)
	}
}

func TestFaultsThatCannotBeAreSaid(t *testing.T) {
	for _, f := range []Fault{
		{Kind: Drop},
		{Kind: Flip, N: 8},
		{Kind: Flip, Unit: Message},
		{Kind: Flip, Unit: Message, At: 4},
		{Kind: FIN, At: -1},
		{Kind: FIN, Fit: true},
		{Kind: Insert, Unit: Record, N: 2},
		{Kind: Truncate, Unit: Record},
		{Kind: Extend, Unit: Record, N: 1 << 20},
		{Kind: Stale, Unit: Message, At: 1},
	} {
		if f.Check() == nil {
			t.Errorf("%v can be", f)
		}
	}
	for k := range kinds {
		if got, err := ParseKind(Kind(k).String()); err != nil || got != Kind(k) {
			t.Errorf("%v: %v, %v", Kind(k), got, err)
		}
	}
	if _, err := ParseKind("melt"); err == nil {
		t.Error("there is a fault melt")
	}
}

func TestWhatPassesIsRecordedByDirection(t *testing.T) {
	r := newRig(t)
	r.Record()
	c := conversation("it")
	converse(r.pair(), c)
	all := r.Recorded()
	if len(all) != 2 {
		t.Fatalf("%d directions were kept", len(all))
	}
	for _, want := range [][]byte{bytes.Join(c[Out], nil), bytes.Join(c[In], nil)} {
		if !bytes.Equal(all[0], want) && !bytes.Equal(all[1], want) {
			t.Errorf("nothing that was kept is %.40q", want)
		}
	}
}
