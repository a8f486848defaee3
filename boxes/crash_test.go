// SPDX-License-Identifier: Apache-2.0

package boxes_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/boxes"
)

// crashEnv makes this test binary ingest a disk instead, say so, and wait to be
// killed in the middle: "STORE:DISK".
const crashEnv = "LAB_TEST_INGEST_AND_HANG"

func TestMain(m *testing.M) {
	if v := os.Getenv(crashEnv); v != "" {
		dir, path := filepath.SplitList(v)[0], filepath.SplitList(v)[1]
		s, err := boxes.Open(dir)
		if err == nil {
			_, err = s.Ingest(context.Background(), boxes.Ingredients{Disk: path, Progress: func(done, total int64) {
				if done > total/2 {
					fmt.Println("half")
					select {}
				}
			}}, "crashed")
		}
		fmt.Fprintln(os.Stderr, "not killed:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// What a process that was killed in the middle leaves behind is no part of the
// store, and the next one to add a box sweeps it up.
func TestIngestKilled(t *testing.T) {
	s := open(t)
	before := files(t, s.Dir())
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 32<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe)
	cmd.Env = append(os.Environ(), crashEnv+"="+s.Dir()+string(filepath.ListSeparator)+path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var word string
	if _, err := fmt.Fscan(out, &word); err != nil || word != "half" {
		t.Fatalf("the other process said %q (%v)", word, err)
	}

	// While it lives, nobody takes its files away.
	during := files(t, s.Dir())
	if _, err := s.Prune(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(during, files(t, s.Dir())); diff != "" || len(during) == len(before) {
		t.Errorf("pruning during an ingest changed the store (-before +after)\n%s", diff)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()

	if err := get(s, "crashed"); !errors.Is(err, boxes.ErrNotFound) {
		t.Errorf("Get = %v, want ErrNotFound", err)
	}
	if err := s.Verify(t.Context(), nil); err != nil {
		t.Error(err)
	}
	b, err := s.Ingest(t.Context(), boxes.Ingredients{Disk: write(t, rawDisk("x"))})
	if err != nil {
		t.Fatal(err)
	}
	// Index, lock, layout, and three blobs.
	if got := files(t, s.Dir()); len(got) != 6 {
		t.Errorf("files after the next ingest: %q", got)
	}
	if _, err := s.Get(t.Context(), b.Digest.String()); err != nil {
		t.Error(err)
	}
}
