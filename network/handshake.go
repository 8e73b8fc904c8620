package network

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/device"
)

// What begins between hosts is sent again soon, because a VM waits, and the way may lose packets:
// WireGuard sends the next handshake after five seconds, and TCP its next SYN after one (RFC 6298).

const (
	firstHandshake = 400 * time.Millisecond // until the next one
	firstSYN       = 250 * time.Millisecond // until the next one, which takes longer to give up
)

// errNoAnswer says that the other end does not answer at all.
var errNoAnswer = errors.New("no answer")

// dial connects inside the tunnel's namespace. It may go on when the call has ended that needs it.
func (a *tunnelAccess) dial(ctx context.Context, network, addr string) (conn net.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*callTimeout)
	defer cancel()
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	for patience := firstSYN; ; patience += patience / 4 {
		err = inNamespace(a.Netns, func() error {
			conn, err = (&net.Dialer{Timeout: patience}).DialContext(ctx, network, addr)
			return err
		})
		var timeout net.Error
		switch {
		case err == nil, ctx.Err() != nil, !errors.As(err, &timeout), !timeout.Timeout():
			return conn, err
		case to.Addr() == a.End.Key.ip():
			continue
		}
		rouse := a.callRouse
		if a.nat != nil {
			rouse = a.nat.rouse
		}
		if answered, err := rouse(to.Addr()); err != nil {
			return nil, err
		} else if !answered {
			return nil, errNoAnswer
		}
	}
}

// rouseCall asks this host's NAT for a session with the end that has an address in the tunnel.
type rouseCall struct{ IP netip.Addr }

func (a *tunnelAccess) callRouse(ip netip.Addr) (answered bool, err error) {
	err = a.call(a.End, "rouse", rouseCall{ip}, &answered)
	return answered, err
}

// rouse tells whether there is a session with the end that has an address in the tunnel, after it has
// tried to begin one.
func (t *tunnel) rouse(ip netip.Addr) (answered bool, err error) {
	t.mu.Lock()
	var key TunnelKey
	for k := range t.record.Peers {
		if k.ip() == ip {
			key = k
		}
	}
	t.mu.Unlock()
	peer := t.device.LookupPeer(device.NoisePublicKey(key))
	if peer == nil {
		return false, nil
	}
	result, err, _ := t.rousing.Do(key.String(), func() (any, error) { return t.shakeHands(key, peer) })
	answered, _ = result.(bool)
	return answered, err
}

// shakeHands sends handshakes until one is answered.
func (t *tunnel) shakeHands(key TunnelKey, peer *device.Peer) (answered bool, err error) {
	next, patience := time.Now(), firstHandshake
	for end := next.Add(callTimeout); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		last, err := t.lastHandshake(key)
		// Whoever sends renews it until then (RejectAfterTime, less what KeepaliveTimeout takes).
		if err != nil || time.Since(last) < device.RejectAfterTime-device.KeepaliveTimeout {
			return err == nil, err
		}
		if time.Now().Before(next) {
			continue
		}
		peer.Stop() // or it would not send another
		peer.Start()
		if err := peer.SendHandshakeInitiation(false); err != nil {
			t.log.Debug("Greet the other end of a tunnel", "error", err)
		}
		next = next.Add(patience)
		patience += patience / 4
	}
	return false, nil
}

// lastHandshake returns when the session with an end began, as the configuration protocol of
// WireGuard's programs says (https://www.wireguard.com/xplatform/).
func (t *tunnel) lastHandshake(key TunnelKey) (time.Time, error) {
	text, err := t.device.IpcGet()
	if err != nil {
		return time.Time{}, fmt.Errorf("ask for the last handshake: %w", err)
	}
	_, text, _ = strings.Cut(text, "public_key="+hex.EncodeToString(key[:])+"\n")
	text, _, _ = strings.Cut(text, "public_key=")
	var sec, nsec int64
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch name {
		case "last_handshake_time_sec":
			sec, err = strconv.ParseInt(value, 10, 64)
		case "last_handshake_time_nsec":
			nsec, err = strconv.ParseInt(value, 10, 64)
		}
		if err != nil {
			return time.Time{}, fmt.Errorf("ask for the last handshake: %w", err)
		}
	}
	return time.Unix(sec, nsec), nil
}
