package names_test

import (
	"testing"

	"kuma/internal/names"
)

func TestNames(t *testing.T) {
	for _, c := range []struct{ got, want string }{
		{names.KRI{Short: "msvc", Mesh: "ms", Zone: "default", Name: "backend", Section: "main"}.String(), "kri_msvc_ms_default__backend_main"},
		{names.KRI{Short: "m", Name: "default"}.String(), "kri_m____default_"},
		{names.Inbound("127.0.0.1", 80), "inbound:127.0.0.1:80"},
		{names.Inbound("::1", 80), "inbound:[::1]:80"},
		{names.Outbound("10.0.0.1", 8080), "outbound:10.0.0.1:8080"},
		{names.LocalCluster(80), "localhost:80"},
		{names.StatPrefix("inbound:[::1]:80"), "inbound____1__80"},
		{names.TagSNI("backend", "mt", nil), "backend{mesh=mt}"},
		{names.TagSNI("backend", "mt", map[string]string{"v": "1", "a": "x"}), "backend{a=x,mesh=mt,v=1}"},
		{names.HashSNI("backend", "ms", 8080, "ms", nil), "a094a92fd9bd53c11.backend.8080.ms.ms"},
		{names.Destination("ms", "backend", "", "default", "msvc", 8080), "ms_backend__default_msvc_8080"},
		{names.SPIFFE("default", "web"), "spiffe://default/web"},
	} {
		if c.got != c.want {
			t.Errorf("got %q, want %q", c.got, c.want)
		}
	}
}

func TestParseKRI(t *testing.T) {
	k, err := names.ParseKRI("kri_msvc_ms_default__backend_main_x")
	if err != nil || k.Name != "backend" || k.Section != "mainx" {
		t.Errorf("got %+v, %v", k, err)
	}
	for _, bad := range []string{"", "kri_m", "krx_m____default_"} {
		if _, err := names.ParseKRI(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestNearest(t *testing.T) {
	words := []string{"connectionTimeout", "idleTimeout", "http"}
	for word, want := range map[string]string{"conectionTimeout": "connectionTimeout", "idletimeout": "idleTimeout", "zebra": "", "htp": "http"} {
		if got := names.Nearest(word, words); got != want {
			t.Errorf("Nearest(%q) = %q, want %q", word, got, want)
		}
	}
}
