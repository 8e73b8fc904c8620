package control

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// Measure sets what the figures of the VM are.
func (s *Server) Measure(c prometheus.Collector) error {
	registry := prometheus.NewRegistry()
	if err := registry.Register(c); err != nil {
		return fmt.Errorf("register metrics: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.figures = registry
	return nil
}

// Metrics implements [ControlService].
func (s *Server) Metrics(context.Context, *MetricsRequest) (*MetricsResponse, error) {
	s.mu.Lock()
	figures := s.figures
	s.mu.Unlock()
	families, err := figures.Gather()
	if err != nil {
		return nil, fmt.Errorf("gather metrics: %w", err)
	}
	var text strings.Builder
	to := expfmt.NewEncoder(&text, expfmt.NewFormat(expfmt.TypeTextPlain))
	for _, f := range families {
		if err := to.Encode(f); err != nil {
			return nil, fmt.Errorf("encode metrics: %w", err)
		}
	}
	return &MetricsResponse{Text: text.String()}, nil
}

// Figures returns the figures of the VM.
func (c *Client) Figures(ctx context.Context) ([]*dto.MetricFamily, error) {
	answer, err := c.Metrics(ctx, &MetricsRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask for metrics: %w", err)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(
		io.LimitReader(strings.NewReader(answer.GetText()), mostMetrics),
	)
	if err != nil {
		return nil, fmt.Errorf("parse metrics: %w", err)
	}
	var list []*dto.MetricFamily
	for _, f := range families {
		list = append(list, f)
	}
	slices.SortFunc(
		list,
		func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) },
	)
	return list, nil
}

// mostMetrics is more than the metrics of any VM have, in bytes.
const mostMetrics = 1 << 20
