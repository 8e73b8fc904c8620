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
	Time    time.Time             `json:"time"`
	Machine map[string]string     `json:"machine"`
	Rounds  map[string][]float64  `json:"rounds"`
	Medians map[string]float64    `json:"medians"`
	Spread  map[string][2]float64 `json:"spread"` // least and most
	Ratios  map[string]float64    `json:"ratios"`
	// of the first move over loopback with the package absent
	Timeline []Moment `json:"timeline"`
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

// Key is the name of a figure of moves: over this link, of a guest of this size with this load, by
// this opponent.
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

// results puts together what was measured.
func (b *bench) results() Result {
	r := Result{Time: time.Now().UTC().Truncate(time.Second), Machine: machine(), Rounds: b.values, Medians: map[string]float64{}, Spread: map[string][2]float64{}, Ratios: map[string]float64{}, Timeline: b.timeline}
	for name, v := range b.values {
		r.Medians[name] = median(v)
		r.Spread[name] = [2]float64{slices.Min(v), slices.Max(v)}
	}
	for _, q := range ratios() {
		if v, measured := q.value(&r); measured {
			r.Ratios[q.key] = v
		}
	}
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
