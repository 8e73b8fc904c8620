package daemon

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"drafter/api"
	"drafter/client"
	"drafter/internal/newfile"
	"drafter/internal/private"
)

// Hosts know each other by their keys. A token, made on one host and given to another, has the
// fingerprint of the one's certificate and a secret: so the other knows to whom it talks, and the one
// who may be added.

const (
	hostName      = "drafter" // in every host's certificate: the key tells hosts apart
	tokenAge      = 10 * time.Minute
	secretSize    = 16
	mostNeighbour = 64 << 10 // bytes of its record
)

// The files of this host's key.
func (d *Daemon) keyFile() string  { return d.dir("host", "key.pem") }
func (d *Daemon) certFile() string { return d.dir("host", "cert.pem") }

// identify loads the host's key, and makes one for a new host.
func (d *Daemon) identify() error {
	if err := errors.Join(private.MkdirAll(d.dir("host", "tokens")), private.MkdirAll(d.dir("hosts"))); err != nil {
		return fmt.Errorf("open the host's key: %w", err)
	}
	if !exists(d.certFile()) { // the key goes first
		if err := d.makeKey(); err != nil {
			return fmt.Errorf("make the host's key: %w", err)
		}
	}
	var err error
	if d.key, err = tls.LoadX509KeyPair(d.certFile(), d.keyFile()); err != nil {
		return fmt.Errorf("open the host's key: %w", err)
	}
	return nil
}

func (d *Daemon) makeKey() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: d.name()},
		DNSNames: []string{hostName}, NotBefore: now.Add(-24 * time.Hour), NotAfter: now.AddDate(100, 0, 0),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true, IsCA: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	if err := newfile.WriteBytes(d.keyFile(), encode("PRIVATE KEY", der)); err != nil {
		return err
	}
	return newfile.WriteBytes(d.certFile(), encode("CERTIFICATE", cert))
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// name is what this host calls itself.
func (d *Daemon) name() string {
	if d.config.Name != "" {
		return d.config.Name
	}
	name, _ := os.Hostname() // "" if the kernel has none
	return baseName(name)
}

func fingerprint(der []byte) []byte {
	sum := sha256.Sum256(der)
	return sum[:]
}

var errNotListening = fmt.Errorf("other hosts cannot reach this daemon: %w; start it with --listen HOST:PORT",
	ErrConflict)

// Token makes a token, with which one other host can be added.
func (d *Daemon) Token() (api.Token, error) {
	if d.config.Listen == "" {
		return api.Token{}, errNotListening
	}
	secret := make([]byte, secretSize)
	_, _ = rand.Read(secret) // never fails
	t := api.Token{Expires: time.Now().Add(tokenAge).UTC()}
	text, err := t.Expires.MarshalText()
	if err == nil {
		err = newfile.WriteBytes(d.tokenFile(secret), text)
	}
	if err != nil {
		return t, fmt.Errorf("note token: %w", err)
	}
	t.Token = base64.RawURLEncoding.EncodeToString(append(secret, fingerprint(d.key.Certificate[0])...))
	return t, nil
}

// tokenFile notes a token without its secret.
func (d *Daemon) tokenFile(secret []byte) string {
	return d.dir("host", "tokens", hex.EncodeToString(fingerprint(secret)))
}

// redeem uses a token up.
func (d *Daemon) redeem(secret []byte) error {
	path := d.tokenFile(secret)
	text, err := private.ReadFile(path, 1<<10)
	var expires time.Time
	if err == nil {
		err = expires.UnmarshalText(text)
	}
	if err == nil {
		err = os.Remove(path) // of two at the same time, one
	}
	if err != nil || time.Now().After(expires) {
		return fmt.Errorf("the token is not valid, was used, or has expired: %w; "+
			"make another with 'drafter host token'", ErrForbidden)
	}
	return nil
}

// sweepTokens removes those that have expired.
func (d *Daemon) sweepTokens() error {
	entries, err := os.ReadDir(d.dir("host", "tokens"))
	for _, e := range entries {
		if info, ierr := e.Info(); ierr == nil && time.Since(info.ModTime()) > tokenAge {
			err = errors.Join(err, os.Remove(d.dir("host", "tokens", e.Name())))
		}
	}
	return err
}

// Neighbours returns the other hosts, by name.
func (d *Daemon) Neighbours() ([]api.Neighbour, error) {
	entries, err := os.ReadDir(d.dir("hosts"))
	if err != nil {
		return nil, fmt.Errorf("list hosts: %w", err)
	}
	list := []api.Neighbour{}
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".json"); ok && namePattern.MatchString(name) {
			n, err := d.Neighbour(name)
			if err != nil {
				return nil, err
			}
			list = append(list, n)
		}
	}
	return list, nil
}

func (d *Daemon) neighbourFile(name string) string { return d.dir("hosts", name+".json") }

// Neighbour returns another host.
func (d *Daemon) Neighbour(name string) (n api.Neighbour, err error) {
	if !namePattern.MatchString(name) {
		return n, fmt.Errorf("host %q: %w", name, ErrNotFound)
	}
	b, err := private.ReadFile(d.neighbourFile(name), mostNeighbour)
	if errors.Is(err, os.ErrNotExist) {
		return n, fmt.Errorf("host %q: %w; 'drafter host ls' lists all, and 'drafter host add' adds one", name, ErrNotFound)
	}
	if err == nil {
		err = json.Unmarshal(b, &n)
	}
	if err != nil {
		return n, fmt.Errorf("read what is known of host %s: %w", name, err)
	}
	return n, nil
}

