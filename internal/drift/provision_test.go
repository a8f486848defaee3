// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/labfile"
)

// The steps are what a Labfile takes, with the texts as they are on the disk.
func TestProvision(t *testing.T) {
	texts := map[string]string{
		"/etc/plain": "a\nb\n", "/etc/empty": "", "/etc/word": "true", "/etc/vars": "$A ${B} $$ $${C} ${{ D }} $${{ E }}\n$",
		"/etc/odd": " lead\n\ttab \n\n\u00a0\x1b[1m\r\nü", "/srv/it's $${x}": "x\n\n\n",
	}
	tree := t.TempDir()
	write(t, filepath.Join(tree, "etc/gone/file"), "x")
	write(t, filepath.Join(tree, "etc/hosts"), "x")
	base := image(t, tree, "64M")
	for name, text := range texts {
		write(t, filepath.Join(tree, name), text)
	}
	write(t, filepath.Join(tree, "etc/key"), "-----BEGIN PRIVATE KEY-----\nsecret\n")
	write(t, filepath.Join(tree, "srv/blob"), "\x00\x01")
	if err := os.RemoveAll(filepath.Join(tree, "etc/gone")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(tree, "etc/hosts"), 0o600); err != nil {
		t.Fatal(err)
	}
	old, now := root(t, Layer{base, "raw"}), root(t, Layer{image(t, tree, "64M"), "raw"})
	r, err := Compare(context.Background(), old, now, Options{})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	steps, err := Provision(context.Background(), old, now, r.Changes, ProvisionOptions{Files: dir, From: "./kept"})
	if err != nil {
		t.Fatal(err)
	}
	l, err := labfile.Parse("Labfile", []byte("lab: x\nmachines:\n  m:\n    box: builtin/tiny\n    provision:\n"+steps), labfile.Options{})
	if err != nil {
		t.Fatalf("%v\n%s", err, steps)
	}
	var shells, from string
	for _, p := range l.Machines[0].Provision {
		switch {
		case p.Kind == lab.ProvisionShell:
			shells += p.Shell
		case p.Content == nil:
			from += p.From + "\n"
		case texts[p.To] != *p.Content:
			t.Errorf("%s is %q, want %q", p.To, *p.Content, texts[p.To])
		default:
			delete(texts, p.To)
		}
	}
	if len(texts) > 0 {
		t.Errorf("no steps for %q:\n%s", texts, steps)
	}
	if !strings.Contains(shells, "rm -rf -- /etc/gone\n") || !strings.Contains(shells, "chmod -- 0600 /etc/hosts\n") {
		t.Errorf("commands:\n%s", shells)
	}
	if kept, err := os.ReadFile(filepath.Join(dir, "srv/blob")); from != "./kept/srv/blob\n" || err != nil || string(kept) != "\x00\x01" {
		t.Errorf("kept %q as %q: %v", kept, from, err)
	}
	if strings.Contains(steps, "secret\n") || !strings.Contains(steps, `# "/etc/key" has secrets`) {
		t.Errorf("a secret:\n%s", steps)
	}
}
