// Package packager stores packages: in a .tar.zst file ([Create], [Extract]) and in an OCI registry
// ([Artifact]), with a signature if they have one ([Sign], [Verify]).
//
// The format of the file is a tar archive with one regular file per device, named like it,
// compressed as a sequence of zstd frames with checksums. Holes are stored as zeros, which compress
// to almost nothing, so that any tar reads the archive; extraction makes them holes again. The
// signature of a package, if it has one, is the first file, [signature.File].
package packager

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"

	"drafter/internal/block"
	"drafter/internal/decompress"
	"drafter/internal/fileset"
	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/internal/sparse"
	"drafter/signature"
	"drafter/vmm"
)

// Device is one device to store, or to extract.
type Device struct {
	Name string `json:"name"`
	Path string `json:"path"`
}

// Progress is called with the number of bytes of a device that are done, holes included. It may be
// nil.
type Progress func(step string, done, total int64)

func (p Progress) report(step string, done, total int64) {
	if p != nil {
		p(step, done, total)
	}
}

// checkDevices refuses device lists that cannot work.
func checkDevices(devices []Device) error {
	if len(devices) == 0 {
		return errors.New("no devices are given; add them to --devices")
	}
	names, paths := map[string]bool{}, map[string]bool{}
	for _, d := range devices {
		if err := vmm.CheckDeviceName(d.Name); err != nil {
			return err
		}
		if d.Name == signature.File {
			return fmt.Errorf("device %s has the name of a package's signature; choose another", d.Name)
		}
		if d.Path == "" {
			return fmt.Errorf("device %s has no path", d.Name)
		}
		if names[d.Name] || paths[filepath.Clean(d.Path)] {
			return fmt.Errorf("device %q or its path %q is listed twice", d.Name, d.Path)
		}
		names[d.Name], paths[filepath.Clean(d.Path)] = true, true
	}
	return nil
}

// bufferSize is the unit of copying, in bytes.
const bufferSize = 1 << 20

// Create writes devices, and the signature beside the config device if there is one, into an
// archive at path. Only its owner can read the archive. It gets its name once it is complete and
// durable.
func Create(ctx context.Context, path string, devices []Device, progress Progress) (err error) {
	if err := checkDevices(devices); err != nil {
		return err
	}
	var signed []byte
	if i := slices.IndexFunc(devices, func(d Device) bool { return d.Name == vmm.Config }); i >= 0 {
		if signed, err = signature.Beside(devices[i].Path); err != nil {
			return fmt.Errorf("create package: %w", err)
		}
	}
	f, err := newfile.Create(path)
	if err != nil {
		return fmt.Errorf("create package: %w", err)
	}
	if err := write(ctx, f, signed, devices, progress); err != nil {
		return errors.Join(fmt.Errorf("create package %s: %w", path, err), f.Discard())
	}
	if err := f.Publish(); err != nil {
		return fmt.Errorf("create package %s: %w", path, err)
	}
	return nil
}

func write(ctx context.Context, w io.Writer, signed []byte, devices []Device, progress Progress) error {
	z, err := newFrameWriter(bufio.NewWriterSize(w, 4<<20))
	if err != nil {
		return err
	}
	t := tar.NewWriter(z)
	if signed != nil {
		err := t.WriteHeader(header(signature.File, int64(len(signed))))
		if err == nil {
			_, err = t.Write(signed)
		}
		if err != nil {
			return errors.Join(fmt.Errorf("signature: %w", err), z.Close())
		}
	}
	for _, d := range devices {
		if err := add(ctx, t, d, progress); err != nil {
			return errors.Join(fmt.Errorf("device %s: %w", d.Name, err), z.Close())
		}
	}
	return errors.Join(t.Close(), z.Close())
}

func header(name string, size int64) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
}

