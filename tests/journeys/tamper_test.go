package journeys_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/internal/alloc"
	"github.com/portal-tunnel/portal/tests/baseline"
	"github.com/portal-tunnel/portal/tests/fault/proxy"
	"github.com/portal-tunnel/portal/tests/fault/ruler"
	"github.com/portal-tunnel/portal/tests/process"
)

// heard is less than what silence takes to be noticed: whoever ends a lane within it has seen why.
const heard = 20 * time.Second

// tampering is what a relay, or who has its place, can do to a record, or to a message of the handshake.
// Those in slow make a length that may be waited for until silence is noticed.
var (
	tampering = []proxy.Fault{
		{Kind: proxy.Flip, N: 15},   // the length's last bit
		{Kind: proxy.Flip, N: 16},   // the ciphertext's first
		{Kind: proxy.Flip, N: -129}, // its last
		{Kind: proxy.Flip, N: -1},   // the tag's last
		{Kind: proxy.Drop},
		{Kind: proxy.Duplicate},
		{Kind: proxy.Swap},
		{Kind: proxy.Replay},
		{Kind: proxy.Stale},
		{Kind: proxy.Insert, N: 50, Fill: 0x5a},
		{Kind: proxy.Truncate, N: 1},
		{Kind: proxy.Truncate, N: 1, Fit: true},
		{Kind: proxy.Extend, N: 1},
		{Kind: proxy.Extend, N: 1, Fit: true},
		{Kind: proxy.Reflect},
	}
	slow = []proxy.Fault{
		{Kind: proxy.Flip, N: 0},
		{Kind: proxy.Extend, N: 2, Fill: 0xff},
	}
)

// flow is one transfer after another by an inlet, each without an end, until it is reset. Only what is
// between the client and its service ends one.
type flow struct {
	*track
	addr string
	down bool
	stop chan struct{}

	mu    sync.Mutex
	spans []*span // the last ones
	whole int     // how many have been judged
}

// span is a transfer's time, from its first byte to when both ends knew of its end.
type span struct {
	begin, end time.Time
	over       chan struct{}
}

func (f *flow) begun(s *span) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !s.end.IsZero() {
		return // what is left of one that was reset on the way comes to its service afterwards
	}
	s.begin = time.Now()
	f.spans = append(f.spans, s)
	f.spans = f.spans[max(len(f.spans)-4, 0):]
}

func (f *flow) ended(s *span, at time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.whole++
	s.end = at
	close(s.over)
}

// of is the transfer that was under way at a moment.
func (f *flow) of(t time.Time) *span {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.IndexFunc(f.spans, func(s *span) bool { return s.begin.Before(t) && (s.end.IsZero() || s.end.After(t)) })
	if i < 0 {
		return nil
	}
	return f.spans[i]
}

// run says what is wrong with a transfer's end.
func (f *flow) run() error {
	for {
		err := f.one()
		select {
		case <-f.stop:
			return nil
		default:
		}
		if err != nil {
			return err
		}
	}
}

func (f *flow) one() error {
	this := &span{over: make(chan struct{})}
	m := mark{1, func() { f.begun(this) }}
	kind := byte('U')
	here := mark{}
	if f.down {
		kind, here, m = 'D', m, here
	}
	x := f.expect(m)
	c, err := x.dial(f.addr, kind, -1)
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return nil // as soon as that: it came to a lane that was over
	}
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * silence))
	over := make(chan struct{})
	defer close(over)
	go func() {
		select {
		case <-f.stop:
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		case <-over:
		}
	}()
	var o outcome
	if f.down {
		o.n, o.err = ruler.Receive(&marked{c, here}, x.number)
	} else {
		// An error of a write is told once; what a read says behind it means nothing.
		if _, o.err = ruler.Send(c, x.number, -1); errors.Is(o.err, syscall.EPIPE) {
			o.err = syscall.ECONNRESET
		}
	}
	o.at = time.Now()
	if err := o.verdict(); err != nil {
		return fmt.Errorf("the client of transfer %d, down %v: %w", x.number, f.down, err)
	}
	x.mu.Lock()
	seen := x.transfers[x.number].begun
	x.mu.Unlock()
	if seen {
		select {
		case there := <-x.outcome:
			if err := there.verdict(); err != nil {
				return fmt.Errorf("the service of transfer %d, down %v: %w", x.number, f.down, err)
			}
			if there.at.After(o.at) {
				o.at = there.at
			}
		case <-f.stop:
		case <-time.After(silence):
			return fmt.Errorf("the service of transfer %d, down %v, was not told", x.number, f.down)
		}
	}
	f.ended(this, o.at)
	return nil
}

