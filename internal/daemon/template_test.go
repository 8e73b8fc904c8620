package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"drafter/api"
	"drafter/vmm"
)

// A package is not resumed by another VMM, or on another CPU, than it was made with: a run would make
// one, or here, where it may not, says that there is none.
func TestTemplateFits(t *testing.T) {
	for _, c := range []struct {
		name   string
		driver noDriver
		run    api.Run
		found  bool
	}{
		{"the same", noDriver{}, api.Run{}, true},
		{"an upgrade of the VMM", noDriver{version: "2"}, api.Run{}, false},
		{"another CPU model", noDriver{cpu: "other"}, api.Run{}, false},
		{"a CPU that is not emulated", noDriver{accel: vmm.AccelKVM}, api.Run{}, false},
		{"more memory", noDriver{}, api.Run{Memory: 2 << 30}, false},
	} {
		config := testConfig(testDir(t))
		config.Drivers = vmm.Drivers{c.driver}
		d, err := Open(config)
		if err != nil {
			t.Fatal(err)
		}
		c.run.Image, c.run.Pull = "docker://image", "never"
		o, err := d.Run(c.run)
		err = d.done(t, o, err)
		if found := err == nil; found != c.found {
			t.Errorf("%s: found is %v, %v", c.name, found, err)
		}
		for _, vm := range d.VMs() {
			o, err := d.Remove(vm.ID, true)
			if err := d.done(t, o, err); err != nil {
				t.Error(err)
			}
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A CPU that is not emulated counts as it is, and one that is does not.
func TestTemplateProcessor(t *testing.T) {
	for accel, counts := range map[string]bool{vmm.AccelKVM: true, vmm.AccelTCG: false} {
		_, p, err := hardware(t.Context(), noDriver{accel: accel})
		if err != nil || (p != nil) != counts {
			t.Errorf("%s: %v, %v", accel, p, err)
		}
	}
}

// What a daemon was making when it was killed is gone with the next one, and nothing else is.
func TestUnfinished(t *testing.T) {
	dir := testDir(t)
	var kept []string
	for name, keep := range map[string]bool{
		"packages/.new-1/package": false, "blueprints/0123.new": false, "blueprints/0123": true, "packages/0123": true,
	} {
		path := filepath.Join(dir, "lib", name)
		if err := os.MkdirAll(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if keep {
			kept = append(kept, path)
		} else {
			defer func() {
				if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is left: %v", path, err)
				}
			}()
		}
	}
	d := open(t, dir)
	for _, path := range kept {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}
