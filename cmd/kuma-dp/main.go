// Command kuma-dp runs one proxy of a service mesh.
package main

import (
	"context"
	"os"

	"kuma/internal/dp"
)

func main() {
	os.Exit(dp.Main(context.Background(), os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr))
}
