package cli

import (
	"errors"
	"log/slog"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"drafter/internal/detached"
)

// notifyReady tells systemd, or who else has started this process, that it does its work now.
func notifyReady() {
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		slog.Warn("Who has started this process does not hear that it is ready", "error", err)
	}
}

// lockFlag is a file by which a process is found.
type lockFlag struct{ path string }

func (l *lockFlag) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&l.path, "lock", "", "File to hold locked while this process lives, by which others find it (leave empty to disable)")
}

// with runs f while the file is locked.
func (l *lockFlag) with(f func() error) error {
	if l.path == "" {
		return f()
	}
	lock, err := detached.Lock(l.path)
	if err != nil {
		return &usageError{errors.Join(errors.New("--lock "+l.path), err)}
	}
	err = f()
	return errors.Join(err, lock.Release())
}
