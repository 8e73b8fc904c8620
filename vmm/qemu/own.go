package qemu

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// OwnMigration says how a machine moves by QEMU's own live migration, without Drafter's engine. It
// is for comparison only; see docs/benchmarks.md.
type OwnMigration struct {
	DowntimeLimit time.Duration // QEMU's default is 300 ms
	PostCopy      bool          // switch to post-copy after the first pass over memory
	Channels      int           // of multifd; 0: none
	Disks         bool          // disks move, too: see [Machine.ExportOwn] and [Machine.MirrorOwn]
}

// OwnResult is QEMU's report of its own migration.
type OwnResult struct {
	Total, Downtime time.Duration
	Bytes           int64 // sent, of memory
}

func (m *Machine) configureOwn(ctx context.Context, o OwnMigration) error {
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	err := m.command(ctx, "migrate-set-capabilities", map[string]any{"capabilities": []capability{
		{"x-ignore-shared", false}, {"events", true}, {"postcopy-ram", o.PostCopy}, {"multifd", o.Channels > 0},
		{"pause-before-switchover", o.Disks},
	}})
	if err != nil {
		return err
	}
	parameters := map[string]any{"max-bandwidth": int64(1) << 40}
	if o.DowntimeLimit > 0 {
		parameters["downtime-limit"] = o.DowntimeLimit.Milliseconds()
	}
	if o.Channels > 0 {
		parameters["multifd-channels"] = o.Channels
	}
	return m.command(ctx, "migrate-set-parameters", parameters)
}

// ReceiveOwn lets a machine that was launched without [vmm.Boot] receive another one, from a UNIX
// socket at path. Call RunOwn next.
func (m *Machine) ReceiveOwn(ctx context.Context, path string, o OwnMigration) error {
	if err := m.configureOwn(ctx, o); err != nil {
		return err
	}
	return m.command(ctx, "migrate-incoming", map[string]any{"uri": "unix:" + path})
}

// ExportOwn lets the disks of a machine that ReceiveOwn will be called for be written over NBD, at a
// UNIX socket at path.
func (m *Machine) ExportOwn(ctx context.Context, path string) error {
	err := m.command(ctx, "nbd-server-start", map[string]any{"addr": map[string]any{"type": "unix", "data": map[string]any{"path": path}}})
	if err != nil {
		return err
	}
	for i := range m.launch.Disks {
		node := diskNode(i)
		if err := m.command(ctx, "block-export-add", map[string]any{"type": "nbd", "id": "export-" + node, "node-name": node, "name": node, "writable": true}); err != nil {
			return err
		}
	}
	m.exports = true
	return nil
}

// mirrorNode is the disk of the other machine.
func mirrorNode(i int) string { return "mirror-" + diskNode(i) }

// MirrorOwn copies the disks of a machine that runs to one that [Machine.ExportOwn] was called for,
// and returns once both are the same. They stay so until SendOwn has paused the machine.
func (m *Machine) MirrorOwn(ctx context.Context, path string) error {
	for i := range m.launch.Disks {
		node, mirror := diskNode(i), mirrorNode(i)
		err := m.command(ctx, "blockdev-add", map[string]any{"driver": "nbd", "node-name": mirror, "server": map[string]any{"type": "unix", "path": path}, "export": node})
		if err != nil {
			return err
		}
		if err := m.command(ctx, "blockdev-mirror", map[string]any{"job-id": mirror, "device": node, "target": mirror, "sync": "full"}); err != nil {
			return err
		}
	}
	return m.awaitJobs(ctx, func(jobs []blockJob) (done bool, err error) {
		if len(jobs) < len(m.launch.Disks) {
			return false, errors.New("QEMU: a disk could not be mirrored")
		}
		ready := 0
		for _, j := range jobs {
			if j.Ready {
				ready++
			}
		}
		return ready == len(jobs), nil
	})
}

// endMirrors lets the copies of a machine's disks be as they are: it is paused.
func (m *Machine) endMirrors(ctx context.Context) error {
	for i := range m.launch.Disks {
		if err := m.command(ctx, "block-job-cancel", map[string]any{"device": mirrorNode(i)}); err != nil {
			return err
		}
	}
	if err := m.awaitJobs(ctx, func(jobs []blockJob) (bool, error) { return len(jobs) == 0, nil }); err != nil {
		return err
	}
	return m.command(ctx, "migrate-continue", map[string]any{"state": "pre-switchover"})
}

// blockJob is a job of query-block-jobs (qapi/block-core.json of QEMU).
type blockJob struct {
	Ready bool `json:"ready"`
}

func (m *Machine) awaitJobs(ctx context.Context, done func([]blockJob) (bool, error)) error {
	return m.poll(ctx, func() (bool, error) {
		var jobs []blockJob
		if err := m.qmp.execute(ctx, "query-block-jobs", nil, &jobs); err != nil {
			return false, err
		}
		return done(jobs)
	})
}

// RunOwn waits until the machine that ReceiveOwn was called for has what it needs, and lets it run
// at once. The source has given up its disks by then.
func (m *Machine) RunOwn(ctx context.Context) error {
	for {
		select {
		case status := <-m.migration:
			switch status {
			case "completed", "postcopy-active":
				if m.exports {
					if err := m.command(ctx, "nbd-server-stop", nil); err != nil {
						return err
					}
				}
				return m.command(ctx, "cont", nil)
			case "failed", "cancelled":
				return fmt.Errorf("QEMU: incoming migration %s", status)
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-m.ended:
			return m.orExit(errors.New("QEMU has ended"))
		}
	}
}

// SendOwn moves a machine to the one that [Machine.ReceiveOwn] was called for, and returns once it
// is complete there.
func (m *Machine) SendOwn(ctx context.Context, path string, o OwnMigration) (r OwnResult, err error) {
	if err := m.configureOwn(ctx, o); err != nil {
		return r, err
	}
	if err := m.command(ctx, "migrate", map[string]any{"uri": "unix:" + path}); err != nil {
		return r, err
	}
	switched := false
	for {
		var info struct {
			Status   string `json:"status"`
			Error    string `json:"error-desc"`
			Total    int64  `json:"total-time"`
			Downtime int64  `json:"downtime"`
			RAM      struct {
				Transferred int64 `json:"transferred"`
				Passes      int64 `json:"dirty-sync-count"`
			} `json:"ram"`
		}
		if err := m.qmp.execute(ctx, "query-migrate", nil, &info); err != nil {
			return r, m.orExit(err)
		}
		switch {
		case info.Status == "completed" && info.Total > 0: // which is known a moment after the status
			return OwnResult{time.Duration(info.Total) * time.Millisecond, time.Duration(info.Downtime) * time.Millisecond, info.RAM.Transferred}, nil
		case info.Status == "failed", info.Status == "cancelled":
			return r, fmt.Errorf("QEMU: migration %s: %s", info.Status, info.Error)
		}
		if o.Disks && !switched && info.Status == "pre-switchover" {
			if err := m.endMirrors(ctx); err != nil {
				return r, err
			}
			switched = true
		}
		if o.PostCopy && !switched && info.Status == "active" && info.RAM.Passes >= 2 {
			if err := m.command(ctx, "migrate-start-postcopy", nil); err != nil {
				return r, err
			}
			switched = true
		}
		select {
		case <-ctx.Done():
			return r, context.Cause(ctx)
		case <-m.ended:
			return r, m.orExit(errors.New("QEMU has ended"))
		case <-time.After(5 * time.Millisecond):
		}
	}
}
