package journeys_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/portal-tunnel/portal/examples/postgres/server"
)

// A ledger is a bank whose clients come through a tunnel that is cut again and again. Each transaction
// moves money and enters itself under a number of its own; between them each client reads a report
// whose every row is known. Without a key on the number, one that was entered twice is seen.
const ledgerSchema = `
create role bank login;
create database bank owner bank;
\connect bank bank
create table account (id int primary key, balance bigint not null);
create table entry (number bigint not null, client int not null, payer int not null, payee int not null, amount bigint not null);
insert into account select i, 1000000 from generate_series(1, 16) i;
`

const (
	ledgerAccounts = 16
	ledgerBalance  = 1000000
	ledgerReport   = 500 // rows
)

type ledger struct {
	addr string
	next atomic.Int64 // numbers given out

	mu           sync.Mutex
	acknowledged []int64
	maybe        map[int64]bool // asked for, never answered
	errors       int
	wrong        []string
	progress     chan struct{} // closed and replaced with each acknowledged transaction
}

func newLedger(addr string) *ledger {
	return &ledger{addr: addr, maybe: make(map[int64]bool), progress: make(chan struct{})}
}

// work is one client until ctx ends. An error is another connection; nothing is asked for twice.
func (l *ledger) work(ctx context.Context, client int) {
	r := rand.New(rand.NewPCG(uint64(client), 1))
	for ctx.Err() == nil {
		conn, err := pgx.Connect(ctx, "postgres://bank@"+l.addr+"/bank?sslmode=disable&connect_timeout=10")
		if err != nil {
			l.failed()
			// As a client in earnest would, though sooner: the figure is how long the way takes.
			time.Sleep(5 * time.Millisecond)
			continue
		}
		for err == nil && ctx.Err() == nil {
			if err = l.transfer(ctx, conn, client, r); err == nil {
				err = l.report(ctx, conn)
			}
		}
		if err != nil && ctx.Err() == nil {
			l.failed()
		}
		// Not in good order: that would wait for an answer.
		conn.PgConn().Conn().Close()
	}
}

func (l *ledger) failed() {
	l.mu.Lock()
	l.errors++
	l.mu.Unlock()
}

func (l *ledger) transfer(ctx context.Context, conn *pgx.Conn, client int, r *rand.Rand) error {
	number, payer, amount := l.next.Add(1), 1+r.IntN(ledgerAccounts), 1+r.Int64N(100)
	payee := 1 + (payer+r.IntN(ledgerAccounts-1))%ledgerAccounts
	first, second := -amount, amount
	low, high := payer, payee
	if low > high { // in one order, or two would wait for one another
		low, high, first, second = high, low, second, first
	}
	l.mu.Lock()
	l.maybe[number] = true
	l.mu.Unlock()
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	for _, step := range []struct {
		text string
		args []any
	}{
		{"insert into entry values ($1, $2, $3, $4, $5)", []any{number, client, payer, payee, amount}},
		{"update account set balance = balance + $1 where id = $2", []any{first, low}},
		{"update account set balance = balance + $1 where id = $2", []any{second, high}},
	} {
		tag, err := tx.Exec(ctx, step.text, step.args...)
		if err != nil {
			return err
		}
		if tag.RowsAffected() != 1 {
			l.saw("transaction %d: %s of %d rows", number, step.text, tag.RowsAffected())
		}
	}
	if err := tx.Commit(ctx); err != nil {
		return err
	}
	l.mu.Lock()
	l.acknowledged = append(l.acknowledged, number)
	delete(l.maybe, number)
	close(l.progress)
	l.progress = make(chan struct{})
	l.mu.Unlock()
	return nil
}

