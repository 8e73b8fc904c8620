package blueprint

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"compress/bzip2"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/klauspost/compress/gzip"
	archive "github.com/moby/go-archive"
	"github.com/moby/go-archive/chrootarchive"
	"github.com/moby/sys/user"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/ulikunitz/xz"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"drafter/internal/decompress"
	"drafter/internal/guest"
	"drafter/internal/logging"
	"drafter/internal/private"
	"drafter/internal/scratch"
)

// Limits bound the unpacked size of an image: some KB from a stranger can unpack to any size.
type Limits struct {
	Bytes int64 // of all files of all layers; 0: 64 GiB
	Files int64 // with the directories that their names need; 0: 4 million
}

const defaultMaxBytes = 64 << 30

// BuildOCI makes an ext4 image that holds the OCI runtime bundle of an image. [UnpackOCI] and
// [PackOCI] are its halves.
func BuildOCI(ctx context.Context, image v1.Image, limits Limits, c Ext4Config) (err error) {
	if err := checkCommand(image); err != nil {
		return err
	}
	work, err := scratch.New(os.TempDir(), "drafter-bundle-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, work.Close()) }()
	if err := makeBundle(ctx, image, work.Path("bundle"), limits, c.Progress, c.Logger); err != nil {
		return noRoom(err, os.TempDir(), tempRemedy)
	}
	c.Source = work.Path("bundle")
	return PackOCI(ctx, c)
}

// defaultBundleFree is the room a packed bundle has for the container's own data.
const defaultBundleFree = 512 << 20

// PackOCI makes an ext4 image of the bundle in c.Source. It checks first that c.Source is a bundle,
// and that nobody can change it meanwhile: a link in the place of a file would bring any file of
// the host into the image.
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

// checkOwner refuses what is not a directory, a directory that does not belong to root, this user
// or the user also, and one that everybody can write to.
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

// readRegular reads a regular file of at most limit bytes, and follows no link.
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

// UnpackOCI makes an OCI runtime bundle of an image: dir/rootfs and dir/config.json. It needs root.
// dir must be empty or not exist. Other users cannot enter it, because it holds setuid programs and
// devices of a stranger. It appears once it is complete; after a failure nothing is left.
// log hears what of the image cannot be had; nil: slog.Default().
func UnpackOCI(ctx context.Context, image v1.Image, dir string, limits Limits, progress Progress, log *slog.Logger) (err error) {
	dir = filepath.Clean(dir)
	if entries, err := os.ReadDir(dir); err == nil && len(entries) > 0 {
		return fmt.Errorf("unpack image: directory %s is not empty; remove it or name another", dir)
	}
	if err := checkCommand(image); err != nil {
		return err
	}
	if err := private.MkdirAll(filepath.Dir(dir)); err != nil {
		return fmt.Errorf("unpack image: %w", err)
	}
	work, err := scratch.New(filepath.Dir(dir), "."+filepath.Base(dir)+".unpacking-")
	if err != nil {
		return fmt.Errorf("unpack image: %w", err)
	}
	defer func() { err = errors.Join(err, work.Close()) }()
	if err := makeBundle(ctx, image, work.Path("bundle"), limits, progress, log); err != nil {
		return noRoom(err, filepath.Dir(dir), outputRemedy)
	}
	if err := work.Move("bundle", filepath.Base(dir)); err != nil {
		return fmt.Errorf("unpack image: %w", err)
	}
	return nil
}

// makeBundle makes the bundle in dir, a new directory inside one that others cannot enter.
func makeBundle(ctx context.Context, image v1.Image, dir string, limits Limits, progress Progress, log *slog.Logger) error {
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
	left := Limits{cmp.Or(limits.Bytes, defaultMaxBytes), cmp.Or(limits.Files, 4_000_000)}
	for i, l := range layers {
		count := func(n int) { done += int64(n); progress.report("Pulling image", min(done, total-1), total) }
		if err := unpackLayer(ctx, l, config.RootFS.DiffIDs[i], rootfs, &left, count); err != nil {
			return fmt.Errorf("unpack layer %d of %d: %w", i+1, len(layers), err)
		}
	}
	progress.report("Pulling image", total, total)
	spec, err := runtimeSpec(config, rootfs, log)
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

// unpackLayer applies a layer to rootfs: whiteouts, hard links, owners, modes, extended attributes,
// device nodes. It runs in a chroot, so that no symbolic link leads out of it, and checks the
// layer's content against its id in the image's config.
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
		err := left.checkLayer(ctx, w, tar.NewReader(tee))
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

// checkLayer copies a layer's tar archive to w, entry by entry, each once it is within the limits.
// A header can promise any size, and a sparse file has that size, however short the archive is. So
// the program that unpacks sees no header but those written here.
func (l *Limits) checkLayer(ctx context.Context, w io.Writer, r *tar.Reader) error {
	out := tar.NewWriter(w)
	made := layerNames{dirs: map[string]bool{}, implied: map[string]bool{}}
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out.Close()
		}
		if err != nil {
			return err
		}
		switch h.Typeflag {
		case tar.TypeXGlobalHeader, 'V':
			continue // a comment; a volume's name (GNU)
		case tar.TypeGNUSparse, tar.TypeCont:
			h.Typeflag = tar.TypeReg // it is read as a whole
		case 'D': // a directory, with the names in it as content (GNU, incremental)
			h.Typeflag, h.Size = tar.TypeDir, 0
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
		dirs, needed, err := made.whiteoutBelow(h)
		if err != nil {
			return err
		}
		for _, dir := range dirs {
			h := &tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755, Format: tar.FormatPAX}
			if err := out.WriteHeader(h); err != nil {
				return fmt.Errorf("%.64q: %w", dir, err)
			}
		}
		if !needed {
			continue
		}
		h.Format = tar.FormatPAX
		if err := out.WriteHeader(h); err != nil {
			return fmt.Errorf("%.64q: %w", h.Name, err)
		}
		if h.Typeflag != tar.TypeReg {
			continue // the content of other entries has no meaning
		}
		if _, err := io.Copy(out, decompress.Interruptible(ctx, r)); err != nil {
			return err
		}
	}
}

