package peer

import (
	"strings"
	"testing"

	"drafter/internal/block"
	"drafter/vmm"
)

// sized is a package elsewhere with devices of so many bytes.
type sized map[string]int64

func (o sized) Names() (names []string) {
	for name := range o {
		names = append(names, name)
	}
	return names
}

func (o sized) Remote(name string) (block.Remote, bool) {
	return block.Remote{Contents: &block.Contents{Size: o[name]}}, true
}

func (o sized) Close() error { return nil }

// A package that is too large for this host is refused before anything is made, wherever it is.
func TestOriginTooLarge(t *testing.T) {
	memory, err := block.HostMemory()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		origin sized
		change func(*Config)
		want   string
	}{
		{origin: sized{vmm.Memory: memory, vmm.Disk: memory}},
		{origin: sized{vmm.Memory: memory + 1}, want: "allow it with --max-memory"},
		{origin: sized{vmm.Memory: memory + 1}, change: func(c *Config) { c.Host.MaxMemory = 2 * memory }},
		{origin: sized{vmm.Disk: 4 << 60}, want: "--max-size allows more"},
		{origin: sized{vmm.Disk: 4 << 60, "more": 4 << 60}, want: "--max-size allows more"},
		{origin: sized{vmm.Disk: 1 << 20}, change: func(c *Config) { c.Limits.MaxSize = 1 << 19 }, want: "--max-size allows more"},
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
