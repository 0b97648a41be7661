package xds

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	"kuma/internal/envoy"
)

func packed(t testing.TB, name, content string) *envoy.Packed {
	t.Helper()
	p, err := envoy.Pack(name, &clusterv3.Cluster{Name: name, AltStatName: content})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestMentions(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		message, name string
		want          bool
	}{
		{"Error adding/updating listener(s) inbound:1.2.3.4:80: cannot bind", "inbound:1.2.3.4:80", true},
		{"Error adding/updating listener(s) inbound:1.2.3.4:8080: cannot bind", "inbound:1.2.3.4:80", false},
		{"cluster backend-tcp is bad", "backend", false},
		{"cluster backend-tcp and backend are bad", "backend", true},
		{"anything", "", false},
	} {
		if got := mentions(c.message, c.name); got != c.want {
			t.Errorf("mentions(%q, %q) = %t", c.message, c.name, got)
		}
	}
}

// A refusal is held against the resources that Envoy names; where it names
// none of several, against the type.
func TestBlame(t *testing.T) {
	t.Parallel()
	have := envoy.Resources{envoy.ClusterType: {"a": packed(t, "a", "1"), "b": packed(t, "b", "1")}}
	for _, c := range []struct {
		message string
		want    []string
	}{{"Error adding/updating cluster(s) b: no", []string{"b"}}, {"a: no, b: no", []string{"a", "b"}}, {"something else", []string{""}}, {strings.Repeat("é", 9000), []string{""}}} {
		d := newDelta()
		now := time.Now()
		if _, err := d.request(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: envoy.ClusterType}, now, func(url string) map[string]*envoy.Packed { return have[url] }); err != nil {
			t.Fatal(err)
		}
		out, _ := d.next(have, nil, now)
		r := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: envoy.ClusterType, ResponseNonce: out[0].GetNonce(), ErrorDetail: &rpcstatus.Status{Message: c.message}}
		if _, err := d.request(r, now, nil); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, x := range d.rejections() {
			got = append(got, x.Resource)
			if len(x.Message) > maxMessage+8 {
				t.Errorf("a message of %d bytes was kept", len(x.Message))
			}
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%.40q (-want +got):\n%s", c.message, diff)
		}
		if again, _ := d.next(have, nil, now); len(again) > 0 {
			t.Errorf("what was refused was sent again: %v", again)
		}
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	names := func(n int) (out []string) {
		for i := range n {
			out = append(out, fmt.Sprint(i))
		}
		return out
	}
	for _, c := range []struct {
		name string
		r    *discoveryv3.DeltaDiscoveryRequest
	}{
		{"names", &discoveryv3.DeltaDiscoveryRequest{TypeUrl: "x", ResourceNamesSubscribe: names(maxNames + 1)}},
		{"a long name", &discoveryv3.DeltaDiscoveryRequest{TypeUrl: "x", ResourceNamesSubscribe: []string{strings.Repeat("x", maxName+1)}}},
		{"no type", &discoveryv3.DeltaDiscoveryRequest{}},
	} {
		if _, err := newDelta().request(c.r, time.Now(), func(string) map[string]*envoy.Packed { return nil }); err == nil {
			t.Errorf("%s: no error", c.name)
		}
	}
	d := newDelta()
	var err error
	for i := range maxTypes + 1 {
		_, err = d.request(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: fmt.Sprint(i)}, time.Now(), nil)
	}
	if err == nil {
		t.Error("too many types: no error")
	}
}

// Large answers are cut into responses that every client takes.
func TestResponsesAreCut(t *testing.T) {
	t.Parallel()
	have := envoy.Resources{envoy.ClusterType: {}}
	for i := range 40 {
		name := fmt.Sprintf("c-%02d", i)
		have[envoy.ClusterType][name] = packed(t, name, strings.Repeat("x", 100_000))
	}
	d := newDelta()
	if _, err := d.request(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: envoy.ClusterType}, time.Now(), nil); err != nil {
		t.Fatal(err)
	}
	out, _ := d.next(have, nil, time.Now())
	total := 0
	for _, r := range out {
		total += len(r.GetResources())
		if len(r.GetResources()) > 11 {
			t.Errorf("a response has %d resources of 100 kB", len(r.GetResources()))
		}
	}
	if total != 40 || len(out) < 4 {
		t.Errorf("%d resources in %d responses", total, len(out))
	}
}

// peer is a client of the protocol that believes what it is told, for the fuzz
// test: it holds resources by type and name, and knows nothing else.
type peer struct {
	types  map[string]map[string]string // type, name → version
	names  map[string]map[string]bool
	active map[string]bool
	// queue are responses that it has not looked at yet.
	queue []*discoveryv3.DeltaDiscoveryResponse
}

