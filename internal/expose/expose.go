// Package expose gives devices paths that a VMM can open. Packages fuse and nbd below it do so in
// different ways.
package expose

import (
	"errors"
	"fmt"
	"os"

	"drafter/internal/block"
)

// Ways to expose a device, for --expose.
const (
	Auto = "auto" // FUSE where the host has it, else NBD
	FUSE = "fuse"
	NBD  = "nbd"
)

// Kind says how a device is used.
type Kind int

const (
	// Disk is read and written by the VMM on behalf of the guest, which caches it itself.
	Disk Kind = iota
	// File is read or written as a whole.
	File
)

// Device is a device to expose.
type Device struct {
	Name   string
	Kind   Kind
	Device block.Device
}

// Exposure is a set of exposed devices.
type Exposure interface {
	// Path is where a device is exposed.
	Path(name string) string
	// Failed returns the first error that a device gave to the users of its path: they only see an
	// I/O error. Want of room does not count; see [block.Backlog].
	Failed() error
	// Close removes the paths, which nobody may use any more. It neither syncs nor closes the
	// devices.
	Close() error
}

// Choose returns FUSE or NBD for a value of --expose, or an error if this host does not have it.
func Choose(way string) (string, error) {
	_, fuse := os.Stat("/dev/fuse")
	_, nbd := os.Stat("/sys/module/nbd")
	switch way {
	case "", Auto:
		switch {
		case fuse == nil:
			return FUSE, nil
		case nbd == nil:
			return NBD, nil
		}
		return "", errors.New("this host can expose devices neither by FUSE (/dev/fuse is missing) nor by NBD; load one of them with 'modprobe fuse' or 'modprobe nbd'")
	case FUSE:
		if fuse != nil {
			return "", errors.New("this host has no /dev/fuse; load it with 'modprobe fuse', or choose --expose nbd")
		}
	case NBD:
		if nbd != nil {
			return "", errors.New("this host has no NBD module; load it with 'modprobe nbd', or choose --expose fuse")
		}
	default:
		return "", fmt.Errorf("way to expose devices %q is unknown; choose auto, fuse or nbd", way)
	}
	return way, nil
}
