package block

import "io"

// Section returns size bytes of d at off, for reading. The range must lie in d. Closing it does not
// close d.
func Section(d Device, off, size int64) Device {
	return &section{io.NewSectionReader(d, off, size)}
}

type section struct{ *io.SectionReader }

// ReadAt implements [Device].
func (s *section) ReadAt(p []byte, off int64) (int, error) {
	if err := checkRange(s, off, int64(len(p))); err != nil {
		return 0, err
	}
	n, err := s.SectionReader.ReadAt(p, off)
	if n == len(p) {
		err = nil // io.EOF at the end, which is none of a device's
	}
	return n, err
}

// WriteAt implements [Device].
func (*section) WriteAt([]byte, int64) (int, error) { return 0, ErrReadOnly }

// Sync implements [Device].
func (*section) Sync() error { return nil }

// Close implements [Device].
func (*section) Close() error { return nil }
