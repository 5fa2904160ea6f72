package identity

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Home is a directory, 0700, that keeps one identity and its membership. Any
// number of processes share it: files are replaced whole, under a lock that is
// held for one write, and what another process wrote is seen by Reload. A Home
// is safe for concurrent use.
//
//	identity.key    the key and its history, PEM
//	membership      authority, ways, credential with its issuer's history
//	lock            locked by flock(2); says who holds it
//	authority/      a home of its own for the authority's identity
type Home struct {
	dir   string
	fault func(step string) error // nil but in tests

	mu        sync.Mutex
	self      *Self
	authority *Home

	turn  chan struct{} // holds one token while this process has, or waits for, the lock
	write sync.Mutex    // held for a write, and to change held
	held  bool          // the lock is this process's
}

const (
	keyName        = "identity.key"
	membershipName = "membership"
	lockName       = "lock"
	authorityDir   = "authority"

	keyType = "PORTAL IDENTITY KEY"

	maxKeyFile        = 8 << 10  // base64 of a full history and a key, and the frame
	maxMembershipFile = 16 << 10 // credential, history, ways

	lockWait  = 5 * time.Second
	lockRetry = 20 * time.Millisecond
)

var (
	// ErrNoAuthority: the home has no authority's identity.
	ErrNoAuthority = errors.New("there is no authority in this home")
	// ErrNotMember: the home has not joined an authority.
	ErrNotMember = errors.New("this home is not a member of an authority")
	// ErrOtherAuthority: the home is a member of another authority.
	ErrOtherAuthority = errors.New("this home is a member of another authority")
)

// LockedError says that another process held the home's lock for too long.
type LockedError struct {
	Dir string
	PID int // 0: not known
}

func (e *LockedError) Error() string {
	who := "another process"
	if e.PID != 0 {
		who = fmt.Sprintf("process %d", e.PID)
	}
	return fmt.Sprintf("the home %s has been locked for %s by %s: end it, or try again", e.Dir, lockWait, who)
}

// Open opens the home in dir and makes the directory when it is missing. A
// *FileError refuses one that others can enter or that is another user's.
func Open(dir string) (*Home, error) {
	h, err := open(dir)
	if err != nil {
		return nil, fmt.Errorf("identity: opening the home: %w", err)
	}
	return h, nil
}

func open(dir string) (*Home, error) {
	if dir == "" {
		return nil, errors.New("no directory is named")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := makeDir(dir); err != nil {
		return nil, err
	}
	// A directory may well be reached by a symbolic link, as systemd's
	// StateDirectory is; what counts is where the link ends.
	info, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, &FileError{dir, "is not a directory", "use another --home"}
	}
	if err := checkPrivate(dir, info, 0o700); err != nil {
		return nil, err
	}
	return &Home{dir: dir, turn: make(chan struct{}, 1)}, nil
}

// Dir returns the absolute path of the home.
func (h *Home) Dir() string { return h.dir }

func (h *Home) path(name string) string { return filepath.Join(h.dir, name) }

// Lock takes the home's lock, which every write takes by itself: it is for
// whoever has to read, decide and write in one, such as a renewal. It waits for
// 5 s at most, then fails with *LockedError. Until unlock, writes through this
// Home go ahead under it. Unlock waits for a write that has begun.
func (h *Home) Lock(ctx context.Context) (unlock func(), err error) {
	unlock, err = h.lock(ctx)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	return unlock, nil
}

func (h *Home) lock(ctx context.Context) (unlock func(), err error) {
	limit := time.NewTimer(lockWait)
	defer limit.Stop()
	select {
	case h.turn <- struct{}{}:
	case <-limit.C:
		return nil, &LockedError{h.dir, os.Getpid()}
	case <-ctx.Done():
		return nil, fmt.Errorf("locking the home %s: %w", h.dir, context.Cause(ctx))
	}
	f, err := h.flock(ctx, limit.C)
	if err != nil {
		<-h.turn
		return nil, err
	}
	h.write.Lock()
	h.held = true
	h.write.Unlock()
	return sync.OnceFunc(func() {
		h.write.Lock()
		h.held = false
		f.Truncate(0)
		f.Close() // and with it the lock
		h.write.Unlock()
		<-h.turn
	}), nil
}

