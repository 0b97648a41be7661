// Package linkpb holds the messages of the link, kuma-dp's own stream to the
// control plane: link.proto and the Go code that tools/gen makes from it.
package linkpb
