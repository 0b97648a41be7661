package pki_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kuma/internal/errs"
	"kuma/internal/pki"
)

// vault is what several control planes share, in memory.
type vault struct {
	mu      sync.Mutex
	text    []byte
	version uint64
	fail    error
	race    func() // called once before a write
}

func (v *vault) Load(context.Context) ([]byte, uint64, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.text, v.version, v.fail
}

func (v *vault) Save(_ context.Context, text []byte, version uint64) (uint64, error) {
	v.mu.Lock()
	race := v.race
	v.race = nil
	v.mu.Unlock()
	if race != nil {
		race()
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case v.fail != nil:
		return 0, v.fail
	case version != v.version:
		return 0, errs.New(errs.Conflict, "version %d, not %d", v.version, version)
	}
	v.text = text
	v.version++
	return v.version, nil
}

func (v *vault) steps() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	var k struct{ Step string }
	_ = json.Unmarshal(v.text, &k)
	return k.Step
}

// fleet is a number of proxies that take what they are sent, unless told not to.
type fleet struct {
	mu   sync.Mutex
	list []pki.Recipient
}

func (f *fleet) recipients() []pki.Recipient {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.list)
}

func (f *fleet) set(list ...pki.Recipient) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.list = list
}

// proxy is a client that trusts what it was given, and nothing else.
type proxy struct{ roots *x509.CertPool }

func trusting(bundle []byte) proxy {
	p := proxy{x509.NewCertPool()}
	p.roots.AppendCertsFromPEM(bundle)
	return p
}

// connects verifies what the control plane shows now, as a client does.
func (p proxy) connects(cp *pki.ControlPlane) error {
	pair, err := cp.TLS().GetCertificate(&tls.ClientHelloInfo{})
	if err != nil {
		return err
	}
	between := x509.NewCertPool()
	for _, der := range pair.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		between.AddCert(c)
	}
	_, err = pair.Leaf.Verify(x509.VerifyOptions{Roots: p.roots, Intermediates: between, DNSName: "localhost"})
	return err
}

