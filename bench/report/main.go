// The report makes a page with tables and SVG charts of what the benchmarks have found.
package main

import (
	_ "embed"
	"flag"
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"

	"drafter/bench"
)

// bar is what a ratio is to reach.
type bar struct {
	key, text string
	sign      string // "≤", "≥", or "" for none
	value     float64
}

var bars = []bar{
	{"run_memory_disk_mb", "memory written to the host's disk while the VM runs, MB", "≤", 0},
	{"run_memory_share", "host memory of a VM beyond the pages that its guest has touched, over 5 % of these + 40 MB", "≤", 1},
	{"run_memfd_memory_share", "the same of a plain QEMU with memfd", "", 0},
	{"run_redis_vs_memfd", "sets of Redis per second over those under a plain QEMU with memfd", "≥", 1},
	{"run_bound_vs_memfd", "writes per second of a memory-bound program, over the same", "", 0},
	{"downtime_ms", "downtime of a move, loopback, package at the target, ms", "≤", 10},
	{"gap_vs_precopy300", "gap, package at the target, over QEMU's pre-copy with a limit of 300 ms", "≤", 0.45},
	{"gap_vs_precopy30", "the same over a limit of 30 ms", "≤", 1},
	{"total_vs_precopy300", "total time, same case", "≤", 0.25},
	{"whole_vs_precopy300", "from the command that starts the target, same case", "≤", 0.25},
	{"cpu_vs_precopy300", "CPU time of all processes of a move, both ends, same case", "≤", 0.4},
	{"bytes_vs_precopy300", "bytes sent, same case", "≤", 0.25},
	{"gap_absent_vs_precopy300_disks", "gap, package absent, over QEMU's pre-copy with a limit of 300 ms that brings the disks, too", "≤", 0.45},
	{"total_absent_vs_precopy300_disks", "total time, same case", "≤", 0.6},
	{"whole_absent_vs_precopy300_disks", "from the command that starts the target, same case", "", 0},
	{"memory_bytes_absent_vs_precopy300_disks", "bytes sent of memory alone, same case", "≤", 0.8},
	{"bytes_absent_vs_precopy300_disks", "bytes sent of all, same case", "", 0},
	{"gap_rtt100_ms", "gap at 100 ms round trip, ms", "≤", 250},
	{"gap_8g_over_1g", "gap of an 8 GiB guest over that of a 1 GiB one", "≤", 1.2},
	{"handover_shared_ms", "downtime of a hand-over within a host, ms", "≤", 9},
	{"handover_shared_memory_mb", "memory that was copied for it, MB", "≤", 0},
	{"handover_private_ms", "the same out of a private mapping, ms", "", 0},
	{"handover_private_memory_mb", "memory that was copied for it: what the guest had written, MB", "", 0},
	{"suspend_500_pause_ms", "pause of a suspend with 500 MB written, ms", "≤", 30},
	{"clones_20_ms", "20 clones of a 1 GiB Redis, one after the other, until all answer, ms", "≤", 3000},
	{"clone_memory_share", "host memory of a clone beyond the VMM's own, over 1.1 × what it wrote + 2 MB", "≤", 1},
	{"resume_ms", "resume from a package in a started VMM, ms", "≤", 8},
	{"peak_rss_mb", "largest resident set of our process, MB", "≤", 100},
	{"engine_vs_tcp", "engine alone over raw TCP on loopback", "≥", 0.8},
	{"fc_downtime_ms", "downtime of a move under Firecracker, ms", "≤", 12},
	{"fc_resume_vs_load", "resume under Firecracker over its own load of the memory file", "≤", 1.3},
	{"fc_gap_vs_own", "gap of a move under Firecracker over that of its own full snapshot, copied and loaded", "", 0},
	{"fault_us", "fault on a page that is in the page cache, µs", "≤", 25},
	{"cpu_vs_copy", "CPU of our processes per GB sent over that of a plain copy over TCP", "", 0},
}

func main() {
	input := flag.String("input", "bench/results/latest.json", "File with the result")
	output := flag.String("output", "docs", "Directory for benchmarks.md, and for the charts in benchmarks/ below it")
	flag.Parse()
	if err := write(*input, *output); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}

// report is a result with what to make of it.
type report struct {
	bench.Result
	opponents []string
	own       map[string]bool // QEMU's
}

