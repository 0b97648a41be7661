// Command dataplane measures what a sidecar costs: how soon a proxy serves after
// its start, how much memory kuma-dp needs, and how many requests pass through
// two sidecars compared with two bare Envoys that were configured by hand with
// the same mutual TLS and route, and no filter but the router.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"kuma/test/lab"
)

type options struct {
	bin, envoy      string
	connections     int
	rounds, starts  int
	duration, limit time.Duration
}

// result is what is printed.
type result struct {
	Time       string `json:"time"`
	LoadBefore string `json:"load_avg_before"`
	LoadAfter  string `json:"load_avg_after"`
	// FirstRequest is the time from the start of kuma-dp to the first answer
	// through its Envoy and that of the service, over mutual TLS.
	FirstRequest spread `json:"first_request_ms"`
	// Resident is kuma-dp without its Envoy, after the load.
	Resident float64 `json:"kuma_dp_rss_mib"`
	// Sidecars and Bare are requests per second, Direct without any proxy.
	Sidecars spread  `json:"sidecars_rps"`
	Bare     spread  `json:"bare_envoys_rps"`
	Direct   float64 `json:"direct_rps"`
	// Ratio is that of the medians of Sidecars and Bare.
	Ratio float64 `json:"ratio"`
	// SidecarsCPU and BareCPU are what both proxies of a pair took for a request,
	// in microseconds: other programs on the machine matter less there.
	SidecarsCPU spread `json:"sidecars_cpu_us"`
	BareCPU     spread `json:"bare_envoys_cpu_us"`
	// CPURatio is Bare to Sidecars in these, the median of the rounds: what Ratio
	// would be if nothing but the proxies took time.
	CPURatio float64 `json:"cpu_ratio"`
}

// spread sums up several measurements.
type spread struct {
	N      int     `json:"n"`
	Min    float64 `json:"min"`
	Median float64 `json:"median"`
	Max    float64 `json:"max"`
}

func spreadOf(all []float64) spread {
	if len(all) == 0 {
		return spread{}
	}
	s := slices.Sorted(slices.Values(all))
	n := len(s)
	return spread{N: n, Min: s[0], Median: (s[(n-1)/2] + s[n/2]) / 2, Max: s[n-1]}
}

func main() {
	var o options
	flag.StringVar(&o.bin, "bin", "bin", "where kuma-cp, kuma-dp and kumactl are")
	flag.StringVar(&o.envoy, "envoy", "", "a real Envoy")
	flag.IntVar(&o.connections, "connections", 16, "connections of the load")
	flag.IntVar(&o.rounds, "rounds", 5, "rounds of load for each pair, alternating")
	flag.IntVar(&o.starts, "starts", 11, "starts of kuma-dp")
	flag.DurationVar(&o.duration, "duration", 5*time.Second, "length of one round of load")
	flag.DurationVar(&o.limit, "timeout", 10*time.Minute, "longest duration of the whole run")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, o.limit)
	defer cancel()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	if o.envoy == "" {
		return fmt.Errorf("-envoy: the path of an Envoy is needed, such as what tools/get-envoy.sh prints")
	}
	bin, err := filepath.Abs(o.bin)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "kuma-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	l := lab.New(dir, bin, o.envoy)
	defer l.Close()

	res := result{Time: time.Now().UTC().Format(time.RFC3339), LoadBefore: loadAverage()}
	backend, err := serve(ctx)
	if err != nil {
		return err
	}
	s, err := startSidecars(ctx, l, backend)
	if err != nil {
		return err
	}
	bp, bpids, err := startBare(ctx, l, backend)
	if err != nil {
		return err
	}
	spids, err := s.envoys()
	if err != nil {
		return err
	}

	var sidecars, bare, sidecarsCPU, bareCPU []float64
	for i := range o.rounds + 1 {
		for _, m := range []struct {
			port      int
			pids      []int
			into, cpu *[]float64
		}{{s.port, spids, &sidecars, &sidecarsCPU}, {bp, bpids, &bare, &bareCPU}} {
			before, err := cpu(m.pids)
			if err != nil {
				return err
			}
			n, took, err := load(ctx, m.port, o.connections, o.duration)
			if err != nil {
				return err
			}
			after, err := cpu(m.pids)
			if err != nil {
				return err
			}
			if i > 0 { // the first round warms up
				*m.into = append(*m.into, rate(n, took))
				*m.cpu = append(*m.cpu, float64((after-before).Microseconds())/float64(n))
			}
		}
		say("round %d of %d: sidecars %v, bare Envoys %v requests/s", i, o.rounds, last(sidecars), last(bare))
	}
	n, took, err := load(ctx, backend, o.connections, o.duration)
	if err != nil {
		return err
	}
	res.Direct = rate(n, took)
	res.Sidecars, res.Bare = spreadOf(sidecars), spreadOf(bare)
	res.SidecarsCPU, res.BareCPU = spreadOf(sidecarsCPU), spreadOf(bareCPU)
	var ratios []float64
	for i := range sidecarsCPU {
		ratios = append(ratios, bareCPU[i]/sidecarsCPU[i])
	}
	res.CPURatio = math.Round(spreadOf(ratios).Median*1000) / 1000
	res.Ratio = math.Round(res.Sidecars.Median/res.Bare.Median*1000) / 1000
	if res.Resident, err = resident(s.caller.Cmd.Process.Pid); err != nil {
		return err
	}

	var first []float64
	for i := range o.starts {
		d, err := s.first(ctx, fmt.Sprintf("starter-%d", i))
		if err != nil {
			return err
		}
		first = append(first, float64(d.Microseconds())/1000)
		say("start %d of %d: first answer after %v", i+1, o.starts, d)
	}
	res.FirstRequest = spreadOf(first)
	res.LoadAfter = loadAverage()
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(res)
}

