package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"slices"
	"strings"
)

// drawn are the figures that a drawing has, each in a panel of its own, in words.
var drawn = []struct{ figure, title string }{
	{"rtt1 p50", "round trip, 1 stream"},
	{"rtt16 p50", "round trip, 16 streams"},
	{"rtt256 p50", "round trip, 256 streams"},
	{"up1", "upload, 1 stream"},
	{"down1", "download, 1 stream"},
	{"down8", "download, 8 streams"},
	{"conns", "connections"},
	{"sse first", "first event of an HTTP stream"},
	{"beside", "round trip p99 beside a download"},
	{"S8", "pgbench -S, 8 clients"},
	{"B8", "pgbench TPC-B, 8 clients"},
	{"rtt1-20ms p50", "round trip over 20 ms"},
	{"down1-100ms", "download over 100 ms, 1 Gbit/s"},
	{"down1-loss", "download with 1 % loss"},
	{"down1 CPU", "CPU of a download"},
	{"idle memory", "memory of an idle stream"},
}

// The drawing's measures, in pixels.
const (
	panelColumns = 3
	panelWidth   = 360
	panelTop     = 48 // of its title
	panelGap     = 20
	barHeight    = 15
	barGap       = 4
	barsFrom     = 132 // beside the names
	barsLength   = 160 // of the longest; its number stands behind it
	drawingTop   = 64
)

// draw gives the medians as an SVG: a panel for each figure, a bar for each system.
func (r *report) draw() []byte {
	type panel struct {
		title string
		f     figure
	}
	var panels []panel
	for _, d := range drawn {
		i := slices.IndexFunc(r.Figures, func(f figure) bool { return f.Name == d.figure })
		if i >= 0 && slices.ContainsFunc(r.Systems, func(m *measured) bool { _, ok := m.Median[d.figure]; return ok }) {
			panels = append(panels, panel{d.title, r.Figures[i]})
		}
	}
	var rows []*measured
	for _, m := range r.Systems {
		if m.Missing == "" {
			rows = append(rows, m)
		}
	}
	panelHeight := panelTop + len(rows)*(barHeight+barGap)
	lines := (len(panels) + panelColumns - 1) / panelColumns
	width := panelColumns*(panelWidth+panelGap) + panelGap
	height := drawingTop + lines*(panelHeight+panelGap) + panelGap

	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" font-family="system-ui, sans-serif" font-size="11">`+"\n", width, height)
	b.WriteString(`<rect width="100%" height="100%" fill="#ffffff"/>` + "\n")
	text := func(x, y int, attributes, s string) {
		fmt.Fprintf(&b, `<text x="%d" y="%d" %s>`, x, y, attributes)
		xml.EscapeText(&b, []byte(s))
		b.WriteString("</text>\n")
	}
	text(panelGap, 26, `font-size="15" font-weight="600" fill="#111827"`, "portal beside others, in one run")
	text(panelGap, 44, `fill="#6b7280"`, fmt.Sprintf("%s, %d cores, %s, %s; medians of %d rounds; each panel has its own scale", r.CPU, r.Cores, r.System, r.Date.Format("2006-01-02"), r.Rounds))
	for i, p := range panels {
		x := panelGap + i%panelColumns*(panelWidth+panelGap)
		y := drawingTop + i/panelColumns*(panelHeight+panelGap)
		better := "more is better"
		if p.f.Less {
			better = "less is better"
		}
		text(x, y+14, `font-size="13" font-weight="600" fill="#111827"`, p.title)
		text(x, y+30, `fill="#6b7280"`, p.f.Unit+", "+better)
		most := 0.0
		for _, m := range rows {
			most = max(most, m.Median[p.f.Name])
		}
		for k, m := range rows {
			at := y + panelTop - 8 + k*(barHeight+barGap)
			base := at + barHeight - 4
			ours := !m.Peer && strings.HasPrefix(m.Name, "portal")
			weight, colour := "400", "#9ca3af"
			switch {
			case ours:
				weight, colour = "600", "#2563eb"
			case !m.Peer:
				colour = "#d1d5db"
			}
			text(x+barsFrom-6, base, `text-anchor="end" fill="#374151" font-weight="`+weight+`"`, m.Name)
			v, ok := m.Median[p.f.Name]
			if !ok {
				why := "not measured"
				if m.Failed[p.f.Load] != "" {
					why = "breaks"
				}
				text(x+barsFrom+4, base, `fill="#b91c1c" font-style="italic"`, why)
				continue
			}
			length := 0
			if most > 0 {
				length = max(0, int(v/most*barsLength))
			}
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%d" height="%d" rx="2" fill="%s"/>`+"\n", x+barsFrom, at, max(length, 1), barHeight, colour)
			text(x+barsFrom+length+5, base, `fill="#374151" font-weight="`+weight+`"`, number(v))
		}
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}
