package signature_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/internal/need"
	"drafter/signature"
)

// openssl runs it, or skips the test where it is not installed.
func openssl(t *testing.T, args ...string) []byte {
	t.Helper()
	need.Program(t, "openssl")
	out, err := exec.Command("openssl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// newKey makes a pair of keys with openssl and returns their files.
func newKey(t *testing.T, algorithm ...string) (private, public string) {
	t.Helper()
	dir := t.TempDir()
	private, public = filepath.Join(dir, "key.pem"), filepath.Join(dir, "key.pub")
	openssl(t, append(append([]string{"genpkey", "-algorithm"}, algorithm...), "-out", private)...)
	openssl(t, "pkey", "-in", private, "-pubout", "-out", public)
	return private, public
}

var (
	ed25519 = []string{"ed25519"}
	ecdsa   = []string{"EC", "-pkeyopt", "ec_paramgen_curve:P-256"}
)

func contents() map[string]signature.Device {
	devices := map[string]signature.Device{}
	for name, b := range map[string][]byte{"config": []byte(`{"version":1}`), "memory": bytes.Repeat([]byte("memory"), 100_000), "disk": make([]byte, 1<<20)} {
		devices[name] = device(name, b)
	}
	return devices
}

func device(name string, b []byte) signature.Device {
	c := block.HashBytes(b)
	return signature.Device{Name: name, Size: c.Size, Content: c.Device.String()}
}

func sign(t *testing.T, private string, contents map[string]signature.Device) []byte {
	t.Helper()
	key, err := signature.ReadPrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	envelope, err := signature.Sign(signature.NewStatement(slices.Collect(maps.Values(contents))), key)
	if err != nil {
		t.Fatal(err)
	}
	return envelope
}

func verifier(t *testing.T, keys ...string) *signature.Verifier {
	t.Helper()
	v, err := signature.NewVerifier(keys, "")
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func refusedWith(t *testing.T, what string, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
		t.Errorf("%s: %v, want one line with %q", what, err, want)
	}
}

// What was signed is accepted with its key, also among others, and openssl comes to the same result
// from the envelope alone.
func TestSignAndVerify(t *testing.T) {
	for name, tt := range map[string]struct{ algorithm, verify []string }{
		"ed25519": {ed25519, []string{"-rawin"}},
		"ecdsa":   {ecdsa, []string{"-rawin", "-digest", "sha256"}},
	} {
		t.Run(name, func(t *testing.T) {
			private, public := newKey(t, tt.algorithm...)
			_, other := newKey(t, ed25519...)
			envelope := sign(t, private, contents())
			both := filepath.Join(t.TempDir(), "both.pub")
			var keys []byte
			for _, file := range []string{other, public} {
				b, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				keys = append(keys, b...)
			}
			if err := os.WriteFile(both, keys, 0o644); err != nil {
				t.Fatal(err)
			}
			for _, files := range [][]string{{public}, {other, public}, {both}} {
				s, err := verifier(t, files...).Statement(envelope, "")
				if err != nil {
					t.Fatal(err)
				}
				for _, d := range contents() {
					if err := s.Check(d); err != nil {
						t.Error(err)
					}
				}
				if err := s.CheckNames([]string{"memory", "config", "disk"}); err != nil {
					t.Error(err)
				}
			}
			_, err := verifier(t, other).Statement(envelope, "")
			refusedWith(t, "another key", err, "none of the keys")

			var e struct {
				PayloadType, Payload string
				Signatures           []struct{ Sig string }
			}
			if err := json.Unmarshal(envelope, &e); err != nil {
				t.Fatal(err)
			}
			payload, err := base64.StdEncoding.DecodeString(e.Payload)
			if err != nil {
				t.Fatal(err)
			}
			sig, err := base64.StdEncoding.DecodeString(e.Signatures[0].Sig)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			signed, raw := filepath.Join(dir, "signed"), filepath.Join(dir, "signature")
			if err := os.WriteFile(signed, fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(e.PayloadType), e.PayloadType, len(payload), payload), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(raw, sig, 0o644); err != nil {
				t.Fatal(err)
			}
			openssl(t, append([]string{"pkeyutl", "-verify", "-pubin", "-inkey", public, "-in", signed, "-sigfile", raw}, tt.verify...)...)
		})
	}
}

// A package that is not just what was signed is refused, whatever differs.
func TestOtherPackage(t *testing.T) {
	private, public := newKey(t, ed25519...)
	s, err := verifier(t, public).Statement(sign(t, private, contents()), "")
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Repeat([]byte("memory"), 100_000)
	changed[70_000] ^= 1
	for what, b := range map[string][]byte{
		"a changed byte": changed, "a cut device": changed[:70_000], "a longer device": append(bytes.Repeat([]byte("memory"), 100_000), 0),
		"another device": make([]byte, 1<<20), "nothing": nil,
	} {
		refusedWith(t, what, s.Check(device("memory", b)), "device memory is not what was signed")
	}
	refusedWith(t, "a device more", s.Check(device("extra", make([]byte, 1<<20))), "device extra is not part")
	refusedWith(t, "a device more", s.CheckNames([]string{"config", "memory", "disk", "extra"}), "device extra is not part")
	refusedWith(t, "a device less", s.CheckNames([]string{"config", "memory"}), "device disk of the package that was signed is missing")
}

// Whatever is done to an envelope, it is not accepted.
func TestForgedEnvelopes(t *testing.T) {
	private, public := newKey(t, ed25519...)
	v := verifier(t, public)
	good := string(sign(t, private, contents()))
	var e map[string]any
	if err := json.Unmarshal([]byte(good), &e); err != nil {
		t.Fatal(err)
	}
	with := func(changes ...any) string {
		forged := map[string]any{}
		for k, v := range e {
			forged[k] = v
		}
		for i := 0; i < len(changes); i += 2 {
			forged[changes[i].(string)] = changes[i+1]
		}
		b, err := json.Marshal(forged)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	other := contents()
	other["disk"] = device("disk", []byte("another disk"))
	stranger, _ := newKey(t, ed25519...)
	var foreign map[string]any
	if err := json.Unmarshal(sign(t, stranger, other), &foreign); err != nil {
		t.Fatal(err)
	}
	many := make([]any, 17)
	for i := range many {
		many[i] = e["signatures"].([]any)[0]
	}
	for what, tt := range map[string]struct{ envelope, want string }{
		"no signatures":         {with("signatures", []any{}), "0 signatures"},
		"null signatures":       {with("signatures", nil), "0 signatures"},
		"an empty signature":    {with("signatures", []any{map[string]string{"sig": ""}}), "none of the keys"},
		"too many signatures":   {with("signatures", many), "17 signatures"},
		"a stranger's":          {with("payload", foreign["payload"], "signatures", foreign["signatures"]), "none of the keys"},
		"another statement":     {with("payload", foreign["payload"]), "none of the keys"},
		"another type":          {with("payloadType", "application/vnd.in-toto+json"), "something else"},
		"an algorithm":          {with("alg", "none"), "unknown field"},
		"a second value":        {good + "{}", "something follows"},
		"nothing":               {"", "no signature of a package"},
		"no JSON":               {"untrusted comment", "no signature of a package"},
		"a huge one":            {good + strings.Repeat(" ", signature.MaxSize), "longer than"},
		"a key id of the key":   {with("signatures", []any{map[string]any{"keyid": e["signatures"].([]any)[0].(map[string]any)["keyid"], "sig": foreign["signatures"].([]any)[0].(map[string]any)["sig"]}}), "none of the keys"},
		"a signature that lies": {with("signatures", []any{map[string]any{"sig": 7}}), "no signature of a package"},
	} {
		_, err := v.Statement([]byte(tt.envelope), "")
		refusedWith(t, what, err, tt.want)
	}
	_, err := v.Statement(nil, "")
	refusedWith(t, "no envelope", err, "no signature")
}

// A statement that is signed is read strictly all the same.
func TestStatements(t *testing.T) {
	private, public := newKey(t, ed25519...)
	key, err := signature.ReadPrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	one, two := signature.Device{Name: "a", Size: 1}, signature.Device{Name: "b", Size: 1}
	for want, s := range map[string]*signature.Statement{
		"version 2":    {Version: 2, Devices: []signature.Device{one}},
		"no devices":   {Version: 1},
		"twice":        {Version: 1, Devices: []signature.Device{one, one}},
		"not in order": {Version: 1, Devices: []signature.Device{two, one}},
	} {
		envelope, err := signature.Sign(s, key)
		if err != nil {
			t.Fatal(err)
		}
		_, err = verifier(t, public).Statement(envelope, "")
		refusedWith(t, want, err, want)
	}
}

// What is no key, or one of a weaker kind, is refused instead of being passed over.
func TestKeys(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	private, public := newKey(t, ed25519...)
	good, err := os.ReadFile(public)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := os.ReadFile(private)
	if err != nil {
		t.Fatal(err)
	}
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(weak.Public())
	if err != nil {
		t.Fatal(err)
	}
	_, p384 := newKey(t, "EC", "-pkeyopt", "ec_paramgen_curve:P-384")
	for path, want := range map[string]string{
		write("empty", ""):                          "is empty",
		write("blank", "\n\n"):                      "is empty",
		write("text", "no key"):                     "something else than public keys",
		write("before", "a comment\n"+string(good)): "something else than public keys",
		write("after", string(good)+"a comment"):    "something else than public keys",
		write("private", string(secret)):            "something else than public keys",
		write("broken", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):                       "asn1",
		write("rsa", string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))):                  "neither Ed25519 nor ECDSA on P-256",
		write("and rsa", string(good)+string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))): "neither Ed25519 nor ECDSA on P-256",
		p384:                          "neither Ed25519 nor ECDSA on P-256",
		dir:                           "no regular file",
		"":                            "no such file",
		filepath.Join(dir, "nowhere"): "no such file",
		write("huge", strings.Repeat(" ", 1<<20)): "longer than",
	} {
		_, err := signature.NewVerifier([]string{public, path}, "")
		refusedWith(t, path, err, want)
	}
	if _, err := signature.NewVerifier(nil, ""); err == nil {
		t.Error("no key at all is accepted")
	}
	for path, want := range map[string]string{public: "not one private key", write("two", string(secret)+string(secret)): "not one private key", p384: "not one private key"} {
		_, err := signature.ReadPrivateKey(path)
		refusedWith(t, path, err, want)
	}
}

