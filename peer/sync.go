package peer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/google/uuid"

	"drafter/internal/backup"
	"drafter/internal/block"
	"drafter/internal/migration"
	"drafter/internal/wire"
	"drafter/migrate"
	"drafter/s3"
	"drafter/vmm"
)

// defaultSyncInterval is the pause between two syncs to S3.
const defaultSyncInterval = 30 * time.Second

// place is where the instance is backed up, if any of its devices has s3sync.
func (p *Peer) place() (place s3.Place, ok bool, err error) {
	for i := range p.config.Devices {
		d := &p.config.Devices[i]
		if !d.S3Sync {
			continue
		}
		next := d.place()
		next.Credentials, next.MaxSize = p.config.S3Credentials, p.config.Limits.MaxSize
		next.Concurrency = max(next.Concurrency, place.Concurrency)
		if ok {
			place.Concurrency = next.Concurrency
		}
		if ok && next != place {
			return place, false, fmt.Errorf("device %s: it is synced to another place than the devices before; what belongs together must be in one place", d.Name)
		}
		place, ok = next, true
	}
	return place, ok, nil
}

// syncer backs an instance up.
type syncer struct {
	mu       sync.Mutex // held by Sync while it works, and by the last sync
	place    s3.Place
	log      *slog.Logger
	writer   *backup.Writer // nil while the storage has not answered
	baseline migration.Baseline
	staged   *staged // a copy that has not been uploaded yet
	failed   error   // for good
	// the VM has come, or come back, from another host, which may have made backups meanwhile
	inherits bool
	hold     hold
	moment   atomic.Pointer[time.Time] // of the last backup; nil when there is none
}

// storePatience is how long an instance waits at its start for the storage of its backups.
const storePatience = 10 * time.Second

// openStore connects with the storage of the instance's backups, if it has any. An error in its
// settings is returned before anything happens. A storage that is away keeps no VM from starting:
// it is connected with later.
func (p *Peer) openStore(ctx context.Context) error {
	place, ok, err := p.place()
	if err != nil || !ok || p.syncer != nil {
		return err
	}
	s := &syncer{place: place, log: p.log}
	cctx, cancel := context.WithTimeoutCause(ctx, storePatience, fmt.Errorf("no answer after %s", storePatience))
	defer cancel()
	if err := s.connect(cctx); err != nil {
		if ctx.Err() != nil || !errors.Is(err, s3.ErrAway) {
			return err
		}
		p.log.Warn("Backups begin when the storage is there", "error", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.syncer = s
	return nil
}

// connect connects with the storage, unless that was done before.
func (s *syncer) connect(ctx context.Context) error {
	if s.writer != nil {
		return nil
	}
	store, err := backup.Open(ctx, s.place)
	if err != nil {
		return err
	}
	if s.writer, err = store.NewWriter(ctx, s.log); err != nil {
		s.writer = nil
		store.Close()
		return err
	}
	s.noteMoment()
	return nil
}

// prepare connects with the storage. If the VM has come from another host, it takes over what that
// host has written there.
func (s *syncer) prepare(ctx context.Context) error {
	if s.hold.tookBack() {
		s.baseline.Forget()
		if err := s.drop(); err != nil {
			return err
		}
		s.inherits = true
	}
	if err := s.connect(ctx); err != nil || !s.inherits {
		return err
	}
	if err := s.writer.Inherit(ctx); err != nil {
		return err
	}
	s.inherits = false
	s.noteMoment()
	return nil
}

// hold keeps a host from writing backups of a VM that it hands over: the target writes them from
// then on.
type hold struct {
	mu      sync.Mutex
	leaving bool
	// the VM was handed over, and may have been backed up by its target since
	handed bool
	cancel context.CancelFunc // of the sync under way
}

// begin is called before a sync. It returns false while the VM is being handed over. A handover
// also ends the sync.
func (h *hold) begin(ctx context.Context) (context.Context, context.CancelFunc, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.leaving {
		return nil, nil, false
	}
	ctx, cancel := context.WithCancel(ctx)
	h.cancel = cancel
	return ctx, cancel, true
}

// hand is for a handoff.
func (h *hold) hand() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.handed = true
}

// tookBack returns true, once, if a VM that was handed over is here again.
func (h *hold) tookBack() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	back := h.handed && !h.leaving
	h.handed = h.handed && !back
	return back
}

