package peer

import (
	"strings"
	"testing"

	"drafter/internal/block"
	"drafter/vmm"
)

// origin is a package elsewhere with devices of so many bytes.
type origin map[string]int64

func (o origin) Names() (names []string) {
	for name := range o {
		names = append(names, name)
	}
	return names
}

func (o origin) Remote(name string) (block.Remote, bool) {
	return block.Remote{Contents: &block.Contents{Size: o[name]}}, true
}

func (o origin) Close() error { return nil }

// A package that is too large for this host is refused before anything is made, wherever it is.
func TestOriginTooLarge(t *testing.T) {
	memory, err := block.HostMemory()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		origin origin
		change func(*Config)
		want   string
	}{
		{origin: origin{vmm.Memory: memory, vmm.Disk: memory}},
		{origin: origin{vmm.Memory: memory + 1}, want: "allow it with --max-memory"},
		{origin: origin{vmm.Memory: memory + 1}, change: func(c *Config) { c.Host.MaxMemory = 2 * memory }},
		{origin: origin{vmm.Disk: 4 << 60}, want: "--max-size allows more"},
		{origin: origin{vmm.Disk: 4 << 60, "more": 4 << 60}, want: "--max-size allows more"},
		{origin: origin{vmm.Disk: 1 << 20}, change: func(c *Config) { c.Limits.MaxSize = 1 << 19 }, want: "--max-size allows more"},
	} {
		p := &Peer{}
		if tt.change != nil {
			tt.change(&p.config)
		}
		err := p.checkOrigin(tt.origin)
		if (err != nil) != (tt.want != "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v; want %q", tt.origin, err, tt.want)
		}
	}
}
