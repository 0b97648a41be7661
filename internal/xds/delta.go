package xds

import (
	"encoding/binary"
	"encoding/hex"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"kuma/internal/envoy"
	"kuma/internal/errs"
	"kuma/internal/mesh"
)

// Limits of what a client may ask for on one stream.
const (
	maxTypes    = 16
	maxNames    = 50_000
	maxName     = 2048
	maxResponse = 1 << 20 // a response holds more only where one resource does
	maxMessage  = 2048    // of Envoy's words that are kept
)

// gateTimeout is how long what follows waits for the acknowledgement of what it
// refers to.
const gateTimeout = 5 * time.Second

// delta is the state of the delta xDS protocol on one stream. It knows nothing
// of where resources come from, and sends nothing itself. Of what was sent it
// keeps names and hashes.
type delta struct {
	types map[string]*kind
	nonce uint64
	names int // subscribed by name, over all types
	// rewarm are clusters that were changed before the client asked for
	// endpoints.
	rewarm map[string]struct{}
}

// kind is the state of one type of resources.
type kind struct {
	wildcard bool
	// names are those subscribed to one by one.
	names map[string]struct{}
	// sent is what the client holds or is about to: the hash of each, or 0 for
	// one that is unlike what there is now.
	sent map[string]uint64
	// asked are names to be answered although nothing changed.
	asked map[string]struct{}
	// keep: what the client holds is never said to be removed, since that would
	// hurt it more than having it.
	keep bool
	// greet: the type's first request is to be answered even by nothing.
	greet bool
	// flights are responses that have not been acknowledged, oldest first.
	flights []flight
	// refused are the resources that the client refused, and "" for a refusal
	// that named none of them.
	refused map[string]mesh.Rejection
}

// flight is a response on its way.
type flight struct {
	nonce uint64
	names []string
	// first: it brings what the client did not have.
	first bool
	at    time.Time
}

func newDelta() *delta { return &delta{types: map[string]*kind{}} }

// version is a resource's version: the same for the same content on every
// control plane and after every restart.
func version(p *envoy.Packed) string {
	return hex.EncodeToString(binary.BigEndian.AppendUint64(nil, p.Hash))
}

// outcome is what a request told.
type outcome struct {
	acknowledged, rejected bool
	// sent is when the response went out that was acknowledged or rejected.
	sent time.Time
}

// request takes a request in. There is what exists now; it is asked for once
// for each type.
func (d *delta) request(r *discoveryv3.DeltaDiscoveryRequest, now time.Time, there func(url string) map[string]*envoy.Packed) (outcome, error) {
	url := r.GetTypeUrl()
	k := d.types[url]
	first := k == nil
	if first {
		if url == "" || len(url) > maxName {
			return outcome{}, errs.New(errs.Invalid, "the request names no type of resources that can be")
		}
		if len(d.types) == maxTypes {
			return outcome{}, errs.New(errs.Invalid, "a stream may ask for at most %d types of resources", maxTypes)
		}
		k = &kind{names: map[string]struct{}{}, sent: map[string]uint64{}, keep: url == envoy.ExtensionType}
		d.types[url] = k
	}
	out := k.answer(url, r, now)
	if first {
		legacy := len(r.GetResourceNamesSubscribe()) == 0 && (url == envoy.ClusterType || url == envoy.ListenerType)
		k.wildcard = legacy || slices.Contains(r.GetResourceNamesSubscribe(), "*")
		k.greet = k.wildcard
		held := r.GetInitialResourceVersions()
		if len(held) > maxNames {
			return out, errs.New(errs.Invalid, "the client holds %d resources of one type, the limit is %d", len(held), maxNames)
		}
		var have map[string]*envoy.Packed
		if len(held) > 0 {
			have = there(url)
		}
		for name, v := range held {
			k.sent[name] = 0
			if p := have[name]; p != nil && version(p) == v {
				k.sent[name] = p.Hash
			}
		}
	}
	for _, name := range r.GetResourceNamesUnsubscribe() {
		d.unsubscribe(k, name)
	}
	for _, name := range r.GetResourceNamesSubscribe() {
		if len(name) > maxName {
			return out, errs.New(errs.Invalid, "the name of a resource may have at most %d bytes", maxName)
		}
		if name == "*" {
			k.greet = k.greet || !k.wildcard
			k.wildcard = true
			continue
		}
		if _, ok := k.names[name]; !ok {
			if d.names++; d.names > maxNames {
				return out, errs.New(errs.Invalid, "a stream may subscribe to at most %d names", maxNames)
			}
			k.names[name] = struct{}{}
		}
		// Who asks anew is answered anew, except for what it just said to hold.
		_, held := k.sent[name]
		_, rewarm := d.rewarm[name]
		if !first || !held || rewarm && url == envoy.EndpointType {
			k.ask(name)
		}
	}
	if first && url == envoy.EndpointType {
		d.rewarm = nil
	}
	return out, nil
}

