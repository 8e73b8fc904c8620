package cli

import (
	"encoding/json"

	"github.com/spf13/cobra"

	"drafter/internal/progress"
	"drafter/snapshotter"
	"drafter/vmm"
)

func newSnapshotter() *cobra.Command {
	var (
		host     hostFlags
		devices  string
		memoryMB int64
		c        snapshotter.Config
		template string
		report   bool
	)
	cmd := &cobra.Command{
		Use:   "snapshotter",
		Short: "Make a VM package from a blueprint",
		Long: `Boots a blueprint, waits until the guest reports that it is up and its service is ready, suspends it, and stores kernel, disks, memory, state and config as
a package that 'drafter runner' and 'drafter peer' resume in a fraction of a boot's time.

The service of an OCI image is ready when something listens on each TCP port that the image exposes, not only on loopback, and its health check,
if it has one, succeeds; --ready-ports names other ports, which may be open on loopback only, and leaves the health check out. One that is not ready within --resume-timeout, or has ended by then,
is no package.

Devices: kernel, disk, state, memory and config are needed; every other name is a further disk, in list order (/dev/vdb, /dev/vdc, …). The
initramfs is the device initrd, or a file initrd beside the kernel; the package keeps it in the device kernel, behind the kernel, to boot a VM that cannot be resumed.

On failure no file of the package is left behind, and an older package stays as it was.
` + exitCodeHelp,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if c.Devices, err = parseJSON[snapshotter.Device]("devices", devices); err != nil {
				return err
			}
			c.Spec.MemorySize = memoryMB << 20
			if template != "None" {
				c.Spec.CPU = template
			}
			var restore func()
			if c.Host, restore, err = host.resolve(cmd.OutOrStdout()); err != nil {
				return err
			}
			defer restore()
			c.Timeout = host.resumeTimeout
			bars := progress.New(cmd.ErrOrStderr())
			c.Progress = bars.Report
			defer bars.Close()
			s, err := snapshotter.New(c)
			if err != nil {
				return err
			}
			result, err := s.Run(cmd.Context())
			if err != nil || !report {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(map[string]int64{
				"boot_ms": result.Boot.Milliseconds(), "suspend_ms": result.Suspend.Milliseconds(),
			})
		},
	}
	host.add(cmd)
	f := cmd.Flags()
	f.StringVar(&devices, "devices", defaultJSON([]snapshotter.Device{
		{Name: vmm.Kernel, Input: "out/blueprint/vmlinux", Output: "out/package/vmlinux"},
		{Name: vmm.Disk, Input: "out/blueprint/rootfs.ext4", Output: "out/package/rootfs.ext4"},
		{Name: vmm.State, Output: "out/package/state.bin"},
		{Name: vmm.Memory, Output: "out/package/memory.bin"},
		{Name: vmm.Config, Output: "out/package/config.json"},
	}), "Devices configuration")
	f.Int64Var(&memoryMB, "memory-size", 1024, "Memory size (in MB)")
	f.IntVar(&c.Spec.CPUs, "cpu-count", 1, "CPU count")
	f.StringVar(&template, "cpu-template", "None", "CPU template of Firecracker, or CPU model of QEMU")
	f.StringVar(&c.Spec.Interface, "interface", "tap0", "Name of the interface in the network namespace to use")
	f.StringVar(&c.Spec.MAC, "mac", "02:0e:d9:fd:68:3d", "MAC of the interface in the guest")
	f.StringVar(&c.Spec.BootArgs, "boot-args", vmm.DefaultBootArgs, "Boot/kernel arguments; the guest's address (ip=) is added unless it is there")
	f.Uint32Var(&c.Spec.AgentPort, "agent-vsock-port", vmm.DefaultAgentPort, "Agent VSock port")
	f.Uint32Var(&c.Spec.LivenessPort, "liveness-vsock-port", vmm.DefaultLivenessPort, "Liveness VSock port")
	f.StringVar(&c.ReadyPorts, "ready-ports", "", "TCP ports that the guest's service opens before it is ready, such as 80,443 (none: wait for none; default: those that its image exposes)")
	f.StringVar(&c.Spec.ReadyOutput, "ready-output", "", "Text on the console that says that the guest is up, for guests without liveness and agent (their ports are 0 then)")
	f.BoolVar(&report, "report", false, "Whether to print how long boot and suspend took, as JSON on stdout")
	return cmd
}
