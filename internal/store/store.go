// Package store keeps records in one file: buckets of keys and values, changed in steps that happen wholly and for good, or not at all.
//
// Update is such a step: when it returns nil, all of its changes are on the disk (fsync); when it returns an error, when the process is
// killed in it, or when the disk is full, none of them is there. Steps follow one another, so "take this once" is a Get and a Put in one
// Update.
//
// The file belongs to one process at a time, and to its owner alone.
package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

const (
	// A process that holds the file for one short command lets go within this time. Without it bbolt waits for ever.
	openTimeout = time.Second

	// MaxKey and MaxValue are in bytes. Records are a few KiB; larger ones are a mistake of the caller.
	MaxKey   = 1 << 10
	MaxValue = 1 << 20

	maxSize = 1 << 30 // of the file: some hundred thousand members, and an end to what a flood of requests can take of the disk
)

// ErrClosed is what a closed store answers; errors.Is(err, fs.ErrClosed) holds as well.
var ErrClosed = fmt.Errorf("the store is closed: %w", fs.ErrClosed)

// HeldError says that another process has the store open.
type HeldError struct {
	Path string
	PID  int // 0 when it cannot be known, as for a process of another container
}

func (e *HeldError) Error() string {
	if e.PID == 0 {
		return fmt.Sprintf("the store %s is held by another process; stop it, or ask it through its control socket", e.Path)
	}
	return fmt.Sprintf("the store %s is held by process %d; stop it, or ask it through its control socket", e.Path, e.PID)
}

// AccessError says why a store's file is not only this user's, and what mends it.
type AccessError struct{ Problem string }

func (e *AccessError) Error() string { return e.Problem }

// Store is an open store. Its methods may be called by several goroutines at once.
type Store struct {
	db     *bbolt.DB
	path   string
	broken atomic.Pointer[error] // a step failed when it may have been on the disk already
}

// Open opens the store at path and makes it when there is none; its folder must exist. It refuses a file that belongs to another user, that
// others can read, or that is not a regular file. When another process holds the store for more than a second it returns a *HeldError.
func Open(path string) (*Store, error) {
	return openSize(path, maxSize)
}

func openSize(path string, size int) (*Store, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		err = create(path)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the store: %w", err)
	}
	db, err := openFile(path, size)
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, &HeldError{path, holder(path)}
	}
	if err != nil {
		return nil, fmt.Errorf("opening the store %s: %w", path, err)
	}
	return &Store{db: db, path: path}, nil
}

// create makes an empty store under another name and links it to path, so that path never holds half of one.
func create(path string) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.new") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	f.Close()
	db, err := openFile(f.Name(), maxSize)
	if err != nil {
		return err
	}
	if err := db.Close(); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// openFile opens an existing file. What bbolt does not expect of a file ends in a panic or, as the file is mapped into memory, in a fault;
// here both are errors.
func openFile(path string, size int) (db *bbolt.DB, err error) {
	var file *os.File
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			// bbolt's record of the file is lost, and its mapping stays: closing the file alone would leave the lock to it.
			syscall.Flock(int(file.Fd()), syscall.LOCK_UN)
			file.Close()
			db, err = nil, fmt.Errorf("the file is damaged: %v", p)
		}
	}()
	db, err = bbolt.Open(path, 0o600, &bbolt.Options{
		Timeout:      openTimeout,
		FreelistType: bbolt.FreelistMapType,
		MaxSize:      size,
		OpenFile: func(path string, flag int, _ os.FileMode) (f *os.File, err error) {
			if f, err = os.OpenFile(path, flag&^os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0); err != nil {
				return nil, err
			}
			if err = checkFile(f); err != nil {
				f.Close()
				return nil, err
			}
			file = f
			return f, nil
		},
	})
	if err != nil {
		return nil, err
	}
	if err := checkSize(db, file); err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

func checkFile(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return &AccessError{"it is not a regular file"}
	}
	if uid := info.Sys().(*syscall.Stat_t).Uid; int(uid) != os.Geteuid() {
		return &AccessError{fmt.Sprintf("it belongs to user %d and this process runs as user %d", uid, os.Geteuid())}
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return &AccessError{fmt.Sprintf("others can enter it (mode %04o); chmod 600 %s", mode, f.Name())}
	}
	return nil
}

// checkSize finds a file that was cut short, before a read beyond its end is a fault.
func checkSize(db *bbolt.DB, f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return db.View(func(tx *bbolt.Tx) error {
		if info.Size() < tx.Size() {
			return fmt.Errorf("the file is damaged: it has %d of %d bytes", info.Size(), tx.Size())
		}
		return nil
	})
}

// Close waits for the steps under way. A second Close does nothing.
func (s *Store) Close() error {
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("closing the store %s: %w", s.path, err)
	}
	return nil
}

// Update calls f and makes its changes in one step: all of them, on the disk, when Update returns nil, otherwise none. It returns f's error
// as it is. f must not use the Store itself, nor keep the Tx. Updates wait for one another, and readers wait for none.
func (s *Store) Update(f func(*Tx) error) error {
	if err := s.broken.Load(); err != nil {
		return *err
	}
	var own error // f's
	step := 0
	err := s.db.Update(func(tx *bbolt.Tx) error {
		step = tx.ID()
		own = f(&Tx{tx: tx, store: s})
		return own
	})
	switch {
	case own != nil:
		return own
	case err == nil:
		return nil
	case step != 0:
		s.checkStep(step, err)
	}
	return s.fail("writing", err)
}

