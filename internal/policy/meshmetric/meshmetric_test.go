package meshmetric_test

import (
	"testing"

	"kuma/internal/policy/meshmetric"
	"kuma/internal/policy/policytest"
)

func TestCases(t *testing.T) { policytest.Run(t, meshmetric.Policy) }
