package story

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// Answer is what the service backend says of a request that reached it.
type Answer struct {
	Service string `json:"service"`
	// Caller is the x-forwarded-client-cert header: who called, as its own
	// proxy verified it.
	Caller string `json:"caller"`
}

// Asked is what a service says of a request that it made.
type Asked struct {
	Status int     `json:"status"`
	Answer *Answer `json:"answer,omitempty"`
	Body   string  `json:"body,omitempty"`
	Error  string  `json:"error,omitempty"`
}

// Service runs one of the demo's services until ctx ends. They know nothing of
// the mesh: they listen on a local port, and call one.
func Service(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("service", flag.ContinueOnError)
	name := fs.String("name", "", "the service's name")
	listen := fs.String("listen", "", "address to listen on")
	calls := fs.String("calls", "", "URL of the service that this one calls, if any")
	if err := fs.Parse(args); err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		reply(w, Answer{Service: *name, Caller: r.Header.Get("x-forwarded-client-cert")})
	})
	if *calls != "" {
		client := &http.Client{Timeout: 20 * time.Second}
		mux.HandleFunc("GET /ask", func(w http.ResponseWriter, r *http.Request) { reply(w, ask(r.Context(), client, *calls)) })
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("service %s: %w", *name, err)
	}
	return nil
}

func ask(ctx context.Context, client *http.Client, url string) Asked {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return Asked{Error: err.Error()}
	}
	res, err := client.Do(req)
	if err != nil {
		return Asked{Error: err.Error()}
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return Asked{Status: res.StatusCode, Error: err.Error()}
	}
	out := Asked{Status: res.StatusCode}
	if json.Unmarshal(body, &out.Answer) != nil {
		out.Answer, out.Body = nil, string(body)
	}
	return out
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}
