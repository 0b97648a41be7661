package storetest

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"kuma/internal/store"
)

// parts is how many resources each transaction of WriteForEver writes.
const parts = 5

// WriteForEver is for a process that is killed: it writes transactions with
// ascending numbers, and says each number once it is written. From number 4 on,
// each also deletes what the third before it made. Sizes differ, so that what is
// kept grows and shrinks.
func WriteForEver(s store.Store) error {
	n, err := lastNumber(s)
	if err != nil {
		return err
	}
	types := NewTypes()
	for n++; ; n++ {
		var writes []store.Write
		for part := range parts {
			spec := &FruitSpec{Seeds: n, Notes: map[string]string{"text": strings.Repeat("x", n*37%3000)}}
			writes = append(writes, store.Set(types.Fruit.Make("m", fmt.Sprint("part-", part), spec)))
		}
		writes = append(writes, store.Create(types.Basket.Make("", fmt.Sprint(n), &FruitSpec{Seeds: n})))
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
		spec := r.Spec.(*FruitSpec)
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

// Kill kills processes that run WriteForEver, each at any moment after its
// start or after something it wrote: every transaction that it has acknowledged
// must be there, and none in part. A process that is killed leaves its writes
// with the kernel or the server; that they are on the disk too is fsync's
// promise, which only a power failure tests. Warm is about how long a start
// takes.
func Kill(t *testing.T, rounds int, warm time.Duration, child func(round int) *exec.Cmd, o Opener) {
	random := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	written := 0
	for round := range rounds {
		cmd := child(round)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		after := time.Duration(random.Int64N(int64(3 * warm)))
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
		s := o.Open(t)
		n, err := lastNumber(s)
		if closed := s.Close(); err == nil {
			err = closed
		}
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
}
