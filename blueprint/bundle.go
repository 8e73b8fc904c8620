package blueprint

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	archive "github.com/moby/go-archive"
	"github.com/moby/go-archive/chrootarchive"
	"github.com/moby/sys/user"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"drafter/internal/guest"
)

// BuildOCI makes an ext4 image that holds the OCI runtime bundle of an image. See [UnpackOCI] and [PackOCI] for its halves.
func BuildOCI(ctx context.Context, image v1.Image, c Ext4Config) (err error) {
	work, err := os.MkdirTemp("", "drafter-bundle-")
	if err != nil {
		return fmt.Errorf("create work directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	if err := UnpackOCI(ctx, image, work, c.Progress); err != nil {
		return err
	}
	c.Source = work
	return PackOCI(ctx, c)
}

// defaultBundleFree is the room a packed bundle has for the container's own data.
const defaultBundleFree = 512 << 20

// PackOCI makes an ext4 image of the bundle in c.Source, after checking that it is one.
func PackOCI(ctx context.Context, c Ext4Config) error {
	raw, err := os.ReadFile(filepath.Join(c.Source, "config.json"))
	if err != nil {
		return fmt.Errorf("%s is no OCI bundle: %w", c.Source, err)
	}
	var spec specs.Spec
	if err := json.Unmarshal(raw, &spec); err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(c.Source, "config.json"), err)
	}
	if spec.Process == nil || len(spec.Process.Args) == 0 {
		return fmt.Errorf("%s names no command in process.args", filepath.Join(c.Source, "config.json"))
	}
	if info, err := os.Stat(filepath.Join(c.Source, "rootfs")); err != nil || !info.IsDir() {
		return fmt.Errorf("%s is no OCI bundle: it has no directory rootfs", c.Source)
	}
	c.Label = cmp.Or(c.Label, "drafter-oci")
	c.Free = cmp.Or(c.Free, defaultBundleFree)
	return MakeExt4(ctx, c)
}

// UnpackOCI makes an OCI runtime bundle of an image: dir/rootfs and dir/config.json. It needs root. dir must be empty or not exist.
func UnpackOCI(ctx context.Context, image v1.Image, dir string, progress Progress) error {
	rootfs := filepath.Join(dir, "rootfs")
	if entries, err := os.ReadDir(dir); err == nil && len(entries) > 0 {
		return fmt.Errorf("unpack image: directory %s is not empty; remove it or name another", dir)
	}
	if err := os.MkdirAll(rootfs, 0o755); err != nil {
		return fmt.Errorf("unpack image: %w", err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		return fmt.Errorf("read image config: %w", err)
	}
	layers, err := image.Layers()
	if err != nil {
		return fmt.Errorf("read image layers: %w", err)
	}
	var total, done int64
	for _, l := range layers {
		size, err := l.Size()
		if err != nil {
			return fmt.Errorf("read image layers: %w", err)
		}
		total += size
	}
	if len(config.RootFS.DiffIDs) != len(layers) {
		return fmt.Errorf("the image is damaged: it has %d layers, its config names %d", len(layers), len(config.RootFS.DiffIDs))
	}
	for i, l := range layers {
		count := func(n int) { done += int64(n); progress.report("Pulling image", min(done, total-1), total) }
		if err := unpackLayer(ctx, l, config.RootFS.DiffIDs[i], rootfs, count); err != nil {
			return fmt.Errorf("unpack layer %d of %d: %w", i+1, len(layers), err)
		}
	}
	progress.report("Pulling image", total, total)
	spec, err := runtimeSpec(config, rootfs)
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(spec, "", "  ")
	if err != nil {
		return fmt.Errorf("encode bundle config: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("write bundle config: %w", err)
	}
	return nil
}

// unpackLayer applies a layer to rootfs: whiteouts, hard links, owners, modes, extended attributes, device nodes. It runs in a chroot, so that
// no symbolic link leads out of it, and checks the layer's content against its id in the image's config.
func unpackLayer(ctx context.Context, layer v1.Layer, id v1.Hash, rootfs string, count func(int)) (err error) {
	compressed, err := layer.Compressed()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, compressed.Close()) }()
	plain, err := decompressLayer(&countingReader{ctx, compressed, count})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, plain.Close()) }()
	hash := sha256.New()
	tee := io.TeeReader(plain, hash)
	if _, err := chrootarchive.ApplyUncompressedLayer(rootfs, tee, &archive.TarOptions{}); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, tee); err != nil { // padding behind the archive's end
		return err
	}
	if got := hex.EncodeToString(hash.Sum(nil)); got != id.Hex {
		return fmt.Errorf("its content is damaged: sha256:%s instead of %s", got, id)
	}
	return nil
}

type countingReader struct {
	ctx   context.Context
	r     io.Reader
	count func(int)
}

func (c *countingReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	n, err := c.r.Read(p)
	c.count(n)
	return n, err
}

