package artifact_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/klauspost/compress/zstd"

	"drafter/internal/artifact"
	"drafter/internal/block"
	"drafter/internal/ocitest"
)

// servers are the registries that the tests run with: the library's, in this process, and
// distribution, if it is on PATH.
func servers(t *testing.T, f func(t *testing.T, host string)) {
	t.Run("in process", func(t *testing.T) {
		s := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
		defer s.Close()
		f(t, strings.TrimPrefix(s.URL, "http://"))
	})
	t.Run("distribution", func(t *testing.T) { f(t, ocitest.Start(t)) })
}

// newPackage makes two devices' files: noise, text and zeros.
func newPackage(t *testing.T, seed byte) ([]artifact.Device, map[string][]byte) {
	t.Helper()
	dir := t.TempDir()
	data := map[string][]byte{}
	var devices []artifact.Device
	for _, name := range []string{"disk", "memory"} {
		p := make([]byte, 20<<20+5000)
		rng := rand.NewChaCha8([32]byte{seed, name[0]})
		for i := 0; i < len(p); i += 3 << 16 {
			_, _ = rng.Read(p[i:min(len(p), i+1<<16)])
			copy(p[min(len(p), i+1<<16):min(len(p), i+2<<16)], bytes.Repeat([]byte("text "), 1<<14))
		}
		clear(p[5<<20 : 11<<20])
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, p, 0o644); err != nil {
			t.Fatal(err)
		}
		data[name] = p
		devices = append(devices, artifact.Device{Name: name, File: path})
	}
	return devices, data
}

func fill(t *testing.T, p *artifact.Package, data map[string][]byte) {
	t.Helper()
	for name, want := range data {
		remote, ok := p.Remote(name)
		if !ok {
			t.Fatalf("there is no device %s", name)
		}
		path := filepath.Join(t.TempDir(), name)
		d, err := block.OpenPulled(t.Context(), path, remote)
		if err != nil {
			t.Fatal(err)
		}
		one := make([]byte, 100)
		if _, err := d.ReadAt(one, 12<<20); err != nil || !bytes.Equal(one, want[12<<20:12<<20+100]) {
			t.Errorf("read of %s: %v", name, err)
		}
		if left := d.Missing(); left < int64(len(want))/3 {
			t.Errorf("after one read only %d bytes of %s are missing", left, name)
		}
		if err := errors.Join(d.Fill(t.Context(), nil), d.Close()); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("device %s differs, or %v", name, err)
		}
	}
}