func write(input, directory string) error {
	r := report{}
	var err error
	if r.Result, err = bench.ReadResult(input); err != nil {
		return err
	}
	r.opponents, r.own = bench.Opponents()
	charts := filepath.Join(directory, "benchmarks")
	if err := os.MkdirAll(charts, 0o755); err != nil {
		return err
	}
	for name, chart := range map[string]func() (*plot.Plot, error){
		"gap.svg": r.chartOpponents, "size.svg": r.chartSizes, "trip.svg": r.chartTrips, "timeline.svg": r.chartTimeline,
	} {
		p, err := chart()
		if err == nil {
			p.Title.TextStyle.Font.Size = vg.Points(11)
			p.Title.Padding = vg.Points(6)
			p.X.Max += (p.X.Max - p.X.Min) / 20 // else what is at the edge is cut
			p.Y.Max *= 1.15
			err = p.Save(20*vg.Centimeter, 10*vg.Centimeter, filepath.Join(charts, name))
		}
		if err != nil {
			return fmt.Errorf("chart %s: %w", name, err)
		}
	}
	return os.WriteFile(filepath.Join(directory, "benchmarks.md"), []byte(r.markdown(input)), 0o644)
}

//go:embed measured.md
var measured string

func (r *report) markdown(path string) string {
	var w strings.Builder
	fmt.Fprintf(&w, "# Benchmarks\n\nMade by `make bench-report` from `%s`, which `make bench` (or `make bench-quick`) leaves; do not edit. Measured on %s", path, r.Time.Format("2006-01-02"))
	var keys []string
	for k := range r.Machine {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		fmt.Fprintf(&w, "; %s: %s", k, r.Machine[k])
	}
	w.WriteString(".\n\n" + measured + "\n## Against what is to be reached\n\nIn brackets, the least and the most of its rounds.\n\n" +
		"| figure | key | bar | here | rounds | |\n|---|---|---|---|---|---|\n")
	for _, b := range bars {
		v, ok := r.Ratios[b.key]
		if !ok {
			fmt.Fprintf(&w, "| %s | `%s` | %s | not measured | | |\n", b.text, b.key, b)
			continue
		}
		least, most, rounds := r.RatioSpread(b.key)
		fmt.Fprintf(&w, "| %s | `%s` | %s | %.3g (%.3g … %.3g) | %d | %s |\n", b.text, b.key, b, v, least, most, rounds, b.verdict(v))
	}
	w.WriteString("\n![gap by opponent](benchmarks/gap.svg)\n\n![one migration](benchmarks/timeline.svg)\n\n![gap over size](benchmarks/size.svg)\n\n![gap over round trip](benchmarks/trip.svg)\n\n## All figures\n\nMedians, with least and most.\n")
	r.tables(&w)
	return w.String()
}

func (b bar) String() string {
	if b.sign == "" {
		return "–"
	}
	return fmt.Sprintf("%s %g", b.sign, b.value)
}

// verdict is "" without a bar.
func (b bar) verdict(v float64) string {
	switch {
	case b.sign == "":
		return ""
	case b.sign == "≤" && v <= b.value, b.sign == "≥" && v >= b.value:
		return "reached"
	}
	return "not reached"
}

// tables writes a table for each contest, and one for what is of none.
func (r *report) tables(w *strings.Builder) {
	figures := []string{"gap_ms", "p99_ms", "p50_ms", "downtime_ms", "total_ms", "whole_ms", "mb", "memory_mb", "cpu_s", "cpu_s_per_gb", "source_peak_rss_mb", "target_peak_rss_mb"}
	var contests, others []string
	for name := range r.Rounds {
		parts := strings.Split(name, "/")
		if len(parts) != 5 {
			others = append(others, name)
			continue
		}
		if c := strings.Join(parts[:3], "/"); !slices.Contains(contests, c) {
			contests = append(contests, c)
		}
	}
	slices.Sort(contests)
	slices.Sort(others)
	for _, c := range contests {
		fmt.Fprintf(w, "\n### %s\n\n| | rounds | %s |\n|---|---|%s\n", strings.ReplaceAll(c, "/", ", "), strings.Join(figures, " | "), strings.Repeat("---|", len(figures)))
		for _, o := range r.opponents {
			rounds := r.Rounds[c+"/"+o+"/gap_ms"]
			if rounds == nil {
				continue
			}
			fmt.Fprintf(w, "| %s | %d |", o, len(rounds))
			for _, f := range figures {
				key := c + "/" + o + "/" + f
				if r.Rounds[key] == nil {
					w.WriteString(" |")
					continue
				}
				fmt.Fprintf(w, " %.4g (%.4g … %.4g) |", r.Medians[key], r.Spread[key][0], r.Spread[key][1])
			}
			w.WriteString("\n")
		}
	}
	w.WriteString("\n### Parts\n\n| figure | rounds | median | least | most |\n|---|---|---|---|---|\n")
	for _, name := range others {
		fmt.Fprintf(w, "| `%s` | %d | %.4g | %.4g | %.4g |\n", name, len(r.Rounds[name]), r.Medians[name], r.Spread[name][0], r.Spread[name][1])
	}
}

var ours, theirs = color.RGBA{0x1b, 0x6c, 0xa8, 0xff}, color.RGBA{0xb0, 0xb0, 0xb0, 0xff}

