// Package daemon looks after the VMs of a host. Each VM is owned by a 'drafter peer' process of its
// own, its published ports by a 'drafter forwarder', and all namespaces by one 'drafter nat'. None
// of these is a child that ends with the daemon: it may end, be killed or be replaced, and the next
// one finds them by the locks that they hold.
//
// What must be remembered is in a directory of small JSON records. Each is replaced atomically. A
// record is written before what it stands for is made, and removed after that is gone.
package daemon

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sync/semaphore"

	"drafter/api"
	"drafter/internal/detached"
	"drafter/internal/doctor"
	"drafter/internal/lockfile"
	"drafter/internal/logging"
	"drafter/internal/private"
	"drafter/network"
	"drafter/vmm"
)

// Config says how a daemon works.
type Config struct {
	// Dir holds records, packages and VMs. Only root may be able to enter it.
	Dir string
	// Program is the drafter binary that runs VMs, and Guest the drafter-guest binary for them.
	Program, Guest string
	// Blueprint is the directory of an OS blueprint; "" for one that is made when it is needed first.
	Blueprint string
	Version   string

	// Name is what other hosts know this one by; "" for its host name. Listen is where they reach it,
	// HOST:PORT; "" if they do not.
	Name, Listen string
	TunnelPort   int // UDP, where the NATs of other hosts reach this one's; 0: they do not

	// The NAT's namespaces; see 'drafter nat'.
	NamespacePrefix, HostVethCIDR, NamespaceVethCIDR string
	NamespaceCount                                   int
	HostInterface                                    string

	Drivers vmm.Drivers    // that make packages
	VMM     string         // name of the one of them; "" or auto for the first that can
	Checks  []doctor.Check // of the host, at the start
	Logger  *slog.Logger   // nil: slog.Default()

	limits limiter // of a VM; nil: limits
}

// Daemon is a running daemon. Its methods are safe for concurrent use.
type Daemon struct {
	config   Config
	log      *slog.Logger
	lock     *lockfile.Lock
	ctx      context.Context // ends what it does
	cancel   context.CancelCauseFunc
	opened   bool           // and so it knows which VMs run
	groups   string         // the cgroup below which VMs get theirs; "" where they get none
	work     sync.WaitGroup // operations, and who watches processes
	making   templateLocks
	starting *semaphore.Weighted // VMs that start with the daemon
	events   *events
	// held for reading by who needs a blueprint
	building sync.RWMutex

	mu         sync.Mutex // guards the following
	vms        map[string]*vm
	unread     []string           // directories of VMs whose records cannot be read
	packages   map[string]*stored // by key
	names      map[string]bool    // of packages that are made
	borrowed   map[string]bool    // namespaces that packages are made in
	operations map[string]*operation
	hostEnds   bool // VMs were suspended for that: none is started again by itself
	nat        *detached.Process
	checks     []api.Check // what was found of the host
	natMu      sync.Mutex  // held by whoever starts it
	hostsMu    sync.Mutex  // held by whoever adds or removes one
	drainMu    sync.Mutex  // held by whoever drains the host, or ends that
	key        tls.Certificate
}

// ErrNotFound says that there is no such resource.
var ErrNotFound = errors.New("not found")

// ErrConflict says that the state of a resource does not allow what was asked for.
var ErrConflict = errors.New("conflict")

// ErrForbidden says that the caller may not ask for that.
var ErrForbidden = errors.New("forbidden")

// ErrInvalid says that a request cannot be carried out, ever.
var ErrInvalid = errors.New("invalid")

// Open takes up a daemon's directory, makes it if need be, and finds again what the last daemon has
// left: VMs that run, and those that have ended meanwhile. Close the daemon.
func Open(c Config) (_ *Daemon, err error) {
	c.NamespacePrefix = cmp.Or(c.NamespacePrefix, "vm")
	if c.limits == nil {
		c.limits = limits
	}
	d := &Daemon{
		config: c, log: logging.Or(c.Logger), vms: map[string]*vm{}, borrowed: map[string]bool{}, operations: map[string]*operation{},
		packages: map[string]*stored{}, names: map[string]bool{},
		starting: semaphore.NewWeighted(int64(2 * runtime.NumCPU())),
	}
	for _, dir := range []string{d.dir("vms"), d.dir("packages"), d.dir("images"), d.dir("blueprints"), d.dir("vmm")} {
		if err := private.MkdirAll(dir); err != nil {
			return nil, fmt.Errorf("open the daemon's directory: %w", err)
		}
	}
	if d.lock, err = detached.Take(d.dir("daemon.lock")); err != nil {
		return nil, fmt.Errorf("open the daemon's directory %s: %w", c.Dir, err)
	}
	d.ctx, d.cancel = context.WithCancelCause(context.Background())
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if d.events, err = openEvents(d.dir("events"), d.log); err != nil {
		return nil, err
	}
	if err := d.identify(); err != nil {
		return nil, err
	}
	d.findGroups()
	if err := errors.Join(d.sweepUnfinished(), d.sweepTokens(), d.openStore(), d.reclaim()); err != nil {
		return nil, err
	}
	if d.nat, err = detached.Find(d.natLock()); err != nil {
		return nil, err
	}
	if d.nat != nil {
		d.watchNAT(d.nat)
	}
	if err := d.recover(); err != nil {
		return nil, err
	}
	d.opened = true
	d.work.Go(func() { d.checkUp(d.ctx) })
	return d, nil
}

