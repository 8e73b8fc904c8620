package snapshotter_test

import (
	"context"
	"log"

	"drafter/snapshotter"
	"drafter/vmm"
	"drafter/vmm/qemu"
)

// A package is made of a blueprint.
func Example() {
	devices, err := snapshotter.BlueprintDevices("out/blueprint", "out/package")
	if err != nil {
		log.Fatal(err)
	}
	s, err := snapshotter.New(snapshotter.Config{
		Host: vmm.Host{Drivers: vmm.Drivers{qemu.Driver{}}, BaseDir: "out/vms", Netns: "ark0"},
		Spec: vmm.Spec{
			CPUs: 1, MemorySize: 1 << 30, BootArgs: "console=ttyS0", Interface: "tap0", MAC: "02:0e:d9:fd:68:3d",
			AgentPort: vmm.DefaultAgentPort, LivenessPort: vmm.DefaultLivenessPort,
		},
		Devices: devices,
	})
	if err != nil {
		log.Fatal(err)
	}
	result, err := s.Run(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	log.Print("booted in ", result.Boot)
}
