package backup

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/minio/minio-go/v7/pkg/credentials"
	"golang.org/x/sys/unix"

	"drafter/internal/private"
	"drafter/s3"
)

// credentialsOf finds the keys of a place.
func credentialsOf(p s3.Place) (*credentials.Credentials, error) {
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
		if provider, err := container(); provider != nil || err != nil {
			return credentials.New(provider), err
		}
		return nil, errors.New("there are no credentials; name a file of them with --s3-credentials, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment")
	}
	return creds, nil
}

// Addresses from which containers get credentials over plain HTTP, besides loopback addresses:
// those of Amazon's ECS and EKS (see "Container credential provider" in its reference of SDKs and
// tools).
const ecsAddress = "169.254.170.2"

var containerAddresses = []string{ecsAddress, "169.254.170.23", "fd00:ec2::23"}

// container finds the provider of credentials that this container was given; nil if it was given
// none. Credentials are requested when they are needed, and again before they expire.
func container() (credentials.Provider, error) {
	client := &http.Client{Timeout: 10 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error {
		return errors.New("the provider of credentials redirects elsewhere")
	}}
	if os.Getenv("AWS_WEB_IDENTITY_TOKEN_FILE") != "" {
		return &credentials.IAM{Client: client}, nil // over TLS
	}
	if uri := os.Getenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"); uri != "" {
		if !strings.HasPrefix(uri, "/") {
			return nil, fmt.Errorf("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI %q does not begin with a slash", uri)
		}
		return &credentials.IAM{Client: client, Endpoint: "http://" + ecsAddress + uri}, nil
	}
	uri := os.Getenv("AWS_CONTAINER_CREDENTIALS_FULL_URI")
	if uri == "" {
		return nil, nil
	}
	u, err := url.Parse(uri)
	if err != nil {
		// The text is left out: it may hold a secret.
		return nil, errors.New("AWS_CONTAINER_CREDENTIALS_FULL_URI is no URI")
	}
	ip := net.ParseIP(u.Hostname())
	near := u.Hostname() == "localhost" || ip.IsLoopback() || slices.ContainsFunc(containerAddresses, func(a string) bool { return net.ParseIP(a).Equal(ip) })
	if u.Hostname() == "" || u.Scheme != "https" && (u.Scheme != "http" || !near) {
		return nil, fmt.Errorf("AWS_CONTAINER_CREDENTIALS_FULL_URI names %s://%s, which credentials are not asked of: it must be https, or a loopback address, or that of ECS or EKS (%s)", u.Scheme, u.Host, strings.Join(containerAddresses, ", "))
	}
	return &credentials.IAM{Client: client, Endpoint: uri}, nil
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

// checkOwner refuses a file of an untrusted user, a file that such a user could replace, and one
// for which anybody but the owner's private group has permissions: a program that it names runs as
// this user.
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
