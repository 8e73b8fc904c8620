package guest

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stopTimeout is how long a container may take to stop before it is killed.
const stopTimeout = 10 * time.Second

// RunInit is process 1 of Drafter's OS. It configures the system, starts agent, OCI bundle and
// liveness, and reaps children. It powers off when the container ends or when it is told to
// (busybox halt and poweroff: SIGUSR1, SIGUSR2; the power button: SIGPWR). It reboots when it is
// told to (busybox reboot: SIGTERM; Ctrl-Alt-Del: SIGINT). It returns only on failure.
func RunInit() error {
	for _, mounts := range [][]mount{earlyMounts, osMounts} {
		if err := mountAll(mounts); err != nil {
			return err
		}
	}
	if err := openConsole(); err != nil {
		return err
	}
	cmd, err := readCmdline()
	if err != nil {
		return err
	}
	if name, err := os.ReadFile("/etc/hostname"); err == nil {
		if err := unix.Sethostname([]byte(strings.TrimSpace(string(name)))); err != nil {
			return fmt.Errorf("set host name: %w", err)
		}
	}
	if err := configureNetwork(cmd); err != nil {
		return err
	}
	if err := prepareContainer(cmd); err != nil {
		return err
	}
	children := newReaper()
	bundle, err := findBundle()
	if err != nil {
		return err
	}
	service := &service{bundle: bundle, children: children}
	if bundle != nil {
		bundle.interactive = cmd.has(InteractiveArgument)
		if service.control, err = newControl(); err != nil {
			return err
		}
		service.exits = service.control.exits
		if cmd.has(HoldArgument) {
			service.starts = service.control.starts
		} else if err := service.start(nil); err != nil {
			return err
		}
	}
	if err := startAgent(children, cmd, bundle, service.control); err != nil {
		return err
	}
	if err := startLiveness(children, cmd); err != nil {
		return err
	}
	go consoleShell(children)
	return halt(service.run())
}

// service is what the system is for, if it has a bundle.
type service struct {
	bundle    *bundle // nil: there is none
	children  *reaper
	control   *control                  // nil without a bundle
	starts    <-chan *start             // nil unless the container is held
	exits     <-chan int                // of the program that an interactive container waits for; nil without a bundle
	container <-chan syscall.WaitStatus // nil while there is no container: never ready
}

func (s *service) start(env []string) (err error) {
	s.container, err = s.bundle.start(s.children, env, s.control.stdout[1], s.control.stderr[1])
	return err
}

// run returns what reboot(2) is to do, once the container has ended, or the system is told to.
func (s *service) run() int {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGTERM, syscall.SIGINT, syscall.SIGPWR)
	for {
		select {
		case request := <-s.starts:
			err := s.start(request.Env)
			if err == nil {
				s.starts = nil
			}
			s.control.answer(err)
		case status := <-s.container:
			slog.Info("The container has ended", "status", describe(status))
			s.control.tell(status)
			return unix.LINUX_REBOOT_CMD_POWER_OFF
		case status := <-s.exits:
			slog.Info("The container's program has ended", "status", status)
			if _, ended := s.bundle.stop(s.children, s.container); ended {
				s.control.tell(exited(status))
			}
			return unix.LINUX_REBOOT_CMD_POWER_OFF
		case signal := <-stop:
			slog.Info("Ending the system", "signal", signal)
			if s.container != nil {
				if status, ended := s.bundle.stop(s.children, s.container); ended {
					s.control.tell(status)
				}
			}
			if signal == syscall.SIGTERM || signal == syscall.SIGINT {
				return unix.LINUX_REBOOT_CMD_RESTART
			}
			return unix.LINUX_REBOOT_CMD_POWER_OFF
		}
	}
}

func describe(ws syscall.WaitStatus) string {
	if ws.Signaled() {
		return "killed by " + ws.Signal().String()
	}
	return fmt.Sprintf("exit status %d", ws.ExitStatus())
}

// halt writes everything to the disks and turns the machine off, or restarts it (reboot(2)).
func halt(command int) error {
	if err := unix.Kill(-1, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
		slog.Warn("Not all processes were told to end", "error", err)
	}
	time.Sleep(100 * time.Millisecond)
	if err := unix.Kill(-1, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		slog.Warn("Not all processes were ended", "error", err)
	}
	unix.Sync()
	for _, target := range []string{bundleDir, "/"} {
		if err := unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			slog.Warn("A file system stays writable", "mount", target, "error", err)
		}
	}
	if err := unix.Reboot(command); err != nil {
		return fmt.Errorf("halt: %w", err)
	}
	select {} // the kernel stops us
}

