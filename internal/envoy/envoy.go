// Package envoy holds one proxy's configuration while it is being built:
// Envoy's own messages, not yet packed into Any.
package envoy
