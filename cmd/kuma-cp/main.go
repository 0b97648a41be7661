// Command kuma-cp is the control plane of a service mesh.
package main

import (
	"context"
	"os"

	"kuma/internal/cp"
)

func main() {
	os.Exit(cp.Main(context.Background(), os.Args[1:], os.Environ(), os.Stdout, os.Stderr))
}
