package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"drafter/api"
	"drafter/internal/newfile"
)

// Prune removes what no VM needs and was not used for some time. A package with a name stays, unless
// all are to go: nobody could make it again.
func (d *Daemon) Prune(r api.Prune) (pruned api.Pruned, err error) {
	before := time.Now().Add(-time.Duration(r.Unused) * time.Second)
	pruned = api.Pruned{Packages: []api.Package{}, Images: []api.Image{}, Blueprints: []string{}}
	if err := d.prunePackages(before, r, &pruned); err != nil {
		return pruned, err
	}
	if err := d.pruneImages(before, r.DryRun, &pruned); err != nil {
		return pruned, err
	}
	return pruned, d.pruneBlueprints(before, r.DryRun, &pruned)
}

func (d *Daemon) prunePackages(before time.Time, r api.Prune, pruned *api.Pruned) error {
	var unused []*stored
	d.mu.Lock()
	if err := d.known(); err != nil {
		d.mu.Unlock()
		return err
	}
	for _, p := range d.packages {
		if d.needed(p) == nil && !p.Used.After(before) && (p.Name == "" || r.All) {
			unused = append(unused, p)
		}
	}
	d.mu.Unlock()
	for _, p := range unused {
		if !r.DryRun {
			err := d.discard(p)
			if errors.Is(err, ErrConflict) { // a run has come to need it
				continue
			}
			if err != nil {
				return err
			}
		}
		pruned.Packages = append(pruned.Packages, p.Package)
		pruned.Freed += p.Size
	}
	return nil
}

// pruneImages forgets images of which no package is left, and records that cannot be read.
func (d *Daemon) pruneImages(before time.Time, dryRun bool, pruned *api.Pruned) error {
	gone := map[string]bool{}
	for _, p := range pruned.Packages {
		gone[p.Key] = true
	}
	images, err := d.Images()
	if err != nil {
		return err
	}
	kept := map[string]bool{}
	for _, i := range images {
		needed := i.Used.After(before)
		for _, key := range i.Packages {
			needed = needed || !gone[key]
		}
		if needed {
			kept[d.imageRecord(i.Reference, i.Platform)] = true
		} else {
			pruned.Images = append(pruned.Images, i)
		}
	}
	files, err := filepath.Glob(d.dir("images", "*.json"))
	if err != nil || dryRun {
		return err
	}
	for _, f := range files {
		if info, err := os.Stat(f); err == nil && !kept[f] && !info.ModTime().After(before) {
			if err := newfile.Remove(f); err != nil {
				return fmt.Errorf("forget an image: %w", err)
			}
		}
	}
	return nil
}

// pruneBlueprints removes those that the daemon has made, unless it is making a package.
func (d *Daemon) pruneBlueprints(before time.Time, dryRun bool, pruned *api.Pruned) error {
	if !d.building.TryLock() {
		return nil
	}
	defer d.building.Unlock()
	entries, err := os.ReadDir(d.dir("blueprints"))
	if err != nil {
		return fmt.Errorf("find blueprints: %w", err)
	}
	for _, e := range entries {
		dir, gone := d.dir("blueprints", e.Name()), d.dir("blueprints", newKey()+newBlueprint)
		size, used := usage(dir)
		if !keyPattern.MatchString(e.Name()) || used.After(before) {
			continue
		}
		if !dryRun {
			if err = newfile.Rename(dir, gone); err == nil {
				err = os.RemoveAll(gone)
			}
			if err != nil {
				return fmt.Errorf("remove blueprint %s: %w", e.Name(), err)
			}
		}
		pruned.Blueprints = append(pruned.Blueprints, e.Name())
		pruned.Freed += size
	}
	return nil
}