// flock opens and locks HOME/lock, and writes this process's id into it for
// those who wait in vain.
func (h *Home) flock(ctx context.Context, limit <-chan time.Time) (_ *os.File, err error) {
	path := h.path(lockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the home %s: %w", h.dir, err)
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case err == nil:
			f.Truncate(0)
			f.WriteAt(strconv.AppendInt(nil, int64(os.Getpid()), 10), 0) // a full disk costs only the name
			return f, nil
		case errors.Is(err, syscall.EINTR):
			continue
		case !errors.Is(err, syscall.EWOULDBLOCK):
			return nil, fmt.Errorf("locking the home %s: %w", h.dir, err)
		}
		retry := time.NewTimer(lockRetry)
		select {
		case <-retry.C:
		case <-limit:
			retry.Stop()
			return nil, &LockedError{h.dir, lockHolder(f)}
		case <-ctx.Done():
			retry.Stop()
			return nil, fmt.Errorf("locking the home %s: %w", h.dir, context.Cause(ctx))
		}
	}
}

func lockHolder(f *os.File) int {
	var b [20]byte
	n, _ := f.ReadAt(b[:], 0)
	pid, err := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	if err != nil || pid < 0 {
		return 0
	}
	return pid
}

// locked runs f, which writes, under the lock: the one that a caller of Lock
// holds through this Home, or its own.
func (h *Home) locked(f func() error) error {
	h.write.Lock()
	if h.held {
		defer h.write.Unlock()
		return f()
	}
	h.write.Unlock()
	unlock, err := h.lock(context.Background())
	if err != nil {
		return err
	}
	defer unlock()
	h.write.Lock()
	defer h.write.Unlock()
	return f()
}

// replace writes a file of the home; the lock is held.
func (h *Home) replace(name string, b []byte) error {
	path := h.path(name)
	if err := replaceFile(path, b, h.fault); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

// Self returns the home's identity with its credential, the same *Self on each
// call. On first need it makes the identity; of several processes that do so at
// once one succeeds, and all return that one.
func (h *Home) Self() (*Self, error) { return h.ownSelf(true) }

// Existing is Self without making one: nil and nil when there is none yet.
func (h *Home) Existing() (*Self, error) { return h.ownSelf(false) }

func (h *Home) ownSelf(create bool) (*Self, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.self != nil {
		return h.self, nil
	}
	state, err := h.load()
	if errors.Is(err, fs.ErrNotExist) {
		if !create {
			return nil, nil
		}
		state, err = h.create()
	}
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	s := &Self{save: h.saveRotated}
	s.state.Store(state)
	h.self = s
	return s, nil
}

// load reads the key and, when there is one, the credential; fs.ErrNotExist
// when there is no key.
func (h *Home) load() (*selfState, error) {
	state, err := h.loadKey()
	if err != nil {
		return nil, err
	}
	m, err := h.loadMembership()
	if err != nil || m == nil {
		return state, err
	}
	if m.credential.Subject != state.history.id() {
		return nil, &FileError{h.path(membershipName),
			fmt.Sprintf("is of %s, and the key here is of %s", m.credential.Subject.Short(), state.history.id().Short()),
			"move it away and enroll again"}
	}
	if m.credential.Change == state.history.latest() {
		state.credential, state.issuer = m.credential, m.issuer
	}
	return state, nil
}

func (h *Home) loadKey() (*selfState, error) {
	path := h.path(keyName)
	b, err := readPrivate(path, maxKeyFile)
	if err != nil {
		return nil, fmt.Errorf("reading the key: %w", err)
	}
	state, err := parseKey(b)
	if err != nil {
		return nil, &FileError{path, "is damaged", "restore it from a backup, or move the whole home away and enroll again"}
	}
	return state, nil
}

func (h *Home) create() (state *selfState, err error) {
	err = h.locked(func() error {
		state, err = h.load()
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		// Another identity could not use what the lost one was given.
		if _, err := os.Lstat(h.path(membershipName)); err == nil {
			return &FileError{h.path(keyName), "is missing, although this home is a member of an authority",
				"restore it from a backup, or move the whole home away and enroll again"}
		}
		s, err := NewSelf()
		if err != nil {
			return err
		}
		state = s.state.Load()
		return h.replace(keyName, encodeKey(state))
	})
	return state, err
}

// saveRotated writes a rotated identity, unless another process rotated first.
func (h *Home) saveRotated(next *selfState) error {
	return h.locked(func() error {
		there, err := h.loadKey()
		if err != nil {
			return err
		}
		if len(there.history.hashes) != len(next.history.hashes)-1 || !next.history.extends(there.history) {
			return fmt.Errorf("%w: another process rotated it first", ErrFork)
		}
		return h.replace(keyName, encodeKey(next))
	})
}

type keyFile struct {
	_       struct{} `cbor:",toarray"`
	Seed    []byte
	History []byte
}

func encodeKey(s *selfState) []byte {
	return pem.EncodeToMemory(&pem.Block{
		Type:    keyType,
		Headers: map[string]string{"Identifier": s.history.id().String()},
		Bytes:   encode(&keyFile{Seed: s.key.Seed(), History: s.history.raw}),
	})
}

func parseKey(b []byte) (*selfState, error) {
	block, _ := pem.Decode(b)
	if block == nil || block.Type != keyType {
		return nil, ErrMalformed
	}
	var k keyFile
	if err := decode(block.Bytes, &k); err != nil || len(k.Seed) != ed25519.SeedSize {
		return nil, ErrMalformed
	}
	history, err := parseHistory(k.History)
	if err != nil {
		return nil, err
	}
	s := &selfState{key: ed25519.NewKeyFromSeed(k.Seed), history: history}
	if !history.key.Equal(s.key.Public()) || !bytes.Equal(encodeKey(s), b) {
		return nil, ErrMalformed
	}
	return s, nil
}

// Authority returns the identity of the home's authority, which create makes
// when there is none; ErrNoAuthority otherwise.
func (h *Home) Authority(create bool) (*Self, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.authority == nil {
		if _, err := os.Lstat(filepath.Join(h.path(authorityDir), keyName)); !create && errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("identity: %w (%s, user %d)", ErrNoAuthority, h.dir, os.Geteuid())
		}
		sub, err := open(h.path(authorityDir))
		if err != nil {
			return nil, fmt.Errorf("identity: opening the authority: %w", err)
		}
		sub.fault = h.fault
		h.authority = sub
	}
	return h.authority.Self()
}

