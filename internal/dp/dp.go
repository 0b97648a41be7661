// Package dp is kuma-dp: it asks the control plane for Envoy's first
// configuration, makes this proxy's private keys, runs Envoy, and tells both
// sides what the other can't see.
//
// The order of a start is that of Run. What the user can mend is found before
// anything is begun; Envoy starts only when the control plane has taken the
// proxy in; and it never outlives kuma-dp.
package dp

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"

	"kuma/internal/errs"
	"kuma/internal/socket"
	"kuma/internal/token"
	"kuma/proto/linkpb"
)

// Run runs one proxy until it is asked to stop, by a signal or by the end of
// the context, or until Envoy ends. A stop that was asked for is no error. The
// pod is "<name>.<namespace>" of the pod in which kuma-dp runs, or empty.
func Run(ctx context.Context, cfg Config, b Build, pod string) error {
	if err := cfg.check(); err != nil {
		return err
	}
	log := cfg.Log
	if cfg.ControlPlane.plain() {
		if _, _, err := cfg.readToken(); err != nil {
			return err
		}
		if err := cfg.signpost(ctx, socket.Owner); err != nil {
			return err
		}
	}
	believed, err := cfg.openTrust()
	if err != nil {
		return err
	}
	if cfg.ControlPlane.SkipVerify {
		log.Warn("the control plane's certificate is not verified: whoever answers at its address can take this proxy over; remove --skip-verify")
	}
	secretToken, tokenFile, err := cfg.readToken()
	if err != nil {
		return err
	}
	pair, err := cfg.openMetricsPair()
	if err != nil {
		return err
	}
	me, warnings, err := cfg.load(pod)
	if err != nil {
		return err
	}
	for _, w := range warnings {
		log.Warn(w)
	}
	believed.restore(cfg.stateDir(me.mesh, me.name), log)
	binary, err := cfg.locate()
	if err != nil {
		return err
	}
	ready, err := listenReadiness(&cfg)
	if err != nil {
		return err
	}
	defer ready.Close()

	// From here on things run beside each other, all of them ended at the end.
	ctx, interrupt := context.WithCancelCause(ctx)
	defer interrupt(nil)
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	var running sync.WaitGroup
	defer running.Wait()
	defer end()

	running.Go(func() { believed.follow(life) })
	version := make(chan func() (envoyVersion, error), 1)
	running.Go(func() {
		v, err := versionOf(life, binary, cfg.CacheDir)
		version <- func() (envoyVersion, error) { return v, err }
	})
	dir, err := openWorkdir(&cfg, me)
	if err != nil {
		return err
	}
	defer dir.close()
	if cfg.Token != "" {
		if tokenFile, err = dir.write(me.name, []byte(secretToken)); err != nil {
			return err
		}
		dir.token = tokenFile
	}
	log.Info("starting", "mesh", me.mesh, "proxy", me.name, "control_plane", cfg.ControlPlane.URL, "work_dir", dir.path, "version", b.Version)

	status := newState(log)
	status.linked = cfg.Link
	running.Go(func() { serveReadiness(life, ready, status) })

	p := &proxy{cfg: &cfg, binary: binary, dir: dir, state: status, signals: cfg.Signals, interrupt: interrupt, hurry: make(chan struct{})}
	if cfg.Link {
		at, err := target(cfg.ControlPlane.URL)
		if err != nil {
			return err
		}
		keys := newKeyring()
		p.link = &link{
			target: at, trust: believed, keys: keys, state: status, log: log, token: secretToken,
			hello: &linkpb.Hello{Mesh: me.mesh, Name: me.name, Instance: uuid.NewString(), Dataplane: me.doc, Version: b.Version},
			limit: cfg.ControlPlane.RetryBackoff, patience: cfg.ControlPlane.RetryMaxDuration,
			welcomed: make(chan struct{}), absent: make(chan struct{}), leaveNoted: make(chan struct{}),
		}
		if dir.token != "" {
			p.link.keepToken = func(t string) error { _, err := dir.write(me.name, []byte(t)); return err }
		}
		listener, err := listenSDS(dir.sockets.SDS())
		if err != nil {
			return err
		}
		server := newSDS(keys, log)
		running.Go(func() { _ = server.Serve(listener) })
		defer server.Stop()
	}
	gauges, err := cfg.openMetrics(dir, pair)
	if err != nil {
		return err
	}
	running.Go(func() { gauges.serve(life) })
	pipe, err := openLogPipe(dir.sockets.AccessLog(), log, p.denials)
	if err != nil {
		return err
	}
	running.Go(func() { pipe.run(life) })
	if err := dir.admit(); err != nil {
		return errs.New(errs.Unavailable, "prepare working directory %s: %w", dir.path, err)
	}
	running.Go(func() { p.listen(life) })

	v, err := (<-version)()
	if err != nil {
		return err
	}
	if !v.compatible() {
		log.Warn("this version of Envoy was not tried with this kuma-dp", "envoy", v.number, "tried", fmt.Sprintf("1.%d to 1.%d", oldestMinor, newestMinor))
	}
	instance := uuid.NewString()
	if p.link != nil {
		instance = p.link.hello.GetInstance()
		p.link.hello.EnvoyVersion = v.number
	}
	config, err := bootstrap(ctx, &cfg, believed, cfg.request(me, v, b, dir, secretToken, tokenFile, instance))
	if err != nil {
		return err
	}
	if err := believed.serveEnvoy(dir.sockets.Trust(), config.Trust, cfg.systemCA()); err != nil {
		return err
	}
	p.metrics = gauges
	gauges.aggregate(config.Sidecar.Metrics.Aggregate)
	return p.run(ctx, life, &running, v, config.Bootstrap)
}