// report reads rows whose number and contents are known. One that ends early must say so.
func (l *ledger) report(ctx context.Context, conn *pgx.Conn) error {
	rows, err := conn.Query(ctx, "select i, repeat(chr(97 + i % 26), 50) from generate_series(1, $1) i", ledgerReport)
	if err != nil {
		return err
	}
	defer rows.Close()
	n := 0
	for rows.Next() {
		var i int
		var text string
		if err := rows.Scan(&i, &text); err != nil {
			return err
		}
		n++
		if i != n || len(text) != 50 || text[0] != byte(97+n%26) || text[49] != text[0] {
			l.saw("row %d of a report is %d, %q", n, i, text)
		}
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if n != ledgerReport {
		l.saw("a report of %d rows came in good order with %d", ledgerReport, n)
	}
	return nil
}

func (l *ledger) saw(format string, args ...any) {
	l.mu.Lock()
	l.wrong = append(l.wrong, fmt.Sprintf(format, args...))
	l.mu.Unlock()
}

// await waits for n transactions that are asked for and acknowledged from now on, and says when the
// first was.
func (l *ledger) await(ctx context.Context, n int) (first time.Time, err error) {
	after := l.next.Load() // numbers up to here were asked for before
	for {
		l.mu.Lock()
		seen, progress := 0, l.progress
		for i := len(l.acknowledged) - 1; i >= 0 && i >= len(l.acknowledged)-100; i-- {
			if l.acknowledged[i] > after {
				seen++
			}
		}
		l.mu.Unlock()
		if seen > 0 && first.IsZero() {
			first = time.Now()
		}
		if seen >= n {
			return first, nil
		}
		select {
		case <-progress:
		case <-ctx.Done():
			return first, ctx.Err()
		}
	}
}

// audit compares the books with what the clients were told, past the tunnel.
func (l *ledger) audit(t testing.TB, db *server.Server) {
	t.Helper()
	for _, w := range l.wrong {
		t.Error(w)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := pgx.Connect(ctx, "postgres://bank@"+db.Addr()+"/bank?sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	rows, err := conn.Query(ctx, "select number, payer, payee, amount from entry")
	if err != nil {
		t.Fatal(err)
	}
	entered, balance := map[int64]int{}, map[int]int64{}
	for rows.Next() {
		var number, amount int64
		var payer, payee int
		if err := rows.Scan(&number, &payer, &payee, &amount); err != nil {
			t.Fatal(err)
		}
		entered[number]++
		balance[payer] -= amount
		balance[payee] += amount
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	for _, number := range l.acknowledged {
		if n := entered[number]; n != 1 {
			t.Errorf("transaction %d was acknowledged and entered %d times", number, n)
		}
		delete(entered, number)
	}
	for number, n := range entered {
		if !l.maybe[number] || n != 1 {
			t.Errorf("transaction %d was entered %d times; nobody was left without an answer to it: %v", number, n, !l.maybe[number])
		}
	}
	var sum int64
	if rows, err = conn.Query(ctx, "select id, balance from account"); err != nil {
		t.Fatal(err)
	}
	for rows.Next() {
		var id int
		var got int64
		if err := rows.Scan(&id, &got); err != nil {
			t.Fatal(err)
		}
		if sum += got; got != ledgerBalance+balance[id] {
			t.Errorf("account %d has %d, and its entries make %d", id, got, ledgerBalance+balance[id])
		}
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	if sum != ledgerAccounts*ledgerBalance {
		t.Errorf("%d are in the bank, %d were", sum, ledgerAccounts*ledgerBalance)
	}
}

// Whichever process is killed under eight clients of a bank, no result is wrong, and everything works
// again once the process is back, by itself.
func TestNoKillMakesALedgerWrong(t *testing.T) {
	t.Parallel()
	kills := 2
	if long() {
		kills = 100
	}
	db, err := server.Start(t.Context(), &server.Options{MaxConnections: 100, Setup: ledgerSchema})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	w := newRow(t, rowOptions{to: db.Addr()})
	l := newLedger(w.addr)
	ctx, stop := context.WithCancel(w.ctx)
	defer stop()
	var clients sync.WaitGroup
	for i := range 8 {
		clients.Go(func() { l.work(ctx, i) })
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
		first, err := l.await(limited, n)
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
	l.audit(t, db)
	t.Logf("F-05: %d transactions acknowledged, %d without an answer, %d errors, 0 wrong", len(l.acknowledged), len(l.maybe), l.errors)
}

// tail is the end of a log, for a failure.
func tail(lines []string) string {
	text := ""
	for _, line := range lines[max(len(lines)-10, 0):] {
		text += "\n\t" + line
	}
	return text
}
