package dp

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// The answer of a binary is kept until its file changes, and a cache that is
// damaged or can't be had is as good as none. Not beside other tests: a program
// that one of them starts may hold the file open that is run here.
func TestVersionOf(t *testing.T) {
	dir := t.TempDir()
	binary, cache, asked := filepath.Join(dir, "envoy"), filepath.Join(dir, "cache"), filepath.Join(dir, "asked")
	install := func(number string, at time.Time) {
		t.Helper()
		script := fmt.Sprintf("#!/bin/sh\necho x >> %s\necho 'envoy  version: abc/%s/Clean/RELEASE/BoringSSL'\n", asked, number)
		if err := os.WriteFile(binary, []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(binary, at, at); err != nil {
			t.Fatal(err)
		}
	}
	check := func(cache, number string, times int) {
		t.Helper()
		v, err := versionOf(t.Context(), binary, cache)
		if err != nil || v.number != number || v.build != "abc/"+number+"/Clean/RELEASE/BoringSSL" {
			t.Errorf("version %+v, %v; want %s", v, err, number)
		}
		b, _ := os.ReadFile(asked)
		if len(b) != 2*times {
			t.Errorf("asked %d times, want %d", len(b)/2, times)
		}
	}
	now := time.Now()
	install("1.40.0", now)
	check(cache, "1.40.0", 1)
	check(cache, "1.40.0", 1)
	install("1.40.1", now.Add(time.Second)) // as long as the one before
	check(cache, "1.40.1", 2)
	check(cache, "1.40.1", 2)
	if err := os.WriteFile(filepath.Join(cache, "kuma-dp", "envoy.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	check(cache, "1.40.1", 3)
	check(cache, "1.40.1", 3)
	check("", "1.40.1", 4)
	check(binary, "1.40.1", 5) // not a directory
	if left, err := filepath.Glob(filepath.Join(cache, "kuma-dp", "*")); err != nil || len(left) != 1 {
		t.Errorf("files in the cache: %v, %v", left, err)
	}
	if err := os.Remove(binary); err != nil {
		t.Fatal(err)
	}
	if _, err := versionOf(t.Context(), binary, cache); err == nil {
		t.Error("a binary that is gone has a version")
	}
}