// self returns a command that runs this binary under another name.
func self(name string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = name
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd
}

// startAgent starts the agent, to which control belongs if there is a bundle.
func startAgent(children *reaper, cmd cmdline, b *bundle, control *control) error {
	agent := self("drafter-agent", agentArgs(cmd, b)...)
	if control != nil {
		agent.ExtraFiles = control.agentFiles()
	}
	done, err := children.start(agent)
	if err != nil {
		return fmt.Errorf("start agent: %w", err)
	}
	if control != nil {
		go control.listen()
		go func() {
			if status := <-done; status != 0 { // it ends well when the system does
				slog.Error("The agent has ended", "status", describe(status))
			}
			control.drain()
		}()
	}
	return nil
}

// agentArgs are the arguments of the agent. b is nil without a bundle.
func agentArgs(cmd cmdline, b *bundle) []string {
	args := []string{"--vsock-port", cmd.get(AgentPortArgument, "26"), "--resolv-conf", ResolvConf}
	if cmd.has(KeepClockArgument) {
		args = append(args, "--no-set-clock")
	}
	if b != nil {
		named := cmd.get(ReadyPortsArgument, "")
		ports := cmp.Or(named, b.annotation(ExposedPortsAnnotation), NoPorts)
		if _, err := NewReadiness(ports); err != nil {
			slog.Warn("No port is waited for", "error", err)
			ports = NoPorts
		}
		if cmd.has(HoldArgument) {
			args = append(args, "--held")
		}
		args = append(args, "--container", "--before-suspend-cmd", b.annotation(BeforeSuspendAnnotation), "--after-resume-cmd", b.annotation(AfterResumeAnnotation))
		if cmd.has(InteractiveArgument) {
			return append(args, "--interactive") // no service is to be waited for
		}
		args = append(args, "--ready-ports", ports)
		if named == "" {
			args = append(args, "--ready-from-outside")
		}
		check, timeout, err := b.healthCheck()
		if err != nil {
			slog.Warn("The service's health is not waited for", "error", err)
		} else if check != "" && named == "" {
			args = append(args, "--ready-cmd", check, "--ready-cmd-timeout", timeout.String())
		}
	}
	return args
}

// Arguments on the kernel command line: the guest ports, if they are not the default, and the ports
// that a service opens before it is ready, if they are not those that its image exposes.
const (
	AgentPortArgument    = "drafter.agent_port"
	LivenessPortArgument = "drafter.liveness_port"
	ReadyPortsArgument   = "drafter.ready_ports"
)

// HoldArgument is the word on the kernel command line that says that the container is held until a
// host starts it.
const HoldArgument = "drafter.hold"

// IPv6Argument is ip= for IPv6, which the kernel does not have: an address with the length of its
// prefix, the gateway, and name servers (fd00:1::2/126,fd00:1::1,2001:db8::53), for the interface that
// ip= names.
const IPv6Argument = "drafter.ip6"

// KeepClockArgument is the word on the kernel command line that says that the guest keeps its own
// time.
const KeepClockArgument = "drafter.no_set_clock"

func startLiveness(children *reaper, cmd cmdline) error {
	if _, err := children.start(self("drafter-liveness", "--vsock-port", cmd.get(LivenessPortArgument, "25"))); err != nil {
		return fmt.Errorf("start liveness: %w", err)
	}
	return nil
}

// consoleShell offers a root shell on the serial console after the first line of input. Until then
// it costs nothing.
func consoleShell(children *reaper) {
	shell, err := exec.LookPath("/bin/sh")
	if err != nil {
		return
	}
	for {
		tty, err := os.OpenFile("/dev/ttyS0", os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			return // no serial port, no shell
		}
		if _, err := tty.Read(make([]byte, 256)); err != nil {
			tty.Close()
			return
		}
		cmd := exec.Command(shell, "-l")
		cmd.Env = []string{"PATH=" + Path, "HOME=/root", "TERM=vt100", "PS1=drafter# "}
		cmd.Dir = "/"
		cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
		done, err := children.start(cmd)
		tty.Close()
		if err != nil {
			slog.Error("Shell not started", "error", err)
			return
		}
		<-done
	}
}

// Path is the search path for programs in Drafter's OS.
const Path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
