package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"drafter/internal/control"
	"drafter/internal/expose"
	"drafter/migrate"
	"drafter/peer"
	"drafter/transport"
	"drafter/vmm"
)

func newPeer() *cobra.Command {
	var p peerCommand
	cmd := &cobra.Command{
		Use:   "peer",
		Short: "Run an instance of a VM package, and move it live between processes and hosts",
		Long: `Starts an instance of a package, or receives a running one from another peer
(--raddr). Runs it until it is ended (Ctrl-C, SIGTERM, or SIGHUP as its terminal is closed) or
another peer takes it (--laddr). At the end the instance is suspended; the next start goes on from
there.

Each device has a base, the package's file. With an overlay and a state file the base is read-only,
and the instance writes to the overlay: any number of instances can run from one package. Without
them the instance writes to the package.

--package and --instance name two directories instead of listing every device. --device adds to what
they give, or changes it.

From a registry: pass the address of a 'drafter registry' as --raddr. An instance of its package
starts at once, and the package is pulled behind the running VM, into the files that the devices'
bases name (or, with --package, into that directory). Every block is verified. Once all are here,
the next start needs no network; until then, start with the same --raddr again. --package
docker://NAME:TAG does the same with a package that 'drafter push' has stored in an OCI registry, in
a directory below --package-cache.

Backups: with --s3-sync s3://BUCKET/PREFIX, or the fields s3… of --devices, the instance is backed
up to an object storage: at its start, after every --s3-interval, and when it is suspended. Only
what has changed is uploaded. A backup is the VM in one moment, that of the last line "Synced to
S3". When the host is lost, start the VM elsewhere from there: --package s3://BUCKET/PREFIX.

Live migration: start the instance with --laddr, and on the other host a peer with --raddr and the
same list of devices. While the VM runs, its devices are copied. Then it pauses for some
milliseconds, and goes on at the other host. What the target has already, because it has the
package, is not sent. Whatever fails, the VM runs once: before the handoff it stays here, afterwards
it is there. If the connection is lost during the handoff, this process keeps the VM paused until
the target has reconnected. If the target never will, look there and decide with 'drafter peer
settle'.

With --experimental-map-private the package stays unchanged without --instance, too: what the VM
changes is kept in a temporary directory below --chroot-base-dir, and discarded at the end, also
after SIGKILL. With both outputs, the end (a suspend, or a guest that powers itself off) leaves a
package there: memory and state under these names, all else beside the memory. The VM can move away
from here, and then leaves nothing; a VM that moves to here needs an --instance.

Signatures: with --verify-key, only a package that one of the keys has signed ('drafter sign') is
started, wherever it comes from. Of a VM that is received from another peer, the config, the kernel
and the bases that are here must be those of such a package. The state, and what the VM has written
since, are not signed: its source vouches for them. See docs/signing.md.

An instance always starts. If its process was killed (SIGKILL), the host failed, or the guest
powered itself off, it cannot be resumed. It then boots from its own disks, which are as after a
power cut, and the log says so and why. With --boot an instance whose suspended state cannot be
loaded, for example by another QEMU, boots as well. Packages of older releases without an initramfs
can only be resumed; 'drafter device export' gets their disks out, to make a new package. An
instance whose VM may be on another host is refused until that is settled. A guest that reboots
boots again; the VM stays migratable.

Nothing that happens to stdout and stderr (a closed or full pipe, a stopped terminal, a full disk)
ends or delays the VM. What could not be written is left out, and a line says how much. Under nohup,
SIGHUP is ignored.
` + exitCodeHelp,
		Example: `  drafter peer --raddr '' --laddr '' --package out/package --instance out/instance-0
  drafter peer --raddr '' --laddr localhost:1337 --package out/package --instance out/instance-0
  drafter peer --raddr localhost:1337 --laddr '' --netns ark1 --package out/package --instance out/instance-1
  drafter peer --raddr registry:1600 --laddr '' --package out/pulled --instance out/instance-2
  drafter peer --raddr '' --laddr '' --package out/package --instance out/instance-3 --s3-sync s3://vms/instance-3
  drafter peer --raddr '' --laddr '' --package s3://vms/instance-3 --instance out/restored --s3-sync s3://vms/instance-3`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return p.run(cmd) },
	}
	p.add(cmd)
	cmd.AddCommand(newPeerSettle())
	return cmd
}

