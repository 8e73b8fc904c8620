package signature

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
)

// PrivateKey signs packages.
type PrivateKey struct{ signer crypto.Signer }

// ReadPrivateKey reads a private key: one PEM block of PKCS #8, not encrypted.
func ReadPrivateKey(path string) (*PrivateKey, error) {
	b, err := readFile(path, 0)
	if err != nil {
		return nil, fmt.Errorf("key: %w", err)
	}
	block, rest := pem.Decode(b)
	if block == nil || block.Type != "PRIVATE KEY" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, fmt.Errorf("key %s is not one private key in PEM (PKCS #8, not encrypted); make one with 'openssl genpkey -algorithm ed25519'", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", path, err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok || !supported(signer.Public()) {
		return nil, fmt.Errorf("key %s is neither Ed25519 nor ECDSA on P-256", path)
	}
	return &PrivateKey{signer}, nil
}

// sign signs a message with the one algorithm of the key.
func (k *PrivateKey) sign(message []byte) ([]byte, error) {
	if _, ok := k.signer.(ed25519.PrivateKey); ok {
		return k.signer.Sign(nil, message, crypto.Hash(0))
	}
	sum := sha256.Sum256(message)
	return k.signer.Sign(rand.Reader, sum[:], crypto.SHA256)
}

// readPublicKeys reads public keys: one or more PEM blocks of PKIX, and nothing else.
func readPublicKeys(path string) (keys []crypto.PublicKey, err error) {
	rest, err := readFile(path, 0)
	if err != nil {
		return nil, fmt.Errorf("key: %w", err)
	}
	for rest = bytes.TrimSpace(rest); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var block *pem.Block
		before := rest
		if block, rest = pem.Decode(rest); block == nil || block.Type != "PUBLIC KEY" || before[0] != '-' {
			return nil, fmt.Errorf("key %s holds something else than public keys in PEM (PKIX); 'openssl pkey -in KEY -pubout' writes one", path)
		}
		key, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("key %s: %w", path, err)
		}
		if !supported(key) {
			return nil, fmt.Errorf("key %s is neither Ed25519 nor ECDSA on P-256", path)
		}
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("key %s is empty", path)
	}
	return keys, nil
}

func supported(key crypto.PublicKey) bool {
	switch key := key.(type) {
	case ed25519.PublicKey:
		return true
	case *ecdsa.PublicKey:
		return key.Curve == elliptic.P256()
	}
	return false
}

// fits tells whether sig is the signature of message by key.
func fits(key crypto.PublicKey, message, sig []byte) bool {
	switch key := key.(type) {
	case ed25519.PublicKey:
		return ed25519.Verify(key, message, sig)
	case *ecdsa.PublicKey:
		sum := sha256.Sum256(message)
		return ecdsa.VerifyASN1(key, sum[:], sig)
	}
	return false
}
