package qemu_test

import (
	"fmt"

	"drafter/vmm"
	"drafter/vmm/qemu"
)

// The zero value is ready.
func ExampleDriver() {
	host := vmm.Host{Drivers: vmm.Drivers{qemu.Driver{}}, BaseDir: "out/vms"}
	fmt.Println(host.Complete(), host.Drivers[0].Name())
	// Output: <nil> qemu
}
