package dp

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"time"
)

// knownVersion is what an Envoy said of itself once. Asking it takes some 80 ms,
// a quarter of a proxy's start, so the answer is kept for as long as the file
// stays the same one.
type knownVersion struct {
	Path     string    `json:"path"`
	Size     int64     `json:"size"`
	Modified time.Time `json:"modified"`
	Number   string    `json:"number"`
	Build    string    `json:"build"`
}

const maxKnownVersion = 16 << 10

// versionOf returns the version of an Envoy, from the cache directory if its
// file there speaks of this very binary, and else by asking it. A cache that
// can't be read or written is none.
func versionOf(ctx context.Context, binary, cache string) (envoyVersion, error) {
	info, err := os.Stat(binary)
	if err != nil || cache == "" {
		return askVersion(ctx, binary)
	}
	is := knownVersion{Path: binary, Size: info.Size(), Modified: info.ModTime().UTC()}
	file := filepath.Join(cache, "kuma-dp", "envoy.json")
	var was knownVersion
	if b, err := readLimited(file, maxKnownVersion); err == nil && json.Unmarshal(b, &was) == nil && was.Number != "" {
		is.Number, is.Build = was.Number, was.Build
		if was == is {
			return envoyVersion{number: was.Number, build: was.Build}, nil
		}
	}
	v, err := askVersion(ctx, binary)
	if err != nil {
		return v, err
	}
	is.Number, is.Build = v.number, v.build
	keepVersion(file, is)
	return v, nil
}

// keepVersion writes the file as a whole or not at all: other proxies on this
// machine read it at the same time.
func keepVersion(file string, v knownVersion) {
	b, err := json.Marshal(v)
	if err != nil || os.MkdirAll(filepath.Dir(file), 0o700) != nil {
		return
	}
	f, err := os.CreateTemp(filepath.Dir(file), "envoy-*")
	if err != nil {
		return
	}
	_, err = f.Write(b)
	if f.Close() != nil || err != nil || os.Rename(f.Name(), file) != nil {
		_ = os.Remove(f.Name())
	}
}