// bench is a track with flows on it, and what was done to its lanes.
type bench struct {
	*track
	flows []*flow
	all   sync.WaitGroup
	cases int

	// From the next record to the later end of each transfer; of a length that is made longer
	// it may be silence that ends them.
	late, silent []time.Duration
}

func (x *crossing) bench(name, carrier string, inlets int) *bench {
	x.t.Helper()
	b := &bench{track: x.track(name, carrier)}
	addrs := []string{b.addr}
	for range inlets - 1 { // on the same leg
		p := x.start("bot", "inlet", name, "--from", "0", "--relay", x.pin+"@"+b.legs[inletLeg].Addr())
		addrs = append(addrs, x.line(p, `inlet \S+ listening on (\S+)`))
	}
	for _, addr := range addrs {
		ready(x.t, addr)
		for _, down := range []bool{true, false} {
			b.flows = append(b.flows, &flow{track: b.track, addr: addr, down: down, stop: make(chan struct{})})
		}
	}
	return b
}

// begin starts the flows, end ends them.
func (b *bench) begin() {
	for _, f := range b.flows {
		b.all.Go(func() {
			if err := f.run(); err != nil {
				b.t.Error(err)
			}
		})
	}
}

func (b *bench) end() {
	for _, f := range b.flows {
		close(f.stop)
	}
	b.all.Wait()
}

// tamper does a fault to the next lane at the relay's place. It must end within a time, and so must each
// transfer that was on it.
func (b *bench) tamper(f proxy.Fault, within time.Duration) error {
	leg := b.legs[inletLeg]
	f.Preface = proxy.Lane
	d := leg.Arm(f)
	leg.Cut(proxy.Lane)
	if !closes(d.Done, 2*silence) {
		return fmt.Errorf("%v: no lane came so far", d)
	}
	if !closes(d.Over, within) {
		return fmt.Errorf("%v: the lane goes on", d)
	}
	since := d.DoneAt()
	select {
	case <-d.Followed:
		since = d.FollowedAt()
	default:
	}
	for _, f := range b.flows {
		s := f.of(d.DoneAt())
		if s == nil || len(b.flows) > 2 {
			continue // it was not there yet; or another lane's, perhaps
		}
		if !closes(s.over, within) {
			return fmt.Errorf("%v: a transfer goes on, down %v", d, f.down)
		}
		took := max(s.end.Sub(since), 0)
		if within < silence {
			b.late = append(b.late, took)
		} else {
			b.silent = append(b.silent, took)
		}
	}
	b.cases++
	return nil
}

func closes(c <-chan struct{}, within time.Duration) bool {
	late := time.NewTimer(within)
	defer late.Stop()
	select {
	case <-c:
		return true
	case <-late.C:
		return false
	}
}

// trial is a fault and the time it has.
type trial struct {
	proxy.Fault
	within time.Duration
}

// trials are all there are, or a sample with each kind each way.
func trials(kinds []proxy.Fault, within time.Duration) (all []trial) {
	records := 64
	for _, f := range kinds {
		f.Unit = proxy.Record
		for _, f.Direction = range []proxy.Direction{proxy.Out, proxy.In} {
			for at := range int64(records) {
				f.At = at
				// What is lost of the handshake is noticed by its deadline.
				if first := f.Kind == proxy.Replay && at == 0; !first {
					all = append(all, trial{f, within})
				}
			}
		}
	}
	return all
}

// sample takes n of each kind and direction, by a seed that it logs.
func sample(t testing.TB, all []trial, n int) (some []trial) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	taken := map[proxy.Fault]int{}
	for _, c := range all {
		k := c.Fault
		k.At = 0
		if taken[k]++; taken[k] <= n {
			some = append(some, c)
		}
	}
	return some
}

