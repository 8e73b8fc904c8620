package vmm_test

import (
	"fmt"

	"drafter/vmm"
)

// A host says what it lacks before anything is touched.
func ExampleHost_Complete() {
	host := vmm.Host{BaseDir: "out/vms"}
	fmt.Println(host.Complete())
	// Output: Host.Drivers is empty; name the drivers of VMMs, such as qemu.Driver{}
}
