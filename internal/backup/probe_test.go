package backup_test

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"drafter/internal/backup"
	"drafter/internal/s3test"
	"drafter/s3"
)

// conditional tells whether a request is a write with that condition.
func conditional(r *http.Request, header string) bool {
	return r.Method == http.MethodPut && r.Header.Get(header) != ""
}

// What a storage cannot do is found before anything is uploaded, and said as what it is.
func TestUnfitStorages(t *testing.T) {
	t.Parallel()
	server := s3test.Start(t)
	writes := 0
	for name, c := range map[string]struct {
		fault s3test.Fault
		says  []string
	}{
		"without conditional writes": {func(r *http.Request) string {
			if conditional(r, "If-None-Match") || conditional(r, "If-Match") {
				return "501"
			}
			return ""
		}, []string{"conditional writes", "501", "use one that has them"}},
		"without those on what is there": {func(r *http.Request) string {
			if conditional(r, "If-Match") {
				return "501"
			}
			return ""
		}, []string{"conditional writes (If-Match)", "501"}},
		"that ignores If-None-Match": {func(r *http.Request) string {
			if conditional(r, "If-None-Match") {
				if writes++; writes > 1 {
					return "accepted"
				}
			}
			return ""
		}, []string{"ignores the condition of a write (If-None-Match)"}},
		"that ignores If-Match": {func(r *http.Request) string {
			if conditional(r, "If-Match") {
				return "accepted"
			}
			return ""
		}, []string{"ignores the condition of a write (If-Match)"}},
		"without ranges": {func(r *http.Request) string {
			if r.Header.Get("Range") != "" {
				return "whole"
			}
			return ""
		}, []string{"whole objects", "Range"}},
	} {
		t.Run(name, func(t *testing.T) {
			store := open(t, server.Place("unfit"))
			server.Fail(c.fault)
			defer server.Fail(nil)
			start := time.Now()
			_, err := store.NewWriter(t.Context(), slog.Default())
			if !errors.Is(err, s3.ErrUnfit) {
				t.Fatalf("%v", err)
			}
			for _, word := range c.says {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("%q is not in: %v", word, err)
				}
			}
			if strings.Contains(err.Error(), "not known") || strings.ContainsRune(err.Error(), '\n') {
				t.Errorf("it is told as something else: %v", err)
			}
			t.Logf("%s: %v", time.Since(start).Round(time.Millisecond), err)
			if left, err := filepath.Glob(filepath.Join(server.Dir, "unfit", "*", "*")); err != nil || len(left) > 0 {
				t.Errorf("left there: %v, %v", left, err)
			}
		})
	}
}

// A storage that is away is told from one that refuses.
func TestAway(t *testing.T) {
	t.Parallel()
	server := s3test.Start(t)
	for fault, away := range map[string]bool{"cut": true, "503": true, "skewed": false} {
		server.Fail(func(*http.Request) string { return fault })
		_, err := backup.Open(t.Context(), server.Place("away"))
		if err == nil || errors.Is(err, s3.ErrAway) != away {
			t.Errorf("%s: %v", fault, err)
		}
		if fault == "skewed" && (!strings.Contains(err.Error(), "the clocks of this host") || !strings.Contains(err.Error(), "differ by") || strings.Contains(err.Error(), "credentials")) {
			t.Errorf("a clock that is wrong: %v", err)
		}
	}
	server.Fail(nil)
	place := server.Place("away")
	place.SecretKey = "another"
	if _, err := backup.Open(t.Context(), place); err == nil || errors.Is(err, s3.ErrAway) || !strings.Contains(err.Error(), "refuses the credentials") {
		t.Errorf("wrong keys: %v", err)
	}
}

// A container's credentials come from where it was told, if that is a place for secrets.
func TestContainerCredentials(t *testing.T) {
	server := s3test.Start(t)
	provider := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "token-of-the-container" {
			http.Error(w, "who are you", http.StatusUnauthorized)
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"AccessKeyId": s3test.AccessKey, "SecretAccessKey": s3test.SecretKey, "Token": "", "Expiration": time.Now().Add(time.Hour)})
	}))
	defer provider.Close()
	defer http.DefaultClient.CloseIdleConnections()
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("token-of-the-container"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", t.TempDir())
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MINIO_ACCESS_KEY", "MINIO_SECRET_KEY", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"} {
		t.Setenv(name, "")
	}
	place := server.Place("container")
	place.AccessKey, place.SecretKey = "", ""
	t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", provider.URL+"/v1/credentials")
	for _, variable := range [][2]string{{"AWS_CONTAINER_AUTHORIZATION_TOKEN", "token-of-the-container"}, {"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", token}} {
		t.Run(variable[0], func(t *testing.T) {
			t.Setenv(variable[0], variable[1])
			if s, err := backup.Open(t.Context(), place); err != nil {
				t.Error(err)
			} else {
				s.Close()
			}
		})
	}
	for variable, uris := range map[string][]string{
		"AWS_CONTAINER_CREDENTIALS_FULL_URI":     {"http://192.0.2.1/credentials", "http://credentials.example.com/", "file:///etc/shadow", "http://169.254.169.254/latest", "http://", "://"},
		"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": {".example.com/", "@192.0.2.1/"},
	} {
		for _, uri := range uris {
			t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "")
			t.Setenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "")
			t.Setenv(variable, uri)
			if _, err := backup.Open(t.Context(), place); err == nil || !strings.Contains(err.Error(), variable) {
				t.Errorf("%s=%s: %v", variable, uri, err)
			}
		}
	}
}

// A name that no bucket can have is refused: it is no storage that may come back.
func TestBucketName(t *testing.T) {
	for _, bucket := range []string{"b", "a..b", "under/bucket", strings.Repeat("b", 64)} {
		_, err := backup.Open(t.Context(), s3.Place{Endpoint: "localhost:1", Bucket: bucket})
		if err == nil || errors.Is(err, s3.ErrAway) || !strings.Contains(err.Error(), "s3bucket") {
			t.Errorf("bucket %.20q: %v", bucket, err)
		}
	}
}
