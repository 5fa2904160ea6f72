package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// measured is what a system gave.
type measured struct {
	Name    string               `json:"name"`
	Missing string               `json:"missing,omitempty"` // why it did not take part
	Failed  map[string]string    `json:"failed,omitempty"`  // load to error
	Median  map[string]float64   `json:"median,omitempty"`  // by figure
	Ratio   map[string]float64   `json:"ratio,omitempty"`   // of the medians, to the yardstick's
	Rounds  map[string][]float64 `json:"rounds,omitempty"`

	addr string
	peer bool
}

type report struct {
	Date    time.Time   `json:"date"`
	Go      string      `json:"go"`
	System  string      `json:"system"`
	CPU     string      `json:"cpu"`
	Cores   int         `json:"cores"`
	Command string      `json:"command"`
	Rounds  int         `json:"rounds"`
	Seconds float64     `json:"seconds"` // a load
	Figures []figure    `json:"figures"`
	Systems []*measured `json:"systems"`
}

func newReport(rounds int, d time.Duration) *report {
	r := &report{
		Date: time.Now().UTC().Truncate(time.Second), Go: runtime.Version(), System: runtime.GOOS + "/" + runtime.GOARCH,
		CPU: cpu(), Cores: runtime.NumCPU(), Rounds: rounds, Seconds: d.Seconds(),
		Command: "go run ./tests/bench " + strings.Join(os.Args[1:], " "),
	}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		r.System += " " + strings.TrimSpace(string(b))
	}
	for _, l := range loads {
		r.Figures = append(r.Figures, l.figures...)
	}
	return r
}

func cpu() string {
	b, _ := os.ReadFile("/proc/cpuinfo") // a platform without one has no name here
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(line, "model name"); ok {
			return strings.Trim(name, " \t:\n")
		}
	}
	return "unknown"
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// finish computes medians and ratios. A figure that failed in any round has neither.
func (r *report) finish() {
	for _, m := range r.Systems {
		m.Median, m.Ratio = map[string]float64{}, map[string]float64{}
		for _, f := range r.Figures {
			if v := m.Rounds[f.Name]; len(v) == r.Rounds {
				m.Median[f.Name] = median(v)
			}
		}
	}
	i := slices.IndexFunc(r.Systems, func(m *measured) bool { return m.Name == yardstick })
	if i < 0 {
		return
	}
	for _, m := range r.Systems {
		for name, v := range m.Median {
			if of, ok := r.Systems[i].Median[name]; ok {
				m.Ratio[name] = v / of
			}
		}
	}
}

func (r *report) print(w io.Writer) {
	fmt.Fprintf(w, "%s, %d cores, %s, %s; medians of %d rounds, %g s a load\n\n", r.CPU, r.Cores, r.System, r.Go, r.Rounds, r.Seconds)
	r.table(w, func(m *measured) map[string]float64 { return m.Median }, "%.0f")
	if slices.ContainsFunc(r.Systems, func(m *measured) bool { return len(m.Ratio) > 0 }) {
		fmt.Fprintf(w, "\nin multiples of %s\n\n", yardstick)
		r.table(w, func(m *measured) map[string]float64 { return m.Ratio }, "%.2f")
	}
	r.bars(w)
}

func (r *report) table(w io.Writer, values func(*measured) map[string]float64, format string) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, f := range r.Figures {
		fmt.Fprintf(t, "\t%s", f.Name)
	}
	fmt.Fprint(t, "\t\n")
	for _, f := range r.Figures {
		fmt.Fprintf(t, "\t%s", f.Unit)
	}
	fmt.Fprint(t, "\t\n")
	for _, m := range r.Systems {
		fmt.Fprint(t, m.Name)
		for _, f := range r.Figures {
			switch v, ok := values(m)[f.Name]; {
			case ok:
				fmt.Fprintf(t, "\t"+format, v)
			case m.Missing != "":
				fmt.Fprint(t, "\tmissing")
			default:
				fmt.Fprint(t, "\tfailed")
			}
		}
		fmt.Fprint(t, "\t\n")
	}
	t.Flush()
}

// bars says whether portal's ways are where they have to be. Beyond them the shape is wrong, not
// the tuning.
func (r *report) bars(w io.Writer) {
	fmt.Fprintln(w)
	for _, bar := range []struct {
		system, figure string
		most           bool
		limit          float64
	}{
		{"portal, direct", "rtt1 p50", true, 1.25}, {"portal, direct", "up1", false, 0.50}, {"portal, direct", "down1", false, 0.50},
		{"portal, one relay", "rtt1 p50", true, 1.60}, {"portal, one relay", "up1", false, 0.40}, {"portal, one relay", "down1", false, 0.40},
	} {
		i := slices.IndexFunc(r.Systems, func(m *measured) bool { return m.Name == bar.system })
		if i < 0 || len(r.Systems[i].Ratio) == 0 {
			continue
		}
		v, ok := r.Systems[i].Ratio[bar.figure]
		sign, holds := "≥", v >= bar.limit
		if bar.most {
			sign, holds = "≤", v <= bar.limit
		}
		verdict := "MISSED"
		if ok && holds {
			verdict = "holds"
		}
		fmt.Fprintf(w, "%s: %s %.3f × %s, bar %s %.2f: %s\n", bar.system, bar.figure, v, yardstick, sign, bar.limit, verdict)
	}
}

func (r *report) write(path string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}
