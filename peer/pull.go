package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"time"

	"drafter/internal/block"
	"drafter/internal/stack"
	"drafter/signature"
	"drafter/vmm"
)

// Origin is a package that is elsewhere, and stays as it is. Its methods are safe for concurrent use.
type Origin interface {
	Names() []string
	Remote(name string) (block.Remote, bool)
	io.Closer
}

// Signed is an [Origin] that carries the package's signature, nil if there is none.
type Signed interface {
	Signature() []byte
}

// Pull starts the instance over a package that is elsewhere, and pulls that behind the running VM: each device's base is filled with what the VM reads and, from
// when it runs, with all the rest; see Pulled. Bases that are here already are used, if they are the package's. Pull owns the origin.
func (p *Peer) Pull(ctx context.Context, origin Origin) error {
	start := time.Now()
	if err := p.occupy(); err != nil {
		return errors.Join(err, origin.Close())
	}
	return p.pull(ctx, start, origin)
}

// pull does so on a host that is occupied.
func (p *Peer) pull(ctx context.Context, start time.Time, origin Origin) error {
	p.mu.Lock()
	p.origin = origin
	p.mu.Unlock()
	if err := p.checkOrigin(origin); err != nil {
		return err
	}
	if err := p.derive(origin.Names()); err != nil {
		return err
	}
	if signed, ok := origin.(Signed); ok {
		p.signature = signed.Signature()
	}
	if err := p.verify(p.signature); err != nil {
		return err
	}
	if err := signature.Keep(p.signature, p.configBase(), p.statement != nil); err != nil {
		return err
	}
	if err := p.openStore(ctx); err != nil {
		return err
	}
	if err := p.resume(ctx, start); err != nil {
		return err
	}
	p.startFill()
	return nil
}

// checkOrigin refuses what is too large for this host, before anything is made.
func (p *Peer) checkOrigin(origin Origin) error {
	var sizes []int64
	for _, name := range origin.Names() {
		remote, ok := origin.Remote(name)
		if !ok {
			continue
		}
		sizes = append(sizes, remote.Contents.Size)
		if name != vmm.Memory {
			continue
		}
		if err := p.config.Host.CheckMemory(remote.Contents.Size); err != nil {
			return err
		}
	}
	return block.CheckSizes(p.config.Limits.MaxSize, sizes...)
}

// open opens a device, over what the origin has of it, if there is one and it has it.
func (p *Peer) open(ctx context.Context, d *Device) (*stack.Stack, error) {
	if p.origin != nil {
		if remote, ok := p.origin.Remote(d.Name); ok {
			return p.files(d).OpenOver(ctx, remote)
		}
	}
	return p.files(d).Open(ctx)
}

// fill is the pull of all that is missing, behind a running VM.
type fill struct {
	cancel context.CancelFunc
	done   chan struct{}
	err    error // once done is closed
}

// stopPull ends the pull, and fails whoever waits for what has not been pulled.
func (p *Peer) stopPull() {
	p.mu.Lock()
	f := p.fill
	for _, s := range p.devices {
		if s.Pulled != nil {
			s.Pulled.Abort()
		}
	}
	p.mu.Unlock()
	if f != nil {
		f.cancel()
		<-f.done
	}
}

// startFill pulls one device after the other: config first, without which nobody knows what belongs to the package, then memory, which the VM waits for most.
func (p *Peer) startFill() {
	ctx, cancel := context.WithCancel(context.Background())
	f := &fill{cancel: cancel, done: make(chan struct{})}
	p.mu.Lock()
	p.fill = f
	pulled := map[string]*block.Pulled{}
	var names []string
	for name, s := range p.devices {
		if s.Pulled != nil {
			pulled[name] = s.Pulled
			names = append(names, name)
		}
	}
	p.mu.Unlock()
	order := []string{vmm.Config, vmm.Memory, vmm.State, vmm.Disk}
	slices.SortFunc(names, func(a, b string) int { return rank(order, a) - rank(order, b) })
	go func() {
		defer close(f.done)
		start := time.Now()
		for _, name := range names {
			var progress func(done, total int64)
			if p.config.Hooks.OnPull != nil {
				progress = func(done, total int64) { p.config.Hooks.OnPull(name, done, total) }
			}
			if err := pulled[name].Fill(ctx, progress); err != nil {
				f.err = fmt.Errorf("device %s: %w", name, err)
				return
			}
		}
		if len(names) > 0 {
			slog.Info("The whole package is here and verified", "took", time.Since(start).Round(time.Millisecond))
		}
	}()
}

// rank is an index in order, or behind it.
func rank(order []string, name string) int {
	if i := slices.Index(order, name); i >= 0 {
		return i
	}
	return len(order)
}

// Pulled is closed when all of a package that is pulled is here, or never will be; PullError then tells which. It is nil when nothing is pulled.
func (p *Peer) Pulled() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fill == nil {
		return nil
	}
	return p.fill.done
}

// PullError waits until Pulled and returns why not all of the package is here.
func (p *Peer) PullError() error {
	p.mu.Lock()
	f := p.fill
	p.mu.Unlock()
	if f == nil {
		return nil
	}
	<-f.done
	return f.err
}

// endPull closes the origin, once no device needs it.
func (p *Peer) endPull() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.origin == nil {
		return nil
	}
	origin := p.origin
	p.origin = nil
	return origin.Close()
}
