package daemon

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"

	"drafter/agent"
	"drafter/api"
)

// files copies files of a VM as tar archives: GET reads one, with all below it, PUT unpacks an archive
// in a directory. The path is a query parameter.
func (d *Daemon) files(w http.ResponseWriter, r *http.Request) {
	d.work.Add(1)
	defer d.work.Done()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(d.ctx, cancel)() //nolint:contextcheck // it ends with the daemon, too
	guest, err := d.guest(ctx, r.PathValue("vm"))
	if err != nil {
		refuse(w, err)
		return
	}
	defer guest.Close()
	file := agent.File{Path: r.URL.Query().Get("path")}
	if r.Method == http.MethodPut {
		err = guest.CopyIn(ctx, file, r.Body)
	} else {
		var archive io.ReadCloser
		if archive, err = guest.CopyOut(ctx, file); err == nil {
			defer archive.Close()
			w.Header().Set("Content-Type", "application/x-tar")
			if _, err := io.Copy(w, archive); err != nil {
				d.log.Debug("A copy out of a VM was cut off", "error", err)
				panic(http.ErrAbortHandler) // an answer that ends well would be taken for all of it
			}
		}
	}
	if err != nil {
		refuse(w, missing(err))
	}
}

// missing is an error that may be due to a file that is not there.
func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return &notFoundError{err}
	}
	return err
}

type notFoundError struct{ error }

func (e *notFoundError) Unwrap() []error { return []error{e.error, ErrNotFound} }

// stat describes a file of a VM.
func (d *Daemon) stat(ctx context.Context, name, path string) (f api.File, err error) {
	guest, err := d.guest(ctx, name)
	if err != nil {
		return f, err
	}
	defer guest.Close()
	info, err := guest.Stat(ctx, agent.File{Path: path})
	if err != nil {
		return f, missing(err)
	}
	return api.File{Directory: info.Mode.IsDir(), Mode: info.Mode.String(), Size: info.Size, Modified: info.Modified}, nil
}
