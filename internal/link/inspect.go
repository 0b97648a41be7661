package link

import (
	"context"

	"kuma/internal/errs"
	"kuma/internal/session"
	"kuma/proto/linkpb"
)

// ask is a page that someone wants to see.
type ask struct {
	ctx  context.Context
	want *linkpb.Inspect
	page []byte
	done chan error // holds one
}

// Inspect returns a page of the admin interface of a proxy's Envoy. All adds
// endpoints to a config dump, and unused statistics; json chooses JSON for
// statistics and clusters. Errors: NotFound where the proxy has no link to this
// control plane, Unavailable where it can't answer.
func (s *Server) Inspect(ctx context.Context, key session.Key, page linkpb.Inspect_Page, all, json bool) ([]byte, error) {
	s.mu.Lock()
	c := s.conns[key]
	s.mu.Unlock()
	if c == nil {
		return nil, errs.New(errs.NotFound, "the proxy %q of mesh %q has no link to this control plane", key.Name, key.Mesh)
	}
	a := &ask{ctx: ctx, want: &linkpb.Inspect{Page: page, All: all, Json: json}, done: make(chan error, 1)}
	gone := errs.New(errs.Unavailable, "the link to the proxy %q of mesh %q has ended", key.Name, key.Mesh)
	select {
	case c.asks <- a:
	case <-c.over:
		return nil, gone
	case <-ctx.Done():
		return nil, errs.New(errs.Unavailable, "the proxy did not answer in time: %w", ctx.Err())
	}
	select {
	case err := <-a.done:
		if err != nil {
			return nil, err
		}
		return a.page, nil
	case <-c.over:
		return nil, gone
	case <-ctx.Done():
		return nil, errs.New(errs.Unavailable, "the proxy did not answer in time: %w", ctx.Err())
	}
}

// ask passes a question on.
func (c *conn) ask(a *ask) error {
	for id, old := range c.open {
		if old.ctx.Err() != nil {
			delete(c.open, id) // nobody waits for it any more
		}
	}
	if len(c.open) == maxInspects {
		a.done <- errs.New(errs.Unavailable, "the proxy is being inspected %d times already; try again later", maxInspects)
		return nil
	}
	c.askID++
	a.want.Id = c.askID
	c.open[c.askID] = a
	return c.send(&linkpb.ToProxy{Message: &linkpb.ToProxy_Inspect{Inspect: a.want}})
}

// reply takes in a part of an answer.
func (c *conn) reply(r *linkpb.InspectReply) {
	a := c.open[r.GetId()]
	if a == nil {
		return
	}
	end := func(err error) {
		delete(c.open, r.GetId())
		a.done <- err
	}
	switch {
	case a.ctx.Err() != nil:
		delete(c.open, r.GetId())
	case r.GetError() != "":
		end(errs.New(errs.Unavailable, "the proxy can't show it: %s", cut(r.GetError(), maxReason)))
	case len(a.page)+len(r.GetChunk()) > maxPage:
		end(errs.New(errs.Unavailable, "the page has more than %d MiB", maxPage>>20))
	default:
		a.page = append(a.page, r.GetChunk()...)
		if r.GetDone() {
			end(nil)
		}
	}
}

// giveUp answers all that are still waiting.
func (c *conn) giveUp() {
	for id, a := range c.open {
		delete(c.open, id)
		a.done <- errs.New(errs.Unavailable, "the link to the proxy has ended")
	}
}
