package network

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

var (
	anchorLabels = []string{"namespace", "to"}

	describeConnections = prometheus.NewDesc("drafter_anchor_connections", "Connections of a VM that has moved that go on by way of the namespace that it has left.", anchorLabels, nil)
	describeBytes       = prometheus.NewDesc("drafter_anchor_bytes_total", "Bytes that have passed by an anchor in both directions, since the VM is where it is.", anchorLabels, nil)
	describeSince       = prometheus.NewDesc("drafter_anchor_since_timestamp_seconds", "When the VM has left an anchor, in seconds since 1970.", anchorLabels, nil)

	describeTunnel    = prometheus.NewDesc("drafter_tunnel_bytes_total", "Bytes to and from another host's NAT through the tunnel.", []string{"host", "key", "direction"}, nil)
	describeHandshake = prometheus.NewDesc("drafter_tunnel_handshake_timestamp_seconds", "When the last handshake with another host's NAT was, in seconds since 1970; 0 before the first.", []string{"host", "key"}, nil)
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

// collect collects the figures of the tunnel. A host whose NAT was started anew has two keys for a while.
func (t *tunnel) collect(out chan<- prometheus.Metric) error {
	notices, err := t.notices()
	if err != nil {
		return err
	}
	out <- prometheus.MustNewConstMetric(describeNotices, prometheus.GaugeValue, float64(len(notices)))
	peers, err := t.peers()
	if err != nil {
		return err
	}
	for key, p := range peers {
		handshake := 0.0
		if !p.handshake.IsZero() {
			handshake = float64(p.handshake.Unix())
		}
		out <- prometheus.MustNewConstMetric(describeHandshake, prometheus.GaugeValue, handshake, p.endpoint, key.String())
		out <- prometheus.MustNewConstMetric(describeTunnel, prometheus.CounterValue, p.sent, p.endpoint, key.String(), "sent")
		out <- prometheus.MustNewConstMetric(describeTunnel, prometheus.CounterValue, p.received, p.endpoint, key.String(), "received")
	}
	return nil
}

// peer is what WireGuard knows of another end.
type peer struct {
	endpoint       string
	handshake      time.Time // the last one; zero before the first
	sent, received float64   // bytes
}

// peers reads what WireGuard knows, as its configuration protocol tells it
// (https://www.wireguard.com/xplatform/).
func (t *tunnel) peers() (map[TunnelKey]peer, error) {
	state, err := t.device.IpcGet()
	if err != nil {
		return nil, fmt.Errorf("read state of the tunnel: %w", err)
	}
	peers := map[TunnelKey]peer{}
	var key TunnelKey
	for lines := bufio.NewScanner(strings.NewReader(state)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), "=")
		if name == "public_key" {
			b, err := hex.DecodeString(value)
			if err != nil || len(b) != len(key) {
				return nil, fmt.Errorf("read state of the tunnel: %q is no key", value)
			}
			key = TunnelKey(b)
		}
		number, _ := strconv.ParseInt(value, 10, 64) // of those below
		p := peers[key]
		switch name {
		case "endpoint":
			p.endpoint = value
		case "last_handshake_time_sec":
			if number > 0 {
				p.handshake = time.Unix(number, 0)
			}
		case "tx_bytes":
			p.sent = float64(number)
		case "rx_bytes":
			p.received = float64(number)
		default:
			continue
		}
		peers[key] = p
	}
	return peers, nil
}