// Whatever the relay does to what it passes, no application reads a byte that was not sent there, nor an
// end: a lane that was tampered with ends, and its transfers are reset, once the next record of that
// direction has come.
func TestNothingThatARelayDoesToRecordsIsDelivered(t *testing.T) {
	each, benches := 1, 2
	fast, late := tampering, []proxy.Fault(nil)
	// With the race detector the proxy would keep both cores busy, and what waits for it would be
	// measured: the whole is for a run without.
	whole := long() && !alloc.Raced
	if long() {
		each, benches, late = 4, 2, slow
	}
	if whole {
		each, benches = 64, 8
	}
	for _, carrier := range []string{"dial-back", "yamux"} {
		t.Run(carrier, func(t *testing.T) {
			t.Parallel()
			x := newCrossing(t)
			cases := sample(t, append(trials(fast, heard), trials(late, silence)...), each)
			var messages []trial
			for number, way := range []proxy.Direction{1: proxy.Out, 2: proxy.In, 3: proxy.Out} {
				for _, f := range tampering {
					f.Unit, f.At, f.Direction = proxy.Message, int64(number), way
					if f.Check() == nil {
						messages = append(messages, trial{f, heard})
					}
				}
			}
			if long() {
				cases = append(cases, messages...)
			}
			swapped := sample(t, trials([]proxy.Fault{{Kind: proxy.Exchange}}, heard), each)

			var all []*bench
			for i := range benches {
				all = append(all, x.bench(fmt.Sprintf("db/%d", i), carrier, 1))
			}
			pair := x.bench("db", carrier, 2)
			var before []baseline.Measure
			measured := []*process.Process{x.relay, pair.out, pair.in}
			for _, p := range measured {
				m, err := baseline.Of(p.Pid())
				if err != nil {
					t.Fatal(err)
				}
				before = append(before, m)
			}

			var running sync.WaitGroup
			work := func(b *bench, cases []trial) {
				b.begin()
				running.Go(func() {
					defer b.end() // else its transfers go on, whole, until the others have done their work
					// Lanes of its own first, whole for 64 records each way, so that there is an older one of each.
					for _, way := range []proxy.Direction{proxy.Out, proxy.In} {
						if err := b.tamper(proxy.Fault{Kind: proxy.RST, Unit: proxy.Record, Direction: way, At: 64}, heard); err != nil {
							t.Error(err)
						}
					}
					for _, c := range cases {
						if err := b.tamper(c.Fault, c.within); err != nil {
							t.Error(err)
						}
					}
				})
			}
			for i, b := range all {
				var own []trial
				for j := i; j < len(cases); j += len(all) {
					own = append(own, cases[j])
				}
				work(b, own)
			}
			work(pair, swapped)
			running.Wait()

			all = append(all, pair)
			tampered, transfers := 0, 0
			var took, silent []time.Duration
			for _, b := range all {
				tampered += b.cases
				for _, f := range b.flows {
					transfers += f.whole
				}
				took, silent = append(took, b.late...), append(silent, b.silent...)
			}
			slices.Sort(took)
			figure := "F-02"
			if long() && !whole {
				figure = "a sample, with the race detector"
			}
			t.Logf("%s: %d lanes tampered with, %d transfers reset; from the next record to the reset at both ends: median %v, 99 of 100 %v, longest %v",
				figure, tampered, transfers, took[len(took)/2], took[len(took)*99/100], took[len(took)-1])
			if len(silent) > 0 {
				t.Logf("%s: %d by a length that is made longer, the longest %v", figure, len(silent), slices.Max(silent))
			}
			if whole && took[len(took)*99/100] > time.Second {
				t.Error("more than one in a hundred was told later than a second behind the next record")
			}

			// Nothing is left of all that in the processes.
			for i, p := range measured {
				if now, err := before[i].Back(x.ctx, baseline.Slack{Descriptors: 2}); err != nil {
					t.Errorf("%s: %v", p.Name, err)
				} else {
					t.Logf("%s: resident memory %d KiB, %d KiB before", p.Name, now.Resident>>10, before[i].Resident>>10)
				}
			}
		})
	}
}

// The test above would pass if the proxy did nothing: without a channel each of its faults shows.
func TestTamperingShowsWithoutAChannel(t *testing.T) {
	t.Parallel()
	for _, f := range append(slices.Clone(tampering), slow...) {
		if f.Kind == proxy.Stale { // of a connection before, and there is none
			continue
		}
		s, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		p, err := proxy.Listen("", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		f.Unit, f.At = proxy.Record, 5
		d := p.Arm(f)
		sent := []byte("prtl\x01\x02\x01\x00................")
		for i := range 20 {
			sent = append(append(sent, 0, 30), fmt.Sprintf("%30d", i)...)
		}
		go func() {
			c, err := net.Dial("tcp", p.Addr())
			if err != nil {
				return
			}
			c.Write(sent)
			c.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, c)
			c.Close()
		}()
		c, err := s.Accept()
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(c)
		if err != nil || slices.Equal(got, sent) || !closes(d.Done, patience) {
			t.Errorf("%v: %d of %d bytes arrive, %v", d, len(got), len(sent), err)
		}
		c.Close()
		s.Close()
		p.Close()
	}
}