// checkStep stops the store when a step that failed is nevertheless in the file: its last write went through and the fsync after it did
// not, and what the disk has is unknown until the file is read again.
func (s *Store) checkStep(step int, cause error) {
	err := s.db.View(func(tx *bbolt.Tx) error {
		if tx.ID() >= step {
			return fmt.Errorf("it is not known whether the last change is on the disk; restart to read it again: %w", cause)
		}
		return nil
	})
	if err != nil {
		err = s.fail("writing", err)
		s.broken.CompareAndSwap(nil, &err)
	}
}

// View calls f with one state of the store, in which it can read and not write.
func (s *Store) View(f func(*Tx) error) error {
	if err := s.broken.Load(); err != nil {
		return *err
	}
	var own error
	err := s.db.View(func(tx *bbolt.Tx) error {
		own = f(&Tx{tx: tx, store: s})
		return own
	})
	if own != nil || err == nil {
		return own
	}
	return s.fail("reading", err)
}

// Get returns a copy of the value, nil when there is none.
func (s *Store) Get(bucket string, key []byte) (value []byte, err error) {
	err = s.View(func(tx *Tx) error {
		value, err = tx.Get(bucket, key)
		return err
	})
	return value, err
}

// Put is an Update of one Tx.Put.
func (s *Store) Put(bucket string, key, value []byte) error {
	return s.Update(func(tx *Tx) error { return tx.Put(bucket, key, value) })
}

// Delete is an Update of one Tx.Delete.
func (s *Store) Delete(bucket string, key []byte) error {
	return s.Update(func(tx *Tx) error { return tx.Delete(bucket, key) })
}

// Scan is a View of one Tx.Scan.
func (s *Store) Scan(bucket string, f func(key, value []byte) error) error {
	return s.View(func(tx *Tx) error { return tx.Scan(bucket, f) })
}

func (s *Store) fail(doing string, err error) error {
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		return fmt.Errorf("%s %s: %w", doing, s.path, ErrClosed)
	}
	return fmt.Errorf("%s the store %s: %w", doing, s.path, err)
}

// Tx is the store as seen in one Update or View. It is used by the goroutine that was given it, until that returns.
type Tx struct {
	tx      *bbolt.Tx
	store   *Store
	changes int // so far, for a scan that makes some
}

// Get returns a copy of the value, nil when there is none. The copy of an empty value is not nil.
func (t *Tx) Get(bucket string, key []byte) ([]byte, error) {
	b := t.tx.Bucket([]byte(bucket))
	if b == nil {
		return nil, nil
	}
	value := b.Get(key)
	if value == nil {
		return nil, nil
	}
	return append([]byte{}, value...), nil
}

// Put sets the value of key, at most MaxValue and 1 to MaxKey bytes. A bucket, named by 1 to MaxKey bytes, is made by the first Put to it.
func (t *Tx) Put(bucket string, key, value []byte) error {
	if len(bucket) > MaxKey || len(key) > MaxKey || len(value) > MaxValue {
		return t.store.fail("writing", fmt.Errorf("bucket, key and value have %d, %d and %d bytes; the limits are %d, %d and %d",
			len(bucket), len(key), len(value), MaxKey, MaxKey, MaxValue))
	}
	t.changes++
	b, err := t.tx.CreateBucketIfNotExists([]byte(bucket))
	if err != nil {
		return t.store.fail("writing", err)
	}
	// bbolt refers to the value until the step ends, and to no key but its own copy.
	if err := b.Put(key, bytes.Clone(value)); err != nil {
		return t.store.fail("writing", err)
	}
	return nil
}

// Delete removes key. That there is none is no error.
func (t *Tx) Delete(bucket string, key []byte) error {
	b := t.tx.Bucket([]byte(bucket))
	if b == nil {
		return nil
	}
	t.changes++
	if err := b.Delete(key); err != nil {
		return t.store.fail("writing", err)
	}
	return nil
}

// Scan calls f for each key of the bucket in the order of their bytes until f returns an error, which it returns. key and value are valid
// until f returns or changes something, and must not be written to. f may change the bucket: the scan goes on with the next key that is there then.
func (t *Tx) Scan(bucket string, f func(key, value []byte) error) error {
	return t.ScanPrefix(bucket, nil, f)
}

// ScanPrefix is Scan for the keys that begin with prefix.
func (t *Tx) ScanPrefix(bucket string, prefix []byte, f func(key, value []byte) error) error {
	b := t.tx.Bucket([]byte(bucket))
	if b == nil {
		return nil
	}
	var at []byte // the key that f was called with
	c := b.Cursor()
	key, value := c.Seek(prefix)
	for key != nil && bytes.HasPrefix(key, prefix) {
		if t.tx.Writable() {
			at = append(at[:0], key...)
		}
		before := t.changes
		if err := f(key, value); err != nil {
			return err
		}
		if t.changes == before {
			key, value = c.Next()
			continue
		}
		c = b.Cursor() // a cursor does not survive changes
		if key, value = c.Seek(at); bytes.Equal(key, at) {
			key, value = c.Next()
		}
	}
	return nil
}
