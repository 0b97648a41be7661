package errs_test

import (
	"fmt"
	"io"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/errs"
)

func TestKindSurvivesWrapping(t *testing.T) {
	inner := errs.New(errs.NotFound, "read %q: %w", "a", io.EOF)
	err := fmt.Errorf("load: %w", inner)
	if got := errs.KindOf(err); got != errs.NotFound {
		t.Errorf("KindOf = %v, want not found", got)
	}
	if !errs.Is(err, errs.NotFound) || errs.Is(nil, errs.Internal) {
		t.Error("Is does not agree with KindOf")
	}
	if got, want := err.Error(), `load: read "a": EOF`; got != want {
		t.Errorf("message = %q, want %q", got, want)
	}
	if errs.KindOf(io.EOF) != errs.Internal {
		t.Error("a foreign error must be internal")
	}
}

func TestFields(t *testing.T) {
	if errs.Fields() != nil {
		t.Error("no fields must be no error")
	}
	err := errs.Fields(errs.Under("spec", []errs.Field{{Path: "to[0]", Message: "bad"}, {Path: "[1].x", Message: "worse"}, {Message: "all"}})...)
	want := []errs.Field{{Path: "spec.to[0]", Message: "bad"}, {Path: "spec[1].x", Message: "worse"}, {Path: "spec", Message: "all"}}
	if diff := cmp.Diff(want, errs.FieldsOf(errs.New(errs.Invalid, "apply: %w", err))); diff != "" {
		t.Error(diff)
	}
	if got := err.Error(); got != "spec.to[0]: bad; spec[1].x: worse; spec: all" {
		t.Errorf("Error() = %q", got)
	}
}
