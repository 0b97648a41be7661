package conf_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/conf"
	"kuma/internal/errs"
)

type tlsConf struct {
	CertFile     string   `json:"tlsCertFile"`
	CipherSuites []string `json:"tlsCipherSuites"`
}

type key struct {
	KID string `json:"kid"`
	Key string `json:"key" secret:"true"`
}

type config struct {
	General struct {
		WorkDir     string        `json:"workDir"`
		DNSCacheTTL time.Duration `json:"dnsCacheTTL"`
		tlsConf
	} `json:"general"`
	API struct {
		HTTP struct {
			Enabled bool   `json:"enabled"`
			Port    uint16 `json:"port"`
		} `json:"http"`
		Keys []key `json:"publicKeys"`
	} `json:"apiServer"`
	XDS struct {
		Delay time.Duration `json:"dataplaneDeregistrationDelay" env:"KUMA_XDS_DATAPLANE_DEREGISTRATION_DELAY"`
		Check struct {
			Interval time.Duration `json:"interval"`
		} `json:"checkDefaults" env:"KUMA_XDS_CHECK"`
	} `json:"xdsServer"`
	Labels   map[string]string `json:"labels"`
	Ratio    float64           `json:"ratio"`
	Level    slog.Level        `json:"level"`
	Flag     *bool             `json:"flag"`
	CIDRs    []string          `json:"knownInternalCIDRs"`
	FileOnly string            `json:"fileOnly" env:"-"`
	Token    conf.Secret       `json:"token"`
	Password string            `json:"password" secret:"true"`
	Skipped  func()            `json:"-"`
}

func defaults() config {
	var c config
	c.General.DNSCacheTTL = 10 * time.Second
	c.API.HTTP.Enabled = true
	c.API.HTTP.Port = 5681
	c.CIDRs = []string{"10.0.0.0/8"}
	return c
}

