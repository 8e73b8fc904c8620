package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"drafter/internal/memory"
	"drafter/vmm"
)

// A disk that cannot be read or written stops the VM instead of failing the guest's request, which
// QEMU keeps (werror=stop, rerror=stop): a full file system, or a storage that is away, is no
// damage to a guest that waits. QEMU tries the request again when the VM goes on, and keeps it in
// the VM's state meanwhile, so that a VM that stands still can be moved and suspended as any other.

// diskError is what QEMU's event BLOCK_IO_ERROR says (qapi/block-core.json of QEMU).
type diskError struct {
	Node      string `json:"node-name"`
	Operation string `json:"operation"`
	Action    string `json:"action"`
	Reason    string `json:"reason"`
}

// noteDiskError takes note of an event, and lets standStill know.
func (m *Machine) noteDiskError(data json.RawMessage) {
	var e diskError
	if json.Unmarshal(data, &e) != nil || e.Action != "stop" {
		return
	}
	m.diskErrors.Add(1)
	select {
	case m.stalls <- e:
	default: // one is enough to know that the VM stands still
	}
}

// How often a VM that stands still tries to go on, and how often it is said that it does.
const (
	stallRetry    = time.Second
	stallReminder = time.Minute
)

// standStill lets a VM that a disk has stopped go on as soon as it can, until QEMU is gone.
func (m *Machine) standStill() {
	for {
		select {
		case e := <-m.stalls:
			if !m.awaitDisk(e) {
				return
			}
		case <-m.qmp.done:
			return
		}
	}
}

// awaitDisk tries until the VM has gone on for a while without an error. It returns false when QEMU
// is gone.
func (m *Machine) awaitDisk(e diskError) bool {
	m.stalled.Store(true)
	defer m.stalled.Store(false)
	began, said := time.Now(), time.Time{}
	for tried := false; ; {
		if time.Since(said) > stallReminder {
			said = time.Now()
			disk := m.disk(e.Node)
			m.launch.Logger.Error("The VM stands still, as a disk cannot be used; it is tried again each second", "device", disk.Name, "path", disk.Path, "operation", words(e.Operation), "reason", words(e.Reason))
		}
		select {
		case <-time.After(stallRetry):
		case <-m.qmp.done:
			return false
		}
		select {
		case e = <-m.stalls:
			tried = false
		default:
		}
		if tried {
			stood := time.Since(began)
			m.launch.Logger.Info("The VM goes on", "device", m.disk(e.Node).Name, "stoodStill", stood.Round(time.Second))
			m.stalled.Store(false)
			if m.launch.OnGoOn != nil {
				m.launch.OnGoOn(stood)
			}
			return true
		}
		tried = m.tryAgain()
	}
}

// disk is the one with a node's name.
func (m *Machine) disk(node string) vmm.Block {
	for i, d := range m.launch.Disks {
		if node == diskNode(i) || node == diskNode(i)+"-file" {
			return d
		}
	}
	return vmm.Block{Name: words(node)}
}

// diskNode is QEMU's name for a disk.
func diskNode(i int) string { return fmt.Sprintf("disk%d", i) }

// tryAgain lets the vCPUs run, and QEMU try what has failed, unless the VM is paused by its owner.
func (m *Machine) tryAgain() bool {
	m.running.Lock()
	defer m.running.Unlock()
	if m.paused.Load() {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	return m.qmp.execute(ctx, "cont", nil, nil) == nil
}

// Stalled implements [vmm.Staller].
func (m *Machine) Stalled() bool { return m.stalled.Load() }

// Metrics implements [vmm.Meter].
func (m *Machine) Metrics() map[string]float64 {
	all := map[string]float64{"stalled": one(m.stalled.Load()), "disk_errors": float64(m.diskErrors.Load())}
	if m.memory != nil {
		missing, writes := m.memory.Faults()
		all["faults"], all["write_faults"] = float64(missing), float64(writes)
		all["memory_private"] = one(m.private)
		all["writes_scanned"] = one(m.memory.Tracking() == memory.TrackScan)
	}
	return all
}

// one is 1 for true, and 0 for false.
func one(is bool) float64 {
	if is {
		return 1
	}
	return 0
}
