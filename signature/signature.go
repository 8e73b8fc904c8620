// Package signature says which packages are accepted: those whose statement one of some keys has
// signed.
//
// A statement lists the devices of a package with their sizes and content ids (see
// docs/devices.md), so it fits the package wherever it is: in a directory, an archive, a registry.
// It is JSON:
//
//	{"version":1,"devices":[{"name":"config","size":1234,"content":"<64 hex digits>"}, …]}
//
// The signature is a DSSE envelope (https://github.com/secure-systems-lab/dsse, version 1) around
// it, with the payload type [PayloadType]. Keys are Ed25519 (RFC 8032) or ECDSA on P-256 with
// SHA-256 and an ASN.1 signature (FIPS 186-5), in PEM: PKCS #8 for the private key, PKIX for public
// ones, as openssl makes them. The key alone determines the algorithm; nothing in an envelope does.
package signature

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"drafter/internal/newfile"

	"golang.org/x/sys/unix"
)

const (
	// File is the name of a package's signature, in the directory of its config device and in its
	// archive.
	File = "package.sig"
	// PayloadType is the type of a statement in its envelope.
	PayloadType = "application/vnd.drafter.package.statement.v1+json"
	// MediaType is the type of an envelope, as DSSE's specification names it.
	MediaType = "application/vnd.dsse.envelope.v1+json"
	// MaxSize bounds an envelope, in bytes. One of 1,000 devices takes some 200 KiB.
	MaxSize = 256 << 10

	maxSignatures = 16 // in an envelope
)

// Statement lists what a package contains.
type Statement struct {
	Version int      `json:"version"` // 1
	Devices []Device `json:"devices"` // sorted by name
}

// Device is one device of a package.
type Device struct {
	Name    string `json:"name"`
	Size    int64  `json:"size"`    // bytes
	Content string `json:"content"` // id of the whole, in hex
}

// NewStatement returns the statement of a package of these devices, which it keeps and sorts.
func NewStatement(devices []Device) *Statement {
	s := &Statement{Version: 1, Devices: devices}
	slices.SortFunc(s.Devices, func(a, b Device) int { return cmp.Compare(a.Name, b.Name) })
	return s
}

// Names are those of the devices.
func (s *Statement) Names() []string {
	var names []string
	for _, d := range s.Devices {
		names = append(names, d.Name)
	}
	return names
}

// CheckNames refuses a package whose devices are not exactly those of the statement.
func (s *Statement) CheckNames(names []string) error {
	for _, name := range names {
		if !slices.Contains(s.Names(), name) {
			return fmt.Errorf("device %s is not part of the package that was signed", name)
		}
	}
	for _, name := range s.Names() {
		if !slices.Contains(names, name) {
			return fmt.Errorf("device %s of the package that was signed is missing", name)
		}
	}
	return nil
}

// Check refuses a device whose size or content is not what was signed under its name.
func (s *Statement) Check(d Device) error {
	i := slices.IndexFunc(s.Devices, func(signed Device) bool { return signed.Name == d.Name })
	if i < 0 {
		return fmt.Errorf("device %s is not part of the package that was signed", d.Name)
	}
	if s.Devices[i] != d {
		return fmt.Errorf("device %s is not what was signed: it has changed since (as a package does that is run without an instance), or is another package's", d.Name)
	}
	return nil
}

// envelope is DSSE's. Key ids are hints, and are not used.
type envelope struct {
	PayloadType string              `json:"payloadType"`
	Payload     []byte              `json:"payload"` // base64 in the JSON, as are the signatures
	Signatures  []envelopeSignature `json:"signatures"`
}

type envelopeSignature struct {
	KeyID     string `json:"keyid,omitempty"`
	Signature []byte `json:"sig"`
}

// signed returns the signed bytes: DSSE's pre-authentication encoding.
func (e *envelope) signed() []byte {
	return append(fmt.Appendf(nil, "DSSEv1 %d %s %d ", len(e.PayloadType), e.PayloadType, len(e.Payload)), e.Payload...)
}