// FuzzDelta has a client and a server of delta xDS do what the input says:
// subscribe, unsubscribe, accept, refuse, reconnect, while resources change.
// Whatever happens, the client ends up with exactly what it asked for.
func FuzzDelta(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
	f.Add([]byte("subscribe, then reconnect, then change all"))
	f.Add([]byte{0x60, 0x11, 0x70, 0x22, 0x80, 0x33, 0x10, 0x51, 0x90, 0xa3, 0xff, 0x00})
	f.Fuzz(func(t *testing.T, script []byte) {
		if len(script) > 400 {
			t.Skip()
		}
		urls := envoy.Types()
		have := envoy.Resources{}
		for _, url := range urls {
			have[url] = map[string]*envoy.Packed{}
		}
		there := func(url string) map[string]*envoy.Packed { return have[url] }
		d := newDelta()
		c := &peer{types: map[string]map[string]string{}, names: map[string]map[string]bool{}, active: map[string]bool{}}
		now := time.Unix(1_700_000_000, 0)
		send := func(r *discoveryv3.DeltaDiscoveryRequest) {
			if _, err := d.request(r, now, there); err != nil {
				t.Fatal(err)
			}
		}
		pump := func() {
			out, _ := d.next(have, nil, now)
			c.queue = append(c.queue, out...)
		}
		wild := func(url string) bool { return url == envoy.ClusterType || url == envoy.ListenerType }
		ask := func(url string, sub, unsub []string) {
			first := !c.active[url]
			c.active[url] = true
			if c.types[url] == nil {
				c.types[url], c.names[url] = map[string]string{}, map[string]bool{}
			}
			r := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResourceNamesSubscribe: sub, ResourceNamesUnsubscribe: unsub}
			if first {
				for name := range c.names[url] {
					r.ResourceNamesSubscribe = append(r.ResourceNamesSubscribe, name)
				}
				slices.Sort(r.ResourceNamesSubscribe)
				r.ResourceNamesSubscribe = slices.Compact(r.ResourceNamesSubscribe)
				r.InitialResourceVersions = maps.Clone(c.types[url])
			}
			for _, n := range sub {
				c.names[url][n] = true
			}
			for _, n := range unsub {
				delete(c.names[url], n)
				delete(c.types[url], n)
			}
			send(r)
		}
		read := func(refuse bool) {
			if len(c.queue) == 0 {
				return
			}
			r := c.queue[0]
			c.queue = c.queue[1:]
			url := r.GetTypeUrl()
			ack := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResponseNonce: r.GetNonce()}
			if refuse && len(r.GetResources()) > 0 {
				ack.ErrorDetail = &rpcstatus.Status{Message: "no"}
			}
			for _, res := range r.GetResources() {
				if wild(url) || c.names[url][res.GetName()] {
					// A refused one counts as had here: it must not come again.
					c.types[url][res.GetName()] = res.GetVersion()
				}
			}
			for _, n := range r.GetRemovedResources() {
				if url == envoy.ExtensionType && c.types[url][n] != "" {
					t.Fatalf("the extension configuration %s was removed from under its listener", n)
				}
				delete(c.types[url], n)
			}
			send(ack)
		}
		for i := 0; i+1 < len(script); i += 2 {
			op, arg := script[i]>>4, script[i+1]
			url := urls[int(script[i]&0xf)%len(urls)]
			name := string('a' + rune(arg%5))
			now = now.Add(time.Duration(arg) * 10 * time.Millisecond)
			switch op {
			case 0, 1, 2:
				have[url][name] = packed(t, name, fmt.Sprint(arg/5))
			case 3:
				delete(have[url], name)
			case 4, 5, 6:
				if wild(url) {
					ask(url, nil, nil)
				} else {
					ask(url, []string{name}, nil)
				}
			case 7:
				if !wild(url) && c.active[url] {
					ask(url, nil, []string{name})
				}
			case 8:
				d, c.queue = newDelta(), nil // reconnect
				was := slices.Collect(maps.Keys(c.active))
				slices.SortFunc(was, func(a, b string) int { return slices.Index(urls, a) - slices.Index(urls, b) })
				c.active = map[string]bool{}
				for _, url := range was {
					ask(url, nil, nil)
					pump()
				}
			case 9:
				read(true)
			default:
				read(false)
			}
			pump()
		}
		for range 1000 { // let everything arrive
			pump()
			if len(c.queue) == 0 {
				if _, wait := d.next(have, nil, now); wait.IsZero() {
					break
				}
				now = now.Add(gateTimeout)
				continue
			}
			read(false)
		}
		if d.inFlight() || d.open() {
			t.Fatalf("it does not come to rest")
		}
		for url := range c.active {
			want := map[string]string{}
			for name, p := range have[url] {
				if wild(url) || c.names[url][name] {
					want[name] = version(p)
				}
			}
			got := maps.Clone(c.types[url])
			if !wild(url) {
				// What lost its meaning is left for the client to drop.
				maps.DeleteFunc(got, func(n, _ string) bool { return have[url][n] == nil })
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", url, diff)
			}
		}
		names := 0
		for _, k := range d.types {
			names += len(k.names)
		}
		if names != d.names {
			t.Errorf("%d names are counted, %d are subscribed", d.names, names)
		}
		for _, r := range d.rejections() {
			if r.Message == "" {
				t.Errorf("a refusal without a reason: %+v", r)
			}
		}
	})
}

func BenchmarkCompare(b *testing.B) {
	have := map[string]*envoy.Packed{}
	k := &kind{wildcard: true, sent: map[string]uint64{}}
	for i := range 20 {
		name := fmt.Sprint("cluster-", i)
		have[name] = packed(b, name, "x")
		k.sent[name] = have[name].Hash
	}
	b.ReportAllocs()
	for b.Loop() {
		if x := k.compare(have, nil); !x.empty() {
			b.Fatal("a difference")
		}
	}
}
