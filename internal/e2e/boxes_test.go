// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// stock fills the store of a world with the built-in boxes: the first world
// builds them, the other gets a copy.
func (w *world) stock(t testing.TB) *world {
	t.Helper()
	w.boxes.Do(func() {
		from := os.Getenv("LAB_E2E_BOXES") // a store to copy, for the impatient developer
		if from == "" && w != worlds[0] {
			from = filepath.Join(worlds[0].stock(t).data(), "boxes")
		}
		if from != "" {
			to := filepath.Join(w.data(), "boxes")
			if err := os.MkdirAll(w.data(), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.CopyFS(to, os.DirFS(from)); err != nil {
				t.Fatal(err)
			}
			if err := w.own(w.path("data")); err != nil {
				t.Fatal(err)
			}
			return
		}
		s := w.site(t, one)
		for _, name := range []string{"builtin/tiny", "builtin/debian-12"} {
			r := s.lab("box", "build", name)
			if r.code != 0 {
				t.Fatal(r)
			}
			t.Logf("built %s in %s", name, r.took)
		}
	})
	return w
}

// TestBuildWithoutRoot builds a box from nothing as an ordinary user, and gets
// the very box that the store has already.
func TestBuildWithoutRoot(t *testing.T) {
	w := worlds[len(worlds)-1]
	s := w.stock(t).site(t, one)
	fresh := []string{"XDG_DATA_HOME=" + filepath.Join(s.dir, "data")}
	r := s.startWith(fresh, "", "box", "build", "builtin/tiny").end()
	if r.code != 0 {
		t.Fatal(r)
	}
	t.Logf("built builtin/tiny in %s", r.took)
	had := digests(t, s.ok("box", "list", "--json"))
	has := digests(t, s.startWith(fresh, "", "box", "list", "--json").end().stdout)
	if has["builtin/tiny"] == "" || has["builtin/tiny"] != had["builtin/tiny"] {
		t.Errorf("builtin/tiny built twice: %q, then %q", had["builtin/tiny"], has["builtin/tiny"])
	}
}

// digests reads the answer of "lab box list --json".
func digests(t *testing.T, out string) map[string]string {
	t.Helper()
	var list struct {
		Boxes []struct {
			Names  []string `json:"names"`
			Digest string   `json:"digest"`
		} `json:"boxes"`
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("lab box list --json: %v in %q", err, out)
	}
	all := map[string]string{}
	for _, b := range list.Boxes {
		if !strings.HasPrefix(b.Digest, "sha256:") {
			t.Errorf("%q have the digest %q", b.Names, b.Digest)
		}
		for _, name := range b.Names {
			all[name] = b.Digest
		}
	}
	return all
}
