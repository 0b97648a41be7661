package pki_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kuma/internal/pki"
)

// HRD-33: five years of renewals, of the control plane's own certificate and of
// one that somebody else puts there, while files vanish, are half written, don't
// belong together, can't be read or can't be written, the control plane is
// restarted, and the clock jumps forward by up to four months since the machine
// slept. Kuma-cp.crt and its key are spoilt at starts as well, which are refused and
// harm nothing. No certificate is shown before its time or after its end, and but for
// the moment after a long sleep none is missing.
func TestYearsOfRenewals(t *testing.T) {
	for seed, years := range map[uint64]int{3: 5, 4: 1} {
		if testing.Short() {
			years = 1
		}
		synctest.Test(t, func(t *testing.T) {
			s := &soak{t: t, random: rand.New(rand.NewPCG(seed, 0)), users: newPlace(t), own: filepath.Join(t.TempDir(), "work")}
			s.run(time.Duration(years) * pki.Year)
			t.Logf("seed %d: %d hours, %d sleeps, %d restarts, %d starts refused, %d faults of the user's files and %d of the control plane's, %d + %d certificates, %d handshakes, %d refused contents",
				seed, s.hours, s.sleeps, s.restarts, s.refused, s.userFaults, s.ownFaults, len(s.seenUsers), len(s.seenOwn), s.handshakes, s.watch.Refused())
			// It would be no test if nothing of it had happened.
			if years > 1 && (s.sleeps < 2 || s.restarts < 2 || s.refused == 0 || s.userFaults < 4*years || s.ownFaults < 4*years || len(s.seenUsers) < 3*years || len(s.seenOwn) < 3*years || s.watch.Refused() == 0) {
				t.Error("too little has happened")
			}
		})
	}
}

type soak struct {
	t      *testing.T
	random *rand.Rand

	users place  // the user's files
	own   string // the control plane's directory
	root  *minted

	watch   *pki.Files
	pair    *pki.Pair
	current *minted // what the user's files hold, or will hold once the fault is over
	mend    time.Time
	certs   *pki.ControlPlane
	stop    func()
	ownMend time.Time

	seenUsers, seenOwn                                                          map[string]bool
	hours, sleeps, restarts, refused, userFaults, ownFaults, handshakes, missed int
}

func (s *soak) run(total time.Duration) {
	s.seenUsers, s.seenOwn = map[string]bool{}, map[string]bool{}
	s.root = mint(s.t, nil, func(c *x509.Certificate) { asCA(c); c.NotAfter = c.NotBefore.Add(20 * pki.Year) })
	s.issue()
	s.put()
	s.watch = pki.NewFiles(pki.FilesConfig{Every: time.Hour, Log: slog.New(slog.DiscardHandler)})
	var err error
	if s.pair, err = s.watch.Pair("general", "KUMA_GENERAL_TLS_CERT_FILE", s.users.cert, s.users.key); err != nil {
		s.t.Fatal(err)
	}
	s.open()
	s.start()
	defer func() {
		if s.stop != nil {
			s.stop()
		}
	}()
	for s.hours < int(total.Hours()) {
		time.Sleep(time.Hour)
		s.hours++
		s.usersTurn()
		s.ownTurn()
		asleep := false
		switch {
		case s.random.IntN(24*120) == 0:
			s.sleeps++
			asleep = true
			s.stop() // nothing runs while the machine sleeps
			time.Sleep(time.Duration(s.random.IntN(120*24)+1) * time.Hour)
		case s.random.IntN(24*60) == 0:
			s.restarts++
			s.stop()
			s.mendOwn()
			ca := string(s.certs.CA())
			s.refuse()
			if s.open(); string(s.certs.CA()) != ca {
				s.t.Fatal("the authority is another one after a refused start")
			}
		}
		s.look(asleep)
		if s.stop == nil {
			s.start()
		}
	}
}

