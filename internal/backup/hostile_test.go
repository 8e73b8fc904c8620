package backup

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/blake3"

	"drafter/internal/block"
	"drafter/internal/bombtest"
	"drafter/internal/need"
	"drafter/s3"
)

// index compresses a header that names size and packs, and then n bytes of zeros.
func index(t testing.TB, size int64, packs uint32, n int64) []byte {
	t.Helper()
	head := binary.LittleEndian.AppendUint32([]byte(indexMagic), 1)
	head = binary.LittleEndian.AppendUint32(head, packs)
	head = binary.LittleEndian.AppendUint64(head, uint64(size))
	return bombtest.Zeros(t, head, n)
}

// A storage cannot make us take more memory than a device of the size that its manifest names
// needs.
func TestHostileIndexes(t *testing.T) {
	const size = 64 << 20 // 1,024 blocks
	for name, c := range map[string]struct {
		index []byte
		want  string
	}{
		"bomb":       {index(t, size, 0, 1<<28), "longer than 45080 bytes: not of the size it must be, which is what 1024 blocks in 0 packs need"},
		"short":      {index(t, size, 0, 1000), "shorter than 45080 bytes"},
		"many packs": {index(t, size, 1<<32-1, 1<<20), "none of this device"},
		"other size": {index(t, size+1, 0, 1024*indexEntry), "none of this device"},
		"no zstd":    {[]byte("an index of nothing"), "index: "},
		"empty":      {nil, "index: "},
	} {
		var err error
		used := bombtest.Allocated(func() {
			_, err = decodeIndex(c.index, manifestDevice{Name: "memory", Size: size, Sum: fmt.Sprintf("%x", blake3.Sum256(c.index))})
		})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if used > 64<<20 {
			t.Errorf("%s: %d bytes of index made us allocate %d MiB", name, len(c.index), used>>20)
		}
	}
}

func TestHostileManifests(t *testing.T) {
	for want, devices := range map[string][]manifestDevice{
		"too large for this host": {{Name: "memory", Size: maxDevice}},
		"is not valid":            {{Name: "memory", Size: 1 << 62}},
		"lists 1001 devices":      make([]manifestDevice, 1001),
	} {
		b, err := json.Marshal(manifest{Format: manifestFormat, Version: 1, Moment: time.Now(), Devices: devices})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeManifest(b, 0); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

// A storage that redirects gets nobody else the session token, and one that answers without end is
// cut off.
func TestHostileStorage(t *testing.T) {
	var asked atomic.Int64
	thief := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer thief.Close()
	t.Setenv("AWS_ACCESS_KEY_ID", "key")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
	t.Setenv("AWS_SESSION_TOKEN", "the-token")
	for name, answer := range map[string]http.HandlerFunc{
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, thief.URL+r.URL.Path, http.StatusTemporaryRedirect)
		},
		"endless list": func(w http.ResponseWriter, _ *http.Request) {
			for n := 0; n < 256; n++ { // MiB
				if _, err := io.WriteString(w, "<ListBucketResult><Contents><Key>"+strings.Repeat("a", 1<<20)); err != nil {
					return
				}
			}
		},
	} {
		server := httptest.NewServer(answer)
		var store *Store
		var err error
		used := bombtest.Allocated(func() {
			store, err = Open(t.Context(), s3.Place{Endpoint: strings.TrimPrefix(server.URL, "http://"), Bucket: "vms"})
		})
		if err == nil {
			t.Errorf("%s: no error", name)
			store.Close()
		} else if strings.Contains(err.Error(), "the-secret") || strings.Contains(err.Error(), "the-token") {
			t.Errorf("%s: %v", name, err)
		}
		if used > 1<<30 {
			t.Errorf("%s: it made us allocate %d MiB", name, used>>20)
		}
		server.CloseClientConnections()
		server.Close()
	}
	if asked.Load() > 0 {
		t.Error("a redirect was followed")
	}
}

