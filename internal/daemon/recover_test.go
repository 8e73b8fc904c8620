package daemon

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"drafter/api"
)

// A VM's process that has just been started, and does not listen yet, is called until it does, or has
// ended.
func TestSlowProcess(t *testing.T) {
	d := open(t, testDir(t))
	o, err := d.Run(api.Run{Image: "docker://image"})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	d.mu.Lock()
	v, err := d.find("image")
	d.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(v.seat().control(), "socket")
	call := func() <-chan error {
		if err := os.Rename(socket, socket+".away"); err != nil {
			t.Fatal(err)
		}
		dialed := make(chan error, 1)
		go func() {
			c, err := dial(t.Context(), v.owner(), v.seat())
			if err == nil {
				err = c.Close()
			}
			dialed <- err
		}()
		return dialed
	}
	dialed := call()
	select {
	case err := <-dialed:
		t.Fatal("it was not called again:", err)
	case <-time.After(10 * listenPause):
	}
	if err := os.Rename(socket+".away", socket); err != nil {
		t.Fatal(err)
	}
	if err := <-dialed; err != nil {
		t.Error(err)
	}
	dialed = call()
	o, err = d.Kill("image")
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	if err := <-dialed; err == nil {
		t.Error("nobody was there")
	}
	o, err = d.Remove("image", true)
	if err := d.done(t, o, err); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}
