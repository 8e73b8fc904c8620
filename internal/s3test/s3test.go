// Package s3test runs a real S3 server, versitygw, for tests, behind a proxy that fails as a test
// tells it.
package s3test

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"drafter/internal/need"
	"drafter/s3"
)

// Keys of the server.
const (
	AccessKey = "test-access"
	SecretKey = "test-secret-of-the-server"
)

// Server is a running server with a bucket.
type Server struct {
	Endpoint string // of the proxy
	Bucket   string
	Dir      string // of the bucket's objects, as files

	mu       sync.Mutex
	fault    Fault
	requests []string // methods and paths, since the last Requests
}

// Fault decides about a request before it reaches the server. What it returns is done: "" to pass
// it on, "cut" to close the connection, "lost" to close it after the server has answered, "slow" to
// answer after a while, "hanging" never to, "accepted" to say that a write was done, "whole" to
// answer as if no part had been asked for, "skewed" as a storage whose clock is an hour ahead, or a
// status code that the storage would answer with.
type Fault func(r *http.Request) string

// All is a fault of every request.
func All(what string) Fault { return func(*http.Request) string { return what } }

// Refuse is a fault of writes that depend on what is there.
func Refuse(what string) Fault {
	return func(r *http.Request) string {
		if r.Method == http.MethodPut && (r.Header.Get("If-Match") != "" || r.Header.Get("If-None-Match") != "") {
			return what
		}
		return ""
	}
}

// Program finds versitygw, or skips the test loudly.
func Program(t testing.TB) string {
	t.Helper()
	return need.Program(t, "versitygw")
}

// Start runs a server until the test ends.
func Start(t testing.TB) *Server {
	t.Helper()
	program := Program(t)
	dir := t.TempDir()
	s := &Server{Bucket: "vms", Dir: filepath.Join(dir, "vms")}
	if err := os.Mkdir(s.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	backend := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "--port", backend, "--quiet", "posix", dir)
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+AccessKey, "ROOT_SECRET_KEY="+SecretKey)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var output strings.Builder
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // by that
	})
	s.await(t, backend, &output)
	s.proxy(t, backend)
	return s
}

func (s *Server) await(t testing.TB, addr string, output *strings.Builder) {
	t.Helper()
	for range 200 {
		c, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", addr)
		if err == nil {
			_ = c.Close() // nothing was sent
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("versitygw does not listen: %s", output)
}

// proxy passes requests on, unless the fault says otherwise.
func (s *Server) proxy(t testing.TB, backend string) {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.Endpoint = l.Addr().String()
	forward := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			host := r.In.Host
			r.SetURL(&url.URL{Scheme: "http", Host: backend})
			r.Out.Host = host // it is signed
		},
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		fault := s.fault
		s.requests = append(s.requests, r.Method+" "+strings.TrimPrefix(r.URL.Path, "/"+s.Bucket+"/"))
		s.mu.Unlock()
		what := ""
		if fault != nil {
			what = fault(r)
		}
		switch what {
		case "":
			forward.ServeHTTP(w, r)
		case "cut":
			panic(http.ErrAbortHandler)
		case "lost":
			forward.ServeHTTP(discard{http.Header{}}, r)
			panic(http.ErrAbortHandler)
		case "slow":
			time.Sleep(500 * time.Millisecond)
			forward.ServeHTTP(w, r)
		case "hanging":
			_, _ = io.Copy(io.Discard, r.Body) // the end of a connection is seen only behind it
			<-r.Context().Done()
			panic(http.ErrAbortHandler)
		case "accepted":
			w.Header().Set("ETag", `"0123456789abcdef0123456789abcdef"`)
		case "whole":
			forward.ServeHTTP(whole{w}, r)
		case "skewed":
			w.Header().Set("Date", time.Now().Add(time.Hour).UTC().Format(http.TimeFormat))
			http.Error(w, "<Error><Code>RequestTimeTooSkewed</Code></Error>", http.StatusForbidden)
		case "501":
			http.Error(w, "<Error><Code>NotImplemented</Code></Error>", http.StatusNotImplemented)
		case "429":
			http.Error(w, "<Error><Code>SlowDown</Code></Error>", http.StatusTooManyRequests)
		case "503":
			http.Error(w, "<Error><Code>SlowDown</Code></Error>", http.StatusServiceUnavailable)
		default:
			http.Error(w, "<Error><Code>InternalError</Code></Error>", http.StatusInternalServerError)
		}
	})}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(l) // until it is closed
	}()
	t.Cleanup(func() {
		_ = server.Close() // what it was doing is of no interest
		<-served
	})
}

// discard is an answer that gets lost.
type discard struct{ header http.Header }

func (d discard) Header() http.Header         { return d.header }
func (d discard) Write(p []byte) (int, error) { return len(p), nil }
func (d discard) WriteHeader(int)             {}

// whole is an answer that hides that it is a part.
type whole struct{ http.ResponseWriter }

func (w whole) WriteHeader(status int) {
	if status == http.StatusPartialContent {
		w.Header().Del("Content-Range")
		status = http.StatusOK
	}
	w.ResponseWriter.WriteHeader(status)
}

// Fail sets what becomes of requests from now on; nil for none.
func (s *Server) Fail(f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// Requests returns what was asked since the last call.
func (s *Server) Requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.requests
	s.requests = nil
	return r
}

// Place is one in the server's bucket.
func (s *Server) Place(prefix string) s3.Place {
	return s3.Place{Endpoint: s.Endpoint, Bucket: s.Bucket, Prefix: prefix, AccessKey: AccessKey, SecretKey: SecretKey}
}
