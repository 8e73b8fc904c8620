package network

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"

	"drafter/internal/need"
)

const wireOffset = 16 // of WireGuard's own header

// wireEnd is a wire with one link, in a namespace of its own.
type wireEnd struct {
	*wire
	ns string
}

func newWireEnd(t testing.TB, ns string, own, peer netip.Addr, addresses ...string) wireEnd {
	t.Helper()
	if err := createNamespace(ns); err != nil {
		t.Fatal(err)
	}
	var w *wire
	err := inNamespace(ns, func() error {
		calls, err := openTUN(tunnelTUN, false)
		if err != nil {
			return err
		}
		w = newWire(own, calls, slog.Default())
		device, err := openTUN("to-3fa2c1", false)
		if err != nil {
			return err
		}
		link, err := netlink.LinkByName("to-3fa2c1")
		if err != nil {
			return err
		}
		for _, a := range addresses {
			address, err := netlink.ParseAddr(a)
			if err != nil {
				return err
			}
			address.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(link, address); err != nil {
				return err
			}
		}
		return errors.Join(netlink.LinkSetUp(link), w.add(linkEnd{peer, 0x3fa2c1}, device))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(w.Close(), deleteNamespace(ns)); err != nil {
			t.Error(err)
		}
	})
	return wireEnd{w, ns}
}

// carry passes packets on as WireGuard would, and complains of those that are larger than its MTU.
func carry(t *testing.T, from, to wireEnd, lose func() bool) {
	bufs, sizes := make([][]byte, from.BatchSize()), make([]int, from.BatchSize())
	for i := range bufs {
		bufs[i] = make([]byte, wireOffset+65535)
	}
	for {
		n, err := from.Read(bufs, sizes, wireOffset)
		if err != nil {
			return
		}
		var packets [][]byte
		for i := range n {
			if sizes[i] > tunnelMTU {
				t.Errorf("a packet has %d bytes", sizes[i])
			}
			if !lose() {
				packets = append(packets, append(make([]byte, 0, 65535), bufs[i][:wireOffset+sizes[i]]...))
			}
		}
		if len(packets) > 0 {
			if _, err := to.Write(packets, wireOffset); err != nil {
				t.Error(err)
			}
		}
	}
}

// What goes by a link arrives as it was: TCP in large segments, in both directions, also if packets are
// lost; and packets of other protocols as large as a guest sends them.
func TestWire(t *testing.T) {
	need.Root(t)
	left, right := netip.MustParseAddr("1.2.3.4"), netip.MustParseAddr("5.6.7.8")
	a := newWireEnd(t, "wire-left", left, right, "10.9.0.1/30", "fd09::1/64")
	b := newWireEnd(t, "wire-right", right, left, "10.9.0.2/30", "fd09::2/64")
	var wait sync.WaitGroup
	t.Cleanup(wait.Wait)
	t.Cleanup(func() { a.Close(); b.Close() })
	lossy := make(chan struct{})
	lose := func() bool {
		select {
		case <-lossy:
			return rand.IntN(50) == 0
		default:
			return false
		}
	}
	wait.Go(func() { carry(t, a, b, lose) })
	wait.Go(func() { carry(t, b, a, lose) })
	for _, address := range []string{"10.9.0.2", "fd09::2"} {
		t.Run("UDP to "+address, func(t *testing.T) {
			echoPackets(t, b.ns, net.JoinHostPort(address, "7"))
			k := dialTalk(t, address, a.ns, "udp", net.JoinHostPort(address, "7"))
			for size := 1; size <= guestMTU-28; size += 49 {
				said := bytes.Repeat([]byte{byte(size)}, size)
				heard := make([]byte, 2*len(said))
				k.c.SetDeadline(time.Now().Add(5 * time.Second))
				if _, err := k.c.Write(said); err != nil {
					t.Fatal(err)
				}
				n, err := k.c.Read(heard)
				if err != nil || !bytes.Equal(heard[:n], said) {
					t.Fatalf("of %d bytes there came back %d, %v", size, n, err)
				}
			}
		})
		t.Run("TCP to "+address, func(t *testing.T) {
			for i, size := range []int{1 << 20, 8 << 20} {
				if i == 1 && address == "fd09::2" {
					close(lossy)
				}
				if err := exchange(t, a.ns, b.ns, net.JoinHostPort(address, fmt.Sprint(100+i)), size); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// exchange sends as much in both directions at once, and compares.
func exchange(t *testing.T, from, to, address string, size int) error {
	var listener net.Listener
	err := inNamespace(to, func() (err error) { listener, err = net.Listen("tcp", address); return err })
	if err != nil {
		return err
	}
	defer listener.Close()
	data := make([]byte, size)
	for i := 0; i < len(data); i += 8 {
		binary.LittleEndian.PutUint64(data[i:], rand.Uint64())
	}
	talk := func(c net.Conn) error {
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Minute))
		written := make(chan error, 1)
		go func() {
			_, err := c.Write(data)
			written <- err
		}()
		heard := make([]byte, size)
		_, err := io.ReadFull(c, heard)
		if err = errors.Join(err, <-written); err != nil {
			return err
		}
		if sha256.Sum256(heard) != sha256.Sum256(data) {
			return errors.New("something else has arrived")
		}
		return nil
	}
	served := make(chan error, 1)
	go func() {
		c, err := listener.Accept()
		if err == nil {
			err = talk(c)
		}
		served <- err
	}()
	k := dialTalk(t, address, from, "tcp", address)
	return errors.Join(talk(k.c), <-served)
}

// lostDevice takes whatever is written.
type lostDevice struct{ wgtun.Device }

func (lostDevice) Write(bufs [][]byte, _ int) (int, error) { return len(bufs), nil }
func (lostDevice) Close() error                            { return nil }

// Whatever comes from the kernel or from another host, the wire goes on.
func FuzzWire(f *testing.F) {
	segment := append(make([]byte, virtioHeader), segment(net.IPv4(1, 2, 3, 4), net.IPv4(5, 6, 7, 8), 1, 2, tcpSYN)...)
	f.Add(segment, uint16(100))
	f.Add(append(segment, make([]byte, 3000)...), uint16(0))
	f.Fuzz(func(_ *testing.T, b []byte, more uint16) {
		b = append(b[:min(len(b), 60000)], make([]byte, int(more)/16)...)
		peer := netip.AddrFrom4([4]byte{5, 6, 7, 8})
		end := linkEnd{peer, 1}
		w := &wire{own: netip.AddrFrom4([4]byte{1, 2, 3, 4}), log: slog.Default(), closed: make(chan struct{}), links: map[linkEnd]*port{}, calls: &port{device: lostDevice{}}}
		p := &port{device: lostDevice{}, linkEnd: end}
		w.links[end] = p
		bufs, sizes := make([][]byte, 128), make([]int, 128)
		for i := range bufs {
			bufs[i] = make([]byte, wireOffset+65535)
		}
		o := &outbound{from: p, n: len(b)}
		copy(o.b[:], b)
		for i := range w.put(o, bufs, sizes, wireOffset) {
			if sizes[i] > tunnelMTU {
				panic("a packet is too large")
			}
		}
		header := make([]byte, wireOffset+linkHeader)
		p.head(netip.AddrFrom4([4]byte{5, 6, 7, 8}), header[wireOffset:], len(b), more, int(more), more%2 == 0)
		copy(header[wireOffset+12:], []byte{5, 6, 7, 8})
		if _, err := w.Write([][]byte{append(header, b...), append(make([]byte, wireOffset), b...)}, wireOffset); err != nil {
			panic(err)
		}
	})
}
