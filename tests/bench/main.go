// Command bench measures portal side by side with what it is compared to, in one run: nothing in
// between, two plain forwarders that copy or splice, ssh -L, and portal with its inlet dialling its
// outlet directly.
//
//	go run ./tests/bench [-rounds 5] [-d 1s] [-systems nothing,copy,splice,ssh,portal] [-o FILE]
//
// Every forwarder, and the server behind them, is a process of its own on loopback; the load comes
// from this one. In each round every load meets every system, one right after another and from
// another beginning in each round, so that what else the machine does hits all alike. The figures
// are medians over the rounds; the second table gives them as multiples of two copying forwarders,
// which do an inlet's and an outlet's work without a cipher.
//
// It exits 1 when a load failed on anything but a peer. ssh is named as missing when it is not
// installed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "serve":
			fatal(serveCommand())
			return
		case "forward":
			fatal(forwardCommand(os.Args[2:]))
			return
		}
	}
	var (
		rounds = flag.Int("rounds", 5, "how often each load meets each system")
		d      = flag.Duration("d", time.Second, "how long a load lasts")
		names  = flag.String("systems", strings.Join(systemNames(), ","), "what to measure")
		file   = flag.String("o", "", "write the figures to this file too, as JSON")
	)
	flag.Parse()
	if flag.NArg() > 0 || *rounds < 1 || *d <= 0 {
		flag.Usage()
		os.Exit(2)
	}
	chosen, err := choose(strings.Split(*names, ","))
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	fatal(run(ctx, chosen, *rounds, *d, *file))
}

func fatal(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, chosen []system, rounds int, d time.Duration, file string) (err error) {
	// Each load gives its connections up by itself (patience); this bounds what is left.
	runs := rounds * len(chosen) * len(loads)
	ctx, cancel := context.WithTimeout(ctx, time.Duration(runs)*(d+patience)+5*time.Minute)
	defer cancel()

	r, err := newRig(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()

	result := newReport(rounds, d)
	var running []*measured
	for _, s := range chosen {
		m := &measured{Name: s.name, Rounds: map[string][]float64{}, Failed: map[string]string{}, peer: s.peer}
		result.Systems = append(result.Systems, m)
		m.addr, err = s.start(ctx, r)
		switch {
		case err == nil:
			running = append(running, m)
		case s.peer && ctx.Err() == nil:
			m.Missing = err.Error()
			fmt.Fprintf(os.Stderr, "bench: %s is missing: %v\n", s.name, err)
		default:
			return fmt.Errorf("starting %s: %w", s.name, err)
		}
	}
	for round := range rounds {
		fmt.Fprintf(os.Stderr, "bench: round %d of %d, about %v\n", round+1, rounds, (time.Duration(len(running)*len(loads)) * d).Round(time.Second))
		for _, l := range loads {
			for i := range running {
				m := running[(i+round)%len(running)]
				values, err := l.run(ctx, m.addr, l.streams, d)
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				if err != nil {
					fmt.Fprintf(os.Stderr, "bench: %s: %s: %v\n", m.Name, l.name, err)
					m.Failed[l.name] = err.Error()
					continue
				}
				for k, f := range l.figures {
					m.Rounds[f.Name] = append(m.Rounds[f.Name], values[k])
				}
			}
		}
	}
	result.finish()
	result.print(os.Stdout)
	if file != "" {
		if err := result.write(file); err != nil {
			return err
		}
	}
	if i := slices.IndexFunc(result.Systems, func(m *measured) bool { return !m.peer && len(m.Failed) > 0 }); i >= 0 {
		return fmt.Errorf("a load failed on %s", result.Systems[i].Name)
	}
	return nil
}