func add(ctx context.Context, t *tar.Writer, d Device, progress Progress) error {
	f, err := private.Open(d.Path, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.IsDir() {
		return fmt.Errorf("%s is a directory", d.Path)
	}
	size, err := f.Seek(0, io.SeekEnd) // also for block devices
	if err != nil {
		return err
	}
	if err := t.WriteHeader(header(d.Name, size)); err != nil {
		return err
	}
	extents, err := sparse.Extents(f, size)
	if err != nil {
		return err
	}
	w := &counter{ctx: ctx, w: t, step: "Packing " + d.Name, total: size, progress: progress}
	buf, zeros := make([]byte, bufferSize), make([]byte, bufferSize)
	for _, e := range append(extents, sparse.Extent{Offset: size}) {
		if err := fill(w, e.Offset, zeros, func([]byte) error { return nil }); err != nil {
			return err
		}
		read := func(p []byte) error {
			n, err := f.ReadAt(p, w.done)
			if n == len(p) {
				return nil
			}
			return fmt.Errorf("read at %d: %w", w.done, errors.Join(err, io.ErrUnexpectedEOF))
		}
		if err := fill(w, e.Offset+e.Length, buf, read); err != nil {
			return err
		}
	}
	return nil
}

// fill writes to w up to offset end, in pieces of buf that prepare has filled.
func fill(w *counter, end int64, buf []byte, prepare func([]byte) error) error {
	for w.done < end {
		p := buf[:min(int64(len(buf)), end-w.done)]
		if err := prepare(p); err != nil {
			return err
		}
		if _, err := w.Write(p); err != nil {
			return err
		}
	}
	return nil
}

type counter struct {
	ctx         context.Context
	w           io.Writer
	step        string
	done, total int64
	progress    Progress
}

func (c *counter) Write(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	n, err := c.w.Write(p)
	c.done += int64(n)
	c.progress.report(c.step, c.done, c.total)
	return n, err
}

// maxDevice bounds the size that an entry may claim, in bytes.
const maxDevice = 1 << 46

// Extract takes devices out of the archive at path, and leaves other entries alone. Only their
// owner can read the files. They get their names, and replace what was there, only once the whole
// archive has proved intact; on an error nothing is changed. Several files of one directory are
// replaced together; those of several directories must not exist yet (see package fileset). The
// archive's signature, if it has one, is put beside the config device. A verifier, which may be
// nil, must accept the devices.
func Extract(ctx context.Context, path string, devices []Device, verifier *signature.Verifier, progress Progress) (err error) {
	if err := checkDevices(devices); err != nil {
		return err
	}
	f, err := os.Open(path) // perhaps a pipe
	if err != nil {
		return fmt.Errorf("open package: %w", err)
	}
	defer f.Close()
	x := &extraction{wanted: map[string]string{}, seen: map[string]bool{}, progress: progress, verifier: verifier, contents: map[string]*block.Contents{}}
	for _, d := range devices {
		x.wanted[d.Name] = d.Path
	}
	if x.outputs, err = newOutputs(x.wanted); err != nil {
		return fmt.Errorf("extract package %s: %w", path, err)
	}
	err = x.read(ctx, f)
	if err == nil {
		err = x.verify()
	}
	if err == nil {
		err = x.publish()
	} else {
		err = errors.Join(err, x.outputs.discard())
	}
	if err != nil {
		return fmt.Errorf("extract package %s: %w", path, err)
	}
	return nil
}

// outputs are the files of an extraction: a single one, or several that appear together, so that a
// package is never half an older one.
type outputs struct {
	set *fileset.Set // nil for one file

	path string
	one  *newfile.File // nil until it is created

	dir string // instead of both: a directory that nobody knows yet, for all devices
}

func newOutputs(paths map[string]string) (*outputs, error) {
	o := &outputs{}
	for _, path := range paths {
		if err := newfile.CheckReplaced(path); err != nil {
			return nil, err
		}
		o.path = path
	}
	if len(paths) == 1 {
		return o, nil
	}
	var err error
	o.set, err = fileset.New(paths, vmm.State)
	return o, err
}

// create makes the file of a device. Close it.
func (o *outputs) create(device string) (f *os.File, closed func() error, err error) {
	path := ""
	switch {
	case o.dir != "":
		path = filepath.Join(o.dir, vmm.PackageFile(device))
	case o.set != nil:
		path = o.set.Path(device)
	}
	if path != "" {
		if f, err = private.Create(path); err != nil {
			return nil, nil, err
		}
		return f, f.Close, nil
	}
	if o.one, err = newfile.Create(o.path); err != nil {
		return nil, nil, err
	}
	return o.one.File, func() error { return nil }, nil // once it is published
}

func (o *outputs) publish() error {
	if o.set != nil {
		return o.set.Publish()
	}
	return o.one.Publish()
}

func (o *outputs) discard() error {
	switch {
	case o.set != nil:
		return o.set.Discard()
	case o.one != nil:
		return o.one.Discard()
	}
	return nil
}

type extraction struct {
	wanted   map[string]string // device name to path
	seen     map[string]bool
	outputs  *outputs
	sizes    []int64 // of all devices, in bytes
	progress Progress

	verifier  *signature.Verifier
	contents  map[string]*block.Contents // of the extracted content, if there is a verifier
	signature []byte                     // nil if there is none
}

// verify refuses what was not signed.
func (x *extraction) verify() error {
	if x.verifier == nil {
		return nil
	}
	statement, err := x.verifier.Statement(x.signature, "")
	if err != nil {
		return err
	}
	for name, c := range x.contents {
		if err := statement.Check(signed(name, c)); err != nil {
			return err
		}
	}
	return nil
}

func (x *extraction) read(ctx context.Context, f io.Reader) error {
	z, err := newFrameReader(decompress.Interruptible(ctx, f))
	if err != nil {
		return err
	}
	defer z.Close()
	content := decompress.Interruptible(ctx, z)
	t := tar.NewReader(content)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return broken(ctx, err)
		}
		if err := x.entry(ctx, h, t); err != nil {
			return fmt.Errorf("device %.64q: %w", h.Name, err)
		}
	}
	// Padding follows the end of the tar archive. Reading it makes zstd check the frame.
	if _, err := io.Copy(io.Discard, content); err != nil {
		return broken(ctx, err)
	}
	for name := range x.wanted {
		if !x.seen[name] {
			return fmt.Errorf("it holds no device %q; take it out of --devices", name)
		}
	}
	return nil
}

