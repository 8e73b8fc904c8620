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
		{"x-ignore-shared", false}, {"pause-before-switchover", false}, {"events", true}, {"postcopy-ram", o.PostCopy}, {"multifd", o.Channels > 0},
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

// RunOwn waits until the machine that ReceiveOwn was called for has what it needs, and lets it run
// at once. The source has given up its disks by then.
func (m *Machine) RunOwn(ctx context.Context) error {
	for {
		select {
		case status := <-m.migration:
			switch status {
			case "completed", "postcopy-active":
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