// openssl verifies what the control plane shows with another implementation,
// where there is one.
func openssl(t *testing.T, cp *pki.ControlPlane, anchors []byte) {
	t.Helper()
	program, err := exec.LookPath("openssl")
	if err != nil {
		return
	}
	pair, err := cp.TLS().GetCertificate(&tls.ClientHelloInfo{})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	args := []string{"verify", "-purpose", "sslserver", "-verify_hostname", "localhost", "-no-CApath", "-CAfile", filepath.Join(dir, "ca")}
	save(t, filepath.Join(dir, "ca"), anchors)
	for i, der := range pair.Certificate {
		file := filepath.Join(dir, fmt.Sprint(i))
		save(t, file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
		if i > 0 {
			args = append(args, "-untrusted", file)
		}
	}
	if out, err := exec.Command(program, append(args, filepath.Join(dir, "0"))...).CombinedOutput(); err != nil {
		t.Errorf("openssl: %v: %s", err, out)
	}
}

// keeping is where a control plane's authority is kept: in a directory, or shared.
type keeping struct {
	name  string
	setup func(t *testing.T) pki.ControlPlaneConfig
}

func keepings() []keeping {
	return []keeping{
		{"file", func(t *testing.T) pki.ControlPlaneConfig { return pki.ControlPlaneConfig{Dir: t.TempDir()} }},
		{"store", func(t *testing.T) pki.ControlPlaneConfig {
			return pki.ControlPlaneConfig{Dir: t.TempDir(), Vault: &vault{}}
		}},
		{"a pair of the original", func(t *testing.T) pki.ControlPlaneConfig {
			dir := t.TempDir()
			cert, key := originalPair(t)
			save(t, filepath.Join(dir, pki.CAFile), cert)
			save(t, filepath.Join(dir, pki.CAKeyFile), key)
			return pki.ControlPlaneConfig{Dir: dir}
		}},
	}
}

func originalPair(t *testing.T) (cert, key []byte) {
	t.Helper()
	cert, key, err := pki.GenerateTLS("server", []string{"localhost", "127.0.0.1"}, "rsa")
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func do(t *testing.T, r *pki.Rotator, order pki.Order) {
	t.Helper()
	if _, err := r.Do(order, false); err != nil {
		t.Fatalf("%s: %v", order, err)
	}
}

func status(t *testing.T, r *pki.Rotator) pki.RotationStatus {
	t.Helper()
	s, err := r.Status()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func count(bundle []byte) int { return strings.Count(string(bundle), "BEGIN CERTIFICATE") }

var orders = []pki.Order{pki.OrderPrepare, pki.OrderDistribute, pki.OrderSwitch, pki.OrderRetire}

// Through a whole rotation, with a crash after each step: who knows only the old
// authority connects until it is retired, who knows only the new one from the
// switch on, and who knows both always.
func TestRotation(t *testing.T) {
	for _, k := range keepings() {
		t.Run(k.name, func(t *testing.T) {
			cfg := k.setup(t)
			cp := open(t, cfg)
			before := cp.CA()
			file := filepath.Join(cfg.Dir, pki.CAFile)
			old := trusting(before)
			var both, young proxy
			for i, order := range orders {
				r := pki.NewRotator(pki.RotatorConfig{Certs: cp})
				changed, stop := cp.Subscribe()
				do(t, r, order)
				select {
				case <-changed:
				default:
					t.Errorf("%s: nobody is told", order)
				}
				stop()
				if i == 0 {
					both = trusting(cp.CA())
					_, rest := pem.Decode(before)
					if len(strings.TrimSpace(string(rest))) > 0 {
						t.Fatal("more than one authority at the start")
					}
					young = trusting(cp.CA()[len(before):])
				}
				if got := read(t, file); got != string(cp.CA()) {
					t.Errorf("%s: the file does not hold what clients are to be given", order)
				}
				bundle, revision := cp.Trust()
				wantCA, wantBundle := []int{2, 2, 2, 1}[i], []int{1, 2, 2, 1}[i]
				if count(cp.CA()) != wantCA || count(bundle) != wantBundle {
					t.Errorf("%s: %d anchors for clients, %d for proxies; want %d, %d", order, count(cp.CA()), count(bundle), wantCA, wantBundle)
				}
				for round := range 2 {
					if err := both.connects(cp); err != nil {
						t.Errorf("%s, round %d: who knows both: %v", order, round, err)
					}
					if err := old.connects(cp); (err == nil) != (order != pki.OrderRetire) {
						t.Errorf("%s, round %d: who knows the old one: %v", order, round, err)
					}
					if i == 2 && round == 0 {
						openssl(t, cp, before)
						openssl(t, cp, cp.CA()[len(before):])
					}
					if err := young.connects(cp); (err == nil) != (i >= 2) {
						t.Errorf("%s, round %d: who knows the new one: %v", order, round, err)
					}
					leaf := cp.Expires()
					cp = open(t, cfg) // as after a crash
					if cp.Made() || !cp.Expires().Equal(leaf) {
						t.Errorf("%s: a start made new certificates", order)
					}
					if _, again := cp.Trust(); again != revision {
						t.Errorf("%s: another revision after a start", order)
					}
				}
			}
			if _, err := os.Stat(filepath.Join(cfg.Dir, pki.RotationFile)); err == nil {
				t.Error("the rotation's file is still there")
			}
			if cfg.Vault == nil {
				if cert(t, read(t, file)).Subject.CommonName == "" {
					t.Error("the work directory does not hold the new authority")
				}
			}
			if got := status(t, pki.NewRotator(pki.RotatorConfig{Certs: cp})); got.Step != pki.StepSteady || len(got.Anchors) != 1 {
				t.Errorf("at the end: %+v", got)
			}
			if len(cp.Warnings()) > 0 {
				t.Errorf("warnings %v", cp.Warnings())
			}
		})
	}
}

// Whatever step it had come to, aborting restores the start.
func TestAbort(t *testing.T) {
	for _, k := range keepings() {
		for n := 1; n < len(orders); n++ {
			t.Run(fmt.Sprintf("%s after %s", k.name, orders[n-1]), func(t *testing.T) {
				cfg := k.setup(t)
				cp := open(t, cfg)
				ca, file := cp.CA(), read(t, filepath.Join(cfg.Dir, pki.CAFile))
				bundle, revision := cp.Trust()
				for _, order := range orders[:n] {
					do(t, pki.NewRotator(pki.RotatorConfig{Certs: cp}), order)
				}
				old := trusting(ca)
				do(t, pki.NewRotator(pki.RotatorConfig{Certs: cp}), pki.OrderAbort)
				for range 2 {
					now, again := cp.Trust()
					if string(cp.CA()) != string(ca) || string(now) != string(bundle) || again != revision || read(t, filepath.Join(cfg.Dir, pki.CAFile)) != file {
						t.Error("the authority is not the one before")
					}
					if err := old.connects(cp); err != nil {
						t.Error(err)
					}
					if sent := len(cp.TLS().Certificates); sent > 0 {
						t.Errorf("%d certificates", sent)
					}
					cp = open(t, cfg)
				}
				if _, err := pki.NewRotator(pki.RotatorConfig{Certs: cp}).Do(pki.OrderAbort, true); !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), "nothing to abort") {
					t.Errorf("a second time: %v", err)
				}
				do(t, pki.NewRotator(pki.RotatorConfig{Certs: cp}), pki.OrderPrepare) // and it can begin anew
			})
		}
	}
}

// A writer that is killed between two files: the next start finishes what was
// decided.
func TestKilledWhileRotating(t *testing.T) {
	files := []string{pki.RotationFile, pki.CAFile, pki.CAKeyFile, pki.ServerFile, pki.ServerKeyFile}
	snapshot := func(dir string) map[string]string {
		out := map[string]string{}
		for _, f := range files {
			if b, err := os.ReadFile(filepath.Join(dir, f)); err == nil {
				out[f] = string(b)
			}
		}
		return out
	}
	for _, original := range []bool{false, true} {
		for n, order := range append(slices.Clone(orders), pki.OrderAbort) {
			dir := t.TempDir()
			if original {
				cert, key := originalPair(t)
				save(t, filepath.Join(dir, pki.CAFile), cert)
				save(t, filepath.Join(dir, pki.CAKeyFile), key)
			}
			cp := open(t, pki.ControlPlaneConfig{Dir: dir})
			r := pki.NewRotator(pki.RotatorConfig{Certs: cp})
			for _, o := range orders[:min(n, 3)] {
				do(t, r, o)
			}
			before, trusted := snapshot(dir), cp.CA()
			do(t, r, order)
			after, now := snapshot(dir), cp.CA()
			// The order in which a step writes: what decides, what follows. Where
			// the step ends the rotation, its last deed is the file's end; a killed
			// writer had written it with the end in it, which only a rotation that is
			// killed shows: so it is put together here.
			for killed := range 2 {
				d := t.TempDir()
				for _, f := range files {
					text, ok := before[f]
					if f == pki.RotationFile && after[f] != "" {
						text, ok = after[f], true
					}
					if killed == 1 && f == pki.CAKeyFile {
						text, ok = after[f], true
					}
					if ok {
						save(t, filepath.Join(d, f), []byte(text))
					}
				}
				if after[pki.RotationFile] == "" {
					save(t, filepath.Join(d, pki.RotationFile), ending(t, before[pki.RotationFile], order == pki.OrderRetire))
				}
				again := open(t, pki.ControlPlaneConfig{Dir: d})
				if string(again.CA()) != string(now) {
					t.Errorf("original %t, killed at %s: the start before was %d anchors, now there are %d, want %d", original, order, count(trusted), count(again.CA()), count(now))
				}
				if err := trusting(now).connects(again); err != nil {
					t.Errorf("original %t, killed at %s: %v", original, order, err)
				}
				if got := snapshot(d); got[pki.CAFile] != after[pki.CAFile] || got[pki.CAKeyFile] != after[pki.CAKeyFile] || (got[pki.RotationFile] == "") != (after[pki.RotationFile] == "") {
					t.Errorf("original %t, killed at %s: the files were not finished", original, order)
				}
			}
		}
	}
}

// ending is the rotation's file as a step that ends it writes it first.
func ending(t *testing.T, text string, retire bool) []byte {
	t.Helper()
	var k map[string]any
	if err := json.Unmarshal([]byte(text), &k); err != nil {
		t.Fatal(err)
	}
	if retire {
		k["current"] = k["next"]
	}
	k["step"] = "steady"
	delete(k, "next")
	delete(k, "cross")
	out, err := json.Marshal(k)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestRotationWaitsForProxies(t *testing.T) {
	f := &fleet{}
	cp := open(t, pki.ControlPlaneConfig{Dir: t.TempDir()})
	log := new(journal)
	r := pki.NewRotator(pki.RotatorConfig{Certs: cp, Recipients: f.recipients, Log: slog.New(slog.NewTextHandler(log, nil))})
	_, start := cp.Trust()
	for _, o := range []pki.Order{pki.OrderDistribute, pki.OrderSwitch, pki.OrderRetire} {
		if _, err := r.Do(o, true); !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), "prepare comes next") {
			t.Errorf("%s before its turn: %v", o, err)
		}
	}
	if _, err := r.Do("prepar", false); !errs.Is(err, errs.Invalid) {
		t.Errorf("unknown order: %v", err)
	}
	do(t, r, pki.OrderPrepare)
	if _, err := r.Do(pki.OrderPrepare, true); !errs.Is(err, errs.Conflict) {
		t.Errorf("a second preparation: %v", err)
	}
	do(t, r, pki.OrderNext)
	_, both := cp.Trust()
	if start == both {
		t.Fatal("two bundles of one name")
	}
	linked := func(name string, revision int64) pki.Recipient {
		return pki.Recipient{Mesh: "m", Name: name, Link: true, Revision: revision}
	}
	linkless := pki.Recipient{Mesh: "m", Name: "d"}
	f.set(linked("b", both), linked("a", start), linkless)
	_, err := r.Do(pki.OrderSwitch, false)
	if !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), "a in mesh m") || strings.Contains(err.Error(), "b in mesh") || strings.Contains(err.Error(), "d in mesh") {
		t.Errorf("switch before all know: %v", err)
	}
	s := status(t, r)
	if len(s.Acknowledged) != 1 || len(s.Pending) != 2 || s.Pending[0].Name != "a" || s.Pending[1].Why == "" || s.Next != pki.OrderSwitch {
		t.Errorf("status %+v", s)
	}
	f.set(linked("b", both), linked("a", both), linkless)
	do(t, r, pki.OrderSwitch)
	s = status(t, r)
	if s.RetireAfter.Sub(s.Since) != pki.RetireAfter || s.Anchors[0].Role != "old" || s.Anchors[1].Role != "present" {
		t.Errorf("status %+v", s)
	}
	_, err = r.Do(pki.OrderRetire, false)
	if !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), "d in mesh m (it has no link") {
		t.Errorf("retirement while one has no link: %v", err)
	}
	var many []pki.Recipient
	for i := range 30 {
		many = append(many, linked(fmt.Sprintf("p%02d", i), 0))
	}
	f.set(many...)
	if _, err := r.Do(pki.OrderRetire, false); err == nil || !strings.HasPrefix(err.Error(), "30 proxies") || !strings.Contains(err.Error(), "and 20 more") || len(err.Error()) > 2000 {
		t.Errorf("many proxies: %v", err)
	}
	f.set(linkless)
	if _, err := r.Do(pki.OrderRetire, false); err == nil || !strings.HasPrefix(err.Error(), "1 proxy would not trust") {
		t.Errorf("one proxy: %v", err)
	}
	f.set(append(many, linkless, linked("told", both))...)
	cutOff, err := r.Do(pki.OrderRetire, true)
	if err != nil || len(cutOff) != 31 || cutOff[0].Name != "d" || cutOff[30].Name != "p29" || cutOff[0].Why == "" {
		t.Errorf("by force: %v, cut off are %v", err, cutOff)
	}
	said := log.lines("can't connect anew")
	if len(said) != 1 || !strings.Contains(said[0], "level=WARN") || !strings.Contains(said[0], "m/d m/p00 ") || !strings.Contains(said[0], "m/p18]") || !strings.Contains(said[0], "more=11") {
		t.Errorf("the log says %q", said)
	}
}

