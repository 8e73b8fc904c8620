// Package s3 names places in an object storage that speaks the S3 protocol, and the errors of such
// places.
package s3

import (
	"errors"
	"fmt"
	"strings"

	"github.com/minio/minio-go/v7/pkg/s3utils"
)

// Place is where an instance is backed up. Without keys and a file, the credentials are those of
// the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, or MINIO_…), or
// those in the files of the AWS and MinIO command lines.
type Place struct {
	Endpoint  string // HOST or HOST:PORT
	Secure    bool   // whether to use TLS
	Bucket    string // must exist
	Prefix    string // of the names of all objects
	AccessKey string
	SecretKey string
	// file like that of the AWS command line, with keys or a credential_process, which runs as this
	// user; see credentials.go
	Credentials string
	Concurrency int // uploads at once, up to 1000; 0: 4. Each takes some 8 MiB
	// most bytes of all devices of a backup together; 0: 128 times this host's memory
	MaxSize int64
}

// String names the place without its keys.
func (p Place) String() string {
	name := "s3://" + p.Bucket
	if p.Prefix != "" {
		name += "/" + p.Prefix
	}
	return name
}

// Check refuses a place with invalid fields, by their names.
func (p Place) Check() error {
	switch {
	case p.Bucket == "":
		return errors.New("s3bucket is missing; name a bucket that exists")
	case s3utils.CheckValidBucketName(p.Bucket) != nil: // otherwise the storage would be waited for
		return fmt.Errorf("s3bucket %q cannot be the name of a bucket: %w", p.Bucket, s3utils.CheckValidBucketName(p.Bucket))
	case p.Endpoint == "":
		return errors.New("s3endpoint is missing; name the storage's HOST:PORT, such as s3.amazonaws.com")
	case strings.Contains(p.Endpoint, "/"):
		return fmt.Errorf("s3endpoint %q must be HOST or HOST:PORT; say with s3secure whether it speaks TLS", p.Endpoint)
	case (p.AccessKey == "") != (p.SecretKey == ""):
		return errors.New("s3accesskey and s3secretkey belong together; give both, or none to use --s3-credentials or those of the environment")
	case p.Concurrency < 0 || p.Concurrency > 1000:
		return fmt.Errorf("s3concurrency %d is not in 0…1000", p.Concurrency)
	case strings.HasPrefix(p.Prefix, "/") || strings.HasSuffix(p.Prefix, "/"):
		return fmt.Errorf("s3prefix %q must not begin or end with a slash", p.Prefix)
	}
	return nil
}

// ErrAway says that a storage does not answer, or answers that it cannot serve now. It may come
// back.
var ErrAway = errors.New("the storage is away")

// ErrNone says that nothing is kept at a place yet.
var ErrNone = errors.New("nothing is kept there")

// ErrUnfit says that a storage lacks an ability that backups need, whatever is tried.
var ErrUnfit = errors.New("the storage is not fit for backups")

// ErrSuperseded says that somebody else has written to the place since. This writer's backup is no
// longer the latest.
var ErrSuperseded = errors.New("another instance has been written there meanwhile; give each instance a place of its own (s3prefix)")
