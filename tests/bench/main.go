// Command bench measures portal side by side with what it is compared to, in one run: nothing in
// between, plain forwarders, ssh -L, socat, stunnel, spiped, ghostunnel, chisel, frp, rathole
// and Ockam, each where it is installed, and portal with its inlet dialling its outlet directly, through
// one relay and through two.
//
//	go run ./tests/bench [-rounds 3] [-d 200ms] [-systems NAME,…|all] [-loads NAME,…|all] [-streams 10000] [-o FILE] [-svg FILE]
//	go run ./tests/bench -profile DIR [-d 3s] [-systems portal,relay,twohops]
//	go run ./tests/bench -from FILE [-svg FILE]
//
// Every part of a system, and the server behind it, is a process of its own on this machine; the
// load comes from this one. In each round every load meets every system, one right after another
// and from another beginning in each round, so that what else the machine does hits all alike; rtt1
// does so four times a round, half as long: on which core each process wakes is chance, and stays so
// for a while. The figures are medians; beside them stand their multiples of a yardstick: two
// forwarders that copy, which do an inlet's and an outlet's work without a cipher, and for the loads
// over a link bare TCP over the same link. A load checks what it gets (an echo is what was sent, a
// count is right, an end is clean): a system that gets one wrong "breaks", with the reason below.
//
// Loads, by where their systems run; `-loads` takes their names, and those of a line together by
// the word in front:
//
//	plain     rtt1 rtt16 rtt256   64 bytes there and back, again and again, in 1, 16 and 256 streams
//	          up1 up8 down1 down8 bulk in 1 and 8 streams; CPU seconds per GB of each process for 1
//	          conns               connect, ask, answer, end; 8 at a time
//	          beside              round trips beside a bulk download, as a multiple of those alone
//	          sse                 an HTTP server that sends an event each 10 ms: the first byte, the gaps
//	postgres  S1 S8 S64 B1 B8 B64 pgbench -S and TPC-B with 1, 8 and 64 clients
//	20ms      rtt1-20ms beside-20ms          through a link of 20 ms there and back, 1 Gbit/s
//	100ms     up1-100ms down1-100ms          100 ms there and back, 1 Gbit/s
//	loss      up1-loss down1-loss            1 % of all packets lost, either way
//	idle      idle                -streams streams that say nothing: memory, threads, goroutines of each process
//
// The link of 20 and 100 ms is a process that holds what it reads for half of that and lets it out at
// 1 Gbit/s. It stands between a system's two ends (the hop next to the client, where there are
// several) and ends TCP on either side, so the kernel's own window sees no delay: what is measured
// is the tunnel's flow control, and bare TCP through the same link is what could be had. The lossy
// link is two network namespaces joined by a veth pair, where nft drops one packet in a hundred on
// either side; packets are of the wire's size. It needs root, ip, nft and nsenter.
//
// Idle streams, and profiles, are measured in a build of cmd/portal with the tag `measure`, which
// tells its heap, stacks and goroutines after a collection when it gets SIGUSR1, and begins and ends
// a CPU profile with SIGUSR2, with what it allocated and waited for mutexes meanwhile. All else runs the command as it is shipped.
//
// Without -systems and -loads it takes those that fit into a quarter of an hour with all peers
// installed. It exits 1 when a load failed on anything but a peer, or when it could not go on: what was
// measured until then is reported all the same. A peer that is not installed is named, with how
// to install it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/portal-tunnel/portal/tests/tunnels"
)

func main() {
	if len(os.Args) > 1 {
		commands := map[string]func([]string) error{
			"serve": serveCommand, "forward": forwardCommand, "shape": shapeCommand, "hold": holdCommand, "lossy": lossyCommand,
		}
		if command, ok := commands[os.Args[1]]; ok {
			fatal(command(os.Args[2:]))
			return
		}
	}
	var (
		p       = planFlags(flag.CommandLine)
		file    = flag.String("o", "", "write the figures to `FILE` too, as JSON")
		svg     = flag.String("svg", "", "draw the figures into `FILE`")
		from    = flag.String("from", "", "measure nothing: print and draw what a run wrote to `FILE`")
		profile = flag.String("profile", "", "measure nothing: write CPU profiles of portal's processes into `DIR`, and print what they allocate")
	)
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := p.resolve(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	// A system's processes have two descriptors a stream; they inherit the limit, also those that
	// do not raise it themselves.
	raiseDescriptors()
	ctx, stop := untilStopped()
	defer stop()
	switch {
	case *profile != "":
		fatal(profiles(ctx, p, *profile))
	case *from != "":
		r, err := readReport(*from)
		fatal(err)
		r.finish()
		fatal(r.publish("", *svg))
	default:
		r, err := measure(ctx, p)
		if r != nil {
			err = errors.Join(err, r.publish(*file, *svg))
		}
		fatal(err)
	}
}

// untilStopped is for as long as nobody stops the program. A hang-up does so too, unless it was started to
// outlive one.
func untilStopped() (context.Context, context.CancelFunc) {
	by := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		by = append(by, syscall.SIGHUP)
	}
	return signal.NotifyContext(context.Background(), by...)
}

