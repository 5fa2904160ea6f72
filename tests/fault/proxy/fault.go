package proxy

import (
	"fmt"
	"slices"
	"strconv"
	"time"
)

// Kind is what is done to what passes.
type Kind int

// The kinds. Those before Flip end the connection that they hit; those behind it need a record, or a
// message of the handshake, to be done to, as Flip does not.
const (
	FIN       Kind = iota // both connections are closed in good order
	RST                   // both connections are reset
	Stall                 // nothing passes any more, either way, and nobody is told
	Flip                  // one bit is another
	Drop                  // it is left out
	Duplicate             // it comes twice
	Swap                  // it comes behind the next one, or last
	Replay                // the direction's first one comes again, before it
	Stale                 // the one of the same number of the connection before comes, in its place
	Insert                // one of N bytes that nobody sealed comes before it
	Truncate              // its last N bytes are left out
	Extend                // N bytes more come behind it
	Reflect               // it goes back to who sent it, and not on
	Exchange              // it comes in another connection, and the one of the same number there in this
)

var kinds = [...]string{"fin", "rst", "stall", "flip", "drop", "duplicate", "swap", "replay", "stale", "insert", "truncate", "extend", "reflect", "exchange"}

func (k Kind) String() string { return kinds[k] }

// ParseKind reads a kind's name.
func ParseKind(s string) (Kind, error) {
	if i := slices.Index(kinds[:], s); i >= 0 {
		return Kind(i), nil
	}
	return 0, fmt.Errorf("there is no fault %q: it is one of %q", s, kinds)
}

// Direction is which way bytes travel.
type Direction int

// The directions, as who dials the proxy sees them.
const (
	Out Direction = iota
	In
)

func (d Direction) String() string { return [...]string{"out", "in"}[d] }

// Unit is what a fault's place is counted in.
type Unit int

// The units. Bytes are counted over all connections that the fault is for, from Arm on. Records and
// messages have the numbers of SPEC.md in their connection: records from 0, which is the confirmation, each
// direction by itself; messages from 1 to 3. The first connection where it comes is hit.
const (
	Byte Unit = iota
	Record
	Message
)

func (u Unit) String() string { return [...]string{"byte", "record", "message"}[u] }

// What a connection's first byte sequence says it is for: the kind in its preface (SPEC.md §1).
const (
	AnyPreface = 0
	Control    = 1 // to a relay
	Service    = 2 // to an outlet, without a relay
	Authority  = 3
	Lane       = 16 // of a relay
	Carrier    = 17
	Hop        = 18 // that a relay passes on; what it is for follows
)

// Fault is one damage. It is done once.
type Fault struct {
	Kind      Kind
	Direction Direction
	Unit      Unit
	At        int64
	Preface   uint8 // the connections it is for; 0: all

	// N is which bit Flip changes, counted from the record's first, the length's, or from its end when
	// negative (of a byte it is the bit, 0 to 7); of Truncate, Extend and Insert how many bytes.
	N int
	// Fit makes the length fit again behind Truncate and Extend.
	Fit bool
	// Fill is the byte that Extend and Insert put there.
	Fill byte
}

func (f Fault) String() string {
	s := f.Kind.String() + ", " + f.Unit.String() + " " + strconv.FormatInt(f.At, 10) + " " + f.Direction.String()
	switch f.Kind {
	case Flip:
		s += fmt.Sprintf(", bit %d", f.N)
	case Insert, Truncate, Extend:
		s += fmt.Sprintf(", %d bytes", f.N)
	}
	if f.Fit {
		s += ", with a length that fits"
	}
	return s
}

// maxUnit is the longest record with its length; see SPEC.md §3.
const maxUnit = 2 + 1<<16 - 1

// Check says what is wrong with a fault.
func (f Fault) Check() error {
	least, most := 0, 0
	switch f.Kind {
	case Flip:
		least, most = -8*maxUnit, 8*maxUnit
		if f.Unit == Byte {
			least, most = 0, 7
		}
	case Insert:
		least, most = 3, maxUnit
	case Truncate, Extend:
		least, most = 1, maxUnit
	}
	switch {
	case f.At < 0 || f.Unit == Message && (f.At < 1 || f.At > 3):
		return fmt.Errorf("there is no %v %d", f.Unit, f.At)
	case f.Kind > Flip && f.Unit == Byte, f.Unit == Message && (f.Kind == Replay || f.Kind == Stale):
		return fmt.Errorf("%v is nothing that is done to a %v", f.Kind, f.Unit)
	case f.N < least || f.N > most:
		return fmt.Errorf("%v of %d: it is from %d to %d", f.Kind, f.N, least, most)
	case f.Fit && f.Kind != Truncate && f.Kind != Extend:
		return fmt.Errorf("%v leaves the length alone", f.Kind)
	}
	return nil
}

// Damage is a fault that a Server is to do, or has done.
type Damage struct {
	Fault
	// Done is closed when it is done: what it left is on its way.
	Done <-chan struct{}
	// Followed is closed when what comes behind it in its direction is passed on, a record where they are
	// counted: from then on the receiver can know. Behind what ends a connection nothing does.
	Followed <-chan struct{}
	// Over is closed when the connection that it hit has ended, both ways: of an exchange, both.
	Over <-chan struct{}

	done, followed, over chan struct{}

	// The server's lock.
	left  int64 // bytes that pass before it
	hits  int   // connections that it hit
	ended int
	first []byte // an exchange's first record

	came         chan []byte // what an exchange's first half gets for it
	doneAt, next time.Time   // of Done and Followed
}

// happens is called before anybody else can see it, happened afterwards.
func (d *Damage) happens()  { d.doneAt = time.Now() }
func (d *Damage) happened() { close(d.done) }

func (d *Damage) passedOn() {
	d.next = time.Now()
	close(d.followed)
}

// DoneAt waits for Done and says when it was begun.
func (d *Damage) DoneAt() time.Time {
	<-d.Done
	return d.doneAt
}

// FollowedAt waits for Followed and says when that was begun.
func (d *Damage) FollowedAt() time.Time {
	<-d.Followed
	return d.next
}

func newDamage(f Fault) *Damage {
	d := &Damage{Fault: f, left: f.At, done: make(chan struct{}), followed: make(chan struct{}), over: make(chan struct{}), came: make(chan []byte, 1)}
	d.Done, d.Followed, d.Over = d.done, d.followed, d.over
	return d
}
