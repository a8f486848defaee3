// SPDX-License-Identifier: Apache-2.0

package dirs

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/labfile/lab/internal/lab"
)

const shop lab.ID = "shop-1f3a9c2b"

// people returns the same data directory as two callers see it whose environments name
// different runtime directories.
func people(t *testing.T) (one, two Dirs) {
	t.Helper()
	root := t.TempDir()
	one = Dirs{Data: filepath.Join(root, "data"), Run: filepath.Join(root, "one", "lab")}
	two = Dirs{Data: one.Data, Run: filepath.Join(root, "two", "lab")}
	for _, dir := range []string{one.Lab(shop), one.Run, two.Run} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return one, two
}

func claim(t *testing.T, d Dirs) {
	t.Helper()
	if err := d.Claim(shop); err != nil {
		t.Fatal(err)
	}
}

// finds checks which runtime directory all callers find.
func finds(t *testing.T, want string, all ...Dirs) {
	t.Helper()
	for _, d := range all {
		if got := d.RunLab(shop); got != filepath.Join(want, string(shop)) {
			t.Errorf("with %s: %s, want it in %s", d.Run, got, want)
		}
	}
}

func TestClaim(t *testing.T) {
	one, two := people(t)
	finds(t, one.Run, one)
	finds(t, two.Run, two)
	claim(t, one)
	finds(t, one.Run, one, two)
	claim(t, two) // too late
	finds(t, one.Run, one, two)

	// It went with the last login, and comes with the next.
	if err := os.RemoveAll(one.Run); err != nil {
		t.Fatal(err)
	}
	finds(t, one.Run, one, two)

	// What is not the owner's alone is nobody's.
	if err := os.Mkdir(one.Run, 0o755); err != nil {
		t.Fatal(err)
	}
	finds(t, two.Run, two)
	claim(t, two)
	finds(t, two.Run, one, two)
}

// A directory that cannot be made again is given up.
func TestClaimAnother(t *testing.T) {
	one, two := people(t)
	claim(t, one)
	above := filepath.Dir(one.Run)
	if err := os.RemoveAll(above); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(above, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	finds(t, two.Run, two)
	claim(t, two)
	if err := os.Remove(above); err != nil {
		t.Fatal(err)
	}
	finds(t, two.Run, one, two)
}

func TestClaimOfNothing(t *testing.T) {
	one, two := people(t)
	if err := os.Remove(one.Lab(shop)); err != nil {
		t.Fatal(err)
	}
	claim(t, one)
	if _, err := os.Stat(one.Lab(shop)); err == nil {
		t.Error("a lab came into being")
	}
	for _, content := range []string{"", "\n", "run/lab\n", "/\x00\n", filepath.Dir(one.Run) + "/../one/lab\n"} {
		if err := os.MkdirAll(one.Lab(shop), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(one.Runtime(shop), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		finds(t, two.Run, two)
		claim(t, two)
		finds(t, two.Run, one, two)
	}
}

// Of all who claim at once one wins.
func TestClaimAtOnce(t *testing.T) {
	one, _ := people(t)
	var wg sync.WaitGroup
	found := make([]string, 20)
	for i := range found {
		d := Dirs{Data: one.Data, Run: filepath.Join(filepath.Dir(one.Data), fmt.Sprint(i))}
		wg.Go(func() {
			if err := d.Claim(shop); err != nil {
				t.Error(err)
			}
			found[i] = d.RunLab(shop)
		})
	}
	wg.Wait()
	for _, path := range found {
		if path != found[0] {
			t.Errorf("one found %s, another %s", found[0], path)
		}
	}
}
