package authority

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/buffer"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/memnet"
	"github.com/portal-tunnel/portal/internal/store"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/routing"
)

// calling opens a channel to an authority as self.
func calling(t *testing.T, n *memnet.Network, self *identity.Self) *link.Live {
	t.Helper()
	lane, err := n.Dial(t.Context(), "tcp", aWay[0].Addr)
	if err != nil {
		t.Fatal(err)
	}
	live, err := link.Dial(t.Context(), lane, callingAs(self), nil)
	if err != nil {
		t.Fatal(err)
	}
	return live
}

func callingAs(self *identity.Self) *channel.Config {
	return &channel.Config{
		Node: new(routing.Node), Self: self, Trust: new(identity.Trust), Kind: channel.Authority, Judge: anyone, Proofless: true,
	}
}

// Whoever can reach an authority makes any number of identities, each with as many silent questions as it may have.
func TestStrangersWhoAskNothingKeepNobodyFromRenewingOrEnrolling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &memnet.Network{Link: memnet.Link{Latency: 5 * time.Millisecond}}
		s := newServer(t, time.Now)
		defer listening(t, n, s)()
		c := dialing(t, n, s, newHome(t, homeDir(t)))
		enroll(t, c, newTicket(t, s, Grant{}))

		ctx, stop := context.WithCancel(t.Context())
		var all sync.WaitGroup
		defer all.Wait()
		defer stop()
		const strangers = maxAsked/maxAskedEach + 1 // more than fit
		for range strangers {
			live := calling(t, n, newSelf(t))
			var silent sync.WaitGroup
			for range maxAskedEach {
				silent.Go(func() {
					for ctx.Err() == nil { // opened again a second after they were reset
						q, err := live.Mux.Open(stream.Header{Kind: stream.Request, Name: nameRenew})
						if err != nil {
							t.Error(err)
							return
						}
						select {
						case <-q.Done():
						case <-ctx.Done():
							q.Reset(stream.CodeLocal, "")
						}
						select {
						case <-time.After(time.Second):
						case <-ctx.Done():
						}
					}
				})
			}
			all.Go(func() {
				silent.Wait()
				live.Close(nil)
			})
		}
		time.Sleep(time.Second)
		start := time.Now()
		const times = 30
		for range times {
			if err := c.Renew(t.Context()); err != nil {
				t.Errorf("a renewal: %v", err)
			}
			enroll(t, dialing(t, n, s, nil), newTicket(t, s, Grant{}))
			time.Sleep(time.Second)
		}
		if waited := time.Since(start) - times*time.Second; waited > times*200*time.Millisecond {
			t.Errorf("%d renewals and enrolments waited %s", 2*times, waited)
		}
	})
}

// deaf takes no notice of what comes.
type deaf struct{}

func (deaf) Frame(uint8, uint32, []byte) error { return nil }
func (deaf) Flush() error                      { return nil }

// asks sends a whole question by hand, and gives no credit for its answer.
func asks(e *channel.End, id uint32, question []byte) error {
	open := append([]byte{byte(stream.Request)}, make([]byte, 8)...)
	open = append(append(open, byte(len(nameRenew))), nameRenew...)
	end := binary.BigEndian.AppendUint64(nil, uint64(len(question)))
	for _, f := range []struct {
		kind uint8
		body []byte
	}{{0x10, open}, {0x13, question}, {0x14, end}} {
		b := buffer.ForPayload(len(f.body))
		b.Commit(copy(b.Next(), append(channel.AppendHeader(nil, f.kind, id, len(f.body)), f.body...)))
		if err := e.Send(new(buffer.Queue), b); err != nil {
			return err
		}
	}
	return nil
}

func TestAnAnswerThatNobodyTakesIsNotInWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := new(memnet.Network)
		s := newServer(t, time.Now)
		defer listening(t, n, s)()
		for range maxWorking/maxAskedEach + 1 {
			lane, err := n.Dial(t.Context(), "tcp", aWay[0].Addr)
			if err != nil {
				t.Fatal(err)
			}
			e, err := channel.Initiate(t.Context(), lane, callingAs(newSelf(t)))
			if err != nil {
				t.Fatal(err)
			}
			go e.Run(deaf{})
			defer e.Close()
			for i := range uint32(maxAskedEach) {
				if err := asks(e, 2*i+1, mustEncode(t, &question{Now: 1})); err != nil {
					t.Fatal(err)
				}
			}
		}
		synctest.Wait()
		if q := &s.questions; len(q.all) != maxWorking+maxAskedEach || q.working != 0 {
			t.Errorf("%d questions in hand, %d of them in work", len(q.all), q.working)
		}
		start := time.Now()
		enroll(t, dialing(t, n, s, nil), newTicket(t, s, Grant{}))
		if waited := time.Since(start); waited != 0 {
			t.Errorf("another waited %s", waited)
		}
		time.Sleep(questionTime)
		synctest.Wait()
		if q := &s.questions; len(q.all)+len(q.each)+q.strangers != 0 {
			t.Errorf("after ten seconds %d are in hand", len(q.all))
		}
	})
}