// Who was never told, since the old authority had ended before the new one was
// made, is cut off by the switch already; nobody is by an order that hurts nobody.
func TestWhoIsCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := new(fleet)
		cp := open(t, pki.ControlPlaneConfig{Dir: t.TempDir()})
		r := pki.NewRotator(pki.RotatorConfig{Certs: cp, Recipients: f.recipients})
		f.set(pki.Recipient{Mesh: "m", Name: "deaf", Link: true})
		for _, lost := range []bool{false, true} {
			if lost {
				time.Sleep(11 * pki.Year)
			}
			for _, o := range []pki.Order{pki.OrderPrepare, pki.OrderDistribute, pki.OrderSwitch, pki.OrderRetire} {
				want := 0
				if o == pki.OrderRetire || o == pki.OrderSwitch && lost {
					want = 1
				}
				if cutOff, err := r.Do(o, true); err != nil && (!lost || !errs.Is(err, errs.Unavailable)) || len(cutOff) != want {
					t.Errorf("%s, lost %v: %v, %v", o, lost, cutOff, err)
				}
			}
		}
	})
}

func TestNothingToRotate(t *testing.T) {
	dir := t.TempDir()
	open(t, pki.ControlPlaneConfig{Dir: dir})
	cp := open(t, pki.ControlPlaneConfig{CertFile: filepath.Join(dir, pki.ServerFile), KeyFile: filepath.Join(dir, pki.ServerKeyFile)})
	r := pki.NewRotator(pki.RotatorConfig{Certs: cp})
	if _, err := r.Do(pki.OrderPrepare, true); !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), "KUMA_GENERAL_TLS_CERT_FILE") {
		t.Errorf("prepare: %v", err)
	}
	if _, err := r.Status(); err == nil {
		t.Error("a status of nothing")
	}
	if bundle, revision := cp.Trust(); bundle != nil || revision != 0 || cp.Expiries() != nil {
		t.Error("proxies are told of a user's certificate")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Run(ctx); err != nil {
		t.Error(err)
	}
}

// Two control planes that start at once on one store have one authority, and
// what one makes of it the other takes over.
func TestSharedAuthority(t *testing.T) {
	v := &vault{}
	var one, two *pki.ControlPlane
	a, b := t.TempDir(), t.TempDir()
	v.race = func() { two = open(t, pki.ControlPlaneConfig{Dir: b, Vault: v}) }
	one = open(t, pki.ControlPlaneConfig{Dir: a, Vault: v})
	if string(one.CA()) != string(two.CA()) || one.Made() || !two.Made() {
		t.Fatalf("two authorities, or both made: %t %t", one.Made(), two.Made())
	}
	for _, dir := range []string{a, b} {
		if read(t, filepath.Join(dir, pki.CAFile)) != string(one.CA()) {
			t.Error("kuma-cp.crt is not written out")
		}
		if _, err := os.Stat(filepath.Join(dir, pki.CAKeyFile)); err == nil {
			t.Error("the key is in the work directory")
		}
	}
	if err := trusting(one.CA()).connects(two); err != nil {
		t.Error(err)
	}
	r1, r2 := pki.NewRotator(pki.RotatorConfig{Certs: one}), pki.NewRotator(pki.RotatorConfig{Certs: two})
	old := trusting(one.CA())
	do(t, r1, pki.OrderPrepare)
	// Who does not know yet can't undo it.
	if _, err := r2.Do(pki.OrderPrepare, false); !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), "another control plane has changed the authority") {
		t.Errorf("a second preparation: %v", err)
	}
	if string(one.CA()) != string(two.CA()) || count(two.CA()) != 2 {
		t.Error("the collision did not bring the other's authority")
	}
	do(t, r2, pki.OrderDistribute)
	if err := one.Refresh(); err != nil {
		t.Fatal(err)
	}
	do(t, r1, pki.OrderSwitch)
	if err := two.Refresh(); err != nil {
		t.Fatal(err)
	}
	for _, cp := range []*pki.ControlPlane{one, two} {
		if err := old.connects(cp); err != nil {
			t.Error(err)
		}
		bundle, _ := cp.Trust()
		if err := trusting(bundle[len(bundle)/2-20:]).connects(cp); err != nil {
			t.Errorf("who knows the new one: %v", err)
		}
	}
	do(t, r2, pki.OrderRetire)
	if err := one.Refresh(); err != nil {
		t.Fatal(err)
	}
	if err := old.connects(one); err == nil {
		t.Error("the old authority is still served")
	}
	if read(t, filepath.Join(a, pki.CAFile)) != read(t, filepath.Join(b, pki.CAFile)) {
		t.Error("the instances give out different files")
	}

	t.Run("a damaged secret", func(t *testing.T) {
		good := v.text
		for _, text := range []string{"", "x", "{}", `{"format":2}`, strings.Replace(string(good), `"steady"`, `"switched"`, 1), strings.Replace(string(good), "EC PRIVATE KEY", "RSA PRIVATE KEY", 2), strings.Repeat(" ", 2<<20)} {
			v.text, v.version = []byte(text), v.version+1
			if err := one.Refresh(); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), "the control plane's authority in the store") {
				t.Errorf("%.20q: %v", text, err)
			}
			if err := trusting(one.CA()).connects(one); err != nil {
				t.Errorf("%.20q: %v", text, err)
			}
			if _, err := pki.OpenControlPlane(pki.ControlPlaneConfig{Dir: t.TempDir(), Vault: v}); !errs.Is(err, errs.Invalid) {
				t.Errorf("a start with %.20q: %v", text, err)
			}
		}
		v.text, v.version = nil, 0
		if err := one.Refresh(); err != nil || v.steps() != "steady" {
			t.Errorf("a removed secret is not put back: %v", err)
		}
	})
	t.Run("a store that fails", func(t *testing.T) {
		v.fail = errs.New(errs.Unavailable, "no store")
		if _, err := r1.Do(pki.OrderPrepare, false); !errs.Is(err, errs.Unavailable) {
			t.Errorf("prepare: %v", err)
		}
		if status(t, r1).Step != pki.StepSteady {
			t.Error("a step that was not kept is shown")
		}
	})
}