// peerCommand is what 'drafter peer' was told.
type peerCommand struct {
	host         hostFlags
	devices      deviceFlags
	connection   transportFlags
	limits       limitFlags
	storage      storageFlags
	origin       originFlags
	backup       syncFlags
	private      privateFlags
	verify       verifyFlags
	config       peer.Config
	raddr, laddr string
	metrics      string
	control      string
	concurrency  int
}

func (p *peerCommand) add(cmd *cobra.Command) {
	p.host.add(cmd)
	p.host.addMaxMemory(cmd)
	p.devices.add(cmd)
	p.connection.add(cmd)
	p.limits.add(cmd)
	p.storage.add(cmd)
	p.origin.add(cmd)
	p.backup.add(cmd)
	p.private.add(cmd)
	p.verify.add(cmd)
	f := cmd.Flags()
	f.StringVar(&p.config.Expose, "expose", expose.Auto, "How the devices are exposed to the VMM: auto, fuse or nbd")
	f.StringVar(&p.raddr, "raddr", "localhost:1337", "Remote address to connect to: HOST:PORT or unix:PATH (leave empty to disable)")
	f.StringVar(&p.laddr, "laddr", "localhost:1337", "Local address to listen on: HOST:PORT or unix:PATH (leave empty to disable)")
	f.StringVar(&p.metrics, "metrics", "", "Address (HOST:PORT) to serve Prometheus metrics from, without authentication: sizes, numbers, times and paths, nothing of a VM's content (leave empty to disable)")
	f.StringVar(&p.control, "control", "", "Directory by which other programs find and control the VM: a lock, a socket (ttrpc) and, at the end, end.json that says how it ended (leave empty to disable)")
	f.IntVar(&p.concurrency, "concurrency", 1024, "Number of concurrent workers in migrations (kept for compatibility, without effect)")
	f.BoolVar(&p.config.Force, "force", false, forceHelp)
	f.BoolVar(&p.config.NoAnchor, "no-anchor", false, "End the VM's connections when it moves from here or to here, instead of leading them to where it is")
	f.DurationVar(&p.config.RescueTimeout, "rescue-timeout", 10*time.Second, "Maximum amount of time to wait for the guest's agent before a suspend or a handoff, such as 30s (0: not at all)")
}

// run starts the VM, or receives it, and runs it.
func (p *peerCommand) run(cmd *cobra.Command) (err error) {
	ctx := cmd.Context()
	open, err := p.resolve(cmd)
	if err != nil {
		return err
	}
	var restore func()
	if p.config.Host, restore, err = p.host.resolve(cmd.OutOrStdout()); err != nil {
		return err
	}
	defer restore()
	controlled, ctx, err := newControlled(ctx, p.control)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, controlled.close(err)) }()
	if err := peer.ProtectProcess(); err != nil {
		slog.Warn("This process serves guest memory and may be held up by the kernel", "error", err)
	}
	show := newMigrationLog(cmd.ErrOrStderr())
	defer show.close()
	p.config.Hooks.OnPhase, p.config.Hooks.OnProgress, p.config.Hooks.OnPull = show.phase, show.progress, show.pull
	vm, err := peer.New(p.config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeInTime(vm, closeTimeout)) }()
	var listener *transport.Listener
	if p.laddr != "" {
		if listener, err = p.connection.listen(ctx, p.laddr); err != nil {
			return err
		}
		defer listener.Close()
	}
	stopMetrics, err := serveMetrics(ctx, p.metrics, vm.Metrics())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopMetrics()) }()
	if err := p.start(ctx, vm, open); err != nil {
		return err
	}
	controlled.running(vm)
	return runPeer(ctx, vm, listener, show, controlled)
}