func TestAKeyThatWasRotatedAwayTakesNoPlaceOfItsOwners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := new(memnet.Network)
		s := newServer(t, time.Now)
		defer listening(t, n, s)()
		home := newHome(t, homeDir(t))
		c := dialing(t, n, s, home)
		enroll(t, c, newTicket(t, s, Grant{}))
		old, err := newHome(t, home.Dir()).Self()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Self.Rotate(); err != nil {
			t.Fatal(err)
		}
		if err := c.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		thief := calling(t, n, old)
		defer thief.Close(nil)
		for range maxAskedEach {
			q, err := thief.Mux.Open(stream.Header{Kind: stream.Request, Name: nameRenew})
			if err == nil {
				err = q.Wait(t.Context())
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Renew(t.Context()); err != nil {
			t.Errorf("the owner: %v", err)
		}
	})
}

func TestOnlyAMemberThatMayRenewIsCountedAsOne(t *testing.T) {
	clock := newClock()
	s := newServer(t, clock.now)
	n := &network{server: s}
	home := newHome(t, homeDir(t))
	c := newClient(t, n, home)
	enroll(t, c, newTicket(t, s, Grant{}))
	old := stolen(t, n, home)
	if err := c.Self.Rotate(); err != nil {
		t.Fatal(err)
	}
	if err := c.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	counted := func(name string, self *identity.Self) asker {
		t.Helper()
		who, err := peerOf(self, clock.now())
		if err != nil {
			t.Fatal(err)
		}
		return s.asker(name, who)
	}
	if got := counted(nameRenew, c.Self); got != (asker{true, c.Self.ID()}) {
		t.Errorf("a member: %v", got)
	}
	for what, got := range map[string]asker{
		"a member that enrolls":       counted(nameEnroll, c.Self),
		"a key that was rotated away": counted(nameRenew, old.Self),
		"a stranger":                  counted(nameRenew, newSelf(t)),
	} {
		if got.member {
			t.Errorf("%s counts as a member that renews", what)
		}
	}
	if err := s.RemoveMember(t.Context(), c.Self.ID()); err != nil {
		t.Fatal(err)
	}
	if got := counted(nameRenew, c.Self); got != (asker{false, c.Self.ID()}) {
		t.Errorf("a member that was removed: %v", got)
	}
	id := c.Self.ID()
	if err := s.Store.Update(func(tx *store.Tx) error { return tx.Put(bucketMembers, id[:], []byte("x")) }); err != nil {
		t.Fatal(err)
	}
	if got := counted(nameRenew, c.Self); got.member {
		t.Errorf("one whose record is damaged: %v", got)
	}
}

// dropped notes that it was reset.
type dropped bool

func (d *dropped) Reset(stream.Code, string) { *d = true }

// pool fills a hand in the tests below.
type pool struct {
	*testing.T
	questions
}

func (p *pool) enter(member bool, key byte, high byte) (*asked, *dropped) {
	p.Helper()
	a, d := &asked{by: asker{member, identity.ID{key, high}}}, new(dropped)
	if !p.questions.enter(a, func() { a.conn = d }) {
		p.Fatalf("question %d of asker %v is not taken", p.each[a.by]+1, a.by)
	}
	return a, d
}

func TestAtTheCapOneOfWhoeverHasMostGoesAndNeverTheNewcomer(t *testing.T) {
	p := &pool{T: t}
	var ones, fours []*dropped
	for i := range maxStrangers - maxAskedEach {
		_, d := p.enter(false, byte(i), 1)
		ones = append(ones, d)
	}
	for range maxAskedEach {
		_, d := p.enter(false, 0, 2)
		fours = append(fours, d)
	}
	if p.questions.enter(&asked{by: asker{false, identity.ID{0, 2}}}, func() { t.Error("a fifth was accepted") }) {
		t.Error("a fifth of one asker was taken")
	}
	count := func(all []*dropped) (n int) {
		for _, d := range all {
			if *d {
				n++
			}
		}
		return n
	}
	for i := range maxAskedEach - 1 { // until it has one, like all others
		if _, d := p.enter(false, byte(i), 3); *d {
			t.Error("the newcomer went")
		}
		if count(ones) != 0 || count(fours) != i+1 {
			t.Errorf("%d of those with one and %d of the one with four went", count(ones), count(fours))
		}
	}
	if len(p.all) != maxStrangers || p.strangers != maxStrangers {
		t.Errorf("%d in hand, %d of strangers", len(p.all), p.strangers)
	}
}

