package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"kuma/internal/catalog"
	"kuma/internal/resource"
)

// kinds lists the kinds that outputs are made for, by name.
func kinds() []*resource.Kind {
	list := catalog.Kinds()
	slices.SortFunc(list, func(a, b *resource.Kind) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// The types below are the form of kinds.json, which kumactl embeds.
type (
	kindEntry struct {
		Name       string        `json:"name"`
		Plural     string        `json:"plural"`
		Singular   string        `json:"singular"`
		AltPlurals []string      `json:"altPlurals,omitempty"`
		Short      string        `json:"short,omitempty"`
		Scope      string        `json:"scope"`
		Shape      string        `json:"shape"`
		ReadOnly   bool          `json:"readOnly,omitempty"`
		Admin      bool          `json:"admin,omitempty"`
		HasStatus  bool          `json:"hasStatus,omitempty"`
		Columns    []columnEntry `json:"columns,omitempty"`
		Policy     *policyEntry  `json:"policy,omitempty"`
		Schema     *schema       `json:"schema"`
	}
	columnEntry struct {
		Name string `json:"name"`
		Path string `json:"path"`
	}
	policyEntry struct {
		IsTargetRef bool `json:"isTargetRef"`
		HasTo       bool `json:"hasTo"`
		HasFrom     bool `json:"hasFrom"`
		HasRules    bool `json:"hasRules"`
		FromAsRules bool `json:"fromAsRules"`
	}
)

// generateKinds writes the index of kinds that kumactl embeds, a line for each
// kind, so that a change of one is a changed line.
func generateKinds(_ context.Context, root string) error {
	source := newSource(root)
	var out bytes.Buffer
	out.WriteString("{\"kinds\": [\n")
	all := kinds()
	for i, k := range all {
		described, err := describe(k, source)
		if err != nil {
			return fmt.Errorf("%s: %w", k.Name, err)
		}
		line, err := json.Marshal(described)
		if err != nil {
			return fmt.Errorf("%s: %w", k.Name, err)
		}
		out.Write(line)
		if i < len(all)-1 {
			out.WriteByte(',')
		}
		out.WriteByte('\n')
	}
	out.WriteString("]}\n")
	return writeFile(filepath.Join(root, "internal", "ctl", "kinds.json"), out.Bytes())
}

// describe puts a kind into the form of the index.
func describe(k *resource.Kind, source *source) (kindEntry, error) {
	spec, err := source.specOf(k)
	if err != nil {
		return kindEntry{}, err
	}
	entry := kindEntry{
		Name: k.Name, Plural: k.Plural, Singular: k.ArgName(), AltPlurals: k.AltPlurals, Short: k.Short,
		Scope: k.Scope.String(), Shape: k.Shape.String(), ReadOnly: k.ReadOnly, Admin: k.Admin,
		HasStatus: k.NewStatus != nil, Schema: spec,
	}
	for _, c := range k.Columns {
		entry.Columns = append(entry.Columns, columnEntry(c))
	}
	if p := k.Policy; p != nil {
		entry.Policy = &policyEntry{IsTargetRef: p.TargetRef, HasTo: p.To, HasFrom: p.From, HasRules: p.Rules, FromAsRules: p.FromAsRules}
	}
	return entry, nil
}
