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

// Origin is a package that is elsewhere and does not change. [Peer.Pull] takes ownership of it. If
// you do not call Pull, close it.
type Origin struct {
	origin origin
}

// OpenArtifact opens the package that an OCI registry has under ref. plainHTTP allows a connection
// without TLS. All devices together may have maxSize bytes; 0 is the default of [migrate.Limits].
// Credentials are those of docker.
// log hears if the registry wants them sent elsewhere; nil: slog.Default().
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

// Close releases an origin that was not pulled.
func (o *Origin) Close() error { return o.origin.Close() }

// origin is the source of a pull. Its methods are safe for concurrent use.
type origin interface {
	Names() []string
	Remote(name string) (block.Remote, bool)
	io.Closer
}

// signed is an origin that carries the package's signature; nil without one.
type signed interface {
	Signature() []byte
}

// Pull starts the instance over a package that is elsewhere, and pulls that package behind the
// running VM. Each device's base is filled with the blocks that the VM reads, and with all other
// blocks once it runs; see [Peer.Pulled]. Bases that are here already are used, if they are the
// package's. Pull takes ownership of origin.
func (p *Peer) Pull(ctx context.Context, o *Origin) error {
	start := time.Now()
	if o == nil || o.origin == nil {
		return errors.New("pull: there is no origin; open one")
	}
	if err := p.life.Start(); err != nil {
		return errors.Join(fmt.Errorf("pull: %w", err), o.Close())
	}
	if err := p.occupy(); err != nil {
		return errors.Join(err, o.Close())
	}
	return p.pull(ctx, start, o.origin)
}

// pull is Pull once the host is occupied.
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

// open opens a device, over the origin's content of it, if the origin has one.
func (p *Peer) open(ctx context.Context, d *Device) (*stack.Stack, error) {
	if p.origin != nil {
		if remote, ok := p.origin.Remote(d.Name); ok {
			remote.Logger = p.log
			return p.files(d).OpenOver(ctx, remote)
		}
	}
	return p.files(d).Open(ctx)
}

// fill is the pull of all missing blocks, behind a running VM.
type fill struct {
	cancel context.CancelFunc
	done   chan struct{}
	err    error // once done is closed
}

// stopPull ends the pull. Readers that wait for a missing block get an error.
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

// startFill pulls one device after the other. The config comes first, because it lists the
// package's devices, then memory, which the VM waits for most.
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

// rank is the index of name in order, or len(order) if it is not there.
func rank(order []string, name string) int {
	if i := slices.Index(order, name); i >= 0 {
		return i
	}
	return len(order)
}

// Pulled is closed when all of a pulled package is here, or when the pull has failed for good;
// PullError then says which. It is nil when nothing is pulled.
func (p *Peer) Pulled() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fill == nil {
		return nil
	}
	return p.fill.done
}

// PullError waits until Pulled is closed, and returns why not all of the package is here; nil if it
// is.
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
