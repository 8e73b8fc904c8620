package daemon

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"golang.org/x/sync/errgroup"

	"drafter/api"
	"drafter/internal/control"
	cgroup "drafter/internal/process"
)

var (
	vmLabels = []string{"id", "name"}

	describeVMs   = prometheus.NewDesc("drafter_vms", "VMs of the host.", []string{"state"}, nil)
	describeCheck = prometheus.NewDesc(
		"drafter_host_check",
		"What drafter doctor has found at the daemon's start: 0 for ok, 1 for a warning, 2 for an error.",
		[]string{"check"},
		nil,
	)
	describeInfo = prometheus.NewDesc(
		"drafter_vm_info",
		"1 for each VM.",
		append(vmLabels, "image", "state"),
		nil,
	)
	describeStarted = prometheus.NewDesc(
		"drafter_vm_start_time_seconds",
		"When the VM was started last, in seconds since 1970.",
		vmLabels,
		nil,
	)
	describeMemory = prometheus.NewDesc(
		"drafter_vm_memory_bytes",
		"Memory that the guest has.",
		vmLabels,
		nil,
	)
	describeCPUs = prometheus.NewDesc(
		"drafter_vm_cpus",
		"CPUs that the guest has.",
		vmLabels,
		nil,
	)

	describeCPUTime = prometheus.NewDesc(
		"drafter_vm_cpu_seconds_total",
		"CPU time since the VM's start of the process that owns it, and of its VMM.",
		vmLabels,
		nil,
	)
	describeResident = prometheus.NewDesc(
		"drafter_vm_memory_resident_bytes",
		"Memory of the host that the VMM has, the guest's included.",
		vmLabels,
		nil,
	)
	describeReceived = prometheus.NewDesc(
		"drafter_vm_network_receive_bytes_total",
		"Bytes that the guest has received since the VM's start.",
		vmLabels,
		nil,
	)
	describeSent = prometheus.NewDesc(
		"drafter_vm_network_transmit_bytes_total",
		"Bytes that the guest has sent since the VM's start.",
		vmLabels,
		nil,
	)
)

// A scrape asks so many VMs at a time, and waits so long for each.
const (
	scrapesAtOnce  = 16
	scrapePatience = 2 * time.Second
)

// Metrics are figures of all VMs. Those that a VM's process has of itself (drafter_device_size_bytes)
// are here with the VM's labels and the prefix drafter_vm_ (drafter_vm_device_size_bytes).
func (d *Daemon) Metrics() prometheus.Gatherer {
	own := prometheus.NewRegistry()
	own.MustRegister(hostMetrics{d})
	return prometheus.Gatherers{own, prometheus.GathererFunc(d.gatherVMs)}
}

// hostMetrics are the figures of which the daemon itself knows.
type hostMetrics struct{ d *Daemon }

// Describe implements [prometheus.Collector].
func (hostMetrics) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		describeVMs, describeCheck, describeInfo, describeStarted, describeMemory, describeCPUs, describeCPUTime, describeResident, describeReceived, describeSent,
	} {
		out <- d
	}
}

// Collect implements [prometheus.Collector].
func (m hostMetrics) Collect(out chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, kind prometheus.ValueType, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, kind, v, labels...)
	}
	states := map[string]float64{api.Running: 0, api.Stopped: 0, api.Failed: 0}
	for _, vm := range m.d.VMs() {
		states[vm.State]++
		send(describeInfo, prometheus.GaugeValue, 1, vm.ID, vm.Name, vm.Image, vm.State)
		send(describeMemory, prometheus.GaugeValue, float64(vm.Memory), vm.ID, vm.Name)
		send(describeCPUs, prometheus.GaugeValue, float64(vm.CPUs), vm.ID, vm.Name)
		if vm.Started != nil {
			send(
				describeStarted,
				prometheus.GaugeValue,
				float64(vm.Started.UnixMilli())/1000,
				vm.ID,
				vm.Name,
			)
		}
		if vm.PID == 0 {
			continue
		}
		if u, err := cgroup.UsageOf(vm.PID); err == nil { // else it has just ended
			send(describeCPUTime, prometheus.CounterValue, u.CPU.Seconds(), vm.ID, vm.Name)
			send(describeResident, prometheus.GaugeValue, float64(u.Resident), vm.ID, vm.Name)
			send(describeReceived, prometheus.CounterValue, float64(u.Received), vm.ID, vm.Name)
			send(describeSent, prometheus.CounterValue, float64(u.Sent), vm.ID, vm.Name)
		}
	}
	for state, n := range states {
		send(describeVMs, prometheus.GaugeValue, n, state)
	}
	for _, c := range m.d.Host().Checks {
		send(
			describeCheck,
			prometheus.GaugeValue,
			map[string]float64{api.Warning: 1, api.Bad: 2}[c.Level],
			c.Name,
		)
	}
}

// gatherVMs asks the VMs' processes for what they know. One that does not answer is left out, and is
// not up.
func (d *Daemon) gatherVMs() ([]*dto.MetricFamily, error) {
	var asked []*vm
	d.mu.Lock()
	for _, v := range d.vms {
		if v.process != nil {
			asked = append(asked, v)
		}
	}
	d.mu.Unlock()
	up := prometheus.NewGaugeVec(
		prometheus.GaugeOpts{
			Name: "drafter_vm_up",
			Help: "1 for a VM whose process runs and answers.",
		},
		vmLabels,
	)
	gathered := make([]prometheus.Gatherers, len(asked))
	var group errgroup.Group
	group.SetLimit(scrapesAtOnce)
	for i, v := range asked {
		group.Go(func() error {
			r := v.look()
			families, err := v.figures(d.ctx)
			one := 1.0
			if err != nil {
				one = 0
			}
			up.WithLabelValues(r.ID, r.Name).Set(one)
			gathered[i] = prometheus.Gatherers{
				prometheus.GathererFunc(
					func() ([]*dto.MetricFamily, error) { return ofVM(families, r), nil },
				),
			}
			return nil
		})
	}
	_ = group.Wait() // none fails
	registry := prometheus.NewRegistry()
	registry.MustRegister(up)
	all := prometheus.Gatherers{registry}
	for _, g := range gathered {
		all = append(all, g...)
	}
	families, err := all.Gather()
	// What two processes describe in different ways is of different releases; the rest is there.
	if many := (prometheus.MultiError{}); errors.As(err, &many) {
		d.log.Debug("Some metrics of VMs are left out", "error", err)
		err = nil
	}
	return families, err
}

// figures asks the VM's process.
func (v *vm) figures(ctx context.Context) ([]*dto.MetricFamily, error) {
	ctx, cancel := context.WithTimeout(ctx, scrapePatience)
	defer cancel()
	c, err := control.Dial(ctx, v.seat().control())
	if err != nil {
		return nil, err
	}
	families, err := c.Figures(ctx)
	return families, errors.Join(err, c.Close())
}

// ofVM gives figures of a VM's process the labels and names that they have among those of others.
func ofVM(families []*dto.MetricFamily, r api.VM) []*dto.MetricFamily {
	label := func(name, value string) *dto.LabelPair { return &dto.LabelPair{Name: &name, Value: &value} }
	for _, f := range families {
		name := "drafter_vm_" + strings.TrimPrefix(f.GetName(), "drafter_")
		f.Name = &name
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if renamed := "exported_" + l.GetName(); l.GetName() == "name" ||
					l.GetName() == "id" {
					l.Name = &renamed // as Prometheus does
				}
			}
			m.Label = append(m.Label, label("id", r.ID), label("name", r.Name))
		}
	}
	return families
}
