package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/portal-tunnel/portal/tests/tunnels"
)

// aReport is of three rounds in which portal failed once and a peer always.
func aReport() *report {
	p := &plan{rounds: 3, d: time.Second, loads: []string{"rtt1", "up1", "down1", "idle"}}
	for _, name := range []string{yardstick, direct, oneRelay, ghost, frp} {
		p.systems = append(p.systems, tunnels.System{Name: name, Peer: name == ghost || name == frp})
	}
	r := newReport(p)
	set := func(name, figure string, rounds ...float64) { r.named(name).Rounds[figure] = rounds }
	set(yardstick, "rtt1 p50", 100, 900, 110)
	set(yardstick, "up1", 1000, 1000, 1000)
	set(yardstick, "down1", 100, 100, 100)
	set(direct, "rtt1 p50", 121, 1, 900)
	set(direct, "up1", 499, 400, 600)
	set(direct, "down1", 1, 1)
	r.named(direct).Failed["down1"] = "sent 5 bytes,\nthe server got 4\nsent 5 bytes,"
	r.named(ghost).Missing = "ghostunnel is not installed"
	r.named(frp).Failed["up1"] = "the count after half-close has 0 bytes, not 8"
	set(oneRelay, "up1", 480, 490, 500)
	for i, kib := range []float64{8.5, 0.05} {
		r.named(oneRelay).note(note{[]string{"inlet", "relay"}[i], "idle heap+stacks", kib})
	}
	r.Sealing = []float64{2400, 5000, 2100}
	r.finish()
	return r
}

func TestRatiosAreOfMediansToTheYardstick(t *testing.T) {
	r := aReport()
	portal := r.named(direct)
	if got := portal.Ratio["rtt1 p50"]; got != 1.1 {
		t.Errorf("round trip: %g, want 121 / 110", got)
	}
	if got, ok := portal.Median["down1"]; ok {
		t.Errorf("a figure that failed in one round has the median %g", got)
	}
	var out strings.Builder
	r.print(&out)
	for _, want := range []string{
		"AES-256-GCM on one core before each round: median 2400 MB/s, 2100 to 5000",
		"missing: ghostunnel is not installed",
		"portal, direct breaks at down1: 2 × sent 5 bytes,; the server got 4",
		"frp stcp breaks at up1: the count after half-close",
		"portal, one relay: inlet",
		"holds   portal, direct: rtt1 p50 ≤ 1.15 × two forwarders, copy: 1.1",
		"MISSED  portal, direct: up1 ≥ 0.65 × two forwarders, copy: 0.499",
		"open    portal, direct: down1 ≥ 0.65 × two forwarders, copy: portal, direct failed",
		"holds   portal, one relay: up1 ≥ 0.48 × two forwarders, copy: 0.49",
		"open    portal, one relay: up1 ≥ 4 × frp stcp: frp stcp did not give it",
		"MISSED  portal, one relay: inlet, idle heap+stacks ≤ 8 KiB a stream: 8.5",
		"holds   portal, one relay: relay, idle heap+stacks ≤ 0.1 KiB a stream: 0.05",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, &out)
		}
	}
	said, unmeasured, _ := strings.Cut(out.String(), "\nbars of what this run did not measure: ")
	for _, not := range []string{"S8", "20ms"} {
		if strings.Contains(said, not) || !strings.Contains(unmeasured, not) {
			t.Errorf("%q was not measured; it says\n%s", not, &out)
		}
	}
}

// TestEveryBarIsOfSomethingMeasured: a bar with a wrong name would never be judged.
func TestEveryBarIsOfSomethingMeasured(t *testing.T) {
	p := &plan{rounds: 1, d: time.Second, loads: loadKeys(true), systems: systems}
	r := newReport(p)
	for _, b := range bars {
		for _, name := range []string{b.system, b.of} {
			if name != "" && r.named(name) == nil {
				t.Errorf("%s, %s: no system %q", b.system, b.figure, name)
			}
		}
		if r.loadOf(b.figure) == "" {
			t.Errorf("%s: no load gives %q", b.system, b.figure)
		}
	}
	for _, d := range drawn {
		if r.loadOf(d.figure) == "" {
			t.Errorf("drawn: no load gives %q", d.figure)
		}
	}
	for _, f := range r.Figures {
		if f.To != "" && r.named(f.To) == nil {
			t.Errorf("%s is in multiples of %q, which is no system", f.Name, f.To)
		}
	}
}

func TestAReportSurvivesItsFile(t *testing.T) {
	r, file := aReport(), filepath.Join(t.TempDir(), "bench.json")
	if err := r.write(file); err != nil {
		t.Fatal(err)
	}
	read, err := readReport(file)
	if err != nil {
		t.Fatal(err)
	}
	read.finish()
	var before, after strings.Builder
	r.print(&before)
	read.print(&after)
	if before.String() != after.String() {
		t.Errorf("before:\n%s\nafter:\n%s", &before, &after)
	}
}

