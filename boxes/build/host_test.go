// SPDX-License-Identifier: Apache-2.0

package build

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/labfile/lab/boxes/recipes"
)

func TestSubordinate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "subuid")
	if err := os.WriteFile(file, []byte("# ids\nann:100000:65536\n1002:165536:65536\nfew:300000:1000\nbad:line\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, uid string
		want      bool
	}{{"ann", "1001", true}, {"bob", "1002", true}, {"few", "1003", false}, {"bad", "1004", false}, {"an", "100", false}} {
		if got := subordinate(file, tc.name, tc.uid); got != tc.want {
			t.Errorf("subordinate(%s, %s) = %v, want %v", tc.name, tc.uid, got, tc.want)
		}
	}
	if subordinate(filepath.Join(t.TempDir(), "none"), "ann", "1001") {
		t.Error("a file that is not there gives ids")
	}
}

func TestModeSaysWhatIsMissing(t *testing.T) {
	if err := Check(t.Context()); err != nil {
		t.Fatalf("this host lacks what boxes are built with: %v", err)
	}
	_, err := mode(t.Context(), 54321, t.TempDir())
	var lacks *IncapableError
	if !errors.As(err, &lacks) || !errors.Is(err, ErrIncapable) {
		t.Fatalf("got %v, want an IncapableError", err)
	}
	if want := "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 54321"; lacks.Cure != want {
		t.Errorf("cure is %q, want %q", lacks.Cure, want)
	}
}

func TestBuildFilesKnowsItsBoxes(t *testing.T) {
	_, err := (&Builder{}).BuildFiles(context.Background(), "builtin/huge", t.TempDir(), func(Progress) {})
	if want := `building box "builtin/huge": no such built-in box: "huge" (there are debian-12, tiny)`; err == nil || err.Error() != want || !errors.Is(err, recipes.ErrNotFound) {
		t.Errorf("got %v, want %s", err, want)
	}
}
