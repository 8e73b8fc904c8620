package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// NoPorts is an empty list of ports: the service opens none, or none is to be waited for.
const NoPorts = "none"

// settleTime is how long a service without ports has to run before it is ready. A program that ends
// at once is no service.
const settleTime = 2 * time.Second

// Readiness says when a service is ready to be packaged: when each of its TCP ports has a listener.
type Readiness struct {
	// Outside ignores listeners on loopback, which nobody reaches from outside. Images such as
	// MongoDB's have one while they fill their database, and open the port when that is done.
	Outside bool

	ports []uint16

	mu    sync.Mutex
	began time.Time
}

// NewReadiness parses a list of ports: "80", "80/tcp", "8000-8010", with commas between, or
// [NoPorts]. UDP has no listeners to wait for. The service has just been started.
func NewReadiness(list string) (*Readiness, error) {
	r := &Readiness{began: time.Now()}
	if list == NoPorts {
		return r, nil
	}
	for _, p := range strings.Split(list, ",") {
		span, protocol, _ := strings.Cut(strings.TrimSpace(p), "/")
		first, last, isRange := strings.Cut(span, "-")
		if !isRange {
			last = first
		}
		from, err := strconv.ParseUint(first, 10, 16)
		to, err2 := strconv.ParseUint(last, 10, 16)
		if err != nil || err2 != nil || from == 0 || to < from {
			return nil, fmt.Errorf("%q is no list of ports such as 80,443, and not %q", list, NoPorts)
		}
		if protocol != "" && !strings.EqualFold(protocol, "tcp") {
			continue
		}
		for port := from; port <= to; port++ {
			r.ports = append(r.ports, uint16(port))
		}
	}
	return r, nil
}

// Begin tells that the service is only being started now.
func (r *Readiness) Begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.began = time.Now()
}

// Check tells whether the service is ready, and which ports it has not opened yet.
func (r *Readiness) Check() (ready bool, closed []uint32, err error) {
	if len(r.ports) == 0 {
		r.mu.Lock()
		defer r.mu.Unlock()
		return time.Since(r.began) >= settleTime, nil, nil
	}
	open, err := listeningPorts(r.Outside)
	if err != nil {
		return false, nil, fmt.Errorf("find listening ports: %w", err)
	}
	for _, p := range r.ports {
		if !open[p] {
			closed = append(closed, uint32(p))
		}
	}
	return len(closed) == 0, closed, nil
}

// listeningPorts returns the TCP ports with a listener, or only those with one that is not on
// loopback, from /proc/net/tcp and tcp6 (proc(5); state 0A is TCP_LISTEN).
func listeningPorts(outside bool) (map[uint16]bool, error) {
	ports := map[uint16]bool{}
	for _, name := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile(filepath.Join("/proc/net", name))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, line := range strings.Split(string(b), "\n") {
			f := strings.Fields(line)
			if len(f) < 4 || f[3] != "0A" {
				continue
			}
			address, port, _ := strings.Cut(f[1], ":")
			if outside && isLoopback(address) {
				continue
			}
			if n, err := strconv.ParseUint(port, 16, 16); err == nil {
				ports[uint16(n)] = true
			}
		}
	}
	return ports, nil
}

// isLoopback tells whether an address in /proc/net, whose words are in the host's order (that is,
// little-endian), is of 127.0.0.0/8, also mapped into IPv6, or ::1.
func isLoopback(address string) bool {
	const mapped, six = "0000000000000000FFFF0000", "00000000000000000000000001000000"
	v4 := strings.TrimPrefix(address, mapped)
	return len(v4) == 8 && strings.HasSuffix(v4, "7F") || address == six
}
