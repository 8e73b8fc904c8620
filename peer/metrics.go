package peer

import (
	"github.com/prometheus/client_golang/prometheus"

	"drafter/internal/block"
	"drafter/migrate"
)

var (
	describeDirty = prometheus.NewDesc("drafter_device_dirty_bytes", "Bytes written to a device that no migration has taken yet.", []string{"device"}, nil)
	describeSize  = prometheus.NewDesc("drafter_device_size_bytes", "Size of a device.", []string{"device"}, nil)

	describeUnstored = prometheus.NewDesc("drafter_device_unstored_bytes", "Bytes written to a device that wait for room on the file system of its file.", []string{"device", "path"}, nil)
	describeFree     = prometheus.NewDesc("drafter_device_free_bytes", "Bytes that are free on the file system of a device's file.", []string{"device", "path", "filesystem"}, nil)

	describeUnsaved = prometheus.NewDesc("drafter_memory_unsaved_bytes", "Bytes of memory that only the guest has. A suspend stores them.", nil, nil)

	describeState    = prometheus.NewDesc("drafter_migration_state", "1 for the phase that the last migration is in.", []string{"state"}, nil)
	describeCycle    = prometheus.NewDesc("drafter_migration_cycles", "Cycles of pre-copy in the last migration.", nil, nil)
	describeDuration = prometheus.NewDesc("drafter_migration_duration_seconds", "How long the last migration has taken so far.", nil, nil)
	describeDowntime = prometheus.NewDesc("drafter_migration_downtime_seconds", "How long the VM was paused in the last migration.", nil, nil)
	describeWire     = prometheus.NewDesc("drafter_migration_wire_bytes", "Bytes sent and received in the last migration, overhead included.", nil, nil)
	describeSent     = prometheus.NewDesc("drafter_migration_device_transferred_bytes", "Bytes of a device that were transferred in the last migration.", []string{"device", "phase"}, nil)
	describeSaved    = prometheus.NewDesc("drafter_migration_device_saved_bytes", "Bytes of a device that had been written and did not need to be transferred.", []string{"device"}, nil)
	describeBackup   = prometheus.NewDesc("drafter_backup_timestamp_seconds", "Of which moment the last backup is that is complete, in seconds since 1970; 0 when there is none.", nil, nil)
	describeVMM      = prometheus.NewDesc("drafter_vmm", "What the VMM counts, by its own names.", []string{"name"}, nil)
	describePending  = prometheus.NewDesc("drafter_migration_device_pending_bytes", "Bytes of a device that are still to be transferred.", []string{"device"}, nil)
)

// Metrics is a collector of the figures of the peer and of its migrations. It is safe for
// concurrent use.
func (p *Peer) Metrics() prometheus.Collector { return metrics{p} }

type metrics struct{ p *Peer }

// Describe implements [prometheus.Collector].
func (m metrics) Describe(descriptions chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		describeDirty, describeSize, describeUnstored, describeFree, describeUnsaved, describeState, describeCycle, describeDuration, describeDowntime, describeWire, describeSent, describeSaved, describePending, describeBackup, describeVMM,
	} {
		descriptions <- d
	}
}

// Collect implements [prometheus.Collector].
func (m metrics) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	for name, d := range m.p.devices.All() {
		gauge(describeDirty, float64(d.Dirty()*block.PageSize), name)
		gauge(describeSize, float64(d.Size()), name)
		missing := d.Backlog.Missing()
		if d.Memory != nil {
			unsaved := d.Memory.Unsaved().Count() * block.PageSize
			gauge(describeUnsaved, float64(unsaved))
			if missing > 0 { // a suspend had no room, and stored no more
				missing = max(missing, unsaved)
			}
		}
		gauge(describeUnstored, float64(missing), name, d.Backlog.Path())
		if r, err := block.RoomAt(d.Backlog.Path()); err == nil {
			gauge(describeFree, float64(r.Free), name, d.Backlog.Path(), r.FileSystem)
		}
	}
	m.p.mu.Lock()
	syncer, vm := m.p.syncer, m.p.instance
	m.p.mu.Unlock()
	if vm != nil {
		for name, value := range vm.Metrics() {
			gauge(describeVMM, value, name)
		}
	}
	if syncer != nil {
		moment := 0.0
		if at := syncer.moment.Load(); at != nil {
			moment = float64(at.UnixMilli()) / 1000
		}
		gauge(describeBackup, moment)
	}
	s, ok := m.p.Stats()
	if !ok {
		return
	}
	for _, phase := range migrate.Phases {
		v := 0.0
		if phase == s.Phase {
			v = 1
		}
		gauge(describeState, v, string(phase))
	}
	gauge(describeCycle, float64(s.Cycle))
	gauge(describeDuration, s.Total.Seconds())
	gauge(describeDowntime, s.Paused.Seconds())
	gauge(describeWire, float64(s.Wire))
	for _, d := range s.Devices {
		gauge(describeSent, float64(d.Sent-d.PostCopy), d.Name, "pre-copy")
		gauge(describeSent, float64(d.PostCopy-d.Wanted), d.Name, "post-copy")
		gauge(describeSent, float64(d.Wanted), d.Name, "wanted")
		gauge(describeSent, float64(d.Backup), d.Name, "backup")
		gauge(describeSaved, float64(d.Saved), d.Name)
		gauge(describePending, float64(d.Pending), d.Name)
	}
}
