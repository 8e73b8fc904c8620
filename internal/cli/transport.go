package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// transportFlags say how peers reach each other.
type transportFlags struct {
	cert, key, ca string
	insecure      bool
}

func (t *transportFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&t.cert, "tls-cert", "", "Certificate of this host (PEM), for TLS 1.3 with both sides authenticated")
	f.StringVar(&t.key, "tls-key", "", "Private key of the certificate (PEM)")
	f.StringVar(&t.ca, "tls-ca", "", "Certificates of the authorities that the other side's certificate must come from (PEM)")
	f.BoolVar(&t.insecure, "insecure", false, "Allow listening beyond this host without TLS: whoever can connect can take the VM")
}

// config is nil without TLS.
func (t *transportFlags) config() (*tls.Config, error) {
	if t.cert == "" && t.key == "" && t.ca == "" {
		return nil, nil
	}
	if t.cert == "" || t.key == "" || t.ca == "" {
		return nil, &usageError{errors.New("--tls-cert, --tls-key and --tls-ca belong together; give all three")}
	}
	pair, err := tls.LoadX509KeyPair(t.cert, t.key)
	if err != nil {
		return nil, fmt.Errorf("load --tls-cert %s and --tls-key %s: %w", t.cert, t.key, err)
	}
	pem, err := os.ReadFile(t.ca)
	if err != nil {
		return nil, fmt.Errorf("load --tls-ca: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("load --tls-ca: %s holds no certificate", t.ca)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair},
		RootCAs: pool, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
	}, nil
}

// splitAddress tells TCP addresses from paths of UNIX sockets (unix:PATH).
func splitAddress(addr string) (network, address string) {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		return "unix", path
	}
	return "tcp", addr
}

// listen listens for targets.
func (t *transportFlags) listen(ctx context.Context, addr string) (net.Listener, error) {
	config, err := t.config()
	if err != nil {
		return nil, err
	}
	network, address := splitAddress(addr)
	if network == "tcp" && config == nil && !t.insecure {
		if err := checkLoopback(ctx, address); err != nil {
			return nil, &usageError{fmt.Errorf("--laddr %s: %w", addr, err)}
		}
	}
	if network == "unix" {
		if err := removeDeadSocket(ctx, address); err != nil {
			return nil, fmt.Errorf("--laddr %s: %w", addr, err)
		}
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("--laddr %s: %w; choose another address, or '' to listen nowhere", addr, err)
	}
	if config != nil {
		l = tls.NewListener(l, config)
	}
	return l, nil
}

// removeDeadSocket removes a socket at which nobody listens any more: that of a killed process.
func removeDeadSocket(ctx context.Context, path string) error {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err == nil {
		return c.Close() // and listening there will fail
	}
	if info, serr := os.Lstat(path); serr == nil && info.Mode().Type() == os.ModeSocket && errors.Is(err, syscall.ECONNREFUSED) {
		return os.Remove(path)
	}
	return nil
}

// checkLoopback refuses addresses that other hosts can reach.
func checkLoopback(ctx context.Context, address string) error {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	beyond := errors.New("other hosts can reach it, and whoever connects can take the VM; pass --tls-cert, --tls-key and --tls-ca, or --insecure on a network that you trust")
	if host == "" {
		return beyond
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if !a.IsLoopback() {
			return beyond
		}
	}
	return nil
}

// dial returns what connects with a source.
func (t *transportFlags) dial(addr string) (func(context.Context) (io.ReadWriteCloser, error), error) {
	config, err := t.config()
	if err != nil {
		return nil, err
	}
	network, address := splitAddress(addr)
	host := "localhost"
	if network == "tcp" {
		if host, _, err = net.SplitHostPort(address); err != nil {
			return nil, &usageError{fmt.Errorf("--raddr %s: %w", addr, err)}
		}
	}
	if config != nil {
		config.ServerName = host
	}
	return func(ctx context.Context) (io.ReadWriteCloser, error) {
		if config != nil {
			return (&tls.Dialer{Config: config}).DialContext(ctx, network, address)
		}
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}, nil
}
