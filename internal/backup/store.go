// Package backup keeps the devices of an instance in an object storage that speaks the S3 protocol:
// what changes is uploaded in packs of blocks, and a manifest, written last, says what belongs
// together. Whoever reads finds the devices as they were in one moment.
//
// Below the prefix of a [s3.Place] there are
//
//	manifest.json  what is there: one JSON object, replaced as a whole, only by the writer that knows the one before
//	index/UUID     of one device: where each of its blocks is; see index
//	packs/UUID     up to some 8 MiB of blocks, each compressed by itself, in any order
package backup

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	"drafter/s3"

	"github.com/minio/minio-go/v7"
)

// Store is a place that has answered. Its methods are safe for concurrent use.
type Store struct {
	place     s3.Place
	client    *minio.Client
	transport *boundedTransport
	patience  time.Duration // with one request, in all its attempts; 0: as long as they take
}

// How long things may take before they are tried again, and how often.
const (
	attempts       = 8
	firstWait      = 200 * time.Millisecond
	lastWait       = 10 * time.Second
	attemptTimeout = time.Minute // of one request of at most a pack
	headerTimeout  = 20 * time.Second
)

// Open connects with a place, and fails if it does not exist or refuses the credentials. The error
// of one that may be there later is an [s3.ErrAway].
func Open(ctx context.Context, p s3.Place) (*Store, error) {
	if err := p.Check(); err != nil {
		return nil, err
	}
	if p.Concurrency == 0 {
		p.Concurrency = 4
	}
	creds, err := credentialsOf(p)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	transport := &boundedTransport{Transport: &http.Transport{
		Proxy:           http.ProxyFromEnvironment,
		DialContext:     (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}, TLSHandshakeTimeout: 10 * time.Second,
		ResponseHeaderTimeout: headerTimeout, ExpectContinueTimeout: 5 * time.Second,
		MaxIdleConnsPerHost: 2 * p.Concurrency, IdleConnTimeout: time.Minute, DisableCompression: true,
	}}
	client, err := minio.New(p.Endpoint, &minio.Options{Creds: creds, Secure: p.Secure, Region: os.Getenv("AWS_REGION"), MaxRetries: 1, Transport: transport})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	s := &Store{place: p, client: client, transport: transport}
	err = s.try(ctx, 3, func(ctx context.Context) error {
		for object := range client.ListObjects(ctx, p.Bucket, minio.ListObjectsOptions{Prefix: s.key("manifest.json"), MaxKeys: 1}) {
			return object.Err
		}
		return nil
	})
	if err != nil {
		s.Close()
		return nil, s.explain(err)
	}
	return s, nil
}

// maxAnswer bounds the answers of a storage that are not objects, in bytes: a page of a list has
// 1000 names of at most 1 KiB.
const maxAnswer = 4 << 20

// boundedTransport cuts off answers that are not objects, which the library reads as a whole, and
// compares the storage's clock with this host's.
type boundedTransport struct {
	*http.Transport
	ahead atomic.Int64 // how much the storage's clock is, in nanoseconds
}

// maxAhead is how far apart clocks may be for a signature to count; see "RequestTimeTooSkewed" in
// Amazon's list of error codes.
const maxAhead = 15 * time.Minute

func (t *boundedTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.Transport.RoundTrip(req)
	if err == nil {
		if date, derr := http.ParseTime(resp.Header.Get("Date")); derr == nil {
			t.ahead.Store(int64(time.Until(date)))
		}
	}
	if err == nil && (req.Method != http.MethodGet || req.URL.RawQuery != "" || resp.StatusCode >= http.StatusMultipleChoices) {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxAnswer), resp.Body}
	}
	return resp, err
}

// Place is what the store was opened with.
func (s *Store) Place() s3.Place { return s.place }

// Close frees idle connections.
func (s *Store) Close() { s.client.CredContext().Client.CloseIdleConnections() }

func (s *Store) key(name string) string {
	if s.place.Prefix == "" {
		return name
	}
	return s.place.Prefix + "/" + name
}

