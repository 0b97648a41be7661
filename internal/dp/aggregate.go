package dp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"kuma/internal/errs"
)

// envoyFamilies passes Envoy's statistics on to a writer, one family at a time:
// what the sieve holds back is dropped, labels are added, and series that
// differ only in the version of a cluster become one.
type envoyFamilies struct {
	w     *metricWriter
	sieve *sieve
	// add is put on each series, mesh on those that tell of the mesh's traffic.
	add, mesh []addedLabel

	name, kind  []byte
	pass, inner bool
	// text holds the family's series, and their values as Envoy wrote them.
	text   []byte
	series []envoySeries
	index  map[string]int
}

type envoySeries struct {
	begin, middle, end int // series and value in the text
	// sum counts where several series became this one.
	merged bool
	sum    metricSum
}

// metricSum adds values up, in whole numbers as long as they are.
type metricSum struct {
	broken bool // it is no whole number
	whole  int64
	real   float64
}

func (s *metricSum) add(value []byte) {
	f, _ := strconv.ParseFloat(string(value), 64) // checked when it was read
	s.real += f
	n, err := strconv.ParseInt(string(value), 10, 64)
	sum := s.whole + n
	if err != nil || (sum < s.whole) != (n < 0) {
		s.broken = true
		return
	}
	s.whole = sum
}

func (s *metricSum) append(b []byte) []byte {
	if s.broken {
		return strconv.AppendFloat(b, s.real, 'g', -1, 64)
	}
	return strconv.AppendInt(b, s.whole, 10)
}

// trafficLabel marks series that tell of the mesh's traffic (contract).
const trafficLabel = "kuma_io_mesh_traffic"

const (
	// maxFamily is how large one family of Envoy's statistics may be, in bytes,
	// maxStats all of them.
	maxFamily = 64 << 20
	maxStats  = 512 << 20
)

func newEnvoyFamilies(w *metricWriter, s *sieve, add []addedLabel) *envoyFamilies {
	mesh := make([]addedLabel, 0, len(add)+1)
	for _, a := range add {
		if a.name != trafficLabel {
			mesh = append(mesh, a)
		}
	}
	return &envoyFamilies{w: w, sieve: s, add: add, mesh: append(mesh, addedLabel{trafficLabel, "true"})}
}

// copy reads all of Envoy's statistics.
func (e *envoyFamilies) copy(r io.Reader) error {
	limited := &io.LimitedReader{R: r, N: maxStats}
	in := newMetricReader(limited, plainText)
	for {
		l, err := in.next()
		if errors.Is(err, io.EOF) {
			if limited.N <= 0 {
				return fmt.Errorf("there are more than %d bytes", maxStats)
			}
			return e.flush()
		}
		if err == nil {
			err = e.take(l)
		}
		if err != nil {
			return err
		}
	}
}

func (e *envoyFamilies) take(l *metricLine) error {
	if l.kind != sampleLine && !bytes.Equal(l.name, e.name) || l.kind == sampleLine && !bytes.HasPrefix(l.name, e.name) || len(e.name) == 0 {
		if err := e.flush(); err != nil {
			return err
		}
		e.name = append(e.name[:0], l.name...)
		e.pass, e.inner = e.sieve.family(string(e.name))
	}
	if l.kind == typeLine {
		e.kind = append(e.kind[:0], l.text...)
	}
	if l.kind != sampleLine || !e.pass || !e.inner && plumbing(l) {
		return nil
	}
	versioned := false
	for i, s := range l.labels {
		if string(s.name) == clusterLabel {
			l.labels[i].value, versioned = unversioned(s.value)
		}
	}
	add := e.add
	if traffic(l) {
		add = e.mesh
	}
	s := envoySeries{begin: len(e.text)}
	e.text = appendSeries(e.text, l, add)
	s.middle = len(e.text)
	if versioned && e.index == nil {
		e.index = map[string]int{}
		for i, other := range e.series {
			e.index[string(e.text[other.begin:other.middle])] = i
		}
	}
	if e.index != nil {
		key := e.text[s.begin:s.middle]
		if i, ok := e.index[string(key)]; ok {
			first := &e.series[i]
			if !first.merged {
				first.merged = true
				first.sum.add(e.text[first.middle:first.end])
			}
			first.sum.add(l.value)
			e.text = e.text[:s.begin]
			return nil
		}
		e.index[string(key)] = len(e.series)
	}
	e.text = append(e.text, l.value...)
	if s.end = len(e.text); s.end > maxFamily {
		return fmt.Errorf("%.100q has more than %d bytes", e.name, maxFamily)
	}
	e.series = append(e.series, s)
	return nil
}

