package network

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"

	"drafter/internal/need"
)

// BenchmarkWire sends TCP by a link, encrypted, with both ends on this host.
func BenchmarkWire(b *testing.B) {
	need.Root(b)
	left, right := netip.MustParseAddr("1.2.3.4"), netip.MustParseAddr("5.6.7.8")
	ends := []wireEnd{
		newWireEnd(b, "wire-left", left, right, "10.9.0.1/30"),
		newWireEnd(b, "wire-right", right, left, "10.9.0.2/30"),
	}
	var keys []*ecdh.PrivateKey
	for range ends {
		key, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			b.Fatal(err)
		}
		keys = append(keys, key)
	}
	for i, end := range ends {
		d := device.NewDevice(end, conn.NewDefaultBind(), device.NewLogger(device.LogLevelError, ""))
		defer d.Close()
		other := 1 - i
		err := d.IpcSet(fmt.Sprintf("private_key=%s\nlisten_port=%d\npublic_key=%s\nendpoint=127.0.0.1:%d\nallowed_ip=%s/32\n",
			hex.EncodeToString(keys[i].Bytes()), 7780+i, hex.EncodeToString(keys[other].PublicKey().Bytes()), 7780+other, []netip.Addr{left, right}[other]))
		if err != nil {
			b.Fatal(err)
		}
		if err := d.Up(); err != nil {
			b.Fatal(err)
		}
	}
	var listener net.Listener
	if err := inNamespace("wire-right", func() (err error) { listener, err = net.Listen("tcp", "10.9.0.2:7"); return err }); err != nil {
		b.Fatal(err)
	}
	defer listener.Close()
	received := make(chan int64, 1)
	go func() {
		c, err := listener.Accept()
		if err != nil {
			close(received)
			return
		}
		defer c.Close()
		n, _ := io.Copy(io.Discard, c)
		received <- n
	}()
	k := dialTalk(b, "client", "wire-left", "tcp", "10.9.0.2:7")
	data := make([]byte, 1<<20)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if _, err := k.c.Write(data); err != nil {
			b.Fatal(err)
		}
	}
	k.c.Close()
	if n := <-received; n == 0 {
		b.Error("nothing has arrived")
	}
}