func (s *soak) open() {
	var err error
	s.certs, err = pki.OpenControlPlane(pki.ControlPlaneConfig{
		Dir: s.own, Every: time.Hour, Machine: func() ([]string, error) { return []string{"cp.test"}, nil },
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// refuse spoils the authority's files and starts. Mostly that is refused; without
// kuma-cp.crt a new authority is made. Once the files are back, so is the old one.
func (s *soak) refuse() {
	files := []string{filepath.Join(s.own, pki.CAFile), filepath.Join(s.own, pki.CAKeyFile)}
	good := map[string][]byte{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			s.t.Fatal(err)
		}
		good[file] = text
	}
	s.spoil(files[0], files[1])
	if _, err := pki.OpenControlPlane(pki.ControlPlaneConfig{Dir: s.own}); err != nil {
		s.refused++
	}
	for file, text := range good {
		if err := os.RemoveAll(file); err != nil {
			s.t.Fatal(err)
		}
		if err := os.WriteFile(file, text, 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
}

// start runs what renews and watches.
func (s *soak) start() {
	ctx, cancel := context.WithCancel(s.t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = s.watch.Run(ctx) })
	running.Go(func() { _ = s.certs.Run(ctx, nil) })
	s.stop = func() {
		cancel()
		running.Wait()
		s.stop = nil
	}
}

// issue makes the user's next certificate.
func (s *soak) issue() { s.current = mint(s.t, s.root, nil) }

func (s *soak) put() {
	for _, file := range []string{s.users.cert, s.users.key} {
		if err := os.RemoveAll(file); err != nil {
			s.t.Fatal(err)
		}
	}
	s.users.put(s.t, certPEM(s.current, s.root), s.current.keyPEM(s.t))
}

// usersTurn is what somebody does who renews the user's certificate in time, but
// makes mistakes that he mends within ten days.
func (s *soak) usersTurn() {
	now := time.Now()
	if !s.mend.IsZero() {
		if now.After(s.mend) {
			s.mend = time.Time{}
			s.put()
		}
		return
	}
	if now.Before(pki.RenewAt(s.current.cert.NotBefore, s.current.cert.NotAfter, 0)) {
		if s.random.IntN(24*40) == 0 { // a mistake without a reason
			s.spoil(s.users.cert, s.users.key)
			s.userFaults++
			s.mend = now.Add(time.Duration(s.random.IntN(10*24)) * time.Hour)
		}
		return
	}
	s.issue()
	s.put()
	if s.random.IntN(2) == 0 {
		s.spoil(s.users.cert, s.users.key)
		s.userFaults++
		s.mend = now.Add(time.Duration(s.random.IntN(10*24)) * time.Hour)
	}
}

// ownTurn spoils the files of the control plane's own server certificate, and
// mends what it could not mend itself.
func (s *soak) ownTurn() {
	now := time.Now()
	if !s.ownMend.IsZero() {
		if now.After(s.ownMend) {
			s.mendOwn()
		}
		return
	}
	if s.random.IntN(24*25) == 0 {
		s.ownFaults++
		s.spoil(filepath.Join(s.own, pki.ServerFile), filepath.Join(s.own, pki.ServerKeyFile))
		s.ownMend = now.Add(time.Duration(s.random.IntN(60*24)) * time.Hour)
	}
}

// mendOwn takes away what stands where a file should be.
func (s *soak) mendOwn() {
	s.ownMend = time.Time{}
	for _, name := range []string{pki.ServerFile, pki.ServerKeyFile} {
		file := filepath.Join(s.own, name)
		if info, err := os.Stat(file); err == nil && info.IsDir() {
			if err := os.RemoveAll(file); err != nil {
				s.t.Fatal(err)
			}
		}
	}
}

// spoil does one of the things that happen to files.
func (s *soak) spoil(cert, key string) {
	file := cert
	if s.random.IntN(2) == 0 {
		file = key
	}
	text, err := os.ReadFile(file)
	if err != nil {
		text = nil
	}
	switch s.random.IntN(7) {
	case 0: // missing
		err = os.Remove(file)
	case 1: // half written
		err = os.WriteFile(file, text[:len(text)/2], 0o600)
	case 2: // empty
		err = os.WriteFile(file, nil, 0o600)
	case 3: // of another pair
		other := mint(s.t, nil, nil)
		err = os.WriteFile(key, other.keyPEM(s.t), 0o600)
	case 4: // neither to be read nor to be written over, root or not
		if err = os.RemoveAll(file); err == nil {
			err = os.MkdirAll(filepath.Join(file, "x"), 0o700)
		}
	case 5: // one that has ended
		old := mint(s.t, s.root, func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		})
		err = os.WriteFile(cert, certPEM(old, s.root), 0o600)
		if err == nil {
			err = os.WriteFile(key, old.keyPEM(s.t), 0o600)
		}
	case 6: // rubbish
		err = os.WriteFile(file, []byte("-----BEGIN NOTHING-----"), 0o600)
	}
	if err != nil && !os.IsNotExist(err) {
		if info, statErr := os.Stat(file); statErr == nil && info.IsDir() {
			return // it is spoilt already
		}
		if info, statErr := os.Stat(key); statErr == nil && info.IsDir() {
			return
		}
		if info, statErr := os.Stat(cert); statErr == nil && info.IsDir() {
			return
		}
		s.t.Fatal(err)
	}
}

// look asks both for their certificate, as a handshake does, and now and then
// makes a whole one.
func (s *soak) look(asleep bool) {
	roots := x509.NewCertPool()
	roots.AddCert(s.root.cert)
	own := x509.NewCertPool()
	own.AppendCertsFromPEM(s.certs.CA())
	for _, c := range []struct {
		config *tls.Config
		roots  *x509.CertPool
		seen   map[string]bool
		users  bool
	}{{s.pair.TLS(), roots, s.seenUsers, true}, {s.certs.TLS(), own, s.seenOwn, false}} {
		shown, err := c.config.GetCertificate(nil)
		if err != nil {
			// Nobody has brought the user's next certificate while all slept.
			if !c.users || !asleep && s.missed == 0 {
				s.t.Fatalf("%v: no certificate: %v", time.Now(), err)
			}
			if s.missed++; s.missed > 11*24 {
				s.t.Fatalf("%v: no certificate for %d hours after a sleep: %v", time.Now(), s.missed, err)
			}
			continue
		}
		if c.users {
			s.missed = 0
		}
		now := time.Now()
		if now.After(shown.Leaf.NotAfter) || now.Before(shown.Leaf.NotBefore) {
			s.t.Fatalf("%v: a certificate of %v to %v is shown", now, shown.Leaf.NotBefore, shown.Leaf.NotAfter)
		}
		c.seen[shown.Leaf.SerialNumber.String()] = true
		if s.hours%24 != 0 {
			continue
		}
		s.handshakes++
		a, b := net.Pipe()
		server := tls.Server(a, c.config)
		done := make(chan error, 1)
		go func() { done <- server.Handshake() }()
		if err := tls.Client(b, &tls.Config{RootCAs: c.roots, ServerName: "cp.test"}).Handshake(); err != nil {
			s.t.Fatalf("%v: %v", now, err)
		}
		if err := <-done; err != nil {
			s.t.Fatalf("%v: %v", now, err)
		}
		_, _ = a.Close(), b.Close()
	}
}
