package cli

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"drafter/migrate"
	"drafter/transport"
)

// transportFlags say how peers reach each other, and whom they trust.
type transportFlags struct {
	cert, key, ca string
	name          string
	insecure      bool
}

func (t *transportFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&t.cert, "tls-cert", "", "Certificate of this host (PEM), for TLS 1.3 with both sides authenticated")
	f.StringVar(&t.key, "tls-key", "", "Private key of the certificate (PEM)")
	f.StringVar(&t.ca, "tls-ca", "", "Certificates of the authorities that the other side's certificate must come from (PEM)")
	f.StringVar(&t.name, "tls-name", "", "Name that the certificate of who answers must have (default: the host of its address)")
	f.BoolVar(&t.insecure, "insecure", false, "Trust whoever connects or answers, without TLS: other users of this host, and other hosts. By default only root and this user of this host are trusted")
}

func (t *transportFlags) trust() (*transport.Trust, error) {
	if t.cert == "" && t.key == "" && t.ca == "" {
		return &transport.Trust{Anybody: t.insecure}, nil
	}
	if t.cert == "" || t.key == "" || t.ca == "" {
		return nil, &usageError{errors.New("--tls-cert, --tls-key and --tls-ca belong together; give all three")}
	}
	config, err := transport.LoadTLS(t.cert, t.key, t.ca)
	if err != nil {
		return nil, fmt.Errorf("--tls-cert, --tls-key and --tls-ca: %w", err)
	}
	config.Name = t.name
	return &transport.Trust{TLS: config}, nil
}

const howToTrust = "pass --tls-cert, --tls-key and --tls-ca on both sides, or --insecure on a network that you trust"

// listen listens for targets.
func (t *transportFlags) listen(ctx context.Context, addr string) (*transport.Listener, error) {
	trust, err := t.trust()
	if err != nil {
		return nil, err
	}
	l, err := trust.Listen(ctx, addr)
	if errors.Is(err, transport.ErrBeyond) {
		return nil, &usageError{fmt.Errorf("--laddr %s: other hosts can reach it, and whoever connects can take what is served; %s", addr, howToTrust)}
	}
	if err != nil {
		return nil, fmt.Errorf("--laddr %s: %w; choose another address, or '' to listen nowhere", addr, err)
	}
	return l, nil
}

// dial returns what connects with a source.
func (t *transportFlags) dial(addr string) (migrate.Dial, error) {
	trust, err := t.trust()
	if err != nil {
		return nil, err
	}
	dial, err := trust.Dialer(addr)
	if err != nil {
		return nil, &usageError{fmt.Errorf("--raddr %s: %w", addr, err)}
	}
	return func(ctx context.Context) (io.ReadWriteCloser, error) {
		conn, err := dial(ctx)
		if errors.Is(err, transport.ErrBeyond) {
			err = &usageError{fmt.Errorf("--raddr %s: it is beyond this host, and without TLS anybody on the way could answer; %s", addr, howToTrust)}
		}
		return conn, err
	}, nil
}
