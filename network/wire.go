package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/tailscale/wireguard-go/tun"
	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

// wire is what WireGuard sends from, and delivers to: the tunnel's own interface, by which NATs call
// one another, and this host's end of each link. What goes by a link has a header of its own in the
// tunnel:
//
//	IPv4 (20 bytes, protocol 253) │ link (3) │ more (1) │ packet (2) │ offset (2) │ …
//
// The kernel gives segments of TCP that are as large as it likes. They are cut to what the tunnel
// takes, so that they are encrypted and sent in one go, and are put together again where they arrive.
// Any other packet that is too large goes in two pieces.
type wire struct {
	own    netip.Addr
	log    *slog.Logger
	calls  *port
	sent   chan *outbound // read from an interface
	spare  sync.Pool      // of *outbound
	closed chan struct{}
	events chan wgtun.Event
	wait   sync.WaitGroup

	mu    sync.RWMutex
	links map[linkEnd]*port
	once  sync.Once // of Close
}

// linkEnd tells links apart: each host numbers its own.
type linkEnd struct {
	peer netip.Addr // the other end's address in the tunnel
	link uint32     // its number
}

// port is one interface of the wire.
type port struct {
	device  wgtun.Device // writes, and merges segments of TCP meanwhile
	linkEnd              // the zero value: the tunnel's own interface

	mu     sync.Mutex
	packet uint16 // number of the last one that was sent in pieces
	pieces [64]piece
}

// piece is a part of a packet that was too large.
type piece struct {
	packet uint16
	offset int
	more   bool
	data   []byte
	since  time.Time
}

// outbound is what was read from an interface at once: a packet, or a large segment.
type outbound struct {
	from *port
	n    int
	b    [virtioHeader + 65535]byte
}

const (
	virtioHeader = 10 // bytes of struct virtio_net_hdr (VIRTIO 1.2, 5.1.6)
	// linkProtocol is one for experiments (RFC 3692). Nothing but the other end's wire sees it.
	linkProtocol = 253
	linkHeader   = 20 + 8
	linkPayload  = tunnelMTU - linkHeader
	// piecePatience is how long a piece waits for the other one.
	piecePatience = time.Second
)

func newWire(own netip.Addr, calls wgtun.Device, log *slog.Logger) *wire {
	w := &wire{
		own: own, log: log, calls: &port{device: calls}, sent: make(chan *outbound, 16), closed: make(chan struct{}),
		events: make(chan wgtun.Event), links: map[linkEnd]*port{},
	}
	w.spare.New = func() any { return new(outbound) }
	w.wait.Go(func() {
		w.read(w.calls)
		select {
		case <-w.closed:
		default:
			log.Error("Somebody has removed the tunnel's interface; VMs that move to other hosts lose their connections. Start the NAT again")
		}
	})
	return w
}

// add takes up this host's end of a link. It goes when its interface does.
func (w *wire) add(end linkEnd, device wgtun.Device) error {
	p := &port{device: device, linkEnd: end}
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case <-w.closed:
		return os.ErrClosed
	default:
	}
	if w.links[end] != nil {
		return errors.New("there is one with this number")
	}
	w.links[end] = p
	w.wait.Go(func() {
		w.read(p)
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.links, end)
		if err := device.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			w.log.Debug("Close a link's interface", "error", err)
		}
	})
	return nil
}

// peers are the addresses of all that links lead to.
func (w *wire) peers() map[netip.Addr]bool {
	w.mu.RLock()
	defer w.mu.RUnlock()
	peers := map[netip.Addr]bool{}
	for end := range w.links {
		peers[end.peer] = true
	}
	return peers
}

// read reads from an interface until that is closed, or gone.
func (w *wire) read(p *port) {
	for {
		o := w.spare.Get().(*outbound)
		n, err := p.device.File().Read(o.b[:])
		if err != nil {
			return
		}
		o.from, o.n = p, n
		select {
		case w.sent <- o:
		case <-w.closed:
			return
		}
	}
}

// Read implements tun.Device. It takes what there is.
func (w *wire) Read(bufs [][]byte, sizes []int, offset int) (n int, err error) {
	const most = 65535/(linkPayload-60-60) + 1 // parts of a segment, with the longest headers
	select {
	case o := <-w.sent:
		n = w.put(o, bufs, sizes, offset)
	case <-w.closed:
		return 0, os.ErrClosed
	}
	for len(bufs)-n >= most {
		select {
		case o := <-w.sent:
			n += w.put(o, bufs[n:], sizes[n:], offset)
		default:
			return n, nil
		}
	}
	return n, nil
}