// A pair in the work directory is brought into the store, once.
func TestImport(t *testing.T) {
	for _, steps := range []int{0, 3} {
		dir, v := t.TempDir(), &vault{}
		cp := open(t, pki.ControlPlaneConfig{Dir: dir})
		for _, o := range orders[:steps] {
			do(t, pki.NewRotator(pki.RotatorConfig{Certs: cp}), o)
		}
		first := open(t, pki.ControlPlaneConfig{Dir: dir, Vault: v})
		if first.Made() || string(first.CA()) != string(cp.CA()) {
			t.Error("the pair was not taken over")
		}
		second := open(t, pki.ControlPlaneConfig{Dir: t.TempDir(), Vault: v})
		if string(second.CA()) != string(cp.CA()) || v.version != 1 {
			t.Errorf("the second instance has another authority, or it was written %d times", v.version)
		}
		if err := trusting(cp.CA()).connects(second); err != nil {
			t.Error(err)
		}
		// What was taken over is moved out of the way, and nobody else may read it.
		for _, name := range []string{pki.CAKeyFile, pki.RotationFile} {
			if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
				t.Errorf("%s is still there", name)
			}
		}
		if info, err := os.Stat(filepath.Join(dir, pki.CAKeyFile+".old")); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the key was not kept: %v, %v", info, err)
		}
		if w := strings.Join(first.Warnings(), "\n"); !strings.Contains(w, pki.CAKeyFile+".old") {
			t.Errorf("warnings %q", w)
		}
		again := open(t, pki.ControlPlaneConfig{Dir: dir, Vault: v})
		if string(again.CA()) != string(cp.CA()) || len(again.Warnings()) > 0 {
			t.Errorf("the second start: %v", again.Warnings())
		}
	}
}

// The kuma-cp.crt that a control plane has written out of the store is not in the way
// of its next start where the store has lost the authority.
func TestStoreIsEmptyAgain(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, dir string){
		"as it was": func(*testing.T, string) {},
		"with an older key": func(t *testing.T, dir string) {
			save(t, filepath.Join(dir, pki.CAKeyFile), mint(t, nil, asCA).keyPEM(t))
		},
		"with a pair that has ended": func(t *testing.T, dir string) {
			old := mint(t, nil, func(c *x509.Certificate) {
				asCA(c)
				c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
			})
			save(t, filepath.Join(dir, pki.CAFile), certPEM(old))
			save(t, filepath.Join(dir, pki.CAKeyFile), old.keyPEM(t))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			before := open(t, pki.ControlPlaneConfig{Dir: dir, Vault: &vault{}})
			change(t, dir)
			key, _ := os.ReadFile(filepath.Join(dir, pki.CAKeyFile))
			after := open(t, pki.ControlPlaneConfig{Dir: dir, Vault: &vault{}})
			if !after.Made() || string(after.CA()) == string(before.CA()) || read(t, filepath.Join(dir, pki.CAFile)) != string(after.CA()) {
				t.Error("no new authority was made, or it is not written out")
			}
			if w := strings.Join(after.Warnings(), "\n"); !strings.Contains(w, "the store has no authority") || !strings.Contains(w, "give it to clients") {
				t.Errorf("warnings %q", w)
			}
			if err := trusting(after.CA()).connects(after); err != nil {
				t.Error(err)
			}
			if kept, _ := os.ReadFile(filepath.Join(dir, pki.CAKeyFile+".old")); string(kept) != string(key) {
				t.Error("the key that was there is not kept")
			}
		})
	}
	t.Run("what can't be read is not passed over", func(t *testing.T) {
		dir := t.TempDir()
		open(t, pki.ControlPlaneConfig{Dir: dir})
		save(t, filepath.Join(dir, pki.CAKeyFile), []byte("rubbish"))
		if _, err := pki.OpenControlPlane(pki.ControlPlaneConfig{Dir: dir, Vault: &vault{}}); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), pki.CAKeyFile) {
			t.Errorf("a garbled key: %v", err)
		}
	})
}

// A control plane that no longer shares its authority takes it along, wherever its
// rotation is.
func TestBackToFile(t *testing.T) {
	for _, imported := range []bool{false, true} {
		for n := range 5 {
			t.Run(fmt.Sprintf("imported %t, %d steps", imported, n), func(t *testing.T) {
				dir, v := t.TempDir(), &vault{}
				oldKey := ""
				if imported {
					open(t, pki.ControlPlaneConfig{Dir: dir})
					oldKey = read(t, filepath.Join(dir, pki.CAKeyFile))
				}
				shared := open(t, pki.ControlPlaneConfig{Dir: dir, Vault: v})
				for _, o := range orders[:n] {
					do(t, pki.NewRotator(pki.RotatorConfig{Certs: shared}), o)
				}
				if imported && n == 4 { // as an earlier version has left it
					save(t, filepath.Join(dir, pki.CAKeyFile), []byte(oldKey))
				}
				cfg := pki.ControlPlaneConfig{Dir: dir, Former: v}
				for i := range 2 {
					cp := open(t, cfg)
					if cp.Made() || string(cp.CA()) != string(shared.CA()) {
						t.Fatal("it has another authority")
					}
					if err := trusting(cp.CA()).connects(cp); err != nil {
						t.Error(err)
					}
					if w := strings.Join(cp.Warnings(), "\n"); strings.Contains(w, "taken over from the store") != (i == 0) {
						t.Errorf("start %d: warnings %q", i, w)
					}
					if got, want := status(t, pki.NewRotator(pki.RotatorConfig{Certs: cp})).Step, status(t, pki.NewRotator(pki.RotatorConfig{Certs: shared})).Step; got != want {
						t.Errorf("it is %s, was %s", got, want)
					}
					cfg.Former = nil // and the directory is enough from now on
				}
			})
		}
	}
	t.Run("a new machine", func(t *testing.T) {
		v := &vault{}
		shared := open(t, pki.ControlPlaneConfig{Dir: t.TempDir(), Vault: v})
		cp := open(t, pki.ControlPlaneConfig{Dir: t.TempDir(), Former: v})
		if cp.Made() || string(cp.CA()) != string(shared.CA()) {
			t.Error("it has another authority")
		}
	})
	t.Run("a pair of its own goes first", func(t *testing.T) {
		v, dir := &vault{}, t.TempDir()
		open(t, pki.ControlPlaneConfig{Dir: t.TempDir(), Vault: v})
		own := open(t, pki.ControlPlaneConfig{Dir: dir})
		if cp := open(t, pki.ControlPlaneConfig{Dir: dir, Former: v}); string(cp.CA()) != string(own.CA()) {
			t.Error("it has another authority")
		}
	})
	t.Run("nothing there", func(t *testing.T) {
		dir := t.TempDir()
		if cp := open(t, pki.ControlPlaneConfig{Dir: dir, Former: &vault{}}); !cp.Made() {
			t.Error("no authority was made")
		}
		if err := os.Remove(filepath.Join(dir, pki.CAKeyFile)); err != nil {
			t.Fatal(err)
		}
		if _, err := pki.OpenControlPlane(pki.ControlPlaneConfig{Dir: dir, Former: &vault{}}); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), "is missing") {
			t.Errorf("a lost key: %v", err)
		}
	})
}

