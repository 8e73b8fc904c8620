package cli

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"drafter/internal/artifact"
	"drafter/internal/block"
	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/peer"
	"drafter/s3"
	"drafter/vmm"
)

// storageFlags say how to reach an object storage that a flag names as s3://BUCKET/PREFIX.
type storageFlags struct {
	endpoint    string
	credentials string
	concurrency int
}

// originFlags say how to reach what --package names.
type originFlags struct {
	cache     string
	plainHTTP bool
}

func (o *originFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.cache, "package-cache", "out/packages", "Directory for the packages that --package docker://… names; each is pulled once")
	f.BoolVar(&o.plainHTTP, "plain-http", false, "Talk to the OCI registry without TLS; registries on loopback addresses need no flag")
}

func (s *storageFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.endpoint, "s3-endpoint", "", "URL of the object storage (default: $AWS_ENDPOINT_URL_S3, $AWS_ENDPOINT_URL, or https://s3.amazonaws.com)")
	f.StringVar(&s.credentials, "s3-credentials", "", "File with the credentials of the object storage, like that of the AWS command line: aws_access_key_id and aws_secret_access_key, or a credential_process (default: the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the files of the AWS and MinIO command lines, or what a container is given, as AWS_CONTAINER_CREDENTIALS_FULL_URI)")
	f.IntVar(&s.concurrency, "s3-concurrency", 0, "Number of concurrent uploads to the object storage, up to 1000, each of some 8 MiB of memory (default 4)")
}

const storageScheme = "s3://"

// place resolves s3://BUCKET/PREFIX.
func (s *storageFlags) place(flag, ref string) (p s3.Place, err error) {
	p.Concurrency, p.Credentials = s.concurrency, s.credentials
	p.Bucket, p.Prefix, _ = strings.Cut(strings.TrimPrefix(ref, storageScheme), "/")
	if !strings.HasPrefix(ref, storageScheme) || p.Bucket == "" {
		return p, &usageError{fmt.Errorf("--%s %q is not of the form s3://BUCKET/PREFIX", flag, ref)}
	}
	endpoint := s.endpoint
	for _, fallback := range []string{os.Getenv("AWS_ENDPOINT_URL_S3"), os.Getenv("AWS_ENDPOINT_URL"), "https://s3.amazonaws.com"} {
		if endpoint == "" {
			endpoint = fallback
		}
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		return p, &usageError{fmt.Errorf("the object storage's URL %q is not of the form https://HOST:PORT; see --s3-endpoint", endpoint)}
	}
	p.Endpoint, p.Secure = u.Host, u.Scheme == "https"
	if err := p.Check(); err != nil {
		return p, &usageError{fmt.Errorf("--%s %s: %w", flag, ref, err)}
	}
	return p, nil
}

// isReference tells whether --package names a package elsewhere.
func isReference(pkg string) bool { return strings.Contains(pkg, "://") }

const registryScheme = "docker://"

// openOrigin opens a package that is elsewhere.
type openOrigin func(context.Context) (*peer.Origin, error)

// resolveOrigin returns the directory for the files of a package elsewhere, and a function that
// opens that package; nil if the files are here.
func resolveOrigin(ctx context.Context, pkg, instance string, private bool, maxSize int64, storage *storageFlags, flags *originFlags) (dir string, open openOrigin, err error) {
	switch {
	case private && strings.HasPrefix(pkg, storageScheme):
		return "", nil, &usageError{fmt.Errorf("--package %s is kept with the instance, and a package that is mapped privately has none; leave --experimental-map-private out, and pass --instance", pkg)}
	case instance == "" && !private:
		return "", nil, &usageError{fmt.Errorf("--package %s needs --instance, for what the instance changes", pkg)}
	case strings.HasPrefix(pkg, storageScheme):
		return resolveBackup(pkg, instance, maxSize, storage)
	case strings.HasPrefix(pkg, registryScheme):
		return resolveArtifact(ctx, pkg, maxSize, flags)
	}
	return "", nil, &usageError{fmt.Errorf("--package %s is no directory, nor docker://NAME:TAG, nor s3://BUCKET/PREFIX", pkg)}
}

// resolveBackup keeps the content of a backup with the instance: the backup changes, but the
// instance needs the version that it was started from.
func resolveBackup(ref, instance string, maxSize int64, storage *storageFlags) (dir string, open openOrigin, err error) {
	place, err := storage.place("package", ref)
	if err != nil {
		return "", nil, err
	}
	place.MaxSize = maxSize
	dir = filepath.Join(instance, "base")
	if _, err := os.Stat(filepath.Join(instance, "state", vmm.PackageFile(vmm.State))); err == nil {
		return dir, nil, nil
	}
	return dir, func(ctx context.Context) (*peer.Origin, error) { return peer.OpenBackup(ctx, place) }, nil
}

// resolveArtifact keeps each package from an OCI registry in a directory of its own, by its digest.
// A package that is there is used when the registry cannot be reached.
func resolveArtifact(ctx context.Context, ref string, maxSize int64, flags *originFlags) (dir string, open openOrigin, err error) {
	noted := filepath.Join(flags.cache, "references", url.PathEscape(strings.TrimPrefix(ref, registryScheme)))
	pinned, err := artifact.Resolve(ctx, ref, flags.plainHTTP, slog.Default())
	if err != nil {
		known, rerr := private.ReadFile(noted, 128)
		dir = filepath.Join(flags.cache, string(known))
		if rerr != nil || !isWhole(dir) {
			return "", nil, err
		}
		slog.Warn("The registry cannot be reached; using what it had before", "package", dir, "error", err)
		return dir, nil, nil
	}
	_, digest, _ := strings.Cut(pinned, "@sha256:")
	if err := newfile.Write(noted, func(f *os.File) error { _, err := f.WriteString(digest); return err }); err != nil {
		return "", nil, err
	}
	dir = filepath.Join(flags.cache, digest)
	if isWhole(dir) {
		return dir, nil, nil
	}
	return dir, func(ctx context.Context) (*peer.Origin, error) {
		return peer.OpenArtifact(ctx, pinned, flags.plainHTTP, maxSize, slog.Default())
	}, nil
}

// isWhole tells whether all of a package is in dir.
func isWhole(dir string) bool {
	names, files, err := vmm.PackageFiles(dir)
	for _, name := range names {
		if err == nil && block.PartlyPulled(filepath.Join(dir, files[name])) {
			return false
		}
	}
	return err == nil
}

// syncFlags back an instance up to an object storage.
type syncFlags struct {
	to       string
	interval time.Duration
}

func (s *syncFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.to, "s3-sync", "", "Back all devices up to s3://BUCKET/PREFIX while the VM runs, and when it is suspended (instead of the fields s3… of --devices)")
	f.DurationVar(&s.interval, "s3-interval", 30*time.Second, "Pause between two backups to S3, such as 5m")
}

// apply makes devices be backed up.
func (s *syncFlags) apply(devices []peer.Device, storage *storageFlags) error {
	if s.to == "" {
		return nil
	}
	place, err := storage.place("s3-sync", s.to)
	if err != nil {
		return err
	}
	for i := range devices {
		d := &devices[i]
		if !d.MakeMigratable || d.Shared {
			continue
		}
		d.S3Sync, d.S3Endpoint, d.S3Secure, d.S3Bucket, d.S3Prefix, d.S3Concurrency = true, place.Endpoint, place.Secure, place.Bucket, place.Prefix, place.Concurrency
	}
	return nil
}