func (k *kind) ask(name string) {
	if k.asked == nil {
		k.asked = map[string]struct{}{}
	}
	k.asked[name] = struct{}{}
}

func (d *delta) unsubscribe(k *kind, name string) {
	if name == "*" {
		k.wildcard = false
		maps.DeleteFunc(k.sent, func(n string, _ uint64) bool { _, ok := k.names[n]; return !ok })
		return
	}
	if _, ok := k.names[name]; ok {
		delete(k.names, name)
		d.names--
	}
	delete(k.asked, name)
	if !k.wildcard {
		delete(k.sent, name)
		delete(k.refused, name)
	}
}

// answer takes in what a request says of an earlier response.
func (k *kind) answer(url string, r *discoveryv3.DeltaDiscoveryRequest, now time.Time) outcome {
	nonce, err := strconv.ParseUint(r.GetResponseNonce(), 16, 64)
	if err != nil {
		return outcome{}
	}
	i := slices.IndexFunc(k.flights, func(f flight) bool { return f.nonce == nonce })
	if i < 0 {
		return outcome{}
	}
	f := k.flights[i]
	k.flights = slices.Delete(k.flights, i, i+1)
	if len(k.flights) == 0 {
		k.flights = nil
	}
	if r.GetErrorDetail() == nil {
		for _, name := range f.names {
			delete(k.refused, name)
		}
		delete(k.refused, "")
		return outcome{acknowledged: true, sent: f.at}
	}
	message := strings.ToValidUTF8(r.GetErrorDetail().GetMessage(), "?")
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage], "") + "…"
	}
	if k.refused == nil {
		k.refused = map[string]mesh.Rejection{}
	}
	blamed := 0
	for _, name := range f.names {
		if mentions(message, name) || len(f.names) == 1 {
			k.refused[name] = mesh.Rejection{TypeURL: url, Resource: name, Message: message, Time: now.UTC()}
			blamed++
		} else {
			delete(k.refused, name)
		}
	}
	if blamed == 0 {
		k.refused[""] = mesh.Rejection{TypeURL: url, Message: message, Time: now.UTC()}
	}
	return outcome{rejected: true, sent: f.at}
}

// mentions tells whether a message has the name as a word of its own.
func mentions(message, name string) bool {
	if name == "" {
		return false
	}
	part := func(c byte) bool {
		return c == '-' || c == '_' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
	}
	for at := 0; ; {
		i := strings.Index(message[at:], name)
		if i < 0 {
			return false
		}
		from, to := at+i, at+i+len(name)
		if (from == 0 || !part(message[from-1])) && (to == len(message) || !part(message[to])) {
			return true
		}
		at = from + 1
	}
}

// diff is what a client must be told of one type.
type diff struct {
	changed []*envoy.Packed
	removed []string
	// first: some of what changed is new to the client.
	first bool
}

func (x diff) empty() bool { return len(x.changed)+len(x.removed) == 0 }

// compare finds what the client must be told of a type. Pending names exist but
// can't be given yet.
func (k *kind) compare(have map[string]*envoy.Packed, pending map[string]struct{}) diff {
	var x diff
	consider := func(name string, p *envoy.Packed) {
		hash, held := k.sent[name]
		if _, asked := k.asked[name]; asked || !held || hash != p.Hash {
			x.changed = append(x.changed, p)
			x.first = x.first || !held
		}
	}
	if k.wildcard {
		for name, p := range have {
			consider(name, p)
		}
		for name := range k.sent {
			if have[name] == nil {
				x.removed = append(x.removed, name)
			}
		}
	} else {
		for name := range k.names {
			if p := have[name]; p != nil {
				consider(name, p)
			}
		}
	}
	// What does not exist is said to be removed, so that nobody waits for it.
	// What the client holds and did not ask for anew is left alone: it
	// unsubscribes when the cluster or listener goes that refers to it.
	for name := range k.asked {
		_, held := k.sent[name]
		_, later := pending[name]
		switch {
		case have[name] != nil || later:
		case held && k.keep:
			delete(k.asked, name)
		default:
			x.removed = append(x.removed, name)
		}
	}
	slices.SortFunc(x.changed, func(a, b *envoy.Packed) int { return strings.Compare(a.Name, b.Name) })
	slices.Sort(x.removed)
	x.removed = slices.Compact(x.removed)
	return x
}

