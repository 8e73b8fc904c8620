package signature

import (
	"context"
	"crypto"
	"errors"
	"fmt"

	"drafter/internal/block"
	"drafter/internal/private"
)

// ErrUnsigned says that a package has no signature.
var ErrUnsigned = errors.New("the package has no signature")

// Verifier accepts packages that one of its keys has signed.
type Verifier struct {
	keys []crypto.PublicKey
	file string
}

// NewVerifier reads public keys from files, at least one. Unless file is "", the signature in it is
// used instead of the packages' own.
func NewVerifier(keyFiles []string, file string) (*Verifier, error) {
	v := &Verifier{file: file}
	for _, path := range keyFiles {
		keys, err := readPublicKeys(path)
		if err != nil {
			return nil, err
		}
		v.keys = append(v.keys, keys...)
	}
	if len(v.keys) == 0 {
		return nil, errors.New("there is no key to verify signatures with")
	}
	return v, nil
}

// Statement returns the signed statement of a package. The package came with the signature carried
// or, if that is nil, may have one beside its config device, the file at path config. The caller
// checks the names of the devices and the content of each against the statement.
func (v *Verifier) Statement(carried []byte, config string) (_ *Statement, err error) {
	envelope := carried
	switch {
	case v.file != "":
		envelope, err = Read(v.file)
	case carried == nil && config != "":
		envelope, err = Beside(config)
	}
	if err != nil {
		return nil, err
	}
	if envelope == nil {
		return nil, fmt.Errorf("%w, and only those that are signed with --verify-key are accepted; 'drafter sign' makes one, --signature names one", ErrUnsigned)
	}
	s, err := verify(envelope, v.keys)
	if err != nil {
		return nil, fmt.Errorf("the package's signature: %w", err)
	}
	return s, nil
}

// CheckFiles refuses a package, given as files by the names of its devices, that does not match the
// statement. It also refuses files that others can change.
func (s *Statement) CheckFiles(ctx context.Context, files map[string]string, owner int) error {
	var names []string
	for name := range files {
		names = append(names, name)
	}
	if err := s.CheckNames(names); err != nil {
		return err
	}
	for name, path := range files {
		if err := private.CheckPlace(path, owner); err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
		c, err := block.HashFile(ctx, path)
		if err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
		if err := s.Check(Device{name, c.Size, c.Device.String()}); err != nil {
			return err
		}
	}
	return nil
}
