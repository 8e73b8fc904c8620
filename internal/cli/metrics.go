package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"drafter/transport"
)

// metricsConnections is how many connections may ask for metrics at a time, because this process
// needs its descriptors itself.
const metricsConnections = 64

// serveMetrics serves the metrics of a peer or a NAT, and the process' own, until stop is called.
func serveMetrics(ctx context.Context, addr string, own prometheus.Collector) (stop func() error, err error) {
	if addr == "" {
		return func() error { return nil }, nil
	}
	return serveGathered(ctx, addr, nil, own)
}

// serveGathered serves metrics of this process, and others, until stop is called.
func serveGathered(ctx context.Context, addr string, others prometheus.Gatherers, own ...prometheus.Collector) (stop func() error, err error) {
	registry := prometheus.NewRegistry()
	for _, c := range append(own, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})) {
		if err := registry.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("--metrics %s: %w", addr, err)
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(append(others, registry), promhttp.HandlerOpts{MaxRequestsInFlight: 8}))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan error, 1)
	go func() { done <- server.Serve(transport.Bound(l, metricsConnections)) }()
	slog.Info("Serving metrics", "url", "http://"+l.Addr().String()+"/metrics")
	return func() error {
		err := server.Close()
		if serr := <-done; !errors.Is(serr, http.ErrServerClosed) {
			err = errors.Join(err, serr)
		}
		return err
	}, nil
}
