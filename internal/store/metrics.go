package store

import (
	"context"
	"iter"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kuma/internal/errs"
	"kuma/internal/resource"
)

// Operations are the values of the label "operation", as the contract has them.
const (
	opGet    = "get"
	opList   = "list"
	opCreate = "create"
	opUpdate = "update"
	opDelete = "delete"
)

// everyKind is the label's value where a list is of all kinds, and otherKind
// where a kind is asked for that does not exist here.
const (
	everyKind = "all"
	otherKind = "other"
)

// Metrics counts what is asked of a store and how long it takes. It is a
// prometheus.Collector.
type Metrics struct {
	operations *prometheus.HistogramVec
	conflicts  *prometheus.CounterVec
	kinds      map[string]*kindMetrics
	// reads and writes are their sums.
	reads, writes atomic.Uint64
}

// kindMetrics are one kind's series, each made when it is first needed, so that
// no operation looks labels up.
type kindMetrics struct {
	name                              string
	get, list, create, update, remove series
}

type series struct {
	once sync.Once
	prometheus.Observer
}

func (s *series) observe(m *Metrics, operation, kind string, start time.Time) {
	s.once.Do(func() { s.Observer = m.operations.WithLabelValues(operation, kind) })
	s.Observe(time.Since(start).Seconds())
}

// NewMetrics makes the metrics of a store that holds these kinds; others are
// counted together.
func NewMetrics(kinds []*resource.Kind) *Metrics {
	m := &Metrics{
		operations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "store", Help: "How long operations of the store took, in seconds.",
			Buckets: []float64{.00001, .0001, .001, .005, .025, .1, .5, 2.5, 10},
		}, []string{"operation", "resource_type"}),
		conflicts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "store_conflicts", Help: "Writes that another writer had overtaken.",
		}, []string{"resource_type"}),
		kinds: map[string]*kindMetrics{"": {name: everyKind}, otherKind: {name: otherKind}},
	}
	for _, k := range kinds {
		m.kinds[k.Name] = &kindMetrics{name: k.Name}
	}
	return m
}

// Describe is prometheus.Collector's.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	m.operations.Describe(ch)
	m.conflicts.Describe(ch)
}

// Collect is prometheus.Collector's.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	m.operations.Collect(ch)
	m.conflicts.Collect(ch)
}

// Wrap returns the store with everything counted that is asked of it but
// Watch, which is told of changes and asks nothing.
func (m *Metrics) Wrap(s Store) Store { return &counted{s, m} }

func (m *Metrics) kind(name string) *kindMetrics {
	if k := m.kinds[name]; k != nil {
		return k
	}
	return m.kinds[otherKind]
}

// counted is a store whose operations are counted.
type counted struct {
	store   Store
	metrics *Metrics
}

// Get is Store's.
func (c *counted) Get(ctx context.Context, key resource.Key) (*resource.Resource, error) {
	start := time.Now()
	r, err := c.store.Get(ctx, key)
	c.metrics.reads.Add(1)
	k := c.metrics.kind(key.Kind)
	k.get.observe(c.metrics, opGet, k.name, start)
	return r, err
}

// List is Store's.
func (c *counted) List(ctx context.Context, kind, mesh string) ([]*resource.Resource, uint64, error) {
	start := time.Now()
	list, revision, err := c.store.List(ctx, kind, mesh)
	c.metrics.reads.Add(1)
	k := c.metrics.kind(kind)
	k.list.observe(c.metrics, opList, k.name, start)
	return list, revision, err
}

// Put is Store's. Each write of a transaction counts with the time that all of
// it took.
func (c *counted) Put(ctx context.Context, writes ...Write) (uint64, error) {
	start := time.Now()
	revision, err := c.store.Put(ctx, writes...)
	c.metrics.writes.Add(uint64(len(writes)))
	for i := range writes {
		w := &writes[i]
		k := c.metrics.kind(w.Key.Kind)
		switch {
		case w.Resource == nil:
			k.remove.observe(c.metrics, opDelete, k.name, start)
		case w.If.Absent:
			k.create.observe(c.metrics, opCreate, k.name, start)
		default:
			k.update.observe(c.metrics, opUpdate, k.name, start)
		}
	}
	if len(writes) > 0 && errs.Is(err, errs.Conflict) {
		// The store does not say which write it was; a transaction is mostly one.
		c.metrics.conflicts.WithLabelValues(c.metrics.kind(writes[0].Key.Kind).name).Inc()
	}
	return revision, err
}

// Watch is Store's.
func (c *counted) Watch(ctx context.Context, since uint64) iter.Seq2[[]Event, error] {
	return c.store.Watch(ctx, since)
}

// Reads is how many Gets and Lists were counted so far.
func (m *Metrics) Reads() uint64 { return m.reads.Load() }

// Writes is how many writes were counted so far, those that failed included.
func (m *Metrics) Writes() uint64 { return m.writes.Load() }
