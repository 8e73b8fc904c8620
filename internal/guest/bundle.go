package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"drafter/agent"
)

// Annotations of a bundle's config.json. The first two are what the OCI image specification's
// conversion to a runtime bundle defines.
const (
	ExposedPortsAnnotation  = "org.opencontainers.image.exposedPorts" // "6379/tcp,…"
	StopSignalAnnotation    = "org.opencontainers.image.stopSignal"
	BeforeSuspendAnnotation = "drafter.before-suspend-cmd"
	AfterResumeAnnotation   = "drafter.after-resume-cmd"
)

const (
	bundleDir     = "/run/bundle"
	containerName = "oci"
	containerPID  = "/run/oci.pid" // made by the runtime once the container is there
)

// bundle is the OCI runtime bundle on one of the VM's extra disks, mounted.
type bundle struct {
	spec        specs.Spec
	interactive bool // see InteractiveArgument
}

// findBundle mounts the first extra disk that holds a bundle. Other disks are left to the guest's
// user. No bundle is no error.
func findBundle() (*bundle, error) {
	disks, err := filepath.Glob("/sys/block/vd*")
	if err != nil {
		return nil, err
	}
	slices.Sort(disks)
	if err := os.MkdirAll(bundleDir, 0o755); err != nil {
		return nil, fmt.Errorf("create mount point: %w", err)
	}
	for _, d := range disks {
		device := "/dev/" + filepath.Base(d)
		if err := unix.Mount(device, bundleDir, "ext4", unix.MS_NODEV, ""); err != nil {
			continue // the root disk (busy), or no ext4
		}
		b, err := readBundle()
		if err == nil {
			slog.Info("Found OCI bundle", "disk", device)
			return b, nil
		}
		if uerr := unix.Unmount(bundleDir, 0); uerr != nil {
			return nil, fmt.Errorf("unmount %s: %w", device, uerr)
		}
		if !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("OCI bundle on %s: %w", device, err)
		}
	}
	return nil, nil
}

func readBundle() (*bundle, error) {
	if _, err := os.Stat(filepath.Join(bundleDir, "rootfs")); err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(filepath.Join(bundleDir, "config.json"))
	if err != nil {
		return nil, err
	}
	b := &bundle{}
	if err := json.Unmarshal(raw, &b.spec); err != nil {
		return nil, fmt.Errorf("config.json: %w", err)
	}
	return b, nil
}

func (b *bundle) annotation(key string) string { return b.spec.Annotations[key] }

// start runs the container, with more variables in its environment than the bundle says. It returns
// once the container runs, or has failed to start.
func (b *bundle) start(children *reaper, env []string, stdout, stderr *os.File) (<-chan syscall.WaitStatus, error) {
	// After a crash the runtime's record of the dead container is gone with /run, so the name is
	// always free.
	args := []string{"run", "--pid-file", containerPID, "--bundle", bundleDir}
	if len(env) > 0 || b.interactive {
		b.spec.Process.Env = agent.WithEnv(b.spec.Process.Env, env)
		if _, _, err := b.healthCheck(); err != nil { // it runs as the service does
			slog.Warn("The service's health is checked without its secrets", "error", err)
		}
		config, err := configWith(filepath.Join(bundleDir, "config.json"), env)
		if err == nil && b.interactive {
			config, err = waitingConfig(config)
		}
		if err == nil {
			err = os.WriteFile(startConfig, config, 0o600)
		}
		if err != nil {
			return nil, fmt.Errorf("start container: %w", err)
		}
		defer os.Remove(startConfig) // the runtime has read it
		args = append(args, "--config", startConfig)
	}
	cmd := crun(append(args, containerName)...)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	done, err := children.start(cmd)
	if err != nil {
		return nil, fmt.Errorf("start container: %w", err)
	}
	for {
		if _, err := os.Stat(containerPID); err == nil {
			return done, nil
		}
		select {
		case status := <-done: // RunInit takes it
			ended := make(chan syscall.WaitStatus, 1)
			ended <- status
			return ended, nil
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// startConfig is the config of a container that is started with secrets, or waits for its program. It
// is in memory.
const startConfig = "/run/config.json"

// configWith reads a bundle's config, and adds variables to its environment.
func configWith(path string, env []string) ([]byte, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var config, process map[string]json.RawMessage // what we do not know stays
	var have []string
	if err := json.Unmarshal(raw, &config); err != nil {
		return nil, fmt.Errorf("config.json: %w", err)
	}
	if err := json.Unmarshal(config["process"], &process); err != nil {
		return nil, fmt.Errorf("config.json: process: %w", err)
	}
	if len(process["env"]) > 0 {
		if err := json.Unmarshal(process["env"], &have); err != nil {
			return nil, fmt.Errorf("config.json: env: %w", err)
		}
	}
	if process["env"], err = json.Marshal(agent.WithEnv(have, env)); err != nil {
		return nil, err
	}
	if config["process"], err = json.Marshal(process); err != nil {
		return nil, err
	}
	return json.Marshal(config)
}

func crun(args ...string) *exec.Cmd {
	cmd := exec.Command("/usr/bin/crun", append([]string{"--root", "/run/crun"}, args...)...)
	cmd.Env = []string{"PATH=" + Path}
	return cmd
}

// stop asks the container to end with its stop signal, and kills it when it does not in time.
// It returns how the container has ended, if it has.
func (b *bundle) stop(children *reaper, container <-chan syscall.WaitStatus) (status syscall.WaitStatus, ended bool) {
	signal, err := ParseSignal(b.annotation(StopSignalAnnotation))
	if err != nil {
		slog.Warn("The stop signal is not known; it is SIGTERM", "error", err)
		signal = unix.SIGTERM
	}
	for _, s := range []syscall.Signal{signal, unix.SIGKILL} {
		if _, err := children.start(crun("kill", containerName, strconv.Itoa(int(s)))); err != nil {
			slog.Error("Container not stopped", "signal", s, "error", err)
		}
		select {
		case status := <-container:
			return status, true
		case <-time.After(stopTimeout):
		}
	}
	return 0, false
}

// Real-time signals as glibc counts them: it keeps the first two of the kernel's for itself.
const minRealTime, maxRealTime = 34, 64

// ParseSignal parses a signal as images name it: SIGQUIT, QUIT, 3, SIGRTMIN+3, RTMAX-1, in any
// case. "" is SIGTERM.
func ParseSignal(s string) (syscall.Signal, error) {
	name := strings.TrimPrefix(strings.ToUpper(strings.TrimSpace(s)), "SIG")
	if name == "" {
		return unix.SIGTERM, nil
	}
	n, err := strconv.Atoi(name)
	if err != nil {
		n = int(unix.SignalNum("SIG" + name))
	}
	for prefix, base := range map[string]int{"RTMIN": minRealTime, "RTMAX": maxRealTime} {
		if rest, ok := strings.CutPrefix(name, prefix); ok && rest == "" {
			n = base
		} else if offset, err := strconv.Atoi(rest); ok && err == nil {
			n = base + offset
		}
	}
	if n < 1 || n > maxRealTime {
		return 0, fmt.Errorf("signal %q is not known", s)
	}
	return syscall.Signal(n), nil
}
