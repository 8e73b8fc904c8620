package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

// certificates makes an authority and a certificate of it for localhost, and returns the flags of a
// peer that uses them.
func certificates(t *testing.T, dir string) []string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	save := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	issue := func(c, parent *x509.Certificate, signer *ecdsa.PrivateKey) ([]byte, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if signer == nil {
			signer = key
		}
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
		if err != nil {
			t.Fatal(err)
		}
		return der, key
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	authority, signer := issue(ca, ca, nil)
	host := &x509.Certificate{
		SerialNumber: big.NewInt(2), DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	cert, key := issue(host, ca, signer)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return []string{"--tls-ca", save("ca.pem", "CERTIFICATE", authority), "--tls-cert", save("cert.pem", "CERTIFICATE", cert), "--tls-key", save("key.pem", "PRIVATE KEY", pkcs8)}
}

// asNobody runs the command as an unprivileged user, and returns what it said.
func asNobody(t *testing.T, args ...string) string {
	t.Helper()
	path, err := exec.LookPath("drafter")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "nobody-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	binary := filepath.Join(dir, "drafter")
	if out, err := exec.Command("cp", path, binary).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(dir, 65534, 65534), os.Chmod(binary, 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, args...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Errorf("drafter %s does not fail for another user:\n%s", args[0], out)
	}
	if files, err := filepath.Glob(filepath.Join(dir, "backup", "*")); err != nil || len(files) > 0 {
		t.Errorf("another user got %v, %v", files, err)
	}
	return string(out)
}

// Another user of the host, who connects a thousand times and asks for the VM, gets nothing of it,
// and keeps its owner from nothing: neither on loopback nor with TLS.
func TestStrangersOfThisHost(t *testing.T) {
	s := emptySite(t)
	s.redisIn(t, "ark0", "127.0.0.1:3333")
	flags := certificates(t, filepath.Join(s.dir, "tls"))
	for i, trust := range [][]string{nil, flags} {
		source := s.peer(t, fmt.Sprintf("instance-%d", i), append([]string{"--netns", "ark0", "--laddr", "localhost:1337"}, trust...)...)
		for range 1000 {
			c, err := net.Dial("tcp", "localhost:1337")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
		}
		for _, command := range []string{"checkpoint", "terminator"} {
			t.Logf("%s", asNobody(t, command, "--raddr", "localhost:1337", "--insecure", "--output", "backup"))
		}
		if err := s.Run(t.Context(), os.Stderr, append([]string{"checkpoint", "--raddr", "localhost:1337", "--output", "backup"}, trust...)...); err != nil {
			t.Errorf("the owner: %v", err)
		}
		end(t, source)
	}
}

// With TLS, only a host with a certificate of the same authority gets the VM. Its metrics say how
// it moved.
func TestTLSAndMetrics(t *testing.T) {
	s := emptySite(t)
	zero, one := s.redisIn(t, "ark0", "127.0.0.1:3333"), s.redisIn(t, "ark1", "127.0.0.1:4444")
	ours, theirs := certificates(t, filepath.Join(s.dir, "ours")), certificates(t, filepath.Join(s.dir, "theirs"))
	source := s.peer(t, "instance-0", append([]string{"--netns", "ark0", "--laddr", "localhost:1337"}, ours...)...)
	if err := zero.Set(t.Context(), "key", "value", 0).Err(); err != nil {
		t.Fatal(err)
	}
	target := func(flags []string) []string {
		return s.peerArgs("instance-1", append([]string{"--netns", "ark1", "--raddr", "localhost:1337", "--metrics", "localhost:9464"}, flags...)...)
	}
	for what, flags := range map[string][]string{"plain": nil, "another authority": theirs, "another's certificate": append(append([]string{}, theirs...), ours[:2]...)} {
		if line := s.fails(t, target(flags)...); !strings.Contains(line, "receive VM") {
			t.Errorf("%s: %s", what, line)
		} else {
			t.Logf("%s: %s", what, line)
		}
	}
	vm := s.start(t, target(ours)...)
	moved(t, source)
	if got, err := one.Get(t.Context(), "key").Result(); err != nil || got != "value" {
		t.Errorf("%q, %v", got, err)
	}
	response, err := http.Get("http://localhost:9464/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.New(strings.NewReader(string(text))).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "drafter_") {
			t.Errorf("metric %s: %s", p.Metric, p.Text)
		}
	}
	for _, want := range []string{
		`drafter_migration_state{state="moved"} 1`, `drafter_migration_downtime_seconds 0\.\d+`, `drafter_migration_wire_bytes \S+`, `drafter_device_size_bytes{device="memory"} 1.073741824e\+09`,
		`drafter_migration_device_pending_bytes{device="memory"} 0`, `drafter_migration_device_transferred_bytes{device="memory",phase="pre-copy"} [1-9]\S+`,
		`drafter_migration_device_saved_bytes{device="disk"} \S+`, `process_resident_memory_bytes`,
	} {
		if !regexp.MustCompile(`(?m)^` + want).Match(text) {
			t.Errorf("no metric %s in:\n%s", want, text)
		}
	}
	end(t, vm)
}
