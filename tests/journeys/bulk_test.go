package journeys_test

import (
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// Both directions at once, half-closed at the end, compared by hash.
func TestBulkArrivesUnchangedBothWays(t *testing.T) {
	size := int64(1 << 30)
	if long() {
		size = 5 << 30 // beyond what 32 bits count
	}
	s := newService(t)
	w := newWay(t, s.addr())
	c := dial(t, w.addr, []byte("E"))
	c.SetDeadline(time.Now().Add(10 * time.Minute))
	var sent, got hash.Hash = sha256.New(), sha256.New()
	var all sync.WaitGroup
	all.Go(func() {
		source := rand.NewChaCha8([32]byte{1})
		if _, err := io.CopyN(io.MultiWriter(c, sent), source, size); err != nil {
			t.Errorf("sending: %v", err)
		}
		c.(*net.TCPConn).CloseWrite()
	})
	n, err := io.Copy(got, c)
	all.Wait()
	if err != nil || n != size {
		t.Fatalf("%d of %d bytes came back: %v", n, size, err)
	}
	if a, b := hex.EncodeToString(sent.Sum(nil)), hex.EncodeToString(got.Sum(nil)); a != b {
		t.Fatalf("sent %s, got %s", a, b)
	}
}
