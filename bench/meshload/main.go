// Command meshload drives a Kuma-compatible control plane through its public
// interfaces only (REST API, /bootstrap, ADS and HDS over gRPC/TLS) and reports
// how fast it answers and what it costs. See README.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

type command struct {
	name, summary string
	run           func(ctx context.Context, args []string) error
}

func commands() []command {
	return []command{
		{"dps", "connect N simulated proxies over ADS; measure first config, policy/endpoint propagation, reconnect storm, CPU, memory", runDPs},
		{"api", "REST throughput and latency: create, get, update, list with pagination, delete", runAPI},
		{"tokens", "dataplane tokens issued per second through REST", runTokens},
		{"startup", "time from exec to first 200, idle memory, binary size", runStartup},
		{"soak", "N steady proxies with periodic policy churn; memory growth and CPU over time", runSoak},
		{"floor", "what the transport alone costs: a server with ready-made answers, for scale", runFloor},
		{"compare", "print the ratios of two result files side by side", runCompare},
	}
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: meshload COMMAND [flags]\n\ncommands:")
	for _, c := range commands() {
		fmt.Fprintf(os.Stderr, "  %-8s %s\n", c.name, c.summary)
	}
	fmt.Fprintln(os.Stderr, "\nThe result is one JSON object on stdout; progress and a table go to stderr.\n`meshload COMMAND -h` lists the flags.")
}

func main() {
	if len(os.Args) < 2 {
		usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	for _, c := range commands() {
		if c.name != os.Args[1] {
			continue
		}
		err := c.run(ctx, os.Args[2:])
		switch {
		case err == nil:
			return
		case errors.Is(err, flag.ErrHelp):
			os.Exit(2)
		default:
			fmt.Fprintln(os.Stderr, "meshload "+c.name+": "+err.Error())
			os.Exit(1)
		}
	}
	if os.Args[1] != "-h" && os.Args[1] != "--help" && os.Args[1] != "help" {
		fmt.Fprintf(os.Stderr, "meshload: unknown command %q\n", os.Args[1])
	}
	usage()
	os.Exit(2)
}
