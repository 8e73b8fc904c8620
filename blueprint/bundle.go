package blueprint

import (
	"archive/tar"
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
	"strconv"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	archive "github.com/moby/go-archive"
	"github.com/moby/go-archive/chrootarchive"
	"github.com/moby/sys/user"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"drafter/internal/decompress"
	"drafter/internal/guest"
	"drafter/internal/private"
	"drafter/internal/scratch"
)

// Limits bound what an image may become: some KB of a stranger's can unpack to any size.
type Limits struct {
	Bytes int64 // of all files of all layers; 0 for 64 GiB
	Files int64 // with the directories that their names need; 0 for 4 million
}

// BuildOCI makes an ext4 image that holds the OCI runtime bundle of an image. See [UnpackOCI] and [PackOCI] for its halves.
func BuildOCI(ctx context.Context, image v1.Image, limits Limits, c Ext4Config) (err error) {
	work, err := scratch.New(os.TempDir(), "drafter-bundle-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, work.Close()) }()
	if err := makeBundle(ctx, image, work.Path("bundle"), limits, c.Progress); err != nil {
		return err
	}
	c.Source = work.Path("bundle")
	return PackOCI(ctx, c)
}

// defaultBundleFree is the room a packed bundle has for the container's own data.
const defaultBundleFree = 512 << 20

// PackOCI makes an ext4 image of the bundle in c.Source, after checking that it is one, and that nobody can change it meanwhile: a link that takes a file's
// place would bring any file of the host into the image.
func PackOCI(ctx context.Context, c Ext4Config) error {
	for _, dir := range []string{c.Source, filepath.Join(c.Source, "rootfs")} {
		if err := checkOwner(dir, os.Getenv("SUDO_UID")); err != nil {
			return fmt.Errorf("%s is no OCI bundle to pack: %w", c.Source, err)
		}
	}
	raw, err := readRegular(filepath.Join(c.Source, "config.json"), maxBundleConfig)
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
	c.Label = cmp.Or(c.Label, "drafter-oci")
	c.Free = cmp.Or(c.Free, defaultBundleFree)
	return MakeExt4(ctx, c)
}

// maxBundleConfig bounds a bundle's config.json, in bytes.
const maxBundleConfig = 16 << 20

// checkOwner refuses what is no directory, or one that others than root, this user and the one with the id also may write to.
func checkOwner(dir, also string) error {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fmt.Errorf("there is no directory %s", filepath.Base(dir))
	}
	owner := strconv.Itoa(int(st.Uid))
	if st.Uid != 0 && int(st.Uid) != os.Geteuid() && owner != also {
		return fmt.Errorf("it belongs to user %s, who could change it meanwhile; copy it to a directory of your own", owner)
	}
	if st.Mode&0o002 != 0 {
		return errors.New("everybody can write to it; 'chmod o-w' it")
	}
	return nil
}

