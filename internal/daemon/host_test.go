package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"drafter/api"
	"drafter/client"
)

// neighbour opens a daemon that other hosts can reach.
func neighbour(t *testing.T, name string) *Daemon {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := testConfig(testDir(t))
	c.Name, c.Listen = name, l.Addr().String()
	d, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: d.HostHandler(), ReadHeaderTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0)}
	go s.Serve(tls.NewListener(l, d.TLS()))
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), d.Close()); err != nil {
			t.Error(err)
		}
	})
	return d
}

// Hosts get to know each other's keys by a token, which holds once, for a while, and for the host that
// has made it.
func TestHosts(t *testing.T) {
	d1, d2 := neighbour(t, "one"), neighbour(t, "two")
	add := func(token string) error {
		_, err := d1.AddHost(t.Context(), api.AddHost{Name: "two", Address: d2.config.Listen, Token: token})
		return err
	}
	if err := add("none"); !errors.Is(err, ErrInvalid) {
		t.Error("no token:", err)
	}
	other, err := d1.Token()
	if err != nil {
		t.Fatal(err)
	}
	if err := add(other.Token); err == nil || !strings.Contains(err.Error(), "not of the host") {
		t.Error("the token of another host:", err)
	}
	old, err := d2.Token()
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(d2.dir("host", "tokens", "*"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	if err := os.WriteFile(files[0], []byte("2001-01-01T00:00:00Z"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := add(old.Token); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Error("a token that has expired:", err)
	}
	token, err := d2.Token()
	if err != nil {
		t.Fatal(err)
	}
	if err := add(token.Token); err != nil {
		t.Fatal(err)
	}
	if err := add(token.Token); err == nil {
		t.Error("a token was used twice")
	}
	for _, d := range []*Daemon{d1, d2} {
		list, err := d.Neighbours()
		if err != nil || len(list) != 1 {
			t.Fatal(list, err)
		}
		c, err := d.dial(list[0])
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if h, err := c.Host(t.Context()); err != nil || h.Name != list[0].Name {
			t.Error(h, err)
		}
	}

	// One that is not known, or not any more, gets nothing.
	if err := d2.RemoveHost("one"); err != nil {
		t.Fatal(err)
	}
	n, err := d1.Neighbour("two")
	if err != nil {
		t.Fatal(err)
	}
	c, err := d1.dial(n)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var refused *client.Error
	if _, err := c.Host(t.Context()); !errors.As(err, &refused) || refused.Status != http.StatusForbidden {
		t.Error(err)
	}
	_, err = c.Arrive(context.Background(), api.Arrival{})
	if !errors.As(err, &refused) || refused.Status != http.StatusForbidden || !strings.Contains(err.Error(), "does not know") {
		t.Error(err)
	}

	// Another host of the same name.
	token, err = d2.Token()
	if err != nil {
		t.Fatal(err)
	}
	if err := add(token.Token); err != nil {
		t.Error("the same host again:", err)
	}
	d3 := neighbour(t, "one")
	if token, err = d2.Token(); err != nil {
		t.Fatal(err)
	}
	_, err = d3.AddHost(t.Context(), api.AddHost{Name: "two", Address: d2.config.Listen, Token: token.Token})
	if err == nil || !strings.Contains(err.Error(), "another host one") {
		t.Error("another host took a name:", err)
	}
}
