package vmm

import (
	"fmt"
	"io"
)

// ConfigDevice is an open config device.
type ConfigDevice interface {
	io.ReaderAt
	Size() int64 // bytes
}

// ReadConfigDevice reads the config device d, for [DecodePackageConfig]. If d is too large for a
// config, it reads no more than shows that.
func ReadConfigDevice(d ConfigDevice) ([]byte, error) {
	b := make([]byte, min(d.Size(), maxConfig+1))
	if _, err := d.ReadAt(b, 0); err != nil {
		return nil, fmt.Errorf("read config device: %w", err)
	}
	return b, nil
}

// DecodeConfigDevice reads and checks the config device d; see [ReadPackageConfig].
func DecodeConfigDevice(d ConfigDevice) (*PackageConfig, error) {
	b, err := ReadConfigDevice(d)
	if err != nil {
		return nil, err
	}
	c, err := DecodePackageConfig(b)
	if err != nil {
		return nil, fmt.Errorf("config device: %w", err)
	}
	return c, nil
}
