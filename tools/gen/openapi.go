package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"unicode"

	"sigs.k8s.io/yaml"

	"kuma/internal/auth"
	"kuma/internal/resource"
	"kuma/internal/rest"
)

// object is a JSON object while the document is put together.
type object = map[string]any

// generateOpenAPI writes docs/reference/openapi.yaml: the HTTP interface as
// OpenAPI 3.1, of which each kind has the same six operations.
func generateOpenAPI(_ context.Context, root string) error {
	source := newSource(root)
	paths, schemas := object{}, object{"Problem": problemSchema(), "Written": writtenSchema()}
	for _, k := range kinds() {
		described, err := kindSchema(k, source)
		if err != nil {
			return fmt.Errorf("%s: %w", k.Name, err)
		}
		schemas[k.Name] = described
		addPaths(paths, k)
	}
	report, err := source.schemaOf(&rest.TLSReport{})
	if err != nil {
		return fmt.Errorf("the TLS report: %w", err)
	}
	report.Description = "What is connected to this instance of the control plane now, how that is encrypted and authenticated, and what is not as it should be."
	schemas["TLSReport"] = report
	for path, operations := range fixedPaths() {
		paths[path] = operations
	}
	if err := addRoutes(paths); err != nil {
		return err
	}
	document := object{
		"openapi": "3.1.0",
		"info": object{
			"title":       "Control plane API",
			"version":     "1",
			"description": "Resources of the mesh. Each kind has the same operations; an ETag and If-Match guard against lost updates.",
			"license":     object{"name": "Apache-2.0", "identifier": "Apache-2.0"},
		},
		"servers": []object{{"url": "http://localhost:5681"}, {"url": "https://localhost:5682"}},
		"paths":   paths,
		"components": object{
			"schemas":         schemas,
			"securitySchemes": object{"token": object{"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
		},
		"security": []object{{"token": []string{}}},
	}
	raw, err := json.Marshal(document)
	if err != nil {
		return err
	}
	text, err := yaml.JSONToYAML(raw)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(root, "docs", "reference", "openapi.yaml"),
		append([]byte("# Made by tools/gen from the declarations of the kinds. Do not edit.\n"), text...))
}

// kindSchema is the schema of a whole document of a kind.
func kindSchema(k *resource.Kind, source *source) (*schema, error) {
	spec, err := source.specOf(k)
	if err != nil {
		return nil, err
	}
	whole := &schema{Type: "object", Required: []string{"type", "name"}, Properties: properties{
		{"type", &schema{Type: "string", Enum: []string{k.Name}}},
		{"name", &schema{Type: "string", Description: "At most 253 lower-case letters, digits, '-' and '.'."}},
		{"labels", &schema{Type: "object", AdditionalProperties: &schema{Type: "string"}}},
		{"creationTime", &schema{Type: "string", Format: "date-time", Description: "Set by the server, ignored in requests."}},
		{"modificationTime", &schema{Type: "string", Format: "date-time", Description: "Set by the server, ignored in requests."}},
	}}
	if whole.Description, err = kindText(k, source); err != nil {
		return nil, err
	}
	if k.Scope == resource.Mesh {
		whole.Required = append(whole.Required, "mesh")
		whole.Properties = append(whole.Properties, property{"mesh", &schema{Type: "string"}})
	}
	if k.Short != "" {
		whole.Properties = append(whole.Properties, property{"kri", &schema{Type: "string", Description: "The resource's identifier. Set by the server, ignored in requests."}})
	}
	if k.Shape == resource.Flat {
		whole.Properties = append(whole.Properties, spec.Properties...)
		whole.Required = append(whole.Required, spec.Required...)
		return whole, nil
	}
	whole.Properties = append(whole.Properties, property{"spec", spec})
	if k.NewStatus != nil {
		status, err := source.schemaOf(k.NewStatus())
		if err != nil {
			return nil, err
		}
		status.Description = "Set by the server, ignored in requests."
		whole.Properties = append(whole.Properties, property{"status", status})
	}
	return whole, nil
}

// addPaths adds the operations of a kind.
func addPaths(paths object, k *resource.Kind) {
	inPath := func(name string) object {
		return object{"name": name, "in": "path", "required": true, "schema": object{"type": "string"}}
	}
	reference := object{"$ref": "#/components/schemas/" + k.Name}
	list := func(id string) object {
		return operation(id, "List "+k.Name+" resources", object{"200": answer("A page of them", object{
			"type": "object",
			"properties": object{
				"total": object{"type": "integer"},
				"items": object{"type": "array", "items": reference},
				"next":  object{"type": []string{"string", "null"}, "description": "Where the next page is."},
			},
		})}, query("size", "integer", "How many on a page."), query("offset", "string", "What next said."),
			query("name", "string", "Only names that contain this."), query("filter[labels.KEY]", "string", "Only those whose label KEY has this value."))
	}
	collection, parameters := "/"+k.Plural, []object{}
	if k.Scope == resource.Mesh {
		paths[collection] = object{"get": list("listAll" + k.Name)}
		collection, parameters = "/meshes/{mesh}"+collection, []object{inPath("mesh")}
	}
	one := object{
		"parameters": append(parameters[:len(parameters):len(parameters)], inPath("name")),
		"get":        operation("get"+k.Name, "Read a "+k.Name, object{"200": answer("It", reference)}),
	}
	if !k.ReadOnly {
		ifMatch := object{"name": "If-Match", "in": "header", "schema": object{"type": "string"}, "description": "The ETag of the state that this replaces; another state is answered with 409."}
		written := object{"$ref": "#/components/schemas/Written"}
		put := operation("put"+k.Name, "Create or replace a "+k.Name, object{"200": answer("Replaced", written), "201": answer("Created", written)}, ifMatch)
		put["requestBody"] = object{"required": true, "content": object{"application/json": object{"schema": reference}}}
		one["put"] = put
		one["delete"] = operation("delete"+k.Name, "Delete a "+k.Name, object{"200": answer("Deleted", object{"type": "object"})}, ifMatch)
	}
	paths[collection] = object{"parameters": parameters, "get": list("list" + k.Name)}
	paths[collection+"/{name}"] = one
}

// addRoutes goes through the routes that the server has. Each says who may use
// it; those that are not described elsewhere are added with what the route
// itself tells. What is described but not served is a mistake.
func addRoutes(paths object) error {
	server, err := rest.New(rest.Config{Kinds: kinds(), Issuer: new(auth.Issuer)})
	if err != nil {
		return err
	}
	served := map[string]bool{}
	for _, route := range server.Routes() {
		method := strings.ToLower(route.Method)
		served[method+" "+route.Path] = true
		operations, ok := paths[route.Path].(object)
		if !ok {
			operations = object{}
			if parameters := pathParameters(route.Path); len(parameters) > 0 {
				operations["parameters"] = parameters
			}
			paths[route.Path] = operations
		}
		described, ok := operations[method].(object)
		if !ok {
			described = operation(operationID(method, route.Path), route.Method+" "+route.Path, object{"200": object{"description": "Done"}})
			operations[method] = described
		}
		described["x-access"] = route.Access
	}
	for path, operations := range paths {
		for method := range operations.(object) {
			if method != "parameters" && !served[method+" "+path] {
				return fmt.Errorf("%s %s is described, but the server has no such route", method, path)
			}
		}
	}
	return nil
}

var pathParameter = regexp.MustCompile(`\{([^}.]+)(\.\.\.)?\}`)

// pathParameters declares the parameters that stand in a path.
func pathParameters(path string) (out []object) {
	for _, m := range pathParameter.FindAllStringSubmatch(path, -1) {
		if m[1] != "$" {
			out = append(out, object{"name": m[1], "in": "path", "required": true, "schema": object{"type": "string"}})
		}
	}
	return out
}

// operationID makes an identifier of a route: getMeshesMeshDataplanesNameXds.
func operationID(method, path string) string {
	words := strings.FieldsFunc(path, func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) })
	for i, word := range words {
		words[i] = strings.ToUpper(word[:1]) + word[1:]
	}
	return method + strings.Join(words, "")
}

