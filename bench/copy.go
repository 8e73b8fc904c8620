package bench

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
)

// copySize is how much is copied without the engine, in bytes: about what a move sends.
const copySize = 512 << 20

// plainCopy measures a copy of a file over TCP, as rsync or nc would make it. What is copied cannot
// be compressed.
func (b *bench) plainCopy() error {
	from, to := filepath.Join(b.dir, "copy-from"), filepath.Join(b.dir, "copy-to")
	if _, err := os.Stat(from); errors.Is(err, os.ErrNotExist) {
		if err := writeRandom(from, copySize); err != nil {
			return err
		}
	}
	took, cpu, err := timed(func() error { return copyOverTCP(from, to) })
	if err != nil {
		return err
	}
	b.add("copy_tcp_mb_per_s", copySize/1e6/took)
	b.add("copy_tcp_cpu_s_per_gb", cpu/(copySize/1e9))
	return os.Remove(to)
}

func writeRandom(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, rand.NewChaCha8([32]byte{}), size)
	return errors.Join(err, f.Close())
}

// copyOverTCP copies a file to another over a connection, through buffers of this process.
func copyOverTCP(from, to string) error {
	send := func(conn net.Conn) error {
		f, err := os.Open(from)
		if err != nil {
			return err
		}
		_, err = io.CopyBuffer(struct{ io.Writer }{conn}, struct{ io.Reader }{f}, make([]byte, 1<<20))
		return errors.Join(err, f.Close())
	}
	receive := func(conn net.Conn) error {
		f, err := os.Create(to)
		if err != nil {
			return err
		}
		_, err = io.CopyBuffer(struct{ io.Writer }{f}, struct{ io.Reader }{conn}, make([]byte, 1<<20))
		return errors.Join(err, f.Close())
	}
	return overTCP(send, receive)
}
