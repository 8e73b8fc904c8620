package network

import (
	"net"
	"sync"
	"testing"

	"drafter/internal/need"
)

// lossyWay passes UDP packets on between a port of the test's host and a server, but for the first
// ones of each size.
func lossyWay(t *testing.T, server string, lost int) TunnelEnd {
	t.Helper()
	front, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	back, err := net.Dial("udp4", server)
	if err != nil {
		t.Fatal(err)
	}
	var wait sync.WaitGroup
	t.Cleanup(func() {
		front.Close()
		back.Close()
		wait.Wait()
	})
	client := make(chan net.Addr, 1)
	pass := func(read func([]byte) (int, error), write func([]byte) (int, error)) {
		seen := map[int]int{}
		buf := make([]byte, 1<<16)
		for {
			n, err := read(buf)
			if err != nil {
				return
			}
			if seen[n]++; seen[n] > lost {
				write(buf[:n])
			}
		}
	}
	wait.Go(func() {
		pass(func(b []byte) (int, error) {
			n, from, err := front.ReadFrom(b)
			select {
			case client <- from:
			default:
			}
			return n, err
		}, back.Write)
	})
	wait.Go(func() {
		pass(back.Read, func(b []byte) (int, error) {
			to := <-client
			client <- to
			return front.WriteTo(b, to)
		})
	})
	return TunnelEnd{Address: "127.0.0.1", Port: front.LocalAddr().(*net.UDPAddr).Port}
}

// A call goes through although handshakes, and what opens a connection, are lost at first.
func TestCallOnLossyWay(t *testing.T) {
	need.Root(t)
	a := startTunnelNAT(t)
	c := otherConfig()
	c.TunnelPort = 7778
	b := startNAT(t, c)
	there := lossyWay(t, "127.0.0.1:7778", 2)
	there.Key = b.tunnel.End.Key
	if err := b.tunnel.meet(TunnelEnd{Key: a.tunnel.End.Key, Port: 1}); err != nil {
		t.Fatal(err)
	}
	if err := a.tunnel.meet(there); err != nil {
		t.Fatal(err)
	}
	if err := a.tunnel.callWithin(3*callTimeout, there, "greet", struct{}{}, nil); err != nil {
		t.Error(err)
	}
}
