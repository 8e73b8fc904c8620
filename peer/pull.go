package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"time"

	"drafter/internal/artifact"
	"drafter/internal/backup"
	"drafter/internal/block"
	"drafter/internal/stack"
	"drafter/s3"
	"drafter/signature"
	"drafter/vmm"
)

// Origin is a package that is elsewhere, and stays as it is. Pull owns it; otherwise close it.
type Origin struct {
	origin origin
}

// OpenArtifact opens the package that an OCI registry has under ref. PlainHTTP allows a connection
// without TLS. Its devices may have maxSize bytes in all; see [migrate.Limits] for 0. Credentials
// are those of docker. log hears if the registry wants them sent elsewhere; nil: slog.Default().
func OpenArtifact(ctx context.Context, ref string, plainHTTP bool, maxSize int64, log *slog.Logger) (*Origin, error) {
	p, err := artifact.Open(ctx, ref, plainHTTP, maxSize, log)
	if err != nil {
		return nil, err
	}
	return &Origin{p}, nil
}

// OpenBackup opens the latest backup at a place.
func OpenBackup(ctx context.Context, place s3.Place) (*Origin, error) {
	store, err := backup.Open(ctx, place)
	if err != nil {
		return nil, err
	}
	latest, err := store.Latest(ctx)
	if err != nil {
		store.Close()
		return nil, err
	}
	return &Origin{latest}, nil
}

// Close frees an origin that was not pulled.
func (o *Origin) Close() error { return o.origin.Close() }

// origin is what a package is pulled from. Its methods are safe for concurrent use.
type origin interface {
	Names() []string
	Remote(name string) (block.Remote, bool)
	io.Closer
}

// signed is an origin that carries the package's signature, nil if there is none.
type signed interface {
	Signature() []byte
}

// Pull starts the instance over a package that is elsewhere, and pulls that behind the running VM:
// each device's base is filled with what the VM reads and, from when it runs, with all the rest;
// see Pulled. Bases that are here already are used, if they are the package's. Pull owns the
// origin.
func (p *Peer) Pull(ctx context.Context, o *Origin) error {
	start := time.Now()
	if err := p.occupy(); err != nil {
		return errors.Join(err, o.Close())
	}
	return p.pull(ctx, start, o.origin)
}

// pull does so on a host that is occupied.
func (p *Peer) pull(ctx context.Context, start time.Time, from origin) error {
	p.mu.Lock()
	p.origin = from
	p.mu.Unlock()
	if err := p.checkOrigin(from); err != nil {
		return err
	}
	if err := p.derive(from.Names()); err != nil {
		return err
	}
	if carrier, ok := from.(signed); ok {
		p.signature = carrier.Signature()
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
	p.startFill(ctx)
	return nil
}

// checkOrigin refuses what is too large for this host, before anything is made.
func (p *Peer) checkOrigin(from origin) error {
	var sizes []int64
	for _, name := range from.Names() {
		remote, ok := from.Remote(name)
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
			remote.Logger = p.log
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
	for _, s := range p.devices.All() {
		if s.Pulled != nil {
			s.Pulled.Abort()
		}
	}
	p.mu.Lock()
	f := p.fill
	p.mu.Unlock()
	if f != nil {
		f.cancel()
		<-f.done
	}
}

// startFill pulls one device after the other: config first, without which nobody knows what belongs
// to the package, then memory, which the VM waits for most.
func (p *Peer) startFill(ctx context.Context) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	f := &fill{cancel: cancel, done: make(chan struct{})}
	p.mu.Lock()
	p.fill = f
	p.mu.Unlock()
	pulled := map[string]*block.Pulled{}
	var names []string
	for name, s := range p.devices.All() {
		if s.Pulled != nil {
			pulled[name] = s.Pulled
			names = append(names, name)
		}
	}
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
			p.log.Info("The whole package is here and verified", "took", time.Since(start).Round(time.Millisecond))
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

// Pulled is closed when all of a package that is pulled is here, or never will be; PullError then
// tells which. It is nil when nothing is pulled.
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