func rate(n int64, took time.Duration) float64 { return math.Round(float64(n) / took.Seconds()) }

// sidecars is a control plane with two proxies.
type sidecars struct {
	lab    *lab.Lab
	cp     *lab.ControlPlane
	server *lab.Proxy
	// caller is the calling proxy; port is its outbound.
	caller *lab.Proxy
	port   int
}

func startSidecars(ctx context.Context, l *lab.Lab, backend int) (*sidecars, error) {
	cp, err := l.ControlPlane(ctx, "KUMA_STORE_TYPE=memory")
	if err != nil {
		return nil, err
	}
	if err := cp.Apply(`type: Mesh
name: default
mtls:
  enabledBackend: ca-1
  backends:
  - name: ca-1
    type: builtin
---
type: MeshTrafficPermission
mesh: default
name: allow-all
spec:
  targetRef:
    kind: Mesh
  from:
  - targetRef:
      kind: Mesh
    default:
      action: Allow
`); err != nil {
		return nil, err
	}
	ports, err := l.Ports(3)
	if err != nil {
		return nil, err
	}
	server, err := cp.Proxy("backend", lab.ProxyOptions{Dataplane: fmt.Sprintf(`type: Dataplane
mesh: default
name: backend
networking:
  address: 127.0.0.1
  inbound:
  - port: %d
    servicePort: %d
    serviceAddress: 127.0.0.1
    tags:
      kuma.io/service: backend
      kuma.io/protocol: http
`, ports[0], backend)})
	if err != nil {
		return nil, err
	}
	if err := l.Ready(ctx, server); err != nil {
		return nil, err
	}
	s := &sidecars{lab: l, cp: cp, server: server, port: ports[1]}
	if s.caller, err = cp.Proxy("caller", lab.ProxyOptions{Dataplane: caller("caller", s.port, ports[2])}); err != nil {
		return nil, err
	}
	return s, s.await(ctx, s.caller, s.port)
}

// caller is the Dataplane of a caller of the backend.
func caller(name string, outbound, inbound int) string {
	return fmt.Sprintf(`type: Dataplane
mesh: default
name: %s
networking:
  address: 127.0.0.1
  inbound:
  - port: %d
    servicePort: 1
    serviceAddress: 127.0.0.1
    tags:
      kuma.io/service: caller
      kuma.io/protocol: http
  outbound:
  - port: %d
    tags:
      kuma.io/service: backend
`, name, inbound, outbound)
}

// await returns when a request from the proxy was answered, and the backend has
// seen the caller's identity.
func (s *sidecars) await(ctx context.Context, p *lab.Proxy, port int) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	var err error
	for {
		var answer string
		if answer, err = once(port); err == nil {
			if strings.HasPrefix(answer, "HTTP/1.1 200") {
				if !strings.Contains(answer, secured) {
					return fmt.Errorf("the backend answered %s without having seen the caller's identity", p.Name)
				}
				return nil
			}
			err = fmt.Errorf("the answer is %q", answer)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: no answer of the backend: %w; last: %w", p.Name, ctx.Err(), err)
		case <-p.Done():
			return fmt.Errorf("%s ended before the backend answered; last: %w; its log: %s", p.Name, err, p.Log())
		case <-tick.C:
		}
	}
}

// first starts a proxy and measures the time until its first request is
// answered. It ends it again.
func (s *sidecars) first(ctx context.Context, name string) (time.Duration, error) {
	ports, err := s.lab.Ports(2)
	if err != nil {
		return 0, err
	}
	token, err := s.cp.Kumactl("", "generate", "dataplane-token", "--name", name, "--mesh", "default", "--valid-for", "1h")
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	p, err := s.cp.Proxy(name, lab.ProxyOptions{Dataplane: caller(name, ports[0], ports[1]), Token: token})
	if err != nil {
		return 0, err
	}
	defer p.Stop(5 * time.Second)
	err = s.await(ctx, p, ports[0])
	return time.Since(begin), err
}

func last(s []float64) any {
	if len(s) == 0 {
		return "warm-up"
	}
	return int(s[len(s)-1])
}

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return ""
	}
	return strings.Join(strings.Fields(string(b))[:3], " ")
}

// envoys are the processes that kuma-dp runs for both proxies.
func (s *sidecars) envoys() ([]int, error) {
	var out []int
	for _, p := range []*lab.Proxy{s.server, s.caller} {
		// A child is listed by the thread that started it.
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.Cmd.Process.Pid))
		if err != nil {
			return nil, err
		}
		var children []string
		for _, file := range tasks {
			if b, err := os.ReadFile(file); err == nil {
				children = append(children, strings.Fields(string(b))...)
			}
		}
		if len(children) != 1 {
			return nil, fmt.Errorf("%s should have one process, its Envoy, and has %d", p.Name, len(children))
		}
		pid, err := strconv.Atoi(children[0])
		if err != nil {
			return nil, err
		}
		out = append(out, pid)
	}
	return out, nil
}

// cpu is what the processes have used so far, all threads together.
func cpu(pids []int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range pids {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		if err != nil || len(threads) == 0 {
			return 0, fmt.Errorf("process %d is not there", pid)
		}
		for _, file := range threads {
			b, err := os.ReadFile(file)
			if err != nil {
				continue // the thread has ended
			}
			used, _, _ := strings.Cut(string(b), " ")
			n, err := strconv.ParseInt(used, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", file, err)
			}
			sum += time.Duration(n)
		}
	}
	return sum, nil
}

// resident is a process's resident memory in MiB.
func resident(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			kb, err := strconv.ParseFloat(f[1], 64)
			return kb / 1024, err
		}
	}
	return 0, fmt.Errorf("process %d: no VmRSS", pid)
}
