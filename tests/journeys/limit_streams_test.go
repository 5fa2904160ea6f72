package journeys_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var quiet = []string{"--log-level", "warn", "--max-streams", "20000"}

// leftBehind compares what a row lists when it is ended with one of the same kind that served a single
// stream: a process may have a few goroutines more that the clock starts, such as of a probe, and none
// of thousands of streams.
func leftBehind(t testing.TB, used *row) {
	t.Helper()
	o := used.o
	fresh := newRow(t, o)
	ready(t, fresh.addr)
	before := fresh.stand()
	for role, p := range used.each() {
		settled(t, p, before.descriptors[role])
	}
	usual, now := fresh.quit(), used.quit()
	for _, role := range slices.Sorted(maps.Keys(now)) {
		t.Logf("%s: %d descriptors and %d goroutines, as after one stream", role, before.descriptors[role], len(now[role]))
		if len(now[role]) > len(usual[role])+3 {
			t.Errorf("%s: %d goroutines, %d after one stream", role, len(now[role]), len(usual[role]))
			kinds := map[string]int{}
			for _, g := range now[role] {
				kinds[addresses.ReplaceAllString(g, "")]++
			}
			for _, g := range usual[role] {
				kinds[addresses.ReplaceAllString(g, "")]--
			}
			for g, n := range kinds {
				if n != 0 {
					t.Logf("%+d × %s", n, g)
				}
			}
		}
	}
}

// addresses are what a listed goroutine is told apart by from its like.
var addresses = regexp.MustCompile(`(gp|m|mp)=\S+ `)

// One stream after another, a few at a time, all through the one channel.
func TestAMillionStreamsOneAfterAnotherLeaveNothing(t *testing.T) {
	t.Parallel()
	n := int64(5000)
	if long() {
		n = 1000000
	}
	w := newRow(t, rowOptions{to: elsewhere(t), outlet: quiet, inlet: quiet})
	var opened atomic.Int64
	quarter := make(map[string]int)
	var once sync.Once
	var all sync.WaitGroup
	begin := time.Now()
	for range 4 {
		all.Go(func() {
			for {
				i := opened.Add(1)
				if i > n {
					return
				}
				c, err := connect(w.addr, []byte("E"))
				if err == nil {
					err = echo(c)
					c.Close()
				}
				if err != nil {
					t.Errorf("stream %d: %v", i, err)
					return
				}
				if i == n/4 {
					once.Do(func() { quarter = w.stand().memory })
				}
			}
		})
	}
	all.Wait()
	took := time.Since(begin)
	end := w.stand().memory
	if lanes := w.logged(w.relay, `"a lane is joined","name":"db"`); len(lanes) != 1 {
		t.Errorf("they went through %d lanes, not one", len(lanes))
	}
	for role, m := range end {
		if m-quarter[role] > 8<<20 {
			t.Errorf("%s has grown by %.1f MiB since a quarter of them", role, mib(m-quarter[role]))
		}
	}
	t.Logf("F-14: %d streams in %.0f s (%.0f a second) through one channel; memory at the end: %s (before: after a quarter of them)", n, took.Seconds(), float64(n)/took.Seconds(), mebibytes(end, quarter))
	leftBehind(t, w)
}

// Many streams that ask now and then, while others come and go.
func TestManyStreamsThatAskNowAndThenGetTheirAnswersAndLeaveNothing(t *testing.T) {
	t.Parallel()
	streams, lasts, every, churn := 200, 20*time.Second, time.Second, 20
	if long() {
		streams, lasts, every, churn = 10000, 15*time.Minute, 10*time.Second, 100
	}
	w := newRow(t, rowOptions{to: elsewhere(t), outlet: quiet, inlet: quiet, env: []string{"GODEBUG=gctrace=1"}})
	ctx, cancel := context.WithTimeout(w.ctx, lasts)
	defer cancel()
	var asked, came atomic.Int64
	var slowest atomic.Int64
	ask := func(c io.ReadWriter, r *rand.ChaCha8, sent, got []byte) error {
		r.Read(sent)
		begin := time.Now()
		if _, err := c.Write(sent); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, got); err != nil {
			return err
		}
		if !bytes.Equal(sent, got) {
			return fmt.Errorf("other bytes came back")
		}
		took := int64(time.Since(begin))
		for was := slowest.Load(); took > was && !slowest.CompareAndSwap(was, took); {
			was = slowest.Load()
		}
		asked.Add(1)
		return nil
	}
	var all sync.WaitGroup
	for i := range streams {
		c, err := connect(w.addr, []byte("E"))
		if err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		c.SetDeadline(time.Time{})
		all.Go(func() {
			defer c.Close()
			r := rand.NewChaCha8([32]byte{byte(i), byte(i >> 8)})
			sent, got := make([]byte, 1<<10), make([]byte, 1<<10)
			wait := time.NewTimer(time.Duration(i) * every / time.Duration(streams))
			defer wait.Stop()
			for {
				select {
				case <-wait.C:
					wait.Reset(every)
				case <-ctx.Done():
					return
				}
				if err := ask(c, r, sent, got); err != nil {
					t.Errorf("stream %d: %v", i, err)
					return
				}
			}
		})
	}
	all.Go(func() {
		tick := time.NewTicker(time.Second / time.Duration(churn))
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			all.Go(func() {
				c, err := connect(w.addr, []byte("E"))
				if err == nil {
					err = ask(c, rand.NewChaCha8([32]byte{99}), make([]byte, 1<<10), make([]byte, 1<<10))
					c.Close()
				}
				if err != nil {
					t.Errorf("one that comes and goes: %v", err)
				}
				came.Add(1)
			})
		}
	})
	all.Wait()
	var heaps []string
	for _, role := range []string{"inlet", "outlet", "relay"} {
		first, last := w.heap(role, 1, 3), w.heap(role, 2, 3)
		heaps = append(heaps, fmt.Sprintf("%s %d MB, then %d", role, first, last))
		// In whole MB: of little memory one more or less is no growth.
		if long() && last > first+first/20+2 {
			t.Errorf("%s: the live heap was %d MB in the second third and %d in the last", role, first, last)
		}
	}
	t.Logf("F-13: %d streams for %v: %d asked and answered, %d more came and went, 0 wrong; the slowest took %v; live heap in the second third and the last: %s; %s",
		streams, lasts, asked.Load(), came.Load(), time.Duration(slowest.Load()).Round(time.Millisecond), strings.Join(heaps, "; "), mebibytes(w.stand().memory, nil))
	leftBehind(t, w)
}

// heap is the median of the live heap, in MB, that the collector told of in the i-th of n parts of a
// process's collections.
func (w *row) heap(role string, i, n int) int {
	var all []int
	for _, line := range w.logged(w.each()[role], `^gc \d+ @`) {
		// gc 7 @1.2s 0%: … clock, … cpu, 4->4->2 MB, …: before, after, live
		before, _, _ := strings.Cut(line, " MB, ")
		var live int
		if _, err := fmt.Sscan(before[strings.LastIndex(before, "->")+2:], &live); err != nil {
			w.t.Fatalf("%s: %v", line, err)
		}
		all = append(all, live)
	}
	part := all[len(all)*i/n : len(all)*(i+1)/n]
	if len(part) == 0 {
		return 0
	}
	slices.Sort(part)
	return part[len(part)/2]
}
