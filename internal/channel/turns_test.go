package channel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/internal/memnet"
)

// on runs f in a bubble with so many cores.
func on(t *testing.T, cores int, f func(*testing.T, *Turns)) {
	old := runtime.GOMAXPROCS(cores)
	defer runtime.GOMAXPROCS(old)
	synctest.Test(t, func(t *testing.T) { f(t, new(Turns)) })
}

// lane is an opening that waits for its turn; close ends it.
func lane(t *testing.T, ctx context.Context, turns *Turns, source string) (o *opening, end func()) {
	a, b := memnet.Pipe(memnet.Link{})
	return &opening{
		ctx: ctx, deadline: time.Now().Add(time.Hour), lane: a,
		config: &Config{Turns: turns, Source: source},
	}, func() { a.Close(); b.Close() }
}

// spend uses up what strangers may compute at once, by answers of a millisecond.
func spend(turns *Turns) {
	turns.begin()
	turns.answers.spent = strangersBurst * time.Duration(turns.cores)
	turns.price = time.Millisecond
}

// takes is arithmetic that takes d, of a bubble's time.
func takes(d time.Duration) func() error {
	return func() error { <-time.After(d); return nil }
}

// verifies is verify of a few bytes.
func verifies(o *opening, f func() error) error { return o.verify(1, f) }

// The accepting goroutine asks before, while and after the first lane begins.
func TestWhoIsKnownMayBeAskedAtAnyTime(t *testing.T) {
	on(t, 2, func(t *testing.T, turns *Turns) {
		var both sync.WaitGroup
		both.Go(func() {
			if turns.Known("a") {
				t.Error("nobody has proved himself yet")
			}
		})
		both.Go(func() {
			o, end := lane(t, t.Context(), turns, "a")
			defer end()
			check(t, o.answer(takes(time.Millisecond)))
			turns.proved("b")
		})
		both.Wait()
		if !turns.Known("b") {
			t.Error("who has proved himself is not known")
		}
	})
}

func TestHalfOfTheCoresComputeAtOnceAtMost(t *testing.T) {
	for _, of := range []struct {
		name string
		run  func(*opening, func() error) error
	}{{"answers", (*opening).answer}, {"verifications", verifies}} {
		t.Run(of.name, func(t *testing.T) {
			on(t, 6, func(t *testing.T, turns *Turns) {
				var mu sync.Mutex
				now, most := 0, 0
				var all sync.WaitGroup
				begin := time.Now()
				for range 30 {
					all.Go(func() {
						o, end := lane(t, t.Context(), turns, "")
						defer end()
						if err := of.run(o, func() error {
							mu.Lock()
							now++
							most = max(most, now)
							mu.Unlock()
							err := takes(10 * time.Millisecond)()
							mu.Lock()
							now--
							mu.Unlock()
							return err
						}); err != nil {
							t.Error(err)
						}
					})
				}
				all.Wait()
				if most != 3 || time.Since(begin) != 100*time.Millisecond {
					t.Errorf("%d at once, all in %v", most, time.Since(begin))
				}
			})
		})
	}
}

// Strangers have half a second of each core and a thirty-second of its time then, and as much for long
// proofs. Whoever proves himself gives back what he took, and is held up by nobody's number.
func TestStrangersHaveAnAllowanceAndMembersNone(t *testing.T) {
	const cores, each, long = 2, 10 * time.Millisecond, 9
	answers := func(t *testing.T, turns *Turns, proves bool, message int, until time.Duration) (n int) {
		ctx, cancel := context.WithTimeout(t.Context(), until)
		defer cancel()
		for ; ; n++ {
			o, end := lane(t, ctx, turns, fmt.Sprint("10.0.0.", n))
			err := o.answer(takes(each))
			if err == nil && message > 0 {
				err = o.verify(message, takes(each*time.Duration(message)/verifiedBytes))
			}
			end()
			if err != nil {
				return n
			}
			if proves {
				turns.proved(o.config.Source)
				if o.back != nil {
					o.back()
				}
			}
		}
	}
	for message, parts := range map[int]time.Duration{0: 1, shortProof: 1, long * verifiedBytes: long} {
		on(t, cores, func(t *testing.T, turns *Turns) {
			const lasts = 60 * time.Second
			n := answers(t, turns, false, message, lasts)
			want := int(cores * (strangersBurst + lasts/strangersShare) / each / parts)
			if n < want-1 || n > want+1 {
				t.Errorf("%d answers to strangers in %v, with proofs of %d bytes, want %d", n, lasts, message, want)
			}
		})
	}
	on(t, cores, func(t *testing.T, turns *Turns) {
		const lasts = 5 * time.Second
		n := answers(t, turns, true, long*verifiedBytes, lasts)
		if n < int(lasts/each/(1+long))-1 {
			t.Errorf("%d answers to members in %v", n, lasts)
		}
		if len(turns.known) != n {
			t.Errorf("%d sources are known, %d have proved themselves", len(turns.known), n)
		}
	})
}

