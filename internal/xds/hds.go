package xds

import (
	"errors"
	"io"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

type nodeMessage = *corev3.Node

// HealthConfig is about health checks (key "dpServer.hds"). Zero values mean
// the defaults of the contract.
type HealthConfig struct {
	// Interval is how often Envoy reports; 5 s.
	Interval time.Duration
	// Timeout, CheckInterval and NoTrafficInterval of one check; 2 s, 1 s, 1 s.
	Timeout, CheckInterval, NoTrafficInterval time.Duration
	// HealthyThreshold and UnhealthyThreshold are how many results in a row
	// count; 1 and 1.
	HealthyThreshold, UnhealthyThreshold uint32
}

func (h HealthConfig) withDefaults() HealthConfig {
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{{&h.Interval, 5 * time.Second}, {&h.Timeout, 2 * time.Second}, {&h.CheckInterval, time.Second}, {&h.NoTrafficInterval, time.Second}} {
		if *d.v == 0 {
			*d.v = d.def
		}
	}
	h.HealthyThreshold, h.UnhealthyThreshold = max(1, h.HealthyThreshold), max(1, h.UnhealthyThreshold)
	return h
}

// ended makes the normal end of a stream no error.
func ended(err error) error {
	if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled {
		return nil
	}
	return err
}
