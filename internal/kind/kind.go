// Package kind lets callers tell errors apart by their kinds. Public packages export the kinds
// under their own names.
package kind

import "errors"

// The kinds.
var (
	ErrInUse        = errors.New("in use")
	ErrNotSuspended = errors.New("not suspended")
	ErrIncompatible = errors.New("incompatible")
	ErrUnauthorized = errors.New("not authorized")
	ErrNotStarted   = errors.New("not started; start, resume or receive it first")
	ErrStarted      = errors.New("started already; make a new one")
	ErrClosed       = errors.New("closed already")
)

// Of gives an error a kind, for [errors.Is], and leaves its text unchanged. A nil error stays nil.
func Of(kind, err error) error {
	if err == nil {
		return nil
	}
	return &kinded{err, kind}
}

type kinded struct {
	error
	kind error
}

// Unwrap returns the error and its kind.
func (k *kinded) Unwrap() []error { return []error{k.error, k.kind} }
