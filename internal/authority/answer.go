package authority

import (
	"errors"
	"io"
	"time"

	"github.com/portal-tunnel/portal/identity"
)

// questionTime is from the open of a stream to the end of its answer.
const questionTime = 10 * time.Second

// halfCloser is one stream: a question and its answer.
type halfCloser interface {
	io.ReadWriter
	CloseWrite() error
}

// serve reads a question, has work answer it, and writes the answer.
func serve(stream halfCloser, work func(question []byte) (*answer, error)) error {
	b, err := readAll(stream, maxQuestion)
	if err != nil {
		return err
	}
	a, err := work(b)
	if err != nil {
		return err
	}
	if b, err = encode(a); err != nil {
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
