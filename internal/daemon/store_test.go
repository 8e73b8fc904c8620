package daemon

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"drafter/api"
	"drafter/client"
	"drafter/internal/await"
	"drafter/internal/need"
	"drafter/internal/ocitest"
	"drafter/internal/vmmtest"
	"drafter/packager"
	"drafter/vmm"
)

// ask sends a request to a daemon's API.
func (d *Daemon) ask(t *testing.T, method, path string, content []byte) *httptest.ResponseRecorder {
	t.Helper()
	answer := httptest.NewRecorder()
	d.Handler().ServeHTTP(answer, httptest.NewRequestWithContext(t.Context(), method, path, bytes.NewReader(content)))
	return answer
}

// archived returns the archive of the one package of a daemon.
func (d *Daemon) archived(t *testing.T) []byte {
	t.Helper()
	answer := d.ask(t, http.MethodGet, "/v1/packages/"+d.Packages()[0].Key+"/archive", nil)
	if answer.Code != http.StatusOK {
		t.Fatal(answer)
	}
	return answer.Body.Bytes()
}

// stores lists what is in the directories of packages, images and blueprints.
func stores(t *testing.T, dir string) (names []string) {
	t.Helper()
	for _, store := range []string{"packages", "images", "blueprints"} {
		entries, err := os.ReadDir(filepath.Join(dir, "lib", store))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			names = append(names, store+"/"+e.Name())
		}
	}
	return names
}

// A package goes out and comes back under a name, and a VM runs from it. It stays while the VM is
// there.
func TestPackages(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	archive := d.archived(t)
	if answer := d.ask(t, http.MethodPost, "/v1/packages?name=warm", archive); answer.Code != http.StatusCreated {
		t.Fatal(answer)
	}
	if answer := d.ask(t, http.MethodPost, "/v1/packages?name=warm", archive); answer.Code != http.StatusConflict {
		t.Error("a name was given twice:", answer)
	}
	o, err := d.Run(api.Run{Image: "warm", Name: "vm"})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	p, err := d.Package("warm")
	if vm, verr := d.VM("vm"); err != nil || verr != nil || vm.Package != p.Key || strings.Join(p.VMs, "") != "vm" || p.Source != api.FromImport {
		t.Errorf("%+v of %+v: %v, %v", vm, p, err, verr)
	}
	for _, r := range []api.Run{
		{Image: "warm", Memory: 2 << 30}, {Image: "warm", CPUs: 7}, {Image: "warm", Command: []string{"x"}}, {Image: p.Key, Env: []string{"X=y"}},
	} {
		o, err := d.Run(r)
		if err := d.done(t, o, err); err == nil || !strings.Contains(err.Error(), "leave that out") {
			t.Errorf("%+v: %v", r, err)
		}
	}
	if err := d.RemovePackage("warm"); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "VM vm") {
		t.Error("a package that a VM needs:", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir)
	if err := d.RemovePackage(p.Key[:shortKey]); !errors.Is(err, ErrConflict) {
		t.Error("the next daemon:", err)
	}
	o, err = d.Remove("vm", true)
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	if err := d.RemovePackage("warm"); err != nil {
		t.Error(err)
	}
	if err := d.RemovePackage("warm"); !errors.Is(err, ErrNotFound) {
		t.Error("it was removed:", err)
	}
	if left := stores(t, dir); len(left) != 2 {
		t.Error(left)
	}
	d.end(t, dir)
}