func TestAQuarterIsForRenewalsOfMembers(t *testing.T) {
	p := &pool{T: t}
	var strangers, members []*asked
	var gone []*dropped
	for i := range maxStrangers {
		a, d := p.enter(false, byte(i/maxAskedEach), 1)
		strangers, gone = append(strangers, a), append(gone, d)
	}
	for i := range maxAsked - maxStrangers {
		a, _ := p.enter(true, byte(i), 1)
		members = append(members, a)
	}
	for i, d := range gone {
		if *d {
			t.Fatalf("question %d of a stranger went for a member's, which had room", i)
		}
	}
	never := make(chan struct{})
	begun := 0
	for _, a := range strangers {
		if !p.room(a) {
			break
		}
		if err := p.begin(a, never); err != nil {
			t.Fatal(err)
		}
		begun++
	}
	if begun != maxStrangersWorking {
		t.Errorf("%d of strangers are in work, want %d", begun, maxStrangersWorking)
	}
	for _, a := range members[:maxWorking-maxStrangersWorking] {
		if !p.room(a) {
			t.Fatal("no room for a member's")
		}
		if err := p.begin(a, never); err != nil {
			t.Fatal(err)
		}
	}
	if p.room(members[maxWorking-maxStrangersWorking]) || p.working != maxWorking {
		t.Errorf("%d are in work", p.working)
	}
	// With all full a member's still comes in, and whoever has most goes.
	p.enter(true, 0, 2)
	if p.strangers != maxStrangers-1 || len(p.all) != maxAsked {
		t.Errorf("%d in hand, %d of strangers", len(p.all), p.strangers)
	}
	for a := range p.all {
		if a.working {
			p.end(a)
		}
		p.leave(a)
	}
	if len(p.all)+len(p.each)+p.strangers+p.working+p.strangersWorking != 0 {
		t.Errorf("left at the end: %+v", &p.questions)
	}
}

func TestWholeQuestionsWaitForTheirTurnInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &pool{T: t}
		never := make(chan struct{})
		var working []*asked
		for i := range maxWorking {
			a, _ := p.enter(i >= maxStrangersWorking, byte(i), 1)
			if err := p.begin(a, never); err != nil {
				t.Fatal(err)
			}
			working = append(working, a)
		}
		turns := make(chan *asked, 8)
		wait := func(member bool, gone <-chan struct{}) *asked {
			a, _ := p.enter(member, byte(len(p.waiting)), 2)
			go func() {
				if err := p.begin(a, gone); err == nil {
					turns <- a
				} else if !errors.Is(err, errGone) {
					t.Error(err)
				}
			}()
			synctest.Wait()
			return a
		}
		leaves := make(chan struct{})
		first, _, second, member := wait(false, never), wait(false, leaves), wait(false, never), wait(true, never)
		if len(p.waiting) != 4 || len(turns) != 0 {
			t.Fatalf("%d wait", len(p.waiting))
		}
		close(leaves) // its stream was reset
		synctest.Wait()
		if len(p.waiting) != 3 {
			t.Errorf("%d wait when one has gone", len(p.waiting))
		}
		next := func(ended *asked, want *asked) {
			t.Helper()
			p.end(ended)
			synctest.Wait()
			select {
			case got := <-turns:
				if got != want {
					t.Errorf("it is another's turn")
				}
			default:
				t.Error("it is nobody's turn")
			}
		}
		next(working[maxWorking-1], member) // a stranger's would leave members less than their share
		next(working[0], first)
		next(first, second)

		// A turn that comes as its stream ends is passed on.
		gone := make(chan struct{})
		a, _ := p.enter(false, 9, 3)
		done := make(chan error, 1)
		go func() { done <- p.begin(a, gone) }()
		synctest.Wait()
		p.mu.Lock()
		close(gone)
		p.give(second)
		p.mu.Unlock()
		if err := <-done; err != errGone {
			t.Error(err)
		}
		if p.strangersWorking != maxStrangersWorking-1 || p.working != maxWorking-1 || len(p.waiting) != 0 {
			t.Errorf("%d in work, %d of strangers, %d wait", p.working, p.strangersWorking, len(p.waiting))
		}
	})
}

func BenchmarkAsker(b *testing.B) {
	s := newServer(b, time.Now)
	c := newClient(b, &network{server: s}, nil)
	ticket, err := s.CreateTicket(b.Context(), Grant{Ways: aWay, Attributes: identity.Attributes{"role": "agent"}})
	if err != nil {
		b.Fatal(err)
	}
	if _, err := c.Enroll(b.Context(), ticket); err != nil {
		b.Fatal(err)
	}
	for name, self := range map[string]*identity.Self{"member": c.Self, "stranger": newSelf(b)} {
		who, err := peerOf(self, time.Now())
		if err != nil {
			b.Fatal(err)
		}
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				s.asker(nameRenew, who)
			}
		})
	}
}