// unversioned cuts off what tells one version of a cluster from another: a
// hyphen and 16 hexadecimal digits (contract).
func unversioned(cluster []byte) ([]byte, bool) {
	n := len(cluster) - 17
	if n <= 0 || cluster[n] != '-' {
		return cluster, false
	}
	for _, c := range cluster[n+1:] {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return cluster, false
		}
	}
	return cluster[:n], true
}

// flush writes the family that is kept.
func (e *envoyFamilies) flush() error {
	if len(e.series) > 0 {
		if len(e.kind) > 0 {
			if err := e.w.write(&metricLine{kind: typeLine, name: e.name, text: e.kind}, plainText); err != nil {
				return err
			}
		}
		e.w.flush()
		for i := range e.series {
			s := &e.series[i]
			_, _ = e.w.out.Write(e.text[s.begin:s.middle])
			value := append(e.w.buf[:0], ' ')
			if s.merged {
				value = s.sum.append(value)
			} else {
				value = append(value, e.text[s.middle:s.end]...)
			}
			e.w.buf = append(value, '\n')
			if _, err := e.w.out.Write(e.w.buf); err != nil {
				return err
			}
		}
	}
	e.name, e.kind, e.text, e.series, e.index = e.name[:0], e.kind[:0], e.text[:0], e.series[:0], nil
	return nil
}

// application is a program on this machine whose metrics are shown with
// Envoy's.
type application struct {
	Name    string `json:"name"`
	Address string `json:"address"`
	Port    uint32 `json:"port"`
	Path    string `json:"path"`
}

// Limits of applications.
const (
	maxApplications = 100
	// maxApplicationBody is how much one of them may answer with, in bytes,
	// maxBodies all of them together in all scrapes that run.
	maxApplicationBody = 16 << 20
	maxBodies          = 64 << 20
	// asking is how many are asked at a time.
	asking = 4
)

// check makes an application's address and path whole and refuses what can't
// be asked.
func (a *application) check() error {
	if a.Port == 0 || a.Port > 65535 {
		return fmt.Errorf("application %.100q: port %d must be in the range [1, 65535]", a.Name, a.Port)
	}
	if a.Path == "" {
		a.Path = "/metrics"
	}
	if !strings.HasPrefix(a.Path, "/") {
		return fmt.Errorf("application %.100q: path %.100q must begin with /", a.Name, a.Path)
	}
	u, err := url.Parse(a.Path)
	if err != nil || len(a.Path) > 4096 || len(a.Name) > 512 {
		return fmt.Errorf("application %.100q: path %.100q is no path of a URL", a.Name, a.Path)
	}
	a.Path = u.EscapedPath() // parameters are not passed on (contract)
	return nil
}

// url is where the application's metrics are, by the IP address that was
// checked. Only this machine is asked: a policy must not make proxies call
// others in their name (HRD-12).
func (a *application) url(ctx context.Context) (string, error) {
	list := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	if a.Address != "" && a.Address != "localhost" {
		if ip, err := netip.ParseAddr(a.Address); err == nil {
			list[0] = ip
		} else if list, err = net.DefaultResolver.LookupNetIP(ctx, "ip", a.Address); err != nil {
			return "", err
		}
	}
	for _, at := range list {
		if at = at.Unmap(); at.IsLoopback() || local(at) {
			return "http://" + netip.AddrPortFrom(at, uint16(a.Port)).String() + a.Path, nil
		}
	}
	return "", fmt.Errorf("its address %.100q is not one of this machine: metrics are taken only from programs beside this proxy; give 127.0.0.1 or the address of the proxy", a.Address)
}

// local reports whether an interface of this machine has the address.
func local(a netip.Addr) bool {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, i := range list {
		if n, ok := i.(*net.IPNet); ok {
			if own, ok := netip.AddrFromSlice(n.IP); ok && own.Unmap() == a.WithZone("") {
				return true
			}
		}
	}
	return false
}

// newApplicationClient makes the client that asks applications: no proxy, no
// redirect, nothing unpacked.
func newApplicationClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: 64 << 10,
			DialContext: new(net.Dialer).DialContext,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// appMetrics is what an application answered.
