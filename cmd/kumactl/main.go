// Command kumactl manages a service mesh through its control plane.
package main

import (
	"os"

	"kuma/internal/ctl"
)

func main() {
	os.Exit(ctl.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Getenv))
}
