package firecracker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"golang.org/x/sys/unix"
)

// The bodies of the calls that are used, as in src/firecracker/swagger/firecracker.yaml of
// Firecracker.
type (
	bootSource struct {
		KernelImagePath string `json:"kernel_image_path"`
		InitrdPath      string `json:"initrd_path,omitempty"`
		BootArgs        string `json:"boot_args,omitempty"`
	}
	machineConfiguration struct {
		VCPUCount       int    `json:"vcpu_count"`
		MemSizeMiB      int64  `json:"mem_size_mib"`
		TrackDirtyPages bool   `json:"track_dirty_pages"`
		CPUTemplate     string `json:"cpu_template,omitempty"`
		HugePages       string `json:"huge_pages,omitempty"`
	}
	drive struct {
		DriveID      string `json:"drive_id"`
		PathOnHost   string `json:"path_on_host"`
		IsRootDevice bool   `json:"is_root_device"`
		IsReadOnly   bool   `json:"is_read_only"`
		CacheType    string `json:"cache_type"`
	}
	networkInterface struct {
		IfaceID     string `json:"iface_id"`
		HostDevName string `json:"host_dev_name"`
		GuestMAC    string `json:"guest_mac,omitempty"`
	}
	vsockDevice struct {
		GuestCID int    `json:"guest_cid"`
		UDSPath  string `json:"uds_path"`
	}
	action struct {
		ActionType string `json:"action_type"`
	}
	vmState struct {
		State string `json:"state"` // "Paused" or "Resumed"
	}
	snapshotCreate struct {
		SnapshotType string `json:"snapshot_type"` // "Full" or "Diff"
		SnapshotPath string `json:"snapshot_path"`
		MemFilePath  string `json:"mem_file_path"`
	}
	memoryBackend struct {
		BackendType string `json:"backend_type"`
		BackendPath string `json:"backend_path"`
	}
	networkOverride struct {
		IfaceID     string `json:"iface_id"`
		HostDevName string `json:"host_dev_name"`
	}
	snapshotLoad struct {
		SnapshotPath     string            `json:"snapshot_path"`
		MemBackend       memoryBackend     `json:"mem_backend"`
		TrackDirtyPages  bool              `json:"track_dirty_pages"`
		ResumeVM         bool              `json:"resume_vm"`
		NetworkOverrides []networkOverride `json:"network_overrides,omitempty"`
	}
	metrics struct {
		MetricsPath string `json:"metrics_path"`
	}
)

// api calls Firecracker over its socket.
type api struct {
	client http.Client
	socket string
}

// newAPI is for the Firecracker that runs as user uid. That user could replace its socket by a link
// to another one, so the process that answers there is checked.
func newAPI(socket string, uid int) *api {
	a := &api{socket: socket}
	a.client.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
		if err != nil {
			return nil, err
		}
		if err := checkListener(conn.(*net.UnixConn), uid); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		return conn, nil
	}}
	return a
}

// checkListener refuses a connection with a process of another user (unix(7), SO_PEERCRED).
func checkListener(conn *net.UnixConn, uid int) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if cerr != nil {
		return cerr
	}
	if int(cred.Uid) != uid {
		return fmt.Errorf("user %d listens at Firecracker's socket instead of user %d", cred.Uid, uid)
	}
	return nil
}

func (a *api) close() { a.client.CloseIdleConnections() }

// await returns once Firecracker answers.
func (a *api) await(ctx context.Context) error {
	for {
		if conn, err := net.Dial("unix", a.socket); err == nil {
			return conn.Close()
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(time.Millisecond):
		}
	}
}

// refusedError is an answer of Firecracker that is not a success.
type refusedError struct {
	call  string
	fault string
}

func (e *refusedError) Error() string {
	return fmt.Sprintf("firecracker refused %s: %s", e.call, e.fault)
}

// maxAnswer bounds an answer in bytes.
const maxAnswer = 1 << 20

func (a *api) put(ctx context.Context, path string, body any) error {
	return a.call(ctx, http.MethodPut, path, body)
}

func (a *api) patch(ctx context.Context, path string, body any) error {
	return a.call(ctx, http.MethodPatch, path, body)
}

func (a *api) call(ctx context.Context, method, path string, body any) (err error) {
	b, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://firecracker"+path, bytes.NewReader(b))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := a.client.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	defer func() { err = errors.Join(err, res.Body.Close()) }()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if res.StatusCode < 300 {
		return nil
	}
	var fault struct {
		Message string `json:"fault_message"`
	}
	if json.Unmarshal(answer, &fault) != nil || fault.Message == "" {
		fault.Message = res.Status
	}
	return &refusedError{method + " " + path, fault.Message}
}
