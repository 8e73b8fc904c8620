package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"

	"drafter/internal/expose"
	"drafter/migrate"
	"drafter/peer"
	"drafter/transport"
	"drafter/vmm"
)

func newPeer() *cobra.Command {
	var (
		host         hostFlags
		devices      deviceFlags
		connection   transportFlags
		limits       limitFlags
		storage      storageFlags
		origin       originFlags
		backup       syncFlags
		verify       verifyFlags
		c            peer.Config
		raddr, laddr string
		metrics      string
		concurrency  int
	)
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
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			ctx := cmd.Context()
			if c.Verifier, err = verify.resolve(); err != nil {
				return err
			}
			if c.Limits, err = limits.resolve(); err != nil {
				return err
			}
			var open openOrigin
			if isReference(devices.pkg) {
				if !cmd.Flags().Changed("raddr") {
					raddr = ""
				}
				if raddr != "" {
					return &usageError{errors.New("--package says where the VM comes from, and so does --raddr; pass --raddr ''")}
				}
				if devices.pkg, open, err = resolveOrigin(ctx, devices.pkg, devices.instance, c.Limits.MaxSize, &storage, &origin); err != nil {
					return err
				}
			}
			if (raddr != "" || open != nil) && devices.absent(cmd) {
				c.Derive = func(names []string) ([]peer.Device, error) {
					list, err := devices.derive(names)
					if err != nil {
						return nil, err
					}
					return list, backup.apply(list, &storage)
				}
				if _, err := c.Derive([]string{vmm.Config}); err != nil { // what is wrong with the flags is said now
					return err
				}
			} else {
				if c.Devices, err = devices.resolve(cmd); err != nil {
					return err
				}
				if err := backup.apply(c.Devices, &storage); err != nil {
					return err
				}
			}
			c.SyncInterval, c.S3Credentials = backup.interval, storage.credentials
			if raddr != "" && raddr == laddr {
				return &usageError{fmt.Errorf("--raddr and --laddr are both %s; pass --raddr '' to start the VM here, or --laddr '' (or another address) to receive it from there", raddr)}
			}
			var restore func()
			if c.Host, restore, err = host.resolve(cmd.OutOrStdout()); err != nil {
				return err
			}
			defer restore()
			c.ResumeTimeout, c.RescueTimeout = orAtOnce(host.resumeTimeout), orAtOnce(c.RescueTimeout)
			show := newMigrationLog(cmd.ErrOrStderr())
			defer show.close()
			c.Hooks.OnPhase, c.Hooks.OnProgress, c.Hooks.OnPull = show.phase, show.progress, show.pull
			p, err := peer.New(c)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, closeInTime(p, closeTimeout)) }()
			var listener *transport.Listener
			if laddr != "" {
				if listener, err = connection.listen(ctx, laddr); err != nil {
					return err
				}
				defer listener.Close()
			}
			stopMetrics, err := serveMetrics(ctx, metrics, p)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, stopMetrics()) }()
			if open != nil {
				var o *peer.Origin
				if o, err = open(ctx); err == nil {
					err = p.Pull(ctx, o)
				}
			} else if raddr == "" {
				err = p.Resume(ctx)
			} else {
				var dial migrate.Dial
				if dial, err = connection.dial(raddr); err == nil {
					err = p.Receive(ctx, dial)
				}
			}
			if err != nil {
				return err
			}
			return runPeer(ctx, p, listener, show)
		},
	}
	host.add(cmd)
	host.addMaxMemory(cmd)
	devices.add(cmd)
	connection.add(cmd)
	limits.add(cmd)
	storage.add(cmd)
	origin.add(cmd)
	backup.add(cmd)
	verify.add(cmd)
	f := cmd.Flags()
	f.StringVar(&c.Expose, "expose", expose.Auto, "How the devices are exposed to the VMM: auto, fuse or nbd")
	f.StringVar(&raddr, "raddr", "localhost:1337", "Remote address to connect to: HOST:PORT or unix:PATH (leave empty to disable)")
	f.StringVar(&laddr, "laddr", "localhost:1337", "Local address to listen on: HOST:PORT or unix:PATH (leave empty to disable)")
	f.StringVar(&metrics, "metrics", "", "Address (HOST:PORT) to serve Prometheus metrics from, without authentication: sizes, numbers, times and paths, nothing of a VM's content (leave empty to disable)")
	f.IntVar(&concurrency, "concurrency", 1024, "Number of concurrent workers in migrations (kept for compatibility, without effect)")
	f.BoolVar(&c.Force, "force", false, forceHelp)
	f.DurationVar(&c.RescueTimeout, "rescue-timeout", 10*time.Second, "Maximum amount of time to wait for the guest's agent before a suspend or a handoff, such as 30s (0: not at all)")
	cmd.AddCommand(newPeerSettle())
	return cmd
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
func runPeer(ctx context.Context, p *peer.Peer, listener *transport.Listener, show *migrationLog) error {
	type end struct {
		moved bool
		err   error
	}
	served := make(chan end, 1)
	sctx, stop := context.WithCancel(ctx)
	defer stop()
	if listener != nil {
		go func() {
			moved, err := p.Serve(sctx, listener.Accept)
			served <- end{moved, err}
		}()
		slog.Info("Migratable", "address", listener.Addr())
	} else {
		close(served)
	}
	synced := make(chan error, 1)
	go func() { synced <- p.Sync(sctx) }()
	endSync := func() {
		if err := <-orClosed(synced); err != nil {
			slog.Error("The VM is not backed up any more", "error", err)
		}
		synced = nil
	}
	defer func() { stop(); endSync() }()
	arrived, pulled := p.Arrived(), p.Pulled()
	for {
		select {
		case <-pulled:
			pulled = nil
			if err := p.PullError(); err != nil {
				slog.Error("The rest of the package cannot be pulled; the VM goes on with what it has, and fails where it lacks something", "error", err)
			}
		case <-arrived:
			arrived = nil
			if err := p.ArrivalError(); errors.Is(err, migrate.ErrTakenBack) {
				return errors.Join(err, p.GiveUp())
			} else if err != nil {
				slog.Error("The rest of the VM has not arrived; it goes on with what it has, and stands still where it lacks something", "error", err)
			}
		case err := <-synced:
			synced = nil
			if err != nil {
				slog.Error("The VM is not backed up any more", "error", err)
			}
		case e := <-served:
			switch {
			case e.moved:
				show.summary(p)
				if e.err == nil {
					lull(ctx)
				}
				return e.err
			case errors.Is(e.err, migrate.ErrInDoubt):
				return e.err
			case e.err != nil:
				slog.Error("The VM is not migratable any more", "error", e.err)
			}
			served = nil
		case <-p.Done():
			stop()
			e := <-orClosed(served)
			if e.moved {
				return e.err
			}
			if elsewhere(e.err) { // this comes first: the VM may run there
				return errors.Join(e.err, p.Wait())
			}
			if err := p.Wait(); err != nil {
				return err
			}
			slog.Info("The guest powered itself off")
			return nil
		case <-ctx.Done():
			if e := <-orClosed(served); e.moved || elsewhere(e.err) {
				if e.moved {
					show.summary(p)
				}
				return e.err
			}
			endSync()
			return suspend(ctx, p)
		}
	}
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

// metricsConnections is how many connections may ask for metrics at a time, because this process
// needs its descriptors for a VM.
const metricsConnections = 64

// serveMetrics serves a peer's metrics and the process' own until stop is called.
func serveMetrics(ctx context.Context, addr string, p *peer.Peer) (stop func() error, err error) {
	if addr == "" {
		return func() error { return nil }, nil
	}
	registry := prometheus.NewRegistry()
	for _, c := range []prometheus.Collector{p.Metrics(), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})} {
		if err := registry.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("--metrics %s: %w", addr, err)
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 8}))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan error, 1)
	go func() { done <- server.Serve(transport.Bound(l, metricsConnections)) }()
	slog.Info("Serving metrics", "url", "http://"+l.Addr().String()+"/metrics")
	return func() error {
		err := server.Close()
		if serr := <-done; !errors.Is(serr, http.ErrServerClosed) {
			err = errors.Join(err, serr)
		}
		return err
	}, nil
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
	f.StringVar(&d.json, "devices", defaultJSON(defaults), "Devices configuration")
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
			return nil, &usageError{fmt.Errorf("--device: %w", err)} // without what it says: that may be a secret
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