// explain makes an error that says what to do about it.
func (s *Store) explain(err error) error {
	var response minio.ErrorResponse
	if errors.As(err, &response) {
		ahead := time.Duration(s.transport.ahead.Load())
		switch {
		case response.Code == minio.RequestTimeTooSkewed, response.StatusCode == http.StatusForbidden && ahead.Abs() > maxAhead:
			return fmt.Errorf("%s: the clocks of this host and of %s differ by %s, so that it refuses what is signed here (%s); set this host's clock, which is now at %s", s.place, s.place.Endpoint, ahead.Abs().Round(time.Second), response.Code, time.Now().UTC().Format(time.RFC3339))
		case response.Code == minio.NoSuchBucket:
			return fmt.Errorf("%s: bucket %s does not exist at %s; make it, or name another in s3bucket", s.place, s.place.Bucket, s.place.Endpoint)
		case response.Code == "InvalidAccessKeyId", response.Code == "XAdminUserNotFound", response.StatusCode == http.StatusForbidden, response.StatusCode == http.StatusUnauthorized:
			return fmt.Errorf("%s: %s refuses the credentials (%s); see to the file of --s3-credentials, or to those of the environment, and to what they may do in that bucket", s.place, s.place.Endpoint, response.Code)
		}
	}
	if permanent(err) || errors.Is(err, context.Canceled) {
		return fmt.Errorf("%s at %s: %w", s.place, s.place.Endpoint, err)
	}
	return fmt.Errorf("%s at %s: %w: %w", s.place, s.place.Endpoint, s3.ErrAway, err)
}

// permanent tells whether another attempt would fail as well.
func permanent(err error) bool {
	var response minio.ErrorResponse
	if !errors.As(err, &response) {
		return errors.Is(err, s3.ErrSuperseded) || errors.Is(err, errInherited) || errors.Is(err, s3.ErrUnfit)
	}
	switch response.Code {
	case "SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "ConditionalRequestConflict", "OperationAborted", "XMinioServerNotInitialized":
		return false
	}
	return response.StatusCode == http.StatusNotImplemented || response.StatusCode >= 400 && response.StatusCode < 500 && response.StatusCode != http.StatusTooManyRequests && response.StatusCode != http.StatusRequestTimeout
}

// try calls f until it succeeds, a limited number of times, with pauses that grow.
func (s *Store) try(ctx context.Context, times int, f func(context.Context) error) error {
	if s.patience > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, s.patience, fmt.Errorf("it has not answered for %s", s.patience))
		defer cancel()
	}
	wait := firstWait
	for i := 1; ; i++ {
		err := func() error {
			ctx, cancel := context.WithTimeoutCause(ctx, attemptTimeout, fmt.Errorf("not done after %s", attemptTimeout))
			defer cancel()
			return f(ctx)
		}()
		if err != nil && ctx.Err() != nil && s.patience > 0 {
			return context.Cause(ctx)
		}
		if err == nil || ctx.Err() != nil || permanent(err) || i == times {
			return err
		}
		select {
		case <-time.After(wait/2 + rand.N(wait)):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		wait = min(2*wait, lastWait)
	}
}

// put writes an object.
func (s *Store) put(ctx context.Context, name string, data []byte, options minio.PutObjectOptions) (etag string, err error) {
	options.SendContentMd5, options.DisableMultipart = true, true
	info, err := s.client.PutObject(ctx, s.place.Bucket, s.key(name), bytes.NewReader(data), int64(len(data)), options)
	return info.ETag, err
}

// get reads n bytes of an object at off, or all up to limit with n 0.
func (s *Store) get(ctx context.Context, name string, off, n, limit int64) (data []byte, etag string, err error) {
	var options minio.GetObjectOptions
	if n > 0 {
		if err := options.SetRange(off, off+n-1); err != nil {
			return nil, "", err
		}
	}
	core := minio.Core{Client: s.client}
	body, info, header, err := core.GetObject(ctx, s.place.Bucket, s.key(name), options)
	if err != nil {
		return nil, "", err
	}
	defer body.Close()
	if n > 0 {
		if header.Get("Content-Range") == "" {
			return nil, "", fmt.Errorf("%w: it returns whole objects where a part is asked for (Range); use one that has ranges", s3.ErrUnfit)
		}
		data = make([]byte, n)
		if _, err := io.ReadFull(body, data); err != nil {
			return nil, "", fmt.Errorf("read %s: %w", name, err)
		}
		return data, info.ETag, nil
	}
	if data, err = io.ReadAll(io.LimitReader(body, limit+1)); err != nil {
		return nil, "", fmt.Errorf("read %s: %w", name, err)
	}
	if int64(len(data)) > limit {
		return nil, "", fmt.Errorf("%s has more than %d bytes", name, limit)
	}
	return data, info.ETag, nil
}

func notFound(err error) bool {
	var response minio.ErrorResponse
	return errors.As(err, &response) && (response.Code == minio.NoSuchKey || response.StatusCode == http.StatusNotFound && response.Code != minio.NoSuchBucket)
}

func conflict(err error) bool {
	var response minio.ErrorResponse
	return errors.As(err, &response) && response.StatusCode == http.StatusPreconditionFailed
}
