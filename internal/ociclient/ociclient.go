// Package ociclient reaches OCI registries with docker's credentials. These go to the host that
// they are for and to no other, whatever a registry asks.
package ociclient

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/net/publicsuffix"

	"drafter/internal/logging"
)

// Parse reads NAME[:TAG|@DIGEST], with or without docker:// before it.
func Parse(ref string, plainHTTP bool) (name.Reference, error) {
	var options []name.Option
	if plainHTTP {
		options = append(options, name.Insecure)
	}
	r, err := name.ParseReference(strings.TrimPrefix(ref, "docker://"), options...)
	if err != nil {
		return nil, fmt.Errorf("%s is no reference like registry.example.com/vms/redis:1: %w", ref, err)
	}
	return r, nil
}

// Options are those of each call of package remote for a registry. See [Transport].
func Options(ctx context.Context, registry name.Registry, plainHTTP bool, log *slog.Logger) []remote.Option {
	return []remote.Option{remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain), remote.WithTransport(Transport(remote.DefaultTransport, registry, plainHTTP, log))}
}

// Transport returns base with a guard, below all that knows credentials:
//
//   - Plain HTTP is spoken where plainHTTP allows it, and with a registry on a loopback address. The library takes private addresses and .local to be safe, too.
//   - Credentials go to the registry's own host and port, and over TLS to hosts of the same domain as the registry's ([publicsuffix.EffectiveTLDPlusOne]), such
//     as auth.docker.io for index.docker.io. A request to another host (a token service that the registry names, a redirect) goes there without them.
//
// log hears of such a request; nil: slog.Default().
func Transport(base http.RoundTripper, registry name.Registry, plainHTTP bool, log *slog.Logger) http.RoundTripper {
	host := registry.RegistryStr()
	return &guard{log: logging.Or(log), base: base, host: host, plain: plainHTTP || isLoopback(hostname(host))}
}

type guard struct {
	log   *slog.Logger
	base  http.RoundTripper
	host  string // HOST or HOST:PORT
	plain bool
	said  sync.Once
}

// RoundTrip implements [http.RoundTripper].
func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" && !g.plain {
		if sameHost(req.URL, g.host) {
			return nil, fmt.Errorf("registry %s is not spoken to by plain HTTP; if it does not know TLS and the network can be trusted, pass --plain-http", g.host)
		}
		return nil, fmt.Errorf("registry %s sends us on to %s by plain HTTP, which is refused", g.host, req.URL.Host)
	}
	if carriesCredentials(req) && !g.mayHave(req.URL) {
		g.said.Do(func() {
			g.log.Warn("The registry wants its credentials sent to another host, which does not get them", "registry", g.host, "host", req.URL.Host)
		})
		if req.Method != http.MethodGet && req.Method != http.MethodHead {
			return nil, fmt.Errorf("registry %s wants its credentials sent to %s, which is refused", g.host, req.URL.Host)
		}
		req = req.Clone(req.Context())
		req.Header.Del("Authorization")
	}
	return g.base.RoundTrip(req)
}

// carriesCredentials tells whether a request carries a password or a refresh token. A bearer token
// does not count: the registry's token service has made it for the registry, and the library sends
// it nowhere else.
func carriesCredentials(req *http.Request) bool {
	scheme, _, _ := strings.Cut(req.Header.Get("Authorization"), " ")
	return scheme != "" && !strings.EqualFold(scheme, "Bearer") || req.URL.User != nil ||
		req.Method == http.MethodPost && strings.HasPrefix(req.Header.Get("Content-Type"), "application/x-www-form-urlencoded")
}

// mayHave tells whether credentials may go to u.
func (g *guard) mayHave(u *url.URL) bool {
	return sameHost(u, g.host) || u.Scheme == "https" && sameDomain(u.Hostname(), hostname(g.host))
}

// sameHost tells whether u is at host, which is HOST or HOST:PORT.
func sameHost(u *url.URL, host string) bool {
	h, err := url.Parse(u.Scheme + "://" + host)
	return err == nil && strings.EqualFold(h.Hostname(), u.Hostname()) && port(h) == port(u)
}

func port(u *url.URL) string {
	if p := u.Port(); p != "" {
		return p
	}
	return map[string]string{"http": "80", "https": "443"}[u.Scheme]
}

func hostname(host string) string { return (&url.URL{Host: host}).Hostname() }

// sameDomain tells whether one owner has both names.
func sameDomain(a, b string) bool {
	if strings.EqualFold(a, b) {
		return true
	}
	if isAddress(a) || isAddress(b) {
		return false
	}
	x, err := publicsuffix.EffectiveTLDPlusOne(strings.ToLower(a))
	if err != nil {
		return false
	}
	y, err := publicsuffix.EffectiveTLDPlusOne(strings.ToLower(b))
	return err == nil && x == y
}

func isAddress(host string) bool {
	_, err := netip.ParseAddr(host)
	return err == nil
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