func TestRotationFileRefused(t *testing.T) {
	made := func(t *testing.T) (dir, text string) {
		dir = t.TempDir()
		cp := open(t, pki.ControlPlaneConfig{Dir: dir})
		do(t, pki.NewRotator(pki.RotatorConfig{Certs: cp}), pki.OrderPrepare)
		return dir, read(t, filepath.Join(dir, pki.RotationFile))
	}
	_, foreign := made(t)
	part := func(text, key string) any {
		var k map[string]any
		if err := json.Unmarshal([]byte(text), &k); err != nil {
			t.Fatal(err)
		}
		return k[key]
	}
	set := func(key string, value any) func(string) string {
		return func(text string) string {
			var k map[string]any
			if err := json.Unmarshal([]byte(text), &k); err != nil {
				t.Fatal(err)
			}
			k[key] = value
			out, err := json.Marshal(k)
			if err != nil {
				t.Fatal(err)
			}
			return string(out)
		}
	}
	for name, c := range map[string]struct {
		change func(string) string
		want   string
	}{
		"garbled":               {func(string) string { return "{" }, "not the JSON"},
		"emptied":               {func(string) string { return "" }, "not the JSON"},
		"cut off":               {func(s string) string { return s[:len(s)/2] }, "not the JSON"},
		"of the future":         {set("format", 9), "format 9"},
		"unknown step":          {set("step", "flying"), `"flying" is not known`},
		"no next authority":     {set("next", nil), "there is no next authority"},
		"steady with a next":    {set("step", "steady"), "nothing is being rotated"},
		"another's cross":       {set("cross", part(foreign, "cross")), "cross-signed"},
		"no PEM in the cross":   {set("cross", "x"), "cross-signed"},
		"another's key":         {set("current", map[string]any{"cert": part(foreign, "current").(map[string]any)["cert"], "key": part(foreign, "next").(map[string]any)["key"]}), "the key is not that of"},
		"a leaf as authority":   {set("next", map[string]any{"cert": leafText(t), "key": "x"}), "next authority"},
		"too large":             {func(string) string { return strings.Repeat(" ", 300<<10) }, "limit"},
		"a directory in place":  {nil, "is a directory"},
		"an original as a next": {set("next", func() any { c, k := originalPair(t); return map[string]any{"cert": string(c), "key": string(k)} }()), "is a server's certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, text := made(t)
			file := filepath.Join(dir, pki.RotationFile)
			if c.change == nil {
				if err := os.Remove(file); err != nil {
					t.Fatal(err)
				}
				if err := os.Mkdir(file, 0o700); err != nil {
					t.Fatal(err)
				}
			} else {
				save(t, file, []byte(c.change(text)))
			}
			_, err := pki.OpenControlPlane(pki.ControlPlaneConfig{Dir: dir})
			if !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), pki.RotationFile) && c.change != nil {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
			if strings.Contains(fmt.Sprint(err), "PRIVATE KEY-----\nM") {
				t.Error("the error shows a key")
			}
			// As the error says: without the file the old authority goes on.
			if err := os.RemoveAll(file); err != nil {
				t.Fatal(err)
			}
			if cp := open(t, pki.ControlPlaneConfig{Dir: dir}); cp.Made() {
				t.Error("a new authority was made")
			}
		})
	}
}

func leafText(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	open(t, pki.ControlPlaneConfig{Dir: dir})
	return read(t, filepath.Join(dir, pki.ServerFile))
}

// HRD-33: an authority that comes to its end is rotated without being asked, each step
// when its time has come; nobody loses trust, though one proxy is late.
func TestAutomaticRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fleet{}
		cfg := pki.ControlPlaneConfig{Dir: t.TempDir(), Every: 24 * time.Hour, Machine: func() ([]string, error) { return []string{"cp"}, nil }}
		cp := open(t, cfg)
		day := func(n int) { time.Sleep(time.Duration(n) * 24 * time.Hour); synctest.Wait() }
		ctx, cancel := context.WithCancel(t.Context())
		r := pki.NewRotator(pki.RotatorConfig{Certs: cp, Recipients: f.recipients})
		go r.Run(ctx)
		go cp.Run(ctx, func(err error) { t.Error(err) })
		late := func(revision int64) { f.set(pki.Recipient{Mesh: "m", Name: "late", Link: true, Revision: revision}) }
		_, revision := cp.Trust()
		late(revision)
		first := trusting(cp.CA())
		day(9*365 - 10)
		if s := status(t, r); s.Step != pki.StepSteady {
			t.Fatalf("rotated after nine years less ten days: %+v", s)
		}
		day(20)
		s := status(t, r)
		if s.Step != pki.StepDistributed || !s.Automatic || len(s.Pending) != 1 {
			t.Fatalf("after nine years: %+v", s)
		}
		day(30)
		if s := status(t, r); s.Step != pki.StepDistributed {
			t.Fatalf("it did not wait for a proxy: %+v", s)
		}
		late(s.Revision)
		day(2)
		if s := status(t, r); s.Step != pki.StepSwitched {
			t.Fatalf("it does not go on: %+v", s)
		}
		if err := first.connects(cp); err != nil {
			t.Error(err)
		}
		day(85)
		if s := status(t, r); s.Step != pki.StepSwitched {
			t.Fatalf("retired too early: %+v", s)
		}
		late(revision) // one that has gone back: the old authority stays
		day(10)
		if s := status(t, r); s.Step != pki.StepSwitched {
			t.Fatalf("retired though a proxy does not know the new one: %+v", s)
		}
		late(s.Revision)
		day(2)
		if s := status(t, r); s.Step != pki.StepSteady || s.Anchors[0].NotAfter.Before(time.Now().Add(9*pki.Year)) {
			t.Fatalf("not retired: %+v", s)
		}
		if err := first.connects(cp); err == nil {
			t.Error("the old authority is still served")
		}
		// What somebody does by hand is not carried on, but for its last step.
		do(t, r, pki.OrderPrepare)
		day(100)
		if s := status(t, r); s.Step != pki.StepPrepared || s.Automatic {
			t.Fatalf("a rotation by hand: %+v", s)
		}
		f.set()
		do(t, r, pki.OrderDistribute)
		do(t, r, pki.OrderSwitch)
		day(92)
		if s := status(t, r); s.Step != pki.StepSteady {
			t.Fatalf("the last step of a rotation by hand: %+v", s)
		}
		cancel()
		synctest.Wait()
	})
}

