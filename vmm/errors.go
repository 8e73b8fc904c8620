package vmm

import (
	"errors"

	"drafter/internal/block"
	"drafter/internal/kind"
)

var (
	// ErrPoweredOff says that the guest has shut itself down.
	ErrPoweredOff = errors.New("the guest powered itself off")
	// ErrInUse says that another process uses a device, a network namespace or an output.
	ErrInUse = kind.ErrInUse
	// ErrNotSuspended says that a suspend has failed and the VM is unchanged: its devices do not
	// hold it.
	ErrNotSuspended = kind.ErrNotSuspended
	// ErrIncompatible says that a VM cannot run on this host, whatever is tried: its VMM or its CPU
	// is another one.
	ErrIncompatible = kind.ErrIncompatible
	// ErrNotStarted says that a component is used before it was started. Nothing was touched.
	ErrNotStarted = kind.ErrNotStarted
	// ErrStarted says that a component was started already, which is done once. Nothing was touched.
	ErrStarted = kind.ErrStarted
	// ErrClosed says that a component is used after its Close. Nothing was touched.
	ErrClosed = kind.ErrClosed
)

// StatusError says why the VM of a state device cannot be resumed. If [Status.OfMigration] is true,
// the VM runs elsewhere, may run elsewhere, or has not wholly arrived here.
type StatusError struct {
	Status Status
	text   string
}

// Error says why, and what can be done about it.
func (e *StatusError) Error() string { return e.text }

// Unstored tells whether an error says that something cannot be stored at the moment, for example
// in a full file system. Nothing is lost then, and the operation can be tried again.
func Unstored(err error) bool { return block.Unstored(err) }