// A package comes back from a registry as it was, one block as well as all; what the registry has
// is not uploaded again; and who has opened a package goes on with it when its tag is another
// one's.
func TestPushAndOpen(t *testing.T) {
	servers(t, func(t *testing.T, host string) {
		devices, data := newPackage(t, 1)
		ref := "docker://" + host + "/vms/redis:1"
		digest, err := artifact.Push(t.Context(), ref, false, devices, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		again, err := artifact.Push(t.Context(), ref, false, devices, nil, nil)
		if err != nil || again != digest {
			t.Errorf("the same package has another digest: %s, %s, %v", digest, again, err)
		}
		p, err := artifact.Open(t.Context(), ref, false, 0, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if p.Digest != digest {
			t.Errorf("digest %s, pushed %s", p.Digest, digest)
		}
		other, _ := newPackage(t, 2)
		if _, err := artifact.Push(t.Context(), ref, false, other, nil, nil); err != nil {
			t.Fatal(err)
		}
		fill(t, p, data)
		if now, err := artifact.Resolve(t.Context(), ref, false, nil); err != nil || strings.HasSuffix(now, digest.String()) {
			t.Errorf("resolve: %s, %v", now, err)
		}
		byDigest, err := artifact.Open(t.Context(), "docker://"+host+"/vms/redis@"+digest.String(), false, 0, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := byDigest.Close(); err != nil {
			t.Error(err)
		}
	})
}

// A layer is what any zstd program unpacks to the device.
func TestLayerIsTheDevice(t *testing.T) {
	host := ""
	var mu sync.Mutex
	var blobs []string
	handler := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut && r.URL.Query().Get("digest") != "" {
			mu.Lock()
			blobs = append(blobs, r.URL.Query().Get("digest"))
			mu.Unlock()
		}
		handler.ServeHTTP(w, r)
	}))
	defer s.Close()
	host = strings.TrimPrefix(s.URL, "http://")
	devices, data := newPackage(t, 1)
	if _, err := artifact.Push(t.Context(), host+"/vm:1", false, devices[:1], nil, nil); err != nil {
		t.Fatal(err)
	}
	found := false
	for _, digest := range blobs {
		resp, err := http.Get(s.URL + "/v2/vm/blobs/" + digest)
		if err != nil {
			t.Fatal(err)
		}
		r, err := zstd.NewReader(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		_, err = got.ReadFrom(r)
		found = found || err == nil && bytes.Equal(got.Bytes(), data["disk"])
		r.Close()
		resp.Body.Close()
	}
	if !found {
		t.Error("no layer unpacks to the disk")
	}
}

// A registry that fails now and then, or forgets a layer, gives no other bytes: the former is tried
// again, the latter an error.
func TestFaults(t *testing.T) {
	handler := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	var fault atomic.Value // of a func(*http.Request) int: a status, 1 to cut the connection, or 2 not to know ranges
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f := fault.Load(); f != nil {
			switch code := f.(func(*http.Request) int)(r); {
			case code == 1:
				panic(http.ErrAbortHandler)
			case code == 2:
				r.Header.Del("Range")
			case code > 0:
				http.Error(w, "no", code)
				return
			}
		}
		handler.ServeHTTP(w, r)
	}))
	defer s.Close()
	ref := strings.TrimPrefix(s.URL, "http://") + "/vm:1"
	devices, data := newPackage(t, 1)
	if _, err := artifact.Push(t.Context(), ref, false, devices, nil, nil); err != nil {
		t.Fatal(err)
	}
	p, err := artifact.Open(t.Context(), ref, false, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	var n atomic.Int64
	fault.Store(func(*http.Request) int { return []int{0, 1, 0, 503, 0, 429, 0, 2}[n.Add(1)%8] })
	fill(t, p, data)
	fault.Store(func(*http.Request) int { return http.StatusNotFound })
	remote, _ := p.Remote("memory")
	d, err := block.OpenPulled(t.Context(), filepath.Join(t.TempDir(), "memory"), remote)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := d.ReadAt(make([]byte, 1), 0); !errors.Is(err, block.ErrReplaced) {
		t.Errorf("a layer that is gone: %v", err)
	}
}

// What is no package is refused, and so are wrong credentials, in one line.
func TestRefused(t *testing.T) {
	home := t.TempDir()
	t.Setenv("DOCKER_CONFIG", home)
	devices, data := newPackage(t, 1)
	s := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	defer s.Close()
	host := strings.TrimPrefix(s.URL, "http://")
	for ref, want := range map[string]string{
		host + "/none:1":   "MANIFEST_UNKNOWN",
		"localhost:1/vm:1": "connection refused",
		"docker://A B":     "is no reference like",
	} {
		if _, err := artifact.Open(t.Context(), ref, false, 0, nil); err == nil || !strings.Contains(err.Error(), want) && !strings.Contains(err.Error(), "NAME_UNKNOWN") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if _, err := artifact.Push(t.Context(), host+"/vm:1", false, []artifact.Device{{Name: "disk", File: "nowhere"}}, nil, nil); err == nil || !strings.Contains(err.Error(), "nowhere") {
		t.Errorf("a device without a file: %v", err)
	}

	handler := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	guarded := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "someone" || password != "the password" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		handler.ServeHTTP(w, r)
	}))
	defer guarded.Close()
	host = strings.TrimPrefix(guarded.URL, "http://")
	login := func(password string) {
		auth := base64.StdEncoding.EncodeToString([]byte("someone:" + password))
		if err := os.WriteFile(filepath.Join(home, "config.json"), fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, host, auth), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, password := range []string{"", "a wrong password"} {
		if password != "" {
			login(password)
		}
		if _, err := artifact.Push(t.Context(), host+"/vm:1", false, devices, nil, nil); err == nil || !strings.Contains(err.Error(), "docker login") || strings.Contains(err.Error(), "wrong password") {
			t.Errorf("push with password %q: %v", password, err)
		}
	}
	login("the password")
	if _, err := artifact.Push(t.Context(), host+"/vm:1", false, devices, nil, nil); err != nil {
		t.Fatal(err)
	}
	p, err := artifact.Open(t.Context(), host+"/vm:1", false, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	fill(t, p, data)
}