// broken turns a reader's error into one for the user.
func broken(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return err
	case errors.Is(err, zstd.ErrMagicMismatch):
		return fmt.Errorf("it is no .tar.zst file: %w", err)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return fmt.Errorf("it is truncated; copy it again: %w", err)
	}
	return fmt.Errorf("it is damaged; copy it again: %w", err)
}

func (x *extraction) entry(ctx context.Context, h *tar.Header, r io.Reader) error {
	// A name is never used as a path. But one that no device can have means that this is no
	// package.
	name := strings.TrimPrefix(h.Name, "./")
	if err := vmm.CheckDeviceName(name); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg {
		return errors.New("it is no regular file")
	}
	if h.Size > maxDevice {
		return fmt.Errorf("it has %d bytes, more than any device", h.Size)
	}
	if x.verifier != nil { // content ids are made of whole blocks
		if err := block.CheckSizes(0, h.Size); err != nil {
			return err
		}
	}
	if x.seen[name] {
		return errors.New("it is there twice")
	}
	x.seen[name] = true
	if name == signature.File {
		if h.Size > signature.MaxSize {
			return fmt.Errorf("it is longer than %d bytes", signature.MaxSize)
		}
		b, err := io.ReadAll(r)
		x.signature = b
		return err
	}
	if _, ok := x.wanted[name]; !ok && x.outputs.dir == "" {
		return nil // the tar reader skips it
	}
	if x.outputs.dir != "" {
		x.sizes = append(x.sizes, h.Size)
		if err := block.CheckSizes(0, x.sizes...); err != nil {
			return err
		}
	}
	f, closed, err := x.outputs.create(name)
	if err != nil {
		return err
	}
	content := &contentWriter{}
	var out io.Writer = &holeWriter{f: f}
	if x.verifier != nil {
		out = io.MultiWriter(content, out)
	}
	w := &counter{ctx: ctx, w: out, step: "Extracting " + name, total: h.Size, progress: x.progress}
	if err = f.Truncate(h.Size); err == nil { // which refuses what the file system cannot hold
		err = copyBlocks(w, r)
	}
	if err == nil {
		err = block.SyncAndVerify(ctx, f)
	}
	err = errors.Join(err, closed())
	if x.verifier != nil {
		x.contents[name] = block.NewContents(h.Size, content.blocks)
	}
	var pathErr *os.PathError
	if err != nil && !errors.As(err, &pathErr) {
		err = broken(ctx, err)
	}
	return err
}

// contentWriter computes the content ids of what is written to it, in pieces of whole blocks.
type contentWriter struct{ blocks []block.ID }

func (w *contentWriter) Write(p []byte) (int, error) {
	w.blocks = append(w.blocks, block.HashBytes(p).Blocks...)
	return len(p), nil
}

// copyBlocks copies in whole buffers, so that zeros are found in whole blocks however r is cut into
// reads.
func copyBlocks(w io.Writer, r io.Reader) error {
	buf := make([]byte, bufferSize)
	for {
		n, err := 0, error(nil)
		for n < len(buf) && err == nil {
			var more int
			more, err = r.Read(buf[n:])
			n += more
		}
		if _, werr := w.Write(buf[:n]); werr != nil {
			return werr
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// publish gives the extracted files their names, and puts the signature beside them.
func (x *extraction) publish() error {
	if err := x.outputs.publish(); err != nil {
		return err
	}
	if config, ok := x.wanted[vmm.Config]; ok {
		return signature.Keep(x.signature, config, true)
	}
	return nil
}

// holeSize is the granularity in which zeros become holes, in bytes: the block size of common file
// systems.
const holeSize = 4096

var zeroBlock [holeSize]byte

// holeWriter writes sequentially to a new file, leaving holes for zeros. Each Write starts on a
// multiple of holeSize.
type holeWriter struct {
	f  *os.File
	at int64
}

func (w *holeWriter) Write(p []byte) (int, error) {
	for from := 0; from < len(p); {
		zero := isZeroBlock(p[from:])
		to := from
		for to < len(p) && isZeroBlock(p[to:]) == zero {
			to += min(holeSize, len(p)-to)
		}
		if !zero {
			if n, err := w.f.WriteAt(p[from:to], w.at); err != nil {
				return from + n, err
			}
		}
		w.at += int64(to - from)
		from = to
	}
	return len(p), nil
}

// isZeroBlock tells whether p starts with a block of zeros. A shorter rest is stored as it is.
func isZeroBlock(p []byte) bool { return len(p) >= holeSize && bytes.Equal(p[:holeSize], zeroBlock[:]) }