func fatal(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func raiseDescriptors() {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil {
		limit.Cur = limit.Max
		syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit) // where it is refused, the idle load finds out
	}
}

// A plan is what to measure and how.
type plan struct {
	rounds  int
	d       time.Duration
	streams int // of the idle load
	systems []tunnels.System
	loads   []string

	systemNames, loadNames string
}

func planFlags(f *flag.FlagSet) *plan {
	p := new(plan)
	f.IntVar(&p.rounds, "rounds", 3, "how often each load meets each system; rtt1 four times as often, for half as long")
	f.DurationVar(&p.d, "d", 200*time.Millisecond, "how long a load lasts; some last longer, as they must")
	f.IntVar(&p.streams, "streams", 10000, "idle streams; fewer where descriptors are limited")
	f.StringVar(&p.systemNames, "systems", "", "what to measure: all, or of "+strings.Join(systemKeys(true), ",")+"; all but splice and yamux if empty")
	f.StringVar(&p.loadNames, "loads", "", "with what: all, or of "+strings.Join(loadKeys(true), ",")+" or "+strings.Join(settingKeys(), ",")+"; if empty all but "+strings.Join(seldomLoads(), ","))
	return p
}

// resolve reads the names.
func (p *plan) resolve() (err error) {
	if p.rounds < 1 || p.d <= 0 || p.streams < 1 {
		return errors.New("-rounds, -d and -streams must be positive")
	}
	if p.systems, err = chooseSystems(p.systemNames); err != nil {
		return err
	}
	p.loads, err = chooseLoads(p.loadNames)
	return err
}

// args are the plan as flags, for a process that carries it out in another place.
func (p *plan) args(s *setting) []string {
	var systems, names []string
	for _, sys := range p.systems {
		systems = append(systems, sys.Key)
	}
	for _, l := range s.loads {
		if slices.Contains(p.loads, l.name) {
			names = append(names, l.name)
		}
	}
	return []string{"-rounds", fmt.Sprint(p.rounds), "-d", p.d.String(), "-systems", strings.Join(systems, ","), "-loads", strings.Join(names, ",")}
}