// decompressLayer picks by magic number: media types are not always told.
func decompressLayer(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 1<<20)
	magic, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte("\x1f\x8b")):
		return gzip.NewReader(b)
	case bytes.Equal(magic, []byte("\x28\xb5\x2f\xfd")):
		d, err := zstd.NewReader(b)
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(b), nil
}

// defaultCapabilities are what container engines grant a container by default.
var defaultCapabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD", "CAP_NET_BIND_SERVICE",
	"CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// bundleVersion is the version of the runtime specification our bundles keep to. It is an old one on purpose: runtimes refuse newer ones than
// they know, and nothing of those is needed.
const bundleVersion = "1.0.2"

// runtimeSpec converts an image's config as the OCI image specification says (conversion.md). The container shares the VM's network: the VM
// is the boundary.
func runtimeSpec(config *v1.ConfigFile, rootfs string) (*specs.Spec, error) {
	c := config.Config
	args := append(slices.Clone(c.Entrypoint), c.Cmd...)
	if len(args) == 0 {
		return nil, errors.New("the image has neither an entrypoint nor a command; add one with 'blueprint oci unpack', edit config.json and 'pack'")
	}
	root, err := openRootDir(rootfs)
	if err != nil {
		return nil, fmt.Errorf("open rootfs: %w", err)
	}
	defer root.Close()
	who, home, err := lookUpUser(root, c.User)
	if err != nil {
		return nil, err
	}
	for volume := range c.Volumes {
		if err := root.mkdirAll(volume); err != nil {
			return nil, fmt.Errorf("create volume %s: %w", volume, err)
		}
	}
	env := slices.Clone(c.Env)
	env = withDefault(env, "PATH", guest.Path)
	env = withDefault(env, "HOME", home)
	annotations := map[string]string{}
	for k, v := range c.Labels {
		annotations[k] = v
	}
	if c.StopSignal != "" {
		annotations[guest.StopSignalAnnotation] = c.StopSignal
	}
	ports := make([]string, 0, len(c.ExposedPorts))
	for p := range c.ExposedPorts {
		ports = append(ports, p)
	}
	if len(ports) > 0 {
		slices.Sort(ports)
		annotations[guest.ExposedPortsAnnotation] = strings.Join(ports, ",")
	}
	return &specs.Spec{
		Version:  bundleVersion,
		Hostname: "drafter",
		Root:     &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			User: who,
			Args: args,
			Env:  env,
			Cwd:  cmp.Or(c.WorkingDir, "/"),
			Capabilities: &specs.LinuxCapabilities{
				Bounding: defaultCapabilities, Effective: defaultCapabilities, Permitted: defaultCapabilities,
			},
			Rlimits:         []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1 << 20, Soft: 1 << 16}},
			NoNewPrivileges: false,
		},
		Mounts:      containerMounts,
		Annotations: annotations,
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace}},
			MaskedPaths: []string{
				"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
			},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}, nil
}

var containerMounts = []specs.Mount{
	{Destination: "/proc", Type: "proc", Source: "proc"},
	{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
	{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
	{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777"}},
	{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
	{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
	{Destination: "/etc/resolv.conf", Type: "bind", Source: guest.ResolvConf, Options: []string{"rbind", "ro"}},
}

func withDefault(env []string, key, value string) []string {
	if slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, key+"=") }) {
		return env
	}
	return append(env, key+"="+value)
}

// maxUsers bounds what is read of an image's passwd and group files, in bytes.
const maxUsers = 16 << 20

// lookUpUser resolves an image's user ("name", "uid", "name:group", "uid:gid") with the image's own passwd and group files.
func lookUpUser(root *rootDir, spec string) (specs.User, string, error) {
	open := func(name string) (io.Reader, error) {
		f, err := root.open(name, os.O_RDONLY)
		if errors.Is(err, os.ErrNotExist) {
			return bytes.NewReader(nil), nil
		}
		if err != nil {
			return nil, err
		}
		defer f.Close()
		b, err := io.ReadAll(io.LimitReader(f, maxUsers))
		return bytes.NewReader(b), err
	}
	passwd, err := open("etc/passwd")
	if err != nil {
		return specs.User{}, "", fmt.Errorf("look up user %q: %w", spec, err)
	}
	group, err := open("etc/group")
	if err != nil {
		return specs.User{}, "", fmt.Errorf("look up user %q: %w", spec, err)
	}
	found, err := user.GetExecUser(spec, &user.ExecUser{Home: "/"}, passwd, group)
	if err != nil {
		return specs.User{}, "", fmt.Errorf("look up user %q of the image: %w", spec, err)
	}
	u := specs.User{UID: uint32(found.Uid), GID: uint32(found.Gid)}
	for _, g := range found.Sgids {
		u.AdditionalGids = append(u.AdditionalGids, uint32(g))
	}
	return u, found.Home, nil
}