// Membership is what joining an authority left in the home.
type Membership struct {
	Authority  ID
	Name       string // as the credential names this node; "" when it does not
	Ways       []Way
	TicketHash [32]byte // of the ticket that was redeemed last
}

// stored is the membership file.
type stored struct {
	Membership
	credential *Credential
	issuer     []byte
}

type wireMembership struct {
	_          struct{} `cbor:",toarray"`
	Version    int64
	Authority  []byte
	Name       string
	Ways       []wireWay
	TicketHash []byte
	Credential []byte
	Issuer     []byte
}

const membershipVersion = 1

func encodeMembership(m *stored) ([]byte, error) {
	ways, err := encodeWays(m.Ways)
	if err != nil {
		return nil, err
	}
	return encode(&wireMembership{
		Version:    membershipVersion,
		Authority:  m.Authority[:],
		Name:       m.Name,
		Ways:       ways,
		TicketHash: m.TicketHash[:],
		Credential: m.credential.raw,
		Issuer:     m.issuer,
	}), nil
}

// parseMembership reads and verifies a membership; expiry is not looked at.
func parseMembership(b []byte) (*stored, error) {
	var w wireMembership
	if err := decode(b, &w); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	m := &stored{Membership: Membership{Name: w.Name}}
	if w.Version != membershipVersion || len(w.Authority) != len(m.Authority) || len(w.TicketHash) != len(m.TicketHash) {
		return nil, ErrMalformed
	}
	copy(m.Authority[:], w.Authority)
	copy(m.TicketHash[:], w.TicketHash)
	var err error
	if m.Ways, err = decodeWays(w.Ways); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	if m.credential, err = parseCredential(w.Credential); err != nil {
		return nil, err
	}
	return m, m.seal(w.Issuer)
}

// seal checks that m is coherent, and takes over the issuer's history unless it
// has a longer one.
func (m *stored) seal(issuerHistory []byte) error {
	if m.Name != "" {
		if err := ValidName(m.Name); err != nil {
			return err
		}
	}
	h, err := parseHistory(issuerHistory)
	if err != nil {
		return fmt.Errorf("the authority's history: %w", err)
	}
	if m.issuer != nil {
		known, err := parseHistory(m.issuer)
		switch {
		case err != nil:
			return err
		case known.extends(h):
			h = known
		case !h.extends(known):
			return fmt.Errorf("the authority's history: %w", ErrFork)
		}
	}
	if m.credential.Issuer != m.Authority {
		return ErrIssuer
	}
	if err := m.credential.verify(h); err != nil {
		return err
	}
	m.issuer = h.raw
	return nil
}

