package journeys_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// An outlet leaves a PostgreSQL of 100 connections some for its owner, however many come through it at
// once; whoever finds no place is told so in its protocol, and nobody who has one notices.
func TestThreeHundredClientsLeavePostgresToItsOwner(t *testing.T) {
	t.Parallel()
	db := postgres(t, 100)
	w := newRow(t, rowOptions{to: db.Addr(), inlet: []string{"--kind", "pg"}})
	connect := func(addr string) (*pgx.Conn, error) {
		ctx, cancel := context.WithTimeout(w.ctx, patience)
		defer cancel()
		return pgx.Connect(ctx, "postgres://bench@"+addr+"/bench?sslmode=disable")
	}
	const clients, places = 300, 90
	var mu sync.Mutex
	var in []*pgx.Conn
	said := map[string]int{}
	var all sync.WaitGroup
	for range clients {
		all.Go(func() {
			c, err := connect(w.addr)
			mu.Lock()
			defer mu.Unlock()
			var told *pgconn.PgError
			switch {
			case err == nil:
				in = append(in, c)
			case errors.As(err, &told):
				said[told.Code+" "+told.Message]++
			default:
				said[err.Error()]++
			}
		})
	}
	all.Wait()
	defer func() {
		for _, c := range in {
			c.Close(context.Background())
		}
	}()
	if len(in) != places {
		t.Errorf("%d clients are in, want %d", len(in), places)
	}
	for text, n := range said {
		t.Logf("%d were told %s", n, text)
		if !strings.HasPrefix(text, "57P03 portal: ") || !strings.Contains(text, "PORTAL-E0404") {
			t.Errorf("%d were told %s", n, text)
		}
	}
	for i, c := range in {
		var one int
		if err := c.QueryRow(w.ctx, "select 1").Scan(&one); err != nil || one != 1 {
			t.Errorf("client %d, who is in: %v", i, err)
		}
	}
	// The superuser has connections of its own in PostgreSQL; its other users have what is left.
	text, err := db.Admin(w.ctx, "select count(*) from pg_stat_activity where usename = 'bench';")
	if n := strings.TrimSpace(text); err != nil || n != fmt.Sprint(places) {
		t.Errorf("its owner counts %q sessions, %v", n, err)
	}
	own, err := connect(db.Addr())
	if err != nil {
		t.Fatalf("beside the tunnel: %v", err)
	}
	own.Close(w.ctx)

	for _, c := range in {
		c.Close(w.ctx)
	}
	in = nil
	for end := time.Now().Add(patience); ; {
		c, err := connect(w.addr)
		if err == nil {
			c.Close(w.ctx)
			break
		}
		if time.Now().After(end) {
			t.Fatalf("when all have left: %v", err)
		}
	}
}