// resolve makes the flags the configuration of a peer. open is not nil if --package names another
// place than this host.
func (p *peerCommand) resolve(cmd *cobra.Command) (open openOrigin, err error) {
	if p.config.Verifier, err = p.verify.resolve(); err != nil {
		return nil, err
	}
	if p.config.Limits, err = p.limits.resolve(); err != nil {
		return nil, err
	}
	p.private.apply(&p.config)
	if isReference(p.devices.pkg) {
		if !cmd.Flags().Changed("raddr") {
			p.raddr = ""
		}
		if p.raddr != "" {
			return nil, &usageError{errors.New("--package says where the VM comes from, and so does --raddr; pass --raddr ''")}
		}
		p.devices.pkg, open, err = resolveOrigin(cmd.Context(), p.devices.pkg, p.devices.instance, p.private.on, p.config.Limits.MaxSize, &p.storage, &p.origin)
		if err != nil {
			return nil, err
		}
	}
	if err := p.resolveDevices(cmd, p.raddr != "" || open != nil); err != nil {
		return nil, err
	}
	p.config.SyncInterval, p.config.S3Credentials = p.backup.interval, p.storage.credentials
	if p.raddr != "" && p.raddr == p.laddr {
		return nil, &usageError{fmt.Errorf("--raddr and --laddr are both %s; pass --raddr '' to start the VM here, or --laddr '' (or another address) to receive it from there", p.raddr)}
	}
	p.config.ResumeTimeout, p.config.RescueTimeout = orAtOnce(p.host.resumeTimeout), orAtOnce(p.config.RescueTimeout)
	return open, nil
}

// resolveDevices lists the devices, or leaves that to the names that somebody offers who sends
// them.
func (p *peerCommand) resolveDevices(cmd *cobra.Command, sent bool) (err error) {
	if !sent || !p.devices.absent(cmd) {
		if p.config.Devices, err = p.devices.resolve(cmd); err != nil {
			return err
		}
		return p.backup.apply(p.config.Devices, &p.storage)
	}
	p.config.Derive = func(names []string) ([]peer.Device, error) {
		list, err := p.devices.derive(names)
		if err != nil {
			return nil, err
		}
		return list, p.backup.apply(list, &p.storage)
	}
	_, err = p.config.Derive([]string{vmm.Config}) // what is wrong with the flags is said now
	return err
}

// start gets the VM to run, from wherever it comes.
func (p *peerCommand) start(ctx context.Context, vm *peer.Peer, open openOrigin) error {
	switch {
	case open != nil:
		o, err := open(ctx)
		if err != nil {
			return err
		}
		return vm.Pull(ctx, o)
	case p.raddr == "":
		return vm.Resume(ctx)
	}
	dial, err := p.connection.dial(p.raddr)
	if err != nil {
		return err
	}
	return vm.Receive(ctx, dial)
}

// limitFlags bound a migration.
type limitFlags struct {
	limits    migrate.Limits
	size      sizeFlag
	bandwidth string
	strategy  string
}

func (l *limitFlags) add(cmd *cobra.Command) {
	l.size.add(cmd)
	f := cmd.Flags()
	f.StringVar(&l.bandwidth, "bandwidth", "", "Most bytes per second that a migration sends, such as 100MB, except pages that somebody waits for (leave empty for no limit)")
	f.DurationVar(&l.limits.Downtime, "downtime-limit", 300*time.Millisecond, "Pause of the VM to aim at: the handoff begins when the rest can be sent in half of it")
	f.DurationVar(&l.limits.Timeout, "migration-timeout", 0, "Maximum amount of time to copy while the VM runs, such as 5m (0: no limit)")
	f.StringVar(&l.strategy, "timeout-strategy", "", "What to do after --migration-timeout: postcopy (hand over at once, fetch the rest afterwards) or cancel (default postcopy, or cancel with --disable-postcopy-migration)")
	f.BoolVar(&l.limits.NoPostCopy, "disable-postcopy-migration", false, "Send everything before the handoff, however long the VM has to pause")
}

func (l *limitFlags) resolve() (migrate.Limits, error) {
	limits := l.limits
	limits.AtTimeout = migrate.Strategy(l.strategy)
	var err error
	if limits.MaxSize, err = l.size.resolve(); err != nil {
		return limits, err
	}
	if limits.Bandwidth, err = parseBytes("bandwidth", l.bandwidth); err != nil {
		return limits, err
	}
	if err := limits.Check(); err != nil {
		return limits, &usageError{err}
	}
	return limits, nil
}

// sizeFlag bounds the devices that come from elsewhere.
type sizeFlag struct{ most string }

func (s *sizeFlag) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.most, "max-size", "", "Most bytes that all devices from elsewhere may have together, such as 20TB (default 128 times this host's memory)")
}

func (s *sizeFlag) resolve() (int64, error) { return parseBytes("max-size", s.most) }

