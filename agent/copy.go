package agent

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/moby/go-archive"
	"golang.org/x/sys/unix"
)

// File names a file in a guest.
type File struct {
	Path   string // absolute
	System bool   // in the guest's system, even if the guest has a container for its workload
}

// FileInfo describes a file in a guest.
type FileInfo struct {
	Mode       fs.FileMode
	Size       int64
	Modified   time.Time
	LinkTarget string // of a symbolic link that was not followed
}

// Stat describes a file, or what the symbolic link leads to that it is. The error is
// [fs.ErrNotExist] if there is none.
func (c *Client) Stat(ctx context.Context, f File) (*FileInfo, error) { return c.stat(ctx, f, false) }

// Lstat describes a file. It does not follow a symbolic link.
func (c *Client) Lstat(ctx context.Context, f File) (*FileInfo, error) { return c.stat(ctx, f, true) }

func (c *Client) stat(ctx context.Context, f File, noFollow bool) (*FileInfo, error) {
	r, err := c.workload.Stat(ctx, &StatRequest{Place: place(f.System), Path: f.Path, NoFollow: noFollow})
	if err != nil {
		return nil, c.explain(ctx, "stat", missing(err))
	}
	if !r.GetExists() {
		return nil, fmt.Errorf("agent stat: %w", &fs.PathError{Op: "stat", Path: f.Path, Err: fs.ErrNotExist})
	}
	// As a tar header has it, the only conversion of modes that the standard library exports.
	kind := map[uint32]byte{unix.S_IFDIR: tar.TypeDir, unix.S_IFLNK: tar.TypeSymlink, unix.S_IFCHR: tar.TypeChar, unix.S_IFBLK: tar.TypeBlock, unix.S_IFIFO: tar.TypeFifo}[r.GetMode()&unix.S_IFMT]
	header := tar.Header{Typeflag: kind, Mode: int64(r.GetMode())}
	return &FileInfo{Mode: header.FileInfo().Mode(), Size: r.GetSize(), Modified: time.Unix(0, r.GetModifiedUnixNano()), LinkTarget: r.GetLinkTarget()}, nil
}

// CopyOut returns a file, or a directory and all below it, as a tar archive, whose names begin with
// the last element of the path. A symbolic link is not followed unless the path ends with a slash.
// Sockets are left out, and what procfs and sysfs show. Closing the archive ends the copy.
func (c *Client) CopyOut(ctx context.Context, f File) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	s, err := c.session(ctx, "copy out", &RunRequest{Message: &RunRequest_CopyOut{CopyOut: &Files{Place: place(f.System), Path: f.Path}}})
	if err != nil {
		cancel()
		return nil, err
	}
	return &copied{s, cancel}, nil
}

type copied struct {
	*Session
	cancel context.CancelFunc
}

func (c *copied) Read(p []byte) (int, error) { return c.Stdout.Read(p) }

func (c *copied) Close() error {
	c.cancel()
	<-c.ended
	return nil
}

// CopyIn unpacks a tar archive in a directory. Files that are there are replaced, but directories
// only by directories. Modes, owners, times, links and extended attributes are those of the archive.
func (c *Client) CopyIn(ctx context.Context, dir File, r io.Reader) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := c.session(ctx, "copy in", &RunRequest{Message: &RunRequest_CopyIn{CopyIn: &Files{Place: place(dir.System), Path: dir.Path}}})
	if err != nil {
		return err
	}
	_, err = io.Copy(s.Stdin, r)
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("agent copy in: read archive: %w", err)
	}
	err = s.Stdin.Close()
	if _, werr := s.Wait(); werr != nil {
		return werr
	}
	return err
}

// inRoot calls do in a goroutine of its own, whose root directory is another one, so that no link
// leads out of it. It must not start goroutines that open files.
func inRoot(root string, do func() error) error {
	if root == "/" {
		return do()
	}
	done := make(chan error)
	go func() {
		// It is never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Chroot(root)
		}
		if err == nil {
			err = unix.Chdir("/")
		}
		if err != nil {
			done <- fmt.Errorf("enter %s: %w", root, err)
			return
		}
		done <- do()
	}()
	return <-done
}

// in calls do in the root directory of a place.
func in(c Container, do func() error) error {
	root, err := c.Root()
	if err != nil {
		return err
	}
	return inRoot(root, do)
}

func absolute(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%q is no absolute path", path)
	}
	return nil
}

// Stat implements [WorkloadService].
func (s *Server) Stat(_ context.Context, r *StatRequest) (*StatResponse, error) {
	if err := absolute(r.GetPath()); err != nil {
		return nil, err
	}
	response := &StatResponse{}
	return response, in(s.where(r.GetPlace()), func() error {
		var st unix.Stat_t
		stat := unix.Stat
		if r.GetNoFollow() {
			stat = unix.Lstat
		}
		if err := stat(r.GetPath(), &st); errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			return nil
		} else if err != nil {
			return &fs.PathError{Op: "stat", Path: r.GetPath(), Err: err}
		}
		response.Exists, response.Mode, response.Size, response.ModifiedUnixNano = true, st.Mode, st.Size, st.Mtim.Nano()
		if st.Mode&unix.S_IFMT == unix.S_IFLNK {
			var err error
			response.LinkTarget, err = os.Readlink(r.GetPath())
			return err
		}
		return nil
	})
}