// What is no whole package is refused, and leaves nothing.
func TestImportRefused(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	archive := d.archived(t)
	damaged := bytes.Clone(archive)
	damaged[len(damaged)-1] ^= 1 // of a checksum
	paths, _ := vmmtest.WritePackage(t, t.TempDir())
	state, err := os.OpenFile(paths[vmm.State], os.O_RDWR, 0)
	if err == nil {
		err = errors.Join(vmm.MarkState(state, vmm.Running), state.Close())
	}
	var killed bytes.Buffer
	if err == nil {
		err = packager.Write(t.Context(), &killed, filepath.Dir(paths[vmm.State]), nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	before := stores(t, dir)
	for name, content := range map[string][]byte{
		"nothing": nil, "no archive": []byte("hello"), "truncated": archive[:len(archive)/2], "damaged": damaged,
		"a VM that was killed": killed.Bytes(),
	} {
		if answer := d.ask(t, http.MethodPost, "/v1/packages?name=x", content); answer.Code != http.StatusUnprocessableEntity {
			t.Error(name, answer)
		}
	}
	if answer := d.ask(t, http.MethodPost, "/v1/packages?name=../x", archive); answer.Code != http.StatusUnprocessableEntity {
		t.Error("a bad name:", answer)
	}
	if after := stores(t, dir); strings.Join(after, " ") != strings.Join(before, " ") {
		t.Errorf("%v; before: %v", after, before)
	}
	d.end(t, dir)
}

// An image goes with its packages, unless a VM needs one of them.
func TestRemoveImage(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	o, err := d.Run(api.Run{Image: "image", Name: "vm"})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	p := d.packages[d.Packages()[0].Key]
	p.Source, p.Digest = api.FromImage, "sha256:1" // as one that a daemon has made
	if images, err := d.Images(); err != nil || len(images) != 1 || len(images[0].Packages) != 1 {
		t.Error(images, err)
	}
	if err := d.RemoveImage("image"); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), "VM vm") {
		t.Error(err)
	}
	o, err = d.Remove("vm", true)
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	if err := d.RemoveImage("image"); err != nil {
		t.Error(err)
	}
	if left := stores(t, dir); len(left) != 0 {
		t.Error("left:", left)
	}
	d.end(t, dir)
}

// Only what nobody needs is pruned, and only what was not used for so long.
func TestPrune(t *testing.T) {
	dir := testDir(t)
	blueprint := filepath.Join(dir, "lib/blueprints", strings.Repeat("0", 32))
	if err := os.MkdirAll(blueprint, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "lib/images/bad.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := open(t, dir)
	if answer := d.ask(t, http.MethodPost, "/v1/packages?name=named", d.archived(t)); answer.Code != http.StatusCreated {
		t.Fatal(answer)
	}
	o, err := d.Run(api.Run{Image: "image", Name: "vm"})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	prune := func(r api.Prune, packages, images, blueprints int) {
		t.Helper()
		p, err := d.Prune(r)
		if err != nil || len(p.Packages) != packages || len(p.Images) != images || len(p.Blueprints) != blueprints {
			t.Errorf("%+v: %+v, %v", r, p, err)
		}
	}
	before := len(stores(t, dir))
	prune(api.Prune{Unused: 3600, All: true}, 0, 0, 0)
	prune(api.Prune{DryRun: true}, 0, 1, 1) // the stand-in for a package does not say of which image it is
	prune(api.Prune{DryRun: true, All: true}, 1, 1, 1)
	if after := len(stores(t, dir)); after != before {
		t.Errorf("a dry run has removed something: %v", stores(t, dir))
	}
	d.building.RLock() // a package is made
	prune(api.Prune{}, 0, 1, 0)
	d.building.RUnlock()
	prune(api.Prune{}, 0, 0, 1)
	o, err = d.Remove("vm", true)
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	prune(api.Prune{}, 1, 0, 0)
	_, done, err := d.usePackage("named", false)
	if err != nil {
		t.Fatal(err)
	}
	prune(api.Prune{All: true}, 0, 0, 0)
	done()
	prune(api.Prune{All: true}, 1, 0, 0)
	if left := stores(t, dir); len(left) != 0 {
		t.Error("left:", left)
	}
	d.end(t, dir)
}

// Where it is not known what a VM needs, nothing is removed.
func TestPruneBesideBadRecord(t *testing.T) {
	dir := testDir(t)
	bad := filepath.Join(dir, "lib/vms/0123456789ab")
	if err := os.MkdirAll(bad, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bad, recordFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := open(t, dir)
	before := len(stores(t, dir))
	if _, err := d.Prune(api.Prune{}); !errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), bad) {
		t.Error(err)
	}
	if err := d.RemovePackage(d.Packages()[0].Key); !errors.Is(err, ErrConflict) {
		t.Error(err)
	}
	if after := len(stores(t, dir)); after != before {
		t.Error(stores(t, dir))
	}
	d.end(t, dir)
}

// A package whose removal is cut short is none any more, and is gone with the next daemon.
func TestRemovedHalf(t *testing.T) {
	need.Root(t)
	dir := testDir(t)
	d := open(t, dir)
	p := d.Packages()[0]
	busy := filepath.Join(d.packageDir(p.Key), "busy")
	if err := errors.Join(os.Mkdir(busy, 0o700), unix.Mount("tmpfs", busy, "tmpfs", 0, "size=4k")); err != nil {
		t.Fatal(err)
	}
	if err := d.RemovePackage(p.Key); !errors.Is(err, unix.EBUSY) {
		t.Error(err)
	}
	mounted, err := filepath.Glob(filepath.Join(dir, "lib/packages/*/busy"))
	if err != nil || len(mounted) != 1 {
		t.Fatal(mounted, err)
	}
	if err := unix.Unmount(mounted[0], 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir)
	if list, left := d.Packages(), stores(t, dir); len(list) != 0 || len(left) != 1 {
		t.Errorf("%+v, %v", list, left)
	}
	d.end(t, dir)
}