// A signature's file is a regular file: a link would let a stranger's package name a file of the
// host, which would then be handed out with it.
func TestSignatureFile(t *testing.T) {
	private, _ := newKey(t, ed25519...)
	envelope := sign(t, private, contents())
	for what, tt := range map[string]struct {
		make func(path string) error
		want string
	}{
		"a link": {func(path string) error {
			if err := os.WriteFile(path+".target", envelope, 0o600); err != nil {
				return err
			}
			return os.Symlink(path+".target", path)
		}, "too many levels"},
		"a FIFO":      {func(path string) error { return unix.Mkfifo(path, 0o600) }, "no regular file"},
		"a directory": {func(path string) error { return os.Mkdir(path, 0o700) }, "no regular file"},
		"a huge file": {func(path string) error {
			if err := os.WriteFile(path, envelope, 0o600); err != nil {
				return err
			}
			return os.Truncate(path, 1<<40)
		}, "longer than"},
		"something else": {func(path string) error { return os.WriteFile(path, []byte("root:x:0:0"), 0o600) }, "no signature of a package"},
	} {
		dir := t.TempDir()
		if err := tt.make(filepath.Join(dir, signature.File)); err != nil {
			t.Fatal(err)
		}
		_, err := signature.Beside(filepath.Join(dir, "config.json"))
		refusedWith(t, what, err, tt.want)
		if err != nil && strings.Contains(err.Error(), "root:x") {
			t.Errorf("%s: the error tells what is in the file: %v", what, err)
		}
	}
	if b, err := signature.Beside(filepath.Join(t.TempDir(), "config.json")); b != nil || err != nil {
		t.Errorf("no file: %q, %v", b, err)
	}
}

// Whatever bytes come, an envelope is accepted or refused, and nothing worse.
func FuzzStatement(f *testing.F) {
	dir := f.TempDir()
	public := filepath.Join(dir, "key.pub")
	// The key of RFC 8032, section 7.1, test 1.
	if err := os.WriteFile(public, []byte("-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n-----END PUBLIC KEY-----\n"), 0o600); err != nil {
		f.Fatal(err)
	}
	v, err := signature.NewVerifier([]string{public}, "")
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{"payloadType":"` + signature.PayloadType + `","payload":"e30=","signatures":[{"keyid":"","sig":"AAAA"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := v.Statement(b, ""); err == nil {
			t.Errorf("accepted: %v", s)
		}
	})
}
