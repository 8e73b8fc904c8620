package vmm

import (
	"context"
	"errors"
	"math"
	"strings"
	"testing"
)

type named string

func (n named) Name() string { return string(n) }

func (named) Launch(context.Context, Launch) (Machine, error) { return nil, errors.New("nothing") }

// What is zero works, or is refused by the name of its field.
func TestHostComplete(t *testing.T) {
	good := Host{Drivers: Drivers{named("one")}, BaseDir: "vms"}
	for name, tt := range map[string]struct {
		change func(*Host)
		want   string
	}{
		"zero values":                {func(*Host) {}, ""},
		"no driver":                  {func(h *Host) { h.Drivers = nil }, "Host.Drivers"},
		"another driver":             {func(h *Host) { h.VMM = "two" }, "Host.VMM"},
		"no directory":               {func(h *Host) { h.BaseDir = "" }, "Host.BaseDir"},
		"no user":                    {func(h *Host) { h.UID = -1 }, "Host.UID"},
		"no group":                   {func(h *Host) { h.GID = -1 }, "Host.GID"},
		"no cgroup":                  {func(h *Host) { h.CgroupVersion = 3 }, "Host.CgroupVersion"},
		"CPUs that are no number":    {func(h *Host) { h.Limits.CPUs = math.NaN() }, "Host.Limits.CPUs"},
		"endless CPUs":               {func(h *Host) { h.Limits.CPUs = math.Inf(1) }, "Host.Limits.CPUs"},
		"too many CPUs":              {func(h *Host) { h.Limits.CPUs = 1e300 }, "Host.Limits.CPUs"},
		"too few CPUs":               {func(h *Host) { h.Limits.CPUs = 0.001 }, "Host.Limits.CPUs"},
		"half a CPU":                 {func(h *Host) { h.Limits.CPUs = 0.5 }, ""},
		"less than no memory":        {func(h *Host) { h.Limits.Memory = -1 }, "Host.Limits.Memory"},
		"users that begin with root": {func(h *Host) { h.Users = UserRange{Count: 5} }, "Host.Users"},
		"users beyond the last":      {func(h *Host) { h.Users = UserRange{1<<32 - 6, 100} }, "Host.Users"},
		"root for all":               {func(h *Host) { h.Users = UserRange{Count: 1} }, ""},
		"a user beyond the last":     {func(h *Host) { h.UID = 1 << 40 }, "Host.UID"},
		"a nil driver":               {func(h *Host) { h.Drivers = append(Drivers{nil}, h.Drivers...) }, "Host.Drivers"},
		"another accelerator":        {func(h *Host) { h.Accel = "foo" }, "Host.Accel"},
		"less than no most memory":   {func(h *Host) { h.MaxMemory = -1 }, "Host.MaxMemory"},
		"version 1":                  {func(h *Host) { h.CgroupVersion = 1 }, ""},
	} {
		h := good
		tt.change(&h)
		err := h.Complete()
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
	if err := good.Complete(); err != nil || good.CgroupVersion != 2 {
		t.Errorf("cgroup version %d, %v", good.CgroupVersion, err)
	}
}
