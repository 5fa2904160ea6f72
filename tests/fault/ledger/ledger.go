// Package ledger is a bank in PostgreSQL whose clients come through a tunnel that is cut again and again,
// and an audit that compares its books with what the clients were told.
//
// Each transaction moves money and enters itself under a number of its own; between them each client
// reads a report whose every row is known. Without a key on the number, one that was entered twice is seen.
package ledger

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	accounts = 16
	balance  = 1000000 // of each, at first
	rows     = 500     // of a report
	// again is how long a client waits for its next try: less than one in earnest would, as the figure
	// is how long the way takes.
	again = 5 * time.Millisecond
)

// Setup is what psql tells a server as its superuser before URL is of use there.
const Setup = "create role bank login;\ncreate database bank owner bank;\n"

// URL is that of the database that Setup makes, at a server or by a tunnel to it.
func URL(addr string) string {
	return "postgres://bank@" + addr + "/bank?sslmode=disable&connect_timeout=10"
}

// Prepare makes the bank anew in a database, in a schema of its own that is named fault_ledger.
func Prepare(ctx context.Context, url string) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return fmt.Errorf("preparing the ledger: %w", err)
	}
	defer conn.Close(ctx)
	if _, err = conn.Exec(ctx, fmt.Sprintf(`drop schema if exists fault_ledger cascade;
create schema fault_ledger;
create table fault_ledger.account (id int primary key, balance bigint not null);
create table fault_ledger.entry (number bigint not null, client int not null, payer int not null, payee int not null, amount bigint not null);
insert into fault_ledger.account select i, %d from generate_series(1, %d) i`, balance, accounts)); err != nil {
		return fmt.Errorf("preparing the ledger: %w", err)
	}
	return nil
}

// Ledger is what the clients have asked for and were told. Its methods are safe for concurrent use.
type Ledger struct {
	url  string
	next atomic.Int64 // numbers given out

	mu           sync.Mutex
	acknowledged []int64
	unanswered   map[int64]bool // asked for, and not acknowledged
	errors       int
	wrong        []string
	progress     chan struct{} // closed and replaced with each acknowledged transaction
}

// New is a ledger whose clients come by url, which leads through the tunnel.
func New(url string) *Ledger {
	return &Ledger{url: url, unanswered: make(map[int64]bool), progress: make(chan struct{})}
}

// Work is one client until ctx ends. An error is another connection; nothing is asked for twice.
func (l *Ledger) Work(ctx context.Context, client int) {
	r := rand.New(rand.NewPCG(uint64(client), 1))
	for ctx.Err() == nil {
		conn, err := pgx.Connect(ctx, l.url)
		if err != nil {
			l.failed()
			select {
			case <-time.After(again):
			case <-ctx.Done():
			}
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

func (l *Ledger) failed() {
	l.mu.Lock()
	l.errors++
	l.mu.Unlock()
}

func (l *Ledger) transfer(ctx context.Context, conn *pgx.Conn, client int, r *rand.Rand) error {
	number, payer, amount := l.next.Add(1), 1+r.IntN(accounts), 1+r.Int64N(100)
	payee := 1 + (payer+r.IntN(accounts-1))%accounts
	first, second := -amount, amount
	low, high := payer, payee
	if low > high { // in one order, or two would wait for one another
		low, high, first, second = high, low, second, first
	}
	l.mu.Lock()
	l.unanswered[number] = true
	l.mu.Unlock()
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	for _, step := range []struct {
		text string
		args []any
	}{
		{"insert into fault_ledger.entry values ($1, $2, $3, $4, $5)", []any{number, client, payer, payee, amount}},
		{"update fault_ledger.account set balance = balance + $1 where id = $2", []any{first, low}},
		{"update fault_ledger.account set balance = balance + $1 where id = $2", []any{second, high}},
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
	delete(l.unanswered, number)
	close(l.progress)
	l.progress = make(chan struct{})
	l.mu.Unlock()
	return nil
}

// report reads rows whose number and contents are known. One that ends early must say so.
func (l *Ledger) report(ctx context.Context, conn *pgx.Conn) error {
	got, err := conn.Query(ctx, "select i, repeat(chr(97 + i % 26), 50) from generate_series(1, $1) i", rows)
	if err != nil {
		return err
	}
	defer got.Close()
	n := 0
	for got.Next() {
		var i int
		var text string
		if err := got.Scan(&i, &text); err != nil {
			return err
		}
		n++
		if i != n || len(text) != 50 || text[0] != byte(97+n%26) || text[49] != text[0] {
			l.saw("row %d of a report is %d, %q", n, i, text)
		}
	}
	if err := got.Err(); err != nil {
		return err
	}
	if n != rows {
		l.saw("a report of %d rows came in good order with %d", rows, n)
	}
	return nil
}

func (l *Ledger) saw(format string, args ...any) {
	l.mu.Lock()
	l.wrong = append(l.wrong, fmt.Sprintf(format, args...))
	l.mu.Unlock()
}

// Await waits for n transactions that are asked for and acknowledged from now on, and says when the
// first was.
func (l *Ledger) Await(ctx context.Context, n int) (first time.Time, err error) {
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

// Counts is how many transactions were acknowledged, how many were asked for and never answered, and how
// many errors the clients saw.
func (l *Ledger) Counts() (acknowledged, unanswered, errors int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.acknowledged), len(l.unanswered), l.errors
}

// Audit compares the books with what the clients were told. It comes by url, past the tunnel, once Work
// has returned for all of them, waits for transactions that are still on their way, and returns all that
// is wrong.
func (l *Ledger) Audit(ctx context.Context, url string) (wrong []string, err error) {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return nil, fmt.Errorf("auditing the ledger: %w", err)
	}
	defer conn.Close(ctx) // and with it the transaction
	tx, err := conn.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err == nil {
		_, err = tx.Exec(ctx, "lock table fault_ledger.entry, fault_ledger.account in share mode") // no writer has it, too
	}
	if err != nil {
		return nil, fmt.Errorf("auditing the ledger: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	wrong = append(wrong, l.wrong...)
	saw := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	var number, amount int64
	var payer, payee int
	entered, moved := map[int64]int{}, map[int]int64{}
	books, err := tx.Query(ctx, "select number, payer, payee, amount from fault_ledger.entry")
	if err == nil {
		_, err = pgx.ForEachRow(books, []any{&number, &payer, &payee, &amount}, func() error {
			entered[number]++
			moved[payer] -= amount
			moved[payee] += amount
			return nil
		})
	}
	if err != nil {
		return nil, fmt.Errorf("auditing the entries: %w", err)
	}
	for _, number := range l.acknowledged {
		if n := entered[number]; n != 1 {
			saw("transaction %d was acknowledged and entered %d times", number, n)
		}
		delete(entered, number)
	}
	for number, n := range entered {
		if !l.unanswered[number] {
			saw("transaction %d was entered, and nobody was left without an answer to it", number)
		} else if n != 1 {
			saw("transaction %d was entered %d times", number, n)
		}
	}
	var id int
	var has, sum int64
	if books, err = tx.Query(ctx, "select id, balance from fault_ledger.account"); err == nil {
		_, err = pgx.ForEachRow(books, []any{&id, &has}, func() error {
			if sum += has; has != balance+moved[id] {
				saw("account %d has %d, and its entries make %d", id, has, balance+moved[id])
			}
			return nil
		})
	}
	if err != nil {
		return nil, fmt.Errorf("auditing the accounts: %w", err)
	}
	if sum != accounts*balance {
		saw("%d are in the bank, %d were", sum, accounts*balance)
	}
	return wrong, nil
}
