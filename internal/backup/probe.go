package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"drafter/s3"

	"github.com/google/uuid"
	"github.com/minio/minio-go/v7"
)

// probe tests, with an object of its own, whether the storage has what a backup needs: conditional
// writes, without which two instances overwrite each other's backups unnoticed, and reads of parts
// of objects.
func (s *Store) probe(ctx context.Context) (err error) {
	name := probes + uuid.NewString()
	content := []byte("drafter looks what this storage can do")
	var first minio.PutObjectOptions
	first.SetMatchETagExcept("*")
	err = s.try(ctx, attempts, func(ctx context.Context) error {
		_, err := s.put(ctx, name, content, first)
		if conflict(err) { // the answer to an earlier attempt was lost
			return nil
		}
		return err
	})
	if err != nil {
		return s.unfit("conditional writes (If-None-Match)", err)
	}
	defer func() {
		// What is left of a failed delete is swept with the garbage.
		_ = s.client.RemoveObject(context.WithoutCancel(ctx), s.place.Bucket, s.key(name), minio.RemoveObjectOptions{})
	}()
	var stale minio.PutObjectOptions
	stale.SetMatchETag(strings.Repeat("0", 32))
	for condition, options := range map[string]minio.PutObjectOptions{"If-None-Match": first, "If-Match": stale} {
		err := s.try(ctx, attempts, func(ctx context.Context) error {
			_, err := s.put(ctx, name, content, options)
			if conflict(err) {
				return nil
			}
			if err == nil {
				err = fmt.Errorf("%w: it ignores the condition of a write (%s), so that two instances could overwrite one another's backups; use one that has conditional writes", s3.ErrUnfit, condition)
			}
			return err
		})
		if err != nil {
			return s.unfit("conditional writes ("+condition+")", err)
		}
	}
	return s.try(ctx, attempts, func(ctx context.Context) error {
		part, _, err := s.get(ctx, name, 8, 5, 0)
		if err == nil && !bytes.Equal(part, content[8:13]) {
			err = fmt.Errorf("%w: what it returns for a part of an object is another one", s3.ErrUnfit)
		}
		return err
	})
}

// probes is where the objects of a probe are.
const probes = "probe/"

// unfit turns a storage's answer that it does not know a feature into an [s3.ErrUnfit].
func (s *Store) unfit(feature string, err error) error {
	var response minio.ErrorResponse
	if errors.As(err, &response) && (response.StatusCode == http.StatusNotImplemented || response.Code == "NotImplemented" || response.Code == "InvalidArgument" || response.Code == "InvalidRequest") {
		return fmt.Errorf("%w: it has no %s (%d %s), which keep two instances from overwriting one another's backups; use one that has them", s3.ErrUnfit, feature, response.StatusCode, response.Code)
	}
	return err
}
