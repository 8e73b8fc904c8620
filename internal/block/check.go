package block

import (
	"context"
	"errors"
	"fmt"
)

// Check verifies that base, overlay and state file are intact and belong together. baseID is the
// content id of base, which Check closes. It returns what is wrong, one line of text for each
// problem, and an error only if it could not read the files. Nothing is changed. The device must
// not be in use.
func Check(ctx context.Context, base Device, baseID ID, paths OverlayPaths) (problems []string, err error) {
	defer func() { err = errors.Join(err, base.Close()) }()
	overlay, oerr := fileExists(paths.Overlay)
	state, serr := fileExists(paths.State)
	if err := errors.Join(oerr, serr); err != nil {
		return nil, err
	}
	if !overlay || !state {
		if _, err := overlayExists(paths); err != nil {
			return []string{err.Error()}, nil
		}
		return []string{fmt.Sprintf("overlay %s does not exist; it is made when the device is used", paths.Overlay)}, nil
	}
	s, data, err := openOverlayFiles(paths)
	if err != nil {
		return []string{err.Error()}, nil // a file that cannot be opened is what Check looks for
	}
	defer func() { err = errors.Join(err, data.Close(), s.close()) }()
	o := newOverlay(base, data, s)
	if err := o.checkFiles(paths, baseID); err != nil {
		return []string{err.Error()}, nil
	}
	for _, page := range s.damaged {
		problems = append(problems, fmt.Sprintf("state file %s: one copy of page %d is damaged, the other is used; this is so after a power cut, and mended by the next sync", paths.State, page))
	}
	uncommitted := int64(0)
	for off := int64(0); off < o.Size(); {
		if ctx.Err() != nil {
			return problems, context.Cause(ctx)
		}
		start, end, err := data.NextData(off)
		if err != nil {
			return problems, err
		}
		for start < end {
			has, n := o.run(start, end-start)
			if !has {
				uncommitted += n
			}
			start += n
		}
		off = max(end, off+1)
	}
	if uncommitted > 0 {
		problems = append(problems, fmt.Sprintf("overlay %s holds %d bytes that were never synced: its writer was killed, or its VM has moved away; they are discarded when the device is used", paths.Overlay, uncommitted))
	}
	// Every block can be read.
	buf := make([]byte, 1<<20)
	for off := int64(0); off < o.Size() && ctx.Err() == nil; off += int64(len(buf)) {
		if _, err := o.ReadAt(buf[:min(int64(len(buf)), o.Size()-off)], off); err != nil {
			problems = append(problems, err.Error())
		}
	}
	return problems, context.Cause(ctx)
}
