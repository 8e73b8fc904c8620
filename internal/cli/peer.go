package cli

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"drafter/expose"
	"drafter/peer"
	"drafter/vmm"
)

func newPeer() *cobra.Command {
	var (
		host         hostFlags
		devices      deviceFlags
		c            peer.Config
		raddr, laddr string
	)
	cmd := &cobra.Command{
		Use:   "peer",
		Short: "Run an instance of a VM package on devices of its own",
		Long: `Starts an instance of a package and runs it until it is ended (Ctrl-C or SIGTERM), then suspends it; the next start goes on there.

Each device has a base, the package's file. With an overlay and a state file the base is read-only, and what the instance changes is kept in the overlay:
any number of instances can run from one package. Without them the instance writes to the package.

--package and --instance name two directories instead of listing every device; --device adds to what they give, or changes it.

If this process is killed (SIGKILL), the next start cleans up behind it. The instance's disks are then as after a power cut: what the guest synced is
there ('drafter device export' gets it out). Its memory no longer fits its state, so it cannot be resumed; the start says so.
` + exitCodeHelp,
		Example: `  drafter peer --raddr '' --laddr '' --package out/package --instance out/instance-0
  drafter peer --raddr '' --laddr '' --netns ark1 --package out/package --instance out/instance-1 --device name=disk,blockSize=4096`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if c.Devices, err = devices.resolve(cmd); err != nil {
				return err
			}
			for flag, addr := range map[string]string{"raddr": raddr, "laddr": laddr} {
				if addr != "" {
					return &usageError{fmt.Errorf("--%s %s: this build cannot migrate VMs yet; pass --%s ''", flag, addr, flag)}
				}
			}
			var restore func()
			if c.Host, restore, err = host.resolve(cmd.OutOrStdout()); err != nil {
				return err
			}
			defer restore()
			c.ResumeTimeout = host.resumeTimeout
			p, err := peer.New(c)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, p.Close()) }()
			if err := p.Resume(cmd.Context()); err != nil {
				return err
			}
			return runUntilEnded(cmd.Context(), p)
		},
	}
	host.add(cmd)
	devices.add(cmd)
	f := cmd.Flags()
	f.StringVar(&c.Expose, "expose", expose.Auto, "How the VMM gets at the devices: auto, fuse or nbd")
	f.StringVar(&raddr, "raddr", "localhost:1337", "Remote address to connect to (leave empty to disable)")
	f.StringVar(&laddr, "laddr", "localhost:1337", "Local address to listen on (leave empty to disable)")
	f.DurationVar(&c.RescueTimeout, "rescue-timeout", 5*time.Second, "Maximum amount of time to wait for the guest's agent before a suspend")
	return cmd
}

// deviceFlags are the ways to name an instance's devices.
type deviceFlags struct {
	json          string
	pkg, instance string
	overrides     []string
}

func (d *deviceFlags) add(cmd *cobra.Command) {
	var defaults []peer.Device
	for name, file := range map[string]string{vmm.State: "state.bin", vmm.Memory: "memory.bin", vmm.Kernel: "vmlinux", vmm.Disk: "rootfs.ext4", vmm.Config: "config.json"} {
		device := peer.DefaultDevice(name)
		device.Base, device.Overlay, device.State = "out/package/"+file, "out/overlay/"+file, "out/state/"+file
		defaults = append(defaults, device)
	}
	slices.SortFunc(defaults, func(a, b peer.Device) int { return strings.Compare(a.Name, b.Name) })
	f := cmd.Flags()
	f.StringVar(&d.json, "devices", defaultJSON(defaults), "Devices configuration")
	f.StringVar(&d.pkg, "package", "", "Directory of the package (instead of --devices)")
	f.StringVar(&d.instance, "instance", "", "Directory for the instance's overlays and state files (leave empty to write to the package)")
	f.StringArrayVar(&d.overrides, "device", nil, "A device, or a change to one, as name=NAME,FIELD=VALUE,… with the fields of --devices (repeatable)")
}

func (d *deviceFlags) resolve(cmd *cobra.Command) (list []peer.Device, err error) {
	switch {
	case d.pkg != "" && cmd.Flags().Changed("devices"):
		return nil, &usageError{errors.New("--package and --devices both name the devices; give one of them")}
	case d.pkg == "" && d.instance != "":
		return nil, &usageError{errors.New("--instance needs --package")}
	case d.pkg != "":
		list, err = peer.PackageDevices(d.pkg, d.instance)
	default:
		list, err = parseJSON[peer.Device]("devices", d.json)
	}
	if err != nil {
		return nil, err
	}
	for _, o := range d.overrides {
		if list, err = override(list, o); err != nil {
			return nil, &usageError{fmt.Errorf("--device %s: %w", o, err)}
		}
	}
	return list, nil
}

// override applies name=NAME,FIELD=VALUE,… to the device of that name, which is added if there is none.
func override(list []peer.Device, text string) ([]peer.Device, error) {
	var name string
	fields := map[string]string{}
	for pair := range strings.SplitSeq(text, ",") {
		key, value, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, fmt.Errorf("%q is not FIELD=VALUE", pair)
		}
		if key == "name" {
			name = value
		} else {
			fields[key] = value
		}
	}
	if name == "" {
		return nil, errors.New("name=… is missing")
	}
	i := slices.IndexFunc(list, func(d peer.Device) bool { return d.Name == name })
	if i < 0 {
		list = append(list, peer.DefaultDevice(name))
		i = len(list) - 1
	}
	for key, value := range fields {
		if err := setField(&list[i], key, value); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// setField sets the field whose JSON name is key.
func setField(d *peer.Device, key, value string) error {
	v := reflect.ValueOf(d).Elem()
	for i := range v.NumField() {
		if v.Type().Field(i).Tag.Get("json") != key {
			continue
		}
		f := v.Field(i)
		var err error
		switch f.Interface().(type) {
		case string:
			f.SetString(value)
		case bool:
			var b bool
			b, err = strconv.ParseBool(value)
			f.SetBool(b)
		case time.Duration:
			var t time.Duration
			if t, err = time.ParseDuration(value); err != nil {
				var n int64
				n, err = strconv.ParseInt(value, 10, 64) // nanoseconds, as in the JSON
				t = time.Duration(n)
			}
			f.SetInt(int64(t))
		default:
			var n int64
			n, err = strconv.ParseInt(value, 10, 64)
			f.SetInt(n)
		}
		if err != nil {
			return fmt.Errorf("field %s cannot be %q", key, value)
		}
		return nil
	}
	return fmt.Errorf("field %q does not exist; the fields are: %s", key, strings.Join(fields[peer.Device](), ", "))
}