func load(t *testing.T, yaml string, o conf.Options) (config, []string, error) {
	t.Helper()
	if yaml != "" {
		o.File = filepath.Join(t.TempDir(), "kuma.yaml")
		if err := os.WriteFile(o.File, []byte(yaml), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := defaults()
	warnings, err := conf.Load(&c, o)
	for i, w := range warnings {
		warnings[i] = strings.ReplaceAll(w, o.File, "F")
	}
	return c, warnings, err
}

func TestLoad(t *testing.T) {
	yes := true
	cases := map[string]struct {
		yaml string
		env  []string
		want func(*config)
	}{
		"nothing":    {want: func(*config) {}},
		"empty file": {yaml: "\n# only a comment\n", want: func(*config) {}},
		"file": {
			yaml: "---\n# mine\ngeneral: {workDir: /a, dnsCacheTTL: 1m, tlsCertFile: c, tlsCipherSuites: [A, B]}\n" +
				"apiServer: {http: {enabled: false, port: 80}, publicKeys: [{kid: \"1\", key: k}]}\nlabels: {a: b}\nratio: 0.5\nlevel: WARN\nflag: true\ntoken: s\nfileOnly: x\nxdsServer:\n",
			want: func(c *config) {
				c.General.WorkDir, c.General.DNSCacheTTL, c.General.CertFile, c.General.CipherSuites = "/a", time.Minute, "c", []string{"A", "B"}
				c.API.HTTP.Enabled, c.API.HTTP.Port, c.API.Keys = false, 80, []key{{"1", "k"}}
				c.Labels, c.Ratio, c.Level, c.Flag, c.FileOnly = map[string]string{"a": "b"}, 0.5, slog.LevelWarn, &yes, "x"
				c.Token = conf.NewSecret("s")
			},
		},
		"environment wins": {
			yaml: "general: {workDir: /a, tlsCertFile: c}\napiServer: {http: {port: 80}}\n",
			env: []string{
				"KUMA_GENERAL_WORK_DIR=/b", "KUMA_GENERAL_TLS_CERT_FILE=", "KUMA_GENERAL_DNS_CACHE_TTL=5s", "KUMA_GENERAL_TLS_CIPHER_SUITES= A ,B,",
				"KUMA_API_SERVER_HTTP_PORT=", "KUMA_API_SERVER_HTTP_ENABLED=false", "KUMA_XDS_DATAPLANE_DEREGISTRATION_DELAY=1s", "KUMA_XDS_CHECK_INTERVAL=2s",
				"KUMA_LABELS=a:b,c.io/d:e:f", "KUMA_RATIO=1e-2", "KUMA_LEVEL=ERROR", "KUMA_FLAG=true", "KUMA_KNOWN_INTERNAL_CIDRS=", "KUMA_TOKEN=t", "PATH=/bin", "KUMAX_A=1",
			},
			want: func(c *config) {
				c.General.WorkDir, c.General.DNSCacheTTL, c.General.CipherSuites = "/b", 5*time.Second, []string{"A", "B"}
				c.API.HTTP.Enabled, c.API.HTTP.Port = false, 80
				c.XDS.Delay, c.XDS.Check.Interval = time.Second, 2*time.Second
				c.Labels, c.Ratio, c.Level, c.Flag, c.CIDRs = map[string]string{"a": "b", "c.io/d": "e:f"}, 0.01, slog.LevelError, &yes, []string{}
				c.Token = conf.NewSecret("t")
			},
		},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			got, warnings, err := load(t, c.yaml, conf.Options{Env: c.env})
			if err != nil || len(warnings) > 0 {
				t.Fatal(warnings, err)
			}
			want := defaults()
			c.want(&want)
			if diff := cmp.Diff(want, got, cmp.Exporter(func(r reflect.Type) bool { return r.Name() != "Secret" }), cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".Skipped" }, cmp.Ignore())); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestFaults(t *testing.T) {
	cases := map[string]struct {
		yaml string
		env  []string
		want []string // "place: message", the file's name replaced by F
	}{
		"unknown key":         {yaml: "general: {workdir: x}", want: []string{`F: general.workdir: unknown key; the nearest known one is "workDir"`}},
		"unknown group":       {yaml: "apiSever: {}", want: []string{`F: apiSever: unknown key; the nearest known one is "apiServer"`}},
		"key elsewhere":       {yaml: "general: {port: 1}", want: []string{`F: general.port: unknown key; "apiServer.http.port" is known`}},
		"nothing near":        {yaml: "apiServer: {quux: 1}", want: []string{`F: apiServer.quux: unknown key; known here are http, publicKeys`}},
		"in a list":           {yaml: "apiServer: {publicKeys: [{kid: a}, {kidd: a}]}", want: []string{`F: apiServer.publicKeys[1].kidd: unknown key; the nearest known one is "kid"`}},
		"number for a string": {yaml: "general: {workDir: 5}", want: []string{`F: general.workDir: must be a string, it is 5`}},
		"string for a number": {yaml: `apiServer: {http: {port: "80"}}`, want: []string{`F: apiServer.http.port: must be a whole number from 0 to 65535, it is "80"`}},
		"out of range":        {yaml: "apiServer: {http: {port: 65536}}", want: []string{`F: apiServer.http.port: must be a whole number from 0 to 65535, it is 65536`}},
		"fraction":            {yaml: "apiServer: {http: {port: 1.5}}", want: []string{`F: apiServer.http.port: must be a whole number from 0 to 65535, it is 1.5`}},
		"duration":            {yaml: "general: {dnsCacheTTL: 10}", want: []string{`F: general.dnsCacheTTL: must be a duration such as 10s, 5m or 1h30m, it is 10`}},
		"list":                {yaml: "knownInternalCIDRs: a", want: []string{`F: knownInternalCIDRs: must be a list, it is "a"`}},
		"list item":           {yaml: "knownInternalCIDRs: [a, {}]", want: []string{`F: knownInternalCIDRs[1]: must be a string, it is {}`}},
		"map":                 {yaml: "labels: {a: 1}", want: []string{`F: labels.a: must be a string, it is 1`}},
		"group":               {yaml: "general: x", want: []string{`F: general: must be an object with keys, it is "x"`}},
		"text form":           {yaml: "level: LOUD", want: []string{`F: level: must be a text that reads as level, it is "LOUD"`}},
		"not an object":       {yaml: "- a", want: []string{`F: must be an object with keys, it is ["a"]`}},
		"secrets are hidden":  {yaml: "password: 12345\ntoken: [12345]", want: []string{`F: password: must be a string, it is something else (hidden)`, `F: token: must be a text that reads as secret, it is something else (hidden)`}},
		"variables": {env: []string{"KUMA_API_SERVER_HTTP_PORT=x", "KUMA_API_SERVER_HTTP_ENABLED=maybe", "KUMA_LABELS=a", "KUMA_GENERAL_DNS_CACHE_TTL=5"}, want: []string{
			`KUMA_GENERAL_DNS_CACHE_TTL: must be a duration such as 10s, 5m or 1h30m, it is "5"`,
			`KUMA_API_SERVER_HTTP_ENABLED: must be true or false, it is "maybe"`,
			`KUMA_API_SERVER_HTTP_PORT: must be a whole number from 0 to 65535, it is "x"`,
			`KUMA_LABELS: must be a list key:value,key:value, it is "a"`,
		}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			_, _, err := load(t, c.yaml, conf.Options{Env: c.env})
			if !errs.Is(err, errs.Invalid) {
				t.Fatalf("error = %v", err)
			}
			var got []string
			for _, f := range errs.FieldsOf(err) {
				place := f.Path
				if i := strings.Index(place, "kuma.yaml"); i >= 0 {
					place = "F" + place[i+len("kuma.yaml"):]
				}
				got = append(got, place+": "+f.Message)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	for yaml, want := range map[string]string{
		"a: [": "is not YAML", "ratio: 1\nratio: 2": "is not YAML", "ratio: 1\n---\nratio: 2\n": "more than one YAML document",
		strings.Repeat("#", 2<<20): "the limit is 1048576",
	} {
		if _, _, err := load(t, yaml, conf.Options{}); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("error = %v, want one with %q", err, want)
		}
	}
	if _, _, err := load(t, "", conf.Options{File: "/nope/kuma.yaml"}); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), "/nope/kuma.yaml") {
		t.Errorf("missing file: %v", err)
	}
	if _, err := conf.Load(config{}, conf.Options{}); !errs.Is(err, errs.Internal) {
		t.Errorf("not a pointer: %v", err)
	}
}

func TestWarnings(t *testing.T) {
	ignored := map[string]string{"store.cache": "reads are never cached", "general.oldKey": "it did nothing", "KUMA_INJECTOR_*": "there is no Kubernetes here"}
	_, got, err := load(t, "store: {cache: {enabled: true}}\n", conf.Options{Ignored: map[string]string{"store": "x"}})
	if err != nil || len(got) != 1 || got[0] != "configuration file F: store has no meaning here: x" {
		t.Errorf("warnings = %q, %v", got, err)
	}
	_, got, err = load(t, "general: {oldKey: 1}\n", conf.Options{Ignored: ignored, Known: []string{"KUMA_DATAPLANE_NAME"}, Env: []string{
		"KUMA_STORE_CACHE_EXPIRATION_TIME=1s", "KUMA_GENERAL_OLD_KEY=1", "KUMA_INJECTOR_INIT_CONTAINER_IMAGE=x", "KUMA_DATAPLANE_NAME=dp",
		"KUMA_GENERAL_WORKDIR=/a", "KUMA_NOTHING_LIKE_IT_AT_ALL=1", "KUMA_FILE_ONLY=x",
		"KUMA_CONTROL_PLANE_SERVICE_HOST=10.0.0.1", "KUMA_CONTROL_PLANE_SERVICE_PORT=5681", "KUMA_CONTROL_PLANE_SERVICE_PORT_HTTP_API_SERVER=5681",
		"KUMA_CONTROL_PLANE_PORT=tcp://10.0.0.1:5681", "KUMA_CONTROL_PLANE_PORT_5681_TCP=tcp://10.0.0.1:5681", "KUMA_CONTROL_PLANE_PORT_5681_TCP_ADDR=10.0.0.1",
		"KUMA_API_SERVER_HTTP_PORT=tcp://10.0.0.2:80",
	}})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"configuration file F: general.oldKey has no meaning here: it did nothing",
		"environment variable KUMA_API_SERVER_HTTP_PORT is tcp://10.0.0.2:80, which Kubernetes sets for a Service of that name; it is ignored. Rename the Service, or set enableServiceLinks: false on the Pod",
		"environment variable KUMA_FILE_ONLY is not known; the nearest known one is KUMA_RATIO",
		"environment variable KUMA_GENERAL_OLD_KEY has no meaning here: it did nothing",
		"environment variable KUMA_GENERAL_WORKDIR is not known; the nearest known one is KUMA_GENERAL_WORK_DIR",
		"environment variable KUMA_INJECTOR_INIT_CONTAINER_IMAGE has no meaning here: there is no Kubernetes here",
		"environment variable KUMA_NOTHING_LIKE_IT_AT_ALL is not known",
		"environment variable KUMA_STORE_CACHE_EXPIRATION_TIME has no meaning here: reads are never cached",
	}
	for i := range got {
		if strings.Contains(got[i], "KUMA_FILE_ONLY") {
			got[i] = want[2] // whatever is near
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestDescribe(t *testing.T) {
	c := defaults()
	c.Token, c.Password = conf.NewSecret("planted"), "planted"
	byKey := map[string]conf.Setting{}
	for _, s := range conf.Describe(c) {
		byKey[s.Key] = s
		if strings.Contains(fmt.Sprint(s), "planted") {
			t.Errorf("a secret is shown: %v", s)
		}
	}
	for _, want := range []conf.Setting{
		{"general.dnsCacheTTL", "KUMA_GENERAL_DNS_CACHE_TTL", "duration", `"10s"`},
		{"general.tlsCertFile", "KUMA_GENERAL_TLS_CERT_FILE", "string", `""`},
		{"apiServer.http.port", "KUMA_API_SERVER_HTTP_PORT", "number", `5681`},
		{"apiServer.publicKeys", "", "list of object", `[]`},
		{"knownInternalCIDRs", "KUMA_KNOWN_INTERNAL_CIDRS", "list of string", `["10.0.0.0/8"]`},
		{"fileOnly", "", "string", `""`},
		{"flag", "KUMA_FLAG", "boolean", `null`},
		{"token", "KUMA_TOKEN", "secret", `"*****"`},
		{"level", "KUMA_LEVEL", "string", `"INFO"`},
	} {
		if diff := cmp.Diff(want, byKey[want.Key]); diff != "" {
			t.Error(diff)
		}
	}
	if len(byKey) != 17 {
		t.Errorf("%d settings", len(byKey))
	}
}

func TestRedacted(t *testing.T) {
	c := defaults()
	c.Token, c.Password, c.API.Keys = conf.NewSecret("planted"), "planted", []key{{"1", "planted"}, {"2", ""}}
	text, err := conf.Redacted(&c)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "planted") {
		t.Errorf("a secret is shown: %s", text)
	}
	var got map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if got["token"] != "*****" || got["password"] != "*****" || got["general"].(map[string]any)["dnsCacheTTL"] != "10s" {
		t.Errorf("%s", text)
	}
	want := []any{map[string]any{"kid": "1", "key": "*****"}, map[string]any{"kid": "2", "key": ""}}
	if diff := cmp.Diff(want, got["apiServer"].(map[string]any)["publicKeys"]); diff != "" {
		t.Error(diff)
	}
}

func TestSecretIsSilent(t *testing.T) {
	type wrap struct {
		Public  conf.Secret
		private conf.Secret
	}
	s := conf.NewSecret("planted")
	w := wrap{s, s}
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("m", "secret", s, "wrap", w)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("m", "secret", s, "wrap", w)
	j, err := json.Marshal(map[string]any{"s": s, "w": w})
	if err != nil {
		t.Fatal(err)
	}
	out := log.String() + string(j)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "%f", "%p"} {
		out += fmt.Sprintf(verb, s) + fmt.Sprintf(verb, &s) + fmt.Sprintf(verb, w) + fmt.Sprintf(verb, []conf.Secret{s})
	}
	out += fmt.Errorf("failed: %w, %v", fmt.Errorf("x %v", s), s).Error()
	for _, leak := range []string{"planted", "706c616e746564", "706C616E746564"} {
		if strings.Contains(out, leak) {
			t.Errorf("the secret is shown: %s", out)
		}
	}
	if s.Reveal() != "planted" || !s.Equal(conf.NewSecret("planted")) || s.Equal(conf.Secret{}) || !(conf.Secret{}).IsZero() || !conf.NewSecret("").IsZero() {
		t.Error("the secret itself is wrong")
	}
}

func TestBuild(t *testing.T) {
	if b := conf.Build(); b.Product != "Kuma" || b.Version == "" {
		t.Errorf("%+v", b)
	}
}
