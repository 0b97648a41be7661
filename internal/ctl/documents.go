package ctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cbroglie/mustache"
	"sigs.k8s.io/yaml"

	"kuma/internal/errs"
)

const (
	// maxInput is the largest file, answer of a URL or standard input that
	// apply reads, in bytes.
	maxInput = 32 << 20
	// maxDocument is the largest single resource, in bytes; the control plane
	// takes no larger one.
	maxDocument = 4 << 20
	// urlTimeout bounds the wait for a URL given to apply.
	urlTimeout = 10 * time.Second
)

// A document is one resource as the user wrote it.
type document struct {
	// index is its number over all inputs, from 0.
	index int
	// source is the file, URL or "standard input"; line is where in it the
	// document starts, from 1.
	source string
	line   int
	raw    []byte
}

// at says where the document is.
func (d document) at() string { return fmt.Sprintf("%s line %d", d.source, d.line) }

// lineOf is the line of a field where the document has one line with such a
// key, else the line at which the document starts.
func (d document) lineOf(path string) int {
	key := path[strings.LastIndexByte(path, '.')+1:]
	key, _, _ = strings.Cut(key, "[")
	found, n := d.line, 0
	line := d.line
	for l := range bytes.Lines(d.raw) {
		text := strings.TrimLeft(string(l), " \t-{")
		text = strings.TrimPrefix(text, `"`)
		if rest, ok := strings.CutPrefix(text, key); ok && key != "" && strings.HasPrefix(strings.TrimPrefix(rest, `"`), ":") {
			found, n = line, n+1
		}
		line++
	}
	if n != 1 {
		return d.line
	}
	return found
}

// input is one text that holds documents.
type input struct {
	source string
	text   []byte
}

// readInputs reads what -f names: "-", a URL, a directory or a file.
func (a *app) readInputs(ctx context.Context, what string) ([]input, error) {
	switch {
	case what == "":
		return nil, errs.New(errs.Invalid, "--file must not be empty: name a file, a directory, a URL, or - for standard input")
	case what == "-":
		raw, err := readAll(a.stdin, "standard input", maxInput)
		if err != nil {
			return nil, fmt.Errorf("read standard input: %w", err)
		}
		return []input{{"standard input", raw}}, nil
	case strings.HasPrefix(what, "http://") || strings.HasPrefix(what, "https://"):
		raw, err := fetch(ctx, what)
		if err != nil {
			return nil, err
		}
		return []input{{what, raw}}, nil
	}
	st, err := os.Stat(what)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errs.New(errs.NotFound, "there is no file or directory %q", what)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", what, err)
	}
	files := []string{what}
	if st.IsDir() {
		if files, err = manifests(what); err != nil {
			return nil, err
		}
	}
	var out []input
	total := 0
	for _, f := range files {
		raw, err := readLimited(f, maxInput)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", f, err)
		}
		if total += len(raw); total > maxInput {
			return nil, errs.New(errs.Invalid, "the files of %s are together larger than the limit of %d MiB", what, maxInput>>20)
		}
		out = append(out, input{f, raw})
	}
	return out, nil
}

// manifests lists the YAML and JSON files right in a directory, sorted.
func manifests(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read the directory: %w", err)
	}
	var out []string
	for _, e := range entries {
		p := filepath.Join(dir, e.Name())
		if slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(p)) && fileExists(p) {
			out = append(out, p)
		}
	}
	if len(out) == 0 {
		return nil, errs.New(errs.Invalid, "no resource(s) passed to apply: %s has no .yaml, .yml or .json file (directories in it are not read)", dir)
	}
	return out, nil
}

// fetch gets a file from the web, without any credential.
func fetch(ctx context.Context, address string) ([]byte, error) {
	c := &http.Client{Timeout: urlTimeout, CheckRedirect: func(r *http.Request, via []*http.Request) error {
		if via[0].URL.Scheme == "https" && r.URL.Scheme != "https" {
			return errors.New("it redirects from https to http")
		}
		if len(via) >= 5 {
			return errors.New("too many redirects")
		}
		return nil
	}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, errs.New(errs.Invalid, "read %s: %w", address, err)
	}
	resp, err := c.Do(r)
	if err != nil {
		return nil, errs.New(errs.Unavailable, "read %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, errs.New(errs.Unavailable, "read %s: the answer is %s, not 200", address, resp.Status)
	}
	raw, err := readAll(resp.Body, address, maxInput)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", address, err)
	}
	return raw, nil
}

