package transport

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"

	"drafter/internal/kind"
	"drafter/internal/logging"
)

// Certificates are PEM files for TLS 1.3 with both sides authenticated. They are read anew for each
// connection, so renewed ones count from then on. While they cannot be read, as between two writes,
// the last ones count.
type Certificates struct {
	// Name is what the certificate of who answers must be for; "" for the host of its address.
	Name string

	cert, key, ca string

	mu   sync.Mutex
	last *tls.Config
}

// LoadTLS reads the certificate of this host with its key, and the certificates of the authorities
// that the other side's certificate must come from.
func LoadTLS(cert, key, ca string) (*Certificates, error) {
	c := &Certificates{cert: cert, key: key, ca: ca}
	var err error
	c.last, err = c.read()
	return c, err
}

func (c *Certificates) read() (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(c.cert, c.key)
	if err != nil {
		return nil, fmt.Errorf("load certificate %s and key %s: %w", c.cert, c.key, err)
	}
	pem, err := os.ReadFile(c.ca)
	if err != nil {
		return nil, fmt.Errorf("load authorities: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("load authorities: %s holds no certificate", c.ca)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair},
		RootCAs: pool, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
	}, nil
}

// config is for the next connection. log may be nil.
func (c *Certificates) config(log *slog.Logger) *tls.Config {
	config, err := c.read()
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		logging.Or(log).Warn("The certificates cannot be read; those that were read last count", "error", err)
	} else {
		c.last = config
	}
	return c.last
}

// unauthorized makes the error of a handshake an [ErrUnauthorized], if a certificate is the reason.
// A nil error stays nil.
func unauthorized(err error) error {
	var verification *tls.CertificateVerificationError
	var alert *net.OpError
	if errors.As(err, &verification) || errors.As(err, &alert) && alert.Op == "remote error" {
		return kind.Of(ErrUnauthorized, err)
	}
	return err
}
