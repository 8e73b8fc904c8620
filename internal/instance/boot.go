package instance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"drafter/internal/block"
	"drafter/internal/private"
	"drafter/vmm"
)

// bootUnlessResumable lets a VM boot whose state device holds no state to resume, or that is told
// to boot.
func (i *Instance) bootUnlessResumable(driver vmm.Driver, l *vmm.Launch, inAnyCase bool) error {
	return i.withState(func(dev StateDevice) (err error) {
		i.why, err = vmm.CheckStart(dev)
		if err == nil && inAnyCase {
			i.why = errors.New("--boot says so")
		}
		if err != nil || i.why == nil {
			return err
		}
		if l.Reboot == nil {
			return fmt.Errorf("its package is of a version that holds no initramfs, so it cannot boot: %w", vmm.CheckResumable(dev))
		}
		if vmm.BootsFromFile(driver) {
			file := filepath.Join(i.dir.Path(), vmm.Memory)
			i.storage = bootStorage{i.storage, file}
			if err := makeFile(file, func(f *os.File) error { return f.Truncate(l.MemorySize) }); err != nil {
				return fmt.Errorf("make memory: %w", err)
			}
		}
		l.Boot = l.Reboot
		return vmm.MarkState(dev, vmm.Running)
	})
}

// boots waits for the guest of a VM that boots. A guest that takes longer goes on: it may have a
// journal, or a database, to recover.
func (l *Launched) boots(ctx context.Context, began time.Time, timeout time.Duration) (*Instance, error) {
	i := l.i
	i.booting = newReady("", nil)
	err := i.awaitGuest(ctx, timeout)
	switch {
	case err == nil:
		i.log.Info("Booted VM", "took", time.Since(began).Round(time.Millisecond))
	case l.Ended():
		return nil, errors.Join(fmt.Errorf("boot: %w", i.prefer(err)), i.Close())
	case ctx.Err() == nil: // else it would be suspended while it boots
		i.log.Warn("The VM runs, but its guest is not up yet", "error", err)
	}
	s, served := i.storage.(bootStorage)
	if !served {
		return i, nil
	}
	if saved, err := i.Suspend(context.WithoutCancel(ctx), timeout); !saved {
		return nil, errors.Join(err, i.Close())
	} else if err != nil {
		i.log.Warn("The guest did not get ready to be suspended", "error", err)
	}
	if err := i.Close(); err != nil {
		return nil, err
	}
	l.host.Boot = false // it has booted
	again, err := Launch(ctx, l.host, i.config, s.Storage)
	if err != nil {
		return nil, err
	}
	return again.Run(ctx, began, timeout)
}

// bootStorage is the storage of a VM whose VMM is a [vmm.FileBooter]. While such a VM boots, memory
// is a file; then it is suspended.
type bootStorage struct {
	Storage
	memory string // path
}

// Path implements [Storage].
func (s bootStorage) Path(name string) string {
	if name == vmm.Memory {
		return s.memory
	}
	return s.Storage.Path(name)
}

// Sync implements [Storage]. It stores memory.
func (s bootStorage) Sync(name string) (err error) {
	if name != vmm.Memory {
		return s.Storage.Sync(name)
	}
	device, end, err := s.Memory()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	memory := device.Top()
	f, err := block.OpenFile(s.memory, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buf := make([]byte, 1<<20)
	for at := int64(0); at < f.Size(); {
		start, end, err := f.NextData(at)
		if err != nil {
			return err
		}
		if start > at {
			if err := block.Trim(memory, at, start-at); err != nil {
				return err
			}
		}
		for at = start; at < end; {
			p := buf[:min(int64(len(buf)), end-at)]
			if _, err := f.ReadAt(p, at); err != nil {
				return err
			}
			if _, err := memory.WriteAt(p, at); err != nil {
				return err
			}
			at += int64(len(p))
		}
	}
	return s.Storage.Sync(name)
}

// boot returns how the VM boots from its own devices; nil if its package lacks something for that.
// An initramfs without a path of its own is copied into the VM's directory.
func (i *Instance) boot() (*vmm.Boot, error) {
	s := i.config.Initrd
	if s == nil {
		return nil, nil
	}
	b := &vmm.Boot{Kernel: i.storage.Path(vmm.Kernel), Args: i.withNameServers(i.config.BootArgs)}
	if s.Size == 0 {
		return b, nil
	}
	if b.Initrd = i.storage.Path(vmm.Initrd); b.Initrd != "" {
		return b, nil
	}
	b.Initrd = filepath.Join(i.dir.Path(), vmm.Initrd)
	kernel, err := private.Open(b.Kernel, os.O_RDONLY)
	if err == nil {
		err = makeFile(b.Initrd, func(f *os.File) error {
			_, err := io.Copy(f, io.NewSectionReader(kernel, s.Offset, s.Size))
			return errors.Join(err, kernel.Close())
		})
	}
	if err != nil {
		return nil, fmt.Errorf("copy the initramfs: %w", err)
	}
	return b, nil
}

// makeFile makes a file in the VM's directory.
func makeFile(path string, fill func(*os.File) error) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(fill(f), f.Close())
}

// rebooted notes that the guest boots again. The next call of its agent connects with that of the
// new boot.
func (i *Instance) rebooted(console string, again bool) {
	i.reboots.Add(1)
	if !again {
		i.log.Warn("The guest reboots: it boots again from its disks", "saying", console)
	}
}

// forgetAgent closes the connection with the agent of a boot that has ended, and tells whether
// there was one.
func (i *Instance) forgetAgent() bool {
	if i.agentOf == i.reboots.Load() {
		return false
	}
	i.agentOf = i.reboots.Load()
	_ = i.dropAgent() // nobody is at its other end
	return true
}
