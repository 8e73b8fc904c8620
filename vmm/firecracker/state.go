package firecracker

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
)

// A state device's content is, all integers little endian:
//
//	offset  size   field
//	0       8      magic "DRFTFCS\x01"
//	8       4      number of pages, n
//	12      4·n    the first pages that the VM touched after its last resume, in order
//	12+4·n  …      Firecracker's snapshot, which ends with its checksum
const stateMagic = "DRFTFCS\x01"

// maxFirst bounds the number of pages in a state.
const maxFirst = 1 << 16

func writeState(w io.Writer, first []uint32, snapshot []byte) error {
	b := make([]byte, 0, 12+4*len(first))
	b = append(b, stateMagic...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(first)))
	for _, p := range first {
		b = binary.LittleEndian.AppendUint32(b, p)
	}
	if _, err := w.Write(b); err != nil {
		return err
	}
	_, err := w.Write(snapshot)
	return err
}

func readState(r io.Reader) (first []uint32, snapshot []byte, err error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, nil, err
	}
	if len(b) < 12 || string(b[:8]) != stateMagic {
		return nil, nil, errors.New("it is no state of Firecracker")
	}
	n := int64(binary.LittleEndian.Uint32(b[8:]))
	if n > maxFirst || 12+4*n > int64(len(b)) {
		return nil, nil, fmt.Errorf("it is damaged: it lists %d pages", n)
	}
	for i := range n {
		first = append(first, binary.LittleEndian.Uint32(b[12+4*i:]))
	}
	snapshot = b[12+4*n:]
	return first, snapshot, checkSnapshot(snapshot)
}

// Snapshot returns the snapshot in a saved state, as Firecracker itself loads it.
func Snapshot(state []byte) ([]byte, error) {
	_, snapshot, err := readState(bytes.NewReader(state))
	return snapshot, err
}

// jones is the polynomial of the crc64 that Redis and the Rust crate crc64 use, reflected. They
// start with zero and do not invert, as Go does.
var jones = crc64.MakeTable(0x95ac9329ac4bc9b5)

// checkSnapshot refuses a snapshot that is not whole: its last eight bytes are the CRC-64 of what
// is before them (src/vmm/src/snapshot/mod.rs of Firecracker).
func checkSnapshot(b []byte) error {
	if len(b) <= 8 {
		return fmt.Errorf("the snapshot is truncated to %d bytes", len(b))
	}
	body, sum := b[:len(b)-8], binary.LittleEndian.Uint64(b[len(b)-8:])
	if got := ^crc64.Update(^uint64(0), jones, body); got != sum {
		return fmt.Errorf("the snapshot is damaged: checksum %016x instead of %016x", got, sum)
	}
	return nil
}