// layerNames are the names that a layer has brought so far, with a slash in front.
type layerNames struct {
	dirs    map[string]bool // whether each is a directory
	implied map[string]bool // directories that names need, but that have no entry of their own
}

func (l *layerNames) add(name string, isDir bool) {
	l.dirs[name] = isDir
	delete(l.implied, name)
	for dir := path.Dir(name); dir != "/"; dir = path.Dir(dir) {
		if _, again := l.dirs[dir]; again {
			return
		}
		l.dirs[dir], l.implied[dir] = true, true
	}
}

// whiteoutBelow makes a whiteout remove what is in the layers below, and nothing that its own layer
// has brought before it (layer.md of the OCI image specification); the unpacking program would
// remove both. It tells whether the entry is needed, and which directories need an entry before it,
// so that they count as the layer's own.
func (l *layerNames) whiteoutBelow(h *tar.Header) (dirs []string, needed bool, err error) {
	name := path.Clean("/" + h.Name)
	dir, base := path.Split(name)
	removed, isWhiteout := strings.CutPrefix(base, archive.WhiteoutPrefix)
	isOpaque := base == archive.WhiteoutOpaqueDir
	if !isOpaque && (!isWhiteout || strings.HasPrefix(base, archive.WhiteoutMetaPrefix)) {
		l.add(name, h.Typeflag == tar.TypeDir)
		return nil, true, nil
	}
	gone := path.Clean(dir)
	if !isOpaque {
		if removed == "" || removed == "." || removed == ".." {
			return nil, false, fmt.Errorf("%.64q removes no file", h.Name)
		}
		gone = path.Join(dir, removed)
		isDir, again := l.dirs[gone]
		if !again || !isDir {
			return nil, !again, nil
		}
		h.Name = path.Join(gone, archive.WhiteoutOpaqueDir)[1:]
	}
	for dir := range l.implied {
		if dir == gone && !isOpaque || strings.HasPrefix(dir, strings.TrimSuffix(gone, "/")+"/") {
			dirs = append(dirs, dir[1:])
			delete(l.implied, dir)
		}
	}
	slices.Sort(dirs)
	return dirs, true, nil
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

// compressions are recognised by their first bytes, because media types are not always given.
var compressions = map[string]string{"gzip": "\x1f\x8b", "zstd": "\x28\xb5\x2f\xfd", "xz": "\xfd7zXZ\x00", "bzip2": "BZh"}

const magicLen = 6

// compression returns the compression of data that begins with magic, or "".
func compression(magic []byte) string {
	// A frame to be skipped, with which pzstd and others begin (RFC 8878, 3.1.2).
	if len(magic) >= 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:4], []byte("\x2a\x4d\x18")) {
		return "zstd"
	}
	for name, m := range compressions {
		if bytes.HasPrefix(magic, []byte(m)) {
			return name
		}
	}
	return ""
}

