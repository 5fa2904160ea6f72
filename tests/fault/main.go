// Command fault shows what applications see when a tunnel is damaged.
//
//	go run ./tests/fault truncation [-cuts 20] [-stalls 2] [-size 8388608] [-o FILE] [TUNNEL…]
//	go run ./tests/fault truncation -far 'CMD {target} {addr}' -near 'CMD {far} {listen}'
//	go run ./tests/fault proxy -to ADDR [-listen ADDR] [-delay D] [-rate BYTES] [FAULT…]
//	go run ./tests/fault ledger -through URL -past URL [-clients 8] [-for 30s]
//
// truncation sends what a reader can check through each tunnel, cuts the connection between its two ends
// in mid-transfer by FIN and by RST at two offsets, or lets nothing pass any more, and prints what the
// reader got: a reset, a clean end on truncated data, other bytes, or nothing. Tunnels are those of
// tests/tunnels that are installed, or one given by two command lines: the far one listens on {addr} and
// goes on to {target}, the near one listens on {listen} and goes on to {far}. It exits 1 when a reader of
// portal's, or of the one that was given, was told wrong or nothing.
//
// proxy stands between any two processes, prints where it listens, and does one fault after another to
// what passes. A FAULT is KIND@PLACE[,out|in][,n=N][,fit], PLACE a byte's offset, rN for record N or mN
// for message N of a handshake of portal's:
//
//	fin@1000 rst@1000 stall@1000    at a byte, or a record or a message: end, reset, let nothing pass
//	flip@1000,n=3                   bit 3 of a byte; flip@r5,n=16 of a record: bits from its length's first
//	drop@r5 duplicate@r5 swap@r5    leave a record out, send it twice, send it behind the next
//	replay@r5 stale@r5              the first record again; the one of that number of the connection before
//	insert@r5,n=50                  50 bytes that nobody sealed, in front
//	truncate@r5,n=1 extend@r5,n=1   a byte less or more; ,fit makes the length fit
//	reflect@r5 exchange@r5          back to who sent it; exchanged with that of another connection
//
// ledger moves money in a PostgreSQL database through the tunnel that URL leads through, for as long as you
// cut that or kill its processes, then compares the books past the tunnel with what the clients were
// told. It exits 1 when a transaction that was acknowledged is not there exactly once, when one is that
// nobody asked for, when money came or went, or when a result that ended in good order was not whole.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/portal-tunnel/portal/tests/fault/proxy"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	commands := map[string]func(context.Context, []string) error{"truncation": truncation, "proxy": between, "ledger": bank}
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: fault truncation|proxy|ledger …; -h behind either says more")
		os.Exit(2)
	}
	err := commands[os.Args[1]](ctx, os.Args[2:])
	switch usage := (*usageError)(nil); {
	case errors.Is(err, flag.ErrHelp):
	case errors.As(err, &usage):
		fmt.Fprintln(os.Stderr, "fault:", err)
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "fault:", err)
		os.Exit(1)
	}
}

// A usageError is of the command line.
type usageError struct{ error }

func misuse(format string, a ...any) error { return &usageError{fmt.Errorf(format, a...)} }

// between is the proxy alone.
func between(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("proxy", flag.ContinueOnError)
	to := flags.String("to", "", "pass connections on to `ADDR`")
	listen := flags.String("listen", "127.0.0.1:0", "take them on `ADDR`")
	delay := flags.Duration("delay", 0, "let bytes arrive later, each way")
	rate := flags.Int64("rate", 0, "pass so many `BYTES` a second each way; 0: as they come")
	if err := flags.Parse(args); err != nil {
		return asUsage(err)
	}
	if *to == "" {
		return misuse("proxy: nothing says where connections go: -to HOST:PORT")
	}
	var faults []proxy.Fault
	for _, text := range flags.Args() {
		f, err := parseFault(text)
		if err != nil {
			return misuse("%q: %w", text, err)
		}
		faults = append(faults, f)
	}
	p, err := proxy.Listen(*listen, *to)
	if err != nil {
		return err
	}
	defer p.Close()
	p.Delay(*delay)
	p.Limit(*rate)
	fmt.Fprintln(os.Stderr, "fault: listening on", p.Addr())
	for _, f := range faults {
		d := p.Arm(f)
		select {
		case <-d.Done:
			fmt.Fprintln(os.Stderr, "fault: done:", f)
		case <-ctx.Done():
			return fmt.Errorf("%v has not come: %w", f, context.Cause(ctx))
		}
	}
	<-ctx.Done()
	return nil
}

func asUsage(err error) error {
	if errors.Is(err, flag.ErrHelp) {
		return err
	}
	return &usageError{err}
}

// parseFault reads KIND@PLACE[,out|in][,n=N][,fit].
func parseFault(text string) (f proxy.Fault, err error) {
	first, rest, _ := strings.Cut(text, ",")
	kind, place, ok := strings.Cut(first, "@")
	if !ok {
		return f, errors.New("it is KIND@PLACE, such as rst@1000")
	}
	if f.Kind, err = proxy.ParseKind(kind); err != nil {
		return f, err
	}
	switch {
	case strings.HasPrefix(place, "r"):
		f.Unit, place = proxy.Record, place[1:]
	case strings.HasPrefix(place, "m"):
		f.Unit, place = proxy.Message, place[1:]
	}
	if f.At, err = strconv.ParseInt(place, 10, 64); err != nil {
		return f, fmt.Errorf("a place is a number, or r or m and a number: %w", err)
	}
	for part := range strings.SplitSeq(rest, ",") {
		switch n, given := strings.CutPrefix(part, "n="); {
		case part == "" || part == "out":
		case part == "in":
			f.Direction = proxy.In
		case part == "fit":
			f.Fit = true
		case given:
			if f.N, err = strconv.Atoi(n); err != nil {
				return f, err
			}
		default:
			return f, fmt.Errorf("%q is none of out, in, n=N, fit", part)
		}
	}
	return f, f.Check()
}

// silence is how long a reader is waited for that is told nothing: longer than portal takes to notice.
const silence = 45 * time.Second
