package boltstore_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"kuma/internal/store/storetest"
)

// childPath, where set, makes this test binary a process that writes to the
// store in it until it is killed.
const childPath = "BOLTSTORE_TEST_CHILD_PATH"

func TestMain(m *testing.M) {
	if path := os.Getenv(childPath); path != "" {
		s, err := tryOpen(path)
		if err == nil {
			err = storetest.WriteForEver(s)
		}
		fmt.Println("error", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// TestKill kills a process that writes, at any moment, from the making of the
// file on.
func TestKill(t *testing.T) {
	t.Parallel()
	rounds := 200
	if testing.Short() {
		rounds = 20
	}
	path := filepath.Join(t.TempDir(), "kuma.db")
	storetest.Kill(t, rounds, 10*time.Millisecond, func(round int) *exec.Cmd {
		if round%20 == 0 {
			// Begin anew, so that the making of the file is met too.
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
		}
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), childPath+"="+path)
		return cmd
	}, opener(path))
	if left, _ := filepath.Glob(path + ".new-*"); len(left) > 1 {
		t.Errorf("left behind: %v", left)
	}
}
