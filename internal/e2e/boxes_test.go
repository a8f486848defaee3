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

// stock fills a store with the built-in boxes: the first user builds them, the other
// gets a copy.
func (a *account) stock() (string, error) {
	w, err := a.newWorld()
	if err != nil {
		return "", err
	}
	store := filepath.Join(w.data(), "boxes")
	from := os.Getenv("LAB_E2E_BOXES") // a store to copy, for the impatient developer
	if from == "" && a != accounts[0] {
		if from, err = accounts[0].boxes(); err != nil {
			return "", err
		}
	}
	if from != "" {
		return store, errors.Join(os.MkdirAll(w.data(), 0o700), os.CopyFS(store, os.DirFS(from)), w.own(w.base))
	}
	for _, name := range []string{"builtin/tiny", "builtin/debian-12"} {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		cmd := w.command(ctx, labBinary, "box", "build", name)
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("building %s: %w\n%s", name, err, out)
		}
	}
	return store, nil
}

// link makes a store that has the boxes of another. The content is the same files, which
// nobody writes to; all else is a copy.
func link(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		switch dst := filepath.Join(to, rel); {
		case d.IsDir():
			return os.MkdirAll(dst, 0o700)
		case filepath.Base(filepath.Dir(path)) == "sha256":
			return os.Link(path, dst)
		default:
			return copyFile(path, dst, 0o600)
		}
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
