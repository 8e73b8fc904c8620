package peer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"drafter/block"
	"drafter/internal/lockfile"
	"drafter/migrate"
	"drafter/vmm"
)

// Settle decides who owns a VM that was handed over from here without an answer. If the process that owns the instance still waits, it is told; else the
// decision is noted in the instance's files: it can be resumed here, or it has moved away. The decision is the operator's, who has looked at the target: a VM
// that is settled to be here while it runs there runs twice.
func Settle(ctx context.Context, devices []Device, outcome migrate.Outcome) error {
	i := slices.IndexFunc(devices, func(d Device) bool { return d.Name == vmm.State })
	if i < 0 {
		return errors.New("device state is missing; add it to --devices")
	}
	if d := &devices[i]; d.Overlay != "" {
		if _, _, found, err := block.OverlayBase(d.files().OverlayPaths()); err != nil {
			return fmt.Errorf("device %s: %w", vmm.State, err)
		} else if !found {
			return fmt.Errorf("device %s: overlay %s does not exist, so there is no instance", vmm.State, d.Overlay)
		}
	}
	s, err := devices[i].files().Open(ctx)
	var held *lockfile.HeldError
	if errors.As(err, &held) {
		return settleRunning(ctx, devices, outcome)
	}
	if err != nil {
		return fmt.Errorf("device %s: %w", vmm.State, err)
	}
	err = vmm.SettleState(s, outcome == migrate.Here)
	return errors.Join(err, s.Close())
}

// settleRunning leaves the decision for the process that owns the instance, and waits until it has taken it.
func settleRunning(ctx context.Context, devices []Device, outcome migrate.Outcome) error {
	path := decisionFile(devices)
	err := block.Publish(path, func(f *os.File) error {
		_, err := f.WriteString(string(outcome))
		return err
	})
	if err != nil {
		return fmt.Errorf("leave the decision for the peer that runs: %w", err)
	}
	deadline := time.Now().Add(5 * time.Second)
	for time.Now().Before(deadline) && ctx.Err() == nil {
		if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return errors.Join(errors.New("the peer that runs this instance has nothing in doubt"), os.Remove(path))
}
