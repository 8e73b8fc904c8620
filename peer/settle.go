package peer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"drafter/internal/block"
	"drafter/internal/lockfile"
	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/internal/stack"
	"drafter/migrate"
	"drafter/vmm"
)

// Settle decides who owns a VM that an unfinished migration has left. If the process that owns the
// instance waits, Settle tells it. Else it notes the decision in the instance's files: the instance
// can be started here, or it is elsewhere. The caller must have looked at the other side: if a VM
// is settled to be here while it runs there, it runs twice.
func Settle(ctx context.Context, devices []Device, outcome migrate.Outcome) error {
	if outcome != migrate.Here && outcome != migrate.Away {
		return fmt.Errorf("outcome %q is none; it is %q or %q", outcome, migrate.Here, migrate.Away)
	}
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
	s, err := devices[i].openState(ctx)
	var held *lockfile.HeldError
	if errors.As(err, &held) {
		return settleRunning(ctx, devices, outcome)
	}
	if err != nil {
		return fmt.Errorf("device %s: %w", vmm.State, err)
	}
	return errors.Join(vmm.SettleState(s, outcome == migrate.Here, missing(devices) != nil), s.Close())
}

// openState opens the state device of an instance that does not run. Its base need not be here.
func (d *Device) openState(ctx context.Context) (*stack.Stack, error) {
	if d.Overlay == "" {
		return d.files().Open(ctx)
	}
	return d.files().OpenOverlay()
}

// missing names a device that the instance needs to boot and that never arrived completely. All
// devices but memory are needed. It returns nil if there is none.
func missing(devices []Device) error {
	for i := range devices {
		if devices[i].Name == vmm.Memory {
			continue
		}
		if err := devices[i].files().CheckMissing(); err != nil {
			return fmt.Errorf("device %s: %w", devices[i].Name, err)
		}
	}
	return nil
}

const (
	// begins the text that a peer writes in place of a decision that it refuses
	refusedPrefix = "refused: "
	maxDecision   = 1 << 10 // bytes
)

func writeDecision(path, text string) error {
	return newfile.Write(path, func(f *os.File) error {
		_, err := f.WriteString(text)
		return err
	})
}

// settleRunning leaves the decision for the process that owns the instance, and waits until that
// process has taken it.
func settleRunning(ctx context.Context, devices []Device, outcome migrate.Outcome) error {
	path := decisionFile(devices)
	if err := writeDecision(path, string(outcome)); err != nil {
		return fmt.Errorf("leave the decision for the peer that runs: %w", err)
	}
	deadline := time.Now().Add(5 * time.Second)
	for time.Now().Before(deadline) && ctx.Err() == nil {
		b, err := private.ReadFile(path, maxDecision)
		switch text, refused := strings.CutPrefix(string(b), refusedPrefix); {
		case errors.Is(err, os.ErrNotExist):
			return nil
		case err != nil:
			return err
		case refused:
			return errors.Join(errors.New(text), os.Remove(path))
		}
		time.Sleep(50 * time.Millisecond)
	}
	return errors.Join(errors.New("the peer that runs this instance has nothing in doubt"), os.Remove(path))
}