// set says whether the VM is being handed over. true ends a sync that is under way.
func (h *hold) set(leaving bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.leaving = leaving; leaving && h.cancel != nil {
		h.cancel()
	}
}

// noteMoment notes the moment of the last backup.
func (s *syncer) noteMoment() {
	if m := s.writer.Moment(); !m.IsZero() {
		s.moment.Store(&m)
	}
}

// closeStore ends the backups.
func (p *Peer) closeStore() error {
	if p.syncer == nil {
		return nil
	}
	s := p.syncer
	p.mu.Lock()
	p.syncer = nil
	p.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.baseline.Forget()
	err := s.drop()
	if s.writer != nil {
		err = errors.Join(err, s.writer.Close())
	}
	return err
}

// Sync backs up the devices with s3sync to their object storage, again and again, until ctx ends or
// the VM has moved away. For each backup the VM is paused as for a handoff; changed blocks are
// uploaded while it runs on. A failure is logged, and the backup tried again. An error that Sync
// returns is final. Suspend makes the last backup.
func (p *Peer) Sync(ctx context.Context) error {
	if err := p.life.Running(); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	if p.syncer == nil {
		return nil
	}
	if pulled := p.Pulled(); pulled != nil {
		select { // to read all of it now would hold up the VM
		case <-pulled:
		case <-ctx.Done():
			return nil
		}
	}
	source, err := p.migratable(ctx)
	if err != nil || source == nil {
		return err
	}
	interval := p.config.SyncInterval
	if interval == 0 {
		interval = defaultSyncInterval
	}
	for {
		var err error
		sctx, cancel, may := p.syncer.hold.begin(ctx)
		if may {
			err = p.syncer.sync(sctx, p, source)
			if sctx.Err() != nil && ctx.Err() == nil { // the VM is being handed over
				err = nil
			}
			cancel()
		}
		ended := ctx.Err() != nil || source.Phase() == migrate.Moved
		if (errors.Is(err, s3.ErrSuperseded) || errors.Is(err, s3.ErrUnfit)) && !ended {
			return err
		}
		if err != nil && !ended {
			p.log.Error("Not synced to S3; what is there is the backup before", "lastSync", p.syncer.last(), "error", err)
		}
		select {
		case <-time.After(interval):
		case <-source.Gone():
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

// last is the moment of the latest backup, for people.
func (s *syncer) last() string {
	switch {
	case s.writer == nil:
		return "unknown"
	case s.writer.Moment().IsZero():
		return "never"
	}
	return s.writer.Moment().Format(time.RFC3339Nano)
}

// sync makes one backup. A copy that could not be uploaded is uploaded first.
func (s *syncer) sync(ctx context.Context, p *Peer, source *migration.Source) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil {
		return s.failed
	}
	if err := s.prepare(ctx); err != nil {
		return err
	}
	start := time.Now()
	var paused time.Duration
	if s.staged == nil {
		held := s.baseline.Held()
		c := &staged{p: p, whole: !held, moment: start}
		stats, err := source.Copy(ctx, c, &s.baseline)
		if err != nil {
			return errors.Join(fmt.Errorf("copy the VM: %w", err), c.close())
		}
		s.staged, paused = c, stats.Paused
	}
	written, err := s.writer.Write(ctx, s.staged.moment, s.staged.list())
	if errors.Is(err, s3.ErrSuperseded) {
		s.failed = err
	}
	if err != nil {
		return err
	}
	p.log.Info("Synced to S3", "moment", s.staged.moment.Format(time.RFC3339Nano), "changed", humanize.IBytes(uint64(written.Changed)), "uploaded", humanize.IBytes(uint64(written.Uploaded)),
		"paused", paused.Round(10*time.Microsecond), "took", time.Since(start).Round(time.Millisecond))
	s.noteMoment()
	stored := map[*block.Tracker]block.ID{}
	for _, name := range s.staged.names {
		if name != vmm.State { // which is new in each copy
			stored[p.devices.Get(name).Tracker], _ = s.writer.Content(name)
		}
	}
	s.baseline.Stored(stored)
	s.collect(ctx, p)
	return s.drop()
}

// backup returns the stored content of an arriving device, if it is what the source offers; nil
// otherwise. The device's base lies beneath it, if that is here.
func (p *Peer) backup(ctx context.Context, d *Device, offered wire.Device, held wire.Held) (*migration.Backup, error) {
	if p.syncer == nil || p.syncer.writer == nil || !d.S3Sync || offered.Backup == (block.ID{}) {
		return nil, nil
	}
	remote, ok := p.syncer.writer.Remote(d.Name)
	if !ok || remote.Contents.Device != offered.Backup || remote.Contents.Size != offered.Size {
		p.log.Info("The backup in S3 is not the one that the source knows; all comes from there", "device", d.Name)
		return nil, nil
	}
	b := &migration.Backup{Remote: remote}
	if held == wire.HoldsBase {
		var err error
		if b.Beneath, err = block.FileContents(ctx, d.Base); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// collect deletes the packs that no backup needs, unless the instance still pulls from one.
func (s *syncer) collect(ctx context.Context, p *Peer) {
	if pulled := p.Pulled(); pulled != nil {
		select {
		case <-pulled:
		default:
			return
		}
	}
	s.writer.Collect(ctx)
}

// drop frees the staged copy.
func (s *syncer) drop() error {
	if s.staged == nil {
		return nil
	}
	c := s.staged
	s.staged = nil
	return c.close()
}

// lastPatience is how long a suspended VM waits for an answer of the storage, because its process
// is to end. The instance on this host is complete without that backup.
const lastPatience = time.Minute

// finish makes the backup of a suspended VM, directly from its devices.
func (s *syncer) finish(ctx context.Context, p *Peer) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil {
		return s.failed
	}
	cctx, cancel := context.WithTimeoutCause(ctx, lastPatience, fmt.Errorf("no answer after %s", lastPatience))
	defer cancel()
	if err := s.prepare(cctx); err != nil {
		return fmt.Errorf("the VM is suspended here, but not synced to S3: %w", err)
	}
	p.log.Info("Syncing the suspended VM to S3", "patience", lastPatience)
	s.writer.Hurry(lastPatience)
	start := time.Now()
	known := s.baseline.Held() && s.staged == nil
	var list []backup.Device
	for i := range p.config.Devices {
		d := &p.config.Devices[i]
		st := p.devices.Get(d.Name)
		if !d.S3Sync || st == nil {
			continue
		}
		sd := backup.Device{Name: d.Name, Device: st}
		content, _ := s.writer.Content(d.Name)
		switch {
		case known:
			if pages := s.baseline.Changed(st.Tracker); pages != nil {
				sd.Changed = contentBlocks(pages, block.PageSize, st.Size())
			}
		case st.Overlay != nil && st.Base != block.ID{} && st.Base == content:
			sd.Changed = contentBlocks(st.Overlay.Present(), st.Overlay.BlockSize(), st.Size())
		}
		list = append(list, sd)
	}
	written, err := s.writer.Write(ctx, start, list)
	if err != nil {
		return fmt.Errorf("the VM is suspended here, but not synced to S3, where it is as of %s: %w", s.last(), err)
	}
	p.log.Info("Synced suspended VM to S3", "moment", start.Format(time.RFC3339Nano), "changed", humanize.IBytes(uint64(written.Changed)), "uploaded", humanize.IBytes(uint64(written.Uploaded)),
		"took", time.Since(start).Round(time.Millisecond))
	s.collect(ctx, p)
	return nil
}

// awaitBackup waits until all that is pulled is here, if the next backup may replace what it is
// pulled from.
func (p *Peer) awaitBackup(ctx context.Context) error {
	pulled := p.Pulled()
	if pulled == nil || p.syncer == nil {
		return nil
	}
	select {
	case <-pulled:
		return nil
	default:
	}
	p.log.Info("Waiting until all of the backup is here")
	select {
	case <-pulled:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the backup that the instance was started from is not wholly here: %w", context.Cause(ctx))
	}
}

// contentBlocks widens a set of units of the given size in bytes to whole blocks of content.
func contentBlocks(units *block.Bitmap, unit, size int64) *block.Bitmap {
	blocks := block.NewBitmap((size + block.ContentBlockSize - 1) / block.ContentBlockSize)
	for first := units.Next(0); first < units.Len(); first = units.Next(first) {
		_, end := units.Run(first, units.Len())
		blocks.SetRange(first*unit/block.ContentBlockSize, min((end*unit+block.ContentBlockSize-1)/block.ContentBlockSize, blocks.Len()))
		first = end
	}
	return blocks
}

// staged is a copy of the VM that waits to be uploaded: the whole VM, or its changes since the copy
// before. It implements [migration.TargetVM].
type staged struct {
	p         *Peer
	whole     bool
	moment    time.Time
	id        string
	migration uuid.UUID
	names     []string
	files     map[string]*recorder
}

// recorder is an unnamed file that notes which of its blocks were written.
type recorder struct {
	*block.File
	written *block.Bitmap // of content blocks
}

func (r *recorder) note(off, length int64) {
	r.written.SetRange(off/block.ContentBlockSize, (off+length+block.ContentBlockSize-1)/block.ContentBlockSize)
}

// WriteAt implements [block.Device].
func (r *recorder) WriteAt(p []byte, off int64) (int, error) {
	r.note(off, int64(len(p)))
	return r.File.WriteAt(p, off)
}

// Trim implements [block.Trimmer].
func (r *recorder) Trim(off, length int64) error {
	r.note(off, length)
	return r.File.Trim(off, length)
}

// Accept implements [migration.TargetVM].
func (c *staged) Accept(_ context.Context, m wire.Manifest, id uuid.UUID) ([]migration.TargetDevice, error) {
	config, err := vmm.DecodePackageConfig(m.Config)
	if err != nil {
		return nil, err
	}
	c.id, c.migration, c.files = config.ID, id, map[string]*recorder{}
	var devices []migration.TargetDevice
	for _, offered := range m.Devices {
		d := c.device(offered.Name)
		if d == nil || !d.S3Sync {
			devices = append(devices, migration.TargetDevice{Held: wire.Unwanted})
			continue
		}
		f, err := block.CreateUnnamed(d.stagingDir(), offered.Size)
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", d.Name, err)
		}
		c.names = append(c.names, d.Name)
		c.files[d.Name] = &recorder{f, block.NewBitmap((offered.Size + block.ContentBlockSize - 1) / block.ContentBlockSize)}
		devices = append(devices, migration.TargetDevice{Held: wire.HoldsNothing, Device: block.NewIncoming(c.files[d.Name], false)})
	}
	return devices, nil
}

func (c *staged) device(name string) *Device {
	for i := range c.p.config.Devices {
		if c.p.config.Devices[i].Name == name {
			return &c.p.config.Devices[i]
		}
	}
	return nil
}

// Start implements [migration.TargetVM]. A copy is never started.
func (c *staged) Start(context.Context) error { return nil }

// Expect implements [migration.TargetVM].
func (c *staged) Expect(context.Context, uuid.UUID) error { return nil }

// Restore implements [migration.TargetVM].
func (c *staged) Restore(context.Context, uuid.UUID) error { return nil }

// Resume implements [migration.TargetVM].
func (c *staged) Resume(context.Context) error { return nil }

// Complete implements [migration.TargetVM]. The copy is like that of a suspended VM.
func (c *staged) Complete(context.Context) error {
	d := c.files[vmm.State]
	if d == nil {
		return nil
	}
	if _, err := vmm.ReadMigratedState(d, c.id, c.migration); err != nil {
		return fmt.Errorf("device %s: %w", vmm.State, err)
	}
	return vmm.MarkState(d, vmm.Suspended)
}

// Discard implements [migration.TargetVM].
func (c *staged) Discard(context.Context) error { return nil }

// list returns the devices that are to be written.
func (c *staged) list() []backup.Device {
	var list []backup.Device
	for _, name := range c.names {
		d := backup.Device{Name: name, Device: c.files[name], Changed: c.files[name].written}
		if c.whole {
			d.Changed = nil
		}
		list = append(list, d)
	}
	return list
}

func (c *staged) close() error {
	var errs []error
	for _, f := range c.files {
		errs = append(errs, f.Close())
	}
	c.files = nil
	return errors.Join(errs...)
}

// stagingDir is on the file system of the device's overlay.
func (d *Device) stagingDir() string {
	if d.Overlay != "" {
		return filepath.Dir(d.Overlay)
	}
	return filepath.Dir(d.Base)
}
