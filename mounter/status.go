package mounter

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/google/uuid"

	"drafter/internal/block"
	"drafter/internal/newfile"
	"drafter/internal/private"
)

// status says, in a file beside a device's files, that these are not the device: it is elsewhere,
// or arriving. Without a status they are the device.
type status string

const (
	arriving status = "arriving" // it was being received
	leaving  status = "leaving"  // it was being handed over; the target may own it
	gone     status = "gone"     // it has moved away
)

func (d *Device) statusFile() string {
	if d.State != "" {
		return d.State + ".status"
	}
	return d.Base + ".status"
}

// setStatus notes a status durably.
func (d *Device) setStatus(s status, migration uuid.UUID) error {
	return newfile.Write(d.statusFile(), func(f *os.File) error {
		_, err := fmt.Fprintf(f, "%s %s\n", s, migration)
		return err
	})
}

// clearStatus takes the note back, durably.
func (d *Device) clearStatus() error {
	return newfile.Remove(d.statusFile())
}

func (d *Device) status() (status, error) {
	b, err := private.ReadFile(d.statusFile(), 256)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	s, _, _ := strings.Cut(string(b), " ")
	return status(s), err
}

// CheckHere refuses a device of a mounter whose files are no longer the device, or not yet.
func (d *Device) CheckHere() error {
	s, err := d.status()
	switch {
	case err != nil || s == "":
		return err
	case s == arriving:
		return fmt.Errorf("it never wholly arrived here; it is where it was to come from (remove %s to use these files all the same)", d.statusFile())
	case s == leaving:
		return fmt.Errorf("its mounter ended while it was being handed over; look whether the target has it, and only if not, remove %s", d.statusFile())
	}
	return fmt.Errorf("it has moved away; receive it again, or remove %s to use what was here then", d.statusFile())
}

// makeRoom removes the files of a device that has moved away, or never wholly arrived. It refuses
// to touch any other.
func (d *Device) makeRoom() error {
	s, err := d.status()
	if err != nil {
		return err
	}
	if s != arriving && s != gone {
		written := []string{d.Overlay, d.State}
		if d.Overlay == "" {
			written = []string{d.Base}
		}
		for _, path := range written {
			if _, err := os.Stat(path); err == nil {
				return fmt.Errorf("%s exists, and the device would overwrite it; choose other files, or remove it", path)
			}
		}
		return nil
	}
	if d.Overlay != "" {
		if err := block.RemoveOverlay(d.files().OverlayPaths()); err != nil {
			return err
		}
		return d.files().ForgetMissing()
	}
	if err := os.Remove(d.Base); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return d.files().ForgetMissing()
}
