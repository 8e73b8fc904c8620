package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"drafter/vmm"
)

// Result is what a run leaves in a file.
type Result struct {
	Time     time.Time             `json:"time"`
	Machine  map[string]string     `json:"machine"`
	Rounds   map[string][]float64  `json:"rounds"`
	Medians  map[string]float64    `json:"medians"`
	Spread   map[string][2]float64 `json:"spread"` // least and most
	Ratios   map[string]float64    `json:"ratios"`
	Timeline []Moment              `json:"timeline"` // of the first move over loopback with the package absent
}

// ReadResult reads what a run has left.
func ReadResult(path string) (r Result, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// Key is the name of a figure of moves: over this link, of a guest of this size with this load, by this opponent.
func Key(link string, gib int, load, opponent, figure string) string {
	return fmt.Sprintf("%s/%dGiB/%s/%s/%s", link, gib, load, opponent, figure)
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	return (s[len(s)/2] + s[(len(s)-1)/2]) / 2
}

// medianRatio is the median of the ratios of each round, of figures that follow one another: how fast the machine is changes from one minute to the next.
func medianRatio(a, b []float64) float64 {
	var ratios []float64
	for i := range min(len(a), len(b)) {
		ratios = append(ratios, a[i]/b[i])
	}
	return median(ratios)
}

// results puts together what was measured.
func (b *bench) results() Result {
	r := Result{Time: time.Now().UTC().Truncate(time.Second), Machine: machine(), Rounds: b.values, Medians: map[string]float64{}, Spread: map[string][2]float64{}, Ratios: map[string]float64{}, Timeline: b.timeline}
	for name, v := range b.values {
		r.Medians[name] = median(v)
		r.Spread[name] = [2]float64{slices.Min(v), slices.Max(v)}
	}
	at := func(link string, gib int, opponent, figure string) float64 {
		return r.Medians[Key(link, gib, "random", opponent, figure)]
	}
	ratio := func(key string, a, b float64) {
		if a > 0 && b > 0 {
			r.Ratios[key] = a / b
		}
	}
	for opponent, suffix := range map[string]string{"present": "", "absent": "_absent"} {
		ratio("gap_vs_precopy300"+suffix, at("loopback", 1, opponent, "gap_ms"), at("loopback", 1, "precopy300", "gap_ms"))
		ratio("gap_vs_precopy30"+suffix, at("loopback", 1, opponent, "gap_ms"), at("loopback", 1, "precopy30", "gap_ms"))
		ratio("total_vs_precopy300"+suffix, at("loopback", 1, opponent, "total_ms"), at("loopback", 1, "precopy300", "total_ms"))
		ratio("bytes_vs_precopy300"+suffix, at("loopback", 1, opponent, "mb"), at("loopback", 1, "precopy300", "mb"))
	}
	ratio("gap_rtt100_ms", at("1gbit_rtt100", 1, "present", "gap_ms"), 1)
	ratio("gap_8g_over_1g", at("loopback", 8, "present", "gap_ms"), at("loopback", 1, "present", "gap_ms"))
	ratio("engine_vs_tcp", medianRatio(r.Rounds["engine_mb_per_s"], r.Rounds["raw_tcp_mb_per_s"]), 1)
	ratio("resume_ms", r.Medians["resume_ms"], 1)
	ratio("peak_rss_mb", max(at("loopback", 1, "present", "source_peak_rss_mb"), at("loopback", 1, "present", "target_peak_rss_mb"),
		at("loopback", 1, "absent", "source_peak_rss_mb"), at("loopback", 1, "absent", "target_peak_rss_mb")), 1)
	ratio("fc_resume_vs_load", r.Medians["fc_resume_ms"], r.Medians["fc_own_load_ms"])
	ratio("fc_gap_vs_own", r.Medians["fc_move_gap_ms"], r.Medians["fc_own_move_gap_ms"])
	ratio("fault_us", r.Medians["fault_served_p50_us"], 1)
	ratio("cpu_vs_copy", medianRatio(r.Rounds[Key("loopback", 1, "random", "absent", "cpu_s_per_gb")], r.Rounds["copy_tcp_cpu_s_per_gb"]), 1)
	return r
}

// machine says what it was measured on.
func machine() map[string]string {
	m := map[string]string{"cpus": strconv.Itoa(runtime.NumCPU()), "go": runtime.Version()}
	if p, err := vmm.HostProcessor(); err == nil {
		m["cpu"] = p.Model
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m["kernel"] = unix.ByteSliceToString(u.Release[:])
	}
	accel, why, _ := vmm.Accelerator(vmm.AccelAuto)
	m["accelerator"] = accel + ": " + why
	if out, err := exec.Command("qemu-system-x86_64", "--version").Output(); err == nil {
		m["qemu"], _, _ = strings.Cut(string(out), "\n")
	}
	return m
}

func (r Result) write(path string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}
