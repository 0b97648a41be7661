// Package envoytest reads a proxy's configuration as Envoy would: it prints it,
// and answers where a request would go and whether a caller would be let in.
package envoytest

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	// Messages that a configuration holds within Any, so that they can be read.
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/formatter/req_without_query/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"sigs.k8s.io/yaml"

	"kuma/internal/envoy"
)

// Tree returns the configuration as JSON values: by the last word of the type
// URL, then by name.
func Tree(res envoy.Resources) (map[string]any, error) {
	out := map[string]any{}
	for typ, byName := range res {
		if len(byName) == 0 {
			continue
		}
		list := map[string]any{}
		for name, p := range byName {
			m, err := p.Body.UnmarshalNew()
			if err != nil {
				return nil, fmt.Errorf("read %s: %w", name, err)
			}
			raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
			if err != nil {
				return nil, fmt.Errorf("print %s: %w", name, err)
			}
			var v any
			if err := json.Unmarshal(raw, &v); err != nil {
				return nil, err
			}
			list[name] = v
		}
		out[typ[strings.LastIndexByte(typ, '.')+1:]] = list
	}
	return out, nil
}

// Print returns the configuration as YAML, always in the same order.
func Print(res envoy.Resources) (string, error) {
	tree, err := Tree(res)
	if err != nil {
		return "", err
	}
	raw, err := yaml.Marshal(tree)
	return string(raw), err
}

// Static returns a complete bootstrap for Envoy, as JSON, in which everything
// that discovery would bring is written down in place, so that Envoy's own
// validation sees all of it. Secrets are resolved by name with those given (PEM).
func Static(res envoy.Resources, certificate, key, trust string) ([]byte, error) {
	tree, err := Tree(res)
	if err != nil {
		return nil, err
	}
	part := func(name string) map[string]any {
		m, _ := tree[name].(map[string]any)
		return m
	}
	extensions := part("TypedExtensionConfig")
	clas := part("ClusterLoadAssignment")
	secrets := func(v any) any {
		return walk(v, func(m map[string]any) {
			delete(m, "sds_config")
		})
	}
	var listeners, clusters []any
	for _, name := range slices.Sorted(maps.Keys(part("Listener"))) {
		l := walk(part("Listener")[name], func(m map[string]any) {
			if _, ok := m["config_discovery"]; !ok {
				return
			}
			delete(m, "config_discovery")
			if x, ok := extensions[m["name"].(string)].(map[string]any); ok {
				m["typed_config"] = x["typed_config"]
			}
		})
		listeners = append(listeners, secrets(l))
	}
	for _, name := range slices.Sorted(maps.Keys(part("Cluster"))) {
		c := secrets(part("Cluster")[name]).(map[string]any)
		if c["type"] == "EDS" {
			delete(c, "eds_cluster_config")
			c["type"] = "STATIC"
			c["load_assignment"] = clas[name]
		}
		clusters = append(clusters, c)
	}
	var sds []any
	seen := map[string]bool{}
	for _, group := range [][]any{listeners, clusters} {
		walk(group, func(m map[string]any) {
			for _, f := range []string{"tls_certificate_sds_secret_configs", "validation_context_sds_secret_config"} {
				list, ok := m[f].([]any)
				if !ok && m[f] != nil {
					list = []any{m[f]}
				}
				for _, s := range list {
					name := s.(map[string]any)["name"].(string)
					if seen[name] {
						continue
					}
					seen[name] = true
					if f == "validation_context_sds_secret_config" {
						sds = append(sds, map[string]any{"name": name, "validation_context": map[string]any{"trusted_ca": map[string]any{"inline_string": trust}}})
					} else {
						sds = append(sds, map[string]any{"name": name, "tls_certificate": map[string]any{
							"certificate_chain": map[string]any{"inline_string": certificate}, "private_key": map[string]any{"inline_string": key},
						}})
					}
				}
			}
		})
	}
	return json.MarshalIndent(map[string]any{
		"node":             map[string]any{"id": "test", "cluster": "test"},
		"static_resources": map[string]any{"listeners": listeners, "clusters": clusters, "secrets": sds},
	}, "", " ")
}

// walk calls f on every object, parents first.
func walk(v any, f func(map[string]any)) any {
	switch v := v.(type) {
	case map[string]any:
		f(v)
		for _, x := range v {
			walk(x, f)
		}
	case []any:
		for _, x := range v {
			walk(x, f)
		}
	}
	return v
}
