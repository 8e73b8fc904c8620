// Program echo runs in guests of the tests. It sends back what comes by TCP and UDP on port 7
// (RFC 862), and by QUIC on port 4433.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/sync/errgroup"
)

func main() {
	var g errgroup.Group
	g.Go(overUDP)
	g.Go(overQUIC)
	g.Go(overTCP)
	fmt.Fprintln(os.Stderr, "Error:", g.Wait())
	os.Exit(1)
}

func overTCP() error {
	l, err := net.Listen("tcp", ":7")
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			_, _ = io.Copy(conn, conn) // the client hears of what goes wrong
		}()
	}
}

// overUDP answers with the server's name, the client's address, how many packets have come from
// there, and what was sent: "a 10.77.1.1:34567 12 …". A packet "name=a" names the server.
func overUDP() error {
	conn, err := net.ListenPacket("udp4", ":7")
	if err != nil {
		return err
	}
	name, packets := "nobody", map[string]int{}
	for buf := make([]byte, 1<<16); ; {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return err
		}
		if given, ok := strings.CutPrefix(string(buf[:n]), "name="); ok {
			name = given
		}
		packets[from.String()]++
		_, _ = conn.WriteTo(fmt.Appendf(nil, "%s %s %d %s", name, from, packets[from.String()], buf[:n]), from) // as above
	}
}

// overQUIC begins each stream with the connection's number: a line.
func overQUIC() error {
	config, err := certified()
	if err != nil {
		return err
	}
	l, err := quic.ListenAddr(":4433", config, nil)
	if err != nil {
		return err
	}
	var connections atomic.Int64
	for {
		conn, err := l.Accept(context.Background())
		if err != nil {
			return err
		}
		number := connections.Add(1)
		go func() {
			for {
				stream, err := conn.AcceptStream(context.Background())
				if err != nil {
					return
				}
				fmt.Fprintln(stream, number)
				go func() {
					defer stream.Close()
					_, _ = io.Copy(stream, stream) // as above
				}()
			}
		}()
	}
}

// certified returns a configuration with a certificate that nobody knows.
func certified() (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().AddDate(1, 0, 0)}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{"echo"}}, nil
}
