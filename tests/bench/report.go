package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/portal-tunnel/portal/tests/tunnels"
)

// measured is what a system gave.
type measured struct {
	Key       string                          `json:"key"`
	Name      string                          `json:"name"`
	Is        string                          `json:"is"`
	Peer      bool                            `json:"peer"` // somebody else's
	Version   string                          `json:"version,omitempty"`
	Missing   string                          `json:"missing,omitempty"`   // why it did not take part
	Failed    map[string]string               `json:"failed,omitempty"`    // load to error
	Median    map[string]float64              `json:"median,omitempty"`    // by figure
	Ratio     map[string]float64              `json:"ratio,omitempty"`     // of the medians, to those of the figure's multiple_of
	Rounds    map[string][]float64            `json:"rounds,omitempty"`    // by figure
	Processes map[string]map[string][]float64 `json:"processes,omitempty"` // process, figure, rounds
	Order     []string                        `json:"process_order,omitempty"`
}

// note keeps a figure of one process.
func (m *measured) note(n note) {
	if m.Processes[n.part] == nil {
		m.Processes[n.part] = map[string][]float64{}
		m.Order = append(m.Order, n.part)
	}
	m.Processes[n.part][n.figure] = append(m.Processes[n.part][n.figure], n.value)
}

// absent notes that a system did not start in a setting.
func (m *measured) absent(s *setting, err error) {
	for _, l := range s.loads {
		m.Failed[l.name] = "it did not start: " + err.Error()
	}
}

type report struct {
	Date    time.Time         `json:"date"`
	Go      string            `json:"go"`
	System  string            `json:"system"`
	CPU     string            `json:"cpu"`
	Cores   int               `json:"cores"`
	Load    string            `json:"load_before"` // of the machine, as /proc/loadavg had it
	Command string            `json:"command"`
	Rounds  int               `json:"rounds"`
	Seconds float64           `json:"seconds"`           // a load; half of it a turn
	Sealing []float64         `json:"sealing,omitempty"` // sealRate before each round, MB/s
	Skipped map[string]string `json:"skipped,omitempty"` // setting to reason
	Figures []figure          `json:"figures"`
	Systems []*measured       `json:"systems"`
	Bars    []verdict         `json:"bars"`
	// Unjudged are figures that a bar is of and nothing in this run measured.
	Unjudged []string `json:"unjudged,omitempty"`
}

func newReport(p *plan) *report {
	r := &report{
		Date: time.Now().UTC().Truncate(time.Second), Go: runtime.Version(), System: runtime.GOOS + "/" + runtime.GOARCH,
		CPU: cpuName(), Cores: runtime.NumCPU(), Rounds: p.rounds, Seconds: p.d.Seconds(), Skipped: map[string]string{},
		Command: "go run ./tests/bench " + strings.Join(os.Args[1:], " "),
	}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		r.System += " " + strings.TrimSpace(string(b))
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		r.Load = strings.Join(strings.Fields(string(b))[:3], " ")
	}
	for _, s := range settings {
		for _, l := range s.loads {
			if slices.Contains(p.loads, l.name) {
				r.Figures = append(r.Figures, l.figures...)
			}
		}
	}
	for _, s := range p.systems {
		r.Systems = append(r.Systems, &measured{
			Key: s.Key, Name: s.Name, Is: s.Is, Peer: s.Peer, Failed: map[string]string{}, Rounds: map[string][]float64{},
			Processes: map[string]map[string][]float64{},
		})
	}
	return r
}

func cpuName() string {
	b, _ := os.ReadFile("/proc/cpuinfo") // a platform without one has no name here
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(line, "model name"); ok {
			return strings.Trim(name, " \t:\n")
		}
	}
	return "unknown"
}