// render fills in variables. Without any the text stays as it is, "{{ }}"
// included.
func render(in input, vars map[string]string) (input, error) {
	if len(vars) == 0 {
		return in, nil
	}
	tree := map[string]any{}
	for _, k := range sortedKeys(vars) {
		at := tree
		parts := strings.Split(k, ".")
		for _, p := range parts[:len(parts)-1] {
			next, ok := at[p].(map[string]any)
			if !ok {
				if _, taken := at[p]; taken {
					return in, errs.New(errs.Invalid, "--var %s: %q is a value already and can't have parts", k, p)
				}
				next = map[string]any{}
				at[p] = next
			}
			at = next
		}
		at[parts[len(parts)-1]] = vars[k]
	}
	text, err := mustache.RenderPartials(string(in.text), noPartials{}, tree)
	if err != nil {
		return in, errs.New(errs.Invalid, "%s: template: %w", in.source, err)
	}
	if len(text) > maxInput {
		return in, errs.New(errs.Invalid, "%s: the template's result is larger than the limit of %d MiB", in.source, maxInput>>20)
	}
	in.text = []byte(text)
	return in, nil
}

// noPartials keeps a template from reading further files.
type noPartials struct{}

// Get refuses.
func (noPartials) Get(name string) (string, error) {
	return "", fmt.Errorf("it includes %q; templates can't include files", name)
}

// parseVars reads "k=v" pairs.
func parseVars(pairs []string) (map[string]string, error) {
	out := map[string]string{}
	for _, p := range pairs {
		k, v, ok := strings.Cut(p, "=")
		if !ok || k == "" {
			return nil, errs.New(errs.Invalid, "--var %q: must be NAME=VALUE", p)
		}
		out[k] = v
	}
	return out, nil
}

// split cuts a text at its lines of "---". Documents of nothing but comments
// are left out.
func split(in input) []document {
	var out []document
	start, line, first := 0, 1, 1
	flush := func(end int) {
		raw := in.text[start:end]
		if !blank(raw) {
			out = append(out, document{source: in.source, line: first, raw: raw})
		}
	}
	for pos := 0; pos < len(in.text); line++ {
		end := len(in.text)
		if n := bytes.IndexByte(in.text[pos:], '\n'); n >= 0 {
			end = pos + n + 1
		}
		text := bytes.TrimRight(in.text[pos:end], " \t\r\n")
		if bytes.Equal(text, []byte("---")) || bytes.HasPrefix(text, []byte("--- ")) {
			flush(pos)
			start, first = end, line+1
		}
		pos = end
	}
	flush(len(in.text))
	return out
}

// blank reports whether there are only comments and white space.
func blank(raw []byte) bool {
	for l := range bytes.Lines(raw) {
		if l = bytes.TrimSpace(l); len(l) > 0 && l[0] != '#' {
			return false
		}
	}
	return true
}

// parse reads a document as JSON or YAML. Its error names the line.
func (d document) parse() (map[string]any, error) {
	if len(d.raw) > maxDocument {
		return nil, errs.New(errs.Invalid, "it has %d bytes, the limit is %d MiB", len(d.raw), maxDocument>>20)
	}
	doc := d.raw
	if !json.Valid(doc) {
		var err error
		if doc, err = yaml.YAMLToJSONStrict(d.raw); err != nil {
			return nil, errs.New(errs.Invalid, "%s", yamlMessage(err, d.line-1))
		}
	}
	dec := json.NewDecoder(bytes.NewReader(doc))
	dec.UseNumber()
	var tree any
	if err := dec.Decode(&tree); err != nil && !errors.Is(err, io.EOF) {
		return nil, errs.New(errs.Invalid, "%s", err.Error())
	}
	m, ok := tree.(map[string]any)
	if !ok {
		return nil, errs.New(errs.Invalid, "must be an object with type and name, not %s", show(tree))
	}
	return m, nil
}

var lineNumber = regexp.MustCompile(`line (\d+)`)

// yamlMessage is a YAML error with line numbers of the file, not of the
// document in it.
func yamlMessage(err error, before int) string {
	m := strings.TrimPrefix(err.Error(), "error converting YAML to JSON: ")
	m = strings.TrimPrefix(m, "yaml: ")
	m = strings.TrimPrefix(m, "unmarshal errors:\n  ")
	m = strings.ReplaceAll(m, "\n  ", "; ")
	return lineNumber.ReplaceAllStringFunc(m, func(s string) string {
		n, err := strconv.Atoi(strings.TrimPrefix(s, "line "))
		if err != nil {
			return s
		}
		return "line " + strconv.Itoa(n+before)
	})
}