// decompressLayer decompresses what is compressed.
func decompressLayer(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 1<<20)
	magic, err := b.Peek(magicLen)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch compression(magic) {
	case "gzip":
		return gzip.NewReader(b)
	case "zstd":
		d, err := decompress.Stream(b)
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	case "xz":
		d, err := xz.NewReader(b)
		return io.NopCloser(d), err
	case "bzip2":
		return io.NopCloser(bzip2.NewReader(b)), nil
	}
	return io.NopCloser(b), nil
}

// defaultCapabilities are what container engines grant a container by default.
var defaultCapabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD", "CAP_NET_BIND_SERVICE",
	"CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// pingCapabilities let any user ping with any program. Programs that know
// net.ipv4.ping_group_range, which our OS sets as Docker does, need none. But busybox opens a raw
// socket. What its user sends is guarded outside the VM.
var pingCapabilities = []string{"CAP_NET_RAW"}

// bundleVersion is the version of the runtime specification of our bundles. It is an old one on
// purpose: runtimes refuse newer versions than they know, and we need nothing of those.
const bundleVersion = "1.0.2"

// runtimeSpec converts an image's config as the OCI image specification says (conversion.md). The
// container shares the VM's network: the VM is the boundary. log hears what cannot be converted.
func runtimeSpec(config *v1.ConfigFile, rootfs string, log *slog.Logger) (*specs.Spec, error) {
	c, log := config.Config, logging.Or(log)
	args, err := command(c)
	if err != nil {
		return nil, err
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
	env := environment(c.Env, home)
	if systemd, err := startsSystemd(root, args, env); err != nil {
		return nil, err
	} else if systemd != "" {
		return nil, fmt.Errorf("the image starts systemd (%s), which is for a machine of its own and does not run in a container; name the service to run with --command", systemd)
	}
	for volume := range c.Volumes {
		err := root.mkdirAll(volume)
		if errors.Is(err, unix.ENOTDIR) {
			log.Warn("A volume of the image is a file, and stays one", "volume", volume)
		} else if err != nil {
			return nil, fmt.Errorf("create volume %s: %w", volume, err)
		}
	}
	dir := path.Join("/", c.WorkingDir)
	if err := root.mkdirAll(dir); err != nil {
		return nil, fmt.Errorf("create working directory %s: %w", dir, err)
	}
	annotations := map[string]string{}
	for k, v := range c.Labels {
		if !strings.HasPrefix(k, runtimeAnnotations) {
			annotations[k] = v
		}
	}
	if _, err := guest.ParseSignal(c.StopSignal); err != nil {
		log.Warn("The image's stop signal is not known; it is stopped with SIGTERM", "error", err)
	} else if c.StopSignal != "" {
		annotations[guest.StopSignalAnnotation] = c.StopSignal
	}
	var ports []string
	for p := range c.ExposedPorts {
		if _, err := guest.NewReadiness(p); err != nil {
			log.Warn("The image exposes a port that is none", "error", err)
			continue
		}
		ports = append(ports, p)
	}
	if len(ports) > 0 {
		slices.Sort(ports)
		annotations[guest.ExposedPortsAnnotation] = strings.Join(ports, ",")
	}
	if h := c.Healthcheck; h != nil {
		check, err := guest.NewHealthCheck(h.Test, c.Shell, h.Timeout)
		if err != nil {
			log.Warn("The image's service is not checked before it is packaged", "error", err)
		} else if check != nil {
			text, err := json.Marshal(check)
			if err != nil {
				return nil, fmt.Errorf("health check: %w", err)
			}
			annotations[guest.HealthCheckAnnotation] = string(text)
		}
	}
	capabilities := &specs.LinuxCapabilities{Bounding: defaultCapabilities, Effective: defaultCapabilities, Permitted: defaultCapabilities}
	if who.UID != 0 {
		capabilities.Inheritable, capabilities.Ambient = pingCapabilities, pingCapabilities
	}
	return &specs.Spec{
		Version:  bundleVersion,
		Hostname: hostname,
		Root:     &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			User:            who,
			Args:            args,
			Env:             env,
			Cwd:             dir,
			Capabilities:    capabilities,
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
	{Destination: "/etc/hosts", Type: "bind", Source: "/etc/hosts", Options: []string{"rbind", "rw"}},
	{Destination: "/etc/hostname", Type: "bind", Source: "/etc/hostname", Options: []string{"rbind", "rw"}},
}

// hostname is the name of our OS (see buildRoot) and of the container in it.
const hostname = "drafter"

// runtimeAnnotations is the prefix of annotations that crun acts on. Labels of an image with it are
// left out.
const runtimeAnnotations = "run.oci."

// command is what a container runs: the entrypoint, followed by the command. An entrypoint of one
// empty string is none, as in Docker (ENTRYPOINT [""] removes that of the image below).
func command(c v1.Config) ([]string, error) {
	args := slices.Clone(c.Entrypoint)
	if len(args) == 1 && args[0] == "" {
		args = nil
	}
	args = append(args, c.Cmd...)
	if len(args) == 0 || args[0] == "" {
		return nil, errors.New("the image has neither an entrypoint nor a command; name one with --command, such as --command '[\"/bin/server\",\"--port\",\"80\"]'")
	}
	return args, nil
}

// startsSystemd returns the argument that is systemd: the program itself, or the one that an
// entrypoint of the image's runs.
func startsSystemd(root *rootDir, args, env []string) (string, error) {
	for n, arg := range args {
		paths := []string{arg}
		if n == 0 && !strings.Contains(arg, "/") {
			paths = nil
			for _, e := range env {
				if dirs, ok := strings.CutPrefix(e, "PATH="); ok {
					for _, dir := range strings.Split(dirs, ":") {
						paths = append(paths, path.Join("/", dir, arg))
					}
				}
			}
		}
		for _, p := range paths {
			if !path.IsAbs(p) {
				continue // an option, or of the working directory
			}
			systemd, there, err := root.leadsTo(p, "/systemd")
			if err != nil {
				return "", err
			}
			if systemd {
				return arg, nil
			}
			if there {
				break // the first one on PATH counts
			}
		}
	}
	return "", nil
}

// checkCommand refuses an image that cannot be started, before anything is fetched or made.
func checkCommand(image v1.Image) error {
	config, err := image.ConfigFile()
	if err != nil {
		return fmt.Errorf("read image config: %w", err)
	}
	_, err = command(config.Config)
	return err
}

// WithCommand returns the image with another command, as in a Dockerfile: a JSON array of program
// and arguments, or a line for the image's shell. It replaces entrypoint and command.
func WithCommand(image v1.Image, command string) (v1.Image, error) {
	config, err := image.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("read image config: %w", err)
	}
	config = config.DeepCopy()
	shell := config.Config.Shell
	if len(shell) == 0 {
		shell = []string{"/bin/sh", "-c"}
	}
	args := append(slices.Clone(shell), command)
	if strings.HasPrefix(strings.TrimSpace(command), "[") {
		args = nil
		if err := json.Unmarshal([]byte(command), &args); err != nil {
			return nil, fmt.Errorf("%s is no JSON array of strings: %w", command, err)
		}
	}
	config.Config.Entrypoint, config.Config.Cmd = args, nil
	return mutate.ConfigFile(image, config)
}

// environment is an image's environment as Docker has it. Of several values the last counts. A name
// without "=" removes the variable, even one that containers have by default.
func environment(image []string, home string) []string {
	var env []string
	for _, e := range append([]string{"PATH=" + guest.Path, "HOSTNAME=" + hostname, "HOME=" + home}, image...) {
		name, _, isSet := strings.Cut(e, "=")
		i := slices.IndexFunc(env, func(have string) bool { return strings.HasPrefix(have, name+"=") })
		switch {
		case name == "":
		case isSet && i < 0:
			env = append(env, e)
		case isSet:
			env[i] = e
		case i >= 0:
			env = slices.Delete(env, i, i+1)
		}
	}
	return env
}

// maxUsers bounds what is read of an image's passwd and group files, in bytes.
const maxUsers = 16 << 20

// lookUpUser resolves an image's user ("name", "uid", "name:group", "uid:gid") with the image's own
// passwd and group files.
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
