package insight

import (
	"testing"

	"kuma/internal/mesh"
)

// What a proxy says of its own compatibility does not count, and its node is
// left as it is.
func TestJudged(t *testing.T) {
	r := New(Config{Versions: []string{"2.14.0", "9.0.0"}})
	lie := true
	said := &mesh.Version{KumaDP: &mesh.KumaDPVersion{Version: "1.8.0", KumaCPCompatible: &lie}, Envoy: &mesh.EnvoyVersion{Version: "1.40.0", KumaDPCompatible: true}}
	got := r.judged(said)
	if *got.KumaDP.KumaCPCompatible || got.KumaDP.Version != "1.8.0" || got.Envoy != said.Envoy || !*said.KumaDP.KumaCPCompatible {
		t.Errorf("%+v of %+v", got.KumaDP, said.KumaDP)
	}
	for version, want := range map[string]bool{"2.15.1": true, "9.1.0": true, "8.9.0": false, "": true} {
		if v := r.judged(&mesh.Version{KumaDP: &mesh.KumaDPVersion{Version: version}}); *v.KumaDP.KumaCPCompatible != want {
			t.Errorf("%q is compatible: %t", version, !want)
		}
	}
	if r.judged(nil) != nil || r.judged(&mesh.Version{}).KumaDP != nil {
		t.Error("made up a version")
	}
}
