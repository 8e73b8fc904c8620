package daemon

import (
	"context"
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"

	"drafter/api"
	"drafter/internal/doctor"
)

// value returns the value of a metric with labels, and whether there is one.
func value(
	t *testing.T,
	families []*dto.MetricFamily,
	name string,
	labels ...string,
) (float64, bool) {
	t.Helper()
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	metrics:
		for _, m := range f.GetMetric() {
			for _, want := range labels {
				if !slices.ContainsFunc(m.GetLabel(), func(l *dto.LabelPair) bool { return l.GetName()+"="+l.GetValue() == want }) {
					continue metrics
				}
			}
			return m.GetGauge().GetValue() + m.GetCounter().GetValue(), true
		}
	}
	return 0, false
}

// The metrics of all VMs are in one place, with the labels of each. One that does not answer is not up.
func TestMetrics(t *testing.T) {
	c := testConfig(testDir(t))
	c.Checks = []doctor.Check{standInCheck}
	d, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"one", "two", "three"} {
		o, err := d.Run(api.Run{Image: "docker://image", Name: name})
		if err := d.done(t, o, err); err != nil {
			t.Fatal(err)
		}
	}
	o, err := d.Stop("three")
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	two, err := d.VM("two")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(d.dir("vms", two.ID, "0", "control", "socket")); err != nil { // it does not answer any more
		t.Fatal(err)
	}
	families, err := d.Metrics().Gather()
	if err != nil {
		t.Fatal(err)
	}
	one, err := d.VM("one")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		labels []string
		want   float64
	}{
		{"drafter_vms", []string{"state=running"}, 2},
		{"drafter_vms", []string{"state=stopped"}, 1},
		{"drafter_vms", []string{"state=failed"}, 0},
		{"drafter_host_check", []string{"check=disk"}, 1},
		{"drafter_vm_info", []string{"name=three", "state=stopped", "image=docker://image"}, 1},
		{"drafter_vm_up", []string{"name=one", "id=" + one.ID}, 1},
		{"drafter_vm_up", []string{"name=two"}, 0},
		{"drafter_vm_memory_bytes", []string{"name=one"}, float64(one.Memory)},
		{"drafter_vm_cpus", []string{"name=one"}, 1},
		{"drafter_vm_device_size_bytes", []string{"name=one", "id=" + one.ID, "device=disk"}, 4096},
		{"drafter_vm_vmm", []string{"name=one", "exported_name=faults"}, 5},
	} {
		if got, there := value(t, families, tt.name, tt.labels...); !there || got != tt.want {
			t.Errorf("%s%v is %v, %v; want %v", tt.name, tt.labels, got, there, tt.want)
		}
	}
	for _, name := range []string{"drafter_vm_up", "drafter_vm_cpu_seconds_total", "drafter_vm_device_size_bytes"} {
		if _, there := value(t, families, name, "name=three"); there {
			t.Errorf("a VM that does not run has %s", name)
		}
	}
	problems, err := testutil.GatherAndLint(d.Metrics())
	if err != nil || len(problems) > 0 {
		t.Error("against Prometheus' conventions:", problems, err)
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

func standInCheck(context.Context) doctor.Result {
	return doctor.Result{Name: "disk", Level: api.Warning, Text: "small"}
}

// standInFigures are some of those that a peer has.
type standInFigures struct{}

func (standInFigures) Describe(chan<- *prometheus.Desc) {}

func (standInFigures) Collect(out chan<- prometheus.Metric) {
	for _, f := range []struct {
		name, label, of string
		value           float64
	}{{"drafter_device_size_bytes", "device", "disk", 4096}, {"drafter_vmm", "name", "faults", 5}} {
		out <- prometheus.MustNewConstMetric(prometheus.NewDesc(f.name, "As a peer has it.", []string{f.label}, nil), prometheus.GaugeValue, f.value, f.of)
	}
}

// Each query of the Grafana board asks for metrics that there are.
func TestBoard(t *testing.T) {
	b, err := os.ReadFile("../../deploy/grafana/drafter.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Title, UID string
		Panels     []struct {
			Title, Type string
			Targets     []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &board); err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for path, prefix := range map[string]string{"metrics.go": "drafter_", "../../peer/metrics.go": "drafter_vm_"} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`"drafter_([a-z_]+)"`).FindAllSubmatch(b, -1) {
			known[prefix+string(m[1])] = true
		}
	}
	queries := 0
	for _, p := range board.Panels {
		for _, target := range p.Targets {
			queries++
			names := regexp.MustCompile(`\bdrafter_[a-z_]+\b`).FindAllString(target.Expr, -1)
			if len(names) == 0 {
				t.Errorf("%s: %s asks for nothing of Drafter's", p.Title, target.Expr)
			}
			for _, name := range names {
				if !known[name] {
					t.Errorf("%s: there is no metric %s", p.Title, name)
				}
			}
		}
	}
	if queries < 8 || board.Title == "" || board.UID == "" {
		t.Errorf("%d queries, title %q, uid %q", queries, board.Title, board.UID)
	}
}