// readToken takes the token from the configuration and checks its shape.
func (c *Config) readToken() (text, file string, err error) {
	switch {
	case c.Token != "":
		text, err = token.Unverified(c.Token, "")
		return text, "", err
	case c.TokenPath != "":
		b, err := readLimited(c.TokenPath, maxToken)
		if err != nil {
			return "", "", errs.New(errs.Invalid, "dataplane token is invalid, in Kubernetes you must mount a serviceAccount token, in universal you must start your proxy with a generated token.: could not read file %s: %w", c.TokenPath, err)
		}
		text, err = token.Unverified(string(b), c.TokenPath)
		return text, c.TokenPath, err
	}
	return "", "", nil
}

// proxy is one run after its preparation.
type proxy struct {
	cfg       *Config
	binary    string
	dir       *workdir
	state     *state
	link      *link // nil without link
	metrics   *metrics
	signals   <-chan os.Signal
	interrupt context.CancelCauseFunc

	// hurry is closed by a second request to stop.
	hurry chan struct{}

	mu      sync.Mutex
	admin   *admin
	drained bool
}

// errStopped is the cause of a context that a signal ended.
var errStopped = errors.New("context canceled")

// listen acts on signals. The first request to stop is the end of the run's
// context, the second cuts its waiting short.
func (p *proxy) listen(life context.Context) {
	asked := 0
	for {
		select {
		case <-life.Done():
			return
		case s := <-p.signals:
			if s == syscall.SIGUSR2 {
				p.drainListeners(life)
				continue
			}
			switch asked++; asked {
			case 1:
				p.cfg.Log.Info("received signal, stopping instance gracefully", "signal", s.String())
				p.interrupt(errStopped)
			case 2:
				p.cfg.Log.Info("received second signal, stopping instance", "signal", s.String())
				close(p.hurry)
			}
		}
	}
}

// drainListeners lets Envoy drain its inbounds without ending; a later request
// to stop then has nothing to wait for (contract).
func (p *proxy) drainListeners(ctx context.Context) {
	p.mu.Lock()
	a, before := p.admin, p.drained
	p.drained = a != nil
	p.mu.Unlock()
	if a == nil || before {
		return
	}
	p.cfg.Log.Info("received signal, draining inbound listeners")
	if err := a.post(ctx, "/drain_listeners?inboundonly&graceful&skip_exit"); err != nil {
		p.cfg.Log.Warn("envoy could not be asked to drain its listeners", "error", err)
	}
}

// denials passes refusals on over the link.
func (p *proxy) denials(d *linkpb.Denials) {
	if p.link != nil {
		p.link.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_Denials{Denials: d}})
	}
}

