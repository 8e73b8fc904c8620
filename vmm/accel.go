package vmm

import (
	"fmt"
	"os"
)

// Accelerator resolves a requested accelerator for this host, and says why it chose. PVM's KVM
// (module kvm_pvm) runs PVM-aware guest kernels only: a stock kernel spins in it for ever. So
// "auto" takes emulation there, and KVM must be asked for.
func Accelerator(requested string) (accel, why string, err error) {
	return accelerator(requested, "/dev/kvm", "/sys/module/kvm_pvm")
}

func accelerator(requested, kvm, pvm string) (accel, why string, err error) {
	switch requested {
	case AccelTCG:
		return AccelTCG, "asked for", nil
	case AccelKVM:
		if err := usable(kvm); err != nil {
			return "", "", fmt.Errorf("use KVM: %w; load the kvm module, or pass --accel tcg", err)
		}
		return AccelKVM, "asked for", nil
	case AccelAuto, "":
		if err := usable(kvm); err != nil {
			return AccelTCG, fmt.Sprintf("KVM is not usable (%v)", err), nil
		}
		if _, err := os.Stat(pvm); err == nil {
			return AccelTCG, "KVM is provided by PVM, which runs only PVM-aware kernels; pass --accel kvm if yours is", nil
		}
		return AccelKVM, "KVM is available", nil
	}
	return "", "", fmt.Errorf("accelerator %q is unknown; choose one of: auto, kvm, tcg", requested)
}

func usable(device string) error {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}
