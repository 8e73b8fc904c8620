package bench

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"time"

	"github.com/google/uuid"

	"drafter/internal/block"
	"drafter/internal/migration"
	"drafter/internal/wire"
	"drafter/migrate"
)

// aloneSize is how much the engine moves without a VM, in bytes.
const aloneSize = 1 << 30

// ram is a device in memory.
type ram []byte

func (r ram) Size() int64                              { return int64(len(r)) }
func (r ram) ReadAt(p []byte, off int64) (int, error)  { return copy(p, r[off:]), nil }
func (r ram) WriteAt(p []byte, off int64) (int, error) { return copy(r[off:], p), nil }
func (r ram) Sync() error                              { return nil }
func (r ram) Close() error                             { return nil }

// nobody is a VM that does nothing, at its source and at its target.
type nobody struct{ device *block.Incoming }

func (nobody) WriteBack(context.Context) error                          { return nil }
func (nobody) Flush(context.Context) error                              { return nil }
func (nobody) Prepare(context.Context) error                            { return nil }
func (nobody) Pause(context.Context) (time.Time, error)                 { return time.Now(), nil }
func (nobody) Save(context.Context, uuid.UUID, func(int64, bool)) error { return nil }
func (nobody) Rescue(context.Context) error                             { return nil }
func (nobody) Rescued(context.Context)                                  {}
func (nobody) Leave(context.Context, uuid.UUID) error                   { return nil }
func (nobody) Mark(context.Context, migrate.Phase, uuid.UUID) error     { return nil }
func (nobody) Start(context.Context) error                              { return nil }
func (nobody) Expect(context.Context, uuid.UUID) error                  { return nil }
func (nobody) Restore(context.Context, uuid.UUID) error                 { return nil }
func (nobody) Resume(context.Context) error                             { return nil }
func (nobody) Complete(context.Context) error                           { return nil }
func (nobody) Discard(context.Context) error                            { return nil }

func (n nobody) Accept(context.Context, wire.Manifest, uuid.UUID) ([]migration.TargetDevice, error) {
	return []migration.TargetDevice{{Device: n.device}}, nil
}

// engine measures the device engine without a VM, over TCP on loopback, from memory to memory;
// beside it the same connection without the engine. What is moved cannot be compressed.
func (b *bench) engine(ctx context.Context, rounds int) error {
	from, to := make(ram, aloneSize), make(ram, aloneSize)
	rng := rand.NewChaCha8([32]byte{})
	if _, err := rng.Read(from); err != nil {
		return err
	}
	copy(to, from) // its pages are there
	for range rounds {
		clear(to)
		runtime.GC()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		took, cpu, err := timed(func() error { return moveAlone(ctx, from, to) })
		if err != nil {
			return err
		}
		runtime.ReadMemStats(&after)
		if !bytes.Equal(from, to) {
			return errors.New("what has arrived is not what was sent")
		}
		b.add("engine_mb_per_s", aloneSize/1e6/took)
		b.add("engine_cpu_s_per_gb", cpu/(aloneSize/1e9))
		b.add("engine_allocations_per_64k", float64(after.Mallocs-before.Mallocs)/(aloneSize/(64<<10)))
		if took, cpu, err = timed(func() error { return sendRaw(from, to) }); err != nil {
			return err
		}
		b.add("raw_tcp_mb_per_s", aloneSize/1e6/took)
		b.add("raw_tcp_cpu_s_per_gb", cpu/(aloneSize/1e9))
		if took, _, err = timed(func() error { copy(to, from); return nil }); err != nil {
			return err
		}
		b.add("memory_copy_mb_per_s", aloneSize/1e6/took)
	}
	return nil
}

func moveAlone(ctx context.Context, from, to ram) (err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	device := migration.SourceDevice{Name: "memory", Device: block.NewTracker(from, 64<<10), MaxDirtyBlocks: 200, MinCycles: 1, MaxCycles: 1}
	source, err := migration.NewSource(migration.SourceConfig{VM: nobody{}, Devices: []migration.SourceDevice{device}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, source.Close()) }()
	sctx, cancel := context.WithCancel(ctx)
	served := make(chan struct{})
	go func() {
		defer close(served)
		accept := func(ctx context.Context) (io.ReadWriteCloser, error) {
			// which ends Accept
			defer context.AfterFunc(ctx, func() { _ = l.(*net.TCPListener).SetDeadline(time.Unix(1, 0)) })()
			return l.Accept()
		}
		// the target says what fails
		migrate.AcceptAll(sctx, nil, accept, func(ctx context.Context, stream io.ReadWriteCloser) { _ = source.Handle(ctx, stream) })
	}()
	defer func() { cancel(); <-served }()
	dial := func(ctx context.Context) (io.ReadWriteCloser, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
	}
	target, err := migration.Receive(ctx, migration.TargetConfig{VM: nobody{block.NewIncoming(to, true)}, Dial: dial})
	if err != nil {
		return err
	}
	err = target.Wait()
	return errors.Join(err, target.Close())
}

// sendRaw writes one to a connection and reads it into the other.
func sendRaw(from, to ram) error {
	send := func(conn net.Conn) error {
		for at := 0; at < len(from); at += 1 << 20 {
			if _, err := conn.Write(from[at : at+1<<20]); err != nil {
				return err
			}
		}
		return nil
	}
	receive := func(conn net.Conn) error {
		for at := 0; at < len(to); {
			n, err := conn.Read(to[at:min(len(to), at+1<<20)])
			if err != nil {
				return err
			}
			at += n
		}
		return nil
	}
	return overTCP(send, receive)
}

// overTCP lets one send to the other over a connection on loopback.
func overTCP(send, receive func(net.Conn) error) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	received := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			received <- err
			return
		}
		err = receive(conn)
		received <- errors.Join(err, conn.Close())
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err == nil {
		err = send(conn)
		err = errors.Join(err, conn.Close())
	}
	return errors.Join(err, l.Close(), <-received)
}