// An authority that ended while the machine slept is replaced as soon as that is
// sure: nobody trusts it any more, so there is nobody to wait for.
func TestRotationTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fleet{}
		f.set(pki.Recipient{Mesh: "m", Name: "deaf", Link: true})
		cp := open(t, pki.ControlPlaneConfig{Dir: t.TempDir(), Every: time.Hour, Machine: func() ([]string, error) { return nil, nil }})
		time.Sleep(10*pki.Year + time.Hour)
		r := pki.NewRotator(pki.RotatorConfig{Certs: cp, Recipients: f.recipients})
		ctx, cancel := context.WithCancel(t.Context())
		go r.Run(ctx)
		time.Sleep(8 * time.Hour)
		synctest.Wait()
		if s := status(t, r); s.Step != pki.StepSteady || s.Anchors[0].NotAfter.Before(time.Now()) {
			t.Errorf("status %+v", s)
		}
		if err := trusting(cp.CA()).connects(cp); err != nil {
			t.Error(err)
		}
		cancel()
		synctest.Wait()
	})
}

// The certificate follows the machine's names: a new one brings another
// certificate, one that is gone does not.
func TestCertificateFollowsNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		own := []string{"cp-1", "192.0.2.1"}
		var fail error
		cp := open(t, pki.ControlPlaneConfig{Dir: t.TempDir(), Every: time.Hour, Hostnames: []string{"mesh.example"}, Machine: func() ([]string, error) {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(own), fail
		}})
		become := func(err error, names ...string) {
			mu.Lock()
			own, fail = names, err
			mu.Unlock()
			time.Sleep(time.Hour + time.Second)
			synctest.Wait()
		}
		go cp.Run(t.Context(), func(err error) { t.Error(err) })
		first := cp.Expires()
		become(nil, "cp-1")
		if !cp.Expires().Equal(first) {
			t.Error("a vanished address made a new certificate")
		}
		become(nil, "cp-1", "192.0.2.2")
		second := cp.Expires()
		if second.Equal(first) || !slices.Contains(cp.SANs(), "192.0.2.2") || !slices.Contains(cp.SANs(), "mesh.example") || slices.Contains(cp.SANs(), "192.0.2.1") {
			t.Errorf("after a new address: %v", cp.SANs())
		}
		become(errs.New(errs.Internal, "no interfaces"), "cp-1")
		if !cp.Expires().Equal(second) {
			t.Error("a machine that can't be asked made a new certificate")
		}
		time.Sleep(90 * 24 * time.Hour)
		if !slices.Contains(cp.SANs(), "192.0.2.2") || time.Until(cp.Expires()) < 25*24*time.Hour {
			t.Error("a machine that can't be asked has no renewals, or lost its names")
		}
	})
}

func TestReadAnchors(t *testing.T) {
	dir := t.TempDir()
	cp := open(t, pki.ControlPlaneConfig{Dir: dir})
	ca := cp.CA()
	if certs, clean, err := pki.ReadAnchors(slices.Concat([]byte("# a comment\n"), ca, ca)); err != nil || len(certs) != 2 || string(clean) != string(ca)+string(ca) {
		t.Errorf("two authorities: %d, %v", len(certs), err)
	}
	for name, c := range map[string]struct{ text, want string }{
		"nothing":      {"", "no PEM block"},
		"rubbish":      {"hello", "no PEM block"},
		"a leaf":       {read(t, filepath.Join(dir, pki.ServerFile)), "CA:TRUE"},
		"a key":        {string(ca) + read(t, filepath.Join(dir, pki.CAKeyFile)), "only CERTIFICATE"},
		"too many":     {strings.Repeat(string(ca), 17), "more than 16"},
		"too long":     {string(ca) + strings.Repeat("\n", 64<<10), "the limit is"},
		"no DER in it": {string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})), "not a valid x509"},
	} {
		if _, _, err := pki.ReadAnchors([]byte(c.text)); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func TestExpiries(t *testing.T) {
	cp := open(t, pki.ControlPlaneConfig{Dir: t.TempDir()})
	names := func() (out []string) {
		for _, e := range cp.Expiries() {
			if e.NotAfter.Before(time.Now()) || e.Subject == "" || e.File == "" {
				t.Errorf("%+v", e)
			}
			out = append(out, e.Name)
		}
		return out
	}
	if got := names(); !slices.Equal(got, []string{"control-plane-ca", "control-plane-server"}) {
		t.Errorf("%v", got)
	}
	do(t, pki.NewRotator(pki.RotatorConfig{Certs: cp}), pki.OrderPrepare)
	if got := names(); !slices.Equal(got, []string{"control-plane-ca", "control-plane-ca-next", "control-plane-server"}) {
		t.Errorf("%v", got)
	}
}

// HRD-33: a control plane that has just started does not know who trusts what: until
// those that were connected before have had time to come back, nothing that could
// lock them out happens, by itself or by hand.
func TestRotationWaitsAfterStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fleet{}
		cfg := pki.ControlPlaneConfig{Dir: t.TempDir(), Every: time.Minute, Machine: func() ([]string, error) { return []string{"cp"}, nil }}
		cp := open(t, cfg)
		start := func() *pki.Rotator {
			at := time.Now().Add(90 * time.Second)
			return pki.NewRotator(pki.RotatorConfig{Certs: cp, Recipients: f.recipients, Settled: func() time.Time { return at }})
		}
		refused := func(r *pki.Rotator, order pki.Order) {
			t.Helper()
			if _, err := r.Do(order, false); !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), "started a moment ago") {
				t.Errorf("%s just after a start: %v", order, err)
			}
		}
		r := start()
		do(t, r, pki.OrderPrepare)
		do(t, r, pki.OrderDistribute)
		refused(r, pki.OrderSwitch)
		if s := status(t, r); !s.Settles.Equal(time.Now().Add(90 * time.Second)) {
			t.Errorf("it settles at %v", s.Settles)
		}
		time.Sleep(91 * time.Second)
		if s := status(t, r); !s.Settles.IsZero() {
			t.Errorf("it settles at %v", s.Settles)
		}
		do(t, r, pki.OrderSwitch)
		refused(start(), pki.OrderRetire)

		// Its time has come while nothing ran.
		time.Sleep(pki.RetireAfter)
		cp = open(t, cfg)
		r = start()
		ctx, cancel := context.WithCancel(t.Context())
		go r.Run(ctx)
		time.Sleep(80 * time.Second)
		synctest.Wait()
		if s := status(t, r); s.Step != pki.StepSwitched {
			t.Fatalf("retired before anybody could come back: %+v", s)
		}
		f.set(pki.Recipient{Mesh: "m", Name: "linkless"})
		time.Sleep(time.Hour)
		synctest.Wait()
		if s := status(t, r); s.Step != pki.StepSwitched {
			t.Fatalf("retired though a proxy without a link is back: %+v", s)
		}
		f.set()
		time.Sleep(time.Hour)
		synctest.Wait()
		if s := status(t, r); s.Step != pki.StepSteady {
			t.Fatalf("not retired: %+v", s)
		}
		cancel()
		synctest.Wait()

		// By force it goes at once.
		r = start()
		for _, o := range orders {
			if _, err := r.Do(o, true); err != nil {
				t.Error(err)
			}
		}
	})
}

