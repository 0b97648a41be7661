// Package errs is the one error type of the product: what kind of failure it
// is, a message for people, the fields at fault, and the cause beneath.
//
// Code branches on the kind, people read the message. The HTTP API maps kinds
// to status codes in one table; nothing else needs to know.
package errs

import (
	"errors"
	"fmt"
	"strings"
)

// Kind says what sort of failure an error is. It is the only thing about an
// error that code may branch on.
type Kind uint8

const (
	// Internal is a failure of ours; the caller can't mend it.
	Internal Kind = iota
	// Invalid is a request or resource that breaks the contract.
	Invalid
	// NotFound is a thing that does not exist.
	NotFound
	// Conflict is a write that another write overtook, or a name that is taken.
	Conflict
	// Unauthenticated is a credential that is missing or does not verify.
	Unauthenticated
	// Denied is a caller who is known and may not do this.
	Denied
	// NotAllowed is an operation that this control plane never offers, such as
	// writing a kind that the system manages.
	NotAllowed
	// Unavailable is a part that can't answer now; trying again may help.
	Unavailable
)

var kindNames = [...]string{"internal", "invalid", "not found", "conflict", "unauthenticated", "denied", "not allowed", "unavailable"}

// String returns the kind in words.
func (k Kind) String() string { return kindNames[k] }

// Field is one field at fault. Path is its place in the document as the user
// wrote it, such as "networking.inbound[0].port"; Message says what is wrong.
type Field struct {
	Path    string
	Message string
}

// Error is a failure with a kind. Message is lower case and has no full stop;
// it may be empty where Fields say it all.
type Error struct {
	Kind    Kind
	Message string
	Fields  []Field
	Cause   error
}

// New makes an error of a kind. The format takes %w for a cause, whose fields
// are then the error's own too.
func New(kind Kind, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Kind: kind, Message: err.Error(), Fields: FieldsOf(err), Cause: errors.Unwrap(err)}
}

// Fields makes an Invalid error from fields at fault, or returns nil if there
// are none.
func Fields(fields ...Field) error {
	if len(fields) == 0 {
		return nil
	}
	return &Error{Kind: Invalid, Fields: fields}
}

// Error returns the message and then each field at fault.
func (e *Error) Error() string {
	if e.Message != "" {
		return e.Message
	}
	parts := make([]string, 0, len(e.Fields))
	for _, f := range e.Fields {
		if f.Path == "" {
			parts = append(parts, f.Message)
			continue
		}
		parts = append(parts, f.Path+": "+f.Message)
	}
	return strings.Join(parts, "; ")
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// KindOf returns the kind of the first Error in err's chain, or Internal.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return Internal
}

// Is reports whether err is of the kind. It is false for a nil error.
func Is(err error, kind Kind) bool { return err != nil && KindOf(err) == kind }

// FieldsOf returns the fields of the first Error in err's chain.
func FieldsOf(err error) []Field {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Fields
	}
	return nil
}

// Under returns the fields with prefix put before each path: "inbound[0]" and
// "port" give "inbound[0].port"; a path that starts with "[" is joined
// without a dot.
func Under(prefix string, fields []Field) []Field {
	out := make([]Field, len(fields))
	for i, f := range fields {
		switch {
		case f.Path == "":
			f.Path = prefix
		case prefix == "" || strings.HasPrefix(f.Path, "["):
			f.Path = prefix + f.Path
		default:
			f.Path = prefix + "." + f.Path
		}
		out[i] = f
	}
	return out
}