// respond makes the responses that tell a diff, and notes them as sent.
func (d *delta) respond(url string, x diff, now time.Time) []*discoveryv3.DeltaDiscoveryResponse {
	k := d.types[url]
	k.greet = false
	var out []*discoveryv3.DeltaDiscoveryResponse
	cur := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: url, RemovedResources: x.removed}
	names, size := []string(nil), 0
	end := func() {
		d.nonce++
		cur.Nonce = strconv.FormatUint(d.nonce, 16)
		out = append(out, cur)
		k.flights = append(k.flights, flight{d.nonce, names, x.first, now})
		cur, names, size = &discoveryv3.DeltaDiscoveryResponse{TypeUrl: url}, nil, 0
	}
	for _, name := range x.removed {
		delete(k.sent, name)
		delete(k.asked, name)
		delete(k.refused, name)
	}
	for _, p := range x.changed {
		n := proto.Size(p.Body)
		if len(cur.Resources) > 0 && size+n > maxResponse {
			end()
		}
		cur.Resources = append(cur.Resources, &discoveryv3.Resource{Name: p.Name, Version: version(p), Resource: p.Body})
		names = append(names, p.Name)
		size += n
		k.sent[p.Name] = p.Hash
		delete(k.asked, p.Name)
	}
	end()
	if len(k.asked) == 0 {
		k.asked = nil
	}
	return out
}

// waiting reports whether the client has yet to acknowledge something new of
// these types, and when not to wait for it any longer.
func (d *delta) waiting(now time.Time, urls ...string) (until time.Time, wait bool) {
	for _, url := range urls {
		k := d.types[url]
		if k == nil {
			continue
		}
		for _, f := range k.flights {
			if end := f.at.Add(gateTimeout); f.first && now.Before(end) && end.After(until) {
				until, wait = end, true
			}
		}
	}
	return until, wait
}

// step is one type's turn in the order of sending.
type step struct {
	url string
	// remove: what is gone is told in this step, else what is new.
	remove bool
	// after are the types whose news must have been acknowledged before.
	after []string
}

// steps is the order of sending: what others refer to comes before them, and
// goes after them.
func steps() []step {
	before := []string{envoy.ClusterType, envoy.EndpointType, envoy.SecretType}
	users := []string{envoy.ListenerType, envoy.RouteType, envoy.ExtensionType}
	return []step{
		{url: envoy.ClusterType},
		{url: envoy.EndpointType, remove: true},
		{url: envoy.SecretType, remove: true},
		{url: envoy.ListenerType, remove: true, after: before},
		{url: envoy.RouteType, remove: true, after: before},
		{url: envoy.ExtensionType, remove: true, after: before},
		{url: envoy.ClusterType, remove: true, after: users},
	}
}

// next makes the responses that bring the client to what there is. Where some
// must wait for an acknowledgement, it returns when to go on without.
func (d *delta) next(have envoy.Resources, pending map[string]struct{}, now time.Time) (out []*discoveryv3.DeltaDiscoveryResponse, wait time.Time) {
	known := map[string]bool{}
	for _, s := range steps() {
		known[s.url] = true
		k := d.types[s.url]
		if k == nil {
			continue
		}
		x := k.compare(have[s.url], pending)
		if !s.remove {
			x.removed = nil
		}
		if x.empty() && (!k.greet || s.remove && s.url == envoy.ClusterType) {
			continue
		}
		if until, ok := d.waiting(now, s.after...); ok {
			return out, until
		}
		if s.url == envoy.ClusterType {
			d.warm(k, x.changed)
		}
		out = append(out, d.respond(s.url, x, now)...)
	}
	for url, k := range d.types {
		if known[url] {
			continue
		}
		if x := k.compare(have[url], nil); !x.empty() || k.greet {
			out = append(out, d.respond(url, x, now)...)
		}
	}
	return out, time.Time{}
}

// warm has the endpoints of changed clusters sent again: Envoy makes such a
// cluster anew and has it wait for endpoints that it does not ask for, having
// them already.
func (d *delta) warm(clusters *kind, changed []*envoy.Packed) {
	eds := d.types[envoy.EndpointType]
	for _, p := range changed {
		if _, held := clusters.sent[p.Name]; !held {
			continue
		}
		switch {
		case eds == nil:
			if d.rewarm == nil {
				d.rewarm = map[string]struct{}{}
			}
			d.rewarm[p.Name] = struct{}{}
		default:
			if _, subscribed := eds.names[p.Name]; subscribed {
				eds.ask(p.Name)
			}
		}
	}
}

// inFlight reports whether any response is not acknowledged yet.
func (d *delta) inFlight() bool {
	for _, k := range d.types {
		if len(k.flights) > 0 {
			return true
		}
	}
	return false
}

// open reports whether some request is not answered yet.
func (d *delta) open() bool {
	for _, k := range d.types {
		if k.greet || len(k.asked) > 0 {
			return true
		}
	}
	return false
}

// holds reports whether the client holds all of a type as it is now.
func (d *delta) holds(url string, have map[string]*envoy.Packed) bool {
	k := d.types[url]
	if k == nil {
		return len(have) == 0
	}
	for name, p := range have {
		if k.sent[name] != p.Hash {
			return false
		}
	}
	return true
}

// rejections lists what the client refuses, in a fixed order.
func (d *delta) rejections() []mesh.Rejection {
	var out []mesh.Rejection
	for _, url := range slices.Sorted(maps.Keys(d.types)) {
		k := d.types[url]
		for _, name := range slices.Sorted(maps.Keys(k.refused)) {
			out = append(out, k.refused[name])
		}
	}
	return out
}
