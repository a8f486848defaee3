// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// built makes a store by building a box, besides what is in another store.
func (a *account) built(box, more string) (string, error) {
	w, err := a.newWorld()
	if err != nil {
		return "", err
	}
	store := filepath.Join(w.data(), "boxes")
	if more != "" {
		if err := errors.Join(link(more, store), w.own(w.base)); err != nil {
			return "", err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if out, err := w.command(ctx, labBinary, "box", "build", box).CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", box, err, out)
	}
	return store, nil
}

// copied makes a store by copying another one, which may be somebody else's.
func (a *account) copied(from string, err error) (string, error) {
	if err != nil {
		return "", err
	}
	w, err := a.newWorld()
	if err != nil {
		return "", err
	}
	store := filepath.Join(w.data(), "boxes")
	return store, errors.Join(os.MkdirAll(w.data(), 0o700), os.CopyFS(store, os.DirFS(from)), w.own(w.base))
}

// debian gives the world the box builtin/debian-12, which takes long to build: tests
// that need none are not kept waiting for it.
func (w *world) debian(t testing.TB) *world {
	t.Helper()
	w.stocked(t, w.both)
	return w
}

// stocked gives the world the boxes of a store.
func (w *world) stocked(t testing.TB, store func() (string, error)) {
	t.Helper()
	from, err := store()
	if err == nil {
		err = errors.Join(link(from, filepath.Join(w.data(), "boxes")), w.own(w.path("data")))
	}
	if err != nil {
		t.Fatalf("the built-in boxes: %v", err)
	}
}

// link gives a store the boxes of another. The content is the same files, which nobody
// writes to; all else is a copy.
func link(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		dst := filepath.Join(to, rel)
		switch {
		case d.IsDir():
			return os.MkdirAll(dst, 0o700)
		case filepath.Base(filepath.Dir(path)) != "sha256":
			return copyFile(path, dst, 0o600)
		}
		if err := os.Link(path, dst); !errors.Is(err, fs.ErrExist) {
			return err
		}
		return nil
	})
}

// TestBuildWithoutRoot builds a box from nothing as an ordinary user, and gets
// the very box that the store has already.
func TestBuildWithoutRoot(t *testing.T) {
	s := ordinary(t).site(t, one)
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
