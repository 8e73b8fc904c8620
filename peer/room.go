package peer

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/dustin/go-humanize"

	"drafter/internal/block"
	"drafter/internal/instance"
	"drafter/internal/stack"
	"drafter/vmm"
)

// provide prepares an open device for a file system that may fill up.
func (d *Device) provide(s *stack.Stack) error {
	if d.Name != vmm.State {
		return nil
	}
	if err := block.Reserve(s.Backlog.Path(), instance.StateRoom); err != nil {
		return fmt.Errorf("set room aside for the VM's state: %w", err)
	}
	return nil
}

// roomInterval is the pause between two looks for room, roomReminder the one between two log lines.
const (
	roomInterval = 2 * time.Second
	roomReminder = time.Minute
)

// watchRoom logs when devices have no room for what the VM writes, until stop is called.
func (p *Peer) watchRoom(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() {
		said := map[string]time.Time{}
		tick := time.NewTicker(roomInterval)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			for name, b := range p.backlogs() {
				lookForRoom(name, b, said, p.log)
			}
		}
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

// lookForRoom does this for one device. said holds when the log last named each device that has
// something unstored.
func lookForRoom(name string, b *block.Backlog, said map[string]time.Time, log *slog.Logger) {
	missing := b.Missing()
	last, waits := said[name]
	switch {
	case missing == 0 && waits:
		delete(said, name)
		log.Info("All that was written is stored again", "device", name, "path", b.Path())
	case missing == 0 || time.Since(last) <= roomReminder:
	default:
		said[name] = time.Now()
		free, where := "unknown", ""
		if r, err := block.RoomAt(b.Path()); err == nil {
			free, where = humanize.IBytes(uint64(max(r.Free, 0))), r.FileSystem
		}
		log.Error("There is no room for what the VM writes; it waits until there is", "device", name, "path", b.Path(), "fileSystem", where,
			"free", free, "missing", humanize.IBytes(uint64(missing)))
	}
}

// backlogs are those of the open devices. Memory has one only while it arrives: what the guest
// writes to it waits for a suspend, whose error says what there is no room for.
func (p *Peer) backlogs() map[string]*block.Backlog {
	backlogs := map[string]*block.Backlog{}
	for name, s := range p.devices.All() {
		if s.Memory == nil || s.Incoming != nil && s.Incoming.Missing() > 0 {
			backlogs[name] = s.Backlog
		}
	}
	return backlogs
}
