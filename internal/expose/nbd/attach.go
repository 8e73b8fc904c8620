package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/internal/expose"
	"drafter/internal/private"
)

// Attached is a set of devices attached to /dev/nbdN. It implements [expose.Exposure]. If this
// process dies, its sockets close, and the kernel fails all requests and frees the devices.
type Attached struct {
	dir     string
	devices []*attached
}

var _ expose.Exposure = (*Attached)(nil)

type attached struct {
	name   string
	index  uint32
	cancel context.CancelFunc
	served chan struct{}
}

// sectorSize is the kernel's unit for block devices, in bytes.
const sectorSize = 512

// connectionsPerDevice is how many sockets the kernel spreads its requests over.
const connectionsPerDevice = 2

// Attach attaches devices to free /dev/nbdN and makes links to them in dir, which Close removes. A
// file that does not consist of whole sectors is copied there instead. The kernel's module nbd must
// be loaded.
func Attach(ctx context.Context, dir string, devices []expose.Device) (_ *Attached, err error) {
	family, err := netlink.GenlFamilyGet("nbd")
	if err != nil {
		return nil, fmt.Errorf("find the kernel's NBD client: %w; load it with 'modprobe nbd'", err)
	}
	if err := private.MkdirAll(dir); err != nil {
		return nil, fmt.Errorf("expose devices: %w", err)
	}
	a := &Attached{dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.Close())
		}
	}()
	for _, d := range devices {
		if err := a.attach(ctx, int(family.ID), d); err != nil {
			return nil, fmt.Errorf("attach device %s: %w", d.Name, err)
		}
	}
	return a, nil
}

func (a *Attached) attach(ctx context.Context, family int, d expose.Device) (err error) {
	if size := d.Device.Size(); size%sectorSize != 0 {
		if d.Kind != expose.File {
			return fmt.Errorf("its size %d is not a multiple of %d, which /dev/nbdN needs; use --expose fuse", size, sectorSize)
		}
		// A kernel, a config: nobody writes to it while a VM runs.
		return block.Export(ctx, a.Path(d.Name), d.Device, nil)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	at := &attached{name: d.Name, cancel: cancel, served: make(chan struct{})}
	var kernel []*os.File
	var workers sync.WaitGroup
	for range connectionsPerDevice {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			cancel()
			return err
		}
		kernel = append(kernel, os.NewFile(uintptr(fds[0]), "nbd"))
		ours := os.NewFile(uintptr(fds[1]), "nbd")
		conn, err := net.FileConn(ours)
		if err = errors.Join(err, ours.Close()); err != nil {
			cancel()
			return err
		}
		workers.Go(func() {
			defer conn.Close()
			stop := context.AfterFunc(ctx, func() { conn.Close() })
			defer stop()
			// What ends the connection is the kernel's disconnect, or this process closing it.
			c := &connection{conn: conn, r: bufio.NewReaderSize(conn, 64<<10)}
			_ = serveExport(ctx, c, &Export{Name: d.Name, Device: d.Device})
		})
	}
	go func() {
		workers.Wait()
		close(at.served)
	}()
	at.index, err = connect(family, d.Device, kernel)
	for _, f := range kernel {
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		cancel()
		<-at.served
		return err
	}
	a.devices = append(a.devices, at)
	return os.Symlink(fmt.Sprintf("/dev/nbd%d", at.index), a.Path(d.Name))
}

// Of include/uapi/linux/nbd-netlink.h of Linux.
const (
	cmdConnect    = 1
	cmdDetach     = 2
	attrIndex     = 1
	attrSize      = 2
	attrBlockSize = 3
	attrFlags     = 5
	attrSockets   = 7
	sockItem      = 1
	sockFD        = 1
)

// connect hands sockets to the kernel, which chooses a free device.
func connect(family int, d block.Device, sockets []*os.File) (index uint32, err error) {
	request := nl.NewNetlinkRequest(family, unix.NLM_F_ACK)
	request.AddData(&nl.Genlmsg{Command: cmdConnect, Version: 1})
	export := Export{Device: d}
	request.AddData(nl.NewRtAttr(attrSize, uint64Bytes(uint64(d.Size()))))
	request.AddData(nl.NewRtAttr(attrBlockSize, uint64Bytes(sectorSize)))
	request.AddData(nl.NewRtAttr(attrFlags, uint64Bytes(uint64(export.flags(false)))))
	list := nl.NewRtAttr(attrSockets|unix.NLA_F_NESTED, nil)
	for _, s := range sockets {
		item := list.AddRtAttr(sockItem|unix.NLA_F_NESTED, nil)
		item.AddRtAttr(sockFD, nl.Uint32Attr(uint32(s.Fd())))
	}
	request.AddData(list)
	replies, err := request.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return 0, fmt.Errorf("connect to the kernel's NBD client: %w", err)
	}
	for _, reply := range replies {
		attrs, err := nl.ParseRouteAttr(reply[nl.SizeofGenlmsg:])
		if err != nil {
			return 0, fmt.Errorf("connect to the kernel's NBD client: %w", err)
		}
		for _, a := range attrs {
			if a.Attr.Type == attrIndex && len(a.Value) == 4 {
				return binary.NativeEndian.Uint32(a.Value), nil
			}
		}
	}
	return 0, errors.New("connect to the kernel's NBD client: it does not say which device it chose")
}

func uint64Bytes(n uint64) []byte { return binary.NativeEndian.AppendUint64(nil, n) }

func disconnect(index uint32) error {
	family, err := netlink.GenlFamilyGet("nbd")
	if err != nil {
		return err
	}
	request := nl.NewNetlinkRequest(int(family.ID), unix.NLM_F_ACK)
	request.AddData(&nl.Genlmsg{Command: cmdDetach, Version: 1})
	request.AddData(nl.NewRtAttr(attrIndex, nl.Uint32Attr(index)))
	_, err = request.Execute(unix.NETLINK_GENERIC, 0)
	return err
}

// Path implements [expose.Exposure].
func (a *Attached) Path(name string) string { return filepath.Join(a.dir, name) }

// Failed implements [expose.Exposure]. The kernel logs what failed.
func (a *Attached) Failed() error { return nil }

// Close implements [expose.Exposure].
func (a *Attached) Close() error {
	var errs []error
	for _, d := range a.devices {
		if err := disconnect(d.index); err != nil {
			errs = append(errs, fmt.Errorf("detach /dev/nbd%d: %w", d.index, err))
		}
		d.cancel()
		<-d.served
	}
	a.devices = nil
	return errors.Join(append(errs, os.RemoveAll(a.dir))...)
}
