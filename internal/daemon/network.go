package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"drafter/api"
	"drafter/internal/detached"
	"drafter/internal/newfile"
	"drafter/network"
)

func (d *Daemon) natLock() string { return d.dir("nat.lock") }

// startNAT starts the NAT, unless it runs.
func (d *Daemon) startNAT(ctx context.Context) error {
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
	log, err := os.OpenFile(d.dir("nat.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, newfile.Mode)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{
		"nat", "--lock", d.natLock(), "--namespace-prefix", d.config.NamespacePrefix, "--namespace-count", strconv.Itoa(d.config.NamespaceCount),
		"--host-veth-cidr", d.config.HostVethCIDR, "--namespace-veth-cidr", d.config.NamespaceVethCIDR, "--blocked-subnet-cidr", d.config.NamespaceVethCIDR,
		"--host-interface", d.config.HostInterface,
	}
	if d.nat, err = detached.Start(ctx, detached.Command{Lock: d.natLock(), Program: d.config.Program, Args: args, Stderr: log}); err != nil {
		return fmt.Errorf("start the NAT: %w; see %s", err, log.Name())
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
		for _, vm := range d.VMs() {
			if vm.Namespace == "" {
				continue
			}
			if err := d.startNAT(d.ctx); err != nil && d.ctx.Err() == nil {
				d.log.Error("The NAT cannot be started again; VMs have no network beyond what they have", "error", err)
			}
			return
		}
	})
}

// endNAT ends the NAT and waits for that.
func (d *Daemon) endNAT() error {
	if err := d.nat.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	<-d.nat.Done()
	return nil
}

// publish lets a forwarder publish the VM's ports, unless one does.
func (v *vm) publish(ctx context.Context) error {
	r := v.look()
	if len(r.Ports) == 0 {
		return nil
	}
	process, err := detached.Find(v.path(forwardsLock))
	if err != nil {
		return err
	}
	if process != nil {
		return process.Close()
	}
	forwards, err := portForwards(r.Namespace, r.Ports)
	if err != nil {
		return err
	}
	text, err := json.Marshal(forwards)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(v.path(processLog), os.O_CREATE|os.O_WRONLY|os.O_APPEND, newfile.Mode)
	if err != nil {
		return err
	}
	defer log.Close()
	process, err = detached.Start(ctx, detached.Command{
		Lock: v.path(forwardsLock), Program: v.d.config.Program, Stderr: log,
		Args: []string{"forwarder", "--lock", v.path(forwardsLock), "--host-veth-cidr", v.d.config.HostVethCIDR, "--port-forwards", string(text)},
	})
	if err != nil {
		return fmt.Errorf("publish the ports of VM %s: %w; see %s", r.Name, err, log.Name())
	}
	return process.Close()
}

// unpublish ends the VM's forwarder, if it has one.
func (v *vm) unpublish(ctx context.Context) error {
	if _, err := os.Stat(filepath.Dir(v.path(forwardsLock))); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	process, err := detached.Find(v.path(forwardsLock))
	if process == nil || err != nil {
		return err
	}
	if err := process.Signal(syscall.SIGTERM); err != nil {
		return errors.Join(err, process.Close())
	}
	select {
	case <-process.Done():
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	return errors.Join(err, process.Close())
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