// put puts what was read from an interface into buffers, as it goes into the tunnel.
func (w *wire) put(o *outbound, bufs [][]byte, sizes []int, offset int) int {
	defer w.spare.Put(o)
	var n int
	var err error
	if o.from.link == 0 {
		n, err = split(o.b[:o.n], tunnelMTU, bufs, sizes, offset)
	} else if n, err = split(o.b[:o.n], linkPayload, bufs, sizes, offset+linkHeader); n == 1 && sizes[0] > linkPayload {
		return o.from.cut(w.own, bufs, sizes, offset)
	}
	if err != nil {
		w.log.Debug("A packet was lost on its way into a tunnel", "error", err)
		return 0
	}
	for i := 0; i < n && o.from.link != 0; i++ {
		o.from.head(w.own, bufs[i][offset:], sizes[i], 0, 0, false)
		sizes[i] += linkHeader
	}
	return n
}

// split splits what was read, with struct virtio_net_hdr before it. A segment of TCP is cut so that
// each part has at most size bytes. Its own size tells nothing here: it is that of what comes in.
func split(b []byte, size int, bufs [][]byte, sizes []int, offset int) (int, error) {
	if len(b) < virtioHeader {
		return 0, errors.New("a packet is too short")
	}
	header, packet := b[:virtioHeader], b[virtioHeader:]
	large := header[1] != unix.VIRTIO_NET_HDR_GSO_NONE
	options, whole := tcpSegment(packet)
	// Both are said of the whole packet. In a large segment they are the kernel's to say so.
	single := whole && packet[options.CsumStart+13]&(tcpSYN|tcpURG) != 0
	if whole && len(packet) > size && (large || !single) {
		options.GSOSize = uint16(size) - options.HdrLen
		return tun.GSOSplit(packet, options, bufs, sizes, offset)
	}
	if large && len(packet) > size {
		return 0, fmt.Errorf("a segment of kind %d cannot be split", header[1])
	}
	if len(packet) > len(bufs[0])-offset {
		return 0, errors.New("a packet is too long")
	}
	if header[0]&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 {
		sizes[0] = copy(bufs[0][offset:], packet)
		return 1, nil
	}
	return tun.GSOSplit(packet, tun.GSOOptions{
		NeedsCsum: true, CsumStart: binary.NativeEndian.Uint16(header[6:]), CsumOffset: binary.NativeEndian.Uint16(header[8:]),
	}, bufs, sizes, offset)
}

// tcpSegment tells how to split a packet if it is a whole one of TCP.
func tcpSegment(p []byte) (o tun.GSOOptions, ok bool) {
	header := 0 // of IP
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		header = int(p[0]&15) * 4
		fragment := binary.BigEndian.Uint16(p[6:])&0x3fff != 0 // RFC 791: more of them, or an offset
		if header < 20 || fragment || p[9] != unix.IPPROTO_TCP {
			return o, false
		}
		o.GSOType = tun.GSOTCPv4
	case len(p) >= 40 && p[0]>>4 == 6 && p[6] == unix.IPPROTO_TCP:
		header = 40
		o.GSOType = tun.GSOTCPv6
	default:
		return o, false
	}
	if len(p) < header+20 {
		return o, false
	}
	length := int(p[header+12]>>4) * 4
	if length < 20 || len(p) <= header+length {
		return o, false
	}
	o.CsumStart, o.CsumOffset, o.HdrLen = uint16(header), 16, uint16(header+length)
	return o, true
}

// head writes the header of a packet, or of a piece of one, before its n bytes.
func (p *port) head(own netip.Addr, b []byte, n int, packet uint16, offset int, more bool) {
	clear(b[:linkHeader])
	b[0], b[8], b[9] = 4<<4|5, 64, linkProtocol // RFC 791; nobody looks at its checksum
	binary.BigEndian.PutUint16(b[2:], uint16(linkHeader+n))
	from, to := own.As4(), p.peer.As4()
	copy(b[12:], from[:])
	copy(b[16:], to[:])
	b[20], b[21], b[22] = byte(p.link>>16), byte(p.link>>8), byte(p.link)
	if more {
		b[23] = 1
	}
	binary.BigEndian.PutUint16(b[24:], packet)
	binary.BigEndian.PutUint16(b[26:], uint16(offset))
}

// cut makes two of a packet that is too large. Both are as large, for encryption in one go.
func (p *port) cut(own netip.Addr, bufs [][]byte, sizes []int, offset int) int {
	p.packet++
	n := sizes[0]
	half := (n + 1) / 2
	if half > linkPayload {
		return 0 // somebody has raised the interface's MTU
	}
	copy(bufs[1][offset+linkHeader:], bufs[0][offset+linkHeader+half:offset+linkHeader+n])
	p.head(own, bufs[0][offset:], half, p.packet, 0, true)
	p.head(own, bufs[1][offset:], n-half, p.packet, half, false)
	sizes[0], sizes[1] = linkHeader+half, linkHeader+n-half
	return 2
}

