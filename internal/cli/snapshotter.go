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
		Long: `Boots a blueprint, waits until the guest is up and its service is ready, and
suspends it. Stores kernel, disks, memory, state and config as a package, which 'drafter runner' and
'drafter peer' resume in a fraction of a boot's time.

The service of an OCI image is ready when something listens on each TCP port that the image exposes,
not only on loopback, and when its health check, if it has one, succeeds. --ready-ports names other
ports, which may be open on loopback only, and leaves the health check out. A service that is not
ready within --resume-timeout, or that ends, is an error.

Devices: kernel, disk, state, memory and config are needed. Every other name is a further disk, in
list order (/dev/vdb, /dev/vdc, …). The initramfs is the device initrd, or a file initrd beside the
kernel. The package keeps it in the device kernel, behind the kernel, to boot a VM that cannot be
resumed.

On failure no file of the package is left behind, and an older package stays unchanged.
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
	f.Int64Var(&memoryMB, "memory-size", 1024, "Memory of the VM, in MiB, 64 or more")
	f.IntVar(&c.Spec.CPUs, "cpu-count", 1, "Number of virtual CPUs, 1 or more")
	f.StringVar(&template, "cpu-template", "None", "CPU template of Firecracker, or CPU model of QEMU")
	f.StringVar(&c.Spec.Interface, "interface", "tap0", "Name of the tap interface in the network namespace")
	f.StringVar(&c.Spec.MAC, "mac", "02:0e:d9:fd:68:3d", "MAC address of the interface in the guest")
	f.StringVar(&c.Spec.BootArgs, "boot-args", vmm.DefaultBootArgs, "Kernel arguments; the guest's address (ip=) is added unless they have one")
	f.Uint32Var(&c.Spec.AgentPort, "agent-vsock-port", vmm.DefaultAgentPort, "Vsock port of the guest's agent (0: the guest has none)")
	f.Uint32Var(&c.Spec.LivenessPort, "liveness-vsock-port", vmm.DefaultLivenessPort, "Vsock port that the guest's liveness program connects to (0: the guest has none)")
	f.StringVar(&c.ReadyPorts, "ready-ports", "", "TCP ports that the guest's service opens before it is ready, such as 80,443 (none: wait for no port; default: those that its image exposes)")
	f.StringVar(&c.Spec.ReadyOutput, "ready-output", "", "Text on the console that says that the guest is up, for guests without liveness and agent; both ports must be 0")
	f.BoolVar(&report, "report", false, "Print how long boot and suspend took, as JSON on stdout, in milliseconds")
	return cmd
}