// Sign returns the envelope of a statement.
func Sign(s *Statement, key *PrivateKey) ([]byte, error) {
	payload, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode statement: %w", err)
	}
	e := envelope{PayloadType: PayloadType, Payload: payload}
	sig, err := key.sign(e.signed())
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.signer.Public())
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	id := sha256.Sum256(der)
	e.Signatures = []envelopeSignature{{KeyID: hex.EncodeToString(id[:]), Signature: sig}}
	b, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode envelope: %w", err)
	}
	if b = append(b, '\n'); len(b) > MaxSize {
		return nil, fmt.Errorf("the signature of %d devices is longer than %d bytes", len(s.Devices), MaxSize)
	}
	return b, nil
}

// verify returns the statement that one of keys has signed. It uses nothing of the envelope before.
func verify(b []byte, keys []crypto.PublicKey) (*Statement, error) {
	e, err := decodeEnvelope(b)
	if err != nil {
		return nil, err
	}
	message := e.signed()
	for _, sig := range e.Signatures {
		if slices.ContainsFunc(keys, func(key crypto.PublicKey) bool { return fits(key, message, sig.Signature) }) {
			return decodeStatement(e.Payload)
		}
	}
	return nil, errors.New("none of the keys has signed it")
}

func decodeEnvelope(b []byte) (*envelope, error) {
	var e envelope
	if err := decodeJSON(b, &e); err != nil {
		return nil, fmt.Errorf("it is no signature of a package: %w", err)
	}
	if e.PayloadType != PayloadType {
		return nil, fmt.Errorf("it is a signature of something else: its payload type is %.100q", e.PayloadType)
	}
	if len(e.Signatures) == 0 || len(e.Signatures) > maxSignatures {
		return nil, fmt.Errorf("it has %d signatures, not 1 to %d", len(e.Signatures), maxSignatures)
	}
	return &e, nil
}

func decodeStatement(b []byte) (*Statement, error) {
	var s Statement
	if err := decodeJSON(b, &s); err != nil {
		return nil, fmt.Errorf("its statement: %w", err)
	}
	if s.Version != 1 {
		return nil, fmt.Errorf("its statement has version %d, this build reads 1; use a newer release", s.Version)
	}
	if len(s.Devices) == 0 {
		return nil, errors.New("its statement lists no devices")
	}
	for i, d := range s.Devices {
		if i > 0 && s.Devices[i-1].Name >= d.Name {
			return nil, fmt.Errorf("its statement lists device %.64q twice, or not in order", d.Name)
		}
	}
	return &s, nil
}

// decodeJSON decodes exactly one value, and refuses fields that v does not have.
func decodeJSON(b []byte, v any) error {
	if len(b) > MaxSize {
		return fmt.Errorf("it is longer than %d bytes", MaxSize)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows it")
	}
	return nil
}

// Beside returns the signature of the package whose config device is the file at path config; nil
// if it has none. It does not check whether the signature fits.
func Beside(config string) ([]byte, error) {
	b, err := Read(filepath.Join(filepath.Dir(config), File))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return b, err
}

// Keep puts a signature, if there is one, beside the config device of its package, the file at path
// config. A signature that is there already is replaced only if replace is set. A file that is no
// signature stays: only a [Verifier] refuses it.
func Keep(envelope []byte, config string, replace bool) error {
	path := filepath.Join(filepath.Dir(config), File)
	if _, err := os.Lstat(path); envelope == nil || err == nil && !replace {
		return nil
	}
	if _, err := decodeEnvelope(envelope); err != nil {
		return nil //nolint:nilerr // see above
	}
	if err := newfile.Write(path, func(f *os.File) error { _, err := f.Write(envelope); return err }); err != nil {
		return fmt.Errorf("keep the package's signature: %w", err)
	}
	return nil
}

// Read returns the signature in a regular file, not through a symbolic link. It does not check
// whether the signature fits.
func Read(path string) ([]byte, error) {
	b, err := readFile(path, unix.O_NOFOLLOW)
	if err == nil {
		_, err = decodeEnvelope(b)
	}
	if err != nil {
		return nil, fmt.Errorf("signature %s: %w", path, err)
	}
	return b, nil
}

// readFile reads a regular file of at most MaxSize bytes, without waiting for the writer of a FIFO.
func readFile(path string, flags int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|flags, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("it is no regular file")
	}
	b, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err == nil && len(b) > MaxSize {
		err = fmt.Errorf("it is longer than %d bytes", MaxSize)
	}
	return b, err
}
