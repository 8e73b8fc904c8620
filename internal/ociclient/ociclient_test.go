package ociclient

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// recorder is a server that notes what it is given. It answers like a token service.
type recorder struct {
	*httptest.Server
	mu   sync.Mutex
	seen []string // Authorization headers and bodies
}

func record(t *testing.T, next http.Handler) *recorder {
	t.Helper()
	r := &recorder{}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		form := ""
		if strings.HasPrefix(req.Header.Get("Content-Type"), "application/x-www-form") {
			b, _ := io.ReadAll(req.Body) // what has come of it
			form = string(b)
		}
		r.mu.Lock()
		r.seen = append(r.seen, req.Header.Get("Authorization")+form)
		r.mu.Unlock()
		if next != nil && !strings.HasPrefix(req.URL.Path, "/token") {
			next.ServeHTTP(w, req)
			return
		}
		fmt.Fprint(w, `{"token":"a-token"}`)
	}))
	t.Cleanup(r.Close)
	return r
}

// holds tells whether any of some words was seen.
func (r *recorder) holds(words ...string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.seen {
		for _, w := range words {
			if strings.Contains(s, w) {
				return true
			}
		}
	}
	return false
}

func (r *recorder) requests() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.seen)
}

// at is a server's HOST:PORT by the name localhost, which the library takes to be no loopback
// address.
func (r *recorder) at() string { return strings.Replace(r.URL, "127.0.0.1", "localhost", 1) }

const password = "the-password"

// login makes docker's config for a registry.
func login(t *testing.T, host, entry string) {
	t.Helper()
	home := t.TempDir()
	t.Setenv("DOCKER_CONFIG", home)
	if err := os.WriteFile(filepath.Join(home, "config.json"), fmt.Appendf(nil, `{"auths":{%q:{%s}}}`, host, entry), 0o600); err != nil {
		t.Fatal(err)
	}
}

func basic() string {
	return base64.StdEncoding.EncodeToString([]byte("someone:" + password))
}