// loadMembership returns nil and nil when there is none.
func (h *Home) loadMembership() (*stored, error) {
	path := h.path(membershipName)
	b, err := readPrivate(path, maxMembershipFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the membership: %w", err)
	}
	m, err := parseMembership(b)
	if err != nil {
		return nil, &FileError{path, fmt.Sprintf("is damaged (%v)", err), "move it away and enroll again"}
	}
	return m, nil
}

// Membership returns what the home joined; nil and nil when nothing yet.
func (h *Home) Membership() (*Membership, error) {
	m, err := h.loadMembership()
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	if m == nil {
		return nil, nil
	}
	return &m.Membership, nil
}

// Trust returns a new Trust of the authority that the home joined, with the
// history that it keeps of it: what a credential was verified by before this
// process began, and not only what others show it since. It trusts nobody when
// the home has joined nothing.
func (h *Home) Trust() (*Trust, error) {
	m, err := h.loadMembership()
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	if m == nil {
		return new(Trust), nil
	}
	t := NewTrust(m.Authority)
	if err := t.Learn(m.issuer); err != nil {
		return nil, err
	}
	return t, nil
}

// Join writes a membership with its credential, in one atomic step: after an
// error the home is what it was. A membership of the same authority is
// replaced, but not a longer history of it by a shorter one (ErrSignature,
// ErrFork); one of another is kept: ErrOtherAuthority. It leaves the live Self
// to the caller's Renew.
func (h *Home) Join(m *Membership, c *Credential, issuerHistory []byte) error {
	if err := h.join(m, c, issuerHistory); err != nil {
		return fmt.Errorf("identity: joining authority %s: %w", m.Authority.Short(), err)
	}
	return nil
}

func (h *Home) join(m *Membership, c *Credential, issuerHistory []byte) error {
	s, err := h.Self()
	if err != nil {
		return err
	}
	if c == nil {
		return fmt.Errorf("%w: there is no credential", ErrMalformed)
	}
	if c.Subject != s.ID() || c.Change != s.Latest() {
		return ErrSubject
	}
	next := &stored{Membership: *m, credential: c}
	return h.locked(func() error {
		before, err := h.loadMembership()
		if err != nil {
			return err
		}
		if before != nil {
			if before.Authority != m.Authority {
				return fmt.Errorf("%w, %s", ErrOtherAuthority, before.Authority.Short())
			}
			next.issuer = before.issuer
		}
		if err := next.seal(issuerHistory); err != nil {
			return err
		}
		b, err := encodeMembership(next)
		if err != nil {
			return err
		}
		return h.replace(membershipName, b)
	})
}

// Store writes a renewed credential into the membership, unless one is there
// that lasts longer. ErrNotMember, ErrIssuer, ErrSubject, and as Join for the
// history. It leaves the live Self to the caller's Renew.
func (h *Home) Store(c *Credential, issuerHistory []byte) error {
	if err := h.store(c, issuerHistory); err != nil {
		return fmt.Errorf("identity: storing the credential: %w", err)
	}
	return nil
}

func (h *Home) store(c *Credential, issuerHistory []byte) error {
	if c == nil {
		return fmt.Errorf("%w: there is none", ErrMalformed)
	}
	return h.locked(func() error {
		m, err := h.loadMembership()
		if err != nil {
			return err
		}
		if m == nil {
			return ErrNotMember
		}
		if c.Subject != m.credential.Subject {
			return ErrSubject
		}
		newer, err := c.follows(m.credential)
		if errors.Is(err, ErrOlder) {
			return nil
		}
		if !newer {
			return err
		}
		m.credential = c
		if err := m.seal(issuerHistory); err != nil {
			return err
		}
		b, err := encodeMembership(m)
		if err != nil {
			return err
		}
		return h.replace(membershipName, b)
	})
}

// Reload brings s, which is this home's, up to what other processes wrote: a
// rotated key, and a credential that lasts longer.
func (h *Home) Reload(s *Self) error {
	if err := h.reload(s); err != nil {
		return fmt.Errorf("identity: reading the home again: %w", err)
	}
	return nil
}

func (h *Home) reload(s *Self) error {
	state, err := h.load()
	if err != nil {
		return err
	}
	if state.history.id() != s.ID() {
		return ErrSubject
	}
	if err := s.adopt(state); err != nil || state.credential == nil {
		return err
	}
	if err := s.Renew(state.credential, state.issuer); !errors.Is(err, ErrOlder) {
		return err
	}
	return nil
}
