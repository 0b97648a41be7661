package cp

import (
	"strings"
	"testing"
	"time"
)

// Settings of the contract take effect under the contract's names.
func TestContractNames(t *testing.T) {
	cfg, warnings, err := Load("", []string{
		"KUMA_RUNTIME_UNIVERSAL_DATAPLANE_CLEANUP_AGE=48h", "KUMA_GENERAL_DNS_CACHE_TTL=1m", "KUMA_DIAGNOSTICS_DEBUG_ENDPOINTS=true",
	})
	if err != nil || len(warnings) != 0 {
		t.Fatal(warnings, err)
	}
	if cfg.Runtime.Universal.DataplaneCleanupAge != 48*time.Hour || cfg.General.DNSCacheTTL != time.Minute || !cfg.Diagnostics.DebugEndpoints {
		t.Errorf("%+v %s %t", cfg.Runtime, cfg.General.DNSCacheTTL, cfg.Diagnostics.DebugEndpoints)
	}
	_, warnings, err = Load("", []string{"KUMA_RUNTIME_UNIVERSAL_VIP_REFRESH_INTERVAL=1s", "KUMA_RUNTIME_UNIVERSAL_WORKLOAD_GENERATION_INTERVAL=1s"})
	if err != nil || len(warnings) != 2 {
		t.Errorf("settings without a meaning here: %q, %v", warnings, err)
	}
	for name, path := range map[string]string{
		"KUMA_RUNTIME_UNIVERSAL_DATAPLANE_CLEANUP_AGE": "runtime.universal.dataplaneCleanupAge", "KUMA_GENERAL_DNS_CACHE_TTL": "general.dnsCacheTTL",
	} {
		if _, _, err := Load("", []string{name + "=0s"}); err == nil || !strings.Contains(err.Error(), path+": must be positive") {
			t.Errorf("%s=0s: %v", name, err)
		}
	}
}
