package ledger_test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/portal-tunnel/portal/examples/postgres/server"
	"github.com/portal-tunnel/portal/tests/fault/ledger"
)

// An audit that finds nothing is worth as much as what it would have found.
func TestAnAuditFindsWhatIsWrong(t *testing.T) {
	db, err := server.Start(t.Context(), &server.Options{Setup: ledger.Setup})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	url := ledger.URL(db.Addr())
	if err := ledger.Prepare(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	l := ledger.New(url)
	ctx, stop := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	for i := range 2 {
		clients.Go(func() { l.Work(ctx, i) })
	}
	limited, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := l.Await(limited, 20); err != nil {
		t.Fatal(err)
	}
	stop()
	clients.Wait()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	for _, c := range []struct{ name, harm, mend, want string }{
		{"nothing", "", "", ""},
		{"an acknowledged one is lost", "create table kept as select * from fault_ledger.entry where number = 1; delete from fault_ledger.entry where number = 1",
			"insert into fault_ledger.entry select * from kept", "transaction 1 was acknowledged and entered 0 times"},
		{"one is entered twice", "insert into fault_ledger.entry select * from kept",
			"delete from fault_ledger.entry where number = 1; insert into fault_ledger.entry select * from kept", "transaction 1 was acknowledged and entered 2 times"},
		{"one that nobody asked for", "insert into fault_ledger.entry values (-1, 0, 1, 2, 5)",
			"delete from fault_ledger.entry where number = -1", "transaction -1 was entered, and nobody was left without an answer to it"},
		{"money from nowhere", "update fault_ledger.account set balance = balance + 1 where id = 3",
			"update fault_ledger.account set balance = balance - 1 where id = 3", "are in the bank"},
		{"money in the wrong place", "update fault_ledger.account set balance = balance + case id when 3 then 1 else -1 end where id in (3, 4)",
			"update fault_ledger.account set balance = balance - case id when 3 then 1 else -1 end where id in (3, 4)", "account 3 has"},
		{"nothing again", "", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := conn.Exec(t.Context(), c.harm); err != nil {
				t.Fatal(err)
			}
			wrong, err := l.Audit(t.Context(), url)
			if err != nil {
				t.Fatal(err)
			}
			if c.want == "" && len(wrong) > 0 || c.want != "" && !slices.ContainsFunc(wrong, func(w string) bool { return strings.Contains(w, c.want) }) {
				t.Errorf("it says %q, want %q", wrong, c.want)
			}
			if _, err := conn.Exec(t.Context(), c.mend); err != nil {
				t.Fatal(err)
			}
		})
	}
}
