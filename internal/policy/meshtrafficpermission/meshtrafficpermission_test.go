package meshtrafficpermission_test

import (
	"testing"

	"kuma/internal/policy/meshtrafficpermission"
	"kuma/internal/policy/policytest"
)

func TestCases(t *testing.T) { policytest.Run(t, meshtrafficpermission.Policy) }
