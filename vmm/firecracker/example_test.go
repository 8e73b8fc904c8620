package firecracker_test

import (
	"fmt"

	"drafter/vmm"
	"drafter/vmm/firecracker"
)

// The zero value is ready.
func ExampleDriver() {
	host := vmm.Host{Drivers: vmm.Drivers{firecracker.Driver{}}, BaseDir: "out/vms"}
	fmt.Println(host.Complete(), host.Drivers[0].Name())
	// Output: <nil> firecracker
}