// Write implements tun.Device.
func (w *wire) Write(bufs [][]byte, offset int) (int, error) {
	for from := 0; from < len(bufs); {
		p, to := w.portOf(bufs[from][offset:]), from+1
		for to < len(bufs) && w.portOf(bufs[to][offset:]) == p {
			to++
		}
		if p != nil {
			if err := p.deliver(bufs[from:to], offset); err != nil && !errors.Is(err, os.ErrClosed) {
				w.log.Debug("A packet was lost on its way out of a tunnel", "error", err)
			}
		}
		from = to
	}
	return len(bufs), nil
}

// portOf returns the interface at which a packet from the tunnel leaves it: nil if there is none.
// WireGuard has checked who sends it.
func (w *wire) portOf(b []byte) *port {
	if len(b) < 20 || b[0]>>4 != 4 {
		return nil
	}
	if b[9] != linkProtocol {
		return w.calls
	}
	if len(b) <= linkHeader {
		return nil
	}
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.links[linkEnd{netip.AddrFrom4([4]byte(b[12:16])), uint32(b[20])<<16 | uint32(b[21])<<8 | uint32(b[22])}]
}

// deliver writes packets to an interface.
func (p *port) deliver(bufs [][]byte, offset int) error {
	if p.link == 0 {
		_, err := p.device.Write(bufs, offset)
		return err
	}
	var whole [][]byte
	for _, b := range bufs {
		header := b[offset:]
		packet, at, more := binary.BigEndian.Uint16(header[24:]), int(binary.BigEndian.Uint16(header[26:])), header[23] != 0
		if !more && at == 0 {
			whole = append(whole, b)
			continue
		}
		if joined := p.join(piece{packet, at, more, header[linkHeader:], time.Now()}); joined != nil {
			whole = append(whole, append(make([]byte, offset+linkHeader, offset+linkHeader+len(joined)), joined...))
		}
	}
	if len(whole) == 0 {
		return nil
	}
	_, err := p.device.Write(whole, offset+linkHeader)
	return err
}

// join returns a packet if a piece completes it.
func (p *port) join(next piece) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	known := &p.pieces[next.packet%uint16(len(p.pieces))]
	a, b := *known, next
	if b.offset == 0 {
		a, b = b, a
	}
	fits := a.packet == b.packet && a.more && !b.more && a.offset == 0 && b.offset == len(a.data) && len(b.data) > 0
	if !fits || next.since.Sub(known.since) > piecePatience {
		next.data = append([]byte(nil), next.data...)
		*known = next
		return nil
	}
	*known = piece{}
	return append(append([]byte(nil), a.data...), b.data...)
}

// MTU implements tun.Device.
func (w *wire) MTU() (int, error) { return tunnelMTU, nil }

// Name implements tun.Device.
func (w *wire) Name() (string, error) { return tunnelTUN, nil }

// File implements tun.Device.
func (w *wire) File() *os.File { return w.calls.device.File() }

// Events implements tun.Device.
func (w *wire) Events() <-chan wgtun.Event { return w.events }

// BatchSize implements tun.Device.
func (w *wire) BatchSize() int { return w.calls.device.BatchSize() }

// Close implements tun.Device. It closes all interfaces; those of links stay, for the next NAT.
func (w *wire) Close() (err error) {
	w.once.Do(func() {
		close(w.closed)
		w.mu.RLock()
		errs := []error{w.calls.device.Close()}
		for _, p := range w.links {
			errs = append(errs, p.device.Close())
		}
		w.mu.RUnlock()
		w.wait.Wait()
		close(w.events)
		err = errors.Join(errs...)
	})
	return err
}

// openTUN opens or makes a TUN interface of the calling thread's namespace, which may persist when it
// is closed. TCP comes from it in large segments.
func openTUN(name string, persists bool) (wgtun.Device, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w; is the kernel's tun module there?", err)
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create %s: %w", name, err), unix.Close(fd))
	}
	device, _, err := wgtun.CreateUnmonitoredTUNFromFD(fd)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	// The kernel splits large segments of other protocols.
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6); err != nil {
		return nil, errors.Join(fmt.Errorf("set offloads of %s: %w", name, err), device.Close())
	}
	if persists {
		if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
			return nil, errors.Join(fmt.Errorf("let %s persist: %w", name, err), device.Close())
		}
	}
	return device, nil
}
