package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// A figure is one number of a load.
type figure struct {
	Name  string `json:"name"`
	Unit  string `json:"unit"`
	Less  bool   `json:"less_is_better"`
	Topic string `json:"topic"` // the table that it stands in
	Load  string `json:"load"`
	// To is the system in whose multiples it is given too; empty: it is a multiple already, or none
	// has a meaning.
	To string `json:"multiple_of,omitempty"`
	// Turns of half a load's time are taken in each round; 0: one of the whole.
	Turns int     `json:"turns,omitempty"`
	Least float64 `json:"least_seconds,omitempty"` // that the load lasts, whatever the run's are
	Once  bool    `json:"once,omitempty"`          // not in each round
}

// A load is something to do to a system.
type load struct {
	name    string
	seldom  bool          // not in a run that names no loads
	least   time.Duration // what it measures needs so long
	parts   int           // it takes its time so often; 0: once
	turns   int           // it meets each system so often in a round, for half of its time; 0: once
	once    bool          // in the first round alone
	figures []figure
	run     func(ctx context.Context, d *deployment, p *plan) (outcome, error)
}

func (l load) lasts(d time.Duration) time.Duration { return max(d, l.least) }

// inTurns is for a load whose figures depend on which cores the kernel happens to pick.
func inTurns(n int, l load) load {
	l.turns = n
	return l
}

// An outcome has one value for each figure of the load; NaN is one that cannot be had here.
type outcome struct {
	values []float64
	parts  []note
}

// A setting is where systems run: what stands between their ends, and which target behind them. Its
// loads meet all systems, which are started for it anew.
type setting struct {
	key, name string
	delay     time.Duration // of the link, one way
	rate      float64       // of the link, bytes a second
	lossy     bool
	postgres  bool
	measured  bool // portal's processes are of the build for measuring
	loads     []load
	measure   func(ctx context.Context, p *plan, s *setting, b *binaries, r *report) error
}

// Topics, in the order of the tables.
const (
	topicRoundTrips = "round trips of 64 bytes"
	topicBulk       = "bulk"
	topicCPU        = "CPU of all processes of a system"
	topicStreams    = "connections and events"
	topicPostgres   = "pgbench, transactions a second"
	topicLinks      = "over links"
	topicIdle       = "idle streams"
)

var topics = []string{topicRoundTrips, topicBulk, topicCPU, topicStreams, topicPostgres, topicLinks, topicIdle}

const gigabit = 1e9 / 8 // bytes a second

