package authority

import (
	"errors"
	"io"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/identity"
)

const (
	// questionTime is from the open of a stream to the end of its answer.
	questionTime = 10 * time.Second

	// maxQuestions bounds what is in work at once, at up to 20 KiB and one sync of the disk each; maxQuestionsEach keeps
	// one identity from taking it all.
	maxQuestions     = 64
	maxQuestionsEach = 4
)

// questions counts what is in work.
type questions struct {
	mu      sync.Mutex
	closed  bool
	all     int
	each    map[identity.ID]int
	working sync.WaitGroup
}

// begin reports whether one more of id's may be answered; then end is called once.
func (q *questions) begin(id identity.ID) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || q.all >= maxQuestions || q.each[id] >= maxQuestionsEach {
		return false
	}
	if q.each == nil {
		q.each = make(map[identity.ID]int)
	}
	q.all++
	q.each[id]++
	q.working.Add(1)
	return true
}

func (q *questions) end(id identity.ID) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.all--
	if q.each[id]--; q.each[id] == 0 {
		delete(q.each, id)
	}
	q.working.Done()
}

// Close refuses new questions and waits for those in work, 10 s at most. The store stays open: it is its opener's.
func (s *Server) Close() error {
	s.questions.mu.Lock()
	s.questions.closed = true
	s.questions.mu.Unlock()
	s.questions.working.Wait()
	return nil
}

// halfCloser is one stream: a question and its answer.
type halfCloser interface {
	io.ReadWriter
	CloseWrite() error
}

// serve reads the question of that name, which who asks over a channel with this binding, and writes the answer.
func (s *Server) serve(stream halfCloser, name string, who *identity.Peer, binding [32]byte) error {
	b, err := readAll(stream, maxQuestion)
	if err != nil {
		return err
	}
	if b, err = encode(s.answer(name, b, who, binding)); err != nil {
		return err
	}
	if _, err := stream.Write(b); err != nil {
		return err
	}
	return stream.CloseWrite()
}

// answer decides. Who asks was proved by the channel: that identity is all that a renewal needs.
func (s *Server) answer(name string, b []byte, who *identity.Peer, binding [32]byte) *answer {
	now := s.now()
	c, repeat, err := s.decide(name, b, who, binding, now)
	a := &answer{}
	if err != nil {
		a = refusal(err)
	} else {
		a.Credential, a.History, a.Repeat = c.Raw(), s.Self.History(), repeat
	}
	a.Now = millis(now)
	return a
}

func (s *Server) decide(name string, b []byte, who *identity.Peer, binding [32]byte, now time.Time) (c *identity.Credential, repeat bool, err error) {
	log := s.logger().With("member", who.ID())
	q, err := decodeQuestion(name, b)
	if err != nil {
		log.Warn("question refused", "question", name, "reason", err)
		return nil, false, ErrMalformed
	}
	if name == nameRenew {
		if c, err = s.renew(who, now); err == nil {
			log.Debug("credential renewed", "name", c.Name(), "until", c.Expires)
			return c, false, nil
		}
	} else {
		hash := s.hash(identity.Secret(q.Secret))
		log = log.With("ticket", Ref(hash))
		if c, repeat, err = s.enroll(q, hash, who, binding, now); err == nil {
			log.Info("enrolled", "name", c.Name(), "until", c.Expires, "repeat", repeat)
			return c, repeat, nil
		}
	}
	if refusal(err).Code == codeUnavailable {
		log.Error("question failed", "question", name, "error", err)
	} else {
		log.Warn("question refused", "question", name, "reason", err)
	}
	return nil, false, err
}

func (s *Server) enroll(q *question, hash [32]byte, who *identity.Peer, binding [32]byte, now time.Time) (*identity.Credential, bool, error) {
	if err := who.Verify(proofLabel, q.Proof, proofParts(hash, binding, s.Self.ID())...); err != nil {
		return nil, false, &RefusedError{Authority: s.Self.ID(), Reason: ErrProof}
	}
	if theirs := instant(q.Now); theirs.Sub(now).Abs() > maxSkew {
		return nil, false, &SkewError{Ours: now, Theirs: theirs}
	}
	return s.redeem(who, hash, now)
}

const proofLabel = "ticket"

// proofParts is what a subject signs, with proofLabel, to redeem a ticket in the channel with this binding.
func proofParts(hash, binding [32]byte, authority identity.ID) [][]byte {
	return [][]byte{hash[:], binding[:], authority[:]}
}

// ask writes q into stream and reads the answer, over stream's deadline.
func ask(stream halfCloser, q *question) (*answer, error) {
	b, err := encode(q)
	if err != nil {
		return nil, err
	}
	if _, err := stream.Write(b); err != nil {
		return nil, err
	}
	if err := stream.CloseWrite(); err != nil {
		return nil, err
	}
	if b, err = readAll(stream, maxAnswer); err != nil {
		return nil, err
	}
	a, err := decodeAnswer(b)
	if err != nil {
		return nil, errors.Join(ErrMalformed, err)
	}
	return a, nil
}
