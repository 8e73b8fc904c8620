package blueprint

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"drafter/internal/lockfile"
	"drafter/internal/logging"
	"drafter/internal/private"
)

// UnpackDebian downloads Debian packages with all their dependencies, and unpacks them into dir, a
// new directory. It does not run maintainer scripts. cache keeps the downloads. It needs root, apt
// and dpkg.
// log hears when another process has the cache; nil: slog.Default().
func UnpackDebian(ctx context.Context, dir, cache string, progress Progress, log *slog.Logger, names ...string) error {
	progress.report("Downloading packages", 0, 0)
	debs, err := fetchPackages(ctx, cache, log, names...)
	if err != nil {
		return fmt.Errorf("download packages: %w", err)
	}
	progress.report("Downloading packages", 1, 1)
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.MkdirAll(filepath.Join(dir, "usr", d), 0o755); err != nil {
			return err
		}
		// Debian's merged /usr: packages still have files below /bin and /lib.
		if err := os.Symlink("usr/"+d, filepath.Join(dir, d)); err != nil {
			return err
		}
	}
	return unpackPackages(ctx, dir, debs, func(done, total int64) { progress.report("Unpacking packages", done, total) })
}

// fetchPackages downloads the named packages with all their dependencies, as if nothing were
// installed, and returns the .deb files.
func fetchPackages(ctx context.Context, cache string, log *slog.Logger, names ...string) (_ []string, err error) {
	cache, err = filepath.Abs(cache) // apt takes relative paths to be its own
	if err != nil {
		return nil, err
	}
	archives := filepath.Join(cache, "archives")
	status := filepath.Join(cache, "status")
	lock, err := lockCache(ctx, cache, log)
	if err != nil {
		return nil, err
	}
	defer func() { err = noRoom(errors.Join(err, lock.Release()), cache, cacheRemedy) }()
	if err := os.MkdirAll(filepath.Join(archives, "partial"), 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(status, nil, 0o644); err != nil {
		return nil, err
	}
	apt := func(archives, action string) (string, error) {
		args := []string{
			"-q", "-y", "--no-install-recommends",
			"-o", "Dir::State::status=" + status,
			"-o", "Dir::Cache::archives=" + archives,
			"-o", "APT::Sandbox::User=root",
			action, "install",
		}
		out, err := runTool(ctx, "", "apt-get", append(args, names...)...)
		return string(out), aptHint(err)
	}
	// Find out which files the names stand for today, because the cache may hold older versions as
	// well. apt does not name files that it has, so it is asked with an empty cache.
	empty := filepath.Join(cache, "none")
	if err := os.MkdirAll(filepath.Join(empty, "partial"), 0o755); err != nil {
		return nil, err
	}
	uris, err := apt(empty, "--print-uris")
	if err != nil {
		return nil, err
	}
	if _, err := apt(archives, "--download-only"); err != nil {
		return nil, err
	}
	var debs []string
	for _, m := range uriLine.FindAllStringSubmatch(uris, -1) {
		debs = append(debs, filepath.Join(archives, m[1]))
	}
	if len(debs) == 0 {
		return nil, fmt.Errorf("apt-get named no files for %s", strings.Join(names, ", "))
	}
	slices.Sort(debs)
	return debs, nil
}

// lockCache makes the directory of a cache and waits until no other process uses it: apt fails
// where another apt works. Nobody changes or removes packages that are there, so unpacking needs no
// lock.
func lockCache(ctx context.Context, dir string, log *slog.Logger) (*lockfile.Lock, error) {
	if err := makeCache(dir); err != nil {
		return nil, err
	}
	for told := false; ; told = true {
		lock, err := lockfile.Try(filepath.Join(dir, "drafter.lock"))
		var held *lockfile.HeldError
		if !errors.As(err, &held) {
			return lock, err
		}
		if !told {
			logging.Or(log).Info("Waiting for another process to be done with the cache of packages", "cache", dir, "held", held.Holder)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for cache %s, %w: %w", dir, held, context.Cause(ctx))
		case <-time.After(lockPause):
		}
	}
}

// lockPause is the pause between two attempts to take a lock.
const lockPause = 100 * time.Millisecond

// cacheRemedy mends a cache whose file system is full.
const cacheRemedy = "name another --cache"

// makeCache makes the directory of a cache. It refuses one that another user may write to, because
// its files are not downloaded, nor verified, again.
func makeCache(dir string) error {
	if err := private.MkdirAll(dir); err != nil {
		return fmt.Errorf("--cache: %w", err)
	}
	if err := checkOwner(dir, os.Getenv("SUDO_UID")); err != nil {
		return fmt.Errorf("--cache %s: %w", dir, err)
	}
	return nil
}

// uriLine is a line of apt-get --print-uris: 'URI' FILE SIZE HASH.
var uriLine = regexp.MustCompile(`(?m)^'[^']+' (\S+\.deb) \d+`)

// fetchKernel downloads the kernel image that a kernel package stands for, without its
// dependencies, and returns the .deb file.
func fetchKernel(ctx context.Context, cache, name string, log *slog.Logger) (_ string, err error) {
	if cache, err = filepath.Abs(cache); err != nil {
		return "", err
	}
	lock, err := lockCache(ctx, cache, log)
	if err != nil {
		return "", err
	}
	defer func() { err = noRoom(errors.Join(err, lock.Release()), cache, cacheRemedy) }()
	dir := filepath.Join(cache, "kernel")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	out, err := runTool(ctx, "", "apt-cache", "depends", "--no-recommends", "--no-suggests", name)
	if err != nil {
		return "", aptHint(err)
	}
	if m := kernelDepends.FindStringSubmatch(string(out)); m != nil {
		name = m[1] // a package such as linux-image-cloud-amd64 only names the current image
	}
	// apt says nothing about a file that is in its directory already, so another directory is given
	out, err = runTool(ctx, os.TempDir(), "apt-get", "-q", "--print-uris", "download", name)
	if err != nil {
		return "", aptHint(err)
	}
	m := uriLine.FindStringSubmatch(string(out))
	if m == nil {
		return "", fmt.Errorf("apt-get names no file for %s", name)
	}
	deb := filepath.Join(dir, m[1])
	if _, err := os.Stat(deb); err == nil {
		return deb, nil
	}
	if _, err := runTool(ctx, dir, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name); err != nil {
		return "", aptHint(err)
	}
	return deb, nil
}

var kernelDepends = regexp.MustCompile(`(?m)^\s*Depends: (linux-image-\d\S*)`)

// aptHint adds what helps when apt has no lists of packages.
func aptHint(err error) error {
	if err == nil {
		return nil
	}
	if strings.Contains(err.Error(), "Unable to locate") || strings.Contains(err.Error(), "No packages found") || strings.Contains(err.Error(), "Unable to fetch") {
		return fmt.Errorf("%w; run 'apt-get update' first", err)
	}
	return err
}

// unpackPackages extracts packages over each other into dir.
func unpackPackages(ctx context.Context, dir string, debs []string, progress func(done, total int64)) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for i, deb := range debs {
		if _, err := runTool(ctx, "", "dpkg-deb", "--extract", deb, dir); err != nil {
			return noRoom(fmt.Errorf("unpack %s: %w", filepath.Base(deb), err), dir, tempRemedy)
		}
		if progress != nil {
			progress(int64(i+1), int64(len(debs)))
		}
	}
	return nil
}