var settings = []*setting{
	{key: "plain", name: "plain", measure: together, loads: []load{
		inTurns(4, roundTripLoad("rtt1", topicRoundTrips, yardstick, 1, 0)),
		roundTripLoad("rtt16", topicRoundTrips, yardstick, 16, 0),
		roundTripLoad("rtt256", topicRoundTrips, yardstick, 256, 0),
		bulkLoad("up1", topicBulk, yardstick, up, 1, 0, true),
		bulkLoad("up8", topicBulk, yardstick, up, 8, 0, true),
		bulkLoad("down1", topicBulk, yardstick, down, 1, 0, true),
		bulkLoad("down8", topicBulk, yardstick, down, 8, 0, true),
		besideLoad("beside", topicRoundTrips, 0),
		{name: "conns",
			figures: []figure{{Name: "conns", Unit: "1/s", Topic: topicStreams, To: yardstick}},
			run: func(ctx context.Context, d *deployment, p *plan) (outcome, error) {
				n, err := connections(ctx, d.Addr, 8, p.d)
				return outcome{values: []float64{n}}, err
			}},
		{name: "sse",
			figures: []figure{
				{Name: "sse first", Unit: "µs", Less: true, Topic: topicStreams, To: yardstick},
				{Name: "sse gap p50", Unit: "ms", Less: true, Topic: topicStreams},
				{Name: "sse gap p99", Unit: "ms", Less: true, Topic: topicStreams},
			},
			run: func(ctx context.Context, d *deployment, p *plan) (outcome, error) {
				t, err := sse(ctx, d.Addr, p.d)
				return outcome{values: []float64{micros(t.first.p50), millis(t.gaps.p50), millis(t.gaps.p99)}}, err
			}},
	}},
	{key: "postgres", name: "PostgreSQL", postgres: true, measure: together, loads: []load{
		pgbenchLoad("S1", "select-only", 1, 0, true),
		pgbenchLoad("S8", "select-only", 8, 0, false),
		pgbenchLoad("S64", "select-only", 64, 100, true),
		pgbenchLoad("B1", "tpcb-like", 1, 0, true),
		pgbenchLoad("B8", "tpcb-like", 8, 0, true),
		pgbenchLoad("B64", "tpcb-like", 64, 10, true),
	}},
	{key: "20ms", name: "20 ms there and back", delay: 10 * time.Millisecond, rate: gigabit, measure: together, loads: []load{
		roundTripLoad("rtt1-20ms", topicLinks, bare, 1, 400*time.Millisecond),
		besideLoad("beside-20ms", topicLinks, 400*time.Millisecond),
	}},
	{key: "100ms", name: "100 ms there and back", delay: 50 * time.Millisecond, rate: gigabit, measure: together, loads: []load{
		// A window that grows has done so after some round trips: what a long transfer gets is the claim.
		bulkLoad("up1-100ms", topicLinks, bare, up, 1, 4*time.Second, false),
		bulkLoad("down1-100ms", topicLinks, bare, down, 1, 4*time.Second, false),
	}},
	{key: "loss", name: "1 % loss", lossy: true, measure: inNamespaces, loads: []load{
		seldom(bulkLoad("up1-loss", topicLinks, bare, up, 1, 500*time.Millisecond, false)),
		bulkLoad("down1-loss", topicLinks, bare, down, 1, 500*time.Millisecond, false),
	}},
	{key: "idle", name: "idle", measured: true, measure: alone, loads: []load{
		{name: "idle", once: true,
			figures: []figure{
				{Name: "idle memory", Unit: "KiB/stream", Less: true, Topic: topicIdle},
				{Name: "idle threads", Unit: "more", Less: true, Topic: topicIdle},
				{Name: "idle streams", Unit: "held", Topic: topicIdle},
			},
			run: func(ctx context.Context, d *deployment, p *plan) (outcome, error) {
				n := idleStreams(p.streams, max(2, d.System.Descriptors))
				if most := d.System.Streams; most > 0 {
					n = min(n, most)
				}
				return idle(ctx, d, n)
			}},
	}},
}

// profileSetting is where profiles are taken.
var profileSetting = &setting{key: "profile", name: "profile", measured: true, loads: []load{
	bulkLoad("bulk", topicBulk, yardstick, down, 1, 0, false),
	bulkLoad("bulk8", topicBulk, yardstick, down, 8, 0, false),
	roundTripLoad("rtt", topicRoundTrips, yardstick, 1, 0),
}}

func init() {
	for _, s := range settings {
		for _, l := range s.loads {
			for i := range l.figures {
				f := &l.figures[i]
				f.Load, f.Turns, f.Least, f.Once = l.name, l.turns, l.least.Seconds(), l.once
			}
		}
	}
}

func seldom(l load) load {
	l.seldom = true
	return l
}

func roundTripLoad(name, topic, to string, streams int, least time.Duration) load {
	l := load{name: name, least: least, figures: []figure{
		{Name: name + " p50", Unit: "µs", Less: true, Topic: topic, To: to},
		{Name: name + " p99", Unit: "µs", Less: true, Topic: topic, To: to},
	}}
	l.run = func(ctx context.Context, d *deployment, p *plan) (outcome, error) {
		s, err := roundTrips(ctx, d.Addr, streams, l.lasts(p.d))
		return outcome{values: []float64{micros(s.p50), micros(s.p99)}}, err
	}
	return l
}

