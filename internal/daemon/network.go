package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"drafter/api"
	"drafter/internal/detached"
	"drafter/network"
)

func (d *Daemon) natLock() string { return d.dir("nat.lock") }

// startNAT starts the NAT, unless it runs.
func (d *Daemon) startNAT(ctx context.Context) (err error) {
	d.natMu.Lock()
	defer d.natMu.Unlock()
	if d.nat != nil {
		select {
		case <-d.nat.Done():
			d.log.Warn("The NAT has ended; starting it again")
			if err := d.nat.Close(); err != nil {
				return err
			}
			d.nat = nil
		default:
			return nil
		}
	}
	log := d.dir("nat.log")
	args := []string{
		"nat", "--lock", d.natLock(), "--namespace-prefix", d.config.NamespacePrefix, "--namespace-count", strconv.Itoa(d.config.NamespaceCount),
		"--host-veth-cidr", d.config.HostVethCIDR, "--namespace-veth-cidr", d.config.NamespaceVethCIDR, "--blocked-subnet-cidr", d.config.NamespaceVethCIDR,
		"--host-interface", d.config.HostInterface, "--tunnel-port", strconv.Itoa(d.config.TunnelPort),
		"--anchor-timeout", "0", // they end with their VMs, or are removed
	}
	if d.nat, err = detached.Start(ctx, detached.Command{Lock: d.natLock(), Program: d.config.Program, Args: args, Log: log}); err != nil {
		return fmt.Errorf("start the NAT: %w; see %s", err, log)
	}
	d.watchNAT(d.nat)
	return nil
}

// watchNAT starts the NAT again if it ends while VMs need it.
func (d *Daemon) watchNAT(nat *detached.Process) {
	d.work.Go(func() {
		select {
		case <-nat.Done():
		case <-d.ctx.Done():
			return
		}
		d.insist("start the NAT that has ended", func() error {
			if !slices.ContainsFunc(d.VMs(), func(vm api.VM) bool { return vm.Namespace != "" }) {
				return nil
			}
			return d.startNAT(d.ctx)
		})
	})
}

// insist calls f until it succeeds or the daemon ends, less and less often.
func (d *Daemon) insist(aim string, f func() error) {
	for pause := time.Second; ; pause = min(2*pause, time.Minute) {
		err := f()
		if err == nil || d.ctx.Err() != nil {
			return
		}
		d.log.Error("The daemon tries again", "to", aim, "error", err)
		select {
		case <-time.After(pause):
		case <-d.ctx.Done():
			return
		}
	}
}

// endNAT ends the NAT and waits for that.
func (d *Daemon) endNAT() error { return d.nat.End(endPatience) }

// ports are what publishes a VM's ports.
type ports struct {
	mu        sync.Mutex        // held by who starts or ends it
	forwarder *detached.Process // nil: none does
}

// publish lets a forwarder publish the VM's ports, unless one does. A VM that has ended publishes none.
func (v *vm) publish(ctx context.Context) error {
	v.ports.mu.Lock()
	defer v.ports.mu.Unlock()
	return v.publishLocked(ctx)
}

// publishEarly is publish for a VM that starts. Until it runs, its ports refuse connections.
func (v *vm) publishEarly(ctx context.Context) error {
	v.ports.mu.Lock()
	defer v.ports.mu.Unlock()
	return v.forward(ctx, v.look())
}

func (v *vm) publishLocked(ctx context.Context) error {
	v.d.mu.Lock()
	r, owner := v.record, v.process
	v.d.mu.Unlock()
	if r.State != api.Moved && (owner == nil || closed(owner.Done())) {
		return errEnded
	}
	return v.forward(ctx, r)
}

// forward lets a forwarder publish the VM's ports, unless one does.
func (v *vm) forward(ctx context.Context, r api.VM) (err error) {
	if len(r.Ports) == 0 || v.ports.forwarder != nil {
		return nil
	}
	if v.ports.forwarder, err = detached.Find(v.path(forwardsLock)); err != nil {
		return err
	}
	if v.ports.forwarder == nil {
		if v.ports.forwarder, err = v.startForwarder(ctx, r); err != nil {
			return fmt.Errorf("publish the ports of VM %s: %w; see %s", r.Name, err, v.path(portsLog))
		}
	}
	p := v.ports.forwarder
	v.d.work.Go(func() { v.watchForwarder(p) })
	return nil
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func (v *vm) startForwarder(ctx context.Context, r api.VM) (*detached.Process, error) {
	forwards, err := portForwards(cmp.Or(r.Anchor, r.Namespace), r.Ports)
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(forwards)
	if err != nil {
		return nil, err
	}
	return detached.Start(ctx, detached.Command{
		Lock: v.path(forwardsLock), Program: v.d.config.Program, Log: v.path(portsLog),
		Args: []string{
			"forwarder", "--lock", v.path(forwardsLock), "--host-veth-cidr", v.d.config.HostVethCIDR, "--port-forwards", string(text),
		},
	})
}

// insistPublish publishes the VM's ports as soon as that is possible.
func (v *vm) insistPublish() {
	v.d.work.Go(func() {
		v.d.insist("publish the ports of VM "+v.look().Name, func() error {
			if err := v.publish(v.d.ctx); !errors.Is(err, errEnded) {
				return err
			}
			return nil
		})
	})
}

// watchForwarder starts the forwarder again if it ends while the VM runs.
func (v *vm) watchForwarder(p *detached.Process) {
	select {
	case <-p.Done():
	case <-v.d.ctx.Done():
		return
	}
	v.d.insist("publish the ports of VM "+v.look().Name, func() error {
		v.ports.mu.Lock()
		defer v.ports.mu.Unlock()
		if v.ports.forwarder == p { // nobody has ended it
			v.ports.forwarder = nil
			if err := p.Close(); err != nil {
				return err
			}
			v.d.log.Warn("The forwarder of a VM's ports has ended; starting it again", "vm", v.look().Name)
		} else if v.ports.forwarder != nil {
			return nil
		}
		if err := v.publishLocked(v.d.ctx); !errors.Is(err, errEnded) {
			return err
		}
		return nil
	})
}

// unpublish ends the VM's forwarder, if it has one.
func (v *vm) unpublish(ctx context.Context) (err error) {
	v.ports.mu.Lock()
	defer v.ports.mu.Unlock()
	p := v.ports.forwarder
	v.ports.forwarder = nil
	if p == nil { // but one of the last daemon's
		if p, err = detached.Find(v.path(forwardsLock)); p == nil || err != nil {
			return err
		}
	}
	if err = p.Signal(syscall.SIGTERM); err == nil {
		select {
		case <-p.Done():
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	return errors.Join(err, p.Close())
}

// portForwards are the forwards for a VM's ports. A port without an address is published at all that
// the host has.
func portForwards(ns string, ports []api.Port) (forwards []network.PortForward, err error) {
	var all []string
	for _, p := range ports {
		addrs := []string{p.Address}
		if p.Address == "" {
			if all == nil {
				if all, err = network.HostAddresses(); err != nil {
					return nil, err
				}
			}
			addrs = all
		}
		for _, a := range addrs {
			forwards = append(forwards, network.PortForward{
				Netns: ns, InternalPort: strconv.Itoa(p.Guest), Protocol: p.Protocol, ExternalAddr: net.JoinHostPort(a, strconv.Itoa(p.Host)),
			})
		}
	}
	return forwards, nil
}
