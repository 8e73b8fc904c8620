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
)

// Annotations of a bundle's config.json. The first two are what the OCI image specification's conversion to a runtime bundle defines.
const (
	ExposedPortsAnnotation  = "org.opencontainers.image.exposedPorts" // "6379/tcp,…"
	StopSignalAnnotation    = "org.opencontainers.image.stopSignal"
	BeforeSuspendAnnotation = "drafter.before-suspend-cmd"
	AfterResumeAnnotation   = "drafter.after-resume-cmd"
)

const (
	bundleDir     = "/run/bundle"
	containerName = "oci"
	// readyTimeout is how long the container may take to listen on its exposed ports. A service that never does is announced all the same.
	readyTimeout = 60 * time.Second
)

// bundle is the OCI runtime bundle on one of the VM's extra disks, mounted.
type bundle struct {
	spec  specs.Spec
	ended chan struct{} // closed when the container has ended
}

// findBundle mounts the first extra disk that holds a bundle. Other disks are left to the guest's user. No bundle is no error.
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
	b := &bundle{ended: make(chan struct{})}
	if err := json.Unmarshal(raw, &b.spec); err != nil {
		return nil, fmt.Errorf("config.json: %w", err)
	}
	return b, nil
}

func (b *bundle) annotation(key string) string { return b.spec.Annotations[key] }

// start runs the container with the console as its output.
func (b *bundle) start(children *reaper) (<-chan syscall.WaitStatus, error) {
	// After a crash the runtime's record of the dead container is gone with /run, so the name is always free.
	cmd := crun("run", "--bundle", bundleDir, containerName)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	done, err := children.start(cmd)
	if err != nil {
		return nil, fmt.Errorf("start container: %w", err)
	}
	ended := make(chan syscall.WaitStatus, 1)
	go func() {
		status := <-done
		close(b.ended)
		ended <- status
	}()
	return ended, nil
}

func crun(args ...string) *exec.Cmd {
	cmd := exec.Command("/usr/bin/crun", append([]string{"--root", "/run/crun"}, args...)...)
	cmd.Env = []string{"PATH=" + Path}
	return cmd
}

// stop asks the container to end with its stop signal, and kills it when it does not in time.
func (b *bundle) stop(children *reaper, container <-chan syscall.WaitStatus) {
	signal := b.annotation(StopSignalAnnotation)
	if signal == "" {
		signal = "SIGTERM"
	}
	for _, s := range []string{signal, "SIGKILL"} {
		if _, err := children.start(crun("kill", containerName, s)); err != nil {
			slog.Error("Container not stopped", "signal", s, "error", err)
		}
		select {
		case <-container:
			return
		case <-time.After(stopTimeout):
		}
	}
}

// awaitReady waits until something listens on every TCP port the image exposes, so that a snapshot holds a service that is ready.
func (b *bundle) awaitReady() {
	var want []uint16
	for _, p := range strings.Split(b.annotation(ExposedPortsAnnotation), ",") {
		number, protocol, _ := strings.Cut(p, "/")
		n, err := strconv.ParseUint(number, 10, 16)
		if err == nil && (protocol == "" || protocol == "tcp") {
			want = append(want, uint16(n))
		}
	}
	deadline := time.Now().Add(readyTimeout)
	for time.Now().Before(deadline) {
		ports, err := listeningPorts()
		if err != nil {
			slog.Error("Readiness not known", "error", err)
			return
		}
		if !slices.ContainsFunc(want, func(p uint16) bool { return !ports[p] }) {
			return
		}
		select {
		case <-b.ended:
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
	slog.Warn("The container does not listen on all ports its image exposes", "ports", want, "waited", readyTimeout)
}