// fixedPaths are the operations that belong to no kind.
func fixedPaths() object {
	anything := object{"type": "object"}
	token := operation("generateDataplaneToken", "Issue a dataplane token", object{"200": object{
		"description": "The token", "content": object{"text/plain": object{"schema": object{"type": "string"}}},
	}})
	token["requestBody"] = object{"required": true, "content": object{"application/json": object{"schema": object{
		"type": "object",
		"properties": object{
			"name":     object{"type": "string", "description": "The Dataplane that may use it; empty for any."},
			"mesh":     object{"type": "string"},
			"tags":     object{"type": "object", "additionalProperties": object{"type": "array", "items": object{"type": "string"}}},
			"type":     object{"type": "string"},
			"workload": object{"type": "string"},
			"validFor": object{"type": "string", "description": "How long it holds, as a duration."},
		},
		"required": []string{"validFor"},
	}}}}
	index := operation("index", "Say what this server is", object{"200": answer("Product, version and instance", anything)})
	index["security"] = []object{}
	return object{
		"/":                 object{"get": index},
		"/_resources":       object{"get": operation("kinds", "List the kinds", object{"200": answer("Their names, paths and traits", anything)})},
		"/policies":         object{"get": operation("policies", "List the kinds of policies", object{"200": answer("Their names, paths and traits", anything)})},
		"/who-am-i":         object{"get": operation("whoAmI", "Say as whom the caller is seen", object{"200": answer("Name and groups", anything)})},
		"/config":           object{"get": operation("config", "Show the effective configuration, secrets masked", object{"200": answer("The configuration", anything)})},
		"/tokens/dataplane": object{"post": token},
		"/tls-report": object{"get": operation("tlsReport", "Say how every link is encrypted and authenticated", object{"200": answer("The report", object{"$ref": "#/components/schemas/TLSReport"})},
			query("mesh", "string", "Only the proxies of this mesh."))},
	}
}

// operation puts an operation together; every one may fail with a problem.
func operation(id, summary string, responses object, parameters ...object) object {
	responses["default"] = object{
		"description": "What is wrong",
		"content":     object{"application/json": object{"schema": object{"$ref": "#/components/schemas/Problem"}}},
	}
	out := object{"operationId": strings.ToLower(id[:1]) + id[1:], "summary": summary, "responses": responses}
	if len(parameters) > 0 {
		out["parameters"] = parameters
	}
	return out
}

func answer(description string, schema any) object {
	return object{"description": description, "content": object{"application/json": object{"schema": schema}}}
}

func query(name, kind, description string) object {
	return object{"name": name, "in": "query", "schema": object{"type": kind}, "description": description}
}

func problemSchema() object {
	return object{
		"type":        "object",
		"description": "What is wrong, with the parameters at fault.",
		"properties": object{
			"type": object{"type": "string"}, "title": object{"type": "string"}, "status": object{"type": "integer"}, "detail": object{"type": "string"}, "instance": object{"type": "string"},
			"invalid_parameters": object{"type": "array", "items": object{"type": "object", "properties": object{
				"field": object{"type": "string"}, "reason": object{"type": "string"}, "rule": object{"type": "string"}, "choices": object{"type": "array", "items": object{"type": "string"}},
			}}},
		},
	}
}

func writtenSchema() object {
	return object{"type": "object", "properties": object{"warnings": object{"type": "array", "items": object{"type": "string"}}}}
}