// run is the proxy's life from its first configuration on.
func (p *proxy) run(ctx, life context.Context, running *sync.WaitGroup, v envoyVersion, config []byte) error {
	a, err := newAdmin(config)
	if err != nil {
		return err
	}
	p.metrics.admin.Store(a)
	file, err := p.dir.write(bootstrapFile, config)
	if err != nil {
		return err
	}
	var broken <-chan error
	if p.link != nil {
		p.link.mu.Lock()
		p.link.admin = a
		p.link.mu.Unlock()
		end := make(chan error, 1)
		broken = end
		running.Go(func() { end <- p.link.run(life) })
		slow := time.NewTimer(slowWelcome)
		defer slow.Stop()
		for waiting := true; waiting; {
			select {
			case <-slow.C:
				p.cfg.Log.Info("waiting for the control plane to take this proxy in; where another proxy holds its name, that one must end or fall silent first")
			case <-p.link.welcomed:
				waiting = false
			case <-p.link.absent:
				waiting = false
			case err := <-broken:
				if err != nil {
					return err
				}
				broken = nil
			case <-ctx.Done():
				return errs.New(errs.Unavailable, "stopped before the control plane took this proxy in: %w", context.Cause(ctx))
			}
		}
	}
	args := envoyArgs(p.cfg, v, file)
	p.cfg.Log.Info("starting envoy", "path", p.binary, "version", v.number, "args", args)
	e, err := startEnvoy(p.binary, args, p.cfg.Log)
	if err != nil {
		return err
	}
	defer e.stop(2 * time.Second)
	if p.cfg.Started != nil {
		p.cfg.Started(e.proc.Pid)
	}
	p.state.set(func(s *state) { s.admin = a })
	p.mu.Lock()
	p.admin = a
	p.mu.Unlock()
	running.Go(func() {
		p.state.watch(life, func(ready bool, reason string) {
			if p.link != nil {
				p.link.tellReady(ready, reason)
			}
		})
	})
	for {
		select {
		case <-e.ended:
			// Nobody should be sent here any more.
			p.state.set(func(s *state) { s.terminating = true })
			if p.link != nil {
				p.link.leave(life)
			}
			if err := e.reason(); err != nil {
				p.cfg.Log.Error("envoy ended", "error", err)
				return err
			}
			p.cfg.Log.Info("envoy ended")
			return nil
		case err := <-broken:
			if err != nil {
				return err
			}
			broken = nil
		case <-ctx.Done():
			return p.drain(life, a, e)
		}
	}
}

const (
	// slowWelcome is how long the control plane may be silent before the user
	// is told that it is being waited for.
	slowWelcome = time.Second
	// leavePatience is how long the control plane may take to note a leaving.
	// It takes milliseconds, but what is not noted is still sent requests.
	leavePatience = 5 * time.Second
	// endPatience is how long Envoy may take to end when it is told to.
	endPatience = 5 * time.Second
)

// drain is an orderly end: first the others are told, then Envoy lets its
// connections finish, then it ends.
func (p *proxy) drain(life context.Context, a *admin, e *envoy) error {
	p.state.set(func(s *state) { s.terminating = true })
	p.mu.Lock()
	drained := p.drained
	p.mu.Unlock()
	wait, stopWaiting := context.WithCancel(life)
	defer stopWaiting()
	go func() {
		select {
		case <-p.hurry:
			stopWaiting()
		case <-wait.Done():
		}
	}()
	if p.link != nil {
		p.link.leave(wait)
	}
	p.cfg.Log.Info("draining Envoy connections")
	if err := a.post(life, "/healthcheck/fail"); err != nil {
		p.cfg.Log.Warn("envoy could not be asked to fail its health checks", "error", err)
	}
	if !drained && p.cfg.DrainTime > 0 {
		p.cfg.Log.Info("waiting for connections to be drained", "wait_time", p.cfg.DrainTime)
		t := time.NewTimer(p.cfg.DrainTime)
		defer t.Stop()
		select {
		case <-t.C:
		case <-wait.Done():
		case <-e.ended:
			return e.reason()
		}
	}
	e.stop(endPatience)
	p.cfg.Log.Info("envoy ended")
	return nil
}