// A run and a prune at the same time: there is no VM without its package.
func TestPruneWhileRun(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	archive := d.archived(t)
	ran := 0
	for range 30 {
		if answer := d.ask(t, http.MethodPost, "/v1/packages?name=warm", archive); answer.Code != http.StatusCreated {
			t.Fatal(answer)
		}
		var wait sync.WaitGroup
		wait.Go(func() {
			if _, err := d.Prune(api.Prune{All: true}); err != nil {
				t.Error(err)
			}
		})
		o, err := d.Run(api.Run{Image: "warm", Name: "vm", Pull: "never"})
		err = d.done(t, o, err)
		wait.Wait()
		if vm, verr := d.VM("vm"); verr == nil {
			ran++
			if !exists(d.packageDir(vm.Package)) {
				t.Fatal("its package is gone")
			}
			o, err := d.Remove("vm", true)
			if err := d.done(t, o, err); err != nil {
				t.Fatal(err)
			}
			if err := d.RemovePackage("warm"); err != nil {
				t.Fatal(err)
			}
		} else if err == nil {
			t.Error("the VM that ran is not there")
		}
	}
	t.Logf("%d of 30 came before the prune", ran)
	d.end(t, dir)
}

// A package that was pushed runs by its reference, also when the registry has gone.
func TestRunPushed(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	ref := "docker://" + ocitest.Start(t) + "/vms/it:1"
	key := d.Packages()[0].Key
	o, err := d.Push(api.Push{Source: key, Reference: ref})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		o, err := d.Run(api.Run{Image: ref})
		if err := d.done(t, o, err); err != nil {
			t.Fatal(err)
		}
		vm, err := d.VM(o.VM)
		p, perr := d.Package(vm.Package)
		if err != nil || perr != nil || p.Source != api.FromRegistry || p.Key == key || len(p.VMs) != i+1 {
			t.Errorf("%+v, %+v, %v, %v", vm, p, err, perr)
		}
	}
	o, err = d.Pull(api.Pull{Image: ref, Memory: 2 << 30})
	if err := d.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	if o, err = d.Operation(t.Context(), o.ID, 0); err != nil || len(d.Packages()) != 2 || o.Package == key {
		t.Errorf("it is there once, whatever memory others have: %+v, %v, %+v", o, err, d.Packages())
	}
	images, err := d.Images()
	if err != nil || len(images) != 2 || !images[0].Artifact || images[0].Reference != ref || images[0].Size == 0 || len(images[0].Packages) != 1 {
		t.Errorf("%+v, %v", images, err)
	}
	if _, err := d.Push(api.Push{Source: "none", Reference: ref}); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	d.end(t, dir)
}

// A daemon is killed at any moment of what it does with its stores. What the next one has is whole, and
// nothing is left of the rest.
func TestKilledStores(t *testing.T) {
	dir := testDir(t)
	d := open(t, dir)
	archive := d.archived(t)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	t.Log("seed", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	socket := filepath.Join(dir, "socket")
	for round := range rounds() {
		cmd := exec.Command(os.Args[0], "daemon", dir)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		c := client.New(socket)
		await.True(t, "the daemon answers", func() bool { _, err := c.Host(t.Context()); return err == nil })
		list, err := c.Packages(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range list {
			if err := checkPackage(filepath.Join(dir, "lib/packages", p.Key)); err != nil {
				t.Errorf("round %d: package %s: %v", round, p.Key, err)
			}
		}
		for _, name := range stores(t, dir) {
			if strings.Contains(name, "new") {
				t.Errorf("round %d: %s is left", round, name)
			}
		}
		done, moment := make(chan struct{}), time.Duration(random.IntN(100))*time.Millisecond
		go func() {
			defer close(done)
			for ctx, err := context.Background(), error(nil); err == nil; {
				if _, err = c.Import(ctx, "", io.NopCloser(bytes.NewReader(archive))); err == nil && random.IntN(3) == 0 {
					_, err = c.Prune(ctx, api.Prune{All: true})
				}
			}
		}()
		time.Sleep(moment)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		<-done
		c.Close()
	}
	open(t, dir).end(t, dir)
}