func (g *served) copyIn(c Container, dir string) error {
	if err := absolute(dir); err != nil {
		return err
	}
	options, closeProc, err := archive.WithProcSelfFD(&archive.TarOptions{NoOverwriteDirNonDir: true, BestEffortXattrs: true})
	if err != nil {
		return err
	}
	defer closeProc()
	return in(c, func() error {
		if info, err := os.Stat(dir); err != nil {
			return err
		} else if !info.IsDir() {
			return fmt.Errorf("%s is no directory", dir)
		}
		if err := g.started(); err != nil {
			return err
		}
		if err := archive.Unpack(g.stdin, dir, options); err != nil {
			return fmt.Errorf("unpack in %s: %w", dir, err)
		}
		_, err := io.Copy(io.Discard, g.stdin) // what follows the end of the archive
		return err
	})
}

func (g *served) copyOut(c Container, path string) error {
	if err := absolute(path); err != nil {
		return err
	}
	return in(c, func() error {
		if _, err := os.Lstat(path); err != nil {
			return err
		}
		if err := g.started(); err != nil {
			return err
		}
		w := bufio.NewWriterSize(&outflow{g.stdout, g.sendStdout}, maxPiece)
		if err := pack(w, path); err != nil {
			return err
		}
		return w.Flush()
	})
}

// outflow sends what is written.
type outflow struct {
	allowance *allowance
	send      func([]byte) error
}

func (w *outflow) Write(p []byte) (int, error) {
	var sent int
	for len(p) > 0 {
		room, err := w.allowance.await()
		if err != nil {
			return sent, err
		}
		piece := p[:min(room, len(p))]
		w.allowance.spend(piece)
		if err := w.send(piece); err != nil {
			return sent, err
		}
		sent += len(piece)
		p = p[len(piece):]
	}
	return sent, nil
}

// pack writes an archive of a file, or of a directory with all below it. What vanishes meanwhile is
// left out.
func pack(w io.Writer, name string) error {
	top := filepath.Clean(name)
	base := filepath.Base(top)
	if base == "/" {
		base = "."
	}
	if strings.HasSuffix(name, "/") {
		name = top + "/." // else WalkDir does not follow a link
	}
	p := &packer{tar: tar.NewWriter(w), links: map[inode]string{}}
	err := filepath.WalkDir(name, func(path string, d fs.DirEntry, err error) error {
		below, rerr := filepath.Rel(top, path)
		if err = errors.Join(err, rerr); err == nil {
			err = p.add(path, filepath.Join(base, below), d)
		}
		if errors.Is(err, fs.ErrNotExist) && path != name {
			return nil
		}
		return err
	})
	if err != nil {
		return err
	}
	return p.tar.Close()
}

type packer struct {
	tar   *tar.Writer
	links map[inode]string // names of files that have several
}

type inode struct{ device, number uint64 }

func (p *packer) add(path, name string, d fs.DirEntry) error {
	info, err := d.Info()
	if err != nil {
		return err
	}
	var target string
	switch {
	case info.Mode()&fs.ModeSocket != 0:
		return nil
	case info.Mode()&fs.ModeSymlink != 0:
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	case info.Mode().IsRegular():
		return p.addFile(path, name)
	case d.IsDir():
		var fsys unix.Statfs_t
		if err := unix.Statfs(path, &fsys); err != nil {
			return &fs.PathError{Op: "statfs", Path: path, Err: err}
		}
		if fsys.Type == unix.PROC_SUPER_MAGIC || fsys.Type == unix.SYSFS_MAGIC {
			if _, err := p.header(path, name, info, ""); err != nil {
				return err
			}
			return fs.SkipDir
		}
	}
	_, err = p.header(path, name, info, target)
	return err
}

func (p *packer) addFile(path, name string) error {
	// It may have been replaced.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no file any more", path)
	}
	again, err := p.header(path, name, info, "")
	if again || err != nil {
		return err
	}
	// It may grow or shrink meanwhile.
	n, err := io.Copy(p.tar, io.LimitReader(f, info.Size()))
	if err == nil {
		_, err = io.CopyN(p.tar, zeros{}, info.Size()-n)
	}
	return err
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// header writes a file's header. A file that is there by another name is a link to that.
func (p *packer) header(path, name string, info fs.FileInfo, target string) (again bool, err error) {
	h, err := archive.FileInfoHeader(name, info, target)
	if err != nil {
		return false, fmt.Errorf("pack %s: %w", path, err)
	}
	if err := archive.ReadSecurityXattrToTarHeader(path, h); err != nil {
		return false, fmt.Errorf("pack %s: %w", path, err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && !info.IsDir() && st.Nlink > 1 {
		id := inode{st.Dev, st.Ino}
		if first, ok := p.links[id]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			again = true
		} else {
			p.links[id] = h.Name
		}
	}
	if err := p.tar.WriteHeader(h); err != nil {
		return false, fmt.Errorf("pack %s: %w", path, err)
	}
	return again, nil
}
