package signature

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"drafter/block"
)

// ErrUnsigned says that a package has no signature.
var ErrUnsigned = errors.New("the package has no signature")

// Verifier accepts packages that one of its keys has signed.
type Verifier struct {
	keys []crypto.PublicKey
	file string
}

// NewVerifier reads public keys from files, at least one. The signature at path file is used in place of the packages' own, unless it is "".
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

// Statement returns what was signed of the package that came with the signature carried, if not nil, or has one beside its config device, the file at path
// config. Whoever uses the package checks the names of its devices and the content of each against it.
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

// CheckFiles refuses a package in files, by the names of its devices, that is not the one of the statement, and files that others can change: see [CheckPlace].
func (s *Statement) CheckFiles(ctx context.Context, files map[string]string, owner int) error {
	var names []string
	for name := range files {
		names = append(names, name)
	}
	if err := s.CheckNames(names); err != nil {
		return err
	}
	for name, path := range files {
		if err := CheckPlace(path, owner); err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
		c, err := HashFile(ctx, path)
		if err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
		if err := s.Check(name, c); err != nil {
			return err
		}
	}
	return nil
}

// HashFile reads all of a file and returns its content ids. Those that are kept beside it are not trusted: see [block.FileContents].
func HashFile(ctx context.Context, path string) (_ *block.Contents, err error) {
	d, err := block.OpenFile(path, true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return block.Hash(ctx, d)
}

// maxLinks bounds the symbolic links of one path, as the kernel does (path_resolution(7)).
const maxLinks = 40

// CheckPlace refuses a path at which somebody else can put other content after it was verified: each of its directories and links, and what it leads to, must
// belong to root, to the user of this process, or to the one who called it with sudo, and be writable by its owner only. What it leads to may also belong to
// the user with the id owner. A directory of all users, such as /tmp, is in order if it is sticky. Where the path ends early, what is there of it is checked.
func CheckPlace(path string, owner int) error {
	if !filepath.IsAbs(path) {
		dir, err := os.Getwd()
		if err != nil {
			return err
		}
		path = dir + "/" + path // not filepath.Join: link/.. is not where the link is
	}
	rest, at := strings.Split(path, "/"), "/"
	for links := 0; len(rest) > 0; {
		at, rest = filepath.Join(at, rest[0]), rest[1:]
		info, err := os.Lstat(at)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := checkOwner(at, info, len(rest) == 0, owner); err != nil {
			return err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			continue
		}
		target, err := os.Readlink(at)
		if err != nil {
			return err
		}
		if links++; links > maxLinks {
			return fmt.Errorf("%s: %w", path, syscall.ELOOP)
		}
		if at = filepath.Dir(at); filepath.IsAbs(target) {
			at = "/"
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return nil
}

func checkOwner(path string, info fs.FileInfo, last bool, owner int) error {
	uid := int(info.Sys().(*syscall.Stat_t).Uid)
	caller, err := strconv.Atoi(os.Getenv("SUDO_UID"))
	writers := fs.FileMode(0o022)
	if info.Mode()&fs.ModeDevice != 0 {
		writers = 0o002 // the group "disk" is root's equal
	}
	mine := uid == 0 || uid == os.Geteuid() || err == nil && uid == caller
	switch {
	case !mine && (!last || uid != owner):
		return fmt.Errorf("user %d owns %s and could change what was verified; put the package where only root can write, or chown it", uid, path)
	case info.Mode()&fs.ModeSymlink != 0 || info.Mode().IsDir() && info.Mode()&fs.ModeSticky != 0 || info.Mode()&writers == 0:
		return nil
	}
	return fmt.Errorf("others than its owner can write to %s and could change what was verified; chmod go-w it", path)
}