func (d *Daemon) dir(elem ...string) string {
	return filepath.Join(append([]string{d.config.Dir}, elem...)...)
}

// reclaim removes what VMs have left whose processes were killed.
func (d *Daemon) reclaim() error { return vmm.ReclaimAll(d.dir("vmm"), d.log) }

var idPattern = regexp.MustCompile(`^[0-9a-f]{12}$`)

// recover reads the records of VMs and compares them with what is there. One that cannot be put in
// order does not keep the others waiting.
func (d *Daemon) recover() error {
	entries, err := os.ReadDir(d.dir("vms"))
	if err != nil {
		return fmt.Errorf("find VMs: %w", err)
	}
	complain := func(v *vm, err error) {
		if err != nil {
			d.log.Error("A VM is left as it is, because it cannot be put in order", "directory", v.dir, "error", err)
		}
	}
	var destroyed []*vm
	for _, e := range entries {
		if !idPattern.MatchString(e.Name()) || !e.IsDir() {
			d.log.Warn("Something among the VMs is none, and is left alone", "path", d.dir("vms", e.Name()))
			continue
		}
		v := d.newVM(e.Name())
		there, err := v.read()
		switch {
		case err != nil:
			complain(v, err)
			d.unread = append(d.unread, v.dir)
			continue
		case there:
			d.vms[v.record.ID] = v
		}
		// Without a record, the last daemon was killed before it made the VM, or after it removed it.
		if !there || v.record.State == api.Creating || v.record.State == api.Removing {
			destroyed = append(destroyed, v)
		}
	}
	d.missedEvents()
	for _, v := range destroyed {
		complain(v, v.destroy(d.ctx))
		v.record.State = api.Removing // also if that has failed: it is nothing else any more
	}
	for _, v := range slices.Collect(maps.Values(d.vms)) {
		if v.record.State != api.Removing {
			complain(v, v.recover())
			v.startWithDaemon()
		}
	}
	return nil
}

// missedEvents tells of what the last daemon has recorded, and was killed before it could tell.
func (d *Daemon) missedEvents() {
	for id, last := range d.events.last() {
		v, there := d.vms[id]
		switch {
		case there && v.record.State != last.VM.State:
			d.events.add("vm."+v.record.State, v.record)
		case !there && last.Type != removedEvent && !exists(d.dir("vms", id)):
			d.events.add(removedEvent, *last.VM)
		}
	}
}

// Close ends the daemon. VMs go on. The NAT ends if no VM runs.
func (d *Daemon) Close() error {
	d.cancel(detached.ErrLeave)
	d.work.Wait()
	var errs []error
	needed := false
	for _, v := range d.vms {
		needed = needed || v.process != nil || v.record.Namespace != ""
		errs = append(errs, v.forget())
	}
	if d.nat != nil {
		if d.opened && !needed {
			errs = append(errs, d.endNAT())
		}
		errs = append(errs, d.nat.Close())
	}
	if d.events != nil {
		errs = append(errs, d.events.close())
	}
	return errors.Join(append(errs, d.lock.Release())...)
}

// VMs returns all VMs, the newest first.
func (d *Daemon) VMs() []api.VM {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := []api.VM{}
	for _, v := range d.vms {
		list = append(list, v.record)
	}
	slices.SortFunc(list, func(a, b api.VM) int { return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID)) })
	return list
}

// VM returns a VM by its name, its ID, or the beginning of its ID if that is one VM's.
func (d *Daemon) VM(name string) (api.VM, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v, err := d.find(name)
	if err != nil {
		return api.VM{}, err
	}
	return v.record, nil
}

// find is VM with d.mu held.
func (d *Daemon) find(name string) (*vm, error) {
	var found []*vm
	for id, v := range d.vms {
		if id == name || v.record.Name == name {
			return v, nil
		}
		if len(name) > 0 && len(id) > len(name) && id[:len(name)] == name {
			found = append(found, v)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return nil, fmt.Errorf("VM %q: %w; 'drafter ps -a' lists all", name, ErrNotFound)
	}
	return nil, fmt.Errorf("VM %q: %d VMs have an ID that begins so: %w; give more of it", name, len(found), ErrNotFound)
}

// Host tells of the daemon itself.
func (d *Daemon) Host() api.Host {
	h := api.Host{Version: d.config.Version, Name: d.name()}
	h.MemoryFree, _ = memoryFree() // 0 if the kernel does not say
	d.mu.Lock()
	defer d.mu.Unlock()
	h.Drained = d.drained()
	h.Checks = d.checks // replaced as a whole
	for _, v := range d.vms {
		h.VMs++
		if v.record.State == api.Running {
			h.Running++
		}
	}
	return h
}

// namespace reserves a free namespace of the NAT, with d.mu held.
func (d *Daemon) namespace() (string, error) {
	used := maps.Clone(d.borrowed)
	for _, v := range d.vms {
		used[v.record.Namespace], used[v.record.Anchor], used[v.record.Next] = true, true, true
	}
	anchors, err := network.Anchors()
	if err != nil {
		return "", err
	}
	for _, a := range anchors {
		used[a.Netns] = true
	}
	for i := range d.config.NamespaceCount {
		if name := fmt.Sprint(d.config.NamespacePrefix, i); !used[name] {
			return name, nil
		}
	}
	return "", fmt.Errorf("all %d network namespaces are in use: %w; stop a VM, or start the daemon with more --namespace-count", d.config.NamespaceCount, ErrConflict)
}