// HRD-33: a rotation that somebody began and forgot is carried on by the time that
// it would have begun by itself.
func TestForgottenRotation(t *testing.T) {
	for n := 1; n < 3; n++ {
		synctest.Test(t, func(t *testing.T) {
			cp := open(t, pki.ControlPlaneConfig{Dir: t.TempDir(), Every: 24 * time.Hour, Machine: func() ([]string, error) { return nil, nil }})
			ctx, cancel := context.WithCancel(t.Context())
			r := pki.NewRotator(pki.RotatorConfig{Certs: cp})
			go cp.Run(ctx, func(err error) { t.Error(err) })
			go r.Run(ctx)
			for _, o := range orders[:n] {
				do(t, r, o)
			}
			step := status(t, r).Step
			time.Sleep(9*pki.Year - 10*24*time.Hour)
			synctest.Wait()
			if s := status(t, r); s.Step != step {
				t.Errorf("%s: it was carried on too early: %+v", step, s)
			}
			time.Sleep(pki.Year)
			synctest.Wait()
			// What was made nine years ago ends as soon, and would be of no help.
			if s := status(t, r); s.Step != pki.StepSteady || s.Anchors[0].NotAfter.Before(time.Now().Add(8*pki.Year)) {
				t.Errorf("%s: it was not carried on: %+v", step, s)
			}
			known := trusting(cp.CA())
			time.Sleep(pki.Year)
			synctest.Wait()
			if err := known.connects(cp); err != nil {
				t.Errorf("%s: after the old authority's end: %v", step, err)
			}
			cancel()
			synctest.Wait()
		})
	}
}

// HRD-33: a clock that is far ahead for a few minutes, as one without a battery may
// be at a start, replaces nothing.
func TestRotationWrongClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp := open(t, pki.ControlPlaneConfig{Dir: t.TempDir(), Every: time.Minute, Machine: func() ([]string, error) { return nil, nil }})
		ca := cp.CA()
		time.Sleep(10*pki.Year + time.Hour)
		ctx, cancel := context.WithCancel(t.Context())
		go pki.NewRotator(pki.RotatorConfig{Certs: cp}).Run(ctx)
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		cancel()
		synctest.Wait()
		if string(cp.CA()) != string(ca) {
			t.Error("the authority was replaced within three minutes")
		}
		ctx, cancel = context.WithCancel(t.Context())
		go pki.NewRotator(pki.RotatorConfig{Certs: cp}).Run(ctx)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if string(cp.CA()) == string(ca) {
			t.Error("an authority that has ended for good was not replaced")
		}
		cancel()
		synctest.Wait()
	})
}

// What is not valid yet, since it was made by a clock that was ahead, is not
// switched to, and what the control plane began by itself it takes back.
func TestRotationMadeTooEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := pki.ControlPlaneConfig{Dir: t.TempDir(), Every: time.Minute, Machine: func() ([]string, error) { return nil, nil }}
		cp := open(t, cfg)
		for _, o := range orders[:2] {
			do(t, pki.NewRotator(pki.RotatorConfig{Certs: cp}), o)
		}
		file := filepath.Join(cfg.Dir, pki.RotationFile)
		// The same, made by a clock that is two years ahead.
		var k map[string]any
		if err := json.Unmarshal([]byte(read(t, file)), &k); err != nil {
			t.Fatal(err)
		}
		cert, key := laterAuthority(t, time.Now().Add(2*pki.Year))
		k["next"], k["cross"], k["automatic"] = map[string]any{"cert": cert, "key": key}, nil, true
		text, err := json.Marshal(k)
		if err != nil {
			t.Fatal(err)
		}
		save(t, file, text)
		cp = open(t, cfg)
		r := pki.NewRotator(pki.RotatorConfig{Certs: cp})
		if _, err := r.Do(pki.OrderSwitch, true); !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), "not valid before") {
			t.Errorf("switched to an authority of the future: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		go r.Run(ctx)
		synctest.Wait()
		if s := status(t, r); s.Step != pki.StepSteady {
			t.Errorf("it was not taken back: %+v", s)
		}
		cancel()
		synctest.Wait()
	})
}

func laterAuthority(t *testing.T, from time.Time) (cert, key string) {
	t.Helper()
	m := mint(t, nil, func(c *x509.Certificate) { asCA(c); c.NotBefore, c.NotAfter = from, from.Add(10*pki.Year) })
	return string(certPEM(m)), string(m.keyPEM(t))
}

// The pair that was retired is kept, for nobody else to read, in case it was a
// mistake: putting it back brings the old authority back.
func TestRetiredIsKept(t *testing.T) {
	for _, k := range keepings() {
		t.Run(k.name, func(t *testing.T) {
			cfg := k.setup(t)
			cp := open(t, cfg)
			before := string(cp.CA())
			key := ""
			if cfg.Vault == nil {
				key = read(t, filepath.Join(cfg.Dir, pki.CAKeyFile))
			}
			for _, o := range orders {
				do(t, pki.NewRotator(pki.RotatorConfig{Certs: cp}), o)
			}
			if v, ok := cfg.Vault.(*vault); ok {
				var k struct{ Retired struct{ Cert, Key string } }
				if err := json.Unmarshal(v.text, &k); err != nil || k.Retired.Cert != before || !strings.Contains(k.Retired.Key, "PRIVATE KEY") {
					t.Errorf("the secret does not keep the retired pair: %v", err)
				}
				for range 2 { // and it is not in the way of the next one
					for _, o := range orders {
						do(t, pki.NewRotator(pki.RotatorConfig{Certs: cp}), o)
					}
					cp = open(t, cfg)
				}
				return
			}
			for file, want := range map[string]string{pki.RetiredFile: before, pki.RetiredKeyFile: key} {
				file = filepath.Join(cfg.Dir, file)
				if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 || read(t, file) != want {
					t.Errorf("%s: %v, %v", file, info, err)
				}
			}
			for from, to := range map[string]string{pki.RetiredFile: pki.CAFile, pki.RetiredKeyFile: pki.CAKeyFile} {
				if err := os.Rename(filepath.Join(cfg.Dir, from), filepath.Join(cfg.Dir, to)); err != nil {
					t.Fatal(err)
				}
			}
			cp = open(t, cfg)
			if err := trusting([]byte(before)).connects(cp); err != nil {
				t.Errorf("the pair was put back: %v", err)
			}
		})
	}
}