// Of a history of sixteen changes the signatures take eight times as long as an answer.
func TestALongProofHasAnAllowanceOfItsOwnAndAMemberHasItBack(t *testing.T) {
	for _, c := range []struct {
		rotations   int // behind which the credential is nobody's
		answers     time.Duration
		least, most time.Duration // of the other
	}{{0, 0, 0, 0}, {1, time.Second, 0, 0}, {15, time.Second, 8 * time.Second, 9 * time.Second}} {
		on(t, 20, func(t *testing.T, turns *Turns) {
			a, b := newSides(t)
			b.config.Turns = turns
			for range c.rotations {
				check(t, a.self.Rotate())
			}
			turns.begin()
			turns.price = time.Second // in a bubble arithmetic takes no time
			x, y := memnet.Pipe(memnet.Link{})
			if _, err := meet(a, b, x, y); (err != nil) != (c.rotations > 0) {
				t.Errorf("the responder: %v", err)
			}
			if got := turns.answers.spent; got != c.answers {
				t.Errorf("behind %d rotations the answer has taken %v, want %v", c.rotations, got, c.answers)
			}
			if got := turns.proofs[0].spent; got < c.least || got > c.most {
				t.Errorf("behind %d rotations the proof has taken %v, want %v to %v", c.rotations, got, c.least, c.most)
			}
			for _, s := range []*side{a, b} {
				if s.end != nil {
					s.end.Close()
				}
			}
		})
	}
}

// Bytes that claim to be long proofs hold up nobody but long proofs, and go with their lanes.
func TestALongProofHoldsNobodyElseUp(t *testing.T) {
	on(t, 2, func(t *testing.T, turns *Turns) {
		turns.begin()
		turns.price = time.Millisecond
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		var all sync.WaitGroup
		waited := 0
		for range 384 {
			all.Go(func() {
				o, end := lane(t, ctx, turns, "10.0.0.1")
				defer end()
				if err := o.verify(message3Most, takes(0)); err != nil {
					turns.mu.Lock()
					waited++
					turns.mu.Unlock()
				}
			})
		}
		synctest.Wait()
		turns.Vouch("known")
		for source, n := range map[string]int{"a member": shortProof, "known": message3Most} {
			o, end := lane(t, t.Context(), turns, source)
			defer end()
			begin := time.Now()
			check(t, o.answer(takes(time.Millisecond)))
			check(t, o.verify(n, takes(time.Millisecond)))
			if d := time.Since(begin); d != 2*time.Millisecond {
				t.Errorf("%s has its answer and its proof of %d bytes after %v", source, n, d)
			}
		}
		all.Wait()
		if waited == 0 {
			t.Error("nobody waited for long: nothing is proved")
		}
		if over := turns.proofs[0].spent - strangersBurst*2; over > 0 {
			t.Errorf("%v more are spent than there are", over)
		}
	})
}

// The first answer of a busy moment tells a price at which a long proof would take more than there is.
func TestALongProofIsNotHeldToThePriceOfABusyMoment(t *testing.T) {
	for _, falls := range []bool{false, true} {
		on(t, 1, func(t *testing.T, turns *Turns) {
			turns.begin()
			turns.price = strangersBurst
			proof := func() {
				o, end := lane(t, t.Context(), turns, "")
				defer end()
				check(t, o.verify(message3Most, takes(0)))
			}
			begin := time.Now()
			proof()
			if d := time.Since(begin); d != 0 {
				t.Errorf("the first waits for %v", d)
			}
			if !falls {
				return
			}
			time.AfterFunc(time.Second, func() {
				turns.mu.Lock()
				defer turns.mu.Unlock()
				turns.price = time.Millisecond
			})
			proof()
			if d := time.Since(begin); d > 2*time.Second {
				t.Errorf("the second waits for %v", d)
			}
		})
	}
}

func TestSourcesTakeTurnsAndThoseThatAreKnownHaveThreeOfFour(t *testing.T) {
	on(t, 2, func(t *testing.T, turns *Turns) {
		turns.begin()
		turns.proved("member")
		turns.proved("friend")
		spend(turns)
		var mu sync.Mutex
		var order strings.Builder
		var all sync.WaitGroup
		for source, n := range map[string]int{"attacker": 12, "b": 2, "member": 7, "friend": 2, "": 2} {
			for range n {
				all.Go(func() {
					o, end := lane(t, t.Context(), turns, source)
					defer end()
					o.answer(func() error {
						mu.Lock()
						order.WriteString((source + "-")[:1])
						mu.Unlock()
						return takes(time.Millisecond)()
					})
				})
			}
		}
		synctest.Wait()
		mu.Lock()
		if order.Len() != 0 {
			t.Errorf("computed without an allowance: %s", &order)
		}
		mu.Unlock()
		all.Wait()
		// Of each four turns three are the known ones', in turn; the others' source with
		// many lanes has one turn in a round, those that share no name have one each.
		known, others := 0, ""
		for _, who := range order.String()[:12] {
			if strings.ContainsRune("mf", who) {
				known++
			} else {
				others += string(who)
			}
		}
		if known != 9 {
			t.Errorf("known sources had %d of the first 12 turns: %s", known, &order)
		}
		first := strings.Map(func(r rune) rune {
			if strings.ContainsRune("mf", r) {
				return -1
			}
			return r
		}, order.String())
		if n := strings.Count(first[:4], "a"); n != 1 {
			t.Errorf("the source with most had %d of the others' first 4 turns: %s", n, first)
		}
		if n := strings.Count(order.String()[:5], "f"); n == 0 {
			t.Errorf("a known source waits for another: %s", &order)
		}
		if len(turns.sources) != 0 || turns.waiting[0].Len()+turns.waiting[1].Len() != 0 || turns.running != 0 {
			t.Error("something is left behind")
		}
	})
}

