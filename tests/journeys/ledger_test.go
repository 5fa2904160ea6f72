package journeys_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/examples/postgres/server"
	"github.com/portal-tunnel/portal/tests/fault/ledger"
)

// Whichever process is killed under eight clients of a bank, no result is wrong, and everything works
// again once the process is back, by itself.
func TestNoKillMakesALedgerWrong(t *testing.T) {
	t.Parallel()
	kills := 2
	if long() {
		kills = 100
	}
	db, err := server.Start(t.Context(), &server.Options{MaxConnections: 100, Setup: ledger.Setup})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if err := ledger.Prepare(t.Context(), ledger.URL(db.Addr())); err != nil {
		t.Fatal(err)
	}
	w := newRow(t, rowOptions{to: db.Addr()})
	l := ledger.New(ledger.URL(w.addr))
	ctx, stop := context.WithCancel(w.ctx)
	defer stop()
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() { l.Work(ctx, i) })
	}
	backends := func() int {
		var n int
		text, err := db.Admin(w.ctx, "select count(*) from pg_stat_activity where usename = 'bank';")
		if _, scan := fmt.Sscan(text, &n); err != nil || scan != nil {
			t.Fatalf("counting the sessions: %q, %v", text, errors.Join(err, scan))
		}
		return n
	}
	await := func(n int) time.Time {
		t.Helper()
		limited, cancel := context.WithTimeout(w.ctx, patience)
		defer cancel()
		first, err := l.Await(limited, n)
		if err != nil {
			t.Fatalf("nothing works again: %v\nrelay: %s\noutlet: %s\ninlet: %s", err, tail(w.logged(w.relay, ``)), tail(w.logged(w.out, ``)), tail(w.logged(w.in, ``)))
		}
		return first
	}
	await(50)
	for _, victim := range []string{"relay", "outlet", "inlet"} {
		var back []time.Duration
		for range kills {
			await(1 + rand.IntN(100)) // somewhere in their work
			p := w.each()[victim]
			kill(t, p)
			begin := time.Now()
			switch victim {
			case "relay":
				w.startRelay()
			case "outlet":
				w.startOutlet()
			case "inlet":
				w.startInlet()
			}
			back = append(back, await(20).Sub(begin))
		}
		slices.Sort(back)
		at := func(part float64) time.Duration { return back[int(part*float64(len(back)-1)+0.5)] }
		t.Logf("F-05: %s killed %d times: from its start to the first transaction asked for and acknowledged since: median %v, p99 %v, most %v",
			victim, kills, at(0.5).Round(time.Millisecond), at(0.99).Round(time.Millisecond), at(1).Round(time.Millisecond))
		bar(t, at(0.99) <= time.Second, "p99 of %s is more than a second", victim)
	}
	stop()
	clients.Wait()
	// A backend in the middle of a statement sees that its client is gone behind it.
	for end := time.Now().Add(patience); backends() > 0; {
		if time.Now().After(end) {
			t.Errorf("%d sessions are left in PostgreSQL", backends())
			break
		}
	}
	limited, cancel := context.WithTimeout(w.ctx, patience)
	defer cancel()
	wrong, err := l.Audit(limited, ledger.URL(db.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range wrong {
		t.Error(w)
	}
	acknowledged, unanswered, failed := l.Counts()
	t.Logf("F-05: %d transactions acknowledged, %d without an answer, %d errors, %d wrong", acknowledged, unanswered, failed, len(wrong))
}

// tail is the end of a log, for a failure.
func tail(lines []string) string {
	text := ""
	for _, line := range lines[max(len(lines)-10, 0):] {
		text += "\n\t" + line
	}
	return text
}
