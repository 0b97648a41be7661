package envoy

import (
	"crypto/sha256"
	"encoding/binary"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Type URLs of the resources that ADS carries.
const (
	ClusterType   = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	EndpointType  = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	SecretType    = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	ListenerType  = "type.googleapis.com/envoy.config.listener.v3.Listener"
	RouteType     = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	ExtensionType = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
)

// Types lists the type URLs in the order in which a proxy should receive what
// is new: what a resource refers to comes before it.
func Types() []string {
	return []string{ClusterType, EndpointType, SecretType, ListenerType, RouteType, ExtensionType}
}

// A Packed is one resource ready to be sent. It may be shared by many proxies
// and is never changed.
type Packed struct {
	Name string
	Body *anypb.Any
	// Hash tells two bodies apart. It is the same for the same body on every
	// control plane and after every restart.
	Hash uint64
}

// Resources is a proxy's whole configuration, packed: by type URL, then name.
type Resources map[string]map[string]*Packed

// Pack packs a message once, deterministically.
func Pack(name string, m proto.Message) (*Packed, error) {
	body := new(anypb.Any)
	if err := anypb.MarshalFrom(body, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		return nil, err
	}
	sum := sha256.Sum256(body.Value)
	return &Packed{Name: name, Body: body, Hash: binary.BigEndian.Uint64(sum[:])}, nil
}