type appMetrics struct {
	form exposition
	body []byte
}

// askApplications asks all of them and returns the answers in their order. Who
// fails is left out, and named in the log.
func (m *metrics) askApplications(ctx context.Context, apps []application, accept exposition) []appMetrics {
	out := make([]appMetrics, len(apps))
	slots := make(chan struct{}, asking)
	var all sync.WaitGroup
	for i, a := range apps {
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			got, err := m.askApplication(ctx, &a, accept)
			key := a.Name + " at " + net.JoinHostPort(a.Address, strconv.Itoa(int(a.Port))) + a.Path
			if err != nil {
				m.complaints.say(m.log, "an application's metrics are left out", key, err)
				return
			}
			m.complaints.fine(m.log, "an application's metrics are there again", key)
			out[i] = got
		})
	}
	all.Wait()
	return out
}

func (m *metrics) askApplication(ctx context.Context, a *application, accept exposition) (appMetrics, error) {
	var none appMetrics
	if err := ctx.Err(); err != nil {
		return none, errs.New(errs.Unavailable, "there was no time left to ask it: %w", err)
	}
	at, err := a.url(ctx)
	if err != nil {
		return none, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return none, err
	}
	req.Header.Set("Accept", accept.accept())
	req.Header.Set("User-Agent", "kuma-dp")
	req.Header.Set("Via", "1.1 "+via)
	resp, err := m.client.Do(req)
	if err != nil {
		return none, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return none, fmt.Errorf("it answered with status %d", resp.StatusCode)
	}
	form, err := expositionOf(resp.Header.Get("Content-Type"))
	if err != nil {
		return none, err
	}
	shared := &sharedLimit{from: resp.Body, left: &m.left}
	body, err := readAll(shared, maxApplicationBody)
	if err == nil {
		err = checkExposition(body, form)
	}
	if err != nil {
		m.left.Add(shared.taken)
		return none, fmt.Errorf("read its metrics: %w", err)
	}
	return appMetrics{form, body}, nil
}

// checkExposition reads all of an application's metrics.
func checkExposition(body []byte, form exposition) error {
	// Checked before any of it is passed on: one bad line would cost the scraper
	// everything.
	for in := newMetricReader(bytes.NewReader(body), form); ; {
		if _, err := in.next(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// accept is what is asked of applications: what the scraper can take, best
// first.
func (e exposition) accept() string {
	const text = "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
	switch e {
	case openMetrics100:
		return "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75," + text
	case openMetrics001:
		return "application/openmetrics-text;version=0.0.1;q=0.75," + text
	}
	return text
}

// sharedLimit reads as long as there is something left for all.
type sharedLimit struct {
	from  io.Reader
	left  *atomic.Int64
	taken int64
}

func (s *sharedLimit) Read(b []byte) (int, error) {
	n, err := s.from.Read(b)
	s.taken += int64(n)
	if s.left.Add(-int64(n)) < 0 {
		return 0, fmt.Errorf("all applications together answered with more than the %d bytes that are allowed", maxBodies)
	}
	return n, err
}

// complaints logs a failure when it begins, changes or has lasted for long, and
// its end.
type complaints struct {
	mu   sync.Mutex
	last map[string]complaint
}

type complaint struct {
	text string
	at   time.Time
}

const (
	complainAgain = 10 * time.Minute
	// maxComplaints is how many failures are remembered; a configuration that
	// changes for ever must not fill the memory.
	maxComplaints = 1000
)

func (c *complaints) say(log *slog.Logger, message, about string, err error) {
	text := ownPort.ReplaceAllString(err.Error(), "->")
	c.mu.Lock()
	before, known := c.last[about]
	again := !known || before.text != text || time.Since(before.at) > complainAgain
	if again {
		if c.last == nil || len(c.last) >= maxComplaints {
			c.last = map[string]complaint{}
		}
		c.last[about] = complaint{text, time.Now()}
	}
	c.mu.Unlock()
	if again {
		log.Warn(message, "application", about, "error", err)
	}
}

func (c *complaints) fine(log *slog.Logger, message, about string) {
	c.mu.Lock()
	_, known := c.last[about]
	delete(c.last, about)
	c.mu.Unlock()
	if known {
		log.Info(message, "application", about)
	}
}