// Who sends a message that fails at once would else make all answers cheap, and the allowance large.
func TestAMessageThatFailsDoesNotLowerThePrice(t *testing.T) {
	on(t, 2, func(t *testing.T, turns *Turns) {
		bad := errors.New("bad")
		for _, c := range []struct {
			takes time.Duration
			err   error
			price time.Duration
		}{
			{3 * time.Millisecond, nil, 3 * time.Millisecond},
			{time.Microsecond, bad, 3 * time.Millisecond},
			{5 * time.Millisecond, nil, 3 * time.Millisecond},
			{2 * time.Millisecond, nil, 2 * time.Millisecond},
		} {
			o, end := lane(t, t.Context(), turns, "")
			if err := o.answer(func() error { takes(c.takes)(); return c.err }); err != c.err {
				t.Error(err)
			}
			end()
			if turns.price != c.price {
				t.Errorf("after one of %v, %v: the price is %v, want %v", c.takes, c.err, turns.price, c.price)
			}
		}
	})
}

func TestNoMoreSourcesAreRememberedThanTheBound(t *testing.T) {
	on(t, 2, func(t *testing.T, turns *Turns) {
		turns.begin()
		for i := range knownSources + 100 {
			turns.proved(fmt.Sprint(i))
		}
		turns.proved("")
		if len(turns.known) != knownSources {
			t.Errorf("%d", len(turns.known))
		}
	})
}

func TestNothingIsComputedForWhoeverIsGoneWhenItsTurnComes(t *testing.T) {
	for name, end := range map[string]func(lane net.Conn, cancel context.CancelFunc){
		"the lane was closed to make room": func(lane net.Conn, _ context.CancelFunc) { lane.Close() },
		"its time is over":                 func(_ net.Conn, cancel context.CancelFunc) { cancel() },
	} {
		for of, run := range map[string]func(*opening, func() error) error{"answers": (*opening).answer, "verifications": verifies} {
			t.Run(of+" "+name, func(t *testing.T) {
				on(t, 2, func(t *testing.T, turns *Turns) {
					holder, close := lane(t, t.Context(), turns, "holder")
					defer close()
					held := make(chan struct{})
					go run(holder, func() error { <-held; return nil })
					synctest.Wait()
					ctx, cancel := context.WithCancel(context.Background())
					defer cancel()
					o, close := lane(t, ctx, turns, "who is gone")
					defer close()
					result := make(chan error, 1)
					go func() { result <- run(o, func() error { t.Error("it was computed for"); return nil }) }()
					synctest.Wait()
					end(o.lane, cancel)
					synctest.Wait()
					held <- struct{}{}
					if err := <-result; err == nil {
						t.Error("no error")
					}
					// Its place is there for the next.
					next, close := lane(t, t.Context(), turns, "next")
					defer close()
					if err := run(next, func() error { return nil }); err != nil {
						t.Error(err)
					}
					if turns.running != 0 || len(turns.lasts) != 0 || len(turns.sources) != 0 {
						t.Error("something is left behind")
					}
				})
			})
		}
	}
}

// Who waits for the allowance and goes leaves neither a place nor a charge.
func TestAWaitThatIsGivenUpCostsNothing(t *testing.T) {
	on(t, 2, func(t *testing.T, turns *Turns) {
		spend(turns)
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() {
				o, end := lane(t, ctx, turns, "10.0.0.1")
				defer end()
				if err := o.answer(takes(time.Millisecond)); err == nil {
					t.Error("no error")
				}
			})
		}
		synctest.Wait()
		before := turns.answers.spent
		cancel()
		all.Wait()
		if turns.answers.spent > before || len(turns.sources) != 0 || turns.running != 0 {
			t.Errorf("spent %v, %v before", turns.answers.spent, before)
		}
	})
}

func TestAnErrorOfTheArithmeticIsTheHandshakes(t *testing.T) {
	for name, turns := range map[string]*Turns{"with turns": new(Turns), "without": nil} {
		t.Run(name, func(t *testing.T) {
			o, end := lane(t, t.Context(), turns, "")
			defer end()
			want := errors.New("no")
			for _, run := range []func(*opening, func() error) error{(*opening).answer, verifies} {
				if err := run(o, func() error { return want }); err != want {
					t.Error(err)
				}
			}
		})
	}
}