// besideLoad is an interactive stream beside a bulk one, as a multiple of what it is alone just before.
func besideLoad(name, topic string, least time.Duration) load {
	l := load{name: name, least: least, parts: 2, figures: []figure{
		{Name: name + " p99", Unit: "µs", Less: true, Topic: topic},
		{Name: name, Unit: "× alone", Less: true, Topic: topic},
	}}
	l.run = func(ctx context.Context, d *deployment, p *plan) (outcome, error) {
		without, err := roundTrips(ctx, d.Addr, 1, l.lasts(p.d))
		if err != nil {
			return outcome{}, err
		}
		with, err := beside(ctx, d.Addr, l.lasts(p.d))
		return outcome{values: []float64{micros(with.p99), float64(with.p99) / float64(without.p99)}}, err
	}
	return l
}

func bulkLoad(name, topic, to string, way func(context.Context, string, int, time.Duration) (bulk, error), streams int, least time.Duration, cpu bool) load {
	l := load{name: name, least: least, figures: []figure{{Name: name, Unit: "MB/s", Topic: topic, To: to}}}
	cost := name + " CPU"
	if cpu {
		l.figures = append(l.figures, figure{Name: cost, Unit: "s/GB", Less: true, Topic: topicCPU, To: to})
	}
	l.run = func(ctx context.Context, d *deployment, p *plan) (outcome, error) {
		before, unknown := d.cpu()
		b, err := way(ctx, d.Addr, streams, l.lasts(p.d))
		o := outcome{values: []float64{b.rate()}}
		if err != nil || !cpu {
			return o, err
		}
		after, err := d.cpu()
		if unknown != nil || err != nil {
			o.values = append(o.values, math.NaN())
			return o, nil
		}
		total := 0.0
		for i := range after {
			each := (after[i] - before[i]).Seconds() / (float64(b.bytes) / 1e9)
			total += each
			o.parts = append(o.parts, note{d.Parts[i].Name, cost, each})
		}
		o.values = append(o.values, total)
		return o, nil
	}
	return l
}

// cpu is what each of a system's processes has spent.
func (d *deployment) cpu() (all []time.Duration, err error) {
	for _, p := range d.Parts {
		t, err := cpuTime(p.Process.Pid())
		if err != nil {
			return nil, fmt.Errorf("the CPU time of %s: %w", p.Name, err)
		}
		all = append(all, t)
	}
	return all, nil
}

func pgbenchLoad(name, script string, clients, each int, seldom bool) load {
	return load{name: name, seldom: seldom, least: time.Second, // pgbench counts whole ones
		figures: []figure{{Name: name, Unit: "1/s", Topic: topicPostgres, To: yardstick}},
		run: func(ctx context.Context, d *deployment, p *plan) (outcome, error) {
			n, err := transactions(ctx, d.Addr, script, clients, each, p.d)
			return outcome{values: []float64{n}}, err
		}}
}

func settingKeys() (keys []string) {
	for _, s := range settings {
		keys = append(keys, s.key)
	}
	return keys
}

// loadKeys are the names of all loads, or of those that a run takes when it is told none.
func loadKeys(all bool) (names []string) {
	for _, s := range settings {
		for _, l := range s.loads {
			if all || !l.seldom {
				names = append(names, l.name)
			}
		}
	}
	return names
}

func seldomLoads() []string {
	usual := loadKeys(false)
	return slices.DeleteFunc(loadKeys(true), func(name string) bool { return slices.Contains(usual, name) })
}

// chooseLoads reads names of loads and of settings, which are all of theirs.
func chooseLoads(given string) (chosen []string, err error) {
	switch given {
	case "":
		return loadKeys(false), nil
	case "all":
		return loadKeys(true), nil
	}
	for _, name := range strings.Split(given, ",") {
		if slices.Contains(loadKeys(true), name) {
			chosen = append(chosen, name)
			continue
		}
		i := slices.IndexFunc(settings, func(s *setting) bool { return s.key == name })
		if i < 0 {
			return nil, fmt.Errorf("no load %q; there are %s, and all of %s", name, strings.Join(loadKeys(true), ", "), strings.Join(settingKeys(), ", "))
		}
		for _, l := range settings[i].loads {
			chosen = append(chosen, l.name)
		}
	}
	return chosen, nil
}