func measure(ctx context.Context, p *plan) (*report, error) {
	r := newReport(p)
	fmt.Fprintf(os.Stderr, "bench: %d rounds, %d systems, %d loads: at most about %v\n", p.rounds, len(p.systems), len(p.loads), p.estimate().Round(time.Minute))
	b, err := newBinaries(ctx)
	if err != nil {
		return nil, err
	}
	defer b.remove()
	p = r.present(ctx, p, b)
	for _, s := range settings {
		if !slices.ContainsFunc(s.loads, func(l load) bool { return slices.Contains(p.loads, l.name) }) {
			continue
		}
		var skip *skipped
		err := s.measure(ctx, p, s, b, r)
		switch {
		case errors.As(err, &skip):
			fmt.Fprintf(os.Stderr, "bench: %s: skipped: %v\n", s.name, err)
			r.Skipped[s.name] = err.Error()
		case err != nil:
			r.finish()
			return r, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	r.finish()
	if i := slices.IndexFunc(r.Systems, func(m *measured) bool { return !m.Peer && len(m.Failed) > 0 }); i >= 0 {
		return r, fmt.Errorf("a load failed on %s", r.Systems[i].Name)
	}
	return r, nil
}

// skipped says why a setting cannot be had here. It is told, and the others are measured.
type skipped struct{ why string }

func (s *skipped) Error() string { return s.why }

// overhead is what a load takes beside its time, and a system to start; idle, what it takes to open
// and close ten thousand streams. They are for the estimate alone.
const (
	overheadOfLoad  = 50 * time.Millisecond
	overheadOfStart = 800 * time.Millisecond
	overheadOfIdle  = 11 * time.Second
)

func (p *plan) estimate() (total time.Duration) {
	for _, s := range settings {
		started := false
		for _, l := range s.loads {
			if !slices.Contains(p.loads, l.name) {
				continue
			}
			started = true
			rounds := time.Duration(p.rounds)
			if l.once {
				rounds = 1
			}
			total += rounds * time.Duration(max(l.turns, 1)) * time.Duration(len(p.systems)) * (l.lasts(p.turn(l).d)*time.Duration(max(l.parts, 1)) + overheadOfLoad)
			if l.name == "idle" {
				total += time.Duration(len(p.systems)) * overheadOfIdle
			}
		}
		if started {
			total += time.Duration(len(p.systems)) * overheadOfStart
		}
	}
	return total
}

// turn is the plan for one of a load's turns.
func (p *plan) turn(l load) *plan {
	q := *p
	if l.turns > 1 {
		q.d /= 2
	}
	return &q
}

// together measures a setting with all its systems running side by side.
func together(ctx context.Context, p *plan, s *setting, b *binaries, r *report) (err error) {
	rig, err := newRig(ctx, s, b)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rig.close()) }()

	var running []*deployment
	for _, sys := range p.systems {
		d, err := rig.deploy(ctx, sys)
		switch m := r.of(sys); {
		case err == nil:
			running = append(running, d)
		case sys.Peer && ctx.Err() == nil:
			m.absent(s, err)
			fmt.Fprintf(os.Stderr, "bench: %s: %v\n", sys.Name, err)
		default:
			return fmt.Errorf("starting %s: %w", sys.Name, err)
		}
	}
	for round := range p.rounds {
		fmt.Fprintf(os.Stderr, "bench: %s, round %d of %d\n", s.name, round+1, p.rounds)
		rate, err := sealRate()
		if err != nil {
			return err
		}
		r.Sealing = append(r.Sealing, rate)
		for _, l := range s.loads {
			if !slices.Contains(p.loads, l.name) {
				continue
			}
			for i := range len(running) * max(l.turns, 1) {
				d := running[(i+round)%len(running)]
				if err := r.of(d.System).meet(ctx, l, d, p.turn(l)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// alone measures a setting with one system running at a time: what it costs is its own.
func alone(ctx context.Context, p *plan, s *setting, b *binaries, r *report) error {
	for i, sys := range p.systems {
		fmt.Fprintf(os.Stderr, "bench: %s, %s (%d of %d)\n", s.name, sys.Name, i+1, len(p.systems))
		err := func() (err error) {
			rig, err := newRig(ctx, s, b)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, rig.close()) }()
			d, err := rig.deploy(ctx, sys)
			if err != nil {
				return err
			}
			for _, l := range s.loads {
				if err := r.of(sys).meet(ctx, l, d, p); err != nil {
					return err
				}
			}
			return nil
		}()
		if err != nil && sys.Peer && ctx.Err() == nil {
			r.of(sys).absent(s, err)
			fmt.Fprintf(os.Stderr, "bench: %s: %v\n", sys.Name, err)
		} else if err != nil {
			return fmt.Errorf("%s: %w", sys.Name, err)
		}
	}
	return nil
}

// meet runs a load on a system once. What a load finds wrong is noted; an error is the run's end.
func (m *measured) meet(ctx context.Context, l load, d *deployment, p *plan) error {
	if m.Peer && m.Failed[l.name] != "" {
		return nil // it is known to break, which may take a load's whole patience to see
	}
	o, err := l.run(ctx, d, p)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %s: %s: %v\n", m.Name, l.name, err)
		m.Failed[l.name] = err.Error()
		return nil
	}
	if len(o.values) != len(l.figures) {
		return fmt.Errorf("%s: %d values for %d figures", l.name, len(o.values), len(l.figures))
	}
	for k, f := range l.figures {
		if !math.IsNaN(o.values[k]) {
			m.Rounds[f.Name] = append(m.Rounds[f.Name], o.values[k])
		}
	}
	for _, v := range o.parts {
		m.note(v)
	}
	return nil
}

// profiles writes what portal's processes spend their time on, under bulk and under round trips.
func profiles(ctx context.Context, p *plan, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	b, err := newBinaries(ctx)
	if err != nil {
		return err
	}
	defer b.remove()
	for _, sys := range p.systems {
		if sys.Way == "" {
			continue // not portal
		}
		if err := profileOne(ctx, p, sys, b, dir); err != nil {
			return fmt.Errorf("%s: %w", sys.Name, err)
		}
	}
	return nil
}

func profileOne(ctx context.Context, p *plan, sys tunnels.System, b *binaries, dir string) (err error) {
	rig, err := newRig(ctx, profileSetting, b)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rig.close()) }()
	d, err := rig.deploy(ctx, sys)
	if err != nil {
		return err
	}
	for _, l := range profileSetting.loads {
		for _, part := range d.Parts {
			if err := beginProfile(ctx, part); err != nil {
				return err
			}
		}
		o, failed := l.run(ctx, d, p)
		if failed == nil {
			fmt.Printf("%s, %s: %s %s\n", sys.Name, l.figures[0].Name, number(o.values[0]), l.figures[0].Unit)
		}
		for _, part := range d.Parts {
			file := filepath.Join(dir, strings.Join([]string{sys.Key, l.name, strings.ReplaceAll(part.Name, " ", "-")}, ".")+".pprof")
			spent, err := endProfile(ctx, part, file)
			if err != nil {
				return err
			}
			fmt.Printf("\t%s: %s\n", file, spent)
		}
		if failed != nil {
			return fmt.Errorf("%s: %w", l.name, failed)
		}
	}
	return nil
}