// pin notes another host. One of that name that has another key is refused.
func (d *Daemon) pin(n api.Neighbour) error {
	d.hostsMu.Lock()
	defer d.hostsMu.Unlock()
	switch old, err := d.Neighbour(n.Name); {
	case err == nil && old.Certificate != n.Certificate:
		return fmt.Errorf("there is another host %s: %w; remove it ('drafter host rm %s'), or use another name",
			n.Name, ErrConflict, n.Name)
	case err != nil && !errors.Is(err, ErrNotFound):
		return err
	}
	n.Added = time.Now().UTC()
	b, err := json.Marshal(n)
	if err == nil {
		err = newfile.WriteBytes(d.neighbourFile(n.Name), b)
	}
	if err != nil {
		return fmt.Errorf("note host %s: %w", n.Name, err)
	}
	return nil
}

// RemoveHost forgets another host, which can no longer call this one.
func (d *Daemon) RemoveHost(name string) error {
	d.hostsMu.Lock()
	defer d.hostsMu.Unlock()
	if _, err := d.Neighbour(name); errors.Is(err, ErrNotFound) {
		return err
	}
	return newfile.Remove(d.neighbourFile(name))
}

// AddHost adds another host: each of the two gets to know the key of the other.
func (d *Daemon) AddHost(ctx context.Context, a api.AddHost) (api.Neighbour, error) {
	none := api.Neighbour{}
	if d.config.Listen == "" {
		return none, errNotListening
	}
	if _, _, err := net.SplitHostPort(a.Address); err != nil {
		return none, fmt.Errorf("the address %q is not of the form HOST:PORT: %w", a.Address, ErrInvalid)
	}
	token, err := base64.RawURLEncoding.DecodeString(strings.TrimSpace(a.Token))
	if err != nil || len(token) != secretSize+sha256.Size {
		return none, fmt.Errorf("the token is none: %w; make one on the other host with 'drafter host token'", ErrInvalid)
	}
	var theirs []byte
	local := ""
	config := &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{d.key},
		InsecureSkipVerify: true, // the token has its fingerprint
		VerifyConnection: func(s tls.ConnectionState) error {
			theirs = s.PeerCertificates[0].Raw
			if !bytes.Equal(fingerprint(theirs), token[secretSize:]) {
				return errors.New("the token is not of the host that answers there")
			}
			return nil
		},
	}
	c := client.NewTLS(a.Address, config, func(conn net.Conn) { local = conn.LocalAddr().String() })
	defer c.Close()
	if _, err := c.Host(ctx); err != nil && theirs == nil {
		return none, fmt.Errorf("reach host %s: %w", a.Name, err)
	}
	join := api.Join{
		Name: d.name(), Address: d.advertised(local),
		Secret: base64.RawURLEncoding.EncodeToString(token[:secretSize]),
	}
	if err := c.Join(ctx, join); err != nil {
		return none, fmt.Errorf("join host %s: %w", a.Name, err)
	}
	n := api.Neighbour{Name: a.Name, Address: a.Address, Certificate: string(encode("CERTIFICATE", theirs))}
	if err := d.pin(n); err != nil {
		return none, err
	}
	return d.Neighbour(a.Name)
}

// advertised is where another host reaches this daemon, which has reached it from a local address.
func (d *Daemon) advertised(local string) string {
	host, port, err := net.SplitHostPort(d.config.Listen)
	if err != nil {
		return d.config.Listen
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		if from, _, err := net.SplitHostPort(local); err == nil {
			host = from
		}
	}
	return net.JoinHostPort(host, port)
}

// join is what another host asks for that has a token.
func (d *Daemon) join(der []byte, j api.Join) error {
	secret, err := base64.RawURLEncoding.DecodeString(j.Secret)
	if err != nil || len(secret) != secretSize {
		return fmt.Errorf("the token is none: %w", ErrForbidden)
	}
	if err := d.redeem(secret); err != nil {
		return err
	}
	return d.pin(api.Neighbour{Name: j.Name, Address: j.Address, Certificate: string(encode("CERTIFICATE", der))})
}

// caller returns the host that has a certificate.
func (d *Daemon) caller(der []byte) (api.Neighbour, error) {
	all, err := d.Neighbours()
	if err != nil {
		return api.Neighbour{}, err
	}
	cert := string(encode("CERTIFICATE", der))
	i := slices.IndexFunc(all, func(n api.Neighbour) bool { return n.Certificate == cert })
	if i < 0 {
		return api.Neighbour{}, fmt.Errorf("this host does not know the caller: %w; "+
			"add it with 'drafter host add'", ErrForbidden)
	}
	return all[i], nil
}

// dial makes a client of another host. Close it.
func (d *Daemon) dial(n api.Neighbour) (*client.Client, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(n.Certificate)) {
		return nil, fmt.Errorf("the certificate of host %s cannot be read", n.Name)
	}
	return client.NewTLS(n.Address, &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{d.key}, RootCAs: pool, ServerName: hostName,
	}, nil), nil
}

// TLS is for a listener at which other hosts reach [Daemon.HostHandler].
func (d *Daemon) TLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{d.key},
		ClientAuth: tls.RequireAnyClientCert, // which are known is looked up for each call
	}
}

// authority writes the certificate that another host must have, for a VM's process.
func (s seat) authority(n api.Neighbour) (path string, err error) {
	path = filepath.Join(string(s), "host.pem")
	if err := errors.Join(private.MkdirAll(string(s)), newfile.WriteBytes(path, []byte(n.Certificate))); err != nil {
		return "", fmt.Errorf("note the key of host %s: %w", n.Name, err)
	}
	return path, nil
}

// reachable is the address at which other hosts reach a listener of this one that reaches them from
// local.
func (d *Daemon) reachable(local string) string {
	host, _, err := net.SplitHostPort(d.advertised(local))
	if err != nil {
		return local
	}
	return net.JoinHostPort(cmp.Or(host, "localhost"), "0")
}
