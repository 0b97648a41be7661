package envoytest

import (
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"kuma/internal/envoy"
)

// Validate checks every message against the rules that Envoy holds it to, also
// those within Any.
func Validate(res envoy.Resources) error {
	for _, byName := range res {
		for name, p := range byName {
			if err := validateAny(p.Body); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return nil
}

func validateAny(a *anypb.Any) error {
	m, err := a.UnmarshalNew()
	if err != nil {
		return err
	}
	if v, ok := m.(interface{ ValidateAll() error }); ok {
		if err := v.ValidateAll(); err != nil {
			return err
		}
	}
	return validateWithin(m)
}

// validateWithin finds each Any.
func validateWithin(m proto.Message) error {
	var failed error
	var visit func(protoreflect.Message) bool
	visit = func(m protoreflect.Message) bool {
		if a, ok := m.Interface().(*anypb.Any); ok {
			failed = validateAny(a)
			return failed == nil
		}
		m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
			switch {
			case f.IsMap() && f.MapValue().Message() != nil:
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool { return visit(v.Message()) })
			case f.IsList() && f.Message() != nil:
				for i := range v.List().Len() {
					if !visit(v.List().Get(i).Message()) {
						break
					}
				}
			case !f.IsMap() && !f.IsList() && f.Message() != nil:
				visit(v.Message())
			}
			return failed == nil
		})
		return failed == nil
	}
	visit(m.ProtoReflect())
	return failed
}