// An abort in the authority's last year is not undone at the next look, nor by a
// restart, but in time before the end.
func TestAbortIsRemembered(t *testing.T) {
	for _, shared := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			cfg := pki.ControlPlaneConfig{Dir: t.TempDir(), Every: time.Hour, Machine: func() ([]string, error) { return nil, nil }}
			if shared {
				cfg.Vault = &vault{}
			}
			cp := open(t, cfg)
			run := func(d time.Duration) *pki.Rotator {
				r := pki.NewRotator(pki.RotatorConfig{Certs: cp, Recipients: func() []pki.Recipient { return []pki.Recipient{{Mesh: "m", Name: "deaf", Link: true}} }})
				ctx, cancel := context.WithCancel(t.Context())
				go r.Run(ctx)
				time.Sleep(d)
				synctest.Wait()
				cancel()
				synctest.Wait()
				return r
			}
			time.Sleep(9*pki.Year + 24*time.Hour)
			r := run(time.Hour)
			if s := status(t, r); s.Step != pki.StepDistributed {
				t.Fatalf("in the last year: %+v", s)
			}
			do(t, r, pki.OrderAbort)
			until := status(t, r).Held
			held := filepath.Join(t.TempDir(), "held")
			if err := os.CopyFS(held, os.DirFS(cfg.Dir)); err != nil {
				t.Fatal(err)
			}
			if left := time.Until(until); left < 29*24*time.Hour || left > 31*24*time.Hour {
				t.Errorf("held until %v", until)
			}
			for range 2 {
				if s := status(t, run(24*time.Hour)); s.Step != pki.StepSteady || !s.Held.Equal(until) {
					t.Errorf("shared %t: the abort was undone: %+v", shared, s)
				}
				cp = open(t, cfg)
			}
			if s := status(t, run(30*24*time.Hour)); s.Step != pki.StepDistributed || !s.Held.IsZero() {
				t.Errorf("shared %t: no rotation after the time: %+v", shared, s)
			}
			if !shared { // who puts another pair there meanwhile gets that one
				other := pki.ControlPlaneConfig{Dir: t.TempDir(), Machine: cfg.Machine}
				open(t, other)
				for _, name := range []string{pki.CAFile, pki.CAKeyFile} {
					save(t, filepath.Join(held, name), []byte(read(t, filepath.Join(other.Dir, name))))
				}
				if put := open(t, pki.ControlPlaneConfig{Dir: held, Machine: cfg.Machine}); string(put.CA()) != read(t, filepath.Join(other.Dir, pki.CAFile)) {
					t.Error("the pair that was put there is not the authority")
				}
			}
			// Near the end the time is shorter, and by hand nothing is held.
			time.Sleep(334*24*time.Hour - 40*24*time.Hour)
			cp = open(t, cfg)
			r = pki.NewRotator(pki.RotatorConfig{Certs: cp})
			do(t, r, pki.OrderAbort)
			s := status(t, r)
			if left := time.Until(s.Held); left < time.Hour || left > time.Until(s.Anchors[0].NotAfter)/2+time.Hour {
				t.Errorf("held until %v, it ends at %v", s.Held, s.Anchors[0].NotAfter)
			}
			do(t, r, pki.OrderPrepare)
			do(t, r, pki.OrderDistribute)
			if s := status(t, r); !s.Held.IsZero() {
				t.Errorf("it is held: %+v", s)
			}
		})
	}
}

// A step that was kept counts as taken, whatever then can't be written; the error
// says so.
func TestStepTakenBut(t *testing.T) {
	cfg := pki.ControlPlaneConfig{Dir: t.TempDir(), Vault: &vault{}}
	cp := open(t, cfg)
	file := filepath.Join(cfg.Dir, pki.CAFile)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(file, "x"), 0o700); err != nil { // can't be written over, root or not
		t.Fatal(err)
	}
	r := pki.NewRotator(pki.RotatorConfig{Certs: cp})
	if _, err := r.Do(pki.OrderPrepare, false); !errs.Is(err, errs.Unavailable) || !strings.Contains(err.Error(), "the step prepare was taken, but ") || !strings.Contains(err.Error(), pki.CAFile) {
		t.Errorf("error %v", err)
	}
	if s := status(t, r); s.Step != pki.StepPrepared {
		t.Errorf("%+v", s)
	}
	if err := os.RemoveAll(file); err != nil {
		t.Fatal(err)
	}
	do(t, r, pki.OrderDistribute)
	if read(t, file) != string(cp.CA()) {
		t.Error("kuma-cp.crt is not written with the next step")
	}
}

// A server's certificate that may not sign is served, and rotated away from: nobody
// verifies the next authority by it, so the switch waits for all, and what is kept
// can be read at each step.
func TestRotateFromPlainCertificate(t *testing.T) {
	for _, k := range []keeping{
		{"file", func(t *testing.T) pki.ControlPlaneConfig { return pki.ControlPlaneConfig{Dir: t.TempDir()} }},
		{"store", func(t *testing.T) pki.ControlPlaneConfig {
			return pki.ControlPlaneConfig{Dir: t.TempDir(), Vault: &vault{}}
		}},
	} {
		t.Run(k.name, func(t *testing.T) {
			cfg := k.setup(t)
			plain := mint(t, nil, func(c *x509.Certificate) { c.DNSNames = []string{"localhost"} })
			save(t, filepath.Join(cfg.Dir, pki.CAFile), certPEM(plain))
			save(t, filepath.Join(cfg.Dir, pki.CAKeyFile), plain.keyPEM(t))
			f := &fleet{}
			f.set(pki.Recipient{Mesh: "m", Name: "linkless"})
			for i, order := range orders {
				cp := open(t, cfg)
				r := pki.NewRotator(pki.RotatorConfig{Certs: cp, Recipients: f.recipients})
				if i == 2 {
					if _, err := r.Do(order, false); !errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), "linkless in mesh m") {
						t.Errorf("switched under a proxy that verifies neither: %v", err)
					}
					f.set()
				}
				do(t, r, order)
				if got, want := status(t, r).Note != "", i < 2; got != want {
					t.Errorf("%s: note %q", order, status(t, r).Note)
				}
				again := open(t, cfg)
				if string(again.CA()) != string(cp.CA()) || status(t, pki.NewRotator(pki.RotatorConfig{Certs: again})).Step != status(t, r).Step {
					t.Errorf("%s: another state after a start", order)
				}
				if i > 1 {
					if err := trusting(cp.CA()).connects(again); err != nil {
						t.Errorf("%s: %v", order, err)
					}
				}
			}
		})
	}
}
