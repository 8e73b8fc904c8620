package daemon

import (
	"context"

	"drafter/api"
	"drafter/internal/doctor"
)

// checkUp checks the host, for the log and [Daemon.Host].
func (d *Daemon) checkUp(ctx context.Context) {
	results := doctor.Run(ctx, d.config.Checks)
	if ctx.Err() != nil {
		return
	}
	for _, r := range results {
		switch r.Level {
		case api.Warning:
			d.log.Warn(
				"This host lacks something",
				"what",
				r.Name,
				"found",
				r.Text,
				"remedy",
				r.Remedy,
			)
		case api.Bad:
			d.log.Error(
				"VMs cannot run on this host",
				"what",
				r.Name,
				"found",
				r.Text,
				"remedy",
				r.Remedy,
			)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.checks = results
}
