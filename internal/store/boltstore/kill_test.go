package boltstore_test

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kuma/internal/store"
	"kuma/internal/store/storetest"
)

// childPath, where set, makes this test binary a process that writes to the
// store in it until it is killed.
const childPath = "BOLTSTORE_TEST_CHILD_PATH"

func TestMain(m *testing.M) {
	if path := os.Getenv(childPath); path != "" {
		if err := writeForEver(path); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// parts is how many resources each transaction of the child writes.
const parts = 5

// writeForEver writes transactions with ascending numbers, and says each number
// once it is written. From number 3 on, each also deletes what the third before
// it made. Sizes differ, so that the file grows and pages are split and merged.
func writeForEver(path string) error {
	s, err := tryOpen(path)
	if err != nil {
		return err
	}
	n, err := lastNumber(s)
	if err != nil {
		return err
	}
	types := storetest.NewTypes()
	for n++; ; n++ {
		var writes []store.Write
		for part := range parts {
			spec := &storetest.FruitSpec{Seeds: n, Notes: map[string]string{"text": strings.Repeat("x", n*37%3000)}}
			writes = append(writes, store.Set(types.Fruit.Make("m", fmt.Sprint("part-", part), spec)))
		}
		writes = append(writes, store.Create(types.Basket.Make("", fmt.Sprint(n), &storetest.FruitSpec{Seeds: n})))
		if n > 3 {
			writes = append(writes, store.Remove(types.Basket.Key("", fmt.Sprint(n-3))))
		}
		if _, err := s.Put(context.Background(), writes...); err != nil {
			return err
		}
		fmt.Println("wrote", n)
	}
}

// lastNumber is that of the last transaction in the store, all of which must be
// there.
func lastNumber(s store.Store) (int, error) {
	list, revision, err := s.List(context.Background(), "", "")
	if err != nil || len(list) == 0 {
		return 0, err
	}
	n := int(revision)
	if want := parts + min(n, 3); len(list) != want {
		return 0, fmt.Errorf("revision %d has %d resources, want %d", n, len(list), want)
	}
	for _, r := range list {
		spec := r.Spec.(*storetest.FruitSpec)
		ok := spec.Seeds == n && int(r.Version) == n
		if r.Kind.Name == "Basket" {
			ok = n-spec.Seeds < 3 && int(r.Version) == spec.Seeds && r.Name == fmt.Sprint(spec.Seeds)
		}
		if !ok {
			return 0, fmt.Errorf("revision %d has %s of transaction %d in version %d", n, r.Key(), spec.Seeds, r.Version)
		}
	}
	return n, nil
}

// TestKill kills a process that writes, at any moment, from the making of the
// file on: every transaction that it has acknowledged must be there, and none
// in part. A process that is killed leaves its writes with the kernel; that
// they are on the disk too is fsync's promise, which only a power failure tests.
func TestKill(t *testing.T) {
	t.Parallel()
	rounds := 200
	if testing.Short() {
		rounds = 20
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "kuma.db")
	random := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	written := 0
	for round := range rounds {
		if round%20 == 0 {
			// Begin anew, so that the making of the file is met too.
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
		}
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), childPath+"="+path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// The moment: some time after the start, which is 10 ms or so away, or
		// some time after an acknowledgement.
		after := time.Duration(random.Int64N(int64(30 * time.Millisecond)))
		atLine := random.IntN(30)
		if round%2 == 0 {
			atLine = -1
			time.AfterFunc(after, func() { cmd.Process.Kill() })
		}
		acknowledged := 0
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if _, err := fmt.Sscanf(lines.Text(), "wrote %d", &acknowledged); err != nil {
				t.Fatalf("round %d: the process says: %s", round, lines.Text())
			}
			if atLine == 0 {
				time.AfterFunc(after/30, func() { cmd.Process.Kill() })
			}
			atLine--
		}
		_ = cmd.Wait()

		if _, err := os.Stat(path); err != nil {
			if acknowledged > 0 {
				t.Fatalf("round %d: transaction %d was acknowledged, but: %v", round, acknowledged, err)
			}
			continue
		}
		s, err := tryOpen(path)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		n, err := lastNumber(s)
		s.Close()
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		// The one on its way when it was killed may be there or not.
		if acknowledged > 0 && n != acknowledged && n != acknowledged+1 {
			t.Fatalf("round %d: transaction %d was acknowledged, the store has %d", round, acknowledged, n)
		}
		if acknowledged > 0 {
			written++
		}
	}
	if written < rounds/2 {
		t.Errorf("only %d of %d processes wrote anything before they were killed", written, rounds)
	}
	if left, _ := filepath.Glob(path + ".new-*"); len(left) > 1 {
		t.Errorf("left behind: %v", left)
	}
}
