// Package store says how resources are kept and how changes are followed: one
// interface, and the promises that every implementation of it keeps. Package
// storetest holds them as tests.
package store

import (
	"context"
	"errors"
	"iter"

	"kuma/internal/errs"
	"kuma/internal/resource"
)

// Store keeps resources.
//
// Every Put takes the next revision, which all its writes share; revision order
// is commit order, for all readers. What a read returns is shared and never
// changed. Errors are of package errs: NotFound, Conflict, Unavailable (can't
// write or read now), and Internal.
type Store interface {
	// Get returns one resource, or errs.NotFound.
	Get(ctx context.Context, key resource.Key) (*resource.Resource, error)
	// List returns the resources of a kind, ordered by mesh and name, and the
	// revision at which they were read. An empty mesh means all meshes; an
	// empty kind means all kinds.
	List(ctx context.Context, kind, mesh string) ([]*resource.Resource, uint64, error)
	// Put commits all writes in one transaction, or none, and returns the
	// revision. When it returns nil the writes survive a crash, where the
	// store survives one at all. The resources' times and versions are set by
	// the store in copies; what was passed in stays as it is. A key may be there
	// once. Without writes nothing is done.
	Put(ctx context.Context, writes ...Write) (uint64, error)
	// Watch yields batches of changes after revision since, in order, none
	// twice and none left out: first what has happened already, then what
	// happens, until ctx ends or the loop is left. A batch holds whole
	// transactions. It yields ErrTooOld once and
	// ends if the store no longer knows all changes after since, or the reader
	// has fallen too far behind: List then, and watch from its revision.
	Watch(ctx context.Context, since uint64) iter.Seq2[[]Event, error]
}

// ErrTooOld says that the changes after a revision are no longer all known.
var ErrTooOld = errors.New("the revision is too old to be followed from")

// Event is one change.
type Event struct {
	Revision uint64
	Key      resource.Key
	// Resource is the new state, or nil where the resource was deleted.
	Resource *resource.Resource
}

// Write is one change to be made: of Resource, or, where that is nil, the
// deletion of Key.
type Write struct {
	Key      resource.Key
	Resource *resource.Resource
	// If says what must hold, or the whole transaction fails with
	// errs.Conflict (errs.NotFound for the deletion of what is not there).
	If Condition
}

// Condition is what must hold for a write. The zero value demands nothing.
type Condition struct {
	// Absent: there must be no such resource.
	Absent bool
	// Version, where not 0: the resource must be there in this version.
	Version uint64
}

// Set writes a resource whatever is there.
func Set(r *resource.Resource) Write { return Write{Key: r.Key(), Resource: r} }

// Create writes a resource that must not be there yet.
func Create(r *resource.Resource) Write {
	return Write{Key: r.Key(), Resource: r, If: Condition{Absent: true}}
}

// Replace writes a resource that must be there in the version given.
func Replace(r *resource.Resource, version uint64) Write {
	return Write{Key: r.Key(), Resource: r, If: Condition{Version: version}}
}

// Remove deletes a resource in any version.
func Remove(key resource.Key) Write { return Write{Key: key} }

// Check tells whether a write may replace what is there (nil: nothing). Every
// store uses it, so that all refuse alike.
func (w Write) Check(old *resource.Resource) error {
	switch {
	case w.If.Absent && old != nil:
		return errs.New(errs.Conflict, "%s exists already, in version %d", w.Key, old.Version)
	case w.If.Version != 0 && old == nil:
		return errs.New(errs.Conflict, "%s does not exist; version %d was expected", w.Key, w.If.Version)
	case w.If.Version != 0 && old.Version != w.If.Version:
		return errs.New(errs.Conflict, "%s has version %d; version %d was expected: read it again, and repeat the change on what is there now", w.Key, old.Version, w.If.Version)
	case w.Resource == nil && old == nil:
		return errs.New(errs.NotFound, "%s not found", w.Key)
	}
	return nil
}
