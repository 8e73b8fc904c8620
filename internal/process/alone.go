package process

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// startAlone starts the command in the namespaces that are its own.
func (p *Process) startAlone(c Config) (err error) {
	entrance, err := p.cgroup.open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, entrance.close()) }()
	if entrance.group != nil {
		p.cmd.SysProcAttr.UseCgroupFD, p.cmd.SysProcAttr.CgroupFD = true, int(entrance.group.Fd())
	}
	if c.Outlives {
		if p.guard, err = startGuard(); err != nil {
			return err
		}
		// It is in a process id namespace in which it has no parent, which package syscall takes
		// for one that has died.
		p.cmd.SysProcAttr.Pdeathsig = 0
	}
	leave, err := mountAlone(c)
	if err != nil {
		return err
	}
	err = renounce()
	if err == nil && c.Root != nil {
		err = dropCapabilities()
	}
	if err != nil {
		return errors.Join(err, leave())
	}
	if err := entrance.enter(); err != nil {
		return errors.Join(err, leave())
	}
	if err = withoutCore(p.cmd.Start); err != nil {
		err = fmt.Errorf("start %s: %w", c.Path, err)
	}
	if err = errors.Join(err, entrance.leave(), leave()); err != nil && p.cmd.Process != nil {
		err = errors.Join(err, p.cmd.Process.Kill(), ignoreExit(p.cmd.Wait()))
	}
	return err
}

// mountAlone makes mounts that only the children see which the calling thread starts until it calls
// leave. They end with the last of those.
func mountAlone(c Config) (leave func() error, err error) {
	if len(c.Mounts) == 0 && c.Root == nil {
		return func() error { return nil }, nil
	}
	ours, err := os.Open("/proc/thread-self/ns/mnt")
	if err != nil {
		return nil, fmt.Errorf("open mount namespace: %w", err)
	}
	// Left behind, it would keep alive what others unmount.
	leave = func() error {
		err := unix.Setns(int(ours.Fd()), unix.CLONE_NEWNS)
		if err = errors.Join(err, ours.Close()); err != nil {
			return fmt.Errorf("leave mount namespace: %w", err)
		}
		return nil
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return nil, errors.Join(fmt.Errorf("make mount namespace: %w", err), ours.Close())
	}
	err = makeMounts(c.Mounts)
	if err == nil && c.Root != nil {
		err = c.Root.change(c.UID, c.GID)
	}
	if err != nil {
		return nil, errors.Join(err, leave())
	}
	return leave, nil
}

func makeMounts(mounts []Mount) error {
	// What others unmount goes here, too; what is mounted here stays here.
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("separate mount namespace: %w", err)
	}
	for _, m := range mounts {
		if m.Source == "" {
			if err := unix.Mount("tmpfs", m.Target, "tmpfs", unix.MS_NODEV|unix.MS_NOSUID|unix.MS_NOEXEC, m.Options); err != nil {
				return fmt.Errorf("mount tmpfs on %s: %w", m.Target, err)
			}
			continue
		}
		if err := bind(m, m.Target); err != nil {
			return err
		}
	}
	return nil
}

// startGuard makes a process id namespace for the children that the calling thread starts from now
// on, and returns its first process, with which all of them end (pid_namespaces(7)). The guard is
// this program's child and gets the signal of its death.
func startGuard() (*exec.Cmd, error) {
	guard := exec.Command("sleep", "infinity")
	guard.Dir, guard.Env = "/", []string{}
	guard.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, Cloneflags: syscall.CLONE_NEWPID}
	if err := guard.Start(); err != nil {
		return nil, fmt.Errorf("make process id namespace: %w", err)
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", guard.Process.Pid))
	if err == nil {
		err = errors.Join(unix.Setns(int(ns.Fd()), unix.CLONE_NEWPID), ns.Close())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("enter process id namespace: %w", err), guard.Process.Kill(), ignoreExit(guard.Wait()))
	}
	return guard, nil
}

func (p *Process) endGuard() error {
	if p.guard == nil {
		return nil
	}
	err := errors.Join(p.guard.Process.Kill(), ignoreExit(p.guard.Wait()))
	p.guard = nil
	return err
}
