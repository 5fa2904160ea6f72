package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/portal-tunnel/portal/tests/fault/ledger"
)

// bank runs a ledger's clients through whatever is between, and compares the books with what they were told.
func bank(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("ledger", flag.ContinueOnError)
	through := flags.String("through", "", "where clients connect: a PostgreSQL `URL` that leads through the tunnel")
	past := flags.String("past", "", "the same database past the tunnel; its schema named fault_ledger is made anew")
	clients := flags.Int("clients", 8, "`N` at once")
	last := flags.Duration("for", 30*time.Second, "work for `TIME`, or until ^C")
	if err := flags.Parse(args); err != nil {
		return asUsage(err)
	}
	if *through == "" || *past == "" || *clients < 1 {
		return misuse("ledger: it needs -through URL and -past URL, and a client")
	}
	if err := ledger.Prepare(ctx, *past); err != nil {
		return err
	}
	l := ledger.New(*through)
	limited, cancel := context.WithTimeout(ctx, *last)
	defer cancel()
	var all sync.WaitGroup
	for i := range *clients {
		all.Go(func() { l.Work(limited, i) })
	}
	all.Wait()
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), auditTime)
	defer cancel()
	wrong, err := l.Audit(ctx, *past)
	if err != nil {
		return err
	}
	acknowledged, unanswered, failed := l.Counts()
	fmt.Printf("%d transactions acknowledged, %d without an answer, %d errors, %d wrong\n", acknowledged, unanswered, failed, len(wrong))
	for _, w := range wrong {
		fmt.Fprintln(os.Stderr, "fault:", w)
	}
	switch {
	case len(wrong) > 0:
		return fmt.Errorf("the books and the clients differ in %d places", len(wrong))
	case acknowledged == 0:
		return fmt.Errorf("no transaction was acknowledged: does anything listen at %s?", *through)
	}
	return nil
}

// auditTime is given to the audit alone: ^C ends the work, not that.
const auditTime = time.Minute
