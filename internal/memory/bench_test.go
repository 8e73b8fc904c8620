package memory

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
	"unsafe"

	"drafter/internal/block"
)

// latencies are what a process measures of its own faults, in nanoseconds.
type latencies struct{ Missing, Write []int64 }

// measure reads a word of every 16th page, so that none has come with another, and then writes to
// it, which is the first write to a protected page.
func measure(memory []byte) (l latencies) {
	const stride = 16 * page
	for off := 0; off < len(memory); off += stride {
		begin := time.Now()
		word(memory, off/page, 0)
		l.Missing = append(l.Missing, time.Since(begin).Nanoseconds())
	}
	for off := 0; off < len(memory); off += stride {
		begin := time.Now()
		*(*uint64)(unsafe.Pointer(&memory[off])) = 1
		l.Write = append(l.Write, time.Since(begin).Nanoseconds())
	}
	return l
}

// BenchmarkFault measures, in the process that faults, how long it waits for a page that is in the
// page cache, and for the first write to one.
func BenchmarkFault(b *testing.B) {
	const pages = 16 * 4096
	path := filepath.Join(b.TempDir(), "memory")
	if err := os.WriteFile(path, newDevice(pages).data, 0o600); err != nil {
		b.Fatal(err)
	}
	memory, err := block.OpenFile(path, true)
	if err != nil {
		b.Fatal(err)
	}
	defer memory.Close()
	var all latencies
	for b.Loop() {
		p := start(b, use{Pages: pages, Measure: true}, memory, TrackFaults)
		line, err := p.stdout.ReadBytes('\n')
		if err != nil {
			b.Fatal(err, p.stderr.String())
		}
		var l latencies
		if err := json.Unmarshal(line, &l); err != nil {
			b.Fatal(err)
		}
		all.Missing, all.Write = append(all.Missing, l.Missing...), append(all.Write, l.Write...)
		p.close()
	}
	for name, v := range map[string][]int64{"missing": all.Missing, "write": all.Write} {
		slices.Sort(v)
		b.ReportMetric(float64(v[len(v)/2])/1e3, name+"-p50-µs")
		b.ReportMetric(float64(v[len(v)*99/100])/1e3, name+"-p99-µs")
	}
	b.ReportMetric(0, "ns/op") // of a whole process: means nothing
}
