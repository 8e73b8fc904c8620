package network

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"

	"drafter/internal/logging"
)

// Obstacle is something of a host that keeps guests from their network.
type Obstacle struct{ Text, Remedy string }

// CheckNftables tells whether this host's kernel has nftables, and lets this process use it.
func CheckNftables() error {
	conn, err := nftables.New()
	if err == nil {
		_, err = conn.ListTables()
	}
	if err != nil {
		return fmt.Errorf("read nftables: %w", err)
	}
	return nil
}

// Firewalls returns what other firewalls of this host drop of what guests of such a NAT need. It
// changes nothing, and needs no NAT that runs.
func Firewalls(c NATConfig) (list []Obstacle, err error) {
	n, err := survey(c)
	if err != nil {
		return nil, err
	}
	if n.firewall, err = readFirewall(); err != nil {
		return nil, err
	}
	legacy, err := readLegacy()
	if err != nil {
		return nil, err
	}
	for c, what := range n.culprits(legacy) {
		text := fmt.Sprintf(
			"chain %s of table %s drops %s",
			c.chain,
			c.table,
			strings.Join(what, ", "),
		)
		list = append(list, Obstacle{text, c.open})
	}
	slices.SortFunc(list, func(a, b Obstacle) int { return strings.Compare(a.Text, b.Text) })
	return list, nil
}

// CheckSubnets refuses subnets of such a NAT that this host, or another NAT, uses. One of the same
// prefix may run.
func CheckSubnets(c NATConfig) error {
	n, err := survey(c)
	if err != nil {
		return err
	}
	var own []string
	for i := range n.layout.count {
		own = append(own, n.name(i))
	}
	return errors.Join(
		n.checkOwn(own),
		n.checkOthers(own),
		n.checkAddresses(own),
		n.checkRoutes(own),
	)
}

// survey returns a NAT that only looks. It is not closed.
func survey(c NATConfig) (*NAT, error) {
	c.ManageForward, c.IPv6 = false, c.IPv6 && hasIPv6()
	c.Logger = logging.Or(c.Logger)
	l, err := c.parse()
	if err != nil {
		return nil, err
	}
	n := &NAT{config: c, layout: l}
	n.outgoing, n.outgoing6, err = n.waysOut(c.HostInterface)
	return n, err
}
