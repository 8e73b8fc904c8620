package peer

import (
	"bytes"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"drafter/internal/need"
	"drafter/internal/vmmtest"
)

// What is to be said of a VM goes to the logger of its host, and nowhere else.
func TestLogger(t *testing.T) {
	need.Root(t)
	need.FUSE(t)
	var own, others bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&others, &slog.HandlerOptions{Level: slog.LevelDebug})))
	t.Cleanup(func() { slog.SetDefault(before) })

	pkg := t.TempDir()
	vmmtest.WritePackage(t, pkg)
	devices, err := PackageDevices(pkg, filepath.Join(t.TempDir(), "instance"))
	if err != nil {
		t.Fatal(err)
	}
	host := vmmtest.Host(t, &vmmtest.Driver{T: t})
	host.Logger = slog.New(slog.NewTextHandler(&own, &slog.HandlerOptions{Level: slog.LevelDebug}))
	p, err := New(Config{Host: host, Devices: devices})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Resume(t.Context()); err != nil {
		t.Error(err)
	}
	if err := p.Suspend(t.Context()); err != nil {
		t.Error(err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	for _, want := range []string{"Resumed VM", "Set the guest's clock", "Suspended VM"} {
		if !strings.Contains(own.String(), want) {
			t.Errorf("the logger does not have %q", want)
		}
	}
	if others.Len() > 0 {
		t.Errorf("the default logger has:\n%s", others.String())
	}
}
