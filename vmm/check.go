package vmm

import (
	"fmt"
	"net"
	"regexp"

	"github.com/google/uuid"
)

// The fields of a package's config come from whoever made the package, or from a migration's
// source. Every field has the form below before it reaches a command line, a path, an API or a log.
// Drivers also check what only they know, such as machine types and CPU models.
var (
	vmmForm     = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)
	versionForm = regexp.MustCompile(`^[0-9]+(\.[0-9]+){0,3}$`)
	machineForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$`)
	cpuForm     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.,+=-]{0,511}$`)
	// 15 bytes: IFNAMSIZ of Linux
	interfaceForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$`)
	argsForm      = regexp.MustCompile(`^[ -~]*$`)
)

// maxArgs is how many bytes of a command line Linux takes on x86, without the terminating zero
// (COMMAND_LINE_SIZE).
const maxArgs = 2047

// maxDevices is more than any machine has room for.
const maxDevices = 64

// checkFields refuses fields that do not have their form.
func (h *Hardware) checkFields() error {
	for _, f := range []struct {
		name, value string
		form        *regexp.Regexp
	}{{"vmm", h.VMM, vmmForm}, {"version", h.Version, versionForm}, {"machine", h.Machine, machineForm}, {"cpu", h.CPU, cpuForm}} {
		if err := checkForm("hardware."+f.name, f.value, f.form); err != nil {
			return err
		}
	}
	if h.Accel != AccelKVM && h.Accel != AccelTCG {
		return fmt.Errorf("hardware.accel %.32q is neither kvm nor tcg", h.Accel)
	}
	return nil
}

func checkForm(field, value string, form *regexp.Regexp) error {
	if !form.MatchString(value) {
		return fmt.Errorf("%s %.80q is not of the form %s", field, value, form)
	}
	return nil
}

// CheckNetwork refuses invalid names of interfaces and invalid MAC addresses. Both may be empty.
func CheckNetwork(iface, mac string) error {
	if iface != "" {
		if err := checkForm("interface", iface, interfaceForm); err != nil {
			return err
		}
	}
	if mac != "" || iface != "" {
		a, err := net.ParseMAC(mac)
		if err != nil || len(a) != 6 || a[0]&1 != 0 || a.String() != mac {
			return fmt.Errorf("mac %.32q is no address of a network interface, such as 02:0e:d9:fd:68:3d", mac)
		}
	}
	return nil
}

// CheckBootArgs refuses a kernel command line with control characters, or one that Linux would cut
// off.
func CheckBootArgs(args string) error {
	if len(args) > maxArgs {
		return fmt.Errorf("bootArgs has %d bytes; Linux takes %d", len(args), maxArgs)
	}
	return checkForm("bootArgs", args, argsForm)
}

// checkFields refuses a config with invalid fields.
func (c *PackageConfig) checkFields() error {
	if id, err := uuid.Parse(c.ID); err != nil || id.String() != c.ID {
		return fmt.Errorf("id %.64q is no UUID", c.ID)
	}
	if err := c.Hardware.checkFields(); err != nil {
		return err
	}
	if err := CheckNetwork(c.Interface, c.MAC); err != nil {
		return err
	}
	if err := CheckBootArgs(c.BootArgs); err != nil {
		return err
	}
	if c.AgentPort != 0 && c.AgentPort == c.LivenessPort {
		return fmt.Errorf("agent and liveness share port %d", c.AgentPort)
	}
	if len(c.Devices) > maxDevices {
		return fmt.Errorf("%d devices are listed; there can be %d", len(c.Devices), maxDevices)
	}
	return nil
}
