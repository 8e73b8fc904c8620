// drafter-guest runs inside a VM. As process 1 it is the init of Drafter's initramfs and OS image.
// Called as drafter-agent or drafter-liveness (by a link, or as its first argument) it is that
// service, for any Linux distribution.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"drafter/agent"
	"drafter/internal/guest"
	"drafter/vmm"
)

const usage = `drafter-guest runs inside a VM.

Usage:
  drafter-guest agent [flags]      answer the host's calls before a suspend and after a resume (also: drafter-agent)
  drafter-guest liveness [flags]   tell the host that the system is up (also: drafter-liveness)

As process 1 it is the init of Drafter's initramfs and OS image.
`

func main() {
	if filepath.Base(os.Args[0]) == guest.IdleProgram { // also process 1, of a container
		os.Exit(guest.Idle())
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{ReplaceAttr: withoutTime})))
	if os.Getpid() == 1 {
		os.Setenv("PATH", guest.Path)
		if guest.InInitramfs() {
			guest.Halt(guest.RunInitramfs())
		}
		guest.Halt(guest.RunInit())
	}
	if err := run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}

// withoutTime drops the time from log lines: the console has the kernel's, a service manager its
// own.
func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}

func run(args []string) error {
	name, args := strings.TrimPrefix(filepath.Base(args[0]), "drafter-"), args[1:]
	if name == "guest" && len(args) > 0 {
		name, args = args[0], args[1:]
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var err error
	switch name {
	case "agent":
		err = runAgent(ctx, args)
	case "liveness":
		err = runLiveness(ctx, args)
	default:
		if _, err := fmt.Print(usage); err != nil {
			return err
		}
		if name != "guest" && name != "help" && name != "--help" {
			return fmt.Errorf("service %q is unknown", name)
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func runAgent(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("drafter-agent", flag.ExitOnError)
	s := &agent.Server{}
	f.StringVar(&s.BeforeSuspendCmd, "before-suspend-cmd", "", "Command to run before the VM is suspended (leave empty to disable)")
	f.StringVar(&s.AfterResumeCmd, "after-resume-cmd", "", "Command to run after the VM has been resumed (leave empty to disable)")
	f.BoolVar(&s.KeepClock, "no-set-clock", false, "Leave the clock alone after a resume or a move, for a guest that keeps its own time")
	f.StringVar(&s.ResolvConf, "resolv-conf", "", "File to write the name servers of the VM's host to after each resume, as resolv.conf(5) (leave empty to disable)")
	f.StringVar(&s.Shell, "shell-cmd", "sh", "Shell that runs the commands of the other flags")
	ports := f.String("ready-ports", "", "TCP ports that must have a listener before the VM is packaged, such as 80,443 (none: the service only has to run for two seconds; leave empty to disable)")
	outside := f.Bool("ready-from-outside", false, "Ignore listeners on loopback addresses")
	f.StringVar(&s.ReadyCmd, "ready-cmd", "", "Command that succeeds once the service is ready, tried again until it does (leave empty to disable)")
	f.DurationVar(&s.ReadyCmdTimeout, "ready-cmd-timeout", 30*time.Second, "Maximum amount of time for one run of --ready-cmd, such as 1m")
	container := f.Bool("container", false, "Serve the container of Drafter's OS, whose init starts the agent with this flag")
	held := f.Bool("held", false, "The container waits for the host to start it")
	interactive := f.Bool("interactive", false, "The container waits for the host to run its program")
	port, timeout := portFlags(f, vmm.DefaultAgentPort)
	if err := parse(f, args); err != nil {
		return err
	}
	if *container {
		if err := guest.Supervised(ctx, s, *held, *interactive); err != nil {
			return fmt.Errorf("--container: %w", err)
		}
	}
	if *ports != "" {
		ready, err := guest.NewReadiness(*ports)
		if err != nil {
			return fmt.Errorf("--ready-ports: %w", err)
		}
		ready.Outside = *outside
		s.Service = ready.Check
		if start := s.StartWorkload; start != nil {
			s.StartWorkload = func(env []string) error {
				ready.Begin()
				return start(env)
			}
		}
	}
	return s.Serve(ctx, agent.Listen(uint32(*port), *timeout))
}

func runLiveness(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("drafter-liveness", flag.ExitOnError)
	port, timeout := portFlags(f, vmm.DefaultLivenessPort)
	if err := parse(f, args); err != nil {
		return err
	}
	return agent.Liveness(ctx, uint32(*port), *timeout)
}

func portFlags(f *flag.FlagSet, port uint32) (*uint, *time.Duration) {
	return f.Uint("vsock-port", uint(port), "Vsock port, or the number of the virtio-serial port where there is no vsock"),
		f.Duration("vsock-timeout", time.Minute, "Maximum amount of time to connect with the host, such as 30s")
}

func parse(f *flag.FlagSet, args []string) error {
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q; see --help", f.Arg(0))
	}
	return nil
}