// present asks the systems for their versions, notes those that are missing, and gives the plan for
// the others.
func (r *report) present(ctx context.Context, p *plan, b *binaries) *plan {
	here := *p
	here.systems = nil
	for _, s := range p.systems {
		m := r.of(s)
		if err := s.Absent(); err != nil {
			m.Missing = err.Error()
			fmt.Fprintf(os.Stderr, "bench: %s is missing: %v\n", s.Name, err)
			continue
		}
		here.systems = append(here.systems, s)
		switch {
		case s.Way != "":
			m.Version = tunnels.Version(ctx, b.shipped.Path, "version")
			// A build from a working tree is called (devel).
			if out, err := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty").Output(); err == nil {
				m.Version += ", commit " + strings.TrimSpace(string(out))
			}
		case s.Version != nil:
			m.Version = tunnels.Version(ctx, s.Version[0], s.Version[1:]...)
		}
	}
	return &here
}

func (r *report) of(s tunnels.System) *measured { return r.named(s.Name) }

// named gives a system's part of the report, nil when it has none.
func (r *report) named(name string) *measured {
	i := slices.IndexFunc(r.Systems, func(m *measured) bool { return m.Name == name })
	if i < 0 {
		return nil
	}
	return r.Systems[i]
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// finish computes medians, ratios and verdicts. A figure whose load failed in any round has none.
func (r *report) finish() {
	for _, m := range r.Systems {
		m.Median, m.Ratio = map[string]float64{}, map[string]float64{}
		for _, f := range r.Figures {
			if v := m.Rounds[f.Name]; len(v) > 0 && m.Failed[f.Load] == "" {
				m.Median[f.Name] = median(v)
			}
		}
	}
	for _, f := range r.Figures {
		of := r.named(f.To)
		if of == nil {
			continue
		}
		unit, ok := of.Median[f.Name]
		for _, m := range r.Systems {
			if v, has := m.Median[f.Name]; ok && has && unit > 0 {
				m.Ratio[f.Name] = v / unit
			}
		}
	}
	r.judge()
}

// A bar is what portal has to reach. Beyond it the shape is wrong, not the tuning.
type bar struct {
	system string
	figure string
	part   string // of one process of the system
	of     string // a multiple of this system's; empty: the figure itself
	most   bool
	limit  float64
}

const (
	direct, oneRelay = "portal, direct", "portal, one relay"
	ghost, ssh, frp  = "ghostunnel", "ssh -L", "frp stcp"
)

var bars = slices.Concat(ahead(ghost), ahead(ssh), []bar{
	{system: direct, figure: "rtt1 p50", of: yardstick, most: true, limit: 1.15},
	{system: direct, figure: "up1", of: yardstick, limit: .65},
	{system: direct, figure: "down1", of: yardstick, limit: .65},
	{system: direct, figure: "up8", of: yardstick, limit: .60},
	{system: direct, figure: "down8", of: yardstick, limit: .60},
	{system: oneRelay, figure: "rtt1 p50", of: yardstick, most: true, limit: 1.5},
	{system: oneRelay, figure: "up1", of: yardstick, limit: .48},
	{system: oneRelay, figure: "down1", of: yardstick, limit: .48},
	{system: oneRelay, figure: "rtt16 p50", of: ghost, most: true, limit: 1},
	// frp goes through its server as well, so it is compared with the way through a relay.
	{system: oneRelay, figure: "rtt1 p50", of: frp, most: true, limit: .6},
	{system: oneRelay, figure: "up1", of: frp, limit: 4},
	{system: oneRelay, figure: "down1", of: frp, limit: 4},
	// On loopback the cores are what is shared, and bare TCP is far from three times its own.
	{system: direct, figure: "beside", of: bare, most: true, limit: 1},
	{system: oneRelay, figure: "beside", of: bare, most: true, limit: 1},
	{system: direct, figure: "beside-20ms", most: true, limit: 3},
	{system: oneRelay, figure: "beside-20ms", most: true, limit: 3},
	{system: direct, figure: "up1-100ms", of: bare, limit: .85},
	{system: direct, figure: "down1-100ms", of: bare, limit: .85},
	{system: oneRelay, figure: "up1-100ms", of: bare, limit: .85},
	{system: oneRelay, figure: "down1-100ms", of: bare, limit: .85},
	{system: direct, part: "inlet", figure: "idle heap+stacks", most: true, limit: 8},
	{system: direct, part: "outlet", figure: "idle heap+stacks", most: true, limit: 8},
	{system: oneRelay, part: "inlet", figure: "idle heap+stacks", most: true, limit: 8},
	{system: oneRelay, part: "outlet", figure: "idle heap+stacks", most: true, limit: 8},
	// Nothing: a kibibyte for ten streams is what a collection finds a little more of.
	{system: oneRelay, part: "relay", figure: "idle heap+stacks", most: true, limit: .1},
	{system: oneRelay, figure: "S8", of: ghost, limit: .9},
})

// ahead are the bars beside a peer: no round trip longer, no bulk slower, no fewer connections.
func ahead(of string) []bar {
	return []bar{
		{system: direct, figure: "rtt1 p50", of: of, most: true, limit: 1},
		{system: direct, figure: "rtt16 p50", of: of, most: true, limit: 1},
		{system: direct, figure: "up1", of: of, limit: 1},
		{system: direct, figure: "down1", of: of, limit: 1},
		{system: direct, figure: "up8", of: of, limit: 1},
		{system: direct, figure: "down8", of: of, limit: 1},
		{system: direct, figure: "conns", of: of, limit: 1},
	}
}

// A verdict says whether a bar holds.
type verdict struct {
	Bar   string  `json:"bar"`
	Value float64 `json:"value"`
	Holds bool    `json:"holds"`
	Open  string  `json:"open,omitempty"` // why it cannot be said
}

func (v verdict) String() string {
	switch {
	case v.Open != "":
		return fmt.Sprintf("open    %s: %s", v.Bar, v.Open)
	case v.Holds:
		return fmt.Sprintf("holds   %s: %.3g", v.Bar, v.Value)
	}
	return fmt.Sprintf("MISSED  %s: %.3g", v.Bar, v.Value)
}

// judge says of each bar that this run can say something of whether it holds, and which others there are.
func (r *report) judge() {
	r.Bars, r.Unjudged = nil, nil
	unjudged := func(figure string) {
		if !slices.Contains(r.Unjudged, figure) {
			r.Unjudged = append(r.Unjudged, figure)
		}
	}
	for _, b := range bars {
		m := r.named(b.system)
		if m == nil {
			continue
		}
		value, ok := m.Median[b.figure]
		if b.part != "" {
			rounds := m.Processes[b.part][b.figure]
			if ok = len(rounds) > 0; ok {
				value = median(rounds)
			}
		}
		sign := "≥"
		if b.most {
			sign = "≤"
		}
		what := b.figure
		if b.part != "" {
			what = b.part + ", " + what
		}
		v := verdict{Bar: fmt.Sprintf("%s: %s %s %g", b.system, what, sign, b.limit)}
		if b.part != "" {
			v.Bar += " KiB a stream"
		}
		if b.of != "" {
			v.Bar += " × " + b.of
			other := r.named(b.of)
			if other == nil {
				continue // not asked for
			}
			unit, has := other.Median[b.figure]
			switch {
			case !has && !ok:
				if !r.measures(b.figure) {
					unjudged(b.figure)
					continue
				}
				v.Open = "neither gave it"
			case !has:
				v.Open = b.of + " did not give it"
			default:
				value /= unit
			}
		}
		if !ok && v.Open == "" {
			if m.Failed[r.loadOf(b.figure)] == "" {
				unjudged(b.figure)
				continue
			}
			v.Open = b.system + " failed"
		}
		if v.Open == "" {
			v.Value, v.Holds = value, value >= b.limit
			if b.most {
				v.Holds = value <= b.limit
			}
		}
		r.Bars = append(r.Bars, v)
	}
}

func (r *report) measures(name string) bool { return r.loadOf(name) != "" }

// loadOf is the load that gives a figure, of a system or of a process; empty: none in this run.
func (r *report) loadOf(name string) string {
	for _, f := range r.Figures {
		if f.Name == name || f.Load == "idle" && strings.HasPrefix(name, "idle ") {
			return f.Load
		}
	}
	return ""
}

func (r *report) print(w io.Writer) {
	fmt.Fprintf(w, "%s, %d cores, %s, %s; medians of %d rounds, %g s a load; load average before %s\n", r.CPU, r.Cores, r.System, r.Go, r.Rounds, r.Seconds, r.Load)
	if line := cipherLine(r.Sealing); line != "" {
		fmt.Fprintln(w, line)
	}
	said := ""
	for _, f := range r.Figures {
		if f.Load == said {
			continue
		}
		said = f.Load
		switch {
		case f.Turns > 1:
			fmt.Fprintf(w, "%s: %d turns of %g s a round\n", f.Load, f.Turns, r.Seconds/2)
		case f.Least > r.Seconds:
			fmt.Fprintf(w, "%s: %g s\n", f.Load, f.Least)
		case f.Once:
			fmt.Fprintf(w, "%s: once, with one system running at a time\n", f.Load)
		}
	}
	fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, m := range r.Systems {
		what := m.Version
		if m.Missing != "" {
			what = "missing: " + m.Missing
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", m.Name, m.Is, what)
	}
	t.Flush()
	for _, name := range slices.Sorted(maps.Keys(r.Skipped)) {
		fmt.Fprintf(w, "\nskipped: %s: %s\n", name, r.Skipped[name])
	}
	for _, topic := range topics {
		r.section(w, topic)
	}
	r.processes(w)
	if len(r.Bars) > 0 {
		fmt.Fprint(w, "\nbars\n\n")
	}
	for _, v := range r.Bars {
		fmt.Fprintln(w, v)
	}
	if len(r.Unjudged) > 0 {
		fmt.Fprintf(w, "\nbars of what this run did not measure: %s\n", strings.Join(r.Unjudged, ", "))
	}
}

// section prints a topic: figures, their multiples, and what broke.
func (r *report) section(w io.Writer, topic string) {
	var figures, multiples []figure
	of := ""
	for _, f := range r.Figures {
		if f.Topic != topic || !slices.ContainsFunc(r.Systems, func(m *measured) bool { return len(m.Rounds[f.Name]) > 0 || m.Failed[f.Load] != "" }) {
			continue
		}
		figures = append(figures, f)
		if slices.ContainsFunc(r.Systems, func(m *measured) bool { _, ok := m.Ratio[f.Name]; return ok }) {
			multiples, of = append(multiples, f), f.To
		}
	}
	if len(figures) == 0 {
		return
	}
	fmt.Fprintf(w, "\n%s\n\n", topic)
	r.table(w, figures, func(m *measured) map[string]float64 { return m.Median }, true)
	if len(multiples) > 0 {
		fmt.Fprintf(w, "\nin multiples of %s\n\n", of)
		r.table(w, multiples, func(m *measured) map[string]float64 { return m.Ratio }, false)
	}
	said := map[string]bool{}
	for _, m := range r.Systems {
		for _, f := range figures {
			if why := m.Failed[f.Load]; why != "" && !said[m.Name+f.Load] {
				if len(said) == 0 {
					fmt.Fprintln(w)
				}
				said[m.Name+f.Load] = true
				fmt.Fprintf(w, "%s breaks at %s: %s\n", m.Name, f.Load, inOneLine(why))
			}
		}
	}
}

// inOneLine joins the lines of why, each said once and how often: eight streams mostly break alike.
func inOneLine(why string) string {
	var lines []string
	count := map[string]int{}
	for line := range strings.SplitSeq(why, "\n") {
		if count[line]++; count[line] == 1 {
			lines = append(lines, line)
		}
	}
	for i, line := range lines {
		if n := count[line]; n > 1 {
			lines[i] = fmt.Sprintf("%d × %s", n, line)
		}
	}
	return strings.Join(lines, "; ")
}

func (r *report) table(w io.Writer, figures []figure, values func(*measured) map[string]float64, units bool) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, f := range figures {
		fmt.Fprintf(t, "\t%s", f.Name)
	}
	fmt.Fprint(t, "\t\n")
	if units {
		for _, f := range figures {
			fmt.Fprintf(t, "\t%s", f.Unit)
		}
		fmt.Fprint(t, "\t\n")
	}
	for _, m := range r.Systems {
		if m.Missing != "" {
			continue // said at the top
		}
		fmt.Fprint(t, m.Name)
		for _, f := range figures {
			switch v, ok := values(m)[f.Name]; {
			case ok && units:
				fmt.Fprint(t, "\t"+number(v))
			case ok:
				fmt.Fprintf(t, "\t%.2f", v)
			case m.Failed[f.Load] != "":
				fmt.Fprint(t, "\tbreaks")
			default:
				fmt.Fprint(t, "\t-")
			}
		}
		fmt.Fprint(t, "\t\n")
	}
	t.Flush()
}

// number has about three digits.
func number(v float64) string {
	switch {
	case v >= 100 || v <= -100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10 || v <= -10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// processes prints what is known of each process of a system.
func (r *report) processes(w io.Writer) {
	var figures []string
	for _, name := range []string{"up1 CPU", "up8 CPU", "down1 CPU", "down8 CPU", "idle memory", "idle threads", "idle heap+stacks", "idle goroutines"} {
		if slices.ContainsFunc(r.Systems, func(m *measured) bool {
			return slices.ContainsFunc(m.Order, func(p string) bool { return len(m.Processes[p][name]) > 0 })
		}) {
			figures = append(figures, name)
		}
	}
	if len(figures) == 0 {
		return
	}
	units := map[string]string{"up1 CPU": "s/GB", "up8 CPU": "s/GB", "down1 CPU": "s/GB", "down8 CPU": "s/GB", "idle memory": "KiB/stream", "idle threads": "more",
		"idle heap+stacks": "KiB/stream", "idle goroutines": "/stream"}
	fmt.Fprint(w, "\neach process\n\n")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, f := range figures {
		fmt.Fprintf(t, "\t%s", f)
	}
	fmt.Fprint(t, "\t\n")
	for _, f := range figures {
		fmt.Fprintf(t, "\t%s", units[f])
	}
	fmt.Fprint(t, "\t\n")
	for _, m := range r.Systems {
		for _, p := range m.Order {
			fmt.Fprintf(t, "%s: %s", m.Name, p)
			for _, f := range figures {
				if v := m.Processes[p][f]; len(v) > 0 {
					fmt.Fprint(t, "\t"+number(median(v)))
				} else {
					fmt.Fprint(t, "\t-")
				}
			}
			fmt.Fprint(t, "\t\n")
		}
	}
	t.Flush()
}

// publish prints the report and writes and draws it where asked.
func (r *report) publish(file, svg string) error {
	r.print(os.Stdout)
	if file != "" {
		if err := r.write(file); err != nil {
			return err
		}
	}
	if svg != "" {
		return os.WriteFile(svg, r.draw(), 0o644)
	}
	return nil
}

func (r *report) write(file string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}

func readReport(file string) (*report, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	r := new(report)
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("reading %s: %w", file, err)
	}
	return r, nil
}

// take adds what another process measured of the same systems.
func (r *report) take(other *report) {
	r.Sealing = append(r.Sealing, other.Sealing...)
	for _, theirs := range other.Systems {
		ours := r.named(theirs.Name)
		if ours == nil {
			continue
		}
		maps.Copy(ours.Failed, theirs.Failed)
		maps.Copy(ours.Rounds, theirs.Rounds)
	}
}
