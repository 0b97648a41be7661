package meshtimeout_test

import (
	"testing"

	"kuma/internal/policy/meshtimeout"
	"kuma/internal/policy/policytest"
)

func TestCases(t *testing.T) { policytest.Run(t, meshtimeout.Policy) }