// chartOpponents shows the gap of each opponent on loopback.
func (r *report) chartOpponents() (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text = "Longest silence of a 1 GiB guest that is moved, loopback (median)"
	p.Y.Label.Text = "ms"
	p.Y.Min = 0
	var labels []string
	for _, o := range r.opponents {
		v := r.Medians[bench.Key("loopback", 1, "random", o, "gap_ms")]
		if v == 0 {
			continue
		}
		bar, err := plotter.NewBarChart(plotter.Values{v}, vg.Points(28))
		if err != nil {
			return nil, err
		}
		bar.XMin = float64(len(labels))
		bar.Color = ours
		if r.own[o] {
			bar.Color = theirs
		}
		bar.LineStyle.Width = 0
		p.Add(bar)
		labels = append(labels, o)
	}
	if len(labels) == 0 {
		return p, nil
	}
	p.NominalX(labels...)
	p.X.Min, p.X.Max = -0.5, float64(len(labels))-0.5
	return p, nil
}

// lines adds a line for each of some opponents.
func (r *report) lines(p *plot.Plot, names []string, at func(name string) plotter.XYs) error {
	for _, name := range names {
		points := at(name)
		if len(points) == 0 {
			continue
		}
		l, s, err := plotter.NewLinePoints(points)
		if err != nil {
			return err
		}
		l.Color, s.Color = ours, ours
		if r.own[name] {
			l.Color, s.Color = theirs, theirs
		}
		if name == "absent" {
			l.Dashes = []vg.Length{vg.Points(4), vg.Points(3)}
		}
		p.Add(l, s)
		p.Legend.Add(name, l, s)
	}
	p.Legend.Top = true
	p.Y.Min = 0
	return nil
}

func (r *report) chartSizes() (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text = "Longest silence over the size of the guest's memory, loopback (median)"
	p.X.Label.Text, p.Y.Label.Text = "GiB", "ms"
	err := r.lines(p, []string{"precopy300", "present"}, func(name string) (points plotter.XYs) {
		for _, gib := range []int{1, 2, 4, 8} {
			if v := r.Medians[bench.Key("loopback", gib, "random", name, "gap_ms")]; v > 0 {
				points = append(points, plotter.XY{X: float64(gib), Y: v})
			}
		}
		return points
	})
	return p, err
}

func (r *report) chartTrips() (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text = "Longest silence of a 1 GiB guest over the round trip (median)"
	p.X.Label.Text, p.Y.Label.Text = "ms (0: loopback)", "ms"
	err := r.lines(p, []string{"precopy300", "present", "absent"}, func(name string) (points plotter.XYs) {
		for _, l := range []struct {
			name string
			trip float64
		}{{"loopback", 0}, {"1gbit_rtt100", 100}} {
			if v := r.Medians[bench.Key(l.name, 1, "random", name, "gap_ms")]; v > 0 {
				points = append(points, plotter.XY{X: l.trip, Y: v})
			}
		}
		return points
	})
	return p, err
}

// chartTimeline shows one migration as its source sees it.
func (r *report) chartTimeline() (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text = "One migration: memory that is dirty, and bytes sent (package absent)"
	p.X.Label.Text, p.Y.Label.Text = "ms", "MB"
	for _, series := range []struct {
		name  string
		value func(bench.Moment) float64
		color color.RGBA
	}{
		{"dirty", func(m bench.Moment) float64 { return m.DirtyMB }, theirs},
		{"sent", func(m bench.Moment) float64 { return m.SentMB }, ours},
	} {
		var points plotter.XYs
		for _, m := range r.Timeline {
			points = append(points, plotter.XY{X: m.MS, Y: series.value(m)})
		}
		if len(points) == 0 {
			continue
		}
		l, err := plotter.NewLine(points)
		if err != nil {
			return nil, err
		}
		l.Color = series.color
		l.Width = vg.Points(1.5)
		p.Add(l)
		p.Legend.Add(series.name, l)
	}
	// The phases' names stand below one another: those of the handoff are close.
	top := p.Y.Max
	last, row := "", 0.0
	for _, m := range r.Timeline {
		if m.Phase == last {
			continue
		}
		last = m.Phase
		l, err := plotter.NewLine(plotter.XYs{{X: m.MS, Y: 0}, {X: m.MS, Y: top}})
		if err != nil {
			return nil, err
		}
		l.Dashes = []vg.Length{vg.Points(2), vg.Points(2)}
		l.Width = vg.Points(0.5)
		text, err := plotter.NewLabels(plotter.XYLabels{XYs: plotter.XYs{{X: m.MS, Y: top * (0.75 - row/14)}}, Labels: []string{" " + m.Phase}})
		if err != nil {
			return nil, err
		}
		row++
		p.Add(l, text)
	}
	p.Legend.Top, p.Legend.Left = true, true
	p.X.Max += (p.X.Max - p.X.Min) / 6 // room for the last name
	return p, nil
}
