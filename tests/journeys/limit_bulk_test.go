package journeys_test

import (
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// flood sends n bytes by each of so many streams and gets as many back, all at once; both ways are
// compared by hash.
func flood(t testing.TB, addr string, streams int, n int64) {
	t.Helper()
	var all sync.WaitGroup
	for i := range streams {
		all.Go(func() {
			c, err := connect(addr, []byte("E"))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(30 * time.Minute))
			sent, got := sha256.New(), sha256.New()
			var up sync.WaitGroup
			up.Go(func() {
				if _, err := io.CopyN(io.MultiWriter(c, sent), rand.NewChaCha8([32]byte{byte(i)}), n); err != nil {
					t.Errorf("stream %d, sending: %v", i, err)
				}
				c.(*net.TCPConn).CloseWrite()
			})
			k, err := io.Copy(got, c)
			up.Wait()
			if a, b := sent.Sum(nil), got.Sum(nil); err != nil || k != n || string(a) != string(b) {
				t.Errorf("stream %d: %d of %d bytes came back, hashes %x and %x: %v", i, k, n, a, b, err)
			}
		})
	}
	all.Wait()
}

// Through the relay, and by as much memory as a few of them took.
func TestBulkOfEightStreamsIsUnchangedAndHeldByNobody(t *testing.T) {
	t.Parallel()
	const streams = 8
	each := int64(8 << 20)
	if long() {
		each = 10 << 30 / streams
	}
	w := newRow(t, rowOptions{to: elsewhere(t)})
	flood(t, w.addr, streams, 8<<20) // windows have grown, pools are filled
	before := w.stand()
	w.peaks()
	begin := time.Now()
	flood(t, w.addr, streams, each)
	took := time.Since(begin)
	grown := func() map[string]int {
		after := w.mostSince()
		for role, most := range after {
			if grown := most - before.memory[role]; grown > 16<<20 {
				t.Errorf("%s has grown by %d KiB at most", role, grown>>10)
			}
		}
		return after
	}
	t.Logf("F-03: %d MiB each way by %d streams in %.1f s; the most memory: %s", streams*each>>20, streams, took.Seconds(), mebibytes(grown(), before.memory))
	if long() {
		const one = 9 << 29 // 4.5 GiB
		flood(t, w.addr, 1, one)
		t.Logf("F-03: %d MiB each way by one stream; the most memory: %s", one>>20, mebibytes(grown(), before.memory))
	}
}