// parseBytes is a flag's number of bytes; 0 if it is empty.
func parseBytes(flag, text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	n, err := humanize.ParseBytes(text)
	if err != nil || n == 0 || n > 1<<50 {
		return 0, &usageError{fmt.Errorf("--%s %q is no number of bytes, such as 100MB", flag, text)}
	}
	return int64(n), nil
}

// runPeer runs a VM until it ends, moves away, or is suspended because ctx ends. Targets reach it
// over listener, unless that is nil.
func runPeer(ctx context.Context, vm *peer.Peer, listener *transport.Listener, show *migrationLog, c *controlled) error {
	r := running{vm: vm, show: show, control: c, synced: make(chan error, 1)}
	sctx, stop := context.WithCancel(ctx)
	defer stop()
	if listener != nil {
		r.serve(sctx, listener)
	}
	defer c.answerNoMore()
	go func(synced chan error) { synced <- vm.Sync(sctx) }(r.synced)
	defer func() { stop(); r.endSync() }()
	arrived, pulled := vm.Arrived(), vm.Pulled()
	for {
		select {
		case <-pulled:
			pulled = nil
			if err := vm.PullError(); err != nil {
				slog.Error("The rest of the package cannot be pulled; the VM goes on with what it has, and fails where it lacks something", "error", err)
			}
		case <-arrived:
			arrived = nil
			if err := vm.ArrivalError(); errors.Is(err, migrate.ErrTakenBack) {
				return errors.Join(err, vm.GiveUp())
			} else if err != nil {
				slog.Error("The rest of the VM has not arrived; it goes on with what it has, and stands still where it lacks something", "error", err)
			}
		case err := <-r.synced:
			r.notSynced(err)
		case o := <-c.offers:
			r.offer(sctx, o)
		case e := <-r.served:
			if r.served = nil; e.moved || elsewhere(e.err) {
				return r.left(ctx, e)
			}
			if e.err != nil {
				slog.Error("The VM is not migratable any more", "error", e.err)
			}
			r.withdrawn(e.err)
		case <-vm.Done():
			stop()
			return r.ended(<-orClosed(r.served))
		case <-ctx.Done():
			if e := <-orClosed(r.served); e.moved || elsewhere(e.err) {
				return r.left(ctx, e)
			}
			r.endSync()
			r.control.ending(control.Suspended)
			return suspend(ctx, vm)
		}
	}
}

// running is a VM that runs, and what goes on beside it.
type running struct {
	vm      *peer.Peer
	show    *migrationLog
	control *controlled
	served  chan serveEnd // nil: it is not migratable, or has been received from
	synced  chan error    // nil: it has been received from

	withdraw context.CancelFunc // ends what sends to served
	waiting  []chan<- offered   // for that
}

// serve makes the VM migratable, and owns the listener.
func (r *running) serve(ctx context.Context, listener *transport.Listener) {
	ctx, r.withdraw = context.WithCancel(ctx)
	served := make(chan serveEnd, 1)
	r.served = served
	go func() {
		moved, err := r.vm.Serve(ctx, listener.Accept)
		served <- serveEnd{moved, errors.Join(err, listener.Close())}
	}()
	slog.Info("Migratable", "address", listener.Addr())
}

// offer makes the VM migratable, or not any more.
func (r *running) offer(ctx context.Context, o offer) {
	switch {
	case o.listener == nil && r.served == nil:
		o.answer <- offered{}
	case o.listener == nil:
		r.waiting = append(r.waiting, o.answer)
		r.withdraw()
	case r.served != nil:
		o.answer <- offered{err: fmt.Errorf("the VM is migratable already: %w", vmm.ErrInUse)}
	default:
		r.serve(ctx, o.listener)
		o.answer <- offered{}
	}
}

// withdrawn answers who waits for a VM that is not migratable any more.
func (r *running) withdrawn(err error) {
	for _, answer := range r.waiting {
		answer <- offered{err: err}
	}
	r.waiting = nil
}

// serveEnd is how a VM's migration, or its readiness for one, has ended.
type serveEnd struct {
	moved bool
	err   error
}

// endSync waits for the end of the backups.
func (r *running) endSync() { r.notSynced(<-orClosed(r.synced)) }

func (r *running) notSynced(err error) {
	r.synced = nil
	if err != nil {
		slog.Error("The VM is not backed up any more", "error", err)
	}
}

