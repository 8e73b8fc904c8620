package network

import (
	"bufio"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

var (
	anchorLabels = []string{"namespace", "to"}

	describeConnections = prometheus.NewDesc("drafter_anchor_connections", "Connections of a VM that has moved that go on by way of the namespace that it has left.", anchorLabels, nil)
	describeBytes       = prometheus.NewDesc("drafter_anchor_bytes_total", "Bytes that have passed by an anchor in both directions, since the VM is where it is.", anchorLabels, nil)
	describeSince       = prometheus.NewDesc("drafter_anchor_since_timestamp_seconds", "When the VM has left an anchor, in seconds since 1970.", anchorLabels, nil)

	describeTunnel    = prometheus.NewDesc("drafter_tunnel_bytes_total", "Bytes to and from another host's NAT through the tunnel.", []string{"host", "direction"}, nil)
	describeHandshake = prometheus.NewDesc("drafter_tunnel_handshake_timestamp_seconds", "When the last handshake with another host's NAT was, in seconds since 1970; 0 before the first.", []string{"host"}, nil)
	describeNotices   = prometheus.NewDesc("drafter_tunnel_notices", "Links that have ended here of which other hosts have not heard yet.", nil, nil)
)

// Metrics is a collector of figures of the NAT's anchors and of its tunnel. It is safe for concurrent
// use.
func (n *NAT) Metrics() prometheus.Collector { return natMetrics{n} }

type natMetrics struct{ n *NAT }

// Describe implements [prometheus.Collector].
func (m natMetrics) Describe(descriptions chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{describeConnections, describeBytes, describeSince, describeTunnel, describeHandshake, describeNotices} {
		descriptions <- d
	}
}

// Collect implements [prometheus.Collector].
func (m natMetrics) Collect(out chan<- prometheus.Metric) {
	if err := m.n.collectAnchors(out); err != nil {
		out <- prometheus.NewInvalidMetric(describeConnections, err)
	}
	if m.n.tunnel == nil {
		return
	}
	if err := m.n.tunnel.collect(out); err != nil {
		out <- prometheus.NewInvalidMetric(describeTunnel, err)
	}
}

func (n *NAT) collectAnchors(out chan<- prometheus.Metric) error {
	anchors, err := Anchors()
	if err != nil {
		return err
	}
	for _, a := range anchors {
		if !slices.Contains(n.created, a.Netns) {
			continue // another NAT's
		}
		t, err := a.Traffic()
		if err != nil {
			return err
		}
		out <- prometheus.MustNewConstMetric(describeConnections, prometheus.GaugeValue, float64(t.Connections), a.Netns, a.Where())
		out <- prometheus.MustNewConstMetric(describeBytes, prometheus.CounterValue, float64(t.Bytes), a.Netns, a.Where())
		out <- prometheus.MustNewConstMetric(describeSince, prometheus.GaugeValue, float64(a.Since.Unix()), a.Netns, a.Where())
	}
	return nil
}

// collect reads what WireGuard counts, as its configuration protocol tells it
// (https://www.wireguard.com/xplatform/).
func (t *tunnel) collect(out chan<- prometheus.Metric) error {
	notices, err := t.notices()
	if err != nil {
		return err
	}
	out <- prometheus.MustNewConstMetric(describeNotices, prometheus.GaugeValue, float64(len(notices)))
	state, err := t.device.IpcGet()
	if err != nil {
		return fmt.Errorf("read state of the tunnel: %w", err)
	}
	host := ""
	for lines := bufio.NewScanner(strings.NewReader(state)); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), "=")
		number, _ := strconv.ParseFloat(value, 64) // of those below
		switch key {
		case "public_key":
			host = value // one that no address is known of
		case "endpoint":
			host = value
		case "last_handshake_time_sec":
			out <- prometheus.MustNewConstMetric(describeHandshake, prometheus.GaugeValue, number, host)
		case "tx_bytes":
			out <- prometheus.MustNewConstMetric(describeTunnel, prometheus.CounterValue, number, host, "sent")
		case "rx_bytes":
			out <- prometheus.MustNewConstMetric(describeTunnel, prometheus.CounterValue, number, host, "received")
		}
	}
	return nil
}