func TestWhatWasMeasuredElsewhereIsTakenOver(t *testing.T) {
	r, other := aReport(), aReport()
	other.named(direct).Rounds["up1-loss"] = []float64{7}
	other.named(frp).Failed["up1-loss"] = "reset"
	other.Sealing = []float64{3000}
	before := len(r.Sealing)
	r.take(other)
	if len(r.Sealing) != before+1 {
		t.Errorf("the cipher's rates: %v", r.Sealing)
	}
	if got := r.named(direct).Rounds["up1-loss"]; len(got) != 1 || got[0] != 7 {
		t.Errorf("rounds: %v", got)
	}
	if got := r.named(frp).Failed["up1-loss"]; got != "reset" {
		t.Errorf("failed: %q", got)
	}
}

func TestTheDrawingIsXMLWithABarForEachFigure(t *testing.T) {
	r := aReport()
	r.CPU = `<&"'> 2 GHz`
	drawing := r.draw()
	text, bars := "", 0
	for d := xml.NewDecoder(bytes.NewReader(drawing)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, drawing)
		}
		switch token := token.(type) {
		case xml.CharData:
			text += string(token)
		case xml.StartElement:
			if token.Name.Local == "rect" {
				bars++
			}
		}
	}
	for _, want := range []string{"upload, 1 stream", "round trip, 1 stream", r.CPU, "breaks", direct} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if strings.Contains(text, ghost) {
		t.Errorf("%s is missing and drawn", ghost)
	}
	// The ground; two round trips, three uploads, one download.
	if bars != 1+2+3+1 {
		t.Errorf("%d rectangles", bars)
	}
}

func TestNamesOfLoadsAndSettings(t *testing.T) {
	got, err := chooseLoads("rtt16,loss,idle")
	if want := "rtt16 up1-loss down1-loss idle"; err != nil || strings.Join(got, " ") != want {
		t.Errorf("%v, %v; want %s", got, err, want)
	}
	if _, err := chooseLoads("rtt2"); err == nil || !strings.Contains(err.Error(), "rtt256") {
		t.Errorf("no load of that name: %v", err)
	}
	if _, err := chooseSystems("scp"); err == nil || !strings.Contains(err.Error(), "socat") {
		t.Errorf("no system of that name: %v", err)
	}
	seen := map[string]bool{}
	for _, name := range append(loadKeys(true), settingKeys()...) {
		if seen[name] && name != "idle" { // a setting with the one load of its name
			t.Errorf("%s stands for two things", name)
		}
		seen[name] = true
	}
}

// A load in turns has half of the time for each; its figures say so, and no others.
func TestALoadInTurnsIsSaid(t *testing.T) {
	p := &plan{rounds: 1, d: time.Second, loads: []string{"rtt1", "rtt16"}}
	for name, want := range map[string]struct {
		turns int
		d     time.Duration
	}{"rtt1": {4, time.Second / 2}, "rtt16": {0, time.Second}} {
		l := settings[0].loads[slices.IndexFunc(settings[0].loads, func(l load) bool { return l.name == name })]
		if d := p.turn(l).d; d != want.d || p.d != time.Second {
			t.Errorf("%s lasts %v of %v", name, d, p.d)
		}
		for _, f := range l.figures {
			if f.Turns != want.turns {
				t.Errorf("%s says %d turns", f.Name, f.Turns)
			}
		}
	}
	var said strings.Builder
	newReport(p).print(&said)
	if !strings.Contains(said.String(), "\nrtt1: 4 turns of 0.5 s a round\n") || strings.Contains(said.String(), "\nrtt16: ") {
		t.Errorf("it says %s", &said)
	}
}

func TestALoadThatLastsLongerOrComesOnceIsSaid(t *testing.T) {
	p := &plan{rounds: 3, d: time.Second, loads: []string{"rtt1-20ms", "down1-100ms", "idle"}}
	var said strings.Builder
	newReport(p).print(&said)
	for line, want := range map[string]bool{"down1-100ms: 4 s": true, "idle: once, with one system running at a time": true, "rtt1-20ms: 0.4 s": false} {
		if strings.Contains(said.String(), "\n"+line+"\n") != want {
			t.Errorf("says %q: want %v in\n%s", line, want, &said)
		}
	}
}

// TestAUsualRunIsBounded: a quarter of an hour with every peer installed.
func TestAUsualRunIsBounded(t *testing.T) {
	p := &plan{rounds: 3, d: 200 * time.Millisecond, loads: loadKeys(false)}
	for _, s := range systems {
		if !s.Seldom {
			p.systems = append(p.systems, s)
		}
	}
	if got := p.estimate(); got > 15*time.Minute {
		t.Errorf("about %v", got)
	}
}

func TestACrowdLeavesRoomForDescriptors(t *testing.T) {
	for _, c := range []struct {
		wanted, each int
		limit        uint64
		want         int
	}{{10000, 2, 20000, 9600}, {10000, 6, 20000, 3200}, {10000, 2, 1 << 20, 10000}, {10000, 2, 1024, 491}, {10, 2, 1024, 10}, {10000, 2, 1, 1}, {10000, 2, 1<<64 - 1, 10000}} {
		if got := crowdSize(c.wanted, c.each, c.limit); got != c.want {
			t.Errorf("%d wanted, limit %d: %d, want %d", c.wanted, c.limit, got, c.want)
		}
	}
}