// readRegular reads a regular file of at most limit bytes, and nothing that a link leads to.
func readRegular(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return nil, fmt.Errorf("%s is no regular file of at most %d bytes", path, limit)
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

// UnpackOCI makes an OCI runtime bundle of an image: dir/rootfs and dir/config.json. It needs root. dir must be empty or not exist. It is closed to other users:
// there are setuid programs and devices of a stranger's in it. It is there once it is complete; a failure leaves nothing.
func UnpackOCI(ctx context.Context, image v1.Image, dir string, limits Limits, progress Progress) (err error) {
	dir = filepath.Clean(dir)
	if entries, err := os.ReadDir(dir); err == nil && len(entries) > 0 {
		return fmt.Errorf("unpack image: directory %s is not empty; remove it or name another", dir)
	}
	if err := private.MkdirAll(filepath.Dir(dir)); err != nil {
		return fmt.Errorf("unpack image: %w", err)
	}
	work, err := scratch.New(filepath.Dir(dir), "."+filepath.Base(dir)+".unpacking-")
	if err != nil {
		return fmt.Errorf("unpack image: %w", err)
	}
	defer func() { err = errors.Join(err, work.Close()) }()
	if err := makeBundle(ctx, image, work.Path("bundle"), limits, progress); err != nil {
		return err
	}
	if err := work.Move("bundle", filepath.Base(dir)); err != nil {
		return fmt.Errorf("unpack image: %w", err)
	}
	return nil
}

// makeBundle makes the bundle in dir, a new directory in one that is closed to others.
func makeBundle(ctx context.Context, image v1.Image, dir string, limits Limits, progress Progress) error {
	rootfs := filepath.Join(dir, "rootfs")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(rootfs, 0o755), os.Chmod(rootfs, 0o755)); err != nil {
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
		if size < 0 || size > 1<<62-total {
			return fmt.Errorf("the image is damaged: it has a layer of %d bytes", size)
		}
		total += size
	}
	if len(config.RootFS.DiffIDs) != len(layers) {
		return fmt.Errorf("the image is damaged: it has %d layers, its config names %d", len(layers), len(config.RootFS.DiffIDs))
	}
	left := Limits{cmp.Or(limits.Bytes, 64<<30), cmp.Or(limits.Files, 4_000_000)}
	for i, l := range layers {
		count := func(n int) { done += int64(n); progress.report("Pulling image", min(done, total-1), total) }
		if err := unpackLayer(ctx, l, config.RootFS.DiffIDs[i], rootfs, &left, count); err != nil {
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
	if err := os.WriteFile(filepath.Join(dir, "config.json"), append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("write bundle config: %w", err)
	}
	return nil
}

// unpackLayer applies a layer to rootfs: whiteouts, hard links, owners, modes, extended attributes, device nodes. It runs in a chroot, so that
// no symbolic link leads out of it, and checks the layer's content against its id in the image's config.
func unpackLayer(ctx context.Context, layer v1.Layer, id v1.Hash, rootfs string, left *Limits, count func(int)) (err error) {
	compressed, err := layer.Compressed()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, compressed.Close()) }()
	plain, err := decompressLayer(&countingReader{decompress.Interruptible(ctx, compressed), count})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, plain.Close()) }()
	hash := sha256.New()
	tee := io.TeeReader(&boundedReader{decompress.Interruptible(ctx, plain), left.Bytes + left.Files*4096}, hash)
	checked, w := io.Pipe()
	var g errgroup.Group
	g.Go(func() error {
		err := left.check(ctx, w, tar.NewReader(tee))
		_ = w.CloseWithError(err) // which never fails
		return err
	})
	_, err = chrootarchive.ApplyUncompressedLayer(rootfs, checked, &archive.TarOptions{})
	_ = checked.CloseWithError(errUnpacked) // neither
	if cerr := g.Wait(); cerr != nil && !errors.Is(cerr, errUnpacked) {
		return cerr
	}
	if err != nil {
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

// errUnpacked ends the check of a layer whose unpacking has ended.
var errUnpacked = errors.New("unpacking has ended")

// maxPath bounds a name in a layer, in bytes (PATH_MAX of Linux).
const maxPath = 4096

// check copies a layer's tar archive to w, entry by entry, each only once it is within what is left. A header can promise any size, and a sparse file is of that
// size, however short the archive: so what unpacks sees no header but those written here.
func (l *Limits) check(ctx context.Context, w io.Writer, r *tar.Reader) error {
	out := tar.NewWriter(w)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out.Close()
		}
		if err != nil {
			return err
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue // a comment
		}
		if len(h.Name) > maxPath || len(h.Linkname) > maxPath {
			return fmt.Errorf("a name in it has more than %d bytes", maxPath)
		}
		l.Files -= 1 + int64(strings.Count(h.Name, "/"))
		if l.Files < 0 {
			return errors.New("the image has more files than are allowed; see --max-files")
		}
		if h.Size > l.Bytes {
			return errors.New("the image unpacks to more bytes than are allowed; see --max-unpacked")
		}
		l.Bytes -= h.Size
		if h.Typeflag == tar.TypeGNUSparse {
			h.Typeflag = tar.TypeReg // it is read as a whole
		}
		h.Format = tar.FormatPAX
		if err := out.WriteHeader(h); err != nil {
			return fmt.Errorf("%.64q: %w", h.Name, err)
		}
		if _, err := io.Copy(out, decompress.Interruptible(ctx, r)); err != nil {
			return err
		}
	}
}

// boundedReader fails behind so many bytes.
type boundedReader struct {
	r    io.Reader
	left int64
}

func (b *boundedReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, errors.New("the layer unpacks to more bytes than are allowed; see --max-unpacked")
	}
	return n, err
}

type countingReader struct {
	r     io.Reader
	count func(int)
}

func (c *countingReader) Read(p []byte) (int, error) {
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
		d, err := decompress.Stream(b)
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
		b, err := root.readFile(name, maxUsers)
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
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