// Keys come from a file, or from a program that it names. A file of another's, or open to others,
// is not believed: the program runs as this user.
func TestCredentials(t *testing.T) {
	for _, v := range []string{"AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SECRET_KEY", "MINIO_ROOT_USER", "MINIO_ACCESS_KEY", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_PROFILE"} {
		t.Setenv(v, "")
	}
	home := t.TempDir()
	t.Setenv("HOME", home)
	write := func(path, text string) string {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	keys := write(filepath.Join(t.TempDir(), "keys"), "[default]\naws_access_key_id = one\naws_secret_access_key = two\n")
	ran := filepath.Join(t.TempDir(), "ran")
	script := write(filepath.Join(t.TempDir(), "program"), "#!/bin/sh\ntouch "+ran+"\necho '{\"Version\":1,\"AccessKeyId\":\"one\",\"SecretAccessKey\":\"two\"}'\n")
	if err := os.Chmod(script, 0o700); err != nil {
		t.Fatal(err)
	}
	program := write(filepath.Join(t.TempDir(), "file"), "[default]\ncredential_process = "+script+" now\n")
	for name, file := range map[string]string{"keys": keys, "program": program} {
		creds, err := credentialsOf(s3.Place{Credentials: file})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if v, err := creds.GetWithContext(nil); err != nil || v.AccessKeyID != "one" || v.SecretAccessKey != "two" {
			t.Errorf("%s: %q, %v", name, v.AccessKeyID, err)
		}
	}
	if err := os.Remove(ran); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(program, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := credentialsOf(s3.Place{Credentials: program}); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("open to others: %v", err)
	}
	if _, err := credentialsOf(s3.Place{Credentials: filepath.Join(home, "none")}); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("missing: %v", err)
	}
	if _, err := credentialsOf(s3.Place{}); err == nil || !strings.Contains(err.Error(), "there are no credentials") {
		t.Errorf("none: %v", err)
	}
	need.Root(t)
	own := write(filepath.Join(home, ".aws/credentials"), "[default]\ncredential_process = "+script+" now\n")
	if err := errors.Join(os.Chmod(program, 0o600), os.Chown(program, 65534, -1), os.Chown(own, 65534, -1)); err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]s3.Place{"named": {Credentials: program}, "in the home directory": {}} {
		if _, err := credentialsOf(p); err == nil || !strings.Contains(err.Error(), "belongs to another user") {
			t.Errorf("%s: %v", name, err)
		}
	}
	open := filepath.Join(t.TempDir(), "open")
	inOpen := write(filepath.Join(open, "keys"), "[default]\ncredential_process = "+script+" now\n")
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := credentialsOf(s3.Place{Credentials: inOpen}); err == nil || !strings.Contains(err.Error(), "chmod go-w") {
		t.Errorf("where others can put another one: %v", err)
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("another user's program ran as this one")
	}
	// The caller of sudo is trusted, and a group of their own is the caller.
	t.Setenv("SUDO_UID", "65534")
	if err := errors.Join(os.Chown(program, 65534, 65534), os.Chmod(program, 0o660)); err != nil {
		t.Fatal(err)
	}
	if _, err := credentialsOf(s3.Place{Credentials: program}); err != nil {
		t.Errorf("of who calls sudo: %v", err)
	}
}

func FuzzIndex(f *testing.F) {
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		f.Fatal(err)
	}
	ids := []block.ID{{1}, {}, {2}}
	d := &device{contents: block.NewContents(3*block.ContentBlockSize, ids), where: []location{{uuid.New(), 0, 10}, {}, {uuid.New(), 5, 20}}}
	f.Add(encodeIndex(d, encoder), d.contents.Size, true)
	f.Add([]byte("plain"), int64(1), false)
	f.Fuzz(func(t *testing.T, b []byte, size int64, plain bool) {
		if size < 0 || size > 1<<30 {
			return
		}
		if plain { // what is in the frame is what the decoder is about
			b = encoder.EncodeAll(b, nil)
		}
		got, err := decodeIndex(b, manifestDevice{Size: size, Sum: fmt.Sprintf("%x", blake3.Sum256(b)), Content: d.contents.Device.String()})
		if err == nil && int64(len(got.where)) != block.CountBlocks(size) {
			t.Errorf("%d blocks for %d bytes", len(got.where), size)
		}
	})
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"format":"drafter-devices","version":1,"devices":[{"name":"memory","size":65536}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeManifest(b, 0)
		if err != nil {
			return
		}
		for _, d := range m.Devices {
			if d.Size < 0 || d.Size > maxDevice || d.Name == "" {
				t.Errorf("%q of %d bytes", d.Name, d.Size)
			}
		}
	})
}
