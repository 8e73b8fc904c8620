package vmm

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"drafter/internal/kind"
)

// Processor is what guests see of a host's CPU when they are not emulated.
type Processor struct {
	Vendor string   `json:"vendor"`
	Model  string   `json:"model"`
	Flags  []string `json:"flags"` // sorted
}

// HostProcessor describes the CPU of this host, as in /proc/cpuinfo.
func HostProcessor() (*Processor, error) {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return nil, fmt.Errorf("describe CPU: %w", err)
	}
	return parseProcessor(string(b)), nil
}

func parseProcessor(cpuinfo string) *Processor {
	p := &Processor{}
	first, _, _ := strings.Cut(cpuinfo, "\n\n")
	for line := range strings.SplitSeq(first, "\n") {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch strings.TrimSpace(key) {
		case "vendor_id", "CPU implementer":
			p.Vendor = value
		case "model name", "CPU part":
			p.Model = value
		case "flags", "Features":
			p.Flags = strings.Fields(value)
		}
	}
	slices.Sort(p.Flags)
	return p
}

// Check refuses, with [ErrIncompatible], to take a VM from a host whose CPU has features that this
// one lacks, and names them: a guest that has found a feature uses it.
func (p *Processor) Check(source *Processor) error {
	if source.Vendor != p.Vendor {
		return kind.Of(ErrIncompatible, fmt.Errorf("the VM comes from a CPU of %s, this host's is of %s; guests do not move between the two", source.Vendor, p.Vendor))
	}
	var missing []string
	for _, f := range source.Flags {
		if _, found := slices.BinarySearch(p.Flags, f); !found {
			missing = append(missing, f)
		}
	}
	if len(missing) > 0 {
		return kind.Of(ErrIncompatible, fmt.Errorf("this host's CPU (%s) lacks features of the source's (%s): %s; migrate to a CPU that has them, or make the package with a CPU model that does without",
			p.Model, source.Model, strings.Join(missing, " ")))
	}
	return nil
}