// left is the end of a VM that has moved, or may have.
func (r *running) left(ctx context.Context, e serveEnd) error {
	if e.moved {
		r.control.ending(control.Moved)
		r.show.summary(r.vm)
		if e.err == nil {
			lull(ctx)
		}
	}
	return e.err
}

// ended is the end of a VM whose VMM has ended by itself.
func (r *running) ended(e serveEnd) error {
	if e.moved {
		r.control.ending(control.Moved)
		return e.err
	}
	r.control.ending(control.PoweredOff)
	if elsewhere(e.err) { // this comes first: the VM may run there
		return errors.Join(e.err, r.vm.Wait())
	}
	if err := r.vm.Wait(); err != nil {
		return err
	}
	slog.Info("The guest powered itself off")
	return nil
}

// elsewhere tells whether an error leaves a VM that runs, or may run, at its target.
func elsewhere(err error) bool {
	return errors.Is(err, migrate.ErrInDoubt) || errors.Is(err, migrate.ErrHandedOver)
}

// lull waits before the devices here are closed, which keeps a CPU busy. A VM that moved within
// this host needs the CPUs in its first moments.
func lull(ctx context.Context) {
	select {
	case <-time.After(500 * time.Millisecond):
	case <-ctx.Done():
	}
}

// orClosed returns c, or a closed channel for nil, from which a receive does not block.
func orClosed[T any](c chan T) chan T {
	if c == nil {
		c = make(chan T)
		close(c)
	}
	return c
}

func newPeerSettle() *cobra.Command {
	var devices deviceFlags
	var here, away bool
	cmd := &cobra.Command{
		Use:   "settle",
		Short: "Decide who owns a VM whose migration was cut off in or after the handoff",
		Long: `If the connection is lost after the source has given the VM away and before
the target has answered, only the target knows who owns the VM. The source keeps the VM paused until
the target has reconnected. If the target never will, its operator has to look there first:

  --here  the VM did not run at the target and never will (its log has no "Resumed VM", or its host is
          gone for good): it goes on here. What it did at the target, if it did run there, is lost.
  --away  the VM runs at the target, or ran there.

The same holds for a target that died before it had all of the VM: its source keeps what it had at
the handoff, and goes on from there with --here. What a killed source had not noted durably is lost;
its disks are then as after a power cut. At the target, --away gives up what is there, and --here is
refused.

If the peer that owns the instance still runs, it takes the decision. Else the decision is noted in
the instance's files, and the next start follows it. After a wrong decision the VM runs twice: be
sure.
` + exitCodeHelp,
		Example: `  drafter peer settle --here --package out/package --instance out/instance-0`,
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := devices.resolve(cmd)
			if err != nil {
				return err
			}
			if here == away {
				return &usageError{errors.New("give one of --here and --away")}
			}
			outcome := migrate.Away
			if here {
				outcome = migrate.Here
			}
			if err := peer.Settle(cmd.Context(), list, outcome); err != nil {
				return err
			}
			slog.Info("Settled who owns the VM", "outcome", outcome)
			return nil
		},
	}
	devices.add(cmd)
	cmd.Flags().BoolVar(&here, "here", false, "The VM goes on at this host")
	cmd.Flags().BoolVar(&away, "away", false, "The VM belongs to the target")
	return cmd
}

// deviceFlags are the ways to name an instance's devices.
type deviceFlags struct {
	json          string
	pkg, instance string
	overrides     []string
}

func (d *deviceFlags) add(cmd *cobra.Command) {
	var defaults []peer.Device
	for name, file := range map[string]string{vmm.State: "state.bin", vmm.Memory: "memory.bin", vmm.Kernel: "vmlinux", vmm.Disk: "rootfs.ext4", vmm.Config: "config.json"} {
		device := peer.DefaultDevice(name)
		device.Base, device.Overlay, device.State = "out/package/"+file, "out/overlay/"+file, "out/state/"+file
		defaults = append(defaults, device)
	}
	slices.SortFunc(defaults, func(a, b peer.Device) int { return strings.Compare(a.Name, b.Name) })
	f := cmd.Flags()
	f.StringVar(&d.json, "devices", defaultJSON(defaults), "Devices configuration; expiry and cycleThrottle in nanoseconds")
	f.StringVar(&d.pkg, "package", "", "Directory of the package, docker://NAME:TAG of one in an OCI registry, or s3://BUCKET/PREFIX of a backup (instead of --devices)")
	f.StringVar(&d.instance, "instance", "", "Directory for the instance's overlays and state files (leave empty to write to the package)")
	f.StringArrayVar(&d.overrides, "device", nil, "A device, or a change to one, as name=NAME,FIELD=VALUE,… with the fields of --devices (repeatable)")
}

