// Package bench measures Drafter beside what its users would use instead: the same guest, the same
// load, in turn, in one run. The result is a file with all rounds; bench/report makes tables and
// charts of it.
package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"drafter/internal/mark"
	"drafter/internal/tour"
)

// Options say what is measured, and where.
type Options struct {
	Drafter string // the drafter binary
	// where packages and instances are made; what an earlier run left in it is removed first
	Dir      string
	Quick    bool      // whether to measure only what the ratios need
	Parts    []string  // of [Parts]; none: all
	Rounds   int       // how often each is measured; 0: as often as the part says
	Output   string    // file for the result
	Progress io.Writer // each figure as it is measured, and a table of medians at the end
}

type part struct {
	name, text string
	quick      bool
	rounds     int
	measure    func(*bench, context.Context, int) error
}

var parts = []part{
	{"engine", "the device engine without a VM, beside a copy in memory and raw TCP on loopback", true, 9, (*bench).engine},
	{"wire", "encoding and decoding of what is sent", false, 5, (*bench).wire},
	{"device", "a device of an instance, read and written, beside a plain file", false, 3, (*bench).device},
	{"resume", "resume of a package in a VMM that runs", true, 5, (*bench).resume},
	{"start", "boot, resume and suspend by the commands, several clones at once, and packing", false, 3, (*bench).start},
	{"run", "a guest that runs, beside a plain QEMU with memfd: its speed, and what it costs the host", true, 3, (*bench).run},
	{"suspend", "suspend of a guest that has written 0, 100 and 500 MB of its memory", true, 3, (*bench).suspend},
	{"clones", "20 clones of a package, one after the other, and the memory of each", true, 3, (*bench).cloneInTurn},
	{"handover", "moves within this host over a UNIX socket, where memory changes hands", true, 3, (*bench).handOver},
	{"registry", "start from a registry over 1 Gbit/s, beside a copy of the package", false, 3, (*bench).registry},
	{"faults", "page faults that are served to a VMM, beside a file that it maps", false, 5, (*bench).faults},
	{"firecracker", "Firecracker with a test guest, beside what it does by itself", false, 5, (*bench).firecracker},
	{"move", "live migration under load, beside QEMU's own", true, 0, (*bench).move},
}

// Parts are the names of what can be measured, in order, with what each is.
func Parts() (names, texts []string) {
	for _, p := range parts {
		names, texts = append(names, p.name), append(texts, p.text)
	}
	return names, texts
}

// bench collects measurements by name.
type bench struct {
	drafter  tour.Drafter
	dir      string
	quick    bool
	progress io.Writer

	names    []string
	values   map[string][]float64
	timeline []Moment // of one migration
}

// Run measures. It needs root, and gcc for the guest's load. The result is written at the end only:
// a run that fails leaves the last one alone.
func Run(ctx context.Context, o Options) error {
	if o.Rounds < 0 {
		return errors.New("the number of rounds must not be negative")
	}
	names, _ := Parts()
	for _, name := range o.Parts {
		if !slices.Contains(names, name) {
			return fmt.Errorf("part %q is unknown; choose of %s", name, strings.Join(names, ", "))
		}
	}
	dir, err := filepath.Abs(o.Dir) // a VMM has a working directory of its own
	if err != nil {
		return err
	}
	if err := mark.Renew(dir, ".drafter-bench", "drafter-bench"); err != nil {
		return fmt.Errorf("--dir: %w", err)
	}
	b := &bench{drafter: tour.Drafter{Bin: o.Drafter, Logs: dir}, dir: dir, quick: o.Quick, progress: o.Progress, values: map[string][]float64{}}
	for _, p := range parts {
		if len(o.Parts) > 0 && !slices.Contains(o.Parts, p.name) || len(o.Parts) == 0 && o.Quick && !p.quick {
			continue
		}
		rounds := p.rounds
		if o.Quick {
			rounds = (rounds + 1) / 2
		}
		if o.Rounds > 0 {
			rounds = o.Rounds
		}
		begin := time.Now()
		if err := p.measure(b, ctx, rounds); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		fmt.Fprintf(b.progress, "%s: done in %s\n", p.name, time.Since(begin).Round(time.Second))
	}
	if err := b.results().write(o.Output); err != nil {
		return err
	}
	b.table()
	return nil
}

func (b *bench) add(name string, value float64) {
	if b.values[name] == nil {
		b.names = append(b.names, name)
	}
	b.values[name] = append(b.values[name], value)
	fmt.Fprintf(b.progress, "%s: %.3g\n", name, value)
}

// uncounted measures without an effect on the result.
func (b *bench) uncounted(measure func() error) error {
	names, values, timeline, progress := slices.Clone(b.names), maps.Clone(b.values), b.timeline, b.progress
	defer func() { b.names, b.values, b.timeline, b.progress = names, values, timeline, progress }()
	b.progress = io.Discard
	return measure()
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// network makes network namespaces for VMs, until end.
func (b *bench) network(ctx context.Context, count int) (end func() error, err error) {
	// guests tick there
	nat, err := b.drafter.Start("nat", "--namespace-count", fmt.Sprint(count), "--allow-host", fmt.Sprintf("%d/udp", tickPort))
	if err != nil {
		return nil, err
	}
	if _, err := nat.Await(ctx, "NAT is up"); err != nil {
		return nil, errors.Join(err, nat.End())
	}
	return nat.End, nil
}

func (b *bench) table() {
	table := tabwriter.NewWriter(b.progress, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "\tmedian\tmin\tmax\trounds\t")
	for _, name := range b.names {
		v := b.values[name]
		fmt.Fprintf(table, "%s\t%.3g\t%.3g\t%.3g\t%d\t\n", name, median(v), slices.Min(v), slices.Max(v), len(v))
	}
	_ = table.Flush() // to a terminal, most often
}

func (b *bench) vms() string { return filepath.Join(b.dir, "vms") }
