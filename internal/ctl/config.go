package ctl

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"kuma/internal/errs"
)

// maxConfigSize is the largest configuration file that is read, in bytes.
const maxConfigSize = 1 << 20

// A settings value is the content of kumactl's configuration file. The names are
// contract.
type settings struct {
	Contexts       []contextEntry `json:"contexts,omitempty"`
	ControlPlanes  []controlPlane `json:"controlPlanes,omitempty"`
	CurrentContext string         `json:"currentContext,omitempty"`
}

type contextEntry struct {
	ControlPlane string           `json:"controlPlane,omitempty"`
	Defaults     *contextDefaults `json:"defaults,omitempty"`
	Name         string           `json:"name,omitempty"`
}

type contextDefaults struct {
	Mesh string `json:"mesh,omitempty"`
}

type controlPlane struct {
	Coordinates coordinates `json:"coordinates"`
	Name        string      `json:"name,omitempty"`
}

type coordinates struct {
	APIServer apiServer `json:"apiServer"`
}

// apiServer says where a control plane's API is and how to speak with it.
// Certificates are paths, read at each use.
type apiServer struct {
	AuthConf       map[string]string `json:"authConf,omitempty"`
	AuthType       string            `json:"authType,omitempty"`
	CACertFile     string            `json:"caCertFile,omitempty"`
	ClientCertFile string            `json:"clientCertFile,omitempty"`
	ClientKeyFile  string            `json:"clientKeyFile,omitempty"`
	Headers        []header          `json:"headers,omitempty"`
	SkipVerify     bool              `json:"skipVerify,omitempty"`
	URL            string            `json:"url,omitempty"`
}

type header struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

// defaultSettings is what holds where there is no file.
func defaultSettings() settings {
	return settings{
		Contexts:       []contextEntry{{Name: "local", ControlPlane: "local"}},
		ControlPlanes:  []controlPlane{{Name: "local", Coordinates: coordinates{APIServer: apiServer{URL: "http://localhost:5681"}}}},
		CurrentContext: "local",
	}
}

func (s *settings) controlPlane(name string) *controlPlane {
	if i := slices.IndexFunc(s.ControlPlanes, func(c controlPlane) bool { return c.Name == name }); i >= 0 {
		return &s.ControlPlanes[i]
	}
	return nil
}

func (s *settings) context(name string) *contextEntry {
	if i := slices.IndexFunc(s.Contexts, func(c contextEntry) bool { return c.Name == name }); i >= 0 {
		return &s.Contexts[i]
	}
	return nil
}

func (s *settings) contextNames() []string {
	out := make([]string, 0, len(s.Contexts))
	for _, c := range s.Contexts {
		out = append(out, c.Name)
	}
	return out
}

// configPath is where the configuration is: --config-file, or
// ~/.kumactl/config.
func (a *app) configPath() (string, error) {
	if a.configFile != "" {
		return a.configFile, nil
	}
	home := a.env("HOME")
	if home == "" {
		return "", errs.New(errs.Invalid, "no configuration file: HOME is not set; pass --config-file or --no-config")
	}
	return filepath.Join(home, ".kumactl", "config"), nil
}

// loadSettings reads the configuration file. Without one the defaults hold; a
// file named by --config-file has to be there unless create allows for making
// it.
func (a *app) loadSettings(create bool) (settings, error) {
	if a.noConfig {
		return defaultSettings(), nil
	}
	path, err := a.configPath()
	if err != nil {
		return settings{}, err
	}
	raw, err := readLimited(path, maxConfigSize)
	if errors.Is(err, fs.ErrNotExist) {
		if a.configFile != "" && !create {
			return settings{}, errs.New(errs.NotFound, "configuration file %q does not exist; make it with kumactl config control-planes add --config-file %s", path, path)
		}
		return defaultSettings(), nil
	}
	if err != nil {
		return settings{}, fmt.Errorf("read the configuration: %w", err)
	}
	if len(bytes.TrimSpace(raw)) == 0 {
		return defaultSettings(), nil
	}
	var s settings
	doc, err := yaml.YAMLToJSONStrict(raw)
	if err != nil {
		return settings{}, errs.New(errs.Invalid, "configuration file %s: %s", path, yamlMessage(err, 0))
	}
	d := json.NewDecoder(bytes.NewReader(doc))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return settings{}, errs.New(errs.Invalid, "configuration file %s: %s", path, strings.TrimPrefix(err.Error(), "json: "))
	}
	a.checkMode(path, &s)
	return s, nil
}

// checkMode warns when others on this machine can read credentials.
func (a *app) checkMode(path string, s *settings) {
	secret := slices.ContainsFunc(s.ControlPlanes, func(c controlPlane) bool { return len(c.Coordinates.APIServer.AuthConf) > 0 })
	if !secret {
		return
	}
	if st, err := os.Stat(path); err == nil && st.Mode().Perm()&0o077 != 0 {
		a.warn("%s holds a token and can be read by other users (mode %04o); run: chmod 600 %s", path, st.Mode().Perm(), path)
	}
}

// saveSettings replaces the configuration file, whole or not at all.
func (a *app) saveSettings(s settings) error {
	if a.noConfig {
		return errs.New(errs.Invalid, "--no-config leaves no file to change; drop it")
	}
	path, err := a.configPath()
	if err != nil {
		return err
	}
	raw, err := yaml.Marshal(s)
	if err != nil {
		return fmt.Errorf("write the configuration: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write the configuration: %w", err)
	}
	if err := replaceFile(path, raw, 0o600); err != nil {
		return fmt.Errorf("write the configuration: %w", err)
	}
	return nil
}

// replaceFile writes a file beside the path and moves it there, so that a
// reader sees the old content or the new. A symbolic link is followed.
func replaceFile(path string, content []byte, mode fs.FileMode) error {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// readLimited reads a file of at most limit bytes.
func readLimited(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	return readAll(f, path, limit)
}

// readAll reads at most limit bytes; more is an error that names the source.
func readAll(r io.Reader, what string, limit int64) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(raw)) > limit {
		return nil, errs.New(errs.Invalid, "%s is larger than the limit of %d MiB", what, limit>>20)
	}
	return raw, nil
}

// active returns the context in use and its control plane.
func (a *app) active() (contextEntry, controlPlane, error) {
	s, err := a.loadSettings(false)
	if err != nil {
		return contextEntry{}, controlPlane{}, err
	}
	name := a.context
	if name == "" {
		name = s.CurrentContext
	}
	if name == "" {
		return contextEntry{}, controlPlane{}, errs.New(errs.Invalid, "no control plane is chosen; run kumactl config control-planes switch --name NAME, or add one with kumactl config control-planes add")
	}
	c := s.context(name)
	if c == nil {
		return contextEntry{}, controlPlane{}, errs.New(errs.NotFound, "there is no context with name %q%s", name, suggestion(name, s.contextNames()))
	}
	cp := s.controlPlane(c.ControlPlane)
	if cp == nil {
		return contextEntry{}, controlPlane{}, errs.New(errs.NotFound, "context %q names the control plane %q, which the configuration does not have", name, c.ControlPlane)
	}
	return *c, *cp, nil
}