func (d *deviceFlags) resolve(cmd *cobra.Command) (list []peer.Device, err error) {
	switch {
	case d.pkg != "" && cmd.Flags().Changed("devices"):
		return nil, &usageError{errors.New("--package and --devices both name the devices; give one of them")}
	case d.pkg == "" && d.instance != "":
		return nil, &usageError{errors.New("--instance needs --package")}
	case d.pkg != "":
		list, err = peer.PackageDevices(d.pkg, d.instance)
	default:
		list, err = parseJSON[peer.Device]("devices", d.json)
	}
	if err != nil {
		return nil, err
	}
	return d.override(list)
}

// absent tells whether --package names a directory in which there is no package yet.
func (d *deviceFlags) absent(cmd *cobra.Command) bool {
	if d.pkg == "" || cmd.Flags().Changed("devices") {
		return false
	}
	_, err := os.Stat(filepath.Join(d.pkg, vmm.PackageFile(vmm.Config)))
	return errors.Is(err, os.ErrNotExist)
}

// derive is resolve for a package whose device names come from elsewhere.
func (d *deviceFlags) derive(names []string) ([]peer.Device, error) {
	return d.override(peer.NewPackageDevices(names, d.pkg, d.instance))
}

func (d *deviceFlags) override(list []peer.Device) (_ []peer.Device, err error) {
	for _, o := range d.overrides {
		if list, err = override(list, o); err != nil {
			// without what it says: that may be a secret
			return nil, &usageError{fmt.Errorf("--device: %w", err)}
		}
	}
	if slices.ContainsFunc(list, func(d peer.Device) bool { return d.S3SecretKey != "" }) {
		slog.Warn("s3secretkey is on the command line, where other users could read it until drafter had started; use --s3-credentials or the environment instead")
	}
	return list, nil
}

// override applies name=NAME,FIELD=VALUE,… to the device of that name, which is added if there is
// none.
func override(list []peer.Device, text string) ([]peer.Device, error) {
	var name string
	fields := map[string]string{}
	for pair := range strings.SplitSeq(text, ",") {
		key, value, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, errors.New("it is not of the form name=NAME,FIELD=VALUE,…")
		}
		if key == "name" {
			name = value
		} else {
			fields[key] = value
		}
	}
	if name == "" {
		return nil, errors.New("name=… is missing")
	}
	i := slices.IndexFunc(list, func(d peer.Device) bool { return d.Name == name })
	if i < 0 {
		list = append(list, peer.DefaultDevice(name))
		i = len(list) - 1
	}
	for key, value := range fields {
		if err := setField(&list[i], key, value); err != nil {
			return nil, fmt.Errorf("device %s: %w", name, err)
		}
	}
	return list, nil
}

// setField sets the field whose JSON name is key.
func setField(d *peer.Device, key, value string) error {
	v := reflect.ValueOf(d).Elem()
	for i := range v.NumField() {
		if v.Type().Field(i).Tag.Get("json") != key {
			continue
		}
		f := v.Field(i)
		var err error
		switch f.Interface().(type) {
		case string:
			f.SetString(value)
		case bool:
			var b bool
			b, err = strconv.ParseBool(value)
			f.SetBool(b)
		case time.Duration:
			var t time.Duration
			if t, err = time.ParseDuration(value); err != nil {
				var n int64
				n, err = strconv.ParseInt(value, 10, 64) // nanoseconds, as in the JSON
				t = time.Duration(n)
			}
			f.SetInt(int64(t))
		default:
			var n int64
			n, err = strconv.ParseInt(value, 10, 64)
			f.SetInt(n)
		}
		if err != nil {
			return fmt.Errorf("field %s cannot be %q", key, value)
		}
		return nil
	}
	return fmt.Errorf("field %q does not exist; the fields are: %s", key, strings.Join(fields[peer.Device](), ", "))
}
