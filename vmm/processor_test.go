package vmm

import (
	"strings"
	"testing"
)

const (
	intel = `processor	: 0
vendor_id	: GenuineIntel
model name	: Intel(R) Xeon(R) Processor @ 2.80GHz
flags		: fpu sse2 avx512f avx2 pku

processor	: 1
vendor_id	: GenuineIntel
flags		: fpu
`
	arm = `processor	: 0
Features	: fp asimd sve
CPU implementer	: 0x41
CPU part	: 0xd40
`
)

func TestProcessorCheck(t *testing.T) {
	p := parseProcessor(intel)
	if p.Vendor != "GenuineIntel" || p.Model != "Intel(R) Xeon(R) Processor @ 2.80GHz" || strings.Join(p.Flags, " ") != "avx2 avx512f fpu pku sse2" {
		t.Fatalf("parsed %+v", p)
	}
	with := func(change func(*Processor)) *Processor {
		c := parseProcessor(intel)
		change(c)
		return c
	}
	for what, c := range map[string]struct {
		source  *Processor
		refused string // "" for accepted
	}{
		"the same":         {p, ""},
		"an older one":     {with(func(c *Processor) { c.Flags = []string{"fpu", "sse2"} }), ""},
		"a newer one":      {with(func(c *Processor) { c.Flags = []string{"amx_tile", "fpu", "xtilecfg"} }), "amx_tile xtilecfg; migrate to a CPU that has them"},
		"another vendor":   {with(func(c *Processor) { c.Vendor = "AuthenticAMD" }), "a CPU of AuthenticAMD, this host's is of GenuineIntel"},
		"another's family": {parseProcessor(arm), "a CPU of 0x41"},
	} {
		err := p.Check(c.source)
		if (err == nil) != (c.refused == "") || err != nil && !strings.Contains(err.Error(), c.refused) {
			t.Errorf("%s: %v; want %q", what, err, c.refused)
		}
	}
}

func TestHostProcessor(t *testing.T) {
	p, err := HostProcessor()
	if err != nil || p.Vendor == "" || len(p.Flags) == 0 {
		t.Errorf("this host's CPU: %+v, %v", p, err)
	}
	if err := p.Check(p); err != nil {
		t.Errorf("a CPU refuses its own VMs: %v", err)
	}
}
