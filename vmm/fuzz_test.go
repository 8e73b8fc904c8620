package vmm

import (
	"bytes"
	"strings"
	"testing"

	"drafter/internal/block"
)

// A config device of a size that no memory holds is refused, and not read.
func TestHugeConfigDevice(t *testing.T) {
	if c, err := DecodeConfigDevice(block.NewZeros(4 << 60)); err == nil || !strings.Contains(err.Error(), "so it is no package config") {
		t.Errorf("%v, %v", c, err)
	}
}

// FuzzDecodePackageConfig decodes any bytes. A config that is accepted is one after it was encoded,
// too, and its devices' names are names of files.
func FuzzDecodePackageConfig(f *testing.F) {
	b, err := validConfig().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(append(b, 0, 0, 0))
	f.Add([]byte(`{"version":1,"devices":[{"name":"../../etc/passwd","size":1}]}`))
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := DecodePackageConfig(b)
		if err != nil {
			return
		}
		for _, d := range c.Devices {
			if err := CheckDeviceName(d.Name); err != nil || d.Size <= 0 {
				t.Fatalf("device %q of %d bytes: %v", d.Name, d.Size, err)
			}
		}
		again, err := c.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if c, err = DecodePackageConfig(again); err != nil {
			t.Fatalf("%s: %v", again, err)
		}
		if third, err := c.Encode(); err != nil || !bytes.Equal(third, again) {
			t.Fatalf("%s became %s, %v", again, third, err)
		}
	})
}
