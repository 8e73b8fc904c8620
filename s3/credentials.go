package s3

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/minio/minio-go/v7/pkg/credentials"
	"golang.org/x/sys/unix"

	"drafter/internal/private"
)

// credentials finds the keys of a place.
func (p Place) credentials() (*credentials.Credentials, error) {
	if p.AccessKey != "" {
		return credentials.NewStaticV4(p.AccessKey, p.SecretKey, ""), nil
	}
	if p.Credentials != "" {
		if err := checkOwner(p.Credentials, 0o077); err != nil {
			return nil, fmt.Errorf("credentials file: %w", err)
		}
		creds := credentials.NewFileAWSCredentials(p.Credentials, "")
		if v, err := creds.GetWithContext(nil); err != nil {
			return nil, fmt.Errorf("credentials file %s: %w", p.Credentials, err)
		} else if v.AccessKeyID == "" {
			return nil, fmt.Errorf("credentials file %s has no aws_access_key_id and aws_secret_access_key, nor a credential_process", p.Credentials)
		}
		return creds, nil
	}
	environment := []credentials.Provider{&credentials.EnvAWS{}, &credentials.EnvMinio{}}
	creds := credentials.NewChainCredentials(environment)
	if v, err := creds.GetWithContext(nil); err == nil && v.AccessKeyID != "" {
		return creds, nil
	}
	for _, file := range defaultFiles() {
		if err := checkOwner(file, 0o022); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("credentials: %w", err)
		}
	}
	creds = credentials.NewChainCredentials(append(environment, &credentials.FileAWSCredentials{}, &credentials.FileMinioClient{}))
	if v, err := creds.GetWithContext(nil); err != nil || v.AccessKeyID == "" {
		return nil, errors.New("there are no credentials; name a file of them with --s3-credentials, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment")
	}
	return creds, nil
}

// defaultFiles are those that the AWS and MinIO command lines use.
func defaultFiles() []string {
	var files []string
	home, err := os.UserHomeDir()
	for _, f := range []struct{ variable, name string }{{"AWS_CONFIG_FILE", ".aws/config"}, {"AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials"}, {"", ".mc/config.json"}} {
		if path := os.Getenv(f.variable); path != "" {
			files = append(files, path)
		} else if err == nil {
			files = append(files, filepath.Join(home, f.name))
		}
	}
	return files
}

// checkOwner refuses a file that a user made who is not trusted, who could put another one in its
// place, or that others than its owner's private group have some permissions for: a program that it
// names runs as this user.
func checkOwner(path string, others uint32) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	if !private.Trusted(st.Uid) {
		return fmt.Errorf("%s belongs to another user (%d); name one of your own", path, st.Uid)
	}
	if st.Gid == st.Uid {
		others &^= 0o070
	}
	if st.Mode&others != 0 {
		return fmt.Errorf("%s is open to other users (mode %o); 'chmod 600' it", path, st.Mode&0o777)
	}
	return private.CheckPlace(path, 0)
}