// guarded is a registry that wants a bearer token of the service at realm, and sends those who ask
// for a blob to elsewhere, if that is given.
func guarded(t *testing.T, realm func(self string) string, elsewhere string) *recorder {
	t.Helper()
	store := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	var r *recorder
	r = record(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		switch {
		case req.Header.Get("Authorization") != "Bearer a-token":
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="test"`, realm(r.URL)))
			w.WriteHeader(http.StatusUnauthorized)
		case elsewhere != "" && req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/"):
			http.Redirect(w, req, elsewhere+req.URL.Path, http.StatusTemporaryRedirect)
		default:
			store.ServeHTTP(w, req)
		}
	}))
	return r
}

func push(t *testing.T, r *recorder) (name.Reference, error) {
	t.Helper()
	ref, err := Parse(strings.TrimPrefix(r.URL, "http://")+"/vm:1", false)
	if err != nil {
		t.Fatal(err)
	}
	image, err := random.Image(1000, 1)
	if err != nil {
		t.Fatal(err)
	}
	return ref, remote.Write(ref, image, Options(t.Context(), ref.Context().Registry, false, nil)...)
}

// The token service on the registry's own host gets the credentials; one elsewhere, over plain
// HTTP, is asked without them.
func TestRealm(t *testing.T) {
	own := guarded(t, func(self string) string { return self + "/token" }, "")
	login(t, strings.TrimPrefix(own.URL, "http://"), fmt.Sprintf(`"auth":%q`, basic()))
	if _, err := push(t, own); err != nil {
		t.Fatal(err)
	}
	if !own.holds(basic()) {
		t.Error("the registry's own token service did not get the credentials")
	}

	thief := record(t, nil)
	hostile := guarded(t, func(string) string { return thief.at() + "/token" }, "")
	login(t, strings.TrimPrefix(hostile.URL, "http://"), fmt.Sprintf(`"auth":%q`, basic()))
	if _, err := push(t, hostile); err != nil { // what is open to everybody stays so
		t.Fatal(err)
	}
	if thief.requests() == 0 || thief.holds(basic(), password) {
		t.Errorf("a token service elsewhere was given %q", thief.seen)
	}
}

// A refresh token goes in a request's body: that is not sent at all.
func TestRefreshToken(t *testing.T) {
	thief := record(t, nil)
	hostile := guarded(t, func(string) string { return thief.at() + "/token" }, "")
	login(t, strings.TrimPrefix(hostile.URL, "http://"), fmt.Sprintf(`"identitytoken":%q`, password))
	if _, err := push(t, hostile); err == nil || !strings.Contains(err.Error(), "which is refused") || strings.Contains(err.Error(), password) {
		t.Errorf("error is %v", err)
	}
	if thief.holds(password) {
		t.Errorf("a token service elsewhere was given %q", thief.seen)
	}
}

// Where a blob really is gets no credentials, neither password nor token.
func TestRedirect(t *testing.T) {
	thief := record(t, nil)
	r := guarded(t, func(self string) string { return self + "/token" }, thief.at())
	login(t, strings.TrimPrefix(r.URL, "http://"), fmt.Sprintf(`"auth":%q`, basic()))
	ref, err := push(t, r)
	if err != nil {
		t.Fatal(err)
	}
	image, err := remote.Image(ref, Options(t.Context(), ref.Context().Registry, false, nil)...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := image.ConfigFile(); err == nil {
		t.Error("what is no config was taken for one")
	}
	if thief.requests() == 0 || thief.holds(basic(), "a-token", "Bearer", "Basic") {
		t.Errorf("another host was given %q", thief.seen)
	}
}

// roundTripper answers requests, and notes them.
type roundTripper struct{ got []*http.Request }

func (r *roundTripper) RoundTrip(req *http.Request) (*http.Response, error) {
	r.got = append(r.got, req)
	return nil, errors.New("it was sent")
}

func TestGuard(t *testing.T) {
	for _, c := range []struct {
		host        string
		plain       bool
		url         string
		sent, creds bool
	}{
		{"reg.example.com", false, "https://reg.example.com/v2/", true, true},
		{"reg.example.com", false, "https://REG.example.com:443/v2/", true, true},
		{"reg.example.com", false, "https://auth.example.com/token", true, true},
		{"reg.example.com:5000", false, "https://reg.example.com:5001/token", true, true},
		{"index.docker.io", false, "https://auth.docker.io/token", true, true},
		{"reg.example.com", false, "https://example.org/token", true, false},
		{"reg.example.com", false, "https://reg.example.com.evil.org/token", true, false},
		{"one.github.io", false, "https://two.github.io/token", true, false},
		{"reg.co.uk", false, "https://evil.co.uk/token", true, false},
		{"10.1.2.3", false, "https://10.9.2.3/token", true, false},
		{"[fd00::1]:5000", false, "https://[fd00::1]:5000/token", true, true},
		{"[fd00::1]:5000", false, "https://[fd00::2]:5000/token", true, false},
		{"reg.example.com", false, "http://reg.example.com/v2/", false, false},
		{"reg.example.com", false, "http://auth.example.com/token", false, false},
		{"10.1.2.3:5000", false, "http://10.1.2.3:5000/v2/", false, false},
		{"reg.local", false, "http://reg.local/v2/", false, false},
		{"reg.example.com", true, "http://reg.example.com/v2/", true, true},
		{"reg.example.com", true, "http://reg.example.com:81/token", true, false},
		{"reg.example.com", true, "http://auth.example.com/token", true, false},
		{"reg.example.com", true, "https://auth.example.com/token", true, true},
		{"127.0.0.1:5000", false, "http://127.0.0.1:5000/v2/", true, true},
		{"127.0.0.1:5000", false, "http://127.0.0.1:5001/token", true, false},
		{"localhost:5000", false, "http://localhost:5000/v2/", true, true},
	} {
		registry, err := name.NewRegistry(c.host, name.StrictValidation)
		if err != nil {
			t.Fatal(err)
		}
		base := &roundTripper{}
		u, err := url.Parse(c.url)
		if err != nil {
			t.Fatal(err)
		}
		req := &http.Request{Method: http.MethodGet, URL: u, Header: http.Header{"Authorization": {"Basic " + basic()}}}
		_, err = Transport(base, registry, c.plain, nil).RoundTrip(req) //nolint:bodyclose // there is none
		sent := len(base.got) == 1
		if sent != c.sent || sent && (base.got[0].Header.Get("Authorization") != "") != c.creds {
			t.Errorf("%+v: sent %v, %v", c, sent, err)
		}
		if req.Header.Get("Authorization") == "" {
			t.Errorf("%+v: the caller's request was changed", c)
		}
	}
}
