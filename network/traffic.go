package network

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
)

// GuestTraffic is what a guest has received and sent since the NAT made its namespace, in bytes.
func GuestTraffic(ns, tap string) (received, sent uint64, err error) {
	err = inNamespace(ns, func() error {
		link, err := netlink.LinkByName(tap)
		if err != nil {
			return fmt.Errorf("find %s in network namespace %q: %w", tap, ns, err)
		}
		s := link.Attrs().Statistics
		if s == nil {
			return errors.New("the kernel does not count it")
		}
		received, sent = s.TxBytes, s.RxBytes // the kernel counts what it receives of the guest
		return nil
	})
	return received, sent, err
}
