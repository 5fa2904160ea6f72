package authority

import (
	"errors"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/stream"
)

const (
	// maxAsked bounds the questions in hand, from the open of a stream to the end of its answer, at up to 20 KiB each: 5
	// MiB. It is four times what is in work, so that streams on which nothing comes keep no work waiting.
	maxAsked = 256
	// maxWorking bounds those in work, at one sync of the disk each. Only a whole question is.
	maxWorking = 64
	// maxAskedEach keeps one identity from taking it all.
	maxAskedEach = 4

	// Whoever can reach an authority makes any number of identities. A quarter of both is therefore kept for renewals of
	// members: no flood of others ends their credentials.
	maxStrangers        = maxAsked - maxAsked/4
	maxStrangersWorking = maxWorking - maxWorking/4
)

// questions are those in hand.
type questions struct {
	mu        sync.Mutex
	closed    bool
	all       map[*asked]struct{}
	each      map[asker]int
	strangers int // of all

	working          int
	strangersWorking int
	waiting          []*asked // whole questions, first come first

	answering sync.WaitGroup
}

// asked is one question.
type asked struct {
	by   asker
	conn resetter // set by the accept that enter calls

	working bool
	turn    chan struct{} // closed when it may be worked on; nil when it need not wait
}

// asker is whom a question is counted for. A member that renews is counted apart from whoever has only its identity,
// such as a key that it has rotated away.
type asker struct {
	member bool // asks for a renewal, and may have it
	id     identity.ID
}

type resetter interface {
	Reset(code stream.Code, reason string)
}

var errGone = errors.New("the stream ended before the question's turn came")

// asker says whom to count who's question of that name for. That takes one read of the store, some microseconds, and
// waits for nobody who writes. It is not asked for an enrolment: who enrolls is in general no member yet.
func (s *Server) asker(name string, who *identity.Peer) asker {
	id := who.ID()
	if name == nameRenew {
		b, err := s.Store.Get(bucketMembers, id[:])
		if b != nil && err == nil {
			if m, err := decodeMemberRecord(b); err == nil && s.standing(m, who) == nil {
				return asker{true, id}
			}
		}
	}
	return asker{false, id}
}

// enter takes a into the hand and calls accept; then leave is called once. It reports false when its asker has as many
// there as it may. At a cap one of the asker that has most goes, chosen by chance, and never the newcomer, who may be
// honest: an honest question is read a moment after its stream has been opened, and a silent one stays for 10 s.
func (q *questions) enter(a *asked, accept func()) bool {
	out, ok := q.add(a, accept)
	if out != nil {
		out.conn.Reset(stream.CodeBusy, "the authority has too many questions to answer; ask again")
	}
	return ok
}

func (q *questions) add(a *asked, accept func()) (out *asked, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || q.each[a.by] >= maxAskedEach {
		return nil, false
	}
	if q.all == nil {
		q.all, q.each = make(map[*asked]struct{}), make(map[asker]int)
	}
	switch {
	case !a.by.member && q.strangers >= maxStrangers:
		out = q.most(func(o *asked) bool { return !o.by.member })
	case len(q.all) >= maxAsked:
		out = q.most(func(*asked) bool { return true })
	}
	if out != nil {
		q.remove(out)
	}
	q.all[a] = struct{}{}
	q.each[a.by]++
	if !a.by.member {
		q.strangers++
	}
	q.answering.Add(1)
	accept()
	return out, true
}

// most is one of the asker that has most of those that may go and are not in work, nil when there is none.
func (q *questions) most(may func(*asked) bool) *asked {
	count := make(map[asker]int)
	var most asker
	for a := range q.all {
		if !a.working && may(a) {
			if count[a.by]++; count[a.by] > count[most] {
				most = a.by
			}
		}
	}
	if len(count) == 0 {
		return nil
	}
	i := rand.IntN(count[most])
	for a := range q.all {
		if a.by == most && !a.working {
			if i == 0 {
				return a
			}
			i--
		}
	}
	return nil
}

func (q *questions) remove(a *asked) {
	if _, ok := q.all[a]; !ok {
		return // it had to go
	}
	delete(q.all, a)
	if q.each[a.by]--; q.each[a.by] == 0 {
		delete(q.each, a.by)
	}
	if !a.by.member {
		q.strangers--
	}
}

func (q *questions) leave(a *asked) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.remove(a)
	q.answering.Done()
}

// begin waits until a, a whole question, may be worked on, or gone is closed. After nil end is called once.
func (q *questions) begin(a *asked, gone <-chan struct{}) error {
	q.mu.Lock()
	if q.room(a) {
		q.take(a)
		q.mu.Unlock()
		return nil
	}
	a.turn = make(chan struct{})
	q.waiting = append(q.waiting, a)
	q.mu.Unlock()
	select {
	case <-a.turn:
		return nil
	case <-gone:
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if a.working { // its turn came meanwhile
		q.give(a)
	} else {
		q.waiting = slices.DeleteFunc(q.waiting, func(o *asked) bool { return o == a })
	}
	return errGone
}

func (q *questions) end(a *asked) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.give(a)
}

// room reports whether a may be worked on. There is none while another of its kind waits: give passes each place on.
func (q *questions) room(a *asked) bool {
	return q.working < maxWorking && (a.by.member || q.strangersWorking < maxStrangersWorking)
}

func (q *questions) take(a *asked) {
	a.working = true
	q.working++
	if !a.by.member {
		q.strangersWorking++
	}
}

// give gives a's place to the first that may have it.
func (q *questions) give(a *asked) {
	a.working = false
	q.working--
	if !a.by.member {
		q.strangersWorking--
	}
	if i := slices.IndexFunc(q.waiting, q.room); i >= 0 {
		next := q.waiting[i]
		q.waiting = slices.Delete(q.waiting, i, i+1)
		q.take(next)
		close(next.turn)
	}
}

// Close refuses new questions and waits for those in hand, 10 s at most. The store stays open: it is its opener's.
func (s *Server) Close() error {
	s.questions.mu.Lock()
	s.questions.closed = true
	s.questions.mu.Unlock()
	s.questions.answering.Wait()
	return nil
}
